"""Some steps of a rollout on a CPU, recorded once and done again: no Python but that which looks for ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tdmarl import host
from tdmarl.cpu_graph import NotRecordable, Tape
from tdmarl.functions import Leaves, ModuleFunction
from tdmarl.keys import Key

if TYPE_CHECKING:
    from tdmarl.rollout import Columns

CHUNK = 16  # steps that are kept, at most, before they are written into the batch together
_FEW_BYTES, _MANY_BYTES = 2**22, 2**25  # that a chunk's steps have at least, if there are so many, and at most
_PARTS = 12  # of a batch, of which a chunk between these sizes is one
_MOST_BYTES = 2**30  # of one step, all that is only used within it included
_ALIGNED = 64  # bytes


class Ring:
    """Memory for the same allocations of one step after the other: a step's results lie at equal distances.

    Args:
        steps (int): how many; a place more is for where they start from.
        kept (dict): of a step's allocations those that outlive it, example by number; others are the same memory in
            all steps.
    """

    def __init__(self, steps: int, kept: dict[int, Tensor]) -> None:
        self._steps, self._kept = steps, kept
        self._memory: dict[int, Tensor] = {}

    def of_step(self, k: int) -> Callable[..., Tensor]:
        """What gives a :class:`~tdmarl.cpu_graph.Tape` the memory of step `k`."""

        def allocate(n: int, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            extent = 1 + sum((many - 1) * step for many, step in zip(size, stride))
            if n not in self._memory:
                unit = max(1, _ALIGNED // dtype.itemsize)
                whole = math.ceil(max(extent, 1) / unit) * unit
                self._memory[n] = torch.zeros(self._steps + 1 if n in self._kept else 1, whole, dtype=dtype)
            place = self._memory[n][k + 1 if n in self._kept else 0]
            if extent > place.numel() or dtype != place.dtype:
                raise NotRecordable("steps differ in their intermediate results")
            return place.as_strided(size, stride)

        return allocate

    def start(self, result: Tensor) -> Tensor:
        """Where something lies before the first step that is a `result` of the step whose allocations are kept."""
        for n, x in self._kept.items():
            if _storage(x) == _storage(result):
                first = self.of_step(-1)(n, x.shape, x.stride(), x.dtype)
                offset = first.storage_offset() + result.storage_offset() - x.storage_offset()
                return first.as_strided(result.shape, result.stride(), offset)
        return torch.zeros_like(result)


class Chunk:
    """Steps of policy, environment and sums of rewards, one after the other in places of their own.

    Resets are a function apart, called where an episode has ended. Recording takes no step and draws nothing.

    Args:
        act (ModuleFunction): the policy.
        made (CompiledVmas): the environment's functions.
        combine (callable): from a step's entries, the transition and what was carried to it: all of the step's
            entries, and what is carried on.
        present (dict): what is carried, an example.
        sums (list of keys): which of that are sums of rewards.
        steps (int): of a batch.

    Attributes:
        steps (int): how many it has; one, or as many as are no large part of a batch.
        now (dict): what is carried on.

    Raises:
        NotRecordable: something is not the same in each step; or a single one is so large that it would gain little.
    """

    def __init__(
        self,
        act: ModuleFunction,
        made: Any,
        combine: Callable[..., Any],
        present: Leaves,
        sums: list[Key],
        steps: int,
    ) -> None:
        self.parts = act, made, steps
        self._act, self._made, self._combine, self._sums = act, made, combine, sums
        self._steps: list[_Step] = []
        self._spares = [x.clone() for x in made.recording.empty]
        self._of_resets = Ring(0, {})  # one memory for all of them: what they make, they copy
        self._start = _Start(
            [x.clone() for x in made.state()], {key: x.clone() for key, x in present.items()}
        )
        before = [act.parameters[place].clone() for place in act.changed]
        self.now = present
        try:
            with torch.random.fork_rng([]), torch.no_grad():
                before_it, tape = self._recorded(Tape(), self._start), Tape()
                ring = self._ring(tape, self._recorded(tape, before_it))
                for k in range(self.steps):
                    self._steps.append(self._recorded(Tape(ring.of_step(k)), self._before(k)))
                    if _kinds(self._steps[k].tape) != _kinds(tape):
                        raise NotRecordable("steps differ in their intermediate results")
        finally:
            for place, x in zip(act.changed, before):
                act.parameters[place].copy_(x)
        entries = [step.entries for step in self._steps]
        self._columns = [
            (key, x, _runs([leaves[key] for leaves in entries])) for key, x in entries[0].items()
        ]

    def __call__(self, present: Leaves, count: int, columns: Columns) -> None:
        """Takes `count` steps, no more than it has, and writes them into the batch."""
        columns.flush()
        made, saved = self._made, list[tuple[int, Leaves]]()
        made.put_state(self._start.state)
        torch._foreach_copy_(self._places, [present[key] for key in self._carried])
        state, self.now = self._start.state, self._start.present
        try:
            for k, step in enumerate(self._steps[:count]):
                step.tape()
                made.refuse_unless(step.valid)
                if not host.is_surely_false(step.over):
                    saved.append((k, {key: step.entries[key].clone() for key in step.overwritten}))
                    made.put_spares(self._spares, step.state)
                    step.reset()
                    made.spares_left(step.lacks)
                state, self.now = step.state, step.present
        finally:
            made.hold(state)
        for key, like, runs in self._columns:
            for first, values in runs:
                many = min(values.shape[1], count - first)
                if many > 0:
                    columns.part(key, like, first, many).copy_(values[:, :many])
        for k, leaves in saved:
            for key, x in leaves.items():
                columns.part(key, x, k, 1).copy_(x.unsqueeze(1))
        columns.go_on(count)

    def _before(self, k: int) -> _Start | _Step:
        return self._steps[k - 1] if k else self._start

    def _ring(self, tape: Tape, step: _Step) -> Ring:
        """Memory for all steps; of the first step's results those are kept that are read after it."""
        read = [*step.entries.values(), *step.state, *step.present.values(), *step.shown, *step.valid]
        memory = _Memory(read)
        kept = {n: x for n, x in enumerate(tape.allocated) if x in memory}
        each, steps = sum(x.nbytes for x in kept.values()), self.parts[-1]
        most = min(_MANY_BYTES, max(_FEW_BYTES, each * steps // _PARTS))
        self.steps = max(1, min(CHUNK, steps, most // max(each, 1)))
        size = sum(x.nbytes for x in tape.allocated) + self.steps * each
        if size > _MOST_BYTES:
            raise NotRecordable(f"a recorded step needs {size / 1e6:.0f} MB")
        ring = Ring(self.steps, kept)
        present = {key: ring.start(x) for key, x in step.present.items()}
        self._carried = [key for key, x in present.items() if not _overlaps(x)]  # those are views of others
        self._places = [present[key] for key in self._carried]
        self._start = _Start(self._start.state, present)
        return ring

    def _recorded(self, tape: Tape, before: _Start | _Step) -> _Step:
        made, present = self._made, before.present
        with tape:
            seen = {key: x for key, x in present.items() if key not in self._sums}
            entries = seen | self._act(seen)
            found = made.advance(before.state, entries, [present[key] for key in self._sums])
            found = _apart(found, _Memory(tape.allocated), _Memory(before.state))
            entries, following = self._combine(entries, made.unended(found))
            written = _Memory([*found.state, *found.shown])  # by a reset
            shown = made.flat(found.shown)
            for key, x in following.items():
                if key not in shown and x in written:
                    following[key] = x.clone()
        reset = Tape(self._of_resets.of_step(0))
        with reset:
            state, after, counters, lacks = made.take(found.state, found.shown, self._spares)
            pairs = list(zip([*found.state, *found.shown, *self._spares], [*state, *after, *counters]))
            moved = [(place, x) for place, x in pairs if place is not x]
            torch._foreach_copy_([place for place, _ in moved], [x for _, x in moved])
        overwritten = [key for key, x in entries.items() if x in written]
        over = made.ended(found.shown)
        return _Step(
            tape, entries, found.state, following, found.shown, found.valid, over, reset, lacks, overwritten
        )


class _Start(NamedTuple):
    """Where a chunk starts from."""

    state: list[Tensor]
    present: Leaves


class _Step(NamedTuple):
    """A recorded step: what does it again, and where its results are."""

    tape: Tape
    entries: Leaves  # of the batch
    state: list[Tensor]
    present: Leaves  # of the next step
    shown: list[Tensor]
    valid: list[Tensor]
    over: Tensor  # [E]
    reset: Tape  # begins the episodes that are over anew, in place
    lacks: Tensor  # [], whether a spare is lacking then
    overwritten: list[Key]  # entries where a reset writes


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class _Memory:
    """The addresses of tensors, between the first and the last of each.

    Args:
        tensors (iterable of Tensor): whose memory it is.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._spans = [_span(x) for x in tensors if x.numel()]

    def __contains__(self, x: Tensor) -> bool:
        """Whether a part of it is a part of `x`."""
        first, last = _span(x)
        return any(first <= end and begin <= last for begin, end in self._spans)


def _span(x: Tensor) -> tuple[int, int]:
    """Where its first and its last element begin."""
    reach = sum(step * (many - 1) for step, many in zip(x.stride(), x.shape))
    return x.data_ptr(), x.data_ptr() + reach * x.element_size()


def _apart(found: Any, fresh: _Memory, state: _Memory) -> Any:
    """A step whose results are its own, so that a reset may write into them and later steps do not.

    What a step does not change is the very tensor that it is given, and what never changes may be a graph's own.
    The state alone may stay where it is.
    """

    def own(tensors: list[Tensor]) -> list[Tensor]:
        return [x if x in fresh else x.clone() for x in tensors]

    kept = [x if x in fresh or x in state else x.clone() for x in found.state]
    shown, rewards, totals, sums = map(own, (found.shown, found.rewards, found.totals, found.sums))
    return found._replace(state=kept, shown=shown, rewards=rewards, totals=totals, sums=sums)


def _lie_alike(x: Tensor, y: Tensor) -> bool:
    return all(many == 1 or a == b for many, a, b in zip(x.shape, x.stride(), y.stride()))


def _kinds(tape: Tape) -> list[Any]:
    """Sizes, strides where they matter, and types of what it asked memory for."""
    strides = [[step for step, many in zip(x.stride(), x.shape) if many > 1] for x in tape.allocated]
    return [(x.shape, stride, x.dtype) for x, stride in zip(tape.allocated, strides)]


def _overlaps(x: Tensor) -> bool:
    return any(step == 0 and many > 1 for step, many in zip(x.stride(), x.shape))


def _runs(tensors: list[Tensor]) -> list[tuple[int, Tensor]]:
    """The tensors `[E, ...]` of successive steps as few tensors `[E, k, ...]`, each after its first step.

    Those at equal distances in one memory are a view.
    """
    found: list[tuple[int, Tensor]] = []
    first = 0
    while first < len(tensors):
        one, end, distance = tensors[first], first + 1, 0
        while end < len(tensors) and _storage(tensors[end]) == _storage(one):
            step = int(tensors[end].storage_offset() - tensors[end - 1].storage_offset())
            if not _lie_alike(tensors[end], one) or (end > first + 1 and step != distance) or step < 0:
                break
            distance, end = step, end + 1
        size = one.shape[0], end - first, *one.shape[1:]
        stride = one.stride(0), distance, *one.stride()[1:]
        found.append((first, one.as_strided(size, stride, one.storage_offset())))
        first = end
    return found
