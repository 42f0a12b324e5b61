from __future__ import annotations

import pytest
import torch
from tensordict.nn import TensorDictModule
from test_collect import Stateless
from toys import ToyEnv
from torchrl.envs import TransformedEnv

from tdmarl.actors import gaussian_actor
from tdmarl.collect import Collector, env_state
from tdmarl.evaluate import evaluate


def constant(value, size):
    act = lambda o: torch.full((*o.shape[:-1], size), value)  # noqa: E731
    return TensorDictModule(act, in_keys=[("agents", "observation")], out_keys=[("agents", "action")])


def test_returns_by_hand():
    """Five steps of -|0 - 0.5| per dimension: -1 a step for two dimensions, -5 an episode."""
    returns = evaluate(ToyEnv(), constant(0.0, 2), episodes=6)
    assert returns.shape == (6,)
    assert (
        returns["return_mean_agents"].tolist() == [-5.0] * 6
        and returns["return_sum_agents"].tolist() == [-15.0] * 6
    )
    assert returns["agents"].shape == (6, 3) and returns["length"].tolist() == [5] * 6


class Uneven(ToyEnv):
    """Environment i ends after i + 1 steps; each step pays 1."""

    def _step(self, tensordict):
        out = super()._step(tensordict)
        over = self.time.squeeze(-1) >= torch.arange(1, self.batch_size[0] + 1)
        out.update({"done": over.unsqueeze(-1), "terminated": over.unsqueeze(-1)})
        out["agents", "reward"] = torch.ones_like(out["agents", "reward"])
        return out


def test_short_episodes_are_not_counted_more_often_than_long_ones():
    returns = evaluate(Uneven(batch=(4,), horizon=9), constant(0.0, 2), episodes=8)
    assert returns["length"].tolist() == [1, 2, 3, 4] * 2
    assert returns["return_mean_agents"].tolist() == [1.0, 2.0, 3.0, 4.0] * 2


def test_groups_are_added_up_and_shown_apart():
    env = ToyEnv(groups={"a": (2, 3, 1), "b": (1, 5, 1)})
    returns = evaluate(env, gaussian_actor(env, ("a", "b")), episodes=4)
    both = torch.cat([returns["a"], returns["b"]], -1)
    torch.testing.assert_close(returns["return_sum_agents"], both.sum(-1))
    torch.testing.assert_close(returns["return_mean_agents"], both.mean(-1))


def test_leaves_no_trace():
    env = ToyEnv(horizon=6)
    actor = gaussian_actor(env)
    collector = Collector(env, actor, frames_per_batch=16, seed=0)
    collector.rollout()
    torch.manual_seed(5)
    before, random = env_state(env), torch.get_rng_state()
    one, two = evaluate(env, actor, episodes=5, seed=3), evaluate(env, actor, episodes=5, seed=3)
    after = env_state(env)
    assert all(torch.equal(before[k], after[k]) for k in before) and torch.equal(
        random, torch.get_rng_state()
    )
    assert torch.equal(one["return_mean_agents"], two["return_mean_agents"])
    other = ToyEnv(horizon=6)
    undisturbed = Collector(other, actor, frames_per_batch=16, seed=0)
    undisturbed.rollout()
    assert torch.equal(collector.rollout()["agents", "action"], undisturbed.rollout()["agents", "action"])


def test_refuses_what_it_could_not_put_back():
    env = Stateless()
    actor = gaussian_actor(env)
    evaluate(env, actor, episodes=4)
    collector = Collector(env, actor, frames_per_batch=8)
    collector.rollout()
    with pytest.raises(RuntimeError, match="of its own"):
        evaluate(env, actor, episodes=4)
    with pytest.raises(RuntimeError, match="of its own"):
        evaluate(TransformedEnv(env), actor, episodes=4)
    collector.total_frames = 8  # nothing more to come
    assert evaluate(env, actor, episodes=4).shape == (4,)


def test_an_episode_without_end_is_an_error():
    with pytest.raises(RuntimeError, match="time limit"):
        evaluate(ToyEnv(horizon=50), constant(0.0, 2), episodes=4, max_steps=10)
    with pytest.raises(ValueError, match="episodes=0"):
        evaluate(ToyEnv(), constant(0.0, 2), episodes=0)
