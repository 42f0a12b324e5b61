"""MADDPG's losses against hand computation, TorchRL's DDPGLoss where the two agree, and identities."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.objectives import DDPGLoss, SoftUpdate, ValueEstimators
from toys import ToyEnv

import tdmarl
from tdmarl.maddpg_loss import MADDPGLoss
from tdmarl.step import Part, Step
from tdmarl.targets import TargetUpdate

G = "agents"


class Slope(nn.Module):
    """``u_i = k_i o_i``."""

    def __init__(self, slopes):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(slopes).unsqueeze(-1))

    def forward(self, o):
        return self.k * o


class Product(nn.Module):
    """``Q_i = c_i u_0 u_1 + o_0 + o_1``, for two agents."""

    def __init__(self, coefficients):
        super().__init__()
        self.c = nn.Parameter(torch.tensor(coefficients).unsqueeze(-1))

    def forward(self, o, u):
        return self.c * u.prod(-2, keepdim=True) + o.sum(-2, keepdim=True)


def by_hand(**options):
    """Networks of one number each, and three transitions: one goes on, one is terminal, one is cut off."""
    actor = TensorDictModule(Slope([0.5, -1.0]), [(G, "observation")], [(G, "action")])
    critic = TensorDictModule(
        Product([1.0, 2.0]), [(G, "observation"), (G, "action")], [(G, "state_action_value")]
    )
    loss = MADDPGLoss(actor, critic, gamma=0.9, **options)
    with torch.no_grad():
        loss.network("target_actor_network").module.k.copy_(torch.tensor([[1.0], [3.0]]))
        loss.network("target_value_network").module.c.copy_(torch.tensor([[-1.0], [1.0]]))

    def rows(values):
        return torch.tensor(values).reshape(3, 2, 1)

    def flags(*ends):
        return torch.tensor(ends).reshape(3, 1)

    following = {
        G: {"observation": rows([0.0, 1.0, 2.0, 2.0, 1.0, -1.0]), "reward": rows([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])},
        "done": flags(False, True, True), "terminated": flags(False, True, False),
        "truncated": flags(False, False, True),
    }  # fmt: skip
    batch = {
        G: {"observation": rows([1.0, 2.0, 3.0, 1.0, 2.0, 2.0]), "action": rows([1.0, 1.0, 2.0, 0.5, -1.0, 1.0])},
        "next": following,
    }  # fmt: skip
    return loss, TensorDict(batch, batch_size=[3])


def test_targets_and_the_critics_loss_are_those_computed_by_hand():
    loss, batch = by_hand()
    # mu'(o') = (1, 3) o' = (0, 3), (2, 6), (1, -3); products 0, 12, -3; sums of o' 1, 4, 0
    # Q_0' = -product + sum = 1, -8, 3;  Q_1' = product + sum = 1, 16, -3
    # y_0 = 1 + .9, 3 (terminal), 5 + 2.7 = 1.9, 3, 7.7;  y_1 = 2 + .9, 4 (terminal), 6 - 2.7 = 2.9, 4, 3.3
    # Q_0 = 1 * (1, 1, -1) + (3, 4, 4) = 4, 5, 3;  Q_1 = 2 * (1, 1, -1) + (3, 4, 4) = 5, 6, 2
    errors = [1.9 - 4, 3 - 5, 7.7 - 3, 2.9 - 5, 4 - 6, 3.3 - 2]
    out = loss.value_loss(batch)
    assert math.isclose(out["loss_value"].item(), sum(e * e for e in errors) / 6, rel_tol=1e-5)
    assert math.isclose(out["q_target"].item(), (1.9 + 3 + 7.7 + 2.9 + 4 + 3.3) / 6, rel_tol=1e-5)
    assert math.isclose(out["q_taken"].item(), (4 + 5 + 3 + 5 + 6 + 2) / 6, rel_tol=1e-5)
    torch.testing.assert_close(batch["td_error"], torch.tensor([[2.1], [2.0], [4.7]]))


def targets_of(loss, batch):
    """What each agent's critic regresses on, ``[3, 2]``: from the errors, with the trained critic's values added."""
    values = loss.network("value_network")(batch.copy())[G, "state_action_value"].squeeze(-1)
    found = []
    for i in range(2):
        alone = torch.zeros(3, 2, dtype=torch.bool)
        alone[:, i] = True
        for row in range(3):
            one = batch[row : row + 1].clone()
            one[G, "mask"] = alone[row : row + 1]
            found.append(loss.value_loss(one)["q_target"].item())
    assert values.shape == (3, 2)
    return torch.tensor(found).reshape(2, 3).T


def test_who_is_gone_has_no_future():
    loss, batch = by_hand()
    torch.testing.assert_close(targets_of(loss, batch), torch.tensor([[1.9, 2.9], [3.0, 4.0], [7.7, 3.3]]))
    # agent 1 terminates alone in the first row; agent 0 is dead after the third without having terminated
    batch["next", G, "terminated"] = torch.tensor([[False, True], [True, True], [False, False]]).unsqueeze(-1)
    batch["next", G, "mask"] = torch.tensor([[True, False], [True, True], [False, True]])
    torch.testing.assert_close(targets_of(loss, batch), torch.tensor([[1.9, 2.0], [3.0, 4.0], [5.0, 3.3]]))


def test_weights_huber_loss_and_standardized_rewards_are_those_computed_by_hand():
    squares = [[2.1**2, 2.1**2], [2.0**2, 2.0**2], [4.7**2, 1.3**2]]
    loss, batch = by_hand()
    batch["priority_weight"] = torch.tensor([1.0, 0.5, 0.25])
    expected = sum(w * sum(row) for w, row in zip([1.0, 0.5, 0.25], squares)) / 6
    assert math.isclose(loss.value_loss(batch)["loss_value"].item(), expected, rel_tol=1e-5)
    loss, batch = by_hand(huber_delta=2.0)  # e^2 / 2 up to 2, then 2 (|e| - 1)
    expected = (2 * (2.1 - 1) * 2 + 2.0 * 2 + 2 * (4.7 - 1) + 1.3**2 / 2) / 6
    assert math.isclose(loss.value_loss(batch)["loss_value"].item(), expected, rel_tol=1e-5)

    class Halved(nn.Module):
        def normalize(self, reward):
            return reward / 2

    loss, batch = by_hand(reward_norm=Halved())
    mean = (0.5 + 0.9 + 1.5 + 2.5 + 2.7 + 1.0 + 0.9 + 2.0 + 3.0 - 2.7) / 6
    assert math.isclose(loss.value_loss(batch)["q_target"].item(), mean, rel_tol=1e-5)


def test_rewards_are_added_up_along_rows_and_not_beyond_an_end():
    loss, batch = by_hand(n_steps=2)
    with pytest.raises(ValueError, match="n_steps=2"):
        loss.value_loss(batch)
    row = batch.unsqueeze(0)  # one row of three steps; the second ends by termination, the third is cut off
    found = loss.value_loss(row)["q_target"].item()
    # agent 0: 1 + .9 * 3, then 3, then 7.7; agent 1: 2 + .9 * 4, then 4, then 3.3
    assert math.isclose(found, (3.7 + 3 + 7.7 + 5.6 + 4 + 3.3) / 6, rel_tol=1e-5)


def test_regularization_is_the_mean_square_of_what_actions_are_made_of():
    env = ToyEnv()
    plain, batch = nets(env), a_batch(env)
    loss = nets(env, action_reg=0.3)
    made_of = loss.network("actor_network")(batch.copy())[G, "loc"]
    expected = plain.actor_loss(batch)["loss_actor"] + 0.3 * made_of.square().mean()
    torch.testing.assert_close(loss.actor_loss(batch)["loss_actor"], expected)


def test_targets_obey_the_next_states_action_masks():
    env = ToyEnv(choices=3)
    loss, batch = nets(env), a_batch(env)
    only = torch.zeros(len(batch), 3, 3, dtype=torch.bool)
    only[..., 1] = True
    batch["next", G, "action_mask"] = only
    seen = []
    loss.network("target_value_network").actions.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    loss.value_loss(batch)
    assert torch.equal(seen[0], only.float())


@pytest.mark.parametrize("others, by_agent", [
    # mu(o) = (.5, -1) o: .5, -2 | 1.5, -1 | 1, -2.  d/dk_0 of Q_0 = c_0 o_0 u_1, d/dk_1 of Q_1 = c_1 o_1 u_0
    ("buffer", [1 * 1 * 1.0 + 1 * 3 * 0.5 + 1 * 2 * 1.0, 2 * 2 * 1.0 + 2 * 1 * 2.0 + 2 * 2 * -1.0]),
    ("policy", [1 * 1 * -2.0 + 1 * 3 * -1.0 + 1 * 2 * -2.0, 2 * 2 * 0.5 + 2 * 1 * 1.5 + 2 * 2 * 1.0]),
    # all Q through all actions: (c_0 + c_1) o_0 u_1, (c_0 + c_1) o_1 u_0
    ("joint", [3 * (1 * -2.0 + 3 * -1.0 + 2 * -2.0), 3 * (2 * 0.5 + 1 * 1.5 + 2 * 1.0)]),
])  # fmt: skip
def test_the_actors_gradient_is_that_computed_by_hand(others, by_agent):
    loss, batch = by_hand(others=others)
    found = torch.autograd.grad(loss.actor_loss(batch)["loss_actor"], loss.network("actor_network").module.k)[
        0
    ]
    torch.testing.assert_close(
        found, -torch.tensor(by_agent).unsqueeze(-1) / 6
    )  # a mean over rows and agents


def nets(env, group=None, **options):
    torch.manual_seed(0)
    actor = tdmarl.deterministic_actor(env, group, hidden=(8,), output_gain=1.0)
    return MADDPGLoss(actor, tdmarl.action_critic(env, group, hidden=(8,)), **options)


def a_batch(env, group=None):
    policy = tdmarl.random_policy(env, group or tuple(env.group_map))
    return tdmarl.Collector(env, policy, frames_per_batch=40, seed=0).rollout().reshape(-1)


@pytest.mark.parametrize("choices", [0, 3])
def test_an_actor_gets_the_gradient_of_its_own_critic_only(choices):
    env = ToyEnv(choices=choices)
    loss, batch = nets(env), a_batch(env)
    actor = loss.network("actor_network")
    params = [p for p in actor.parameters()]
    for j in range(3):
        alone = torch.zeros(len(batch), 3, dtype=torch.bool)
        alone[:, j] = True
        batch[G, "mask"] = alone
        grads = torch.autograd.grad(loss.actor_loss(batch)["loss_actor"], params)
        for grad in grads:  # [n, ...]
            others = [i for i in range(3) if i != j]
            assert torch.equal(grad[others], torch.zeros_like(grad[others])) and grad[j].abs().sum() > 0


def test_others_act_as_in_the_buffer_and_the_own_action_is_computed_anew():
    env = ToyEnv()
    loss, batch = nets(env), a_batch(env)

    def of_agent_0(given):
        given = given.copy()
        alone = torch.zeros(len(batch), 3, dtype=torch.bool)
        alone[:, 0] = True
        return loss.actor_loss(given.set((G, "mask"), alone))["loss_actor"]

    before = of_agent_0(batch)
    own, other = batch.clone(), batch.clone()
    own[G, "action"][:, 0] += 0.5
    other[G, "action"][:, 1] += 0.5
    assert torch.equal(before, of_agent_0(own)) and not torch.equal(before, of_agent_0(other))


def test_targets_depend_on_target_networks_alone():
    env = ToyEnv(truncate=True)
    loss, batch = nets(env), a_batch(env)

    def target():
        torch.manual_seed(0)
        return loss.value_loss(batch.copy())["q_target"].item()

    before = target()
    for name in ("actor_network", "value_network"):
        for p in loss.network(name).parameters():
            p.data += 0.3
        assert target() == before
        for p in loss.network(f"target_{name}").parameters():
            p.data += 0.3
        after = target()
        assert after != before
        before = after


def test_one_agent_is_torchrls_ddpg_and_joint_is_it_for_several():
    for n, others in ((1, "buffer"), (3, "joint")):
        env = ToyEnv(groups={G: (n, 4, 2)})
        loss, batch = nets(env, others=others, gamma=0.9), a_batch(env)
        theirs = DDPGLoss(
            copy.deepcopy(loss.network("actor_network")), copy.deepcopy(loss.network("value_network")),
            delay_actor=True, delay_value=True, loss_function="l2",
        )  # fmt: skip
        theirs.set_keys(
            state_action_value=(G, "state_action_value"), reward=(G, "reward"), done=(G, "done"),
            terminated=(G, "terminated"), priority=(G, "td_error"),
        )  # fmt: skip
        theirs.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
        given = batch.clone()
        for name in ("done", "terminated"):
            given["next", G, name] = given["next", name].unsqueeze(-2).expand(-1, n, 1)
        expected, found = theirs(given), loss(batch)
        torch.testing.assert_close(found["loss_value"], expected["loss_value"])
        torch.testing.assert_close(found["loss_actor"], expected["loss_actor"])
        ours = torch.autograd.grad(found["loss_actor"], list(loss.network("actor_network").parameters()))
        trained = [p for p in theirs.actor_network_params.values(True, True) if p.requires_grad]
        grads = torch.autograd.grad(expected["loss_actor"], trained)
        assert sorted(g.norm().item() for g in ours) == pytest.approx(
            sorted(g.norm().item() for g in grads), rel=1e-4
        )


@pytest.mark.parametrize("choices", [0, 3])
def test_a_critic_of_ones_own_is_asked_once_for_each_agent(choices):
    env = ToyEnv(choices=choices)
    loss, batch = nets(env), a_batch(env)
    known = loss.network("value_network")

    def any_module(observation, action):
        given = TensorDict(
            {G: {"observation": observation, "action": action}}, batch_size=observation.shape[:-2]
        )
        return known(given)[G, "state_action_value"]

    own = TensorDictModule(any_module, known.in_keys, known.out_keys)
    other = MADDPGLoss(loss.network("actor_network"), own, delay_value=False)
    torch.manual_seed(1)
    expected = loss.actor_loss(batch)["loss_actor"]
    torch.manual_seed(1)
    torch.testing.assert_close(other.actor_loss(batch)["loss_actor"], expected)


def test_dead_agents_have_no_part():
    env = ToyEnv(mortal=True)
    loss, batch = nets(env), a_batch(env)
    changed = batch.clone()
    dead = ~batch[G, "mask"]
    assert dead.any()
    changed["next", G, "reward"][dead] = float("nan")
    for name in ("loss_value", "loss_actor"):
        torch.testing.assert_close(loss(batch.copy())[name], loss(changed.copy())[name])
        params = [p for net in ("actor_network", "value_network") for p in loss.network(net).parameters()]
        for a, b in zip(
            *(torch.autograd.grad(loss(x.copy())[name], params, allow_unused=True) for x in (batch, changed))
        ):
            assert (a is None and b is None) or torch.equal(a, b)


def test_of_two_critics_the_smaller_counts_and_both_learn():
    env = ToyEnv(truncate=True)
    actor = tdmarl.deterministic_actor(env, hidden=(8,))
    critic = tdmarl.action_critic(env, hidden=(8,), twin=True)
    loss, batch = MADDPGLoss(actor, critic, gamma=1.0), a_batch(env)
    after = batch["next"].clone()
    after[G, "action"] = loss.network("target_actor_network")(after.copy())[G, "action"]
    both = loss.network("target_value_network")(after)[G, "state_action_value"]  # [M, n, 2]
    expected = (batch["next", G, "reward"] + both.amin(-1, keepdim=True)).mean()
    found = loss.value_loss(batch)
    torch.testing.assert_close(found["q_target"], expected)
    for net in critic.nets:
        assert all(
            g.abs().sum() > 0
            for g in torch.autograd.grad(found["loss_value"], list(net.parameters()), retain_graph=True)
        )


def test_smoothed_targets_stay_in_the_box_and_differ():
    env = ToyEnv(truncate=True)
    loss, batch = nets(env, target_noise=5.0, target_noise_clip=3.0), a_batch(env)
    seen = []
    critic = loss.network("target_value_network")
    critic.register_forward_pre_hook(lambda module, args: seen.append(args[0][G, "action"].clone()))
    targets = [loss.value_loss(batch.copy())["q_target"].item() for _ in range(2)]
    assert targets[0] != targets[1] and all(a.abs().max() == 1 for a in seen)


def test_the_two_losses_do_not_mix():
    env = ToyEnv()
    loss, batch = nets(env), a_batch(env)
    out = loss(batch)
    (out["loss_value"] + out["loss_actor"]).backward()
    together = [p.grad.clone() for p in loss.parameters()]
    loss.zero_grad()
    loss.value_loss(batch)["loss_value"].backward()
    assert all(p.grad is None for p in loss.network("actor_network").parameters())
    values = [p.grad.clone() for p in loss.network("value_network").parameters()]
    loss.zero_grad()
    loss.actor_loss(batch)["loss_actor"].backward()
    assert all(p.grad is None for p in loss.network("value_network").parameters())
    actors = [p.grad for p in loss.network("actor_network").parameters()]
    assert sum(g.sum() for g in together) == pytest.approx(
        float(sum(g.sum() for g in values + actors)), rel=1e-4
    )
    assert all(not p.requires_grad for n, p in loss.target_actor_network_params.items(True, True))


def test_actors_climb_on_the_critic_of_the_moment():
    """The frozen view has to follow the critic through steps, loading, copying and conversion."""
    env = ToyEnv()
    loss, batch = nets(env), a_batch(env)

    def follows(a_loss):
        dtype = next(a_loss.network("actor_network").parameters()).dtype
        given = batch.apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
        before = a_loss.actor_loss(given)["q_policy"].item()
        with torch.no_grad():
            a_loss.network("value_network").nets[0].layers[-1].bias.add_(7)
        return a_loss.actor_loss(given)["q_policy"].item() - before == pytest.approx(7, rel=1e-4)

    assert follows(loss)
    frozen, critic = loss.__dict__["_frozen"], loss.network("value_network")
    assert all(a is b for a, b in zip(frozen.buffers(), critic.buffers())) and list(critic.buffers())
    twin = copy.deepcopy(loss)
    assert follows(twin)
    assert loss.actor_loss(batch)["q_policy"] != twin.actor_loss(batch)["q_policy"]
    loss.load_state_dict(twin.state_dict())
    assert loss.actor_loss(batch)["q_policy"] == twin.actor_loss(batch)["q_policy"] and follows(loss)
    step = Step(
        [Part(twin.parts()[0], torch.optim.SGD(list(twin.network("value_network").parameters()), 0.1))]
    )
    before = twin.actor_loss(batch)["q_policy"].item()
    step(batch)
    assert twin.actor_loss(batch)["q_policy"].item() != before


def test_the_actor_sees_the_updated_critic_and_targets_come_last():
    env = ToyEnv()
    loss, batch = nets(env), a_batch(env)
    value, actor = loss.parts()
    optims = [
        torch.optim.SGD(list(loss.network(n).parameters()), 0.1) for n in ("value_network", "actor_network")
    ]
    step = Step([Part(value, optims[0], name="critic"), Part(actor, optims[1], name="actor")],
                after=TargetUpdate(loss, tau=0.5))  # fmt: skip
    twin = copy.deepcopy(loss)
    metrics = step(batch.copy())
    net = twin.network("value_network")
    for p, g in zip(
        net.parameters(), torch.autograd.grad(twin.value_loss(batch)["loss_value"], list(net.parameters()))
    ):
        p.data -= 0.1 * g
    torch.testing.assert_close(metrics["q_policy"], twin.actor_loss(batch)["q_policy"])
    assert set(step.state_dict()["parts"]["1"]["loss"]) == set()  # kept once


@pytest.mark.parametrize("choices", [0, 3])
def test_a_compiled_loss_is_the_same(choices):
    env = ToyEnv(choices=choices)
    loss, batch = nets(env), a_batch(env)
    value, actor = loss.parts()
    if not choices:  # a draw is another one under compilation
        torch.testing.assert_close(
            torch.compile(value)(batch.copy())["loss_value"], value(batch)["loss_value"]
        )
    found, expected = torch.compile(actor)(batch.copy()), actor(batch)
    assert found.keys() == expected.keys()
    if not choices:
        torch.testing.assert_close(found["loss_actor"], expected["loss_actor"])


def test_torchrls_soft_update_moves_the_targets():
    env = ToyEnv()
    loss = nets(env)
    update = SoftUpdate(loss, tau=0.5)
    kept = loss.network("target_value_network").nets[0].layers[0].weight.clone()
    with torch.no_grad():
        loss.network("value_network").nets[0].layers[0].weight.add_(1)
    update.step()
    torch.testing.assert_close(loss.network("target_value_network").nets[0].layers[0].weight, kept + 0.5)


def test_groups_of_unlike_agents_see_each_other():
    env = ToyEnv(groups={"a": (2, 3, 1), "b": (1, 5, 2)})
    loss, batch = nets(env, ("a", "b")), a_batch(env)
    out = loss(batch)
    assert {"loss_value_a", "loss_value_b", "loss_actor_a", "loss_actor_b"} <= set(out.keys())
    actor = loss.network("actor_network")
    of_b = torch.autograd.grad(
        out["loss_actor_b"], list(actor.parameters()), retain_graph=True, allow_unused=True
    )
    touched = [g is not None and bool(g.abs().sum() > 0) for g in of_b]
    assert touched == [p.shape[0] == 1 for p in actor.parameters()]  # one agent in b, two in a
    changed = batch.clone()
    changed["a", "action"] += 0.5
    assert loss.actor_loss(changed)["loss_actor_b"] != out["loss_actor_b"]


def test_what_cannot_be_meant_is_named():
    env = ToyEnv(groups={"a": (2, 3, 1), "b": (1, 5, 2)})
    actor = tdmarl.deterministic_actor(env, "a")
    with pytest.raises(ValueError, match=r"actions of \['b'\].*group=\('a', 'b'\)"):
        both = tdmarl.action_critic(env, ("a", "b"))
        MADDPGLoss(actor, TensorDictSequential(both[0]))
    with pytest.raises(KeyError, match="state_action_value"):
        MADDPGLoss(actor, tdmarl.state_critic(env, "a"))
    critic = tdmarl.action_critic(env, "a")
    with pytest.raises(KeyError, match=r"\(group, 'action'\)"):
        MADDPGLoss(critic, critic)
    with pytest.raises(ValueError, match="memory"):
        MADDPGLoss(tdmarl.gaussian_actor(env, "a", recurrent="gru"), critic)
    for options, words in (({"others": "none"}, "others='none'"), ({"relaxation": "hard"}, "relaxation='hard'"),
                           ({"gamma": 1.5}, "gamma=1.5"), ({"n_steps": 0}, "n_steps=0")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            MADDPGLoss(actor, critic, **options)
    other = TensorDictModule(nn.Linear(3, 1), [("a", "observation")], [("a", "action")])
    with pytest.raises(ValueError, match="bounds"):
        MADDPGLoss(other, critic, target_noise=0.2)
    with pytest.raises(KeyError, match="action_reg"):
        MADDPGLoss(other, critic, action_reg=0.1)
    discrete = ToyEnv(choices=3)
    with pytest.raises(ValueError, match="discrete"):
        nets(discrete, target_noise=0.2)
    with pytest.raises(KeyError, match="is discrete"):
        silent = TensorDictModule(nn.Linear(4, 3), [(G, "observation")], [(G, "action")])
        MADDPGLoss(silent, tdmarl.action_critic(discrete))
