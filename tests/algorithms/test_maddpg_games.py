"""MADDPG on one-step games whose answers are computed by hand, with a critic that can be exact: quadratic."""

from __future__ import annotations

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn

import tdmarl

VALUE = [("agents", "state_action_value")]


class Quadratic(nn.Module):
    """Each agent's value as a quadratic function of all actions ``[*B, n, 1]``."""

    def __init__(self, n):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n, 1 + n + n * n))

    def forward(self, u):
        u = u.squeeze(-1)
        products = (u.unsqueeze(-1) * u.unsqueeze(-2)).flatten(-2)
        features = torch.cat([torch.ones_like(u[..., :1]), u, products], -1)
        return torch.einsum("...f,nf->...n", features, self.w).unsqueeze(-1)


def externality(u):
    """``r_i = -(u_i - .5)^2 - u_j``: each agent's best is .5 whatever the other does; together (0, 0) were best."""
    return -(u - 0.5).square() - u.flip(-1)


def two(u):
    """``-(u_1 + u_2 - .6)^2 - .1 (u_1 - .5)^2`` for both: the best is (.5, .1)."""
    return (-(u.sum(-1, keepdim=True) - 0.6).square() - 0.1 * (u[..., :1] - 0.5).square()).expand_as(u)


def three(u):
    """The same kind for three: ``u_1 = .5``, ``u_2 = .3`` and the sum .9."""
    apart = 0.5 * (u[..., :1] - 0.5).square() + 0.5 * (u[..., 1:2] - 0.3).square()
    return (-(u.sum(-1, keepdim=True) - 0.9).square() - apart).expand_as(u)


@pytest.mark.parametrize("reward, others, expected", [
    (externality, "buffer", [0.5, 0.5]), (externality, "policy", [0.5, 0.5]), (externality, "joint", [0.0, 0.0]),
    (two, "policy", [0.5, 0.1]), (three, "policy", [0.5, 0.3, 0.1]), (two, "joint", [0.5, 0.1]),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:others='joint'")
def test_where_it_ends(reward, others, expected):
    n, frames = len(expected), 8192
    env = tdmarl.continuous_game(reward, n_agents=n, num_envs=128)
    algo = tdmarl.maddpg(
        env, critic=TensorDictModule(Quadratic(n), [("agents", "action")], VALUE), others=others, num_updates=16,
        minibatch_size=128, hidden=(16,), lr=2e-3, critic_lr=3e-2, noise_start=0.6, noise_end=0.1, noise_frames=frames,
        buffer_size=2048, anneal_frames=frames,
    )  # fmt: skip
    for batch in tdmarl.Collector(env, algo.explore, frames_per_batch=128, total_frames=frames, seed=0):
        algo.learner(batch)
    found = algo.policy(env.reset())["agents", "action"][0].flatten().tolist()
    assert found == pytest.approx(expected, abs=0.03)


def test_networks_find_the_equilibrium_too():
    env = tdmarl.continuous_game(externality, n_agents=2, num_envs=128)
    algo = tdmarl.maddpg(
        env, num_updates=16, minibatch_size=256, hidden=(32, 32), activation=nn.Tanh, lr=2e-3, critic_lr=5e-3,
        noise_start=0.6, noise_end=0.3, noise_frames=8192, tau=0.05, anneal_frames=8192,
    )  # fmt: skip
    for batch in tdmarl.Collector(env, algo.explore, frames_per_batch=256, total_frames=8192, seed=0):
        algo.learner(batch)
    found = algo.policy(env.reset())["agents", "action"][0].flatten().tolist()
    assert found == pytest.approx([0.5, 0.5], abs=0.1)


@pytest.mark.parametrize("relaxation", ["straight_through", "soft"])
def test_discrete_agents_find_the_dominant_actions(relaxation):
    """A prisoner's dilemma: to defect (1) is better whatever the other does, though both lose by it."""
    payoff = torch.tensor([[[3.0, 0.0], [5.0, 1.0]], [[3.0, 5.0], [0.0, 1.0]]])  # [agent, own, other]
    env = tdmarl.matrix_game(list(payoff), num_envs=64)
    algo = tdmarl.maddpg(
        env, num_updates=8, minibatch_size=128, hidden=(16,), lr=5e-3, critic_lr=1e-2, relaxation=relaxation,
        buffer_size=2048,
    )  # fmt: skip
    for batch in tdmarl.Collector(env, algo.explore, frames_per_batch=64, total_frames=4096, seed=0):
        algo.learner(batch)
    assert algo.policy(env.reset())["agents", "action"][0].tolist() == [1, 1]
