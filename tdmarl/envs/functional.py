"""VMAS as functions of its state: `step(state, actions) -> state, out` and `reset(state, mask) -> state,
out`.

VMAS keeps its world in tensors held by Python objects. Here the tensors that change are the state
(`slots.py`), a function writes them to their places, runs VMAS's own Python and reads them back. Where that
Python asks the device for an answer, or makes one choice for the whole batch, it is replaced: below for all
scenarios, in `scenarios.py` for single ones. The replacements are bound to this environment's objects; other
VMAS environments stay as they are.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
import warnings
from types import MethodType
from typing import Any, Callable, ContextManager, Iterator, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from tdmarl import host
from tdmarl.envs.choices import Draws, Entities
from tdmarl.envs.masks import FixedSize
from tdmarl.envs.rays import cast_rays
from tdmarl.envs.scenarios import adapt, make_scenario, origins, replaced
from tdmarl.envs.slots import Slots, walk
from tdmarl.envs.streams import Streams

Action = tuple[Tensor, "Tensor | None"]  # forces (or what the dynamics take) [E, a] and message [E, c]

_TWIN_ENVS = 7  # unlike the leading size of anything that is one for the batch, such as a colour's 3


class Out(NamedTuple):
    """What a step or a reset shows, agent by agent."""

    observation: list[Any]  # per agent [E, o], or a dictionary of such
    reward: list[Tensor]  # per agent [E]; empty after a reset
    info: list[dict[str, Tensor]]  # per agent, possibly empty
    terminated: Tensor  # [E] the scenario's own end


class Simulation:
    """Runs one VMAS scenario for all environments at once, in place.

    Args:
        scenario: a scenario object that no other simulation uses.
        envs (int): number of environments.
        device (torch.device): where the world lives.
        kwargs (dict): the scenario's own arguments.
        grad_mode (callable): context in which the scenario runs. `torch.enable_grad` keeps the graph from
            actions to rewards; `torch.inference_mode` is an eighth faster than `torch.no_grad`, but then
            inference tensors are shown, which autograd refuses until they are copied.
    """

    def __init__(
        self,
        scenario: Any,
        envs: int,
        device: torch.device,
        kwargs: dict[str, Any],
        grad_mode: Callable[[], ContextManager[Any]] = torch.no_grad,
    ) -> None:
        self.scenario, self.envs, self.device, self.grad_mode = scenario, envs, device, grad_mode
        self.world = world = _make_world(scenario, envs, device, kwargs)
        self.agents = world.policy_agents
        self.steps = torch.zeros(envs, dtype=torch.int64, device=device)  # [E]
        self.draws = Draws(envs, device)
        # Football's scripted players draw for the environments that a mask selects, and would depend on
        # neighbours.
        self.fixed_size = not host.is_free(device) or "football" in origins(scenario)
        self.acting_moves = False  # whether an entity is elsewhere once agents have acted, before the first substep
        self.recorded = False  # while it is, rays are cast in a way that compiles well, to rounding
        _bind_replacements(scenario)
        adapt(scenario)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What replaces functions that scenarios reach through modules, for the time that a scenario runs."""
        from torch.distributions import Distribution
        from vmas.simulator.core import World
        from vmas.simulator.utils import ScenarioUtils

        changes = [
            (torch, "randint", self.draws.randint),
            (torch, "randperm", self.draws.randperm),
            (ScenarioUtils, "find_random_pos_for_entity", staticmethod(find_position)),
            (Distribution, "_validate_args", False),  # its checks read the device
        ]
        if self.draws.drawn:
            draws = self.draws
            changes.append((Tensor, "repeat", lambda tensor, *sizes: draws.repeat(tensor, *sizes)))
        if self.recorded and getattr(self.world.cast_rays, "__func__", None) is World.cast_rays:
            changes.append((self.world, "cast_rays", MethodType(cast_rays, self.world)))
        masks = FixedSize() if self.fixed_size else contextlib.nullcontext()
        with replaced(*changes), self.grad_mode(), masks:
            yield

    def advance(self, actions: list[Action]) -> Out:
        """One step with one action per policy agent, in the order of `agents`."""
        with self.running():
            self._act(actions)
            self.world.step()
            return self._finish()

    def begin(self, actions: list[Action]) -> None:
        """A step's actions and its first substep; with `go_on` for each further one and `end` it is `advance`."""
        before = self._places()
        with self.running():
            self._act(actions)
            self.acting_moves |= any(x is not y or n != m for (x, n), (y, m) in zip(before, self._places()))
            self._substep(first=True)

    def _places(self) -> list[tuple[Tensor, int]]:
        """Where entities are, and how often that was written."""
        return [(entity.state.pos, entity.state.pos._version) for entity in self.world.entities]

    @contextlib.contextmanager
    def boxes_apart(self) -> Iterator[None]:
        """For substeps in which no two boxes can touch: see `near_boxes`."""
        world = self.world

        def touch(a: Any, b: Any) -> bool:
            return not _are_boxes(a, b) and collides(world, a, b)

        with replaced((world, "collides", touch)):
            yield

    @property
    def box_pairs(self) -> list[tuple[Any, Any]]:
        """The boxes that can touch each other, which costs more than all else: each has sides, and they ends."""
        pairs = itertools.combinations(self.world.entities, 2)
        return [(a, b) for a, b in pairs if _are_boxes(a, b) and collides(self.world, a, b)]

    def near_boxes(self) -> Tensor:
        """Whether two boxes are so near in any environment that they may touch, []."""
        from vmas.simulator.utils import LINE_MIN_DIST

        pairs = self.box_pairs
        left, right = zip(*pairs)
        reach = [a.shape.circumscribed_radius() + b.shape.circumscribed_radius() for a, b in pairs]
        apart = torch.stack([a.state.pos for a in left]) - torch.stack([b.state.pos for b in right])
        limits = torch.tensor(reach, device=self.device).unsqueeze(-1) + LINE_MIN_DIST
        return (apart.norm(dim=-1) <= limits).any()

    def go_on(self) -> None:
        """One more substep."""
        with self.running():
            self._substep(first=False)

    def end(self) -> Out:
        """What follows the substeps."""
        with self.running():
            return self._finish()

    def _act(self, actions: list[Action]) -> None:
        for agent, (force, message) in zip(self.agents, actions):
            _set_action(agent, force, message)
        for agent in self.world.agents:
            self.scenario.env_process_action(agent)
        self.scenario.pre_step()

    def _substep(self, first: bool) -> None:
        """The world's step with one of its substeps; drag acts in the first."""
        world, integrate = self.world, self.world._integrate_state

        def integrate_state(entity: Any, substep: int) -> None:
            integrate(entity, 0 if first else 1)

        with replaced((world, "_substeps", 1), (world, "_integrate_state", integrate_state)):
            world.step()

    def _finish(self) -> Out:
        self.scenario.post_step()
        self.steps = self.steps + 1
        return self._show(rewards=True)

    def restart(self) -> Out:
        """Resets all environments."""
        with self.running():
            self.scenario.env_reset_world_at(env_index=None)
            self.steps = torch.zeros_like(self.steps)
        with self.running():  # anew, because the reset may have been the first to make a choice
            return self._show(rewards=False)

    def _show(self, rewards: bool) -> Out:
        """In VMAS's order; copies, because a scenario may write into what it returned for an agent before."""
        scenario = self.scenario
        return Out(
            reward=[scenario.reward(agent).clone() for agent in self.agents] if rewards else [],
            observation=[_copy(scenario.observation(agent)) for agent in self.agents],
            info=[_copy(scenario.info(agent)) for agent in self.agents],
            terminated=scenario.done().clone(),
        )

    def random_actions(self) -> list[Action]:
        """Uniform actions within each agent's range."""
        found = []
        for agent in self.agents:
            limit = agent.action.u_range_tensor
            force = (torch.rand(self.envs, agent.action_size, device=self.device) * 2 - 1) * limit
            talks = self.world.dim_c > 0 and not agent.silent
            found.append(
                (force, torch.rand(self.envs, self.world.dim_c, device=self.device) if talks else None)
            )
        return found


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
                name: _copy(value)
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
        self.into_objects()
        with self.streams:
            out = self.simulation.advance(actions)
        self.from_objects()
        return out

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
            self.into_objects()
            with self.streams:
                out = self.simulation.restart()
            self.from_objects()
            return out
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
        self.into_objects()
        with self.streams:
            out = self.simulation.restart()
        self.from_objects()
        new = {name: value for name, value in self._read().items() if name in names}
        self._write(old)
        return new, out

    def _merge(self, mask: Tensor, new: dict[str, Tensor]) -> None:
        merge, present = Merge(mask), self._read()
        self._write(present | {name: merge(value, present[name]) for name, value in new.items()})

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


def _make_world(scenario: Any, envs: int, device: torch.device, kwargs: dict[str, Any]) -> Any:
    """The scenario's world; an argument that it does not know is an error, where VMAS only warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Scenario kwargs")
        try:
            return scenario.env_make_world(envs, device, **kwargs)
        except UserWarning:
            source = inspect.getsource(type(scenario).make_world)
            known = sorted(set(re.findall(r"""kwargs\.(?:pop|get)\(\s*["'](\w+)""", source)))
            unknown = sorted(set(kwargs) - set(known))
            raise ValueError(f"The scenario has no argument {unknown}; it has {known}.") from None


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
            found |= {f"{kind}:{i}{path}": leaf for path, leaf in _leaves(value)}
    return {f"spare:{name}": value.detach().clone() for name, value in found.items()}


def _nested(entries: dict[str, Tensor], device: torch.device) -> Spares:
    """The spares of which `_flat` made the entries."""
    kinds: dict[str, Any] = {"state": {}, "observation": {}, "info": {}}
    for name, value in entries.items():
        kind, _, rest = name.partition(":")
        *path, last = [rest] if kind == "state" else [kind] if not rest else rest.split(":")
        place = kinds[kind] if rest else kinds
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value.to(device, copy=True)
    agents = [str(i) for i in range(len(kinds["observation"]))]
    info = [kinds["info"].get(i, {}) for i in agents]
    out = Out([kinds["observation"][i] for i in agents], [], info, kinds["terminated"])
    return Spares(kinds["state"], out, kinds["unused"])


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    else:
        for key, entry in value.items():
            yield from _leaves(entry, f"{path}:{key}")


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


_FITS = 1e6  # beyond any room that there is


def find_position(
    occupied_positions: Tensor,
    env_index: int | None,
    world: Any,
    min_dist_between_entities: float,
    x_bounds: tuple[float, float],
    y_bounds: tuple[float, float],
    disable_warn: bool = False,
) -> Tensor:
    """A free place by rejection sampling in one draw: the first of 64 proposals that fits, else the roomiest.

    VMAS proposes until all environments have one, which asks the device after each round and may never end.
    """
    batch = world.batch_dim if env_index is None else 1
    axes = [
        torch.empty((batch, 64, 1), device=world.device).uniform_(*bounds) for bounds in (x_bounds, y_bounds)
    ]
    proposals = torch.cat(axes, -1)  # [E, 64, 2]
    if occupied_positions.shape[1] == 0:
        return proposals[:, :1]
    room = (proposals[:, :, None] - occupied_positions[:, None]).norm(dim=-1).amin(-1)  # [E, 64]
    order = _FITS - torch.arange(64, device=world.device)  # the first that fits is the largest
    first = torch.where(room >= min_dist_between_entities, order, room).argmax(1)  # [E]
    return proposals.gather(1, first[:, None, None].expand(batch, 1, 2))


def collides(world: Any, a: Any, b: Any) -> bool:
    """Whether two entities can touch at all; VMAS also asks whether they are near in any environment."""
    if a is b or not a.collides(b) or not b.collides(a):
        return False
    if not (a.movable or a.rotatable or b.movable or b.rotatable):
        return False
    return {type(a.shape), type(b.shape)} in world._collidable_pairs


def _are_boxes(a: Any, b: Any) -> bool:
    from vmas.simulator.core import Box

    return isinstance(a.shape, Box) and isinstance(b.shape, Box)


def _bind_replacements(scenario: Any) -> None:
    from vmas.simulator.core import Entity

    world = scenario.world
    weightless = not bool(world._gravity.any())

    def apply_gravity(self: Any, entity: Any) -> None:
        if entity.movable:
            if not weightless:
                self.forces_dict[entity] = self.forces_dict[entity] + entity.mass * self._gravity
            if entity.gravity is not None:
                self.forces_dict[entity] = self.forces_dict[entity] + entity.mass * entity.gravity

    world.collides = MethodType(collides, world)
    world._apply_gravity = MethodType(apply_gravity, world)
    world._agents, world._landmarks = Entities(world._agents), Entities(world._landmarks)
    for agent in world.scripted_agents:
        agent.action_callback = MethodType(_run_script, agent)
    for name, value in vars(scenario).items():
        if type(value) is list and value and all(isinstance(entity, Entity) for entity in value):
            setattr(scenario, name, Entities(value))


def _run_script(agent: Any, world: Any) -> None:
    """Lets a scripted agent act; VMAS then asserts the range of its action, which reads the device."""
    agent.action_script(agent, world)


def _set_action(agent: Any, force: Tensor, message: Tensor | None) -> None:
    noise = agent.u_noise
    if isinstance(noise, (list, tuple)):
        noise = agent.action.u_noise_tensor if any(noise) else 0
    if isinstance(noise, Tensor) or noise > 0:
        force = force + torch.randn(force.shape, device=force.device) * noise
    agent.action.u = force
    if message is not None:
        if agent.c_noise > 0:
            message = message + torch.randn(message.shape, device=message.device) * agent.c_noise
        agent.action.c = message


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else {key: _copy(entry) for key, entry in value.items()}
