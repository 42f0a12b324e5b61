"""VMAS as functions of its state: `step(state, actions) -> state, out` and `reset(state, mask) -> state,
out`.

VMAS keeps its world in tensors held by Python objects. Here the tensors that change are the state (`slots.py`), a
function writes them to their places, runs VMAS's own Python (`simulation.py`) and reads them back.
"""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from tdmarl import host
from tdmarl.envs.scenarios import make_scenario
from tdmarl.envs.simulation import Action, Out, Simulation, copied
from tdmarl.envs.slots import Slots, walk
from tdmarl.envs.streams import Streams

_TWIN_ENVS = 7  # unlike the leading size of anything that is one for the batch, such as a colour's 3


class Spares(NamedTuple):
    """Initial states of all environments, drawn at once and handed out row by row, each row once."""

    state: dict[str, Tensor]  # what a reset writes
    out: Out
    unused: Tensor  # [E]


class _Stateful:
    """The state of a simulation: taken out, put in, and saved.

    Attributes:
        held (dict or None): a part of the state that lives here, in tensors of its own, and no longer in VMAS's
            objects, because compiled functions advance it. `into_objects` puts it there.
    """

    simulation: Simulation
    slots: Slots
    streams: Streams
    spares: Spares | None
    held: dict[str, Tensor] | None
    _start_over: bool

    def get_state(self) -> TensorDict:
        """A copy of the present state, a flat tensordict without batch size."""
        return TensorDict({name: value.clone() for name, value in self._read().items()}, batch_size=[])

    def set_state(self, state: TensorDict) -> None:
        """Goes on from a copy of `state`."""
        self._write({name: state[name].clone() for name in ("steps", *self.slots.names)})

    def state_dict(self) -> dict[str, Tensor]:
        """All that the future depends on: state, Python numbers that change, streams."""
        numbers = self.slots.read_numbers()
        return {
            **{f"state:{name}": value.detach().clone() for name, value in self._read().items()},
            **{f"number:{name}": torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()},
            **{f"stream:{name}": value for name, value in self.streams.state().items()},
            "stream:start_over": torch.tensor(self._start_over),
            **({} if self.spares is None else _flat(self.spares)),
        }

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Continues where `state_dict` was taken, to the last bit.

        Raises:
            KeyError: an entry is missing.
            ValueError: an entry has another shape.
        """
        parts: dict[str, dict[str, Tensor]] = {"state": {}, "number": {}, "stream": {}, "spare": {}}
        for key, value in state_dict.items():
            kind, _, name = key.partition(":")
            parts[kind][name] = value
        for name, present in self._read().items():
            if name not in parts["state"]:
                raise KeyError(
                    f"'state:{name}' is missing: the state dict is not of this scenario and arguments."
                )
            found = parts["state"][name].shape
            if found != present.shape:
                raise ValueError(
                    f"'state:{name}' has shape {tuple(found)}, expected {tuple(present.shape)};"
                    " build the environment with the same num_envs and scenario arguments."
                )
        for kind, names in (("number", list(self.slots.read_numbers())), ("stream", ["torch_cpu", "start_over"])):
            for name in names:
                if name not in parts[kind]:
                    raise KeyError(f"'{kind}:{name}' is missing: the state dict is not of this scenario and arguments.")
        self._write(
            {name: value.to(self.simulation.device, copy=True) for name, value in parts["state"].items()}
        )
        self.slots.write_numbers({name: value.item() for name, value in parts["number"].items()})
        self.streams.load_state(parts["stream"])
        self._start_over = bool(parts["stream"]["start_over"])
        self.spares = _nested(parts["spare"], self.simulation.device) if parts["spare"] else None

    def _read(self) -> dict[str, Tensor]:
        return {"steps": self.simulation.steps, **self.slots.read(), **(self.held or {})}

    def _write(self, state: dict[str, Tensor]) -> None:
        self.simulation.steps = state["steps"]
        self.slots.write(state)
        if self.held is not None:
            self.held = {name: state[name] for name in self.held}

    def into_objects(self) -> None:
        """Puts what is `held` where VMAS's objects keep it."""
        if self.held is not None:
            self._write(self._read())

    @contextlib.contextmanager
    def _objects(self) -> Iterator[None]:
        """VMAS's Python runs inside, on its objects and with random numbers of its own."""
        self.into_objects()
        with self.streams:
            yield
        self.from_objects()

    def from_objects(self) -> None:
        """Takes from VMAS's objects what is `held`."""
        if self.held is not None:
            present = {"steps": self.simulation.steps, **self.slots.read()}
            self.held = {name: present[name] for name in self.held}


class FunctionalVmas(_Stateful):
    """A VMAS scenario whose state can be taken out, put in, merged by mask and saved.

    `step` and `reset` are functions of a state tensordict. `advance` and `restart` do the same in place,
    without moving the state out and in, for a caller that only ever goes on from the present state. Random
    numbers come from `streams`, which are part of `state_dict` but not of the state tensordict.

    Args:
        scenario (str, BaseScenario or BaseScenario class): see `make_scenario`.
        num_envs (int): number of environments.
        device (torch.device): where everything lives.
        seed (int): starts the streams.
        grad_enabled (bool): keeps the graph from actions to rewards.
        scenario_kwargs (dict): the scenario's own arguments.
        plain (bool): makes no inference tensors, which cannot be traced.
    """

    def __init__(
        self,
        scenario: Any,
        num_envs: int,
        device: torch.device,
        seed: int,
        grad_enabled: bool = False,
        scenario_kwargs: dict[str, Any] | None = None,
        plain: bool = False,
    ) -> None:
        kwargs = scenario_kwargs or {}
        self.held: dict[str, Tensor] | None = None
        self.streams = Streams(device, seed)
        self.spares: Spares | None = None
        with self.streams:
            twin = Simulation(make_scenario(scenario), _TWIN_ENVS, device, dict(kwargs))
            mode = torch.enable_grad if grad_enabled else torch.no_grad if plain else torch.inference_mode
            self.simulation = Simulation(make_scenario(scenario), num_envs, device, dict(kwargs), mode)
        self.streams.seed(0)  # what the warm-up leaves behind must not depend on the seed
        with self.streams:
            self.slots = _find_slots(twin)
            self.simulation.restart()
            first = {
                name: copied(value)
                for name, _, value in walk(self.simulation.scenario)
                if isinstance(value, Tensor)
            }
            numbers = {name: value for name, _, value in walk(self.simulation.scenario)}
            # A scenario may make attributes in its first step, but the slots must be there from the start.
            self.simulation.advance(self.simulation.random_actions())
            self.simulation.restart()
        self.slots.bind(self.simulation.scenario)
        self._first = {
            name: first[name] if name in first else value.clone() for name, value in self._read().items()
        }
        self._first_numbers = {
            name: numbers.get(name, value) for name, value in self.slots.read_numbers().items()
        }
        self.seed(seed)
        self.restart()

    def seed(self, seed: int) -> None:
        """Starts the streams afresh; the next restart of all environments starts the state over as well.

        A scenario's reset need not reset everything (parts of the last reward often stay), so a restart after
        `seed` begins with the state that the scenario was built with: same seed, same trajectory.
        """
        self.streams.seed(seed)
        self._start_over, self.spares = True, None

    def advance(self, actions: list[Action]) -> Out:
        """One step from the present state."""
        with self._objects():
            return self.simulation.advance(actions)

    def restart(self, mask: Tensor | None = None) -> Out:
        """Resets the environments where `mask` [E] is True, all without one.

        All environments are reset, then the others are put back by one `where` per slot, so that the cost
        does not depend on how many there are. The rows of `out` outside the mask are those of a reset that
        was not taken.
        """
        if mask is None:
            self.spares = None
            if self._start_over:
                self._write({name: value.clone() for name, value in self._first.items()})
                self.slots.write_numbers(self._first_numbers)
                self._start_over = False
            with self._objects():
                return self.simulation.restart()
        new, out = self._draw()
        self._merge(mask, new)
        return out

    def restart_from_spares(self, mask: Tensor) -> Out:
        """Resets the environments where `mask` [E] is True to states drawn ahead, each of which serves once.

        Few environments end in any one step, and drawing is what a reset costs: all rows are drawn at once, and
        row i waits until environment i ends. When one is needed a second time, all are drawn anew. Whether that
        is so is read from `mask`, so this is for devices where a read waits for nothing. What a reset leaves as
        it is stays the environment's own; `out` may show it as it was when the rows were drawn.
        """
        if self.spares is None or bool((mask & ~self.spares.unused).any()):
            self.spares = Spares(*self._draw(), torch.ones_like(mask))
        self._merge(mask, self.spares.state)
        self.spares = self.spares._replace(unused=self.spares.unused & ~mask)
        return self.spares.out

    def _draw(self) -> tuple[dict[str, Tensor], Out]:
        """What a reset of all environments would write and show; the state stays as it is."""
        names = self.slots.reset_names | {"steps"}
        old = {name: value.clone() for name, value in self._read().items()}
        with self._objects():
            out = self.simulation.restart()
        new = {name: value for name, value in self._read().items() if name in names}
        self._write(old)
        return new, out

    def _merge(self, mask: Tensor, new: dict[str, Tensor]) -> None:
        merge, present = Merge(mask), self._read()
        rows = {name: value for name, value in new.items() if name == "steps" or name in self.slots.per_environment}
        self._write(present | {name: merge(value, present[name]) for name, value in rows.items()})

    def step(self, state: TensorDict, actions: list[Action]) -> tuple[TensorDict, Out]:
        """The state after one step from `state`, which is left as it is."""
        self.set_state(state)
        out = self.advance(actions)
        return self.get_state(), out

    def reset(self, state: TensorDict, mask: Tensor) -> tuple[TensorDict, Out]:
        """`state` with the environments of `mask` [E] reset; of `out` only those rows count."""
        self.set_state(state)
        out = self.restart(mask)
        return self.get_state(), out


def _find_slots(twin: Simulation) -> Slots:
    def step() -> Out:
        return twin.advance(twin.random_actions())

    for move in (twin.restart, step, step):
        move()
    return Slots(twin.scenario, [step, twin.restart, twin.restart, step, step], twin.restart, _TWIN_ENVS)


def _flat(spares: Spares) -> dict[str, Tensor]:
    """Spares as entries of a state dict."""
    out = spares.out
    found = {"unused": spares.unused, "terminated": out.terminated}
    found |= {f"state:{name}": value for name, value in spares.state.items()}
    for kind, agents in (("observation", out.observation), ("info", out.info)):
        for i, value in enumerate(agents):
            named = {"": value} if isinstance(value, Tensor) else {f":{key}": entry for key, entry in value.items()}
            found |= {f"{kind}:{i}{name}": entry for name, entry in named.items()}
    return {f"spare:{name}": value.detach().clone() for name, value in found.items()}


def _nested(entries: dict[str, Tensor], device: torch.device) -> Spares:
    """The spares of which `_flat` made the entries."""
    kinds: dict[str, Any] = {"state": {}, "observation": {}, "info": {}}
    for name, value in entries.items():
        kind, _, rest = name.partition(":")
        # An agent's number comes before the names of its entries, which may have such a sign, too.
        *path, last = [rest] if kind == "state" else [kind] if not rest else rest.split(":", 1)
        place = kinds[kind] if rest else kinds
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value.to(device, copy=True)
    agents = [str(i) for i in range(len(kinds["observation"]))]
    info = [kinds["info"].get(i, {}) for i in agents]
    out = Out([kinds["observation"][i] for i in agents], [], info, kinds["terminated"])
    return Spares(kinds["state"], out, kinds["unused"])


class Merge:
    """Takes the environments of a mask from one tensor and the others from another.

    On the CPU, where asking is free, rows are copied by index, several times faster than a `where` that
    broadcasts; elsewhere nothing is asked.

    Args:
        mask (Tensor): `[E]`, True where the new value counts.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.rows = mask.nonzero().squeeze(-1) if host.is_free(mask.device) else None

    def __call__(self, new: Tensor, old: Tensor) -> Tensor:
        """A new tensor of both; what has no rows, being one for the batch, stays as it is."""
        if not new.ndim or new.shape[0] != self.mask.shape[0]:
            return old
        if self.rows is None:
            return torch.where(self.mask.view(-1, *[1] * (new.ndim - 1)), new, old)
        return old.index_copy(0, self.rows, new.index_select(0, self.rows))
