"""Recorded environments: what users write themselves, what falls back, determinism, resuming, captured replays."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, Iterator

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from toys import record

from tdmarl import cuda_graph
from tdmarl.envs.vmas import VmasEnv, choose_mode

OWN = '''
"""A user's scenario: places things one by one, writes by mask, keeps Python state, sees by lidar."""

import numpy as np
import torch
from vmas.simulator.core import Agent, Landmark, Sphere, World
from vmas.simulator.scenario import BaseScenario
from vmas.simulator.sensors import Lidar
from vmas.simulator.utils import ScenarioUtils


class Scenario(BaseScenario):
    def make_world(self, batch_dim, device, **kwargs):
        self.bonus = kwargs.pop("bonus", 1.0)
        self.count, self.calls = kwargs.pop("count", False), 0
        world = World(batch_dim, device, substeps=2)
        for i in range(3):
            sensors = [Lidar(world, n_rays=5, max_range=0.5, entity_filter=lambda e: isinstance(e, Agent))]
            world.add_agent(Agent(f"agent_{i}", shape=Sphere(0.05), sensors=sensors, u_noise=0.1))
        for i in range(3):
            world.add_landmark(Landmark(f"goal_{i}", collide=False))
        self.touched = torch.zeros(batch_dim, device=device)
        return world

    def reset_world_at(self, env_index=None):
        ScenarioUtils.spawn_entities_randomly(
            self.world.agents, self.world, env_index, 0.15, (-0.4, 0.4), (-0.4, 0.4)
        )
        taken = torch.stack([a.state.pos if env_index is None else a.state.pos[env_index][None]
                             for a in self.world.agents], 1)
        for goal in self.world.landmarks:
            place = ScenarioUtils.find_random_pos_for_entity(
                taken, env_index, self.world, 0.15, (-0.6, 0.6), (-0.6, 0.6)
            )
            goal.set_pos(place.squeeze(1), env_index)
            taken = torch.cat([taken, place], 1)
        if env_index is None:
            self.touched[:] = 0
        else:
            self.touched[env_index] = 0

    def reward(self, agent):
        if agent is self.world.agents[0]:
            if self.count:
                self.calls += 1
            near = torch.stack([self.world.get_distance_from_point(a, self.world.landmarks[0].state.pos)
                                for a in self.world.agents], 1).amin(1) < 0.3
            self.touched[near] += self.bonus
        return self.touched - agent.state.vel.norm(dim=-1)

    def observation(self, agent):
        goal = self.world.landmarks[self.world.agents.index(agent)]
        return torch.cat([agent.state.pos, agent.state.vel, goal.state.pos, agent.sensors[0].measure()], -1)

    def done(self):
        return self.touched > 4 * self.bonus


class Small(BaseScenario):
    def make_world(self, batch_dim, device, **kwargs):
        self.bonus = kwargs.pop("bonus", 1.0)
        self.count, self.calls = kwargs.pop("count", False), 0
        world = World(batch_dim, device)
        for i in range(2):
            world.add_agent(Agent(f"agent_{i}", collide=False, u_noise=0.1))
        return world

    def reset_world_at(self, env_index=None):
        size = (self.world.batch_dim if env_index is None else 1, 2)
        for agent in self.world.agents:
            agent.set_pos(torch.rand(size, device=self.world.device), env_index)

    def reward(self, agent):
        self.calls += self.count
        return self.bonus - agent.state.pos.abs().sum(-1)

    def observation(self, agent):
        return torch.cat([agent.state.pos, agent.state.vel], -1)


SHARED = {"steps": 0}


class Changing(Small):
    """Python that is not the same in every step, kept in one way or another."""

    def make_world(self, batch_dim, device, **kwargs):
        self.kind = kwargs.pop("kind")
        self.word, self.past = "odd", []
        world = super().make_world(batch_dim, device, **kwargs)
        self.leader = world.agents[0]
        return world

    def post_step(self):
        if self.kind == "word":
            self.word = "even" if self.word == "odd" else "odd"
        elif self.kind == "list":
            self.past.append(1)
        elif self.kind == "reference":
            self.leader = self.world.agents[1 - self.world.agents.index(self.leader)]
        elif self.kind == "module":
            SHARED["steps"] += 1

    def reward(self, agent):
        bonus = SHARED["steps"] + len(self.past) + (self.word == "odd")
        if self.kind == "numpy":
            bonus = float(np.random.uniform())
        return self.leader.state.pos.sum(-1) + bonus


class Tired(Small):
    """Counts its steps, which shows only where they weigh something."""

    def make_world(self, batch_dim, device, **kwargs):
        self.weight, self.energy = 0.0, torch.zeros(batch_dim, device=device)
        return super().make_world(batch_dim, device, **kwargs)

    def reset_world_at(self, env_index=None):
        super().reset_world_at(env_index)
        if env_index is None:
            self.energy = torch.zeros(self.world.batch_dim, device=self.world.device)

    def post_step(self):
        self.energy = self.energy + 1

    def reward(self, agent):
        return self.energy * self.weight if self.weight else agent.state.pos.sum(-1)


class Branching(Small):
    def done(self):
        far = self.world.agents[0].state.pos.abs().sum(-1)
        if far.sum() > 1e3:
            return far > 4
        return far > 5
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    path = tmp_path_factory.mktemp("scenarios") / "own_scenario.py"
    path.write_text(OWN)
    spec = importlib.util.spec_from_file_location("own_scenario", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Stands in for compiler and capture; counts the replays."""
    count = [0]
    monkeypatch.setattr(cuda_graph, "_capture", lambda run: record(run, count))
    monkeypatch.setattr("tdmarl.cpu_graph.Compiled", lambda graph, inputs, options: graph)
    yield count


def make(scenario: Any = "simple_spread", mode: str = "trace", **kwargs: Any) -> VmasEnv:
    """An environment in a mode; "cudagraph" with the stand-in of `replays`."""
    env = VmasEnv(scenario, **{"num_envs": 6, "seed": 0, "mode": "trace", **kwargs})
    env.mode = mode
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a fallback would warn
        env.compile()
    return env


def play(env: VmasEnv, steps: int, seed: int = 0) -> list[TensorDictBase]:
    """Random actions of their own stream; what ended is reset."""
    torch.manual_seed(seed)
    tensordict, found = env._last.copy(), []
    for _ in range(steps):
        found.append(env.step(env.rand_action(tensordict)).clone())
        tensordict = env.reset_done(found[-1]["next"])
        found.append(tensordict.clone())
    return found


def assert_same(found: Any, expected: Any, tolerance: float = 0) -> None:
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            assert_same(a, b, tolerance)
        return
    keys = set(expected.keys(True, True)) if isinstance(expected, TensorDictBase) else set(expected)
    assert keys == (set(found.keys(True, True)) if isinstance(found, TensorDictBase) else set(found))
    for key in keys:
        torch.testing.assert_close(
            found[key], expected[key], rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{key}: {m}"
        )


def test_a_users_scenario_runs_as_it_does_eagerly(own: ModuleType) -> None:
    """Steps from the same states, with the same noise; its resets come from other numbers."""
    env, other = make(own.Scenario), VmasEnv(own.Scenario, num_envs=6, seed=0)
    assert env.mode == "trace" and {"step", "refill", "take"} == set(env._compiled.recording.report)
    for _ in range(12):
        other.set_state(env.get_state())
        other.core.streams.load_state(env.core.streams.state())
        action = env.rand_action()
        a, b = env.step(action.clone())["next"], other.step(action.clone())["next"]
        assert_same(a, b, 1e-5)
        after = env.get_state()
        for name in env._compiled.recording.names:
            torch.testing.assert_close(after[name], other.get_state()[name], rtol=1e-5, atol=1e-6)
    assert after["scenario.touched"].max() > 0, "the masked write was never taken"
    assert after["scenario.touched"].min() == 0


def test_a_users_scenario_starts_as_it_wants(own: ModuleType) -> None:
    """Things keep their distance also in states drawn ahead; draws of the loop are not merged."""
    env = make(own.Scenario, num_envs=300, max_steps=1)
    tensordict = env.step(env.rand_action(env.reset()))["next"]
    seen = env.reset_done(tensordict)["agents", "observation"]  # [E, 3, 11]
    things = torch.cat([seen[..., :2], seen[..., 4:6]], 1)  # [E, 6, 2]
    apart = torch.cdist(things, things) + torch.eye(6)
    assert apart.min() >= 0.15 - 1e-6
    assert not torch.allclose(seen[..., 0], seen[..., 1], atol=0.01), "x and y are one draw"
    assert not env.get_state()["scenario.touched"].any()


def test_python_state_that_changes_is_named_once(own: ModuleType) -> None:
    env, other = (VmasEnv(own.Small, num_envs=6, seed=0, mode=mode, count=True) for mode in ("trace", "eager"))
    with pytest.warns(UserWarning, match="eagerly.*scenario.calls.*changes") as caught:
        found = play(env, 4)
    assert len(caught) == 1 and env.mode == "eager"
    assert_same(found, play(other, 4))


@pytest.mark.parametrize("kind", ["word", "list", "reference", "module", "numpy"])
def test_python_that_changes_is_not_frozen(own: ModuleType, kind: str) -> None:
    """However a scenario keeps it; a graph of one step would give every step the reward of that one."""
    env = VmasEnv(own.Changing, num_envs=6, seed=0, mode="trace", kind=kind)
    with pytest.warns(UserWarning, match="eagerly"):
        env.compile()
    assert env.mode == "eager"


def test_a_branch_on_a_tensor_is_named_with_its_line(own: ModuleType) -> None:
    line = 1 + OWN.splitlines().index("        if far.sum() > 1e3:")
    env = VmasEnv(own.Branching, num_envs=6, seed=0, mode="trace")
    with pytest.warns(UserWarning, match=rf"eagerly.*own_scenario\.py:{line} reads") as caught:
        found = play(env, 4)
    assert len(caught) == 1 and env.mode == "eager"
    assert_same(found, play(VmasEnv(own.Branching, num_envs=6, seed=0), 4))


@pytest.mark.parametrize("later", ["now", "after some steps"])
def test_what_is_set_through_the_scenario_holds(own: ModuleType, later: str) -> None:
    """A Python value is frozen in the graphs, which are made anew."""
    env, other = make(own.Small), VmasEnv(own.Small, num_envs=6, seed=0)
    if later != "now":
        play(env, 3)
    for one in (env, other):
        one.scenario.bonus = 7.0
    before = env._compiled
    other.set_state(env.get_state())
    other.core.streams.load_state(env.core.streams.state())
    action = env.rand_action()
    assert_same(env.step(action.clone())["next"], other.step(action.clone())["next"], 1e-5)
    assert env.mode == "trace" and env._compiled is not before
    kept = env._compiled
    assert env.scenario.bonus == 7.0
    play(env, 2)
    assert env._compiled is kept, "looking changes nothing"


def test_after_a_fallback_it_is_as_fast_as_one_that_was_eager_from_the_start(own: ModuleType) -> None:
    env = VmasEnv(own.Branching, num_envs=6, seed=0, mode="trace")
    with pytest.warns(UserWarning, match="eagerly"):
        env.compile()
    assert env.core.simulation.grad_mode is torch.inference_mode
    state = env.state_dict()
    expected = play(env, 3)
    env.load_state_dict(state)
    assert_same(play(env, 3), expected)


def test_a_value_that_keeps_changing_ends_in_one_warning(own: ModuleType) -> None:
    env = make("simple")
    with pytest.warns(UserWarning, match="Python values changed"):
        for i in range(5):
            env.scenario.a_number = i
            play(env, 1)
    assert env.mode == "eager"


@pytest.mark.parametrize("place", ["set_pos", "in place"])
@pytest.mark.parametrize("mode", ["trace", "cudagraph"])
def test_positions_written_through_the_scenario_hold(replays: list[int], mode: str, place: str) -> None:
    env, other = make("simple_spread", mode), VmasEnv("simple_spread", num_envs=6, seed=0)
    play(env, 2)
    other.set_state(env.get_state())
    for one in (env, other):
        agent = one.scenario.world.agents[1]
        if place == "set_pos":
            agent.set_pos(torch.full((6, 2), 0.3), batch_index=None)
        else:
            agent.state.pos[2:] = 0.3
    built, action = env._compiled, env.rand_action()
    a, b = env.step(action.clone())["next"], other.step(action.clone())["next"]
    assert_same(a, b, 1e-6)
    assert (a["agents", "observation"][2:, 1, :2] - 0.3).abs().max() < 0.2 and env._compiled is built
    assert_same({k: env.get_state()[k] for k in built.recording.names}, {
        k: other.get_state()[k] for k in built.recording.names
    }, 1e-6)  # fmt: skip


@pytest.mark.parametrize("mode", ["eager", "trace"])
def test_gravity_that_is_set_later_pulls(mode: str) -> None:
    """VMAS adds mass x gravity to the force: after one step of 0.1 s a velocity of 0.1 x gravity."""
    env = make("simple_spread", "trace") if mode == "trace" else VmasEnv("simple_spread", num_envs=6, seed=0)
    still = TensorDict({("agents", "action"): torch.zeros(6, 3, 2)}, [6])
    assert not env.step(still.clone())["next", "agents", "observation"][..., 2:4].any()
    env.scenario.world._gravity = torch.tensor([0.0, -2.0])
    velocity = env.step(still.clone())["next", "agents", "observation"][..., 2:4]
    torch.testing.assert_close(velocity, torch.tensor([0.0, -0.2]).expand(6, 3, 2))


@pytest.mark.parametrize("mode", ["eager", "trace"])
def test_changes_through_the_scenario_add_up_and_are_seen_at_once(mode: str) -> None:
    """Two agents are put somewhere one after the other: state, picture, reset and step see both."""
    env = make("simple_spread", "trace") if mode == "trace" else VmasEnv("simple_spread", num_envs=6, seed=0)
    play(env, 2)
    for i, place in enumerate((0.3, -0.4)):
        env.scenario.world.agents[i].set_pos(torch.full((6, 2), place), batch_index=None)
    positions = [name for name in env.get_state().keys() if name.endswith("_state._pos") and "agents" in name]
    for name, place in zip(sorted(positions), (0.3, -0.4)):
        assert (env.get_state()[name] == place).all() and (env.state_dict()[f"state:{name}"] == place).all()
    shown = env.step(TensorDict({("agents", "action"): torch.zeros(6, 3, 2)}, [6]))["next", "agents", "observation"]
    assert (shown[:, 0, :2] - 0.3).abs().max() < 0.1 and (shown[:, 1, :2] + 0.4).abs().max() < 0.1


def test_state_that_did_not_go_on_is_named_when_something_depends_on_it(own: ModuleType) -> None:
    env = make(own.Tired)
    play(env, 3)
    env.scenario.weight = 1.0
    with pytest.warns(UserWarning, match=r"energy.* did not go on"):
        play(env, 1)
    env.reset()
    assert (play(env, 2)[-2]["next", "agents", "reward"] == 2).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_where_nobody_asks_a_saved_state_draws_ahead_when_it_did(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """As on a GPU: spares are filled up every so many resets, also after a saved state without one that lacks."""
    monkeypatch.setattr("tdmarl.host.is_free", lambda device: False)
    env = make(max_steps=49, seed=seed)
    play(env, 48)
    state = env.state_dict()
    expected = play(env, 110, seed=1)
    other = make(max_steps=49, seed=5)
    other.load_state_dict(state)
    assert_same(play(other, 110, seed=1), expected)
    other.load_state_dict(state)
    other._compiled._until_refill = 0
    drawn = other.core.streams.state()
    other._compiled.begin_in_place()
    assert not torch.equal(other.core.streams.state()["torch_cpu"], drawn["torch_cpu"])


def test_state_put_there_holds(replays: list[int]) -> None:
    """`get_state` is a copy; `set_state` goes back to it, with the same future."""
    for mode in ("trace", "cudagraph"):
        env = make("simple_spread", mode)
        play(env, 2)
        state, kept = env.get_state(), env.get_state()
        action = env.rand_action()
        first = env.step(action.clone())["next"].clone()
        play(env, 2)
        assert_same(state, kept)
        env.set_state(state)
        assert_same(env.step(action.clone())["next"], first)
        assert_same(state, kept)


def test_pictures_show_the_present() -> None:
    env, other = make("simple_spread"), VmasEnv("simple_spread", num_envs=6, seed=0)
    first = env.render(env_index=1)
    play(env, 12)
    other.set_state(env.get_state())
    picture = env.render(env_index=1)
    moved, wrong = (float((picture != shown).mean()) for shown in (first, other.render(env_index=1)))
    assert wrong < 1e-3 < 1e-2 < moved  # edges of things may differ by a pixel from one window to the next
    before = env._compiled
    play(env, 1)
    assert env._compiled is before and env.mode == "trace"


def test_pictures_show_what_agents_do_not_see() -> None:
    """Food that was eaten is hidden, and nothing that agents observe depends on whether it is."""
    env, other = make("dropout"), VmasEnv("dropout", num_envs=6, seed=0)
    other.set_state(env.get_state())
    for one in (env, other):
        food, *_ = one.scenario.world.landmarks
        one.scenario.world.agents[0].set_pos(food.state.pos, batch_index=None)
        one.step(one.rand_action().apply(torch.zeros_like))
    shown = [one.scenario.world.landmarks[0].is_rendering for one in (env, other)]
    assert not shown[1].any() and torch.equal(*shown)


@pytest.mark.parametrize("mode", ["trace", "cudagraph"])
def test_one_seed_is_one_trajectory(replays: list[int], own: ModuleType, mode: str) -> None:
    env, twin = (make(own.Small, mode, max_steps=3) for _ in range(2))
    expected = play(env, 8)
    assert_same(play(twin, 8, seed=0), expected)
    twin.set_seed(0)
    env.set_seed(0)
    twin.reset()
    env.reset()
    assert_same(play(twin, 5), play(env, 5))
    assert (replays[0] > 0) == (mode == "cudagraph")
    other = make(own.Small, mode, max_steps=3, seed=1)
    assert not torch.equal(play(other, 1)[0]["agents", "observation"], expected[0]["agents", "observation"])


@pytest.mark.parametrize("mode", ["trace", "cudagraph"])
@pytest.mark.parametrize("kwargs", [{}, {"spare_resets": False}, {"max_steps": 1}])
def test_a_saved_state_goes_on_to_the_last_bit(
    replays: list[int], own: ModuleType, mode: str, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    kwargs = {"max_steps": 3, **kwargs}
    env = make(own.Small, mode, **kwargs)
    play(env, 5)
    torch.save(env.state_dict(), tmp_path / "state")
    expected = play(env, 7, seed=1)
    end = env.state_dict()
    for other in (env, make(own.Small, mode, **{**kwargs, "seed": 5})):
        other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        assert_same(play(other, 7, seed=1), expected)
        assert_same(other.state_dict(), end)
    fresh = VmasEnv(own.Small, num_envs=6, seed=9, mode="trace", **kwargs)  # compiles at its first step
    fresh.mode = mode
    fresh.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert_same(play(fresh, 7, seed=1), expected)


@pytest.mark.parametrize("kwargs", [{}, {"spare_resets": False}, {"max_steps": 1}])
@pytest.mark.parametrize("name", ["own", "goal"])
def test_captured_replays_are_the_recorded_graphs(
    replays: list[int], own: ModuleType, name: str, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`goal` in pieces, whose state each other's captures keep."""
    monkeypatch.setattr("tdmarl.envs.recording._LARGE", 0 if name == "goal" else 4_000)
    scenario = own.Small if name == "own" else name
    kwargs = {"max_steps": 4, **kwargs}
    plain, captured = make(scenario, **kwargs), make(scenario, "cudagraph", **kwargs)
    assert_same(play(captured, 12), play(plain, 12))
    assert_same(captured.state_dict(), plain.state_dict())
    assert replays[0] > 12


def test_outputs_do_not_change_with_the_next_replay(replays: list[int]) -> None:
    """A collector keeps them all, and stacks them at the end."""
    env = make("simple_spread", "cudagraph", max_steps=2)
    tensordict, kept, copies = env.reset(), [], []
    for _ in range(6):
        kept.append(env.step(env.rand_action(tensordict)))
        copies.append(kept[-1].clone())
        tensordict = env.reset_done(kept[-1]["next"])
        kept.append(tensordict.copy())
        copies.append(tensordict.clone())
    for a, b in zip(kept, copies):
        assert_same(a, b)
    static = {x.data_ptr() for name in ("refill", "take") for x in getattr(env._compiled.recording, name)._call.inputs}
    static |= {x.data_ptr() for f in env._compiled.recording._moves.values() for x in f._call.inputs}
    state = env.get_state()
    shown = {x.data_ptr() for td in (*kept, state) for x in td.values(True, True)}
    assert static and not static & shown


@pytest.mark.parametrize("mode", ["trace", "cudagraph"])
def test_every_step_of_a_short_episode_ends_it(replays: list[int], mode: str) -> None:
    env = make("simple_spread", mode, max_steps=1)
    starts = []
    for tensordict in play(env, 6):
        if "next" in tensordict.keys():
            assert tensordict["next", "truncated"].all() and not tensordict["next", "terminated"].any()
        else:
            assert not tensordict["done"].any()
            starts.append(tensordict["agents", "observation"].flatten(1))
    rows = torch.cat(starts)
    assert len(rows.unique(dim=0)) == len(rows)
    assert not env._compiled.ran_short


def test_resets_drawn_at_every_end() -> None:
    env = make("simple_spread", spare_resets=False, max_steps=1)
    assert set(env._compiled.recording.report) == {"step", "renew"}
    assert not any(key.startswith(("drawn", "spare")) for key in env.state_dict())
    rows = torch.cat([td["agents", "observation"].flatten(1) for td in play(env, 6)[1::2]])
    assert len(rows.unique(dim=0)) == len(rows)


def test_actions_that_are_none_change_nothing(own: ModuleType) -> None:
    env = make(own.Small)
    play(env, 2)
    state, action = env.state_dict(), env.rand_action()
    expected = env.step(action.clone())["next"]
    env.load_state_dict(state)
    bad = action.clone()
    bad["agents", "action"][3, 1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"\('agents', 'action'\) holds NaN"):
        env.step(bad)
    assert_same({k: v for k, v in env.state_dict().items() if not k.startswith("stream")},
                {k: v for k, v in state.items() if not k.startswith("stream")})  # fmt: skip
    env.load_state_dict(state)
    assert_same(env.step(action.clone())["next"], expected)
    with pytest.raises(ValueError, match=r"has shape \(6, 2, 4\), expected \(6, 2, 2\)"):
        env.step(TensorDict({("agents", "action"): torch.zeros(6, 2, 4)}, [6]))
    with pytest.raises(KeyError, match="agents.*action"):
        env.step(TensorDict({}, [6]))
    discrete = make("simple", continuous_actions=False)
    with pytest.raises(ValueError, match="choice"):
        discrete.step(TensorDict({("agents", "action"): torch.full((6, 1), 9)}, [6]))


def test_choices_and_one_hot_choices_are_recorded() -> None:
    for kwargs in ({}, {"multidiscrete_actions": True}, {"categorical_actions": False}):
        both = [
            VmasEnv("simple_reference", num_envs=6, seed=0, mode=mode, continuous_actions=False, **kwargs)
            for mode in ("trace", "eager")
        ]
        torch.manual_seed(0)
        action = both[0].rand_action()
        assert_same(*(env.step(action.clone())["next"] for env in both), 1e-6)
        assert both[0].mode == "trace"


def test_modes_are_checked_when_built() -> None:
    with pytest.raises(ValueError, match="mode is 'fast'.*eager, trace, compile"):
        VmasEnv("simple", num_envs=2, mode="fast")
    with pytest.raises(ValueError, match="cudagraph.*CUDA"):
        VmasEnv("simple", num_envs=2, mode="cudagraph")
    for mode in ("trace", "compile", "cudagraph"):
        with pytest.raises(ValueError, match="grad_enabled=True"):
            choose_mode(mode, torch.device("cuda"), 64, None, grad_enabled=True)
    env = VmasEnv("simple", num_envs=2, seed=0, mode="auto", grad_enabled=True, expected_steps=10**9)
    assert env.mode == "eager"
    action = torch.zeros(2, 1, 2, requires_grad=True)
    env.step(TensorDict({("agents", "action"): action}, [2]))["next", "agents", "reward"].sum().backward()
    assert action.grad is not None and action.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "device, steps, expected",
    [
        ("cpu", None, "eager"),
        ("cpu", 100, "eager"),
        ("cpu", 6_000, "eager"),
        ("cpu", 7_000, "compile"),
        ("cpu", 1_000_000, "compile"),
        ("cuda", 100, "eager"),
        ("cuda", 1_000_000, "cudagraph"),
    ],
)
def test_auto_compiles_where_it_pays(device: str, steps: int | None, expected: str) -> None:
    assert choose_mode("auto", torch.device(device), 1024, steps, grad_enabled=False) == expected
    for mode in ("eager", "trace", "compile"):
        assert choose_mode(mode, torch.device(device), 1024, steps, grad_enabled=False) == mode


def test_compiled_is_eager_and_the_same_twice() -> None:
    """The only test here that compiles."""
    both = [VmasEnv("simple", num_envs=6, seed=0, max_steps=3, mode="compile") for _ in range(2)]
    eager = VmasEnv("simple", num_envs=6, seed=0, max_steps=3)
    found = [play(env, 8) for env in both]
    assert [env.mode for env in both] == ["compile", "compile"]
    assert_same(*found)
    eager.set_state(both[0].get_state())
    for _ in range(8):
        action = eager.rand_action()
        for key in eager.action_keys:  # as agents' own networks leave it: environments last in memory
            action[key] = action[key].movedim(0, -1).contiguous().movedim(-1, 0)
        assert_same(*(env.step(action.clone())["next"] for env in (both[0], eager)), 1e-5)
