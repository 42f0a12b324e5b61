"""One VMAS scenario, run for all environments at once by VMAS's own Python.

Where that Python asks the device for an answer, or makes one choice for the whole batch, it is replaced: below for all
scenarios, in `scenarios.py` for single ones. The replacements are bound to this simulation's objects; other VMAS
environments stay as they are.
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
from torch import Tensor

from tdmarl import host
from tdmarl.envs.choices import Draws, Entities
from tdmarl.envs.masks import FixedSize
from tdmarl.envs.rays import cast_rays
from tdmarl.envs.scenarios import adapt, origins, replaced

Action = tuple[Tensor, "Tensor | None"]  # forces (or what the dynamics take) [E, a] and message [E, c]

_FITS = 1e6  # beyond any room that there is


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
        self.boxes_apart = False  # while it is, substeps are those in which no two boxes can touch: see `near_boxes`
        self.is_recorded = False  # while it is, rays are cast in a way that compiles well, to rounding
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
        if self.is_recorded and getattr(self.world.cast_rays, "__func__", None) is World.cast_rays:
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

        def touch(a: Any, b: Any) -> bool:
            return not _are_boxes(a, b) and collides(world, a, b)

        changes = [(world, "_substeps", 1), (world, "_integrate_state", integrate_state)]
        if self.boxes_apart:
            changes.append((world, "collides", touch))
        with replaced(*changes):
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
            observation=[copied(scenario.observation(agent)) for agent in self.agents],
            info=[copied(scenario.info(agent)) for agent in self.agents],
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


def _make_world(scenario: Any, envs: int, device: torch.device, kwargs: dict[str, Any]) -> Any:
    """The scenario's world; an argument that it does not know is an error, where VMAS only warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Scenario kwargs")
        try:
            return scenario.env_make_world(envs, device, **kwargs)
        except UserWarning:
            known = sorted(_arguments(type(scenario)))
            unknown = sorted(set(kwargs) - set(known))
            raise ValueError(f"The scenario has no argument {unknown}; it has {known}.") from None


def _arguments(kind: type) -> set[str]:
    """The names that a scenario's class, and those it comes from, take out of their arguments."""
    found: set[str] = set()
    for method in (vars(ancestor).get("make_world") for ancestor in kind.__mro__):
        try:
            source = "" if method is None else inspect.getsource(method)
        except OSError:  # it was typed into a console
            continue
        found |= set(re.findall(r"""kwargs\.(?:pop|get)\(\s*["'](\w+)""", source))
    return found


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
        torch.empty((batch, 64, 1), dtype=torch.float32, device=world.device).uniform_(*bounds)
        for bounds in (x_bounds, y_bounds)
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
    gravity = world._gravity
    weightless = not bool(gravity.any())

    def apply_gravity(self: Any, entity: Any) -> None:
        if entity.movable:
            if not weightless or self._gravity is not gravity:
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
    agent.action.u = force.clone()  # scenarios write into it
    if message is not None:
        if agent.c_noise > 0:
            message = message + torch.randn(message.shape, device=message.device) * agent.c_noise
        agent.action.c = message


def copied(value: Any) -> Any:
    """A tensor or nested dictionaries of such, in memory of their own."""
    return value.clone() if isinstance(value, Tensor) else {key: copied(entry) for key, entry in value.items()}
