"""Ends, resets, randomness, state, groups, actions and errors of `VmasEnv`."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vmas
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, MultiCategorical, OneHot
from torchrl.envs.utils import check_env_specs
from toys import NoHostRead
from vmas.scenarios.balance import Scenario as Balance
from vmas.simulator.core import Agent, Landmark, World
from vmas.simulator.scenario import BaseScenario
from vmas.simulator.utils import ScenarioUtils

from tdmarl.envs.check import check_env
from tdmarl.envs.scenarios import UNSUPPORTED, replaced
from tdmarl.envs.simulation import find_position
from tdmarl.envs.streams import Streams
from tdmarl.envs.vmas import VmasEnv

ALL = [n for n in vmas.scenarios + vmas.mpe_scenarios + vmas.debug_scenarios if n not in UNSUPPORTED]
SLOW = {"pollock", "joint_passage", "waterfall", "passage"}
QUICK = ["navigation", "balance", "simple_speaker_listener", "sampling", "het_mass", "joint_passage_size"]


class Counter(BaseScenario):
    """A user's own scenario: ends by itself after `limit` steps, draws from NumPy and Python."""

    def make_world(self, batch_dim: int, device: torch.device, **kwargs: Any) -> World:
        self.limit = kwargs.pop("limit", 3)
        self.calls = 0
        world = World(batch_dim, device)
        for i in range(2):
            world.add_agent(Agent(name=f"agent_{i}", u_noise=0.1, u_multiplier=0.5))
        for i in range(3):
            world.add_landmark(Landmark(name=f"landmark_{i}", collide=False))
        self.count = torch.zeros(batch_dim, device=device)
        return world

    def reset_world_at(self, env_index: int | None = None) -> None:
        shift = np.random.uniform(-1, 1) + random.uniform(-1, 1)
        self.goal = self.world.landmarks[torch.randint(0, 3, (1,)).item()]
        for i, entity in enumerate(self.world.entities):
            entity.set_pos(
                torch.randn(self.world.batch_dim, 2, device=self.world.device) + shift + i, env_index
            )
        self.count = torch.zeros_like(self.count)

    def reward(self, agent: Agent) -> Tensor:
        if agent is self.world.agents[0]:
            self.calls += 1
            self.count = self.count + 1
        return -torch.linalg.vector_norm(agent.state.pos - self.goal.state.pos, dim=-1)

    def observation(self, agent: Agent) -> Tensor:
        return torch.cat([agent.state.pos, agent.state.vel, self.goal.state.pos - agent.state.pos], -1)

    def done(self) -> Tensor:
        return self.count >= self.limit

    def info(self, agent: Agent) -> dict[str, Tensor]:
        return {"count": self.count.to(torch.int64)}


def make(name: Any = "navigation", **kwargs: Any) -> VmasEnv:
    return VmasEnv(name, **{"num_envs": 6, "seed": 0, **kwargs})


def act(env: VmasEnv, tensordict: TensorDictBase, generator: torch.Generator) -> TensorDictBase:
    for group in env.groups:
        spec = group.actions.spec
        unit = torch.rand((env.num_envs, *spec.shape), generator=generator)
        tensordict.set((group.name, "action"), unit * (spec.space.high - spec.space.low) + spec.space.low)
    return tensordict


def play(env: VmasEnv, tensordict: TensorDictBase, steps: int, seed: int = 0) -> list[TensorDictBase]:
    """Random actions of their own stream; what ended is reset."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        found.append(env.step(act(env, tensordict, generator)).clone())
        tensordict = env.reset_done(found[-1]["next"])
    return found


def rollout(env: VmasEnv, tensordict: TensorDictBase, steps: int) -> Any:
    """`play`, stacked over time."""
    return torch.stack(play(env, tensordict, steps))  # [T, E]


def assert_same(a: TensorDictBase, b: TensorDictBase, rows: Any = slice(None)) -> None:
    assert set(a.keys(True, True)) == set(b.keys(True, True))
    for key in a.keys(True, True):
        torch.testing.assert_close(a[key][rows], b[key][rows], rtol=0, atol=0, equal_nan=True, msg=str(key))


@pytest.mark.parametrize("name", ALL)
def test_every_scenario_has_the_specs_it_shows(name: str) -> None:
    env = VmasEnv(name, num_envs=3, max_steps=2, seed=0)
    check_env_specs(env)
    check_env(env, steps=1 if name in SLOW else 3)


@pytest.mark.parametrize("kwargs", [{"multidiscrete_actions": True}, {"categorical_actions": False}, {}])
@pytest.mark.parametrize("name", ["navigation", "simple_world_comm", "drone"])
def test_discrete_actions_have_the_specs_they_show(name: str, kwargs: dict[str, bool]) -> None:
    env = make(name, continuous_actions=False, max_steps=2, **kwargs)
    check_env_specs(env)
    check_env(env)


def test_unsupported_scenarios_are_few_and_say_why() -> None:
    assert len(UNSUPPORTED) <= 2
    for name, reason in UNSUPPORTED.items():
        with pytest.raises(NotImplementedError, match=reason[:30]):
            make(name)


def test_unknown_scenario_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="'navigatoin'.*navigation"):
        make("navigatoin")


def test_an_argument_of_an_ancestor_is_known() -> None:
    class Louder(Counter):
        def make_world(self, batch_dim: int, device: torch.device, **kwargs: Any) -> Any:
            kwargs.pop("loud", None)
            ScenarioUtils.check_kwargs_consumed({key: kwargs[key] for key in kwargs if key != "limit"})
            return super().make_world(batch_dim, device, **kwargs)

    with pytest.raises(ValueError, match=r"no argument \['quiet'\].*'limit', 'loud'"):
        make(Louder, quiet=True)


def test_a_scenario_argument_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"\['n_agent'\].*'n_agents'"):
        make("navigation", n_agent=3)


def test_time_limit_truncates_and_does_not_terminate() -> None:
    env = make(max_steps=3)
    rollout = env.rollout(3, lambda td: act(env, td, torch.Generator().manual_seed(0)))
    for key in ("truncated", "done"):
        assert rollout["next", key][..., 0].tolist() == [[False, False, True]] * 6
        assert rollout["next", "agents", key].shape == (6, 3, 4, 1)
        assert torch.equal(
            rollout["next", "agents", key], rollout["next", key].unsqueeze(2).expand(6, 3, 4, 1)
        )
    assert not rollout["next", "terminated"].any() and not rollout["next", "agents", "terminated"].any()


def test_terminate_is_torchrls_time_limit() -> None:
    rollout = make(max_steps=3, time_limit="terminate").rollout(3)
    assert rollout["next", "terminated"][..., 0].tolist() == [[False, False, True]] * 6
    with pytest.raises(ValueError, match="time_limit is 'stop'"):
        make(time_limit="stop")


def test_scenarios_own_end_terminates_and_next_keeps_the_last_observation() -> None:
    env = make(Counter(), limit=2, max_steps=4)
    rollout = env.rollout(5, break_when_any_done=False)
    assert rollout["next", "terminated"][0, :, 0].tolist() == [False, True, False, True, False]
    assert not rollout["next", "truncated"].any()
    assert rollout["next", "agents", "info", "count"][0, :, 0, 0].tolist() == [1, 2, 1, 2, 1]
    moved = (
        rollout["next", "agents", "observation"][:, 1, :, :2] - rollout["agents", "observation"][:, 1, :, :2]
    ).abs()
    assert moved.max() < 0.5  # one step, not a jump to the next episode
    assert (
        rollout["agents", "observation"][:, 2, :, :2] - rollout["agents", "observation"][:, 1, :, :2]
    ).abs().max() > 0.5


@pytest.mark.parametrize("name", [n for n in ALL if n not in SLOW] + ["passage"])
def test_reset_touches_the_masked_environments_alone(name: str) -> None:
    env = make(name, num_envs=8)
    play(env, env.reset(), 2)
    shown, before = env._last.clone(), env.get_state()
    none = torch.zeros(8, 1, dtype=torch.bool)
    assert_same(env.reset(shown.clone().set("_reset", none)), shown)
    assert_same(env.get_state(), before)
    half = (torch.arange(8) % 2 == 0).unsqueeze(-1)
    after = env.reset(shown.clone().set("_reset", half))
    state = env.get_state()
    for key in state.keys():
        if state[key].ndim and state[key].shape[0] == 8:
            torch.testing.assert_close(
                state[key][1::2], before[key][1::2], rtol=0, atol=0, equal_nan=True, msg=key
            )
    assert state["steps"].tolist() == [0, 2] * 4
    assert_same(after, shown, rows=slice(1, None, 2))


@pytest.mark.parametrize("name", QUICK)
def test_a_full_mask_is_a_full_reset_and_the_half_of_one(name: str) -> None:
    env = make(name, num_envs=8)
    play(env, env.reset(), 2)
    start, saved = env.get_state(), env.core.streams.state()
    found = []
    for mask in (None, torch.ones(8, 1, dtype=torch.bool), (torch.arange(8) < 4).unsqueeze(-1)):
        env.set_state(start)
        env.core.streams.load_state(saved)
        td = env._reset(None if mask is None else TensorDict({"_reset": mask}, batch_size=[8]))
        found.append((td, env.get_state()))
    (full, full_state), (masked, masked_state), (half, half_state) = found
    assert_same(full, masked)
    assert_same(full, half, rows=slice(0, 4))
    for key in full_state.keys():
        if full_state[key].ndim and full_state[key].shape[0] == 8:
            assert torch.equal(full_state[key], masked_state[key]), key
            assert torch.equal(full_state[key][:4], half_state[key][:4]), key


@pytest.mark.parametrize(
    "name", ["simple_adversary", "simple_push", "simple_reference", "simple_speaker_listener"]
)
def test_goals_are_each_environments_own(name: str) -> None:
    env = make(name, num_envs=64)
    index = next(
        value
        for key, value in env.get_state().items()
        if key.endswith("goal._index") or key.endswith("goal_b._index")
    )
    counts = index.bincount()
    assert counts.numel() > 1 and counts.min() >= 64 / counts.numel() / 3
    before = index.clone()
    env.reset(TensorDict({"_reset": (torch.arange(64) < 32).unsqueeze(-1)}, batch_size=[64]))
    after = next(
        value
        for key, value in env.get_state().items()
        if key.endswith("goal._index") or key.endswith("goal_b._index")
    )
    assert torch.equal(before[32:], after[32:]) and not torch.equal(before[:32], after[:32])


def test_goal_of_each_environment_is_what_it_observes() -> None:
    env = make("simple_speaker_listener", num_envs=32)
    td = env.reset()
    index = next(value for key, value in env.get_state().items() if key.endswith("goal_b._index"))
    channel = td["speaker", "observation"][:, 0].argmax(-1)  # landmark i has the largest colour in channel i
    assert torch.equal(channel, index)


def test_permutations_are_each_environments_own() -> None:
    env = make("ball_trajectory", num_envs=64)
    left = env.reset()["agents", "observation"][:, 0, 0] < env._last["agents", "observation"][:, 1, 0]
    assert 0 < int(left.sum()) < 64


def test_spawned_entities_keep_their_distance() -> None:
    class Empty:
        batch_dim, device = 200, torch.device("cpu")

    torch.manual_seed(0)
    occupied = torch.zeros(200, 1, 2)
    place = find_position(occupied, None, Empty(), 0.8, (-1.0, 1.0), (-1.0, 1.0))  # [200, 1, 2]
    assert place.shape == (200, 1, 2)
    assert place.norm(dim=-1).min() >= 0.8 and place.abs().max() <= 1
    crowded = find_position(occupied, None, Empty(), 9.0, (-1.0, 1.0), (-1.0, 1.0))
    assert crowded.norm(dim=-1).mean() > 1.2  # no place is far enough: the roomiest, near a corner at 1.41


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    "name, gaps",
    [("joint_passage", 1), ("joint_passage", 3), ("joint_passage_size", 3), ("joint_passage_size", 4)],
)
def test_passages_are_placed_as_in_vmas(name: str, gaps: int, fixed: bool) -> None:
    kwargs = dict(n_passages=gaps, fixed_passage=fixed)
    stock = vmas.make_env(name, num_envs=200, seed=0, **kwargs).scenario
    mine = make(name, num_envs=200, **kwargs).scenario
    for scenario in (stock, mine):
        torch.manual_seed(0)
        scenario.spawn_passage_map(None)
    for theirs, ours in zip(stock.passages, mine.passages):
        assert torch.equal(theirs.state.pos, ours.state.pos)
        assert torch.equal(theirs.is_rendering, ours.is_rendering)
        if hasattr(theirs, "neighbour"):
            assert torch.equal(torch.as_tensor(theirs.neighbour), torch.as_tensor(ours.neighbour))
    for key in ("big_passage_pos", "small_passage_pos", "pass_center", "small_left_or_right", "middle_angle"):
        if isinstance(getattr(stock, key, None), Tensor):
            assert torch.equal(getattr(stock, key), getattr(mine, key)), key


def test_masses_are_drawn_per_environment() -> None:
    env = make("het_mass", num_envs=50)
    mass = env.agents[0].mass
    assert mass.shape == (50, 1) and mass.std() > 0


@pytest.mark.parametrize("name", ["navigation", Counter, "football"])
def test_environments_influence_neither_each_other_nor_the_global_generators(name: Any) -> None:
    alone = make(name, seed=5)
    expected = rollout(alone, alone.reset(), 4)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    np.random.standard_normal()  # leaves a second Gaussian in NumPy's cache, which must survive as well
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    env, other = make(name, seed=5), make(name, seed=6)
    tensordict, noise = env.reset(), other.reset()
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(4):
        found.append(env.step(act(env, tensordict, generator)).clone())
        noise = other.reset_done(play(other, noise, 1)[0]["next"])
        tensordict = env.reset_done(found[-1]["next"])
    assert_same(torch.stack(found), expected)
    assert torch.equal(torch.get_rng_state(), states[0])
    after = np.random.get_state()
    assert all(np.array_equal(a, b) for a, b in zip(after, states[1]))
    assert random.getstate() == states[2]


def test_same_seed_is_the_same_trajectory_also_after_use() -> None:
    fresh = make("balance", seed=4)
    expected = rollout(fresh, fresh.reset(), 3)
    used = make("balance", seed=1)
    play(used, used.reset(), 5)
    used.set_seed(4)
    used.reset()
    fresh.set_seed(4)
    fresh.reset()
    assert_same(used.get_state(), fresh.get_state())
    assert_same(
        rollout(used, used._last.clone(), 3), rollout(fresh, fresh._last.clone(), 3)
    )
    assert not torch.equal(
        expected["agents", "observation"][0], make("balance", seed=1)._last["agents", "observation"]
    )


RESUME = """
import sys, torch
sys.path[:0] = [{tests!r}, {tests!r} + '/..', {root!r}]
from test_vmas import Counter, make, play
for name in {names!r}:
    env = make(Counter if name == "Counter" else name, seed=77, max_steps=3)
    env.load_state_dict(torch.load("{folder}/" + name, weights_only=True))
    rows = torch.stack(play(env, env._last.copy(), 10)).flatten_keys("/")
    torch.save(rows.to_dict(), "{folder}/next-" + name)
"""


def test_a_new_process_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    expected: dict[str, TensorDictBase] = {}
    for name in (
        "navigation",
        "Counter",
        "simple_speaker_listener",
        "football",
        "sampling",
        "joint_passage_size",
    ):
        env = make(Counter if name == "Counter" else name, max_steps=3)
        play(env, env.reset(), 4)
        torch.save(env.state_dict(), tmp_path / name)
        expected[name] = rollout(env, env._last.copy(), 10).flatten_keys("/")  # with three random resets
    here = Path(__file__).resolve().parent
    code = RESUME.format(tests=str(here), root=str(here.parents[1]), names=list(expected), folder=tmp_path)
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    for name, after in expected.items():
        found = torch.load(tmp_path / f"next-{name}", weights_only=True)
        assert_same(TensorDict(found, batch_size=after.batch_size), after)


def test_state_dict_is_tensors_and_says_what_is_wrong_with_another() -> None:
    env = make()
    state = env.state_dict()
    assert state and all(isinstance(value, Tensor) for value in state.values())
    with pytest.raises(ValueError, match=r"shape \(6.*expected \(5"):
        make(num_envs=5).load_state_dict(state)
    other = make("balance")
    with pytest.raises(KeyError, match="missing"):
        other.load_state_dict(state)
    for name in ("stream:torch_cpu", "last:done"):
        twin = make(seed=3)
        before = twin.state_dict()
        with pytest.raises(KeyError, match=f"'{name}' is missing"):
            twin.load_state_dict({key: value for key, value in state.items() if key != name})
        for key, value in twin.state_dict().items():
            torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


def test_a_state_of_another_device_starts_the_stream_that_it_lacks() -> None:
    """The stream is the same each time, and another one after another seed."""

    class Elsewhere:
        device = torch.device("cuda")

    found = []
    for seed in (0, 0, 1):
        streams = Streams(torch.device("cpu"), seed)
        state = streams.state()
        with replaced((torch, "Generator", lambda device: torch._C.Generator())):
            found.append(Streams._state_of(Elsewhere(), state))  # type: ignore[arg-type]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_step_and_reset_are_functions_of_the_state() -> None:
    env = make("navigation")
    start = env.get_state()
    kept = start.clone()
    actions = env.core.simulation.random_actions()
    first, out = env.core.step(start, actions)
    first = first.clone()
    env.core.step(first, actions)
    again, same = env.core.step(start, actions)
    assert_same(start, kept)
    assert_same(first, again)
    assert torch.equal(out.reward[0], same.reward[0])
    mask = torch.tensor([True, False] * 3)
    reset, _ = env.core.reset(first, mask)
    assert torch.equal(reset["steps"], torch.tensor([0, 1] * 3))


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("name", ["simple_world_comm", "drone", "navigation"])
def test_choices_move_agents_as_in_vmas(name: str, multi: bool) -> None:
    kwargs = dict(continuous_actions=False, multidiscrete_actions=multi)
    stock = vmas.make_env(name, num_envs=40, seed=0, **kwargs)
    env = make(name, num_envs=40, **kwargs)
    for group in env.groups:
        torch.manual_seed(1)
        action = group.actions.spec.expand(40, *group.actions.spec.shape).rand()
        for i, (force, message) in zip(group.indices, group.actions.decode(action)):
            agent, own = stock.agents[i], action[:, group.indices.index(i)]
            stock._set_action(own if multi else own.unsqueeze(-1), agent)
            assert torch.equal(force, agent.action.u)
            assert message is None or torch.equal(message, agent.action.c)


def test_one_hot_choices_are_the_categorical_ones() -> None:
    env = make("simple_reference", continuous_actions=False)
    hot = make("simple_reference", continuous_actions=False, categorical_actions=False)
    spec = env.groups[0].actions.spec
    action = torch.randint(0, spec.n, (6, *spec.shape))
    one_hot = torch.nn.functional.one_hot(action, spec.n)
    for (force, message), (force_2, message_2) in zip(
        env.groups[0].actions.decode(action), hot.groups[0].actions.decode(one_hot)
    ):
        assert torch.equal(force, force_2)
        assert message is not None and message_2 is not None and torch.equal(message, message_2)


def test_out_of_range_actions_are_clamped() -> None:
    env, twin = make(), make()
    td, other = env.reset(), twin.reset()
    env.step(td.set(("agents", "action"), torch.full((6, 4, 2), 9.0)))
    twin.step(other.set(("agents", "action"), torch.full((6, 4, 2), 1.0)))
    assert_same(env.get_state(), twin.get_state())


def test_wrong_actions_are_named() -> None:
    env = make()
    td = env.reset()
    bad = torch.zeros(6, 4, 2)
    bad[3, 1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"\('agents', 'action'\) holds NaN"):
        env.step(td.clone().set(("agents", "action"), bad))
    with pytest.raises(
        ValueError, match=r"\('agents', 'action'\) has shape \(6, 4, 3\), expected \(6, 4, 2\)"
    ):
        env.step(td.clone().set(("agents", "action"), torch.zeros(6, 4, 3)))
    with pytest.raises(KeyError, match="agents.*action"):
        env.step(td.clone())
    make(check_nan=False).step(td.clone().set(("agents", "action"), bad))
    discrete = make(continuous_actions=False)
    with pytest.raises(ValueError, match="choice"):
        discrete.step(td.clone().set(("agents", "action"), torch.full((6, 4), 9)))


def test_groups_are_agents_of_one_size_and_kind() -> None:
    assert make("simple_tag").group_map == {
        "adversary": ["adversary_0", "adversary_1", "adversary_2"],
        "agent": ["agent_0"],
    }
    assert make("navigation").group_map == {"agents": [f"agent_{i}" for i in range(4)]}

    class Unlike(Counter):
        def observation(self, agent: Agent) -> Tensor:
            found = super().observation(agent)
            return found if agent is self.world.agents[0] else found[:, :4]

    assert make(Unlike).group_map == {"agent_0": ["agent_0"], "agent_1": ["agent_1"]}
    padded = make(Unlike, pad=True)
    assert padded.group_map == {"agents": ["agent_0", "agent_1"]}
    assert padded.reset()["agents", "observation"].shape == (6, 2, 6)
    assert not padded._last["agents", "observation"][:, 1, 4:].any()


TEAM = {"team": ["speaker_0", "listener_0"]}


def test_unlike_agents_need_padding_to_share_a_group() -> None:
    with pytest.raises(ValueError, match="'team'.*pad=True"):
        make("simple_speaker_listener", group_map=TEAM)


def test_padded_continuous_actions_have_empty_bounds() -> None:
    env = make("simple_speaker_listener", group_map=TEAM, pad=True)
    spec = env.full_action_spec_unbatched["team", "action"]
    assert isinstance(spec, Bounded)
    assert spec.space.high.tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0],
    ]  # two forces and three symbols; the listener is silent
    assert spec.space.low.tolist() == [[-1, -1, 0, 0, 0], [-1, -1, 0, 0, 0]]
    check_env(env)


@pytest.mark.parametrize(
    "kwargs, kind, choices",
    [
        ({}, Categorical, [27, 9]),
        ({"categorical_actions": False}, OneHot, [27, 9]),
        (
            {"multidiscrete_actions": True},
            MultiCategorical,
            [9, 7],
        ),  # 3 + 3 and 3 symbols, or the one of not talking
    ],
)
def test_padded_choices_are_masked(kwargs: dict[str, bool], kind: type, choices: list[int]) -> None:
    env = make("simple_speaker_listener", group_map=TEAM, pad=True, continuous_actions=False, **kwargs)
    assert isinstance(env.full_action_spec_unbatched["team", "action"], kind)
    mask = env.reset()["team", "action_mask"]
    assert mask.dtype == torch.bool and mask[0].sum(-1).tolist() == choices
    check_env(env)


def test_users_scenarios_work_as_class_and_instance() -> None:
    for scenario in (Counter, Counter()):
        env = make(scenario, limit=2)
        check_env(env)
        assert env.group_map == {"agents": ["agent_0", "agent_1"]}
    assert make(Balance(), n_agents=4).n_agents == 4
    with pytest.raises(ValueError, match="expected a name"):
        make(3)


def test_info_is_there_under_torchrls_names() -> None:
    info = make("balance").reset()["agents", "info"]
    assert set(info.keys()) == {"pos_rew", "ground_rew"}
    assert info["pos_rew"].shape == (6, 3, 1) and info["pos_rew"].dtype == torch.float32


def test_rewards_are_differentiable_when_asked() -> None:
    env = make("navigation", grad_enabled=True)
    td, actions = env.reset(), []
    for _ in range(3):
        actions.append(torch.zeros(6, 4, 2, requires_grad=True))
        td = env.step(td.set(("agents", "action"), actions[-1]))["next"]
    td["agents", "reward"].sum().backward()
    grads = [action.grad for action in actions]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    env.detach()
    assert not any(value.requires_grad for value in env.get_state().values())
    assert not make("navigation").rollout(2)["next", "agents", "reward"].requires_grad


@pytest.mark.parametrize("name", ["het_mass", "vel_control"])
def test_scenarios_that_write_into_actions_are_differentiable_and_leave_them_alone(name: str) -> None:
    env = make(name, grad_enabled=True)
    action = env.rand_action()
    keys = [(group.name, "action") for group in env.groups]
    for key in keys:
        action[key].requires_grad_()
    kept = [action[key].detach().clone() for key in keys]
    env.step(action)["next", keys[0][0], "observation"].sum().backward()
    for key, before in zip(keys, kept):
        assert action[key].grad.abs().sum() > 0 and torch.equal(action[key], before)


class Windy(BaseScenario):
    """One wind for all environments, whose size may be their number by chance; info under a name with a colon."""

    def make_world(self, batch_dim: int, device: torch.device, **kwargs: Any) -> World:
        world = World(batch_dim, device)
        world.add_agent(Agent(name="agent"))
        return world

    def reset_world_at(self, env_index: int | None = None) -> None:
        self.world.agents[0].set_pos(torch.rand(self.world.batch_dim, 2), env_index)
        self.wind = torch.rand(2)

    def observation(self, agent: Agent) -> Tensor:
        return agent.state.pos + self.wind

    def reward(self, agent: Agent) -> Tensor:
        return agent.state.pos.sum(-1)

    def info(self, agent: Any) -> dict[str, Tensor]:
        return {"my:wind": self.wind.sum().expand(self.world.batch_dim)}


@pytest.mark.parametrize("envs", [2, 4])
@pytest.mark.parametrize("mode", ["eager", "trace"])
def test_what_is_one_for_the_batch_is_no_row(mode: str, envs: int) -> None:
    env = make(Windy, num_envs=envs, mode=mode)
    env.rollout(1)
    name = next(key for key in env.get_state().keys() if key.endswith("wind"))
    before = env.get_state()[name].clone()
    env._reset(TensorDict({"_reset": torch.arange(envs).unsqueeze(-1) == 0}, [envs]))
    assert torch.equal(env.get_state()[name], before)
    other = make(Windy, num_envs=envs, mode=mode, seed=3)
    other.load_state_dict(env.state_dict())
    reset = TensorDict({"_reset": torch.arange(envs).unsqueeze(-1) == 1}, [envs])
    assert_same(other._reset(reset), env._reset(reset))


def test_it_stays_where_it_was_built() -> None:
    env = make()
    assert env.to("cpu") is env and env.to("cpu:0") is env and env.to(None) is env
    with pytest.raises(NotImplementedError, match="cannot move to meta"):
        env.to("meta")


def test_reset_done_is_step_mdp_and_maybe_reset() -> None:
    env, twin = make(Counter, limit=2), make(Counter, limit=2)
    td, other = env.reset(), twin.reset()
    generator, same = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    for _ in range(5):
        td = env.reset_done(env.step(act(env, td, generator))["next"])
        _, other = twin.step_and_maybe_reset(act(twin, other, same))
        assert_same(td, other.select(*td.keys(True, True)))


@pytest.mark.parametrize(
    "name", ["navigation", "balance", "simple_tag", "dispersion", "transport", "discovery", "flocking"]
)
def test_neither_step_nor_reset_reads_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where boolean indexing is replaced as well; same result."""
    reference = make(name, check_nan=False, spare_resets=False)
    other = reference.reset()
    with monkeypatch.context() as cuda:
        cuda.setattr("tdmarl.host.is_free", lambda device: False)
        env = make(name, check_nan=False, spare_resets=False)
        td = env.reset()
    mask = TensorDict({"_reset": (torch.arange(6) < 3).unsqueeze(-1)}, batch_size=[6])
    for _ in range(2):
        act(env, td, torch.Generator().manual_seed(0))
        act(reference, other, torch.Generator().manual_seed(0))
        with monkeypatch.context() as cuda, NoHostRead():
            cuda.setattr("tdmarl.host.is_free", lambda device: False)
            found = env._step(td)
            td = env._reset(mask)
        assert_same(found, reference._step(other))
        other = reference._reset(mask)
        assert_same(td, other)


def test_rendering_gives_a_picture() -> None:
    picture = make("simple").render(env_index=2)
    assert picture.ndim == 3 and picture.shape[-1] == 3 and picture.dtype == np.uint8 and picture.std() > 0


def mask_of(*ended: int) -> Tensor:
    return torch.isin(torch.arange(6), torch.tensor(ended))


@pytest.mark.parametrize("name", ["navigation", "balance", "simple_tag", "simple_reference", "wind_flocking"])
def test_spare_resets_serve_each_row_once_and_are_the_draw_of_all(name: str) -> None:
    """Rows come from one draw as a reset of all would give it, until one is needed again."""
    env, other = make(name), make(name)
    for one in (env, other):
        rollout(one, one.reset(), 3)
    core = env.core
    core.restart_from_spares(mask_of(1, 2))
    first = core.spares
    everything, _ = other.core._draw()
    for key in first.state:
        torch.testing.assert_close(core.get_state()[key][1:3], everything[key][1:3], equal_nan=True)
    core.restart_from_spares(mask_of(4))
    assert core.spares.state is first.state and core.spares.unused.tolist() == [True, False, False, True, False, True]
    core.restart_from_spares(mask_of(0, 4))
    assert core.spares.state is not first.state
    assert core.spares.unused.tolist() == [False, True, True, True, False, True]


def test_spare_resets_leave_the_others_and_their_own_past_alone() -> None:
    env = make("balance")
    env.rollout(3)
    before = env.get_state()
    env.core.restart_from_spares(mask_of(2))
    after, rows = env.get_state(), [0, 1, 3, 4, 5]
    for key in before.keys():
        assert torch.equal(before[key][rows], after[key][rows]), key
        if key not in env.core.slots.reset_names | {"steps"}:
            assert torch.equal(before[key], after[key]), key
    assert not torch.equal(before["steps"], after["steps"])


@pytest.mark.parametrize("name", ["balance", "simple_reference", "navigation"])
def test_spare_resets_are_saved(name: str) -> None:
    env, other = make(name), make(name, seed=5)
    env.rollout(3)
    env._reset(TensorDict({"_reset": mask_of(1).unsqueeze(-1)}, [6]))
    other.load_state_dict(env.state_dict())
    for ended in ((2, 3), (2,), (0,)):
        reset = TensorDict({"_reset": mask_of(*ended).unsqueeze(-1)}, [6])
        assert_same(env._reset(reset), other._reset(reset))
        assert_same(env.get_state(), other.get_state())


def test_spare_resets_can_be_left_out() -> None:
    env = make("balance", spare_resets=False)
    env.rollout(2)
    env._reset(TensorDict({"_reset": mask_of(1).unsqueeze(-1)}, [6]))
    assert env.core.spares is None


def test_replaced_puts_back_what_was_not_there() -> None:
    class Thing:
        present = 1

    with replaced((Thing, "present", 2), (Thing, "absent", 3)):
        assert (Thing.present, Thing.absent) == (2, 3)  # type: ignore[attr-defined]
    assert Thing.present == 1 and not hasattr(Thing, "absent")
