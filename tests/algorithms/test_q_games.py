"""Games whose answers follow by hand, learnt by IQL, VDN and QMIX."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

import tdmarl
from tdmarl.algorithms import iql, qmix, vdn

G = "agents"
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


@pytest.mark.parametrize("make", [iql, vdn, qmix])
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


@pytest.mark.parametrize("make, payoff, best", [
    (iql, CLIMBING, 5), (vdn, CLIMBING, 5), (vdn, [[-25.0, 0, 10], [0, 2, 0], [10, 0, -25]], 2),
])  # fmt: skip
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
    (iql, {}), (qmix, {}), (vdn, {}), (iql, {"sequence_length": 5, "n_steps": 3}),
])  # fmt: skip
def test_a_time_limit_bootstraps(make, rows):
    """Reward 1 for ever at discount 0.9 is worth 10; the ten steps up to the limit would be 6.51 (1 - 0.9 ** 10)."""
    env = OneState()
    algo = make(
        env,
        gamma=0.9,
        lr=1e-2,
        target_every=5,
        num_updates=10,
        minibatch_size=80,
        buffer_size=800,
        anneal_frames=40 * 160,
        **rows,
    )
    metrics = train(env, algo, 40, 160)
    assert metrics["q_taken"].item() == pytest.approx(10, abs=0.02)


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
