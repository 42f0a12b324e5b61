from __future__ import annotations

import pytest
import torch
from tensordict.nn import TensorDictModule
from torchrl.collectors import BaseCollector
from torchrl.collectors import Collector as TorchRLCollector
from torchrl.envs import EnvBase, RewardSum, TransformedEnv, VecNormV2
from toys import ToyEnv

from tdmarl.actors import gaussian_actor
from tdmarl.collect import Collector, env_state


def collect(env, n=1, **options):
    torch.manual_seed(0)
    collector = Collector(env, gaussian_actor(env), seed=0, **{"frames_per_batch": 28} | options)
    return collector, [collector.rollout() for _ in range(n)]


def test_layout_is_torchrls():
    env = ToyEnv()
    _, (batch,) = collect(env)
    theirs = next(iter(TorchRLCollector(ToyEnv(), gaussian_actor(env), frames_per_batch=28, total_frames=28)))
    assert batch.shape == theirs.shape == (4, 7) and batch.names == theirs.names
    mine, other = set(batch.keys(True, True)), set(theirs.keys(True, True))
    assert other - mine == {("collector", "traj_ids")}
    assert mine - other == {"is_init", ("next", "agents", "episode_reward")}
    for key in other & mine:
        assert batch[key].shape == theirs[key].shape and batch[key].dtype == theirs[key].dtype


def test_rows_follow_each_other_across_ends_and_batches():
    _, batches = collect(ToyEnv(horizon=5), 2)
    batch = torch.cat(batches, 1)  # [4, 14]
    observed, after, done = (
        batch["agents", "observation"],
        batch["next", "agents", "observation"],
        batch["next", "done"],
    )
    assert done.squeeze(-1).nonzero()[:, 1].unique().tolist() == [4, 9]
    going = ~done[:, :-1].squeeze(-1)
    assert torch.equal(after[:, :-1][going], observed[:, 1:][going])
    ended = done.squeeze(-1)
    assert (after[ended][..., 1] == 1.0).all()  # the true last observation, not the one after the reset
    assert torch.equal(batch["is_init"][:, 1:], done[:, :-1]) and batch["is_init"][:, 0].all()
    assert (observed[batch["is_init"].squeeze(-1)][..., 1] == 0).all()


def test_episode_reward_is_torchrls_reward_sum():
    env = TransformedEnv(
        ToyEnv(),
        RewardSum(in_keys=[("agents", "reward")], out_keys=[("agents", "total")], reset_keys=["_reset"]),
    )
    _, batches = collect(env, 2)
    batch = torch.cat(batches, 1)
    torch.testing.assert_close(batch["next", "agents", "episode_reward"], batch["next", "agents", "total"])


def test_a_resumed_collector_goes_on_to_the_last_bit_and_draws_nothing():
    env = ToyEnv(seed=1)
    whole, batches = collect(env, 3)
    first, _ = collect(ToyEnv(seed=1), 1)
    second = Collector(ToyEnv(seed=9), gaussian_actor(env), frames_per_batch=28, seed=5)
    second.policy.load_state_dict(whole.policy.state_dict())
    before = torch.get_rng_state()
    second.load_state_dict(first.state_dict())
    assert torch.equal(before, torch.get_rng_state()) and second.frames == 28
    torch.manual_seed(123)
    for expected in batches[1:]:
        found = second.rollout()
        assert all(torch.equal(found[k], expected[k]) for k in expected.keys(True, True))


def test_the_acting_stream_is_its_own():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    env = ToyEnv()
    actor = gaussian_actor(env)
    torch.set_rng_state(state)
    one = Collector(env, actor, frames_per_batch=28, seed=0).rollout()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    two = Collector(ToyEnv(), actor, frames_per_batch=28, seed=0).rollout()
    assert torch.equal(one["agents", "action"], two["agents", "action"])


def test_counts_frames_and_ends():
    env = ToyEnv()
    collector = Collector(env, gaussian_actor(env), frames_per_batch=28, total_frames=60)
    assert isinstance(collector, BaseCollector) and len(collector) == 3
    assert [collector.frames for _ in collector] == [28, 56, 84]
    assert collector.stats()["completed"]
    collector.update_policy_weights_()
    collector.shutdown()
    collector.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        collector.rollout()


def test_random_frames_come_first_and_obey_masks():
    env = ToyEnv(choices=3)
    always = TensorDictModule(
        lambda m: torch.ones(m.shape[:-1], dtype=torch.int64),
        [("agents", "action_mask")],
        [("agents", "action")],
    )
    collector = Collector(env, always, frames_per_batch=400, init_random_frames=600, seed=0)
    one, two = collector.rollout(), collector.rollout()
    assert set(one["agents", "action"].unique().tolist()) == {0, 1, 2}
    assert one["agents", "action_mask"].gather(-1, one["agents", "action"].unsqueeze(-1)).all()
    assert (two["agents", "action"][:, :50] != 1).any() and (two["agents", "action"][:, 50:] == 1).all()


def test_wrong_sizes_are_refused_with_the_right_ones():
    env = ToyEnv()
    with pytest.raises(ValueError, match="use 28 or 32"):
        Collector(env, gaussian_actor(env), frames_per_batch=30)


class Stateless(ToyEnv):
    """Cannot say what its future depends on; a buffer of its own is no such thing."""

    state_dict = EnvBase.state_dict

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("unrelated", torch.zeros(1))


def test_an_environment_without_state_starts_anew_and_says_so():
    env = Stateless()
    assert env_state(env) is None
    collector, _ = collect(env)
    other = Collector(Stateless(), collector.policy, frames_per_batch=28)
    with pytest.warns(UserWarning, match="no explicit state"):
        other.load_state_dict(collector.state_dict())
    assert other.frames == 28 and other.rollout()["is_init"][:, 0].all()


def test_an_environment_with_transforms_is_stepped_through_them_and_restored_with_them():
    import tdmarl

    def make(seed):
        base = tdmarl.VmasEnv("navigation", num_envs=4, max_steps=6, seed=seed, n_agents=3)
        total = RewardSum(
            in_keys=[("agents", "reward")], out_keys=[("agents", "total")], reset_keys=["_reset"]
        )
        return TransformedEnv(
            TransformedEnv(base, total), VecNormV2(in_keys=[("agents", "observation")], decay=0.9)
        )

    env, other = make(0), make(1)
    actor = gaussian_actor(env)
    collector = Collector(env, actor, frames_per_batch=40, seed=0)
    batch = collector.rollout()
    torch.testing.assert_close(batch["next", "agents", "episode_reward"], batch["next", "agents", "total"])
    resumed = Collector(other, actor, frames_per_batch=40, seed=3)
    resumed.rollout()
    resumed.load_state_dict(collector.state_dict())
    tdmarl.evaluate(env, actor, episodes=4)
    one, two = collector.rollout(), resumed.rollout()
    for key in one.keys(True, True):
        torch.testing.assert_close(one[key], two[key], msg=str(key))


def test_a_root_without_done_is_named():
    env = ToyEnv(mortal=True)
    del env.done_spec["done"]
    with pytest.raises(ValueError, match="no root 'done'"):
        Collector(env, gaussian_actor(env), frames_per_batch=8)


def test_a_long_batch_is_the_short_ones_in_a_row():
    """Steps are written into the batch some at a time; 40 are more than are kept at once, and no multiple of that."""
    (whole,) = collect(ToyEnv(horizon=7), frames_per_batch=160)[1]
    parts = collect(ToyEnv(horizon=7), 4, frames_per_batch=40)[1]
    assert whole.shape == (4, 40) and whole.names == parts[0].names
    assert (torch.cat(parts, 1) == whole).all()
