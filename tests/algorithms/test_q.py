"""IQL, VDN and QMIX as functions of specs: options, sharing, rewards, resume, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from toys import ToyEnv

import tdmarl
from tdmarl.algorithms import iql, qmix, vdn

G = "agents"
ALL = [iql, vdn, qmix]


@pytest.fixture(autouse=True)
def _quiet(capsys):
    yield
    capsys.readouterr()


def train(env, algo, iterations, frames=128):
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=frames, seed=0)
    for _ in range(iterations):
        metrics = algo.learner(collector.rollout())
    return metrics


@pytest.mark.parametrize("number, options", enumerate([
    {"double_q": False}, {"tau": 0.05}, {"prioritized": True}, {"storage": "cpu"}, {"storage": "memmap"},
    {"huber_delta": 1.0}, {"last_action": True}, {"agent_id": False}, {"standardize_reward": True},
    {"sequence_length": 5, "n_steps": 3}, {"sequence_length": 5, "lmbda": 0.6, "prioritized": True},
    {"recurrent": "gru", "sequence_length": 5, "last_action": True, "burn_in": 1},
    {"recurrent": 8, "sequence_length": 5, "hidden_start": "zero"}, {"share_params": False},
    {"share_params": [[0, 1], [2]]}, {"layer_norm": True, "activation": torch.nn.Tanh, "hidden": (8,)},
    {"anneal_frames": 200}, {"max_grad_norm": None},
]))  # fmt: skip
def test_every_option_trains(number, options):
    """The options are handed on by what the three have in common: they take turns."""
    env = ToyEnv(choices=3, mortal=True)
    algo = ALL[number % 3](env, minibatch_size=20, num_updates=2, target_every=2, **options)
    before = [p.clone() for p in algo.policy.parameters()]
    metrics = train(env, algo, 2, 40)
    assert all(torch.isfinite(v).all() for v in metrics.values()), metrics
    assert any(not torch.equal(a, b) for a, b in zip(before, algo.policy.parameters()))
    tdmarl.evaluate(env, algo.policy, episodes=4)


@pytest.mark.parametrize("share_params", [True, False])
@pytest.mark.parametrize("share_buffer", [True, False])
def test_iql_networks_and_replay_are_shared_or_not(share_params, share_buffer):
    env = ToyEnv(choices=3)
    algo = iql(env, share_params=share_params, share_buffer=share_buffer, minibatch_size=10, num_updates=2)
    train(env, algo, 1, 40)
    weights = [p for n, p in algo.policy.named_parameters() if n.endswith("weight")]
    assert all(len(w) == (1 if share_params else 3) for w in weights)
    sample = algo.learner.buffer.sample()
    if share_buffer:
        assert sample.shape == (10,) and (G, "mask") not in sample.keys(True)
    else:  # a block of rows for each agent, drawn apart, in which only that agent counts
        blocks = sample[G, "mask"].unflatten(0, (3, 10))
        assert torch.equal(blocks, torch.eye(3, dtype=torch.bool).unsqueeze(1).expand(3, 10, 3))
        index = sample["index"].unflatten(0, (3, 10))
        assert not torch.equal(index[0], index[1])


def test_teams_of_unlike_groups():
    env = ToyEnv(groups={"a": (2, 3, 1), "b": (1, 5, 2)}, choices=3)
    with pytest.raises(ValueError, match=r"\['a', 'b'\]"):
        qmix(env)
    for make in ALL:
        algo = make(env, ("a", "b"), minibatch_size=20, num_updates=2)
        assert {("a", "action"), ("b", "action")} <= set(algo.explore.out_keys)
        metrics = train(env, algo, 1, 40)
        assert torch.isfinite(metrics["loss_value"])


def test_team_reward_is_said_and_never_one_agents():
    env = ToyEnv(choices=3)
    batch = tdmarl.Collector(env, iql(env).explore, frames_per_batch=40, seed=0).rollout()
    own = batch["next", G, "reward"]
    for make, how, expected in (
        (vdn, "sum", own.sum(-2)),
        (qmix, "mean", own.mean(-2)),
        (iql, "sum", own.sum(-2)),
    ):
        prepared = make(env, team_reward=how).learner.prepare(batch.copy())
        torch.testing.assert_close(prepared["next", "reward"], expected)
    torch.testing.assert_close(prepared["next", G, "reward"], expected.unsqueeze(-2).expand(own.shape))
    assert torch.equal(iql(env).learner.prepare(batch.copy())["next", G, "reward"], own)
    with pytest.raises(ValueError, match="'sum' or 'mean'"):
        vdn(env, team_reward=None)
    with pytest.raises(ValueError, match="'sum' or 'mean'"):
        qmix(env, team_reward="max")


@pytest.mark.parametrize("make, options", [
    (iql, {}), (vdn, {}), (qmix, {"prioritized": True, "last_action": True}),
    (qmix, {"recurrent": "gru", "sequence_length": 5}),
    (iql, {"standardize_reward": True, "tau": 0.1, "storage": "memmap"}),
])  # fmt: skip
def test_resume_is_exact_and_one_seed_is_one_result(make, options):
    options = {
        "minibatch_size": 20,
        "num_updates": 3,
        "target_every": 4,
        "buffer_size": 100,
        "seed": 3,
    } | options

    def parts():
        env = ToyEnv(choices=3, mortal=True, seed=1)
        algo = make(env, **options)
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
    assert torch.equal(algo.learner.modules["explore"].frames, again.learner.modules["explore"].frames)
    twin, third = parts()
    run(twin, third, 5)
    assert all(torch.equal(a, b) for a, b in zip(algo.policy.parameters(), twin.policy.parameters()))


def test_nothing_is_learnt_before_there_is_enough():
    env = ToyEnv(choices=3)
    algo = iql(env, learning_starts=60, minibatch_size=20, num_updates=2)
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=40, seed=0)
    assert not list(algo.learner(collector.rollout()).keys())
    assert "loss_value" in algo.learner(collector.rollout()).keys()


def test_constructors_do_not_step_or_draw():
    env = ToyEnv(choices=3)
    env.reset = env.step = None
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for make in ALL:
        make(env)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("make, options, error, words", [
    (iql, {"mixer": None}, TypeError, "qmix's"), (vdn, {"mixer": None}, TypeError, "qmix's"),
    (qmix, {"share_buffer": False}, ValueError, "independent agents"),
    (qmix, {"n_steps": 3}, ValueError, "longer sequence_length"), (vdn, {"lmbda": 0.5}, ValueError, "sequence_length"),
    (iql, {"recurrent": "gru"}, ValueError, "rows to learn from"),
    (iql, {"storage": "tape"}, ValueError, "storage='tape'"),
    (iql, {"epsilon_end": 2.0}, ValueError, "end=2.0"), (iql, {"tau": 0.0}, ValueError, "tau=0.0"),
    (iql, {"target_every": 0}, ValueError, "every=0"),
    (iql, {"prioritized": True, "share_buffer": False}, ValueError, "share"),
    (iql, {"learning_starts": 200_000}, ValueError, "capacity of 100000"),
])  # fmt: skip
def test_bad_input_is_named(make, options, error, words):
    with pytest.raises(error, match=words):
        make(ToyEnv(choices=3), **options)


def test_continuous_actions_are_refused_by_name():
    with pytest.raises(ValueError, match="discrete"):
        qmix(ToyEnv())
