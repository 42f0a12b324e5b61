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
        # On a CPU it is known when an environment has no spare left; elsewhere nobody asks.
        self._period = _PERIOD if max_steps is None else max(1, min(_PERIOD, max_steps // 2))
        self._period *= not host.is_free(core.simulation.device)
        self._spares: list[Tensor] | None = None
        self._own: dict[str, Tensor] | None = None
        self._until_refill, self._lacks = 0, True
        simulation, saved = core.simulation, {name: value.clone() for name, value in core._read().items()}
        streams, fixed_size, grad_mode = core.streams.state(), simulation.fixed_size, simulation.grad_mode
        core.held, simulation.fixed_size, simulation.grad_mode = None, True, torch.no_grad
        try:
            with core.streams:
                drawn = _host_draws()
                self.recording = Recording(core, display, mode, check, spare_resets)
                if _host_draws() != drawn:
                    raise tracing.Untraceable("it draws numbers from NumPy or from Python's random")
        finally:  # recording is no step, no reset and no draw
            simulation.fixed_size, simulation.grad_mode = fixed_size, grad_mode
            core.streams.load_state(streams)
            core._write({name: value.clone() for name, value in saved.items()})
        self._hold([last(saved[name], self._envs) for name in self.recording.names])
        self._frozen_at = self._frozen()
        self._done = self.recording.paths.index(("done",))

    def step(self, actions: list[Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Nested entries and rewards after a step with one action per group."""
        shown, (rewards, _, _) = self._advance(actions, self.recording.no_sums)
        nested = {group: {name: value} for (group, name), value in zip(self.recording.reward_paths, rewards)}
        return self.nest(shown), nested

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

    def transition(self, entries: Any, sums: list[Tensor]) -> Transition:
        """A step, and the reset of what ended in it.

        Args:
            entries (mapping): has each group's action under `(group, "action")`.
            sums (list of Tensor): of rewards, `[E, n, 1]` per group, since each episode began.
        """
        shown, (rewards, totals, sums) = self._advance(self._actions(entries), sums)
        mask = shown[self._done].squeeze(-1)
        following = shown if host.is_surely_false(mask) else self._restart(mask, shown)
        return Transition(shown, rewards, totals, following, sums)

    def _actions(self, entries: Any) -> list[Tensor]:
        return [group.action(entries) for group in self._groups]

    def _given(self, actions: list[Tensor], sums: list[Tensor]) -> list[Tensor]:
        """As they were recorded: compiled code does not look."""
        groups = self._groups
        own = [action.to(group.actions.spec.dtype).contiguous() for group, action in zip(groups, actions)]
        return own + [rows(total, self._envs) for total in sums]

    def _parts(self, outputs: list[Tensor], k: int) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
        """State, what is shown, and returns, if the actions were valid."""
        n, m = len(self.recording.names), self.recording.shown.num_leaves
        start = n + (len(self._groups) if self._check else 0)
        for group, flag in zip(self._groups, outputs[n:start]):
            group.refuse_unless(flag)
        returns = outputs[start + m :]
        return outputs[:n], outputs[start : start + m], [returns[:k], returns[k : 2 * k], returns[2 * k :]]

    def _advance(self, actions: list[Tensor], sums: list[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
        outputs = self.recording.step(self._state() + self._given(actions, sums))
        state, shown, returns = self._parts(outputs, len(sums))
        self._hold(state)
        return shown, returns

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
        self._lacks = self._spares is not None and bool((self._spares[0] == 0).any())

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

    @property
    def fits_one_graph(self) -> bool:
        """Whether steps and resets can be a part of one CUDA graph with the policy, which draws from another stream."""
        return self._mode == "cudagraph" and self._spare_resets and not self.recording.draws

    def begin_in_place(self) -> tuple[list[Tensor], list[Tensor]]:
        """State and spares in the places where a graph advances them, the spares filled up if it is time."""
        state, spares = self.recording.statics
        for place, x in zip(state, self._state()):
            if place is not x:
                place.copy_(x)
        self._hold(state)
        for place, x in zip(spares, self._filled(state)):
            if place is not x:
                place.copy_(x)
        self._spares = spares
        return state, spares

    def inside(
        self, state: list[Tensor], spares: list[Tensor], entries: Any, sums: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], Transition]:
        """State, counters and `transition` as functions, to be captured."""
        recording = self.recording
        n, m = len(state), recording.shown.num_leaves
        state, shown, (rewards, totals, sums) = self._parts(
            recording.step(state + self._given(self._actions(entries), sums), inside=True), len(sums)
        )
        mask = shown[self._done].squeeze(-1)
        *outputs, _ = recording.take.inside(state + shown + spares + [mask])
        return outputs[:n], outputs[n + m :], Transition(shown, rewards, totals, outputs[n : n + m], sums)


def _host_draws() -> tuple[Any, ...]:
    """Where the random streams of NumPy and Python stand."""
    state: Any = np.random.get_state(legacy=False)
    return state["state"]["key"].tolist(), state["state"]["pos"], random.getstate()
