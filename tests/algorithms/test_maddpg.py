"""MADDPG as a function of specs: options, sharing, several groups, resume, warnings, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type
from toys import NoHostRead, ToyEnv

import tdmarl
from tdmarl.algorithms import maddpg

G = "agents"
MIXED = {"a": (2, 3, 1), "b": (1, 5, 2)}


@pytest.fixture(autouse=True)
def _quiet(capsys):
    yield
    capsys.readouterr()


def train(env, algo, iterations, frames=40, **options):
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=frames, seed=0, **options)
    for _ in range(iterations):
        metrics = algo.learner(collector.rollout())
    return metrics


@pytest.mark.parametrize("choices", [0, 3])
@pytest.mark.parametrize("options", [
    {}, {"twin": True, "actor_every": 2}, {"others": "policy"}, {"scope": "agent"}, {"scope": "state"},
    {"share_params": True, "share_critic_params": [[0, 1], [2]]}, {"share_buffer": False}, {"prioritized": True},
    {"n_steps": 5, "prioritized": True}, {"team_reward": "sum"}, {"standardize_reward": True},
    {"tau": None, "target_every": 3}, {"relaxation": "soft", "temperature": 0.5}, {"action_reg": 1e-3},
    {"huber_delta": 1.0, "max_grad_norm": None}, {"layer_norm": True, "activation": torch.nn.Tanh, "hidden": (8,)},
    {"anneal_frames": 200, "critic_lr": 1e-3}, {"storage": "memmap"}, {"noise": "ou"}, {"noise": "none"},
    {"epsilon_start": 0.5, "epsilon_end": 0.1},
])  # fmt: skip
def test_every_option_trains(choices, options):
    env = ToyEnv(choices=choices, mortal=True, state="scope" in options)
    algo = maddpg(env, minibatch_size=20, num_updates=2, **options)
    before = [p.clone() for p in algo.policy.parameters()]
    metrics = train(env, algo, 2, init_random_frames=20)
    assert all(torch.isfinite(v).all() for v in metrics.values()), metrics
    assert all(not torch.equal(a, b) for a, b in zip(before, algo.policy.parameters()))
    tdmarl.evaluate(env, algo.policy, episodes=4)


def test_matd3_smooths_targets():
    env = ToyEnv()
    metrics = train(
        env, maddpg(env, minibatch_size=20, num_updates=2, twin=True, target_noise=0.2, actor_every=2), 2
    )
    assert torch.isfinite(metrics["loss_value"])


def test_actors_and_targets_move_once_in_so_many_updates():
    env = ToyEnv()
    algo = maddpg(env, minibatch_size=20, num_updates=1, actor_every=3, tau=0.5)
    loss = algo.learner.step.parts[0].loss.whole
    watched = {name: next(iter(loss.network(name).parameters())) for name in
               ("actor_network", "value_network", "target_actor_network", "target_value_network")}  # fmt: skip
    moved = {name: [] for name in watched}
    for _ in range(6):
        before = {name: p.clone() for name, p in watched.items()}
        train(env, algo, 1)
        for name, p in watched.items():
            moved[name].append(not torch.equal(before[name], p))
    assert moved["value_network"] == [True] * 6
    for name in ("actor_network", "target_actor_network", "target_value_network"):
        assert moved[name] == [True, False, False] * 2, name


@pytest.mark.parametrize("share", [True, False])
def test_each_agent_learns_from_rows_of_its_own(share):
    env = ToyEnv()
    algo = maddpg(env, minibatch_size=10, num_updates=1, share_buffer=share)
    train(env, algo, 1)
    sample = algo.learner.buffer.sample()
    assert len(sample) == (10 if share else 30)
    if not share:
        blocks = sample[G, "mask"].unflatten(0, (3, 10))
        assert torch.equal(blocks, torch.eye(3, dtype=torch.bool).unsqueeze(1).expand(3, 10, 3))


@pytest.mark.parametrize("choices", [0, 3])
def test_several_groups_are_learnt_together(choices):
    env = ToyEnv(groups=MIXED, choices=choices)
    with pytest.raises(ValueError, match=r"\['a', 'b'\]"):
        maddpg(env)
    algo = maddpg(env, ("a", "b"), minibatch_size=20, num_updates=2)
    metrics = train(env, algo, 1)
    assert {"loss_value_a", "loss_value_b", "q_policy_a", "grad_norm_critic", "grad_norm_actor"} <= set(
        metrics.keys()
    )
    seen = algo.learner.step.parts[0].loss.whole.network("value_network").in_keys
    assert {("a", "action"), ("b", "action")} <= set(seen)


@pytest.mark.parametrize("choices, options", [
    (0, {"noise": "ou", "target_noise": 0.2, "twin": True, "actor_every": 2}),
    (3, {"prioritized": True}), (3, {"standardize_reward": True, "share_buffer": False}), (0, {"n_steps": 5}),
])  # fmt: skip
def test_resume_is_exact_and_one_seed_is_one_result(choices, options):
    def parts():
        env = ToyEnv(choices=choices, mortal=True, seed=1)
        algo = maddpg(env, minibatch_size=20, num_updates=3, buffer_size=100, seed=3, **options)
        return algo, tdmarl.Collector(env, algo.explore, frames_per_batch=40, seed=2, init_random_frames=40)

    def run(algo, collector, iterations):
        return [algo.learner(collector.rollout()) for _ in range(iterations)]

    algo, collector = parts()
    run(algo, collector, 3)
    saved, place = copy.deepcopy((algo.learner.state_dict(), collector.state_dict()))
    torch.manual_seed(11)
    whole = run(algo, collector, 2)
    again, other = parts()
    again.learner.load_state_dict(saved)
    other.load_state_dict(place)
    torch.manual_seed(12)
    resumed = run(again, other, 2)
    for a, b in zip(whole, resumed):
        assert {k: v.item() for k, v in a.items()} == {k: v.item() for k, v in b.items()}
    for a, b in zip(algo.policy.parameters(), again.policy.parameters()):
        assert torch.equal(a, b)
    twin, third = parts()
    run(twin, third, 5)
    assert all(torch.equal(a, b) for a, b in zip(algo.policy.parameters(), twin.policy.parameters()))


def test_the_cooperative_form_is_said_to_be_it():
    env = ToyEnv()
    with pytest.warns(UserWarning, match="cooperative=True"):
        algo = maddpg(env, cooperative=True, minibatch_size=20, num_updates=1)
    batch = tdmarl.Collector(env, algo.explore, frames_per_batch=40, seed=0).rollout()
    loss = algo.learner.step.parts[0].loss.whole
    value = loss.network("value_network")(batch.copy())[G, "state_action_value"]
    assert torch.equal(value, value[..., :1, :].expand_as(value))  # one critic
    prepared = algo.learner.prepare(batch.copy())["next", G, "reward"]
    torch.testing.assert_close(
        prepared, batch["next", G, "reward"].mean(-2, keepdim=True).expand_as(prepared)
    )
    algo.learner(batch)


def test_what_is_most_likely_not_meant_is_said():
    with pytest.warns(UserWarning, match="sees one agent only"):
        maddpg(ToyEnv(groups=MIXED), "b")
    with pytest.warns(UserWarning, match="others='joint'"):
        maddpg(ToyEnv(), others="joint")
    with pytest.warns(UserWarning, match="without the agent's identity"):
        maddpg(ToyEnv(), share_critic_params=True, agent_id=False)


def test_constructors_do_not_step_or_draw():
    env = ToyEnv()
    env.reset = env.step = None
    torch.manual_seed(3)
    state = torch.get_rng_state()
    maddpg(env)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("choices, options, words", [
    (0, {"noise": "pink"}, "noise='pink'"), (0, {"target_every": 3}, "tau=0.005 and target_every=3"),
    (0, {"tau": 0.0}, "tau=0.0"), (0, {"actor_every": 0}, "every=0"), (0, {"scope": "all"}, "scope='all'"),
    (3, {"target_noise": 0.2}, "discrete"), (0, {"noise_start": -1.0}, "start=-1.0"),
    (0, {"group": "goblins"}, "Unknown group 'goblins'"), (0, {"storage": "tape"}, "storage='tape'"),
    (0, {"prioritized": True, "share_buffer": False}, "share"), (0, {"others": "all"}, "others='all'"),
    (0, {"scope": "state"}, "'state'"), (0, {"cooperative": True, "others": "policy"}, "cooperative=True"),
    (0, {"n_steps": 0}, "n_steps=0"),
])  # fmt: skip
def test_bad_input_is_named(choices, options, words):
    with pytest.raises(ValueError, match=words):
        maddpg(ToyEnv(choices=choices), **options)


def test_an_algorithm_for_each_group_names_the_tuple_when_a_critic_reads_the_others():
    env = ToyEnv(groups=MIXED)
    critic = tdmarl.action_critic(env, ("a", "b"))[0]
    with pytest.raises(ValueError, match=r"group=\('a', 'b'\)"):
        maddpg(env, "a", critic=critic)


@pytest.mark.parametrize("choices, options", [
    (0, {}), (3, {}), (0, {"twin": True, "target_noise": 0.2, "prioritized": True, "noise": "ou"}),
    (3, {"share_buffer": False, "standardize_reward": True}),
])  # fmt: skip
def test_nothing_is_read_while_acting_and_learning(choices, options):
    env = ToyEnv(choices=choices, mortal=True)
    algo = maddpg(env, minibatch_size=20, num_updates=2, **options)
    batch = tdmarl.Collector(env, algo.explore, frames_per_batch=40, seed=0).rollout()
    algo.learner(batch)
    seen = batch[:, 0].select(*algo.explore.in_keys)
    with NoHostRead(), set_exploration_type(ExplorationType.RANDOM):
        algo.explore(seen)
        algo.learner.prepare(batch.copy())
        algo.learner.step(algo.learner.buffer.sample())
