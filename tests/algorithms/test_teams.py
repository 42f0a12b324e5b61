"""Several teams in one environment: independent learners, opponents that only act, and what does not go together."""

from __future__ import annotations

import copy

import pytest
import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type
from toys import ToyEnv

import tdmarl

MIXED = {"a": (2, 3, 1), "b": (1, 5, 2)}


@pytest.fixture(autouse=True)
def _quiet(capsys):
    yield
    capsys.readouterr()


def make(name, env, group):
    small = {"minibatch_size": 10}
    options = {"happo": {}, "mappo": small, "ippo": small}.get(name, small | {"num_updates": 2})
    return getattr(tdmarl, name)(env, group, **options)


@pytest.mark.filterwarnings("ignore:The critic of scope")
@pytest.mark.parametrize("one, other, choices", [
    ("maddpg", "mappo", 0), ("happo", "maddpg", 0), ("ippo", "happo", 0), ("qmix", "mappo", 3), ("maddpg", "vdn", 3),
    ("iql", "happo", 3),
])  # fmt: skip
def test_algorithms_learn_beside_each_other_as_they_do_alone(one, other, choices):
    env = ToyEnv(groups=MIXED, choices=choices)
    teams = {"a": make(one, env, "a"), "b": make(other, env, "b")}
    algo = tdmarl.per_group(env, **teams)
    batch = tdmarl.Collector(env, algo.explore, frames_per_batch=40, seed=0).rollout()
    keys = set(batch.keys(True))
    metrics = algo.learner(batch)
    assert set(metrics.keys()) == {"a", "b"} and set(batch.keys(True)) == keys  # a copy for each
    for name, kind in (("a", one), ("b", other)):  # alone, from the same batch: the same
        alone = make(kind, env, name)
        torch.testing.assert_close(alone.learner(batch), metrics[name])
        for p, q in zip(alone.policy.parameters(), teams[name].policy.parameters()):
            assert torch.equal(p, q)
    assert tdmarl.evaluate(env, algo.policy, episodes=4)["length"].tolist() == [5] * 4


def test_a_policy_stands_in_for_a_group_and_does_not_learn():
    env = ToyEnv(groups=MIXED)
    earlier = copy.deepcopy(make("mappo", env, "b").policy)
    for fixed in (tdmarl.random_policy(env, "b"), earlier):
        before = copy.deepcopy(fixed.state_dict())
        algo = tdmarl.per_group(env, a=make("mappo", env, "a"), b=fixed)
        batch = tdmarl.Collector(env, algo.explore, frames_per_batch=40, seed=0).rollout()
        assert list(algo.learner(batch).keys()) == ["a"]
        assert all(torch.equal(x, before[k]) for k, x in fixed.state_dict().items())
        tdmarl.evaluate(env, algo.policy, episodes=4)


@pytest.mark.parametrize("choices", [0, 4])
def test_random_policies_draw_what_is_available(choices):
    env = ToyEnv(batch=(500,), choices=choices)
    policy = tdmarl.random_policy(env)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        batch = tdmarl.Collector(env, policy, frames_per_batch=2000).rollout()
    action = batch["agents", "action"]
    if choices:
        assert batch["agents", "action_mask"].gather(-1, action.unsqueeze(-1)).all()
        assert (torch.bincount(action[:, 1].flatten()) / 1500).tolist() == pytest.approx(
            [0, 1 / 3, 1 / 3, 1 / 3], abs=0.04
        )
    else:
        assert action.abs().max() <= 1 and action.std().item() == pytest.approx(2 / 12**0.5, abs=0.02)


def test_the_state_of_all_learners_is_saved():
    env = ToyEnv(groups=MIXED)

    def parts():
        algo = tdmarl.per_group(a=make("mappo", env, "a"), b=make("ippo", env, "b"))
        return algo, tdmarl.Collector(env, algo.explore, frames_per_batch=40, seed=0)

    algo, collector = parts()
    first, second = collector.rollout(), collector.rollout()
    algo.learner(first)
    twin = parts()[0]
    twin.learner.load_state_dict(copy.deepcopy(algo.learner.state_dict()))
    torch.testing.assert_close(twin.learner(second), algo.learner(second))
    with pytest.raises(ValueError, match=r"teams \['a', 'b'\]"):
        tdmarl.per_group(a=make("mappo", env, "a")).learner.load_state_dict(algo.learner.state_dict())


def test_a_team_of_several_groups_has_any_name():
    env = ToyEnv(groups=MIXED | {"c": (1, 2, 1)})
    algo = tdmarl.per_group(env, both=make("mappo", env, ("a", "b")), c=tdmarl.random_policy(env, "c"))
    batch = tdmarl.Collector(env, algo.explore, frames_per_batch=20, seed=0).rollout()
    assert list(algo.learner(batch).keys()) == ["both"]


def test_random_frames_warn_where_probabilities_are_learnt_from():
    env = ToyEnv(groups=MIXED)
    algo = tdmarl.per_group(env, a=make("mappo", env, "a"), b=tdmarl.random_policy(env, "b"))
    with pytest.warns(UserWarning, match="off-policy"):
        tdmarl.Collector(env, algo.explore, frames_per_batch=20, init_random_frames=20)


def test_what_does_not_go_together_is_named():
    env = ToyEnv(groups=MIXED)
    a, b = make("mappo", env, "a"), make("mappo", env, "b")
    with pytest.raises(ValueError, match="b=... acts for the group 'a': call it so"):
        tdmarl.per_group(b=a)
    with pytest.raises(ValueError, match="Both a=... and both=... act for the group 'a'"):
        tdmarl.per_group(a=a, both=make("mappo", env, ("a", "b")))
    with pytest.raises(ValueError, match=r"Nobody acts for the groups \['b'\]"):
        tdmarl.per_group(env, a=a)
    with pytest.raises(ValueError, match="learns"):
        tdmarl.per_group(a=a.policy, b=b.policy)
    with pytest.raises(ValueError, match="no \\(group, 'action'\\)"):
        tdmarl.per_group(a=a, b=tdmarl.state_critic(env, "b"))
