"""Runs a VMAS environment as compiled graphs over a state that lives in tensors of their own."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils import _pytree as pytree

from tdmarl import host, tracing
from tdmarl.envs.functional import FunctionalVmas
from tdmarl.envs.groups import ENDS, Display
from tdmarl.envs.layout import last, rows
from tdmarl.envs.recording import Recording
from tdmarl.envs.slots import python_values, walk

_PERIOD = 16  # resets between two draws of initial states for all environments


class Advance(NamedTuple):
    """A step, as tensors in the order of a recording's keys."""

    state: list[Tensor]
    valid: list[Tensor]  # [] for each group, if actions are checked
    shown: list[Tensor]
    rewards: list[Tensor]
    totals: list[Tensor]  # of each episode up to this step
    sums: list[Tensor]  # totals, begun anew where the episode ended


class Transition(NamedTuple):
    """A step and the reset of what ended, as tensors in the order of a recording's keys."""

    shown: list[Tensor]  # after the step
    rewards: list[Tensor]
    totals: list[Tensor]  # of each episode up to this step
    following: list[Tensor]  # what is shown where finished environments are reset
    sums: list[Tensor]  # totals, begun anew in those


class _Running:
    """Steps and resets as recorded functions, of a state and of spares that are kept here."""

    def __init__(
        self,
        core: FunctionalVmas,
        display: Display,
        mode: str,
        check: bool,
        spare_resets: bool,
        max_steps: int | None,
    ) -> None:
        if core.slots.changing:
            raise tracing.Untraceable(f"the Python value {core.slots.changing[0]} changes from step to step")
        self._core, self._display, self._groups, self._check = core, display, display.groups, check
        self._envs, self._spare_resets, self._mode = core.simulation.envs, spare_resets, mode
        # On a CPU it is known when an environment has no spare left; elsewhere nobody asks, `_lacks` always holds, and
        # spares are drawn every so many resets.
        self._asks = host.is_free(core.simulation.device)
        period = _PERIOD if max_steps is None else max(1, min(_PERIOD, max_steps // 2))
        self._period = 0 if self._asks else period
        self._spares: list[Tensor] | None = None
        self._own: dict[str, Tensor] | None = None
        self._until_refill, self._lacks = 0, True
        simulation, saved = core.simulation, {name: value.clone() for name, value in core._read().items()}
        streams, fixed_size, grad_mode = core.streams.state(), simulation.fixed_size, simulation.grad_mode
        core.held, simulation.fixed_size, simulation.grad_mode = None, True, torch.no_grad
        simulation.is_recorded = True
        try:
            with core.streams:
                drawn = _host_draws()
                self.recording = Recording(core, display, mode, check, spare_resets)
                if _host_draws() != drawn:
                    raise tracing.Untraceable("it draws numbers from NumPy or from Python's random")
        finally:  # recording is no step, no reset and no draw
            simulation.fixed_size, simulation.grad_mode, simulation.is_recorded = fixed_size, grad_mode, False
            core.streams.load_state(streams)
            core._write({name: value.clone() for name, value in saved.items()})
        self._hold([last(saved[name], self._envs) for name in self.recording.names])
        self._frozen_at = self._frozen()
        self._done = self.recording.paths.index(("done",))

    def step(self, actions: list[Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Nested entries and rewards after a step with one action per group."""
        found = self._advance(actions, self.recording.no_sums)
        paths = self.recording.reward_paths
        nested = {group: {name: value} for (group, name), value in zip(paths, found.rewards)}
        return self.nest(found.shown), nested

    def reset(self, mask: Tensor, shown: TensorDict) -> dict[str, Any]:
        """Resets the environments where `mask` [E] is True; of the others the entries stay `shown`."""
        shown_before = [rows(shown.get(path), self._envs) for path in self.recording.paths]
        leaves = self._restart(mask.contiguous(), shown_before)
        return self.nest(leaves)

    def nest(self, shown: list[Tensor]) -> dict[str, Any]:
        """What is shown as nested entries, with each end for each agent."""
        return self._display.with_ends(pytree.tree_unflatten(shown, self.recording.shown))

    def flat(self, shown: list[Tensor]) -> dict[tuple[str, ...], Tensor]:
        """The same by key; the agents' ends are views of the root's."""
        found = dict(zip(self.recording.paths, shown))
        for group in self._groups:
            for end in ENDS:
                found[group.name, end] = found[end,].unsqueeze(1).expand(-1, len(group.indices), 1)
        return found

    def _actions(self, entries: Any) -> list[Tensor]:
        return [group.action(entries) for group in self._groups]

    def _given(self, actions: list[Tensor], sums: list[Tensor]) -> list[Tensor]:
        """As they were recorded: compiled code does not look."""
        groups = self._groups
        own = [action.to(group.actions.spec.dtype).contiguous() for group, action in zip(groups, actions)]
        return own + [rows(total, self._envs) for total in sums]

    def _parts(self, outputs: list[Tensor], k: int) -> Advance:
        """What a step of the recording returns, apart; `k` groups have sums."""
        n, m = len(self.recording.names), self.recording.shown.num_leaves
        start = n + (len(self._groups) if self._check else 0)
        returns = outputs[start + m :]
        parts = returns[:k], returns[k : 2 * k], returns[2 * k :]
        return Advance(outputs[:n], outputs[n:start], outputs[start : start + m], *parts)

    def refuse_unless(self, valid: list[Tensor]) -> None:
        """Raises ValueError for the first group whose actions are not valid."""
        for group, flag in zip(self._groups, valid):
            group.refuse_unless(flag)

    def _advance(self, actions: list[Tensor], sums: list[Tensor]) -> Advance:
        found = self._parts(
            self.recording.step(self._state() + self._given(actions, sums)), len(sums)
        )
        self.refuse_unless(found.valid)
        self._hold(found.state)
        return found

    def _restart(self, mask: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        recording, state = self.recording, self._state()
        n, m = len(state), len(leaves)
        if self._spare_resets:
            spares = self._filled(state)
            *outputs, lacks = recording.take(state + leaves + spares + [mask])
            self._spares = outputs[n + m :] + spares[3:]
            self._lacks = not host.is_surely_false(lacks)
        else:
            outputs = recording.renew(state + leaves + [mask])
        self._hold(outputs[:n])
        return outputs[n : n + m]

    def forget_spares(self) -> None:
        """The next reset draws anew, as after a seed."""
        self._spares = None

    @property
    def ran_short(self) -> bool:
        """Whether an environment ended more often than initial states were drawn, and so began from one twice."""
        return self._spares is not None and bool(self._spares[2])

    def state_dict(self) -> dict[str, Tensor]:
        """The spares."""
        if self._spares is None:
            return {}
        found = {f"drawn:{i}": value.detach().clone() for i, value in enumerate(self._spares)}
        return {**found, "drawn:until_refill": torch.tensor(self._until_refill)}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Continues where `state_dict` was taken."""
        drawn = {key: value for key, value in state_dict.items() if key.startswith("drawn:")}
        self._until_refill = int(drawn.pop("drawn:until_refill", 0))
        device = self._core.simulation.device
        ordered = [drawn[f"drawn:{i}"].to(device, copy=True) for i in range(len(drawn))]
        self._spares = [last(x, self._envs) for x in ordered] or None
        self._lacks = not self._asks or self._spares is not None and bool((self._spares[0] == 0).any())

    def is_stale(self) -> bool:
        """Whether a Python value or a fixed tensor of the scenario, frozen in the graphs, has changed."""
        return self._frozen() != self._frozen_at

    def _state(self) -> list[Tensor]:
        held = self._core.held
        assert held is not None
        if held is not self._own:  # put there from outside
            held = {name: last(value, self._envs) for name, value in held.items()}
            self._core.held = self._own = held
        return list(held.values())

    def _hold(self, values: list[Tensor]) -> None:
        self._core.held = self._own = dict(zip(self.recording.names, values))

    def _filled(self, state: list[Tensor]) -> list[Tensor]:
        if self._spares is None:
            self._spares = self.recording.refill(self.recording.empty + state)
            self._until_refill, self._lacks = 0, True
        if self._lacks and self._until_refill <= 0:
            self._spares, self._until_refill = self.recording.refill(self._spares + state), self._period
        self._until_refill -= 1
        return self._spares

    def _frozen(self) -> dict[str, Any]:
        scenario = self._core.simulation.scenario
        slots = {name for names in self._core.slots.names.values() for name in names}
        fixed = {
            name: (id(value), value._version)
            for name, _, value in walk(scenario)
            if isinstance(value, Tensor) and name not in slots
        }
        return python_values(scenario) | fixed


class CompiledVmas(_Running):
    """Stands for the eager step and masked reset of a `VmasEnv`.

    VMAS's Python only runs to be recorded; what a step or a reset needs of the state is `FunctionalVmas.held`
    from then on.

    Args:
        core (FunctionalVmas): whose simulation is recorded.
        display (Display): makes entries of what a step shows.
        mode (str): "trace" runs the recorded graphs as they are, "compile" compiles them, "cudagraph" captures
            what was compiled.
        check (bool): refuses actions that are NaN or no valid choice.
        spare_resets (bool): takes initial states from ones drawn ahead.
        max_steps (int, optional): time limit of an episode.

    Raises:
        Untraceable: see there; the core is then as it was.
    """

    def transition(self, entries: Any, sums: list[Tensor]) -> Transition:
        """A step, and the reset of what ended in it.

        Args:
            entries (mapping): has each group's action under `(group, "action")`.
            sums (list of Tensor): of rewards, `[E, n, 1]` per group, since each episode began.
        """
        _, _, shown, rewards, totals, sums = self._advance(self._actions(entries), sums)
        mask = self.ended(shown)
        following = shown if host.is_surely_false(mask) else self._restart(mask, shown)
        return Transition(shown, rewards, totals, following, sums)

    def unended(self, found: Advance) -> Transition:
        """A step after which nothing is reset."""
        return Transition(found.shown, found.rewards, found.totals, found.shown, found.sums)

    def ended(self, shown: list[Tensor]) -> Tensor:
        """Where the episode is over, [E]."""
        return shown[self._done].squeeze(-1)

    @property
    def fits_one_graph(self) -> bool:
        """Whether steps and resets can be a part of one CUDA graph with the policy, which draws from another stream."""
        return self._mode == "cudagraph" and self._spare_resets and not self.recording.draws

    @property
    def fits_tapes(self) -> bool:
        """Whether steps and resets can be done again by `tdmarl.cpu_graph`, beside a policy's draws and unasked."""
        on_cpu = self._core.simulation.device.type == "cpu"
        recording = self.recording
        return self._mode == "compile" and on_cpu and self._spare_resets and not (recording.draws or recording.asks)

    def begin_in_place(self) -> tuple[list[Tensor], list[Tensor]]:
        """State and spares in the places where a graph advances them, the spares filled up if it is time."""
        state = self.recording.statics[0]
        self.put_state(state)
        spares = self.recording.statics[1]
        self.put_spares(spares, state)
        return state, spares

    def put_state(self, places: list[Tensor]) -> None:
        """Goes on from the present state in these places."""
        _copy(places, self._state())
        self._hold(places)

    def state(self) -> list[Tensor]:
        """The present state."""
        return self._state()

    def hold(self, state: list[Tensor]) -> None:
        """The state is in these tensors now."""
        self._hold(state)

    def put_spares(self, places: list[Tensor], state: list[Tensor]) -> None:
        """Moves the spares to these places, filled up if it is time."""
        _copy(places, self._filled(state))
        self._spares = places

    def spares_left(self, lacks: Tensor) -> None:
        """After a reset elsewhere: whether an environment lacks a spare now."""
        self._lacks = not host.is_surely_false(lacks)

    def advance(self, state: list[Tensor], entries: Any, sums: list[Tensor]) -> Advance:
        """A step as a function of the state, without judging its actions, to be captured."""
        given = self._given(self._actions(entries), sums)
        return self._parts(self.recording.step(state + given, inside=True), len(sums))

    def take(
        self, state: list[Tensor], shown: list[Tensor], spares: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
        """State, what is shown, counters and whether one lacks, after what ended was reset, to be captured."""
        n, m = len(state), len(shown)
        *outputs, lacks = self.recording.take.inside(state + shown + spares + [self.ended(shown)])
        return outputs[:n], outputs[n : n + m], outputs[n + m :], lacks

    def inside(
        self, state: list[Tensor], spares: list[Tensor], entries: Any, sums: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], Transition]:
        """State, counters and `transition` as functions, to be captured."""
        found = self.advance(state, entries, sums)
        self.refuse_unless(found.valid)
        state, following, counters, _ = self.take(found.state, found.shown, spares)
        return state, counters, Transition(found.shown, found.rewards, found.totals, following, found.sums)


def _copy(places: list[Tensor], values: list[Tensor]) -> None:
    """Moves what is not there already."""
    moved = [(place, x) for place, x in zip(places, values) if place is not x]
    if moved:
        torch._foreach_copy_([place for place, _ in moved], [x for _, x in moved])


def _host_draws() -> tuple[Any, ...]:
    """Where the random streams of NumPy and Python stand."""
    state: Any = np.random.get_state(legacy=False)
    return state["state"]["key"].tolist(), state["state"]["pos"], random.getstate()
