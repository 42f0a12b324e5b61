"""Records a VMAS environment's step and reset as functions of tensors.

Every function takes what it carries on from call to call first, and returns that first:

    step    state, actions, sums                 -> state, whether actions are valid, what is shown, returns
    refill  counters, spares, state              -> counters, spares
    take    state, shown, counters, spares, mask -> state, shown, counters, whether a spare is lacking
    renew   state, shown, mask                   -> state, shown                              (without spares)

Returns are the rewards, the sums of each episode's rewards up to them, and these sums for the next step, which begin
anew where an episode ended.

A step with many substeps is cut into `begin` (actions, first substep), `go_on` (one substep, called again and
again) and `end`, so that graphs stay small. Where values may be looked at and there are many pairs of boxes, the first
two are recorded once more without these pairs, for substeps in which `near` finds none. They are not where `near` finds
some at the beginning of an episode, for it would find some in one environment or another ever after.

Spares are two layers of what a reset writes and shows, with three counters: unused ones of each environment (0, 1 or
2), whether the next one is in the second layer, and whether any environment ever needed more than there were.
"""

from __future__ import annotations

import time
from typing import Any, Callable

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tdmarl import host, tracing
from tdmarl.envs.batching import batched
from tdmarl.envs.capture import Function, Part
from tdmarl.envs.functional import FunctionalVmas
from tdmarl.envs.groups import Display
from tdmarl.envs.layout import last, rows
from tdmarl.envs.scenarios import replaced
from tdmarl.envs.streams import Streams

_LARGE = 4_000  # operations of a step that is cut into its substeps
_APART = " apart"  # substeps without pairs of boxes
_BOXES = 8  # pairs that are worth two versions of a substep
_MANY = 600  # operations of a graph whose equal ones become one
# A picture needs these, whatever agents observe.
_SEEN = "_state._pos", "_state._rot", "._render", "._color", "._last_measurement"

Traced = Callable[..., list[Tensor]]


class _Recorder:
    """What recording a step and recording a reset have in common."""

    shown: Any
    paths: list[tuple[str, ...]]
    reward_paths: list[tuple[str, ...]]

    def __init__(self, core: FunctionalVmas, display: Display, mode: str, check: bool) -> None:
        self._core, self._display, self._mode, self._check = core, display, mode, check
        self._envs = core.simulation.envs
        self._all: list[str] = []
        self.report: dict[str, Part] = {}

    def _put(self, leaves: tuple[Tensor, ...]) -> None:
        self._core._write(dict(zip(self._all, leaves)))

    def _state(self) -> list[Tensor]:
        state = self._core._read()
        return [state[name] for name in self._all]

    def _decode(self, actions: tuple[Tensor, ...]) -> tuple[list[Any], list[Tensor]]:
        agents: list[Any] = [None] * len(self._core.simulation.agents)
        valid = []
        for group, action in zip(self._display.groups, actions):
            if self._check:
                valid.append(~group.actions.invalid(action).any())
            for i, own in zip(group.indices, group.actions.decode(action)):
                agents[i] = own
        return agents, valid

    def _entries(self, out: Any, sums: tuple[Tensor, ...] = ()) -> list[Tensor]:
        entries = self._display(out, self._core.simulation.steps)
        shown, self.shown = pytree.tree_flatten(entries)
        self.paths = [_keys(path) for path, _ in pytree.tree_flatten_with_path(entries)[0]]
        if not out.reward:
            return shown
        rewards = self._display.rewards(out)
        self.reward_paths = [_keys(path) for path, _ in pytree.tree_flatten_with_path(rewards)[0]]
        earned: list[Tensor] = pytree.tree_leaves(rewards)
        totals = [total + reward for total, reward in zip(sums, earned)]
        done = entries["done"].unsqueeze(-1)  # [E, 1, 1]
        return [*shown, *earned, *totals, *(total.masked_fill(done, 0) for total in totals)]

    def _draw(self, *leaves: Tensor) -> list[Tensor]:
        self._put(leaves)
        out = self._core.simulation.restart()
        return self._state() + self._entries(out)

    def _make(
        self,
        name: str,
        graph: fx.GraphModule,
        inputs: list[Tensor],
        carry: set[int],
        shown: set[int],
        own: set[int],
        seconds: float,
    ) -> Function:
        streams = self._core.streams
        function, compiling = _timed(
            lambda: Function(graph, inputs, self._envs, carry, self._mode, streams, shown, own)
        )
        self.report[name] = Part(function.operations, seconds, compiling)
        return function


class _Resets(_Recorder):
    """Recording of resets, once what a step carries on is known."""

    names: list[str]
    statics: tuple[list[Tensor], list[Tensor]]
    _reset_places: list[int]
    _draw_graph: fx.GraphModule

    def _make_reset(self, state: list[Tensor], seconds: float, spares: bool) -> None:
        n, m, device = len(state), self.shown.num_leaves, self._core.simulation.device
        with torch.no_grad():
            drawn = [last(x, self._envs) for x in self._draw_graph(*state)]
        shown = [rows(x, self._envs) for x in drawn[len(self._reset_places) :]]
        mask = torch.zeros(self._envs, dtype=torch.bool, device=device)
        carried = set(range(n, n + m))
        self.empty: list[Tensor] = []
        if not spares:
            graph, traced = _timed(lambda: tracing.trace(self._renew, state + shown + [mask]))
            own = set(range(n))
            self.renew = self._make(
                "renew", graph, state + shown + [mask], own, carried, own, seconds + traced
            )
            return
        counters = [torch.zeros_like(mask, dtype=torch.int64), mask.clone(), mask.any()]
        self.empty = [*counters, *drawn, *(x.clone() for x in drawn)]
        k = len(self.empty)
        graph, traced = _timed(lambda: tracing.trace(self._refill, self.empty + state))
        self.refill = self._make(
            "refill",
            graph,
            self.empty + state,
            set(range(k)),
            set(),
            set(range(k, k + n)),
            seconds + traced,
        )
        ahead = self.refill.own(self.empty + state)[:k]
        self.statics = state, ahead
        graph, traced = _timed(lambda: tracing.trace(self._take, state + shown + ahead + [mask]))
        carry, own = {*range(n), *range(n + m, n + m + 3)}, {*range(n), *range(n + m, n + m + k)}
        self.take = self._make("take", graph, state + shown + ahead + [mask], carry, carried, own, traced)

    def _renew(self, *leaves: Tensor) -> list[Tensor]:
        state, mask = leaves[: len(self.names)], leaves[-1]
        return self._merged(list(leaves[:-1]), list(self._draw_graph(*state)), mask)

    def _refill(self, *leaves: Tensor) -> list[Tensor]:
        k = (len(leaves) - 3 - len(self.names)) // 2
        (count, second, short), layers, state = leaves[:3], leaves[3 : 3 + 2 * k], leaves[3 + 2 * k :]
        new, lacks = list(self._draw_graph(*state)), count < 2
        into_second = second ^ (count == 1)
        layer_0 = [_where(lacks & ~into_second, x, old) for x, old in zip(new, layers[:k])]
        layer_1 = [_where(lacks & into_second, x, old) for x, old in zip(new, layers[k:])]
        return [count + lacks.to(count.dtype), second, short, *layer_0, *layer_1]

    def _take(self, *leaves: Tensor) -> list[Tensor]:
        n = len(self.names) + self.shown.num_leaves
        (count, second, short), layers, mask = leaves[n : n + 3], leaves[n + 3 : -1], leaves[-1]
        k = len(layers) // 2
        new = [_where(second, b, a) for a, b in zip(layers[:k], layers[k:])]
        has = mask & (count > 0)
        lacking = (mask & (count == 0)).any()
        left = count - has.to(count.dtype)
        counters = [left, second ^ has, short | lacking]
        return [*self._merged(list(leaves[:n]), new, mask), *counters, (left == 0).any()]

    def _merged(self, carried: list[Tensor], new: list[Tensor], mask: Tensor) -> list[Tensor]:
        """State and what is shown, with what was drawn in the environments of the mask."""
        for place, x in zip([*self._reset_places, *range(len(self.names), len(carried))], new):
            carried[place] = _where(mask, x, carried[place])
        return carried


class Recording(_Resets):
    """The functions of one environment.

    Args:
        core (FunctionalVmas): whose simulation runs; its state is any one that it can have.
        display (Display): makes entries of what is shown.
        mode (str): see `Function`.
        check (bool): the step says for each group whether its actions are valid.
        spares (bool): records `refill` and `take` in place of `renew`.

    Attributes:
        names (list of str): what of the state is carried on, because something shown depends on it.
        shown (TreeSpec): how the entries nest.
        paths, reward_paths (lists of tuples): the keys of what is shown, and of rewards.
        no_sums (list of Tensor): sums of rewards at the beginning of episodes.
        empty (list of Tensor): counters and spares before the first refill.
        statics (pair of lists of Tensor): where captured functions keep state and spares.
        report (dict): what each function took.

    Raises:
        Untraceable: see there.
    """

    def __init__(self, core: FunctionalVmas, display: Display, mode: str, check: bool, spares: bool) -> None:
        super().__init__(core, display, mode, check)
        state = {name: last(value.clone(), self._envs) for name, value in core._read().items()}
        self._all, values = list(state), list(state.values())
        actions = [group.actions.random(self._envs) for group in display.groups]
        self.no_sums = [
            rows(torch.zeros(self._envs, len(group.indices), 1, device=core.simulation.device), self._envs)
            for group in display.groups
        ]
        draw, draw_seconds = _timed(lambda: tracing.trace(self._draw, values))
        moves, seconds = self._trace_moves(values, actions, draw)
        near = moves.pop("near", None)
        roots = {i for i, name in enumerate(self._all) if name.endswith(_SEEN)}
        live = sorted(_live([*moves.values(), draw], len(values), roots))
        self.names = [self._all[i] for i in live]
        values = [values[i] for i in live]
        self._make_moves(moves, seconds, live, values, actions)
        self._near: Function | None = None
        if near is not None:
            tracing.restrict(near, live, [0])
            self._near = self._make("near", near, values, set(), set(), set(), seconds["near"])
        first = next(iter(self._moves.values()))
        values = first.own(values + actions + self.no_sums)[: len(live)]
        # What is one for the batch stays as it is at a reset.
        written = core.slots.reset_names & core.slots.per_environment | {"steps"}
        self._reset_places = [place for place, name in enumerate(self.names) if name in written]
        shown = range(len(self._all), len(self._all) + self.shown.num_leaves)
        tracing.restrict(draw, live, [*(live[place] for place in self._reset_places), *shown])
        self._draw_graph = _in_few(draw, values)
        self._make_reset(values, draw_seconds, spares)

    @property
    def asks(self) -> bool:
        """Whether a step looks at values to choose what it computes."""
        return self._near is not None

    def _wants_versions(self, values: list[Tensor], draw: fx.GraphModule) -> bool:
        simulation = self._core.simulation
        may_ask = self._mode != "cudagraph" and host.is_free(simulation.device)
        if not may_ask or len(simulation.box_pairs) < _BOXES or simulation.acting_moves:
            return False
        with torch.no_grad(), Streams(simulation.device, 0):  # the same answer whenever it is recorded
            self._put(tuple(draw(*values)))
        return host.is_surely_false(simulation.near_boxes())

    @property
    def draws(self) -> bool:
        """Whether a step draws random numbers."""
        return any(move.draws for move in self._moves.values())

    def step(self, inputs: list[Tensor], inside: bool = False) -> list[Tensor]:
        """See the head of this file; `inside` another capture or not."""
        moves = {name: move.inside if inside else move for name, move in self._moves.items()}
        if "step" in moves:
            return moves["step"](inputs)
        n, sums = len(self.names), len(inputs) - len(self.no_sums)
        outputs = moves[self._version("begin", inputs[:n])](inputs[:sums])
        state, valid = outputs[:n], outputs[n:]
        for _ in range(self._core.simulation.world._substeps - 1):
            state = moves[self._version("go_on", state)](state)
        outputs = moves["end"](state + inputs[sums:])
        return outputs[:n] + valid + outputs[n:]

    def _version(self, name: str, state: list[Tensor]) -> str:
        """Which of two versions of a substep is right."""
        if self._near is None:
            return name
        (near,) = self._near(state)
        return name + _APART if host.is_surely_false(near) else name

    def _trace_moves(
        self, values: list[Tensor], actions: list[Tensor], draw: fx.GraphModule
    ) -> tuple[dict[str, fx.GraphModule], dict[str, float]]:
        found: dict[str, fx.GraphModule] = {}
        seconds: dict[str, float] = {}

        def record(name: str, function: Traced, inputs: list[Tensor]) -> None:
            found[name], seconds[name] = _timed(lambda: tracing.trace(function, inputs))

        substeps = self._core.simulation.world._substeps
        if substeps > 1:  # in pieces, which tell how large the whole would be
            self._are_whole = True
            record("begin", self._begin, values + actions)
            record("go_on", self._go_on, values)
            record("end", self._end, values + self.no_sums)
            once, again, end = map(tracing.operations, found.values())
            if self._are_whole and once + (substeps - 1) * again + end > _LARGE:
                if self._wants_versions(values, draw):
                    with replaced((self._core.simulation, "boxes_apart", True)):
                        record("begin" + _APART, self._begin, values + actions)
                        record("go_on" + _APART, self._go_on, values)
                    record("near", self._ask, values)
                return found, seconds
            found, seconds = {}, {}
        record("step", self._whole, values + actions + self.no_sums)
        return found, seconds

    def _make_moves(
        self,
        moves: dict[str, fx.GraphModule],
        seconds: dict[str, float],
        live: list[int],
        values: list[Tensor],
        actions: list[Tensor],
    ) -> None:
        self._moves: dict[str, Function] = {}
        n, old = len(live), len(self._all)
        for name, graph in moves.items():
            given = [
                *(actions if name.startswith(("step", "begin")) else []),
                *(self.no_sums if name in ("step", "end") else []),
            ]
            others = tracing.outputs(graph) - old
            acts, rest = range(old, old + len(given)), range(old, old + others)
            tracing.restrict(graph, [*live, *acts], [*live, *rest])
            graph = _in_few(graph, values + given)
            shown, own = set(range(n, n + others)), set(range(n)) if self._moves else set()
            self._moves[name] = self._make(
                name, graph, values + given, set(range(n)), shown, own, seconds[name]
            )
            values = self._moves[name].own(values + given)[:n]

    def _whole(self, *leaves: Tensor) -> list[Tensor]:
        self._put(leaves)
        n = len(self._all)
        sums = n + len(self._display.groups)
        agents, valid = self._decode(leaves[n:sums])
        out = self._core.simulation.advance(agents)
        return [*self._state(), *valid, *self._entries(out, leaves[sums:])]

    def _begin(self, *leaves: Tensor) -> list[Tensor]:
        self._put(leaves)
        agents, valid = self._decode(leaves[len(self._all) :])
        self._core.simulation.begin(agents)
        return self._between() + valid

    def _ask(self, *leaves: Tensor) -> list[Tensor]:
        self._put(leaves)
        return [self._core.simulation.near_boxes()]

    def _go_on(self, *leaves: Tensor) -> list[Tensor]:
        self._put(leaves)
        self._core.simulation.go_on()
        return self._between()

    def _between(self) -> list[Tensor]:
        """The state within a step, where names of one tensor may be names of two for a while."""
        self._are_whole &= self._core.slots.are_whole
        return self._state()

    def _end(self, *leaves: Tensor) -> list[Tensor]:
        self._put(leaves)
        out = self._core.simulation.end()
        return self._state() + self._entries(out, leaves[len(self._all) :])


def _in_few(graph: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
    """A graph of many operations with equal ones made one; where few are equal it is faster as it is."""
    many = tracing.operations(graph)
    if many <= _MANY:
        return graph
    found = batched(graph, inputs)
    return found if 3 * tracing.operations(found) <= 2 * many else graph


def _live(graphs: list[fx.GraphModule], state: int, roots: set[int]) -> set[int]:
    """Which of the first `state` inputs what is shown ever depends on, through any sequence of the graphs."""
    live = set(roots)
    while True:
        found = set(live)
        for graph in graphs:
            shown = range(state, tracing.outputs(graph))
            found |= {i for i in tracing.needed(graph, [*live, *shown]) if i < state}
        if found == live:
            return live
        live = found


def _keys(path: Any) -> tuple[str, ...]:
    return tuple(entry.key for entry in path)


def _where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *[1] * (new.ndim - 1)), new, old)


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return function(), time.perf_counter() - start
