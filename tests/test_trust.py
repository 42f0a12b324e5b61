"""The trust region step against closed forms: Fisher matrices, linear systems, divergences."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical, Normal, kl_divergence
from torchrl.modules import ProbabilisticActor

import tdmarl
from tdmarl.actors import agent_actor
from tdmarl.distributions import ClippedNormal, MaskedCategorical, TanhNormal
from tdmarl.trust import TrustRegionStep, conjugate_gradient


class Row(nn.Module):
    """The same outputs for every observation."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, observation):
        return self.values.expand(*observation.shape[:-1], -1)


def actor_of(logits, kind=MaskedCategorical):
    net = TensorDictModule(Row(logits), in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticActor(
        net, in_keys=["logits"], out_keys=["action"], distribution_class=kind, return_log_prob=True,
        log_prob_key="action_log_prob",
    )  # fmt: skip


def rows(actor, advantage, action):
    td = TensorDict({"observation": torch.zeros(len(action), 1), "action": action}, [len(action)])
    td["action_log_prob"] = actor.get_dist(td).log_prob(action).detach()
    return td.set("advantage", torch.tensor(advantage).unsqueeze(-1))


def test_conjugate_gradients_solve_the_system_and_then_stand_still():
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    matrix, b = root @ root.T + torch.eye(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, b)
    for steps in (6, 30):
        torch.testing.assert_close(
            conjugate_gradient(lambda x: matrix @ x, b, steps), expected, rtol=1e-4, atol=1e-5
        )
    assert not conjugate_gradient(lambda x: matrix @ x, torch.zeros(6, dtype=torch.float64)).any()


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_step_of_a_softmax_is_the_natural_gradient_by_its_fisher_matrix(damping):
    """``F = diag(p) - p p^T``; with every action once in each of three rows ``g = p (A - sum p A)`` weighted so."""
    logits, advantage = [0.2, -0.3, 0.5], torch.tensor([1.0, -2.0, 0.5])
    actor = actor_of(logits)
    td = rows(actor, advantage.tolist(), torch.arange(3))
    step = TrustRegionStep(actor, max_kl=1e-4, damping=damping, cg_steps=20)
    found = step(td)
    p = torch.tensor(logits, dtype=torch.float64).softmax(-1)
    fisher = torch.diag(p) - torch.outer(p, p)
    score = torch.eye(3, dtype=torch.float64) - p  # d log p(a) / d logits, a row for each action
    g = (score * advantage.double().unsqueeze(-1)).mean(0)
    d = (
        torch.linalg.pinv(fisher) @ g
        if damping == 0
        else torch.linalg.solve(fisher + damping * torch.eye(3), g)
    )
    s = (2 * 1e-4 / (d @ (fisher + damping * torch.eye(3)) @ d)).sqrt() * d
    moved = actor.module[0].module.values.detach().double() - torch.tensor(logits, dtype=torch.float64)
    assert found["accepted"] == 1
    torch.testing.assert_close(moved, s, rtol=2e-3, atol=1e-5)
    assert found["expected_gain"].item() == pytest.approx((g @ s).item(), rel=1e-3)
    if damping == 0:  # what the region allows is used up, to second order
        assert found["kl"].item() == pytest.approx(1e-4, rel=0.05)


def test_divergences_are_the_closed_forms_of_torch():
    torch.manual_seed(0)
    (m, s), (k, t) = ((torch.randn(5, 3), torch.rand(5, 3) + 0.2) for _ in range(2))
    low, high = -torch.ones(3), torch.ones(3)
    expected = kl_divergence(Normal(m, s), Normal(k, t)).sum(-1)
    for kind in (ClippedNormal, TanhNormal):
        torch.testing.assert_close(kl_divergence(kind(m, s, low, high), kind(k, t, low, high)), expected)
    padded = torch.tensor([1.0, 1.0, -1.0])  # the third dimension is none
    torch.testing.assert_close(
        kl_divergence(ClippedNormal(m, s, low, padded), ClippedNormal(k, t, low, padded)),
        kl_divergence(Normal(m, s), Normal(k, t))[:, :2].sum(-1),
    )
    a, b = torch.randn(2, 5, 4)
    mask = torch.tensor([True, True, False, True])
    some = kl_divergence(Categorical(logits=a[:, mask]), Categorical(logits=b[:, mask]))
    torch.testing.assert_close(
        kl_divergence(*(MaskedCategorical(x, mask.expand(5, 4)) for x in (a, b))), some
    )
    parts = sum(kl_divergence(Categorical(logits=x), Categorical(logits=y)) for x, y in ((a, b), (b, a)))
    both = [MaskedCategorical(torch.cat(pair, -1), nvec=(4, 4)) for pair in ((a, b), (b, a))]
    torch.testing.assert_close(kl_divergence(*both), parts)


@pytest.mark.parametrize("discrete", [False, True])
def test_accepted_steps_keep_the_bound_and_gain_and_refused_ones_leave_all_as_it_was(discrete):
    """Measured again from outside. A bound that is far too wide for a quadratic makes the search refuse some."""
    torch.manual_seed(1)
    accepted = refused = 0
    for trial in range(12):
        max_kl = 0.01 if trial % 2 else 30.0
        game = (
            tdmarl.matrix_game(torch.randn(3, 3), num_envs=40, seed=trial)
            if discrete
            else tdmarl.continuous_game(lambda a: -(a - 0.5).square(), n_agents=2, num_envs=40)
        )
        group = tdmarl.stochastic_actor(game, share_params=False, hidden=(8,))
        actor = agent_actor(group, 0, {})
        with torch.no_grad():
            td = group(game.reset())["agents"]
        mine = TensorDict({k: td[k][:, 0] for k in ("observation", "action", "action_log_prob")}, [40])
        mine["advantage"] = torch.randn(40, 1)
        before, old = actor.get_dist(mine), [p.clone() for p in actor.parameters()]
        options = {} if max_kl < 1 else {"line_search_steps": 1, "accept_ratio": 0.9}
        found = TrustRegionStep(actor, max_kl=max_kl, **options)(mine)
        after = actor.get_dist(mine)
        kl = kl_divergence(before, after).mean()
        gain = (
            ((after.log_prob(mine["action"]) - mine["action_log_prob"]).exp() - 1) * mine["advantage"][:, 0]
        ).mean()
        if found["accepted"]:
            accepted += 1
            assert 0 < kl < max_kl and gain > 0
            torch.testing.assert_close(found["kl"], kl, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(found["surrogate_gain"], gain, rtol=1e-3, atol=1e-6)
        else:
            refused += 1
            assert found["kl"] == found["surrogate_gain"] == 0
            assert all(torch.equal(p, q) for p, q in zip(actor.parameters(), old))
    assert accepted >= 6 and refused >= 2


def test_dead_rows_have_no_part():
    logits, results = [0.1, 0.4, -0.2], []
    for spoiled in (False, True):
        actor = actor_of(logits)
        td = rows(actor, [1.0, -1.0, 0.3, 5.0], torch.tensor([0, 1, 2, 0]))
        td["mask"] = torch.tensor([True, True, True, False])
        if spoiled:
            td["action_log_prob"][3], td["advantage"][3] = -80.0, 1e9
        TrustRegionStep(actor)(td)
        results.append(actor.module[0].module.values.detach())
    torch.testing.assert_close(*results)


def test_a_search_without_reading_the_host_finds_the_same(monkeypatch):
    results = []
    for host in (True, False):
        monkeypatch.setattr("tdmarl.host.is_free", lambda device, host=host: host)
        actor = actor_of([0.1, 0.4, -0.2])
        td = rows(actor, [1.0, -1.0, 0.3], torch.arange(3))
        found = TrustRegionStep(actor, max_kl=0.3, accept_ratio=0.7)(td)
        results.append([actor.module[0].module.values.detach(), found["kl"], found["surrogate_gain"]])
    for one, other in zip(*results):
        assert torch.equal(one, other)


def test_a_step_runs_on_meta_where_a_host_read_or_a_device_mix_raises():
    game = tdmarl.continuous_game(lambda a: -(a - 0.5).square(), n_agents=2, num_envs=4)
    actor = agent_actor(tdmarl.gaussian_actor(game, share_params=False, hidden=(8,)), 1, {}).to("meta")
    td = TensorDict({"observation": torch.zeros(4, 1), "action": torch.zeros(4, 1)}, [4])
    td["action_log_prob"], td["advantage"] = torch.zeros(4), torch.zeros(4, 1)
    td["observation"] = torch.zeros(4, *game.reset()["agents", "observation"].shape[2:])
    assert TrustRegionStep(actor)(td.to("meta"))["kl"].device.type == "meta"


def test_bad_arguments_say_what_would_do():
    actor = actor_of([0.0, 0.0])
    for wrong in (
        {"max_kl": 0.0},
        {"backtrack": 1.0},
        {"accept_ratio": 0.0},
        {"damping": -1.0},
        {"cg_steps": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TrustRegionStep(actor, **wrong)
    with pytest.raises(ValueError, match="second derivatives"):
        TrustRegionStep(actor).accelerate("compile")
    with pytest.raises(ValueError, match="one of"):
        TrustRegionStep(actor).accelerate("fast")
