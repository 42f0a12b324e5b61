"""Chunks of steps: bit for bit the ordinary loop's batches, through ends, refusals, resumption and odd lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict.nn import TensorDictModule
from test_rollout import CASES, ENVS, assert_same, greedy, make, make_env, pair, stochastic

from vmas.simulator.core import Agent, Landmark, World
from vmas.simulator.scenario import BaseScenario

import tdmarl
from tdmarl import chunk as chunks
from tdmarl.chunk import Chunk, Ring, _runs

CHUNK = 4  # a few are recorded as many are
RECORDABLE = "continuous", "remembers", "two teams", "masked, padded, with info", "explores and counts"


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be compiled runs as it was recorded, to the last bit."""
    monkeypatch.setattr("tdmarl.cpu_graph.Compiled", lambda graph, inputs, options: graph)
    monkeypatch.setattr("tdmarl.functions.suit_cpu", lambda graph: None)
    monkeypatch.setattr("tdmarl.rollout.CHUNK", CHUNK)
    monkeypatch.setattr(chunks, "CHUNK", CHUNK)


class Sights(BaseScenario):
    """Agents that see nothing but a landmark, which stays where it is until the next episode."""

    def make_world(self, batch_dim: int, device: Any, **kwargs: Any) -> World:
        world = World(batch_dim, device)
        world.add_agent(Agent("agent_0", collide=False))
        world.add_landmark(Landmark("sight", collide=False))
        return world

    def reset_world_at(self, env_index: int | None = None) -> None:
        size = (self.world.batch_dim if env_index is None else 1, 2)
        for entity in self.world.entities:
            entity.set_pos(torch.rand(size, device=self.world.device), env_index)

    def reward(self, agent: Agent) -> torch.Tensor:
        return self.world.landmarks[0].state.pos[:, 0]

    def observation(self, agent: Agent) -> torch.Tensor:
        return self.world.landmarks[0].state.pos

    def info(self, agent: Agent) -> dict[str, torch.Tensor]:
        return {"sight": self.world.landmarks[0].state.pos}


def test_what_no_step_changes_is_each_step_s_own() -> None:
    """A landmark's position is one tensor through all steps, and a reset writes into it."""
    fused, plain = pair(Sights, {"mode": "compile", "max_steps": 3}, stochastic())
    for _ in range(2):
        assert_same(fused.rollout(), plain.rollout())
    assert of(fused) is not None


def of(collector: tdmarl.Collector) -> Chunk | None:
    return collector._fused._chunk


@pytest.mark.filterwarnings("ignore:init_random_frames")
@pytest.mark.parametrize("case", RECORDABLE)
def test_a_chunk_is_the_ordinary_loop(case: str) -> None:
    name, kwargs, policy = CASES[case]
    fused, plain = pair(name, kwargs | {"mode": "compile"}, policy, init_random_frames=ENVS * 3)
    plain.env.mode = "trace"
    tolerance = 1e-6 if policy is greedy else 0
    for i in range(3):
        a, b = fused.rollout(), plain.rollout()
        if (
            name == "balance"
        ):  # what a reset leaves as it is shows after it as it was when its start was drawn
            a, b = (batch.exclude(("agents", "info"), ("next", "agents", "info")) for batch in (a, b))
        assert_same(a, b, tolerance)
        if i == 1:
            fused.env.set_state(fused.env.get_state())  # which is then elsewhere
    assert of(fused) is not None, fused._fused.whole_because
    assert torch.equal(fused.generator.get_state(), plain.generator.get_state())  # type: ignore[union-attr]
    for x, y in zip(fused.policy.buffers(), plain.policy.buffers()):
        assert torch.equal(x, y)
    one, two = fused.state_dict(), plain.state_dict()
    for part in ("root", "env"):
        for key, value in two[part].items():
            if "info" not in key and "drawn" not in key:
                near = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
                torch.testing.assert_close(one[part][key], value, **near, msg=key)


@pytest.mark.parametrize("case", ["draws in its steps", "no spare states"])
def test_what_cannot_be_done_again_goes_step_by_step(case: str) -> None:
    name, kwargs, policy = CASES[case]
    fused, plain = pair(name, kwargs | {"mode": "compile"}, policy)
    assert_same(fused.rollout(), plain.rollout())
    assert of(fused) is None


def test_ends_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Episodes of one step: each is reset, and its last observation stays in the batch."""
    fused, plain = pair("simple_spread", {"mode": "compile", "max_steps": 1}, stochastic())
    for _ in range(2):
        found = fused.rollout()
        assert_same(found, plain.rollout())
        assert found["next", "done"].all() and found["is_init"].all()
        assert not found["done"].any()
    assert of(fused) is not None


def test_batches_and_states_are_their_own() -> None:
    collector = make(make_env(mode="compile"), stochastic()(make_env()))
    one, state = collector.rollout(), collector.state_dict()
    kept, saved = one.clone(), {key: x.clone() for key, x in state["env"].items()}
    world = collector.env.get_state()
    before = world.clone()
    expected = collector.rollout().clone()
    assert_same(one, kept)
    assert (world == before).all()
    for key, x in saved.items():
        torch.testing.assert_close(state["env"][key], x, rtol=0, atol=0, equal_nan=True)
    collector.load_state_dict(state)
    assert_same(collector.rollout(), expected)
    assert of(collector) is not None


def test_a_refused_action_leaves_the_environment_before_it() -> None:
    """The step that cannot be taken is none: what is carried on is what the last good one left."""
    env = make_env(mode="compile", max_steps=None)

    class Breaks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("at", torch.tensor(6.0))

        def forward(self, observation: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            bad = torch.where(self.calls == self.at, float("nan"), 0.5)
            return torch.zeros_like(observation[..., :2]) + bad

    module = Breaks()
    policy = TensorDictModule(module, [("agents", "observation")], [("agents", "action")])
    collector = make(env, policy)
    with pytest.raises(ValueError, match="NaN"):
        collector.rollout()
    assert of(collector) is not None and module.calls == 6
    now = env.get_state()
    other = make_env(mode="trace", max_steps=None)
    other.reset()
    for _ in range(5):
        td = other.rand_action(other._last.clone())
        td["agents", "action"] = torch.full_like(td["agents", "action"], 0.5)
        other.step(td)
    theirs = other.get_state()
    for key in now.keys(True, True):
        torch.testing.assert_close(now[key], theirs[key], rtol=0, atol=0, equal_nan=True, msg=str(key))


@pytest.mark.parametrize(("most", "steps"), [(1, 1), (8_000, 3)])
def test_large_steps_are_few_in_a_chunk(monkeypatch: pytest.MonkeyPatch, most: int, steps: int) -> None:
    monkeypatch.setattr(chunks, "_FEW_BYTES", most)
    monkeypatch.setattr(chunks, "_MANY_BYTES", most)
    fused, plain = pair("simple_spread", {"mode": "compile", "max_steps": 4}, stochastic())
    for _ in range(2):
        assert_same(fused.rollout(), plain.rollout())
    assert of(fused).steps == steps  # type: ignore[union-attr]


@pytest.mark.parametrize(("few", "steps"), [(1, 2), (8_000, 3)])
def test_a_chunk_is_a_small_part_of_its_batch(monkeypatch: pytest.MonkeyPatch, few: int, steps: int) -> None:
    """An eighth of the batch's 21 steps, or more where they are few bytes."""
    monkeypatch.setattr(chunks, "_FEW_BYTES", few)
    monkeypatch.setattr(chunks, "_PARTS", 8)
    fused, plain = pair("simple_spread", {"mode": "compile", "max_steps": 4}, stochastic())
    for _ in range(2):
        assert_same(fused.rollout(), plain.rollout())
    assert of(fused).steps == steps  # type: ignore[union-attr]


def test_resets_share_their_memory() -> None:
    fused, plain = pair("simple_spread", {"mode": "compile", "max_steps": 2}, stochastic())
    assert_same(fused.rollout(), plain.rollout())
    first, *others = [{x.data_ptr() for x in step.reset.allocated} for step in of(fused)._steps]  # type: ignore
    assert first and all(places == first for places in others)


def test_a_very_large_step_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_MOST_BYTES", 1000)
    fused, plain = pair("simple_spread", {"mode": "compile"}, stochastic())
    for _ in range(2):
        assert_same(fused.rollout(), plain.rollout())
    assert of(fused) is None and "MB" in fused._fused.whole_because and "MB" in fused.describe()


def test_another_number_of_steps_is_another_chunk() -> None:
    collector = make(make_env(mode="compile"), stochastic()(make_env()), frames_per_batch=ENVS * 3)
    twin = make(make_env(mode="trace"), collector.policy, frames_per_batch=ENVS * 3)
    assert_same(collector.rollout(), twin.rollout())
    assert of(collector).parts[-1] == 3  # type: ignore[union-attr]
    assert "chunks" in collector.describe()


def test_a_ring_lays_steps_at_equal_distances() -> None:
    example = torch.zeros(3, 2)
    ring = Ring(4, {1: example})
    steps = [ring.of_step(k)(1, (3, 2), (2, 1), torch.float32) for k in range(4)]
    for k, x in enumerate(steps):
        x.fill_(k)
    ((first, whole),) = _runs(steps)
    assert first == 0 and whole.shape == (3, 4, 2)
    assert torch.equal(whole[0, :, 0], torch.arange(4.0))
    start = ring.start(example[1:])
    assert start.shape == (2, 2) and start.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert (start == 0).all() and steps[0].data_ptr() - start.data_ptr() == 64 - 8
    passing = [ring.of_step(k)(0, (5,), (1,), torch.int64) for k in range(2)]
    assert passing[0].data_ptr() == passing[1].data_ptr()


def test_runs_of_views_and_of_others() -> None:
    memory, other = torch.arange(24.0).view(4, 6), torch.zeros(6)
    views = [row.view(3, 2) for row in memory]
    found = _runs([*views, other.view(3, 2)])
    assert [first for first, _ in found] == [0, 4]
    assert torch.equal(found[0][1], memory.view(4, 3, 2).transpose(0, 1))
    repeated = _runs([memory[k, :3].unsqueeze(-1).expand(3, 7) for k in range(4)])
    assert len(repeated) == 1 and torch.equal(repeated[0][1][:, 2, 5], memory[2, :3])
    turned = _runs([memory[0].view(3, 2), memory[1].view(2, 3).T])
    assert len(turned) == 2
