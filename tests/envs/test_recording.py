"""Recorded steps and resets ask the device nothing, run without one, and come in pieces where that is smaller.

Runs some scenarios; all of them: `VMAS_ALL=1 python -m pytest tests/envs/test_recording.py` (ten minutes).
"""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import pytest
import torch
import vmas
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from toys import NoHostRead
from vmas.simulator.core import Agent, Box, World
from vmas.simulator.scenario import BaseScenario

import tdmarl
from tdmarl.envs import recording
from tdmarl.envs.capture import Function
from tdmarl.envs.scenarios import UNSUPPORTED
from tdmarl.envs.vmas import VmasEnv

ALL = [n for n in vmas.scenarios + vmas.mpe_scenarios + vmas.debug_scenarios if n not in UNSUPPORTED]
SOME = ["simple_reference", "navigation", "transport", "dispersion", "goal"]
NAMES = ALL if os.environ.get("VMAS_ALL") else SOME


def make(name: Any, **kwargs: Any) -> VmasEnv:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = VmasEnv(name, **{"num_envs": 6, "seed": 0, "mode": "trace", **kwargs})
        env.compile()
    assert env.mode == "trace", env.fallback_reason
    return env


def functions(env: VmasEnv) -> dict[str, Function]:
    """What was recorded, by name."""
    assert env._compiled is not None
    found = env._compiled.recording
    others = {name: getattr(found, name) for name in ("refill", "take", "renew") if hasattr(found, name)}
    return {**found._moves, **others}


@pytest.mark.parametrize("read", [bool, float, lambda x: x.nonzero(), lambda x: x[x > 0]])
def test_the_guard_sees_reads(read: Any) -> None:
    with pytest.raises(AssertionError, match="the host reads"), NoHostRead():
        read(torch.ones(1))


@pytest.mark.parametrize("name", NAMES)
def test_steps_resets_and_rollouts_ask_nothing(name: str) -> None:
    env = make(name, max_steps=3)
    algorithm = tdmarl.ippo(env) if len(env.group_map) == 1 else None
    if algorithm is not None:
        collector = tdmarl.Collector(env, algorithm.explore, frames_per_batch=6 * 5)
        collector.rollout()
        with NoHostRead():
            collector.rollout()
    tensordict = env.rand_action(env.reset())
    for _ in range(2):
        with NoHostRead():
            tensordict = env.reset_done(env.step(tensordict)["next"])
        env.rand_action(tensordict)
    some = env._last.clone().set("done", (torch.arange(6) < 3).unsqueeze(-1))
    with NoHostRead():
        env.reset_done(some)


def on_meta(graph: fx.GraphModule) -> fx.GraphModule:
    """The same graph for a device that has no memory: whatever reads a value fails there."""
    graph = copy.deepcopy(graph).to("meta")
    for node in graph.graph.nodes:
        node.args, node.kwargs = pytree.tree_map_only(
            torch.device, lambda _: torch.device("meta"), (node.args, node.kwargs)
        )
    graph.recompile()
    return graph


@pytest.mark.parametrize("name", NAMES)
def test_graphs_run_without_a_device(name: str) -> None:
    env = make(name, max_steps=1)
    recorded = env._compiled.recording
    seen: dict[str, list[Tensor]] = {}
    for key, function in functions(env).items():
        graph = function.graph

        def call(*inputs: Tensor, key: str = key, graph: fx.GraphModule = graph) -> list[Tensor]:
            seen[key] = list(inputs)
            return graph(*inputs)

        function._call = call
    env.reset_done(env.step(env.rand_action(env.reset()))["next"])
    assert set(seen) == set(functions(env)), "a function was not called"
    for key, function in functions(env).items():
        expected = function.graph(*seen[key])
        found = on_meta(function.graph)(*[x.to("meta") for x in seen[key]])
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected], key
        assert all(x.is_meta for x in found)
    assert recorded.report.keys() == seen.keys()


@pytest.mark.parametrize("name", ["goal"])
def test_pieces_are_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of five substeps: the first with the actions, the rest of them, and what is shown."""
    whole = make(name, max_steps=4)
    monkeypatch.setattr(recording, "_LARGE", 0)
    pieces = make(name, max_steps=4)
    assert set(functions(whole)) == {"step", "refill", "take"}
    assert set(functions(pieces)) == {"begin", "go_on", "end", "refill", "take"}
    a, b = whole.reset(), pieces.reset()
    for _ in range(8):
        action = whole.rand_action()["agents", "action"]
        a, b = (e.step(td.set(("agents", "action"), action))["next"] for e, td in ((whole, a), (pieces, b)))
        for key in a.keys(True, True):
            torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-5)
        a, b = whole.reset_done(a), pieces.reset_done(b)


class Boxes(BaseScenario):
    """Five agents that are boxes with sides of 0.2 and circumscribed circles of 0.2 / sqrt(2), in a row."""

    def make_world(self, batch_dim: int, device: torch.device, **kwargs: Any) -> World:
        self.apart, self.nudge = kwargs.pop("apart", 0.5), kwargs.pop("nudge", False)
        world = World(batch_dim, device, substeps=2)
        for i in range(5):
            world.add_agent(Agent(name=f"agent_{i}", shape=Box(0.2, 0.2), u_multiplier=0.1))
        return world

    def process_action(self, agent: Agent) -> None:
        if self.nudge:
            agent.set_pos(agent.state.pos + 0.001, None)

    def reset_world_at(self, env_index: int | None = None) -> None:
        for i, agent in enumerate(self.world.agents):
            agent.set_pos(torch.tensor([self.apart * i, 0.0]), env_index)

    def observation(self, agent: Agent) -> Tensor:
        return torch.cat([agent.state.pos, agent.state.vel], -1)

    def reward(self, agent: Agent) -> Tensor:
        return agent.state.pos[:, 0]


@pytest.mark.parametrize(
    "apart, version",
    [(0.5, "go_on apart"), (0.28, "go_on"), (0.285, "go_on"), (0.2 * 2**0.5 + 4 / 600 + 0.001, "go_on apart")],
)
def test_pairs_of_boxes_are_left_out_while_none_can_touch(
    apart: float, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sides reach out 4 / 600; it takes one environment with boxes so near, however far they are in the others."""
    whole = make(Boxes(), apart=0.5)
    monkeypatch.setattr(recording, "_LARGE", 0)
    pieces = make(Boxes(), apart=0.5)
    moves = functions(pieces)
    assert {"begin apart", "go_on apart"} < set(moves) and "near" in pieces._compiled.recording.report
    assert moves["go_on apart"].operations < moves["go_on"].operations / 2
    ran = []
    for name, move in moves.items():
        monkeypatch.setitem(pieces._compiled.recording._moves, name, _noted(name, move, ran))
    a, b = whole.reset(), pieces.reset()
    for env in (whole, pieces):  # one environment's boxes are moved
        state = env.get_state()
        for name in [key for key in state.keys() if key.endswith("_state._pos")]:
            state[name] = torch.cat([state[name][:1] * apart / 0.5, state[name][1:]])
        env.set_state(state)
    for _ in range(3):
        action = torch.zeros(6, 5, 2)
        a, b = (e.step(td.set(("agents", "action"), action))["next"] for e, td in ((whole, a), (pieces, b)))
        for key in a.keys(True, True):
            torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=1e-6)
    assert set(ran) == {version.replace("go_on", "begin"), version, "end"} and pieces._compiled.recording.asks
    moved = a["agents", "observation"][..., 2:].abs().sum((1, 2))
    assert bool(moved.any()) == (apart < 0.2 + 4 / 600)


class Late(BaseScenario):
    """Rewards how far a fast agent came in the step; the place before is one with the place between two steps."""

    def make_world(self, batch_dim: int, device: torch.device, **kwargs: Any) -> World:
        world = World(batch_dim, device, substeps=3)
        world.add_agent(Agent(name="agent_0", u_multiplier=10.0))
        return world

    def reset_world_at(self, env_index: int | None = None) -> None:
        agent = self.world.agents[0]
        agent.set_pos(torch.zeros(self.world.batch_dim if env_index is None else 1, 2), env_index)
        self.before = agent.state.pos

    def observation(self, agent: Agent) -> Tensor:
        return agent.state.pos

    def reward(self, agent: Agent) -> Tensor:
        came = (agent.state.pos - self.before).norm(dim=-1)
        self.before = agent.state.pos
        return came


def test_names_of_one_tensor_that_part_within_a_step_keep_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_LARGE", 0)
    env, eager = make(Late()), VmasEnv(Late(), num_envs=6, seed=0)
    assert "step" in functions(env) and "go_on" not in functions(env)
    a, b = env.reset(), eager.reset()
    for _ in range(3):
        action = torch.ones(6, 1, 2)
        a, b = (e.step(td.set(("agents", "action"), action))["next"] for e, td in ((env, a), (eager, b)))
        torch.testing.assert_close(a["agents", "reward"], b["agents", "reward"])
        assert (b["agents", "reward"] > 0).all()


def _noted(name: str, move: Any, ran: list[str]) -> Any:
    return lambda inputs: ran.append(name) or move(inputs)


def test_pairs_of_boxes_are_always_there_where_nobody_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is asked where agents' actions move boxes before the first substep, pairs are few, or near from the first."""
    monkeypatch.setattr(recording, "_LARGE", 0)
    assert "near" not in make(Boxes(), apart=0.28)._compiled.recording.report
    assert "near" not in make(Boxes(), nudge=True)._compiled.recording.report
    monkeypatch.setattr(recording, "_BOXES", 11)
    assert "near" not in make(Boxes())._compiled.recording.report
    monkeypatch.setattr(recording, "_BOXES", 10)
    assert "near" in make(Boxes())._compiled.recording.report
    monkeypatch.setattr("tdmarl.host.is_free", lambda device: False)
    assert "near" not in make(Boxes())._compiled.recording.report


def test_only_what_is_needed_is_carried_on() -> None:
    """What an agent's own velocity was before it is set anew, say, or a landmark's velocity, is not."""
    env = make("simple_spread")
    carried, all_slots = env._compiled.recording.names, {"steps", *env.core.slots.names}
    assert set(carried) < all_slots
    assert sum(name.endswith("_state._pos") for name in carried) == len(env.core.simulation.world.entities)


@pytest.mark.parametrize("name", ["simple_spread", "goal"])
def test_recording_leaves_no_trace(name: str) -> None:
    """Neither state nor random numbers are moved, and VMAS's own code goes on as if there had been none."""
    env, other = (
        VmasEnv(name, num_envs=6, seed=0, mode=mode, spare_resets=False) for mode in ("trace", "eager")
    )
    before = env.state_dict()
    env.compile()
    after = env.state_dict()
    assert before.keys() == after.keys() and env.mode == "trace"
    for key in before:
        torch.testing.assert_close(before[key], after[key], rtol=0, atol=0, equal_nan=True, msg=key)
    simulation = env.core.simulation
    assert not simulation.fixed_size and not simulation.is_recorded
    state = env.get_state().apply(lambda x: x.contiguous())  # sums depend on the order in memory
    env.mode, env._compiled, env.core.held = "eager", None, None
    env.set_state(state)
    for _ in range(3):
        torch.manual_seed(0)
        action = env.rand_action()
        a, b = env.step(action.clone())["next"], other.step(action.clone())["next"]
        for key in a.keys(True, True):
            assert torch.equal(a[key], b[key]), key
