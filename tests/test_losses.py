"""The value loss of MAPPO's code on numbers that its code gave, and identities of PPO's objective."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from toys import ToyEnv

from tdmarl.actors import categorical_actor, gaussian_actor
from tdmarl.critics import NormalizedCritic, ValueNorm
from tdmarl.losses import PolicyLoss, ValueLoss, huber

# values, the rollout's values, lambda-returns, alive; clip 0.2
V, OLD, R = (
    torch.tensor(x).reshape(4, 1, 1)
    for x in ([1.0, 2.0, 3.0, -20.0], [0.5, 2.1, 1.0, 0.0], [2.0, 1.0, 5.0, 4.0])
)
ALIVE = torch.tensor([True, True, False, True]).reshape(4, 1)


def critic():
    """A critic whose value is what it sees."""
    return TensorDictModule(
        torch.nn.Identity(), in_keys=[("g", "observation")], out_keys=[("g", "state_value")]
    )


def value_batch(mask=True):
    entries = {"observation": V, "state_value": OLD, "state_value_normalized": OLD, "value_target": R}
    return TensorDict({"g": entries | ({"mask": ALIVE} if mask else {})}, [4])


@pytest.mark.parametrize(
    "delta, clip, mask, expected",
    [
        (10.0, 0.2, True, 63.781666),
        (10.0, None, True, 63.666668),
        (math.inf, 0.2, True, 96.448334),
        (math.inf, None, False, 72.75),
    ],
)
def test_value_loss_gives_the_numbers_of_mappos_code(delta, clip, mask, expected):
    loss = ValueLoss(critic(), "g", clip_epsilon=clip, huber_delta=delta)
    assert loss(value_batch(mask))["loss_critic"].item() == pytest.approx(expected, abs=1e-4)


class Frozen(ValueNorm):
    """Moments that stay: MAPPO's code takes them over dead agents too, ours over live ones."""

    def update(self, returns, mask=None):
        pass


def test_value_loss_with_value_norm_gives_the_number_of_mappos_code():
    norm = Frozen()
    ValueNorm.update(norm, R)
    loss = ValueLoss(NormalizedCritic(critic(), {"g": norm}), "g", value_norm=norm)
    assert loss(value_batch())["loss_critic"].item() == pytest.approx(54.328945, abs=1e-4)


def test_the_moments_of_returns_are_those_of_live_agents():
    norm = ValueNorm()
    ValueLoss(NormalizedCritic(critic(), {"g": norm}), "g", value_norm=norm)(value_batch())
    mean, std = norm.moments()
    live = torch.tensor([2.0, 1.0, 4.0])
    torch.testing.assert_close(mean, live.mean().reshape(1))
    torch.testing.assert_close(std, live.std(correction=0).reshape(1))


def test_huber_is_torchs():
    error = torch.linspace(-30, 30, 101)
    torch.testing.assert_close(
        huber(error, 10.0), torch.nn.functional.huber_loss(error, error * 0, reduction="none", delta=10.0)
    )
    torch.testing.assert_close(huber(error, math.inf), error.square() / 2)


def policy_batch(env, actor, mask=None):
    td = actor(env.reset())
    torch.manual_seed(1)
    advantage = torch.randn(*td.batch_size, 3, 1)
    td["agents", "advantage"] = (advantage - advantage.mean()) / advantage.std(correction=0)
    if mask is not None:
        td["agents", "mask"] = mask
    return td.detach()


@pytest.mark.parametrize("discrete", [0, 4])
def test_first_minibatch_has_ratio_one_and_the_gradient_of_reinforce(discrete):
    env = ToyEnv(batch=(16,), choices=discrete)
    actor = categorical_actor(env) if discrete else gaussian_actor(env)
    td, loss = policy_batch(env, actor), PolicyLoss(actor, "agents", entropy_coeff=0.0)
    out = loss(td)
    assert out["clip_fraction"] == 0 and out["kl_approx"].abs() < 1e-10 and out["loss_objective"].abs() < 1e-6
    ours = torch.autograd.grad(out["loss_objective"], list(actor.parameters()))
    log_prob = actor.get_dist(td).log_prob(td["agents", "action"])
    reinforce = -(log_prob * td["agents", "advantage"].squeeze(-1)).mean()
    for a, b in zip(ours, torch.autograd.grad(reinforce, list(actor.parameters()))):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_objective_by_hand():
    """One agent, two actions; old probabilities 1/2, new 0.9 and 0.1: ratios 1.8 and 0.2, clipped to 1.2 and 0.8."""
    env = ToyEnv(batch=(2,), groups={"agents": (1, 4, 1)}, choices=2)
    actor = categorical_actor(env, hidden=())
    td = env.reset()
    with torch.no_grad():
        for p in actor.parameters():
            p.zero_()
        actor.module[0].module.layers[0].bias[0, 0] = math.log(9)
    td["agents", "action_mask"] = torch.ones(2, 1, 2, dtype=torch.bool)
    td["agents", "action"] = torch.tensor([[0], [1]])
    td["agents", "action_log_prob"] = torch.full((2, 1), math.log(0.5))
    td["agents", "advantage"] = torch.tensor([2.0, 3.0]).reshape(2, 1, 1)
    out = PolicyLoss(actor, "agents", clip_epsilon=0.2, entropy_coeff=0.5)(td)
    # min(1.8 * 2, 1.2 * 2) = 2.4; min(0.2 * 3, 0.8 * 3) = 0.6
    assert out["loss_objective"].item() == pytest.approx(-(2.4 + 0.6) / 2, abs=1e-6)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert out["loss_entropy"].item() == pytest.approx(-0.5 * entropy, abs=1e-6)
    assert out["clip_fraction"].item() == 1.0
    kl = ((1.8 - 1 - math.log(1.8)) + (0.2 - 1 - math.log(0.2))) / 2
    assert out["kl_approx"].item() == pytest.approx(kl, abs=1e-6)


def test_ratio_is_a_product_over_action_dimensions():
    env = ToyEnv(batch=(2,))
    actor = gaussian_actor(env)
    td = policy_batch(env, actor)
    td["agents", "action_log_prob"] -= 2 * math.log(1.05)  # each of two dimensions by 1.05
    td["agents", "advantage"] = torch.ones(2, 3, 1)
    loss = PolicyLoss(actor, "agents", clip_epsilon=0.5, entropy_coeff=0.0)
    assert loss(td)["loss_objective"].item() == pytest.approx(-(1.05**2), abs=1e-5)


def test_the_dead_contribute_exactly_nothing():
    env = ToyEnv(batch=(8,), choices=3)
    actor = categorical_actor(env)
    mask = torch.ones(8, 3, dtype=torch.bool)
    mask[:, 1] = False
    td = policy_batch(env, actor, mask)
    loss = PolicyLoss(actor, "agents")
    value = ValueLoss(critic(), "g")
    clean = torch.autograd.grad(
        sum(v for k, v in loss(td).items() if k.startswith("loss")), list(actor.parameters())
    )
    dirty = td.clone()
    dirty["agents", "advantage"][:, 1] = float("nan")
    dirty["agents", "action_log_prob"][:, 1] = float("-inf")
    dirty["agents", "action_mask"][:, 1] = False
    spoiled = torch.autograd.grad(
        sum(v for k, v in loss(dirty).items() if k.startswith("loss")), list(actor.parameters())
    )
    for a, b in zip(clean, spoiled):
        assert torch.equal(a, b)
    batch = value_batch()
    before = value(batch)["loss_critic"]
    batch["g", "value_target"][2] = 1e6
    assert torch.equal(before, value(batch)["loss_critic"])


def test_padding_rows_change_nothing():
    env = ToyEnv(batch=(8,))
    actor = gaussian_actor(env)
    td = policy_batch(env, actor, torch.ones(8, 3, dtype=torch.bool))
    padding = td.clone()
    padding["agents", "mask"][:] = False
    loss = PolicyLoss(actor, "agents")
    for key, value in loss(td).items():
        torch.testing.assert_close(loss(torch.cat([td, padding]))[key], value, atol=1e-6, rtol=1e-5)


def test_losses_are_torchrls_and_say_what_they_miss():
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.common import LossModule

    assert isinstance(PolicyLoss(gaussian_actor(ToyEnv()), "agents"), ClipPPOLoss)
    assert isinstance(ValueLoss(critic(), "g"), LossModule)
    with pytest.raises(KeyError, match="state_value_normalized"):
        ValueLoss(critic(), "g", value_norm=ValueNorm())


def test_policy_loss_equals_torchrls_where_nobody_is_dead():
    from torchrl.objectives import ClipPPOLoss

    env = ToyEnv(batch=(16,))
    actor = gaussian_actor(env, distribution="clipped")
    td = policy_batch(env, actor)
    td["agents", "action_log_prob"] += 0.3 * torch.randn(16, 3)
    theirs = ClipPPOLoss(actor, None, entropy_coeff=0.01, critic_coeff=0.0)
    theirs.set_keys(advantage=("agents", "advantage"))
    expected, found = theirs(td.clone()), PolicyLoss(actor, "agents")(td)
    for key in ("loss_objective", "loss_entropy", "entropy", "clip_fraction"):
        torch.testing.assert_close(found[key], expected[key].reshape(()), atol=1e-6, rtol=1e-5)
