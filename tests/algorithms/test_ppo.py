"""MAPPO and IPPO as functions of specs: what they see, share, train, refuse, and whether they learn."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from torchrl.modules import set_recurrent_mode
from toys import ToyEnv

import tdmarl
from tdmarl.algorithms import Algorithm, ippo, mappo

TWO = {"a": (2, 3, 1), "b": (1, 5, 2)}


def train(env, algo, iterations=1, frames=80):
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=frames, seed=0)
    for _ in range(iterations):
        metrics = algo.learner(collector.rollout())
    return metrics


@pytest.mark.parametrize("make", [mappo, ippo])
@pytest.mark.parametrize("choices", [0, 3])
def test_learns_where_to_aim(make, choices):
    """The reward is minus the distance to 0.5; at random about -0.5 to -1 for each action dimension."""
    env = ToyEnv(batch=(16,), choices=choices)
    algo = make(env, lr=1e-3, num_epochs=10, seed=1)
    before = tdmarl.evaluate(env, algo.policy, episodes=16)["return_mean_agents"]
    train(env, algo, 30, 160)
    after = tdmarl.evaluate(env, algo.policy, episodes=16)["return_mean_agents"]
    if choices:  # 0 and 1 are equally near; 0 is not always available
        assert after.min().item() == pytest.approx(-2.5)
    else:
        assert after.mean() > -0.5 and before.mean() < -3


def test_parts_are_a_frozen_dataclass_and_replaceable():
    algo = mappo(ToyEnv())
    assert [f.name for f in dataclasses.fields(Algorithm)] == ["policy", "explore", "learner"]
    other = dataclasses.replace(algo, explore=None)
    assert other.policy is algo.policy
    with pytest.raises(dataclasses.FrozenInstanceError):
        algo.policy = None


def test_constructors_do_not_step_or_draw():
    env = ToyEnv()
    env.reset = env.step = None
    torch.manual_seed(3)
    state = torch.get_rng_state()
    mappo(env)
    assert torch.equal(state, torch.get_rng_state())


def test_one_seed_is_one_initialization():
    one, two, other = (mappo(ToyEnv(), seed=s).policy.state_dict() for s in (0, 0, 1))
    assert all(torch.equal(one[k], two[k]) for k in one) and not all(
        torch.equal(one[k], other[k]) for k in one
    )


@pytest.mark.parametrize("make", [mappo, ippo])
@pytest.mark.parametrize("share, sets", [(True, 1), (False, 3), ([[0, 2], [1]], 2)])
@pytest.mark.parametrize("share_buffer", [True, False])
def test_sharing_switches(make, share, sets, share_buffer):
    env = ToyEnv()
    algo = make(
        env,
        share_params=share,
        share_critic_params=not share,
        share_buffer=share_buffer,
        num_epochs=2,
        minibatch_size=7,
    )
    weights = [p for n, p in algo.policy.named_parameters() if n.endswith("weight")]
    assert all(len(w) == sets for w in weights)
    before = [p.clone() for p in algo.policy.parameters()]
    metrics = train(env, algo, frames=20)
    assert all(torch.isfinite(v).all() for v in metrics.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, algo.policy.parameters()))


def test_unshared_agents_with_their_own_rows_learn_the_same_from_all_rows():
    """With one minibatch of all rows the draw is only an order, so own rows change nothing."""
    results = []
    for share_buffer in (True, False):
        env = ToyEnv()
        algo = mappo(
            env, share_params=False, share_buffer=share_buffer, num_epochs=1, normalize_advantage=None
        )
        train(env, algo, frames=20)
        results.append([p.detach().clone() for p in algo.policy.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_ippos_critic_sees_its_own_and_mappos_all():
    env = ToyEnv()
    for make, others in ((ippo, False), (mappo, True)):
        prepare = make(env).learner.prepare
        td = env.reset()
        td["agents", "observation"].requires_grad_()
        value = prepare.critic(td)["agents", "state_value"][:, 0].sum()
        (grad,) = torch.autograd.grad(value, td["agents", "observation"])
        assert bool(grad[:, 1:].any()) == others
    with pytest.raises(TypeError, match="mappo's"):
        ippo(env, other_actions=True)


@pytest.mark.parametrize("options", [
    {"other_actions": True}, {"critic_scope": "group"}, {"value_norm": False}, {"value_clip": False},
    {"max_kl": 1e-4}, {"anneal_frames": 100}, {"normalize_advantage": "agent"}, {"normalize_advantage": None},
    {"layer_norm": False, "activation": torch.nn.Tanh, "hidden": (8,)}, {"mode": "eager"}, {"max_grad_norm": None},
])  # fmt: skip
def test_every_option_trains(options):
    env = ToyEnv()
    metrics = train(env, mappo(env, num_epochs=2, minibatch_size=10, **options), 2, 20)
    assert all(torch.isfinite(v).all() for v in metrics.values()), metrics


def test_early_stop_by_kl_holds_the_actor_back():
    moved = {}
    for max_kl in (None, 1e-6):
        env = ToyEnv()
        algo = mappo(env, lr=0.01, num_epochs=10, max_kl=max_kl)
        before = torch.cat([p.detach().flatten() for p in algo.policy.parameters()])
        train(env, algo, frames=20)
        after = torch.cat([p.detach().flatten() for p in algo.policy.parameters()])
        moved[max_kl] = (after - before).abs().sum()
    assert 0 < moved[1e-6] < 0.5 * moved[None]


def test_annealed_to_zero_nothing_moves():
    env = ToyEnv()
    algo = mappo(env, anneal_frames=20, num_epochs=2)
    train(env, algo, frames=20)
    before = [p.clone() for p in algo.policy.parameters()]
    train(env, algo, frames=20)
    assert all(torch.equal(a, b) for a, b in zip(before, algo.policy.parameters()))


def test_a_team_of_unlike_groups():
    env = ToyEnv(groups=TWO)
    with pytest.raises(ValueError, match=r"\['a', 'b'\]"):
        mappo(env)
    algo = mappo(env, ("a", "b"), num_epochs=2)
    metrics = train(env, algo, frames=20)
    assert {"a_loss_objective", "b_loss_objective", "loss_critic_a", "loss_critic_b"} <= set(metrics.keys())
    with pytest.raises(ValueError, match="mapping"):
        mappo(env, ("a", "b"), actor=algo.policy)


def test_own_parts_take_the_place_of_the_default_ones():
    env = ToyEnv()
    actor, critic = (
        tdmarl.gaussian_actor(env, distribution="clipped"),
        tdmarl.state_critic(env, scope="agent"),
    )
    made = []
    algo = mappo(
        env, actor=actor, critic=critic, optim=lambda p: made.append(torch.optim.SGD(p, 0.01)) or made[-1]
    )
    assert algo.policy is actor and len(made) == 2
    train(env, algo, frames=20)


def test_a_critic_without_its_entry_is_named_before_the_first_step():
    env = ToyEnv()
    other = tdmarl.state_critic(ToyEnv(state=True), scope="state")
    with pytest.raises(KeyError, match=r"Advantage reads \[\('state',\)"):
        mappo(env, critic=other)


def test_the_dead_and_the_forbidden_leave_no_trace_in_training():
    env = ToyEnv(choices=3, mortal=True)
    algo = mappo(env, share_params=False, num_epochs=3)
    batch = tdmarl.Collector(env, algo.explore, frames_per_batch=20, seed=0).rollout()
    dead = ~batch["agents", "mask"]
    assert dead.any()
    spoiled = batch.clone()
    other = mappo(env, share_params=False, num_epochs=3)
    spoiled["next", "agents", "reward"][dead] = 1e6
    spoiled["agents", "action_log_prob"][dead] = -50.0
    first, second = algo.learner(batch), other.learner(spoiled)
    for a, b in zip(algo.policy.parameters(), other.policy.parameters()):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(first["loss_critic"], second["loss_critic"])


def test_learner_resumes_to_the_last_bit():
    env = ToyEnv()
    options = {"num_epochs": 2, "minibatch_size": 7, "anneal_frames": 200, "max_kl": 0.5}
    algo, other = (mappo(env, seed=seed, **options) for seed in (0, 5))
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=20, seed=0)
    batches = [collector.rollout() for _ in range(4)]
    for batch in batches[:2]:
        algo.learner(batch)
    other.learner.load_state_dict(algo.learner.state_dict())
    for batch in batches[2:]:
        algo.learner(batch), other.learner(batch)
    for a, b in zip(algo.policy.parameters(), other.policy.parameters()):
        assert torch.equal(a, b)


def test_a_whole_update_runs_on_meta_where_a_host_read_or_a_device_mix_raises():
    env = ToyEnv()
    algo = mappo(env, num_epochs=1, optim=lambda params: torch.optim.Adam(params, 1e-3, foreach=True))
    batch = algo.learner.prepare(tdmarl.Collector(env, algo.explore, frames_per_batch=20).rollout().copy())
    step = algo.learner.step
    parts = []
    for part in step.parts:
        loss = part.loss.to("meta")
        optim = torch.optim.Adam(loss.parameters(), 1e-3, foreach=True)
        parts.append(tdmarl.Part(loss, optim, 10.0, name=part.name))
    metrics = tdmarl.Step(parts)(batch.reshape(-1).to("meta"))
    assert metrics["loss_critic"].device.type == "meta"


@pytest.mark.parametrize("options", [{"critic_lr": 0.0}, {"lr": 0.0}])
def test_a_learning_rate_of_zero_is_zero(options):
    env = ToyEnv()
    algo = mappo(env, num_epochs=1, **options)
    still = algo.learner.step.parts["lr" not in options].loss
    before = [p.clone() for p in still.parameters()]
    train(env, algo, frames=20)
    assert all(torch.equal(a, b) for a, b in zip(before, still.parameters()))


def test_the_next_episode_does_not_leak_into_the_last():
    """The root is done and the environment reset, though agent 1's own flag is not set."""
    env = ToyEnv(horizon=2, mortal=True)
    algo = mappo(env, gamma=1.0, lmbda=1.0, normalize_advantage=None, value_norm=False)
    batch = tdmarl.Collector(env, algo.explore, frames_per_batch=16, seed=0).rollout()  # [4, 4]
    batch["next", "agents", "done"][:, 1, 1] = batch["next", "agents", "terminated"][:, 1, 1] = False
    other = batch.clone()
    other["next", "agents", "reward"][:, 2:, 1] += 100.0
    first, second = (algo.learner.prepare(td)["agents", "advantage"][:, :2, 1] for td in (batch, other))
    torch.testing.assert_close(first, second)


RECURRENT = {"recurrent": 8, "hidden": (8,), "chunk_length": 5, "num_epochs": 2}


@pytest.mark.parametrize("recurrent, returns", [("gru", 1.0), (None, 0.5)])
def test_the_memory_game_is_solved_by_those_who_remember(recurrent, returns):
    """The cue is one of two, gone when it is asked for: without memory every policy is right half of the time,
    the last observation being the same after either cue. By chance 512 guesses are 0.5 to within 0.11 (5 sigma)."""
    env = tdmarl.memory_game(64, n_agents=2, cues=2, delay=4, seed=0)
    algo = mappo(env, recurrent=recurrent, chunk_length=5, lr=2e-3, num_epochs=10, hidden=(32,), seed=0)
    train(env, algo, 8, 64 * 20)
    found = tdmarl.evaluate(env, algo.policy, episodes=256)["return_mean_agents"].mean()
    assert found.item() == pytest.approx(returns, abs=0.01 if recurrent else 0.11)


@pytest.mark.parametrize("make", [mappo, ippo])
@pytest.mark.parametrize("choices", [0, 3])
def test_the_first_minibatch_of_sequences_finds_the_policy_that_collected(make, choices):
    """Nothing has changed yet: ratios are one, values those of the rollout, in rows cut across episodes' ends."""
    env = ToyEnv(choices=choices, horizon=3)
    algo = make(env, **RECURRENT | {"num_epochs": 1}, minibatch_size=2, lr=0.0)
    metrics = train(env, algo, 2, 4 * 10)
    assert metrics["kl_approx"].abs() < 1e-9 and metrics["clip_fraction"] == 0
    batch = tdmarl.Collector(env, algo.explore, frames_per_batch=40, seed=0).rollout()
    watched = batch["agents", "critic_hidden"].clone()
    prepared = algo.learner.prepare(batch.copy())
    torch.testing.assert_close(prepared["agents", "critic_hidden"], watched, atol=1e-5, rtol=1e-5)
    algo.learner.buffer.extend(prepared)
    sample = algo.learner.buffer.sample()
    assert sample.shape == (2, 5) and algo.learner.buffer.n_updates == 4
    with set_recurrent_mode(True):
        value = algo.learner.prepare.critic(sample.copy())["agents", "state_value"]
    torch.testing.assert_close(value, sample["agents", "state_value"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [
    {}, {"share_params": False}, {"share_params": [[0, 2], [1]]}, {"share_buffer": False}, {"other_actions": True},
    {"chunk_length": 1}, {"max_kl": 0.1}, {"agent_id": True}, {"recurrent": "gru"}, {"critic_scope": "group"},
])  # fmt: skip
def test_every_option_trains_with_memory(options):
    env = ToyEnv(mortal=True, truncate=True)
    algo = mappo(env, **RECURRENT | {"minibatch_size": 3} | options)
    before = [p.clone() for p in algo.policy.parameters()]
    metrics = train(env, algo, 2, 40)
    assert all(torch.isfinite(v).all() for v in metrics.values()), metrics
    assert not any(torch.equal(a, b) for a, b in zip(before, algo.policy.parameters()))


def test_the_dead_leave_no_trace_in_training_with_memory():
    algos = [mappo(ToyEnv(mortal=True), **RECURRENT) for _ in range(2)]
    batch = tdmarl.Collector(ToyEnv(mortal=True), algos[0].explore, frames_per_batch=40, seed=0).rollout()
    dead, spoiled = ~batch["agents", "mask"], batch.clone()
    spoiled["next", "agents", "reward"][dead] = 1e6
    spoiled["agents", "action_log_prob"][dead] = -50.0
    for algo, data in zip(algos, (batch, spoiled)):
        algo.learner(data)
    for a, b in zip(*(algo.policy.parameters() for algo in algos)):
        torch.testing.assert_close(a, b)


def test_only_one_of_actor_and_critic_may_remember():
    env = ToyEnv()
    actor = tdmarl.gaussian_actor(env, recurrent=8)
    algo = mappo(env, actor=actor, chunk_length=5, num_epochs=1)
    assert algo.explore is algo.policy is actor and algo.learner.buffer.sequence_length == 5
    train(env, algo, frames=20)
    algo = mappo(env, critic=tdmarl.state_critic(env, recurrent=8), chunk_length=5, num_epochs=1)
    assert algo.explore is not algo.policy and not any("hidden" in str(key) for key in algo.policy.in_keys)
    train(env, algo, frames=20)
    plain = mappo(env, chunk_length=5)
    assert plain.explore is plain.policy and plain.learner.buffer.sequence_length == 1


def test_with_memory_a_run_is_one_seeds_and_resumes_to_the_last_bit():
    def fresh():
        env = ToyEnv(horizon=7)
        algo = mappo(env, seed=3, minibatch_size=3, **RECURRENT)
        return algo, tdmarl.Collector(env, algo.explore, frames_per_batch=40, seed=0)

    def go_on(algo, collector, iterations):
        for _ in range(iterations):
            algo.learner(collector.rollout())
        return torch.cat([p.detach().flatten() for part in algo.learner.step.parts for p in part.params])

    whole = fresh()
    go_on(*whole, 2)
    states = [part.state_dict() for part in (whole[0].policy, whole[0].learner, whole[1])]
    states = torch.load(_stored(states), weights_only=False)
    expected = go_on(*whole, 2)
    assert torch.equal(go_on(*fresh(), 4), expected)
    algo, collector = fresh()
    for part, state in zip((algo.policy, algo.learner, collector), states):
        part.load_state_dict(state)
    assert torch.equal(go_on(algo, collector, 2), expected)


def _stored(states):
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return file


def test_compiled_losses_of_sequences_learn_alike():
    learned = []
    for mode in ("eager", "compile"):
        torch.compiler.reset()
        env = ToyEnv(groups={"agents": (2, 3, 1)})
        algo = mappo(env, mode=mode, **RECURRENT | {"num_epochs": 1, "chunk_length": 2})
        if mode == "compile":
            losses = [part.loss for part in algo.learner.step.parts]
            algo.learner.step._forward = [torch.compile(x, backend="eager", fullgraph=True) for x in losses]
        metrics = train(env, algo, 1, 24)
        learned.append([metrics["loss_critic"], *(p.detach() for p in algo.policy.parameters())])
    for eager, compiled in zip(*learned):
        torch.testing.assert_close(eager, compiled, atol=1e-5, rtol=1e-4)


def test_a_gpus_way_through_sequences_learns_alike_and_reads_nothing_on_the_host(monkeypatch):
    """The inserted steps in place of cells: equal parameters here, and a whole update on ``meta``."""
    learned = []
    for way in (tdmarl.gru.cells, tdmarl.gru.fused):
        monkeypatch.setattr(tdmarl.gru, "cells", way)
        env = ToyEnv(horizon=7)
        algo = mappo(env, optim=lambda params: torch.optim.SGD(params, 0.1), **RECURRENT)
        collector = tdmarl.Collector(env, algo.explore, frames_per_batch=40, seed=0)
        batch = [collector.rollout() for _ in range(2)][1]  # begun in the middle of an episode
        algo.learner(batch)
        learned.append([p.detach().clone() for part in algo.learner.step.parts for p in part.params])
        rows = algo.learner.prepare(batch.copy()).reshape(-1, 5).to("meta")
        parts = []
        for part in algo.learner.step.parts:
            loss = part.loss.to("meta")
            parts.append(tdmarl.Part(loss, torch.optim.Adam(loss.parameters(), foreach=True), name=part.name))
        assert tdmarl.Step(parts)(rows)["loss_critic"].device.type == "meta"
    for cells, fused in zip(*learned):
        torch.testing.assert_close(cells, fused, atol=1e-5, rtol=1e-4)


def test_sequences_that_do_not_fit_are_refused():
    env = ToyEnv()
    with pytest.raises(ValueError, match="chunk_length=0 must be at least 1"):
        mappo(env, recurrent="gru", chunk_length=0)
    with pytest.raises(ValueError, match="5 steps in time, which is no multiple of sequence_length=10"):
        train(env, mappo(env, recurrent="gru"), frames=20)
    with pytest.raises(ValueError, match="must be None, 'gru' or the width"):
        mappo(env, recurrent="lstm")
