"""Runs a VMAS environment as compiled graphs over a state that lives in tensors of their own."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils import _pytree as pytree

from tdmarl.envs import tracing
from tdmarl.envs.functional import FunctionalVmas
from tdmarl.envs.groups import Display
from tdmarl.envs.layout import last
from tdmarl.envs.recording import Recording
from tdmarl.envs.slots import python_values, walk

_PERIOD = 16  # resets between two draws of initial states for all environments


class CompiledVmas:
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
        self._core, self._groups = core, display.groups if check else []
        self._envs, self._spare_resets = core.simulation.envs, spare_resets
        self._period = _PERIOD if max_steps is None else max(1, min(_PERIOD, max_steps // 2))
        self._spares: list[Tensor] | None = None
        self._own: dict[str, Tensor] | None = None
        self._until_refill = 0
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

    def step(self, actions: list[Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Nested entries and rewards after a step with one action per group."""
        recording, groups = self.recording, self._groups
        outputs = recording.step(self._state() + actions)
        n, m = len(recording.names), recording.shown.num_leaves
        valid, shown, rewards = outputs[n : n + len(groups)], n + len(groups), n + len(groups) + m
        for group, flag in zip(groups, valid):
            group.refuse_unless(flag)
        self._hold(outputs[:n])
        entries = pytree.tree_unflatten(outputs[shown:rewards], recording.shown)
        return entries, pytree.tree_unflatten(outputs[rewards:], recording.rewards)

    def reset(self, mask: Tensor, shown: TensorDict) -> dict[str, Any]:
        """Resets the environments where `mask` [E] is True; of the others the entries stay `shown`."""
        recording = self.recording
        state, leaves = self._state(), [shown.get(path) for path in recording.paths]
        n, m = len(state), len(leaves)
        if self._spare_resets:
            spares = self._filled(state)
            outputs = recording.take(state + leaves + spares + [mask])
            self._spares = outputs[n + m :] + spares[3:]
        else:
            outputs = recording.renew(state + leaves + [mask])
        self._hold(outputs[:n])
        return pytree.tree_unflatten(outputs[n : n + m], recording.shown)

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
            self._spares, self._until_refill = self.recording.refill(self.recording.empty + state), 0
        if self._until_refill == 0:
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


def _host_draws() -> tuple[Any, ...]:
    """Where the random streams of NumPy and Python stand."""
    state: Any = np.random.get_state(legacy=False)
    return state["state"]["key"].tolist(), state["state"]["pos"], random.getstate()
