from __future__ import annotations

import pytest
import torch
from toys import ToyEnv

from tdmarl.critics import ValueNorm, state_critic

TWO = {"a": (2, 3, 1), "b": (1, 5, 2)}


def test_value_norm_gives_the_numbers_of_mappos_code():
    norm = ValueNorm()
    three = torch.tensor([3.0])
    assert norm.normalize(three).item() == pytest.approx(30) and norm.denormalize(
        three
    ).item() == pytest.approx(0.3)
    norm.update(torch.tensor([[1.0], [3.0], [8.0]]))
    mean, std = norm.moments()
    assert mean.item() == pytest.approx(4) and std.square().item() == pytest.approx(8.66667, abs=1e-5)
    assert norm.normalize(three).item() == pytest.approx(-0.339683, abs=1e-6)
    assert norm.denormalize(torch.tensor([0.5])).item() == pytest.approx(5.47196, abs=1e-5)


def test_value_norm_is_an_average_that_forgets_slowly():
    norm = ValueNorm()
    norm.update(torch.tensor([[1.0], [3.0]]))
    norm.update(torch.tensor([[5.0], [7.0]]))
    mean, std = norm.moments()
    assert mean.item() == pytest.approx(4.00001, abs=2e-6) and std.square().item() == pytest.approx(
        5, abs=1e-3
    )


def test_value_norm_of_nobody_learns_nothing():
    norm = ValueNorm()
    norm.update(torch.ones(2, 3, 1), torch.ones(2, 3, dtype=torch.bool))
    before = norm.state_dict()
    before = {k: v.clone() for k, v in before.items()}
    norm.update(torch.full((2, 3, 1), 9.0), torch.zeros(2, 3, dtype=torch.bool))
    assert all(torch.equal(v, norm.state_dict()[k]) for k, v in before.items())


def test_value_norm_apart_for_each_agent():
    norm = ValueNorm((2, 1))
    norm.update(torch.tensor([[[1.0], [10.0]], [[3.0], [30.0]]]))
    assert norm.moments()[0].flatten().tolist() == [2.0, 20.0]


@pytest.mark.parametrize("scope, sees_others", [("agent", False), ("group", True), ("team", True)])
def test_scope_is_what_the_value_depends_on(scope, sees_others):
    env = ToyEnv(groups=TWO)
    critic, td = state_critic(env, ("a", "b"), scope=scope), env.reset()
    td["a", "observation"].requires_grad_(), td["b", "observation"].requires_grad_()
    out = critic(td)
    assert out["a", "state_value"].shape == (4, 2, 1) and out["b", "state_value"].shape == (4, 1, 1)
    mine, other = torch.autograd.grad(
        out["a", "state_value"][:, 0].sum(),
        [td["a", "observation"], td["b", "observation"]],
        allow_unused=True,
    )
    assert mine[:, 0].any() and mine[:, 1].any() == sees_others
    assert (other is not None and bool(other.any())) == (scope == "team")


def test_scope_state_reads_the_root():
    env = ToyEnv(state=True)
    assert state_critic(env, scope="state").in_keys == ["state"]
    with pytest.raises(ValueError, match="scope='team'"):
        state_critic(ToyEnv(), scope="state")
    with pytest.raises(ValueError, match="scope='all'"):
        state_critic(env, scope="all")


@pytest.mark.parametrize("scope", ["agent", "team"])
def test_other_actions_has_exactly_no_gradient_to_the_own_action(scope):
    env = ToyEnv(groups=TWO)
    critic, td = state_critic(env, ("a", "b"), scope=scope, other_actions=True), env.reset()
    td["a", "action"] = torch.randn(4, 2, 1, requires_grad=True)
    td["b", "action"] = torch.randn(4, 1, 2, requires_grad=True)
    out = critic(td)
    for group, index in (("a", 0), ("a", 1), ("b", 0)):
        grads = dict(zip("ab", torch.autograd.grad(
            out[group, "state_value"][:, index].sum(), [td["a", "action"], td["b", "action"]], retain_graph=True
        )))  # fmt: skip
        for other, n in (("a", 2), ("b", 1)):
            for i in range(n):
                own = (other, i) == (group, index)
                assert bool(grads[other][:, i].any()) != own


def test_other_discrete_actions_are_one_hot():
    env = ToyEnv(choices=3)
    critic, td = state_critic(env, other_actions=True), env.reset()
    td["agents", "action"] = torch.zeros(4, 3, dtype=torch.int64)
    before = critic(td.clone())["agents", "state_value"]
    td["agents", "action"][:, 1] = 2
    changed = (critic(td)["agents", "state_value"] != before).any(0).flatten()
    assert changed.tolist() == [True, False, True]


def test_agent_id_lets_a_shared_critic_tell_agents_apart():
    env = ToyEnv()
    td = env.reset()
    apart = state_critic(env)(td.clone())["agents", "state_value"]
    same = state_critic(env, agent_id=False)(td.clone())["agents", "state_value"]
    assert not torch.allclose(apart[:, 0], apart[:, 1]) and torch.equal(same[:, 0], same[:, 1])
