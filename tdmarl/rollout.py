"""Rollouts without tensordicts inside: policy, step, resets and sums of rewards as compiled functions of tensors.

A `Rollout` stands in for a collector's ordinary loop where an environment offers `transitions` (a compiled
`tdmarl.VmasEnv` does). The policy is recorded and compiled like the environment. One that cannot be recorded, or whose
Python changes while it acts, is called as it is.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdmarl import compiling, tracing
from tdmarl.chunk import CHUNK, Chunk
from tdmarl.cuda_graph import Captured
from tdmarl.functions import MOST_BUILDS, Layout, Leaves, ModuleFunction, leaves
from tdmarl.keys import Key, as_tuple
from tdmarl.memory import Memory


class Columns:
    """A batch `[E, T]` that is filled step by step.

    A step's tensors are kept until there are some steps of them, and then written together: a write for each step
    costs more, and keeping all steps would need the batch's memory twice.

    Args:
        steps (int): T.
        memory (Memory): where its tensors are.
    """

    def __init__(self, steps: int, memory: Memory) -> None:
        self.entries: Leaves = {}
        self._steps, self._written, self._memory = steps, 0, memory
        self._kept: list[Leaves] = []

    def add(self, step: Leaves) -> None:
        """One step's tensors `[E, ...]`, of the same keys in every step."""
        self._kept.append(step)
        if len(self._kept) == CHUNK or self._written + len(self._kept) == self._steps:
            self.flush()

    def flush(self) -> None:
        """Writes what is kept."""
        for key, first in self._kept[0].items() if self._kept else ():
            torch.stack([kept[key] for kept in self._kept], 1, out=self.part(key, first, 0, len(self._kept)))
        self.go_on(len(self._kept))
        self._kept = []

    def part(self, key: Key, like: Tensor, first: int, count: int) -> Tensor:
        """`[E, count, ...]`, where an entry's next steps belong.

        Args:
            key (tuple): which entry.
            like (Tensor): `[E, ...]`, one step of it.
            first (int): how many steps after those that are written it begins.
            count (int): of how many steps.
        """
        whole = self.entries.get(key)
        if whole is None:
            shape = (like.shape[0], self._steps, *like.shape[1:])
            whole = self.entries[key] = self._memory.empty(key, shape, like.dtype, like.device)
        return whole.narrow(1, self._written + first, count)

    def go_on(self, count: int) -> None:
        """So many more steps are written."""
        self._written += count


class OneGraph:
    """A whole step of a rollout as one CUDA graph: policy, environment, resets and sums of rewards.

    Args:
        act (ModuleFunction): the policy.
        made (CompiledVmas): the environment's functions.
        combine (callable): from a step's entries, the transition and what was carried to it: all of the step's
            entries, and what is carried on.
        present (dict): what is carried, an example.
        sums (list of keys): which of that are sums of rewards.
    """

    def __init__(
        self, act: ModuleFunction, made: Any, combine: Callable[..., Any], present: Leaves, sums: list[Key]
    ) -> None:
        self.parts = act, made
        self._made, self._carried = made, list(present)
        state, spares = made.recording.statics
        self._places = [*act.parameters, *state, *spares]
        n, m, k = len(act.parameters), len(act.parameters) + len(state), len(self._places)
        back = [
            *act.changed,
            *range(n, m + 3),
            *range(k, k + len(present)),
        ]  # three counters change of the spares
        self._first = len(back)

        def run(*inputs: Tensor) -> list[Tensor]:
            before = dict(zip(present, inputs[k:]))
            seen = {
                key: value.clone() for key, value in before.items() if key not in sums
            }  # it is overwritten
            written, changed = act.inside(list(inputs[:n]), seen)
            new_sums = [before[key] for key in sums]
            after, counters, found = made.inside(
                list(inputs[n:m]), list(inputs[m:k]), seen | written, new_sums
            )
            step, following = combine(seen | written, found)
            self._keys = list(step)
            return [*changed, *after, *counters, *(following[key] for key in present), *step.values()]

        device = state[0].device
        inputs = [*self._places, *present.values()]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self._call = Captured(run, inputs, list(range(k)), [(i, o) for o, i in enumerate(back)])

    def __call__(self, present: Leaves) -> tuple[Leaves, Leaves]:
        """The step's entries, and what is carried on, which the next call overwrites."""
        self._made.begin_in_place()
        outputs = self._call(*self._places, *(present[key] for key in self._carried))
        carried = outputs[self._first - len(self._carried) : self._first]
        return dict(zip(self._keys, outputs[self._first :])), dict(zip(self._carried, carried))


class Rollout:
    """Fills batches from a compiled environment.

    Args:
        env (EnvBase): any; only one with `transitions` and `go_on_from` is rolled out here, see `tdmarl.VmasEnv`.
        policy (callable): what acts.
        sums (dict): for each reward's key that of its sum over the episode.
        hidden (list of keys): states that the policy reads at the root and writes under `next`.
    """

    def __init__(
        self,
        env: Any,
        policy: Callable[[TensorDictBase], TensorDictBase],
        sums: dict[NestedKey, NestedKey],
        hidden: list[NestedKey],
    ) -> None:
        self._env, self._policy = env, policy
        self._sums = {as_tuple(reward): as_tuple(entry) for reward, entry in sums.items()}
        self._hidden = [as_tuple(key) for key in hidden]
        self._totals = list(self._sums.values())
        self._act: ModuleFunction | None = None
        self._graph: OneGraph | None = None
        self._chunk: Chunk | None = None
        self._unfit: Any = None
        self._memory = Memory()
        self.whole_because = ""  # why steps are not recorded in chunks, where that is tried
        self._builds = 0
        self.reason: str | None = (
            None if isinstance(policy, TensorDictModuleBase) else "it is no TensorDictModule"
        )

    @property
    def in_chunks(self) -> bool:
        """Whether steps are recorded in chunks."""
        return self._chunk is not None

    def is_possible(self) -> bool:
        """Whether the environment offers its functions; one that is compiled at its first use is compiled here."""
        return hasattr(type(self._env), "transitions") and self._env.transitions() is not None

    def __call__(
        self, root: TensorDictBase, at_random: Callable[[TensorDictBase], TensorDictBase], acts: list[bool]
    ) -> tuple[TensorDict, TensorDict]:
        """A batch `[E, T]`, and what the policy sees next.

        Args:
            root (TensorDictBase): what it sees now, with hidden states and sums.
            at_random (callable): acts in place of the policy in some steps.
            acts (list of bool): for each step, whether the policy acts.
        """
        layout, columns = Layout(root), Columns(len(acts), self._memory)
        present = {key: value.contiguous() for key, value in leaves(root).items()}
        act = self._compiled(layout.nest(_without(present, self._totals))) if any(acts) else None
        shown: list[Key] = []
        made: Any = None
        try:
            with _no_garbage():
                done = 0
                while done < len(acts):
                    compiled = self._env.transitions()
                    if compiled is None:
                        self._chunk = self._graph = None
                        raise RuntimeError(
                            f"The environment cannot go on compiled: {self._env.fallback_reason}."
                        )
                    made = compiled
                    shown, own = made.recording.paths, acts[done]
                    chunk = self._recorded(act, made, present, len(acts)) if own else None
                    if chunk is not None:
                        count = min(chunk.steps, len(acts) - done)
                        try:
                            chunk(present, count, columns)
                        finally:
                            present = chunk.now
                        done += count
                        continue
                    if act is not None and own and made.fits_one_graph:
                        step, present = self._captured(act, made, present)(present)
                    else:
                        seen = _without(present, self._totals)
                        written = (
                            self._written(act, seen, layout) if own else self._by(at_random, seen, layout)
                        )
                        sums = [present[self._sums[key]] for key in made.recording.reward_paths]
                        found = made.transition(seen | written, sums)
                        step, present = self._combine(made, seen | written, found)
                    columns.add(step)
                    done += 1
        finally:
            present = {key: value.clone() for key, value in present.items()}  # a graph overwrites it
            if shown:
                if self._chunk is not None:
                    made.hold([x.clone() for x in made.state()])
                self._env.go_on_from(made.nest([present[key] for key in shown]))
        return layout.nest(columns.entries, len(acts)), layout.nest(present)

    def _recorded(self, act: ModuleFunction | None, made: Any, present: Leaves, steps: int) -> Chunk | None:
        """Steps of policy and environment in fixed places, where these can be recorded."""
        parts = act, made, steps
        if act is None or not made.fits_tapes or self._unfit == parts:
            return None
        if self._chunk is None or self._chunk.parts != parts:
            sums = [self._sums[key] for key in made.recording.reward_paths]
            combine = functools.partial(self._combine, made)
            try:
                self._chunk = Chunk(act, made, combine, present, sums, parts[-1])
            except Exception as error:  # whatever recording comes upon; step by step always works
                self._chunk, self._unfit, self.whole_because = None, parts, str(error)
        return self._chunk

    def _written(self, act: ModuleFunction | None, seen: Leaves, layout: Layout) -> Leaves:
        return self._by(self._policy, seen, layout) if act is None else act(seen)

    @staticmethod
    def _by(policy: Callable[[TensorDictBase], TensorDictBase], seen: Leaves, layout: Layout) -> Leaves:
        """What a policy writes that is called as it is."""
        out = leaves(policy(layout.nest(dict(seen))))
        return {key: value for key, value in out.items() if seen.get(key) is not value}

    def _captured(self, act: ModuleFunction, made: Any, present: Leaves) -> OneGraph:
        if self._graph is None or self._graph.parts != (act, made):
            sums = [self._sums[key] for key in made.recording.reward_paths]
            self._graph = OneGraph(act, made, functools.partial(self._combine, made), present, sums)
        return self._graph

    def _combine(self, made: Any, step: Leaves, found: Any) -> tuple[Leaves, Leaves]:
        """What goes into the batch, and the next root."""
        rewards = made.recording.reward_paths
        shown = made.flat(found.shown)
        following = dict(shown) if found.following is found.shown else made.flat(found.following)
        for key, reward, total, kept in zip(rewards, found.rewards, found.totals, found.sums):
            step["next", *key], step["next", *self._sums[key]] = reward, total
            following[self._sums[key]] = kept
        for key, value in shown.items():
            step["next", *key] = value
        done = step["next", "done"]
        for key in self._hidden:
            state = step.get(("next", *key))
            if state is None:
                raise KeyError(
                    f"The policy declares the hidden state {key} but did not write {('next', *key)}."
                )
            following[key] = state.masked_fill(done.reshape(-1, *[1] * (state.ndim - 1)), 0)
        following["is_init",] = done
        return step, following

    def _compiled(self, root: TensorDictBase) -> ModuleFunction | None:
        """The policy as a function, made anew where its Python has changed; None where it is called as it is."""
        if self.reason is not None:
            return None
        try:
            if self._act is not None and self._act.is_stale():
                self._act = None
            if self._act is None:
                self._builds += 1
                if self._builds > MOST_BUILDS:
                    raise tracing.Untraceable(f"its Python changed {MOST_BUILDS} times")
                with compiling.announced("the policy"):
                    self._act = ModuleFunction(self._policy, root, self._env.mode)  # type: ignore[arg-type]
        except Exception as error:  # whatever recording and compiling come upon; calling it always works
            self._act, self.reason = None, f"{error}"
        return self._act


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Keeps Python from looking for cycles among the thousands of tensors of a rollout, which are in none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _without(entries: Leaves, keys: list[Key]) -> Leaves:
    return {key: value for key, value in entries.items() if key not in keys}
