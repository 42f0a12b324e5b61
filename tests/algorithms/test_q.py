"""IQL, VDN and QMIX as functions of specs: games with known answers, options, resume, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase
from toys import ToyEnv

import tdmarl
from tdmarl.algorithms import iql, qmix, vdn

G = "agents"
ALL = [iql, vdn, qmix]
CLIMBING = [[11.0, -30, 0], [-30, 7, 0], [0, 6, 5]]
LINEAR = [[1.0, 4, 2], [0, 3, 1], [2, 5, 3]]


@pytest.fixture(autouse=True)
def _quiet(capsys):
    yield
    capsys.readouterr()


def train(env, algo, iterations, frames=128):
    collector = tdmarl.Collector(env, algo.explore, frames_per_batch=frames, seed=0)
    for _ in range(iterations):
        metrics = algo.learner(collector.rollout())
    return metrics


def joint(algo, observation, state=None):
    """Values of all joint actions of two agents in each state, ``[s, K, K]``."""
    loss = algo.learner.step.parts[0].loss
    entries = {G: TensorDict({"observation": observation}, observation.shape[:2])}
    seen = TensorDict(entries if state is None else entries | {"state": state}, [len(observation)])
    with torch.no_grad():
        seen = algo.policy(seen)
        q = seen[G, "action_value"]
        if not loss.mixed:
            return q
        K, rows = q.shape[-1], []
        for a in range(K):
            for b in range(K):
                index = torch.tensor([a, b]).expand(len(q), 2).unsqueeze(-1)
                seen[G, "chosen_action_value"] = q.gather(-1, index)
                rows.append(loss.mixer_network(seen)["chosen_action_value"])
    return torch.cat(rows, -1).unflatten(-1, (K, K))


def returns(env, algo):
    return tdmarl.evaluate(env, algo.policy, episodes=env.batch_size[0])["return_mean_agents"].mean().item()


def play(make, env, iterations, **options):
    """Learns from every joint action equally often."""
    options = {"lr": 3e-3, "num_updates": 8, "minibatch_size": 128, "buffer_size": 4096} | options
    algo = make(env, epsilon_end=1.0, target_every=100, anneal_frames=iterations * 128, **options)
    train(env, algo, iterations)
    return algo


def test_two_step_game_qmix():
    """The paper's table: s1 6.93, 6.93, 7.92, 7.92; 2A 7; 2B 0, 1, 1, 8."""
    env = tdmarl.two_step_game(num_envs=64)
    algo = play(qmix, env, 100, embed_dim=8)
    found = joint(algo, torch.eye(3).unsqueeze(1).repeat(1, 2, 1), torch.eye(3))
    paper = torch.tensor([[[6.93, 6.93], [7.92, 7.92]], [[7.0, 7.0], [7.0, 7.0]], [[0.0, 1.0], [1.0, 8.0]]])
    torch.testing.assert_close(found, paper, atol=0.1, rtol=0)
    assert returns(env, algo) == 8


def test_two_step_game_vdn():
    """The fixed point of sums: 2B is the additive least squares; s1 leads to 7 and 6.5, discounted."""
    env = tdmarl.two_step_game(num_envs=64)
    algo = play(vdn, env, 100)
    found = joint(algo, torch.eye(3).unsqueeze(1).repeat(1, 2, 1))
    fixed = torch.tensor(
        [[[6.93, 6.93], [6.435, 6.435]], [[7.0, 7.0], [7.0, 7.0]], [[-1.5, 2.5], [2.5, 6.5]]]
    )
    torch.testing.assert_close(found, fixed, atol=0.5, rtol=0)
    assert returns(env, algo) == 7


def test_two_step_game_iql():
    """Means over what the other does: 2B 0.5 and 4.5; s1 agent 0 .99 * 7 and .99 * 4.5, agent 1 their mean."""
    env = tdmarl.two_step_game(num_envs=64)
    algo = play(iql, env, 100)
    found = joint(algo, torch.eye(3).unsqueeze(1).repeat(1, 2, 1))
    fixed = torch.tensor(
        [[[6.93, 4.455], [5.6925, 5.6925]], [[7.0, 7.0], [7.0, 7.0]], [[0.5, 4.5], [0.5, 4.5]]]
    )
    torch.testing.assert_close(found, fixed, atol=0.5, rtol=0)
    assert returns(env, algo) == 7


@pytest.mark.parametrize("make", ALL)
def test_linear_game(make):
    """A sum fits it exactly, and greedy play earns its best, 5; IQL's values are the means of rows and columns."""
    env = tdmarl.matrix_game(LINEAR, num_envs=64)
    algo = play(make, env, 40)
    found = joint(algo, torch.ones(1, 2, 1))[0]
    means = torch.tensor([[7 / 3, 4 / 3, 10 / 3], [1.0, 4.0, 2.0]])
    expected = means if make is iql else torch.tensor(LINEAR)
    torch.testing.assert_close(found, expected, atol=0.3 if make is iql else 0.1, rtol=0)
    assert returns(env, algo) == 5


def test_a_game_that_only_a_monotonic_mixer_solves():
    """12 for (0, 0), -0.1 or 0 else: the additive least squares are 6.578, 2.611, -1.356; QMIX fits them all."""
    payoff = torch.tensor([[12.0, -0.1, -0.1], [-0.1, 0, 0], [-0.1, 0, 0]])
    additive = payoff.mean(1, True) + payoff.mean(0) - payoff.mean()
    assert additive[0, 0].item() == pytest.approx(6.578, abs=1e-3)
    for make, expected in ((vdn, additive), (qmix, payoff)):
        env = tdmarl.matrix_game(payoff.tolist(), num_envs=64)
        algo = play(make, env, 60)
        torch.testing.assert_close(joint(algo, torch.ones(1, 2, 1))[0], expected, atol=0.4, rtol=0)
        assert returns(env, algo) == 12


@pytest.mark.parametrize("make", [iql, vdn])
@pytest.mark.parametrize("payoff, best", [(CLIMBING, 5), ([[-25.0, 0, 10], [0, 2, 0], [10, 0, -25]], 2)])
def test_climbing_and_penalty_mislead_those_who_average(make, payoff, best):
    """With every joint action equally likely IQL and VDN settle for 5 of 11, and for 2 of 10."""
    env = tdmarl.matrix_game(payoff, num_envs=64)
    assert returns(env, play(make, env, 40)) == best


class OneState(EnvBase):
    """One state, reward 1 whatever is done, and a time limit of ten steps."""

    group_map = {G: ["a", "b"]}

    def __init__(self, num_envs=16):
        super().__init__(batch_size=[num_envs])
        E = num_envs
        self.time = torch.zeros(E, 1, dtype=torch.int64)
        self.observation_spec = Composite(
            {G: Composite({"observation": Unbounded((E, 2, 1))}, shape=(E, 2))}, shape=(E,)
        )
        self.action_spec = Composite(
            {G: Composite({"action": Categorical(2, shape=(E, 2))}, shape=(E, 2))}, shape=(E,)
        )
        self.reward_spec = Composite(
            {G: Composite({"reward": Unbounded((E, 2, 1))}, shape=(E, 2))}, shape=(E,)
        )
        flag = Categorical(2, shape=(E, 1), dtype=torch.bool)
        self.done_spec = Composite({k: flag.clone() for k in ("done", "terminated", "truncated")}, shape=(E,))

    def _out(self, over):
        E = self.batch_size[0]
        group = {"observation": torch.ones(E, 2, 1), "reward": torch.ones(E, 2, 1)}
        ends = {"done": over, "truncated": over.clone(), "terminated": torch.zeros_like(over)}
        return TensorDict({G: TensorDict(group, [E, 2]), **ends}, [E])

    def _reset(self, tensordict=None, **_):
        at = torch.ones_like(self.time, dtype=torch.bool)
        if tensordict is not None and "_reset" in tensordict.keys():
            at = tensordict["_reset"].reshape(at.shape)
        self.time = self.time.masked_fill(at, 0)
        out = self._out(torch.zeros_like(at))
        del out[G, "reward"]
        return out

    def _step(self, tensordict):
        self.time = self.time + 1
        return self._out(self.time >= 10)

    def _set_seed(self, seed):
        pass


@pytest.mark.parametrize("make, rows", [
    (iql, {}), (vdn, {}), (qmix, {}), (iql, {"sequence_length": 5, "n_steps": 3}),
    (vdn, {"sequence_length": 5, "lmbda": 0.8}),
])  # fmt: skip
def test_a_time_limit_bootstraps(make, rows):
    """Reward 1 for ever at discount 0.9 is worth 10; the ten steps up to the limit would be 6.51 (1 - 0.9 ** 10)."""
    env = OneState()
    algo = make(
        env, gamma=0.9, lr=1e-2, target_every=10, num_updates=20, minibatch_size=80, buffer_size=800, **rows
    )
    metrics = train(env, algo, 25, 160)
    assert metrics["q_taken"].item() == pytest.approx(10, abs=0.2)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("options", [
    {"double_q": False}, {"tau": 0.05}, {"prioritized": True}, {"storage": "cpu"}, {"storage": "memmap"},
    {"huber_delta": 1.0}, {"last_action": True}, {"agent_id": False}, {"standardize_reward": True},
    {"sequence_length": 5, "n_steps": 3}, {"sequence_length": 5, "lmbda": 0.6, "prioritized": True},
    {"recurrent": "gru", "sequence_length": 5, "last_action": True, "burn_in": 1},
    {"recurrent": 8, "sequence_length": 5, "hidden_start": "zero"}, {"share_params": False},
    {"share_params": [[0, 1], [2]]}, {"layer_norm": True, "activation": torch.nn.Tanh, "hidden": (8,)},
    {"anneal_frames": 200}, {"max_grad_norm": None},
])  # fmt: skip
def test_every_option_trains(make, options):
    env = ToyEnv(choices=3, mortal=True)
    algo = make(env, minibatch_size=20, num_updates=2, target_every=2, **options)
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


@pytest.mark.parametrize("recurrent, returns", [("gru", 1.0), (None, 0.5)])
def test_the_memory_game_is_solved_by_those_who_remember(recurrent, returns):
    """Without memory the last observation is the same after either cue: every policy is right half of the time, which
    2,048 guesses find to within 0.06 (5 sigma)."""
    env = tdmarl.memory_game(64, n_agents=2, cues=2, delay=4, seed=0)
    algo = qmix(
        env, recurrent=recurrent, sequence_length=5, lr=3e-3, hidden=(32,), num_updates=16, minibatch_size=320,
        epsilon_frames=3000, target_every=20,
    )  # fmt: skip
    train(env, algo, 8, 640)
    found = tdmarl.evaluate(env, algo.policy, episodes=1024)["return_mean_agents"].mean()
    assert found.item() == pytest.approx(returns, abs=0.01 if recurrent else 0.06)


def test_teams_of_unlike_groups():
    env = ToyEnv(groups={"a": (2, 3, 1), "b": (1, 5, 2)}, choices=3)
    with pytest.raises(ValueError, match=r"\['a', 'b'\]"):
        qmix(env)
    for make in ALL:
        algo = make(env, ("a", "b"), minibatch_size=20, num_updates=2)
        assert {("a", "action"), ("b", "action")} <= set(algo.explore.out_keys)
        metrics = train(env, algo, 1, 40)
        assert torch.isfinite(metrics["loss_value"])


def test_learns_where_to_aim():
    """The reward is minus the distance to 0.5 of action 0, 1 or 2; 0 is not always available: -0.5 a step is best."""
    for make in ALL:
        env = ToyEnv(batch=(16,), choices=3)
        algo = make(env, lr=5e-3, minibatch_size=128, num_updates=10, epsilon_frames=1000, target_every=20)
        train(env, algo, 20, 160)
        assert returns(env, algo) == pytest.approx(-2.5)


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


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("options", [
    {}, {"prioritized": True, "last_action": True}, {"recurrent": "gru", "sequence_length": 5},
    {"standardize_reward": True, "tau": 0.1, "storage": "memmap"},
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
