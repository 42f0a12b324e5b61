"""Equal operations become one: values are those of the loops, and operations do not grow with what is looped over."""

from __future__ import annotations

import warnings
from typing import Any, Callable

import pytest
import torch
from torch import Tensor
from vmas.simulator.core import Agent, Landmark, Line, Sphere, World
from vmas.simulator.scenario import BaseScenario

from tdmarl import tracing
from tdmarl.envs import recording
from tdmarl.envs.batching import batched
from tdmarl.envs.vmas import VmasEnv

E = 5
Loop = Callable[..., list[Tensor]]


def both(function: Loop, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor], int]:
    """Results of the loops and of what is made of them, and how many operations that has."""
    graph = tracing.trace(function, inputs)
    few = batched(graph, inputs)
    return function(*inputs), few(*inputs), tracing.operations(few)


def positions(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(E, 2, generator=generator) for _ in range(count)]


def distances(*x: Tensor) -> list[Tensor]:
    return [torch.stack([torch.linalg.vector_norm(a - b, dim=1) for a in x for b in x if a is not b], 1)]


def seen(*x: Tensor) -> list[Tensor]:
    return [torch.cat([a, *[b - a for b in x if b is not a], a.sum(1, keepdim=True)], -1) for a in x]


def added(*x: Tensor) -> list[Tensor]:
    return [sum((b * 2 for b in x if b is not a), start=a) - 1 for a in x]


def sorted_ones(*x: Tensor) -> list[Tensor]:
    return [y for a in x for y in (a.sort(dim=1).values.exp(), a.min(1).indices, a.max(1).values)]


def written(*x: Tensor) -> list[Tensor]:
    found = []
    for a in x:
        a = a.clone()
        a[:, 0] = 3
        a[:, 1:] += a[:, :1]
        found.append(torch.where(a > 0, a, 0.0)[:, [1, 0]])
    return found


@pytest.mark.parametrize("function", [distances, seen, added, sorted_ones, written])
def test_values_are_those_of_the_loops(function: Loop) -> None:
    expected, found, _ = both(function, positions(6))
    assert len(expected) == len(found)
    for a, b in zip(expected, found):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_what_vmap_cannot_do_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> Any:
        raise RuntimeError("no batching rule")

    monkeypatch.setattr(torch, "vmap", refuse)
    expected, found, _ = both(distances, positions(4))
    assert torch.equal(expected[0], found[0])


@pytest.mark.parametrize("function, most", [(distances, 9), (seen, 12)])
def test_operations_do_not_grow_with_pairs(function: Loop, most: int) -> None:
    """What grows is only to take each agent's part, one operation for each that is returned."""
    for agents in (4, 8, 16):
        expected, _, operations = both(function, positions(agents))
        assert operations <= most + (len(expected) if len(expected) > 1 else 0)


def test_a_long_sum_is_taken_at_once() -> None:
    """10 - 2 - 2 - 2 + 1 - 0.5 = 4.5, and 3 once more where a mask is."""

    def total(x: Tensor, two: Tensor, one: Tensor, half: Tensor, mask: Tensor) -> list[Tensor]:
        for _ in range(3):
            x = x - two
        x = x + one - half
        x = x.clone()
        x[:] = torch.where(mask, x - 3, x)
        return [x]

    inputs = [torch.full((E,), value) for value in (10.0, 2.0, 1.0, 0.5)]
    mask = torch.tensor([True, False, False, True, False])
    few = batched(tracing.trace(total, [*inputs, mask]), [*inputs, mask])
    assert few(*inputs, mask)[0].tolist() == [1.5, 4.5, 4.5, 1.5, 4.5]
    assert sum(node.target is torch.ops.aten.sum.dim_IntList for node in few.graph.nodes) == 1


def test_random_numbers_are_drawn_in_their_order() -> None:
    def draw(*x: Tensor) -> list[Tensor]:
        return [a * 2 + torch.rand(E, 2) + torch.empty(E, 2).uniform_(-1, 1) for a in x]

    inputs = positions(5)
    few = batched(tracing.trace(draw, inputs), inputs)
    torch.manual_seed(0)
    expected = draw(*inputs)
    torch.manual_seed(0)
    for a, b in zip(expected, few(*inputs)):
        assert torch.equal(a, b)


class Row(BaseScenario):
    """Two spheres of radius 0.1 beside each other, 0.15 apart, both 0.05 above a line that does not move."""

    def make_world(self, batch_dim: int, device: torch.device, **kwargs: Any) -> World:
        world = World(batch_dim, device, drag=0.0)
        for name in "ab":
            world.add_agent(Agent(name=name, shape=Sphere(radius=0.1)))
        world.add_landmark(Landmark(name="line", shape=Line(length=2), collide=True, movable=False))
        return world

    def reset_world_at(self, env_index: int | None = None) -> None:
        for entity, place in zip(self.world.entities, ([0.0, -0.05], [0.0, 0.0], [0.15, 0.0])):
            entity.set_pos(torch.tensor(place), batch_index=env_index)

    def observation(self, agent: Agent) -> Tensor:
        return agent.state.vel

    def reward(self, agent: Agent) -> Tensor:
        return agent.state.pos[:, 0]


def in_few(scenario: Any, monkeypatch: pytest.MonkeyPatch, mode: str, **kwargs: Any) -> VmasEnv:
    """An environment whose equal operations are one, however few they are."""
    monkeypatch.setattr(recording, "_in_few", batched)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = VmasEnv(scenario, num_envs=E, seed=0, mode=mode, **kwargs)
        env.compile()
    assert env.mode == mode, env.fallback_reason
    return env


@pytest.mark.parametrize("mode", ["trace", "compile"])
def test_spheres_in_a_row_push_each_other(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Radius 0.15, at -0.2, 0, 0.2: each pair of neighbours overlaps by 0.1, hence 100 * 0.1 outwards on both ends.

    The middle one is pushed from both sides; the ends, 0.4 apart, do not touch each other, nor does a fourth sphere.
    After 0.1 s velocities are -1, 0, 1 and positions -0.3, 0, 0.3.
    """
    env = in_few("simple_spread", monkeypatch, mode, n_agents=4)
    tensordict, state = env.reset(), env.get_state()
    for i, agent in enumerate(env.core.simulation.world.agents):
        place = [[-0.2, 0.0], [0.0, 0.0], [0.2, 0.0], [3.0, 3.0]][i]
        name = next(k for k in state.keys() if k.endswith("_pos") and _is(env, k, agent))
        state[name] = torch.tensor(place).expand(E, 2).clone()
        state[name.replace("_pos", "_vel")] = torch.zeros(E, 2)
    env.set_state(state)
    found = env.step(env.rand_action(tensordict).set(("agents", "action"), torch.zeros(E, 4, 2)))["next"]
    observation = found["agents", "observation"][0]
    expected = [[-0.3, 0, -1, 0], [0, 0, 0, 0], [0.3, 0, 1, 0], [3, 3, 0, 0]]
    torch.testing.assert_close(observation[:, :4], torch.tensor(expected), rtol=1e-5, atol=1e-5)
    # Where the first sees the others, last in what it observes.
    others = torch.tensor([0.3, 0, 0.6, 0, 3.3, 3])
    torch.testing.assert_close(observation[0, -6:], others, rtol=1e-5, atol=1e-5)


def _is(env: VmasEnv, name: str, agent: Agent) -> bool:
    """Whether a slot is in an agent's state."""
    before = env.get_state()
    env.set_state(before.clone().set(name, before[name] + 0.5))
    env.core.into_objects()
    moved = torch.allclose(agent.state.pos, before[name] + 0.5)
    env.set_state(before)
    return moved


@pytest.mark.parametrize("mode", ["trace", "compile"])
def test_forces_of_two_kinds_of_pairs_add_up(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spheres overlap by 0.05: 5 apart. Each reaches 0.1 + 4/600 - 0.05 into the line's room: 5.667 upwards.

    After 0.1 s the velocities are (-0.5, 0.5667) and (0.5, 0.5667).
    """
    env = in_few(Row(), monkeypatch, mode)
    tensordict = env.reset()
    found = env.step(env.rand_action(tensordict).set(("agents", "action"), torch.zeros(E, 2, 2)))["next"]
    expected = torch.tensor([[-0.5, 0.56667], [0.5, 0.56667]]).expand(E, 2, 2)
    torch.testing.assert_close(found["agents", "observation"], expected, rtol=1e-4, atol=1e-4)


def test_lookups_in_several_tables_copy_none() -> None:
    """Tables of 40 entries for each environment, each of which is asked for one, are not stacked for that."""
    tables, row = [torch.randn(E, 40) for _ in range(4)], torch.arange(E)

    def looked_up(*x: Tensor) -> list[Tensor]:
        return [(table[row, row] * 2).sum() for table in x]

    graph = batched(tracing.trace(looked_up, tables), tables)
    sizes = [node.meta["shape"].numel() for node in graph.graph.nodes if node.op == "call_function"]
    assert max(sizes) < 40 * E  # the rest is stacked
    assert sum(node.target is torch.ops.aten.mul.Tensor for node in graph.graph.nodes) == 1
    for found, expected in zip(graph(*tables), looked_up(*tables)):
        torch.testing.assert_close(found, expected)


def test_a_graph_with_few_equal_operations_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_MANY", 3)
    inputs = [torch.randn(E, 2), torch.randn(E, 2)]
    alone = tracing.trace(lambda x, y: [(x.sin() + y).cos().exp().log()], inputs)
    assert recording._in_few(alone, inputs) is alone
    many = positions(8)
    graph = tracing.trace(distances, many)
    assert 3 * tracing.operations(recording._in_few(graph, many)) <= tracing.operations(graph)
    monkeypatch.setattr(recording, "_MANY", 10_000)
    assert recording._in_few(graph, many) is graph
