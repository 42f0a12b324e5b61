"""Finds scenarios by name, and holds what single ones need to run for all environments at once."""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib
import itertools
from typing import Any, Callable, Iterator

import numpy as np
import torch
from torch import Tensor

UNSUPPORTED = {
    "road_traffic": "it places vehicles by branching in Python on each environment's draws, so that "
    "environments cannot be reset together",
}


def make_scenario(scenario: Any) -> Any:
    """A scenario object from a shipped scenario's name, a `BaseScenario` class, or an instance (which is
    copied).

    Raises:
        ValueError: the name is unknown; the nearest ones are named.
        NotImplementedError: the scenario is in `UNSUPPORTED`; the reason is given.
    """
    import vmas
    from vmas.simulator.scenario import BaseScenario

    if isinstance(scenario, str):
        folders = {"": vmas.scenarios, "mpe.": vmas.mpe_scenarios, "debug.": vmas.debug_scenarios}
        modules = {
            name: f"vmas.scenarios.{folder}{name}" for folder, names in folders.items() for name in names
        }
        if scenario not in modules:
            nearest = difflib.get_close_matches(scenario, modules, n=3, cutoff=0.4) or sorted(modules)
            raise ValueError(f"unknown VMAS scenario '{scenario}'; did you mean {', '.join(nearest)}?")
        found = importlib.import_module(modules[scenario]).Scenario()
    elif isinstance(scenario, type) and issubclass(scenario, BaseScenario):
        found = scenario()
    elif isinstance(scenario, BaseScenario):
        found = copy.deepcopy(scenario)
    else:
        raise ValueError(
            f"scenario is {scenario!r}; expected a name, a vmas BaseScenario class or an instance."
        )
    for name in origins(found) & UNSUPPORTED.keys():
        raise NotImplementedError(f"VMAS scenario '{name}' is not supported: {UNSUPPORTED[name]}.")
    return found


def origins(scenario: Any) -> set[str]:
    """Names of the shipped scenarios that a scenario is or derives from."""
    modules = [kind.__module__ for kind in type(scenario).__mro__]
    return {module.rpartition(".")[2] for module in modules if module.startswith("vmas.scenarios.")}


@contextlib.contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes replaced for a while: (owner, name, value)."""
    stock = [(owner, name, vars(owner).get(name, _ABSENT)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in stock:
            delattr(owner, name) if value is _ABSENT else setattr(owner, name, value)


_ABSENT = object()


def adapt(scenario: Any) -> None:
    """Replaces those methods of a built scenario that cannot work for all environments at once."""
    for name in origins(scenario) & _RULES.keys():
        _RULES[name](scenario)


def _ball_passage(scenario: Any) -> None:
    """Passages in each environment's own order. VMAS's `neighbour` is left out: nothing reads it."""

    def spawn_passage_map(env_index: int | None) -> None:
        count = len(scenario.passages)
        order = range(count) if scenario.fixed_passage else torch.randperm(count).tolist()
        for place, i in enumerate(order):
            x = -1 - scenario.agent_radius + scenario.passage_length * (place + 0.5)
            scenario.passages[i].set_pos(
                torch.tensor([x, 0.0], device=scenario.world.device), batch_index=env_index
            )
        for passage in scenario.passages:
            if not passage.collide:
                passage.is_rendering[:] = False

    scenario.spawn_passage_map = spawn_passage_map


def _football(scenario: Any) -> None:
    """Each environment's scripted players take the best of their own candidate positions.

    VMAS's `check_better_positions` ends with a gather whose index has one row, so that all environments take
    theirs from the candidates of the first one.
    """

    def by_row(values: Tensor, dim: int, index: Tensor) -> Tensor:
        return values.gather(dim, index[0][:, None]).transpose(0, 1)

    def own_best(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def check_better_positions(*args: Any, **kwargs: Any) -> Tensor:
            with replaced((torch, "gather", by_row)):
                return stock(*args, **kwargs)

        return check_better_positions

    for controller in (scenario.blue_controller, scenario.red_controller):
        if controller is not None:
            controller.check_better_positions = own_best(controller.check_better_positions)


def _give_way(scenario: Any) -> None:
    """Where agents begin is drawn for each environment; VMAS draws one place for the batch."""
    stock, world, zeros = scenario.reset_world_at, scenario.world, torch.zeros

    def per_environment(*size: Any, **kwargs: Any) -> Tensor:
        own = (world.batch_dim,) if size == (world.dim_p,) else ()
        return zeros(*own, *size, **kwargs)

    def reset_world_at(env_index: int | None = None) -> None:
        with replaced((torch, "zeros", per_environment)) if env_index is None else contextlib.nullcontext():
            stock(env_index)

    scenario.reset_world_at = reset_world_at


def _het_mass(scenario: Any) -> None:
    """Masses drawn per environment and kept as tensors; VMAS draws one for the batch from NumPy."""
    stock, world = scenario.reset_world_at, scenario.world

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(world.batch_dim, 1, device=world.device).uniform_(low, high)  # [E, 1]

    def reset_world_at(env_index: int | None = None) -> None:
        with replaced((np.random, "uniform", uniform)):
            stock(env_index)

    scenario.reset_world_at = reset_world_at


def _joint_passage(scenario: Any) -> None:
    """Gaps at random or fixed places; boxes fill the rest by a sort, not a search that asks the device."""

    def spawn_passage_map(env_index: int | None) -> None:
        world, boxes = scenario.world, range(scenario.n_boxes)
        if scenario.fixed_passage:  # alternately right and left of the middle
            places = [
                len(boxes) // 2 + ((i + 1) // 2 if i % 2 else -(i // 2)) for i in range(scenario.n_passages)
            ]
            gaps = torch.tensor(places, device=world.device).expand(world.batch_dim, -1)
        else:
            size = (world.batch_dim,)
            draws = [
                torch.randint(0, len(boxes) - 1, size, device=world.device)
                for _ in range(scenario.n_passages)
            ]
            gaps = torch.stack(draws, 1)  # [E, gaps]
        free = _place_passages(scenario, gaps)  # [E, boxes - gaps]
        for i, passage in enumerate(scenario.collide_passages):
            if scenario.fixed_passage:  # asked in every step, hence kept on the host
                place = [box for box in boxes if box not in places][i]
                passage.neighbour = place - 1 in places or place + 1 in places
            else:
                passage.neighbour = ((free[:, i, None] - gaps).abs() == 1).any(1)

    scenario.spawn_passage_map = spawn_passage_map


def _joint_passage_size(scenario: Any) -> None:
    """A double gap and a single one (two if there are four) beside it; boxes fill the rest by a sort."""

    def spawn_passage_map(env_index: int | None) -> None:
        world, boxes, size = scenario.world, scenario.n_boxes, (scenario.world.batch_dim,)
        if scenario.fixed_passage:
            big, right = torch.full(size, 5, device=world.device), torch.full(size, 1, device=world.device)
        else:
            big = torch.randint(0, boxes - 1, size, device=world.device)
            right = torch.randint(0, 2, size, device=world.device)
        goes_right = (right == 1) & (big < boxes - 1 - scenario.n_passages) | (big < scenario.n_passages)
        offset = torch.where(goes_right, 4, -3)  # [E]
        places = [big, big + 1, big + offset, big + offset + offset.sign()][: scenario.n_passages]
        _place_passages(scenario, torch.stack(places, 1))
        scenario.small_left_or_right = offset
        scenario.big_passage_pos = (_passage_place(scenario, big) + _passage_place(scenario, big + 1)) / 2
        scenario.small_passage_pos = _passage_place(scenario, big + offset)
        scenario.pass_center = (scenario.big_passage_pos + scenario.small_passage_pos) / 2
        scenario.middle_angle = torch.where(goes_right, torch.pi, 0.0).unsqueeze(-1)  # [E, 1]

    scenario.spawn_passage_map = spawn_passage_map


def _passage_place(scenario: Any, index: Tensor) -> Tensor:
    """Positions [E, 2] of the places with the given index [E] in a row of boxes."""
    left = torch.tensor(-1 - scenario.agent_radius + scenario.passage_length / 2, device=index.device)
    return torch.stack(
        [left + scenario.passage_length * index, torch.zeros_like(index, dtype=torch.float32)], 1
    )


def _place_passages(scenario: Any, gaps: Tensor) -> Tensor:
    """Puts gaps [E, gaps] and boxes in a row; returns the boxes' places, from the left. Gaps may coincide."""
    places = torch.arange(scenario.n_boxes, device=gaps.device)
    taken = (gaps[:, :, None] == places).any(1)  # [E, places]
    free = taken.to(torch.int8).argsort(dim=1, stable=True)  # [E, places], those without a gap first
    for i, passage in enumerate(scenario.non_collide_passages):
        passage.is_rendering[:] = False
        passage.set_pos(_passage_place(scenario, gaps[:, i]), batch_index=None)
    for i, passage in enumerate(scenario.collide_passages):
        passage.set_pos(_passage_place(scenario, free[:, i]), batch_index=None)
    boxes = len(scenario.collide_passages)
    return free[:, :boxes]


def _sampling(scenario: Any) -> None:
    """The largest density over the grid in one evaluation instead of one per cell."""

    def nomrlize_pdf(env_index: int | None = None) -> None:
        world = scenario.world
        edges = torch.tensor([scenario.xdim, scenario.ydim], device=world.device)
        limit = torch.tensor([world.x_semidim, world.y_semidim], device=world.device)
        axes = [
            torch.arange(-d, d, scenario.grid_spacing, device=world.device)
            for d in (scenario.xdim, scenario.ydim)
        ]
        cells = torch.cartesian_prod(*axes)  # [cells, 2]
        inside = (cells.abs() <= edges).all(-1)
        points = cells.clamp(-limit, limit)[:, None].expand(-1, world.batch_dim, -1)  # [cells, E, 2]
        density = torch.stack([g.log_prob(points).exp() for g in scenario.gaussians], -1).sum(
            -1
        )  # [cells, E]
        scenario.max_pdf = torch.where(inside[:, None], density, 0).amax(0).clamp_min(0)  # [E]

    scenario.nomrlize_pdf = nomrlize_pdf


def _simple_push(scenario: Any) -> None:
    """The good agents' colour follows the goal of each environment."""
    stock = scenario.reset_world_at

    def reset_world_at(env_index: int | None = None) -> None:
        stock(env_index)
        for agent in scenario.world.agents:
            if not agent.adversary:
                channel = agent.goal.index[:, None] + 1  # [E, 1]
                mine = channel == torch.arange(3, device=channel.device)
                agent.color = torch.where(mine, 0.75, 0.25)  # [E, 3]

    scenario.reset_world_at = reset_world_at


def _simple_spread(scenario: Any) -> None:
    """The same reward with each distance taken once; VMAS's loops measure every distance once for each agent."""
    kinds = type(scenario).__mro__
    shipped: Any = next(kind for kind in kinds if kind.__module__ == "vmas.scenarios.mpe.simple_spread")
    if type(scenario).reward is not shipped.reward:  # a derived scenario's own
        return
    world = scenario.world

    def reward(agent: Any) -> Tensor:
        agents = world.agents
        if agent is not agents[0]:
            return scenario.rew
        nearest = []
        for landmark in world.landmarks:
            away = [torch.linalg.vector_norm(a.state.pos - landmark.state.pos, dim=1) for a in agents]
            nearest.append(torch.stack(away, dim=-1).amin(-1))  # [E]
        touching = {
            (i, j): world.is_overlapping(agents[i], agents[j]).to(torch.float32)
            for i, j in itertools.combinations(range(len(agents)), 2)
        }
        rew = torch.zeros(world.batch_dim, device=world.device)
        for i, one in enumerate(agents):  # in VMAS's order, so that sums are the same to the bit
            for distance in nearest:
                rew = rew - distance
            for j in range(len(agents)) if one.collide else ():
                if i != j:
                    rew = rew - touching[min(i, j), max(i, j)]
        scenario.rew = rew
        return rew

    scenario.reward = reward


_RULES: dict[str, Callable[[Any], None]] = {
    "ball_passage": _ball_passage,
    "football": _football,
    "give_way": _give_way,
    "het_mass": _het_mass,
    "joint_passage": _joint_passage,
    "joint_passage_size": _joint_passage_size,
    "sampling": _sampling,
    "simple_push": _simple_push,
    "simple_spread": _simple_spread,
}
