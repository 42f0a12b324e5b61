"""Deterministic actors, their relaxed draws, and the noise that explores."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, MultiCategorical
from torchrl.envs.utils import ExplorationType, set_exploration_type
from toys import ToyEnv

import tdmarl
from tdmarl.deterministic_actors import ActionNoise, OrnsteinUhlenbeckNoise, relaxed

G = "agents"


def seen(env, size=6):
    torch.manual_seed(0)
    td = TensorDict(batch_size=[size])
    for g in env.group_map:
        n, o = env.observation_spec_unbatched[g, "observation"].shape
        td[g] = {"observation": torch.randn(size, n, o)}
    return td.set("is_init", torch.zeros(size, 1, dtype=torch.bool))


def boxed(low, high):
    """A toy environment with another box."""
    env = ToyEnv()
    spec = Bounded(torch.tensor(low).expand(4, 3, 2), torch.tensor(high).expand(4, 3, 2), (4, 3, 2))
    env.action_spec = Composite({G: Composite({"action": spec}, shape=(4, 3))}, shape=(4,))
    return env


def test_the_action_is_the_squashed_output_and_padding_stays():
    env = boxed([-1.0, 2.0], [3.0, 2.0])  # the second dimension is padding
    out = tdmarl.deterministic_actor(env, output_gain=50.0)(seen(env))
    expected = 1 + 2 * out[G, "loc"][..., 0].tanh()
    torch.testing.assert_close(out[G, "action"][..., 0], expected)
    assert (out[G, "action"][..., 1] == 2).all() and expected.abs().max() > 1.5


@pytest.mark.parametrize("share, different", [(False, True), (True, False)])
def test_networks_are_shared_or_not(share, different):
    env = ToyEnv()
    actor, td = tdmarl.deterministic_actor(env, share_params=share, agent_id=False), seen(env)
    td[G, "observation"][:] = td[G, "observation"][:, :1]
    action = actor(td)[G, "action"]
    assert torch.equal(action[:, 0], action[:, 1]) != different


def test_discrete_actors_take_the_best_available_and_explore_by_drawing():
    env = ToyEnv(choices=3)
    actor, td = tdmarl.deterministic_actor(env, output_gain=3.0), seen(env, 4000)
    td[G, "observation"][:] = td[G, "observation"][0]
    td[G, "action_mask"] = torch.tensor([True, True, False]).expand(4000, 3, 3)
    out = actor(td.copy())
    logits = out[G, "logits"].masked_fill(~td[G, "action_mask"], -torch.inf)
    assert torch.equal(out[G, "action"], logits.argmax(-1))
    with set_exploration_type(ExplorationType.RANDOM):
        drawn = actor(td.copy())[G, "action"]
    share = (drawn == 0).float().mean(0)
    torch.testing.assert_close(share, logits[0].softmax(-1)[:, 0], atol=0.03, rtol=0)
    assert (drawn < 2).all()


def test_relaxed_draws_have_the_probabilities_of_the_logits_and_a_gradient():
    torch.manual_seed(0)
    logits = (
        torch.tensor([[2.0, 0.0, -1.0, 0.5, 0.0]]).expand(20_000, 5).clone().requires_grad_()
    )  # choices of 3 and 2
    hard = relaxed(logits, nvec=(3, 2))
    assert ((hard == 0) | (hard == 1)).all()  # straight-through leaves exact zeros and ones
    expected = torch.cat([logits[0, :3].softmax(0), logits[0, 3:].softmax(0)])
    torch.testing.assert_close(hard.mean(0), expected, atol=0.015, rtol=0)
    grad = torch.autograd.grad((hard * torch.tensor([1.0, 0, 0, 0, 0])).sum(), logits)[0]
    assert grad[:, 0].sum() > 0 > grad[:, 1].sum() and grad[:, 3:].abs().sum() == 0
    soft = relaxed(logits, nvec=(3, 2), hard=False, temperature=0.5)
    torch.testing.assert_close(soft[:, :3].sum(-1), torch.ones(20_000))
    assert 0 < soft.min() and soft.max() <= 1


def test_relaxed_draws_leave_unavailable_actions_at_zero():
    logits = torch.zeros(1000, 2, 3, requires_grad=True)
    mask = torch.tensor([[False, True, True], [False, False, False]]).expand(1000, 2, 3)
    for hard in (True, False):
        y = relaxed(logits, mask, hard=hard)
        assert (y[:, 0, 0] == 0).all() and (y[:, 1] > 0).any(0).all()  # nothing available: everything counts
        assert torch.isfinite(torch.autograd.grad(y[..., 1].sum(), logits)[0]).all()


def test_gaussian_noise_has_its_size_and_stays_in_the_box():
    env = boxed([-40.0, 5.0], [40.0, 5.0])
    noise, td = ActionNoise(env, start=0.05, end=0.05), seen(env, 5000)
    td[G, "action"] = torch.tensor([0.0, 5.0]).expand(5000, 3, 2)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert torch.equal(noise(td.copy())[G, "action"], td[G, "action"]) and noise.frames == 0
    with set_exploration_type(ExplorationType.RANDOM):
        out = noise(td.copy())[G, "action"]
        assert noise.frames == 5000
        edge = noise(td.copy().set((G, "action"), torch.tensor([40.0, 5.0]).expand(5000, 3, 2)))[G, "action"]
    assert out[..., 0].std().item() == pytest.approx(0.05 * 40, rel=0.02) and (out[..., 1] == 5).all()
    assert edge[..., 0].max() == 40 and (edge[..., 0] < 40).float().mean().item() == pytest.approx(
        0.5, abs=0.02
    )


def test_noise_falls_with_the_frames_it_acted_on():
    noise = ActionNoise(ToyEnv(), start=1.0, end=0.2, anneal_frames=100)
    for frames, expected in ((0, 1.0), (25, 0.8), (100, 0.2), (1000, 0.2)):
        noise.frames.fill_(frames)
        assert noise.sigma().item() == pytest.approx(expected)


def test_ornstein_uhlenbeck_noise_wanders_and_starts_at_zero_with_each_episode():
    env = ToyEnv(batch=(2000,), horizon=50)
    noise = OrnsteinUhlenbeckNoise(env, theta=0.2, start=0.1, end=0.1)

    class Still(torch.nn.Module):
        def forward(self, o):
            return torch.zeros(*o.shape[:-1], 2)

    from tensordict.nn import TensorDictModule, TensorDictSequential

    policy = TensorDictSequential(TensorDictModule(Still(), [(G, "observation")], [(G, "action")]), noise)
    batch = tdmarl.Collector(env, policy, frames_per_batch=2000 * 60, seed=0).rollout()
    x = batch["next", G, "noise"]
    torch.testing.assert_close(batch[G, "action"], x)
    # x_t = .8 x_{t-1} + .1 N: the standard deviation goes to .1 / sqrt(1 - .64), neighbours are correlated by .8
    assert x[:, 0].std().item() == pytest.approx(0.1, rel=0.05)
    assert x[:, 45].std().item() == pytest.approx(0.1 / 0.6, rel=0.05)
    late = x[:, 40:42].flatten(2).transpose(0, 1).flatten(1)
    assert torch.corrcoef(late)[0, 1].item() == pytest.approx(0.8, abs=0.02)
    assert x[:, 50].std().item() == pytest.approx(0.1, rel=0.05)  # a new episode
    assert torch.equal(batch[G, "noise"][:, 1:50], x[:, :49]) and (batch[G, "noise"][:, 50] == 0).all()


def test_noise_leaves_groups_with_discrete_actions_alone_and_its_count_is_saved():
    env = ToyEnv(choices=3)
    noise = ActionNoise(env)
    assert not noise.in_keys and not noise.out_keys
    twin = copy.deepcopy(noise)
    noise.frames.fill_(7)
    twin.load_state_dict(noise.state_dict())
    assert twin.frames == 7


def test_bad_numbers_are_named():
    env = ToyEnv()
    with pytest.raises(ValueError, match="start=-1"):
        ActionNoise(env, start=-1.0)
    with pytest.raises(ValueError, match="theta=2"):
        OrnsteinUhlenbeckNoise(env, theta=2.0)
    unequal = MultiCategorical(torch.tensor([[2, 3], [2, 4], [2, 3]]), shape=(3, 2))
    env.action_spec = Composite({G: Composite({"action": unequal.expand(4, 3, 2)}, shape=(4, 3))}, shape=(4,))
    with pytest.raises(ValueError, match="different numbers of choices"):
        tdmarl.deterministic_actor(env)
