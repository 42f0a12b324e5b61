"""Advantages against hand computation and against the buffers of MAPPO's code."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from toys import ToyEnv

from tdmarl import prepare
from tdmarl.actors import gaussian_actor
from tdmarl.critics import NormalizedCritic, ValueNorm, state_critic
from tdmarl.prepare import Advantage, JointAdvantage, RewardNorm, TeamReward, generalized_advantage
from tdmarl.recurrent import AgentRNN, Recurrent


REWARD = torch.arange(1.0, 6.0)
VALUE = torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1])
NEXT = torch.tensor([0.4, 0.3, 7.0, 0.1, 0.6])  # at the time limit (t = 2) the true last state is worth 7
TERMINATED = torch.tensor([0, 0, 0, 1, 0], dtype=torch.bool)
TRUNCATED = torch.tensor([0, 0, 1, 0, 0], dtype=torch.bool)
DONE = TERMINATED | TRUNCATED
MAPPO_NORM = [1.0, 3.0, 8.0]


def column(x):
    return x.reshape(1, 5, 1, 1)


def batch():
    """``[E, T] = [1, 5]``, one agent whose observation is its value."""
    ends = {"done": DONE.reshape(1, 5, 1), "terminated": TERMINATED.reshape(1, 5, 1)}
    after = {"g": {"observation": column(NEXT), "reward": column(REWARD)}, **ends}
    return TensorDict({"g": {"observation": column(VALUE)}, "next": after}, [1, 5])


def critic():
    return TensorDictModule(
        torch.nn.Identity(), in_keys=[("g", "observation")], out_keys=[("g", "state_value")]
    )


def advantage(critic, **options):
    return Advantage(critic, ["g"], gamma=0.9, lmbda=0.8, standardize=None, **options)


def test_advantage_cuts_at_ends_and_bootstraps_at_the_time_limit():
    """Worked out by hand: A_4 = 5 + .9 .6 - .1 = 5.44; A_3 = 4 - .2 = 3.8; A_2 = 3 + .9 7 - .3 = 9 (cut);
    A_1 = 2 + .9 .3 - .4 + .72 9 = 8.35; A_0 = 1 + .9 .4 - .5 + .72 8.35 = 6.872."""
    td = advantage(critic())(batch())
    expected = torch.tensor([6.872, 8.35, 9.0, 3.8, 5.44])
    torch.testing.assert_close(td["g", "advantage"].flatten(), expected)
    torch.testing.assert_close(td["g", "value_target"].flatten(), torch.tensor([7.372, 8.75, 9.3, 4.0, 5.54]))


@pytest.mark.parametrize("entries", [1, 10, 12])
def test_advantages_are_estimated_some_rows_at_a_time(entries, monkeypatch):
    """The case by hand in each of three rows, with rewards, values and results 1, 2 and 3 times as large."""
    pieces = prepare._ON_CPU._replace(entries=entries)  # rows of five: one, two and two at a time
    monkeypatch.setattr(prepare, "_ON_CPU", pieces)
    td = torch.cat([batch().apply(lambda x, k=k: x if x.dtype == torch.bool else x * k) for k in (1, 2, 3)])
    td = advantage(critic())(td)
    expected = torch.tensor([6.872, 8.35, 9.0, 3.8, 5.44]) * torch.tensor([[1.0], [2.0], [3.0]])
    torch.testing.assert_close(td["g", "advantage"].squeeze(-1).squeeze(-1), expected)


def test_time_limit_as_termination_gives_the_numbers_of_mappos_buffer():
    following = torch.cat([VALUE[1:], NEXT[-1:]])
    found, _ = generalized_advantage(
        *(column(x) for x in (REWARD, VALUE, following, DONE, DONE)), gamma=0.9, lmbda=0.8
    )
    torch.testing.assert_close(found.flatten(), torch.tensor([3.60608, 3.814, 2.7, 3.8, 5.44]))


def test_advantage_in_reward_units_with_value_normalization():
    """The critic's 0.5 means 5.47196 by the moments of 1, 3, 8."""
    norm = ValueNorm()
    norm.update(torch.tensor(MAPPO_NORM).reshape(3, 1, 1))
    td = advantage(NormalizedCritic(critic(), {"g": norm}))(batch())
    expected = torch.tensor([17.04087, 20.984594, 25.146698, 4.0, 10.189717])
    torch.testing.assert_close(td["g", "value_target"].flatten(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(td["g", "state_value_normalized"].flatten(), VALUE)
    assert td["g", "state_value"].flatten()[0].item() == pytest.approx(5.47196, abs=1e-5)


def test_a_critic_is_asked_about_some_rows_at_a_time(monkeypatch):
    """Two of four environments' five steps each: its layers' outputs would else be larger than the batch."""
    whole = advantage(critic())(torch.cat([batch()] * 4))
    monkeypatch.setattr(prepare, "_ON_CPU", prepare._ON_CPU._replace(rows=10, parts=1000))
    asked, careful = [], critic()
    careful.register_forward_hook(lambda module, inputs, out: asked.append(out.numel()))
    found = advantage(careful)(torch.cat([batch()] * 4))
    assert asked[:2] == [10, 10]
    for key in ("state_value", "advantage", "value_target"):
        assert (found["g", key] == whole["g", key]).all()


def test_the_way_without_host_reads_gives_the_same(monkeypatch):
    plain = advantage(critic())(batch())
    other = advantage(critic())
    td = batch()
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda *a, **k: pytest.fail("read the host"))
    monkeypatch.setattr("tdmarl.host.is_free", lambda device: False)
    torch.testing.assert_close(other(td)["g", "advantage"], plain["g", "advantage"])


def test_equals_torchrls_estimator():
    from torchrl.objectives.value import GAE

    torch.manual_seed(0)
    shape = (3, 20, 2, 1)
    reward, value, after = torch.randn(3, *shape).unbind(0)
    terminated, done = torch.rand(shape) < 0.1, torch.rand(shape) < 0.1
    done = done | terminated
    td = TensorDict(
        {
            "state_value": value,
            "next": {"state_value": after, "reward": reward, "done": done, "terminated": terminated},
        },
        [3, 20],
    )
    GAE(gamma=0.9, lmbda=0.7, value_network=None, time_dim=1)(td)
    found, target = generalized_advantage(reward, value, after, done, terminated, gamma=0.9, lmbda=0.7)
    torch.testing.assert_close(found, td["advantage"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(target, td["value_target"], atol=1e-5, rtol=1e-5)


def test_advantages_are_standardized_once_over_live_agents():
    td = batch().repeat_interleave(4, 0)
    mask = torch.rand(4, 5, 1) < 0.6
    td["g", "mask"] = mask
    out = Advantage(critic(), ["g"], standardize="group")(td)["g", "advantage"].squeeze(-1)
    assert out[mask].mean().abs() < 1e-6 and out[mask].std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert not out[~mask].any()


def test_a_critic_of_actions_is_told_the_next_ones():
    """At t the bootstrap must use what the others did at t + 1, and what the actor would do where the batch ends."""
    env = ToyEnv(batch=(2,), horizon=100)
    actor = gaussian_actor(env)
    value = state_critic(env, other_actions=True)
    with torch.no_grad():
        td = env.rollout(6, actor)
        prepared = Advantage(value, ["agents"], gamma=1.0, lmbda=0.0, standardize=None, actor=actor)(
            td.copy()
        )
        delta = (
            prepared["agents", "advantage"]
            + prepared["agents", "state_value"]
            - td["next", "agents", "reward"]
        )
    torch.testing.assert_close(delta[:, :-1], prepared["agents", "state_value"][:, 1:], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(delta).all()
    with pytest.raises(ValueError, match="actor="):
        Advantage(value, ["agents"])


def test_root_ends_serve_every_agent_and_missing_ones_are_named():
    td = batch()
    del td["next", "terminated"]
    with pytest.raises(KeyError, match="terminated"):
        advantage(critic())(td)


@pytest.mark.parametrize("how, expected", [("sum", 7.0), ("mean", 7 / 3)])
def test_team_reward_adds_up_all_agents(how, expected):
    td = TensorDict(
        {"next": {"a": {"reward": torch.tensor([[[1.0], [2.0]]])}, "b": {"reward": torch.tensor([[[4.0]]])}}},
        [1],
    )
    assert TeamReward(["a", "b"], how)(td)["next", "reward"].item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="mean"):
        TeamReward(["a"], "first")


def remembering():
    """A batch ``[2, 6]`` of two agents, cut by a time limit and by a termination in the middle of its first row."""
    torch.manual_seed(0)
    net = AgentRNN(2, 3, 1, hidden=(4,), hidden_size=5)
    critic = Recurrent(
        net, [("g", "observation")], [("g", "state_value")], ("g", "critic_hidden"), net.state_shape
    )
    observation, last = torch.randn(2, 6, 2, 3), torch.randn(2, 6, 2, 3)
    terminated, truncated = torch.zeros(2, 6, 1, dtype=torch.bool), torch.zeros(2, 6, 1, dtype=torch.bool)
    truncated[0, 2], terminated[0, 4] = True, True
    done = terminated | truncated
    is_init = torch.cat([torch.zeros(2, 1, 1, dtype=torch.bool), done[:, :-1]], 1)
    hidden = torch.randn(2, 6, 2, 1, 5).tanh()
    following = torch.where(done.unsqueeze(-1), last, torch.cat([observation[:, 1:], last[:, -1:]], 1))
    after = {"g": {"observation": following, "reward": torch.randn(2, 6, 2, 1)}}
    agents = {"observation": observation, "critic_hidden": hidden}
    ends = {"done": done, "terminated": terminated}
    return critic, net, TensorDict({"g": agents, "is_init": is_init, "next": {**after, **ends}}, [2, 6])


def by_hand(net, td, gamma, lmbda):
    """Advantages and states by one network call after the other, a step of one environment each."""
    goes_on = torch.zeros(1, dtype=torch.bool)
    advantage, before = torch.zeros(2, 6, 2, 1), torch.zeros(2, 6, 2, 1, 5)
    for row in range(2):
        state, values, nexts = td["g", "critic_hidden"][row, 0], [], []
        for t in range(6):
            if td["is_init"][row, t]:
                state = torch.zeros_like(state)
            before[row, t] = state
            value, state = net(td["g", "observation"][row, t], state, goes_on)
            last, _ = net(td["next", "g", "observation"][row, t], state, goes_on)
            values.append(value), nexts.append(last)
        running = torch.zeros(2, 1)
        for t in reversed(range(6)):
            over = bool(td["next", "done"][row, t])
            ahead = 0 if td["next", "terminated"][row, t] else gamma * nexts[t]
            delta = td["next", "g", "reward"][row, t] + ahead - values[t]
            running = delta + (0 if over else gamma * lmbda * running)
            advantage[row, t] = running
    return advantage, before


@pytest.mark.parametrize("on_host", [True, False])
def test_a_recurrent_critic_values_true_last_observations_with_the_state_before_them(on_host, monkeypatch):
    critic, net, td = remembering()
    with torch.no_grad():
        expected, before = by_hand(net, td, 0.9, 0.8)
    if not on_host:
        monkeypatch.setattr(torch.Tensor, "nonzero", lambda *a, **k: pytest.fail("read the host"))
        monkeypatch.setattr("tdmarl.host.is_free", lambda device: False)
    prepare = advantage(critic)
    assert ("next", "g", "critic_hidden") not in prepare.in_keys and (
        "next",
        "is_init",
    ) not in prepare.in_keys
    found = prepare(td.copy())
    torch.testing.assert_close(found["g", "advantage"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["g", "critic_hidden"], before, atol=1e-5, rtol=1e-5)
    assert ("next", "g", "critic_hidden") not in found.keys(True)


def test_the_teams_critic_may_remember_too():
    critic, net, td = remembering()
    env = ToyEnv(groups={"g": (2, 3, 1)})
    joint = state_critic(env, joint=True, recurrent=5, hidden=(4,))
    td["critic_hidden"] = torch.randn(2, 6, 1, 1, 5)
    out = JointAdvantage(joint, ["g"], [2], gamma=0.9, lmbda=0.8, standardize=False)(td.copy())
    assert out["state_value"].shape == (2, 6, 1) and out["critic_hidden"].shape == (2, 6, 1, 1, 5)
    inner, seen = joint.module.net, lambda o: o.flatten(-2).unsqueeze(-2)
    team = TensorDict(
        {"g": {"observation": seen(td["g", "observation"])}, "next": td["next"].clone()}, [2, 6]
    )
    team["is_init"], team["g", "critic_hidden"] = td["is_init"], td["critic_hidden"]
    team["next", "g"] = TensorDict(
        observation=seen(td["next", "g", "observation"]),
        reward=(td["next", "g", "reward"].sum(-2, keepdim=True) / 2).expand(2, 6, 2, 1),
        batch_size=[2, 6],
    )
    wide = AgentRNN(1, 6, 1, hidden=(4,), hidden_size=5)
    wide.load_state_dict(inner.state_dict())
    with torch.no_grad():
        expected, _ = by_hand(wide, team, 0.9, 0.8)
    torch.testing.assert_close(out["g", "advantage"], expected, atol=1e-5, rtol=1e-5)


def test_a_recurrent_critic_without_its_state_says_who_would_write_it():
    critic, _, td = remembering()
    with pytest.raises(KeyError, match="critic_hidden.*CarryHidden"):
        advantage(critic)(td.exclude(("g", "critic_hidden")))


def test_reward_moments_are_those_of_all_batches_together():
    """Exact over batches of unlike sizes, live entries only; the standard deviation is numpy's."""
    torch.manual_seed(0)
    norm, seen = RewardNorm(), []
    for size in (3, 50, 7):
        reward, mask = torch.randn(size, 2, 1) * 5 + 3, torch.rand(size, 2) < 0.7
        norm.update(reward, mask)
        seen.append(reward.squeeze(-1)[mask])
    every = torch.cat(seen).double()
    assert norm.count == len(every)
    torch.testing.assert_close(norm.mean, every.mean())
    torch.testing.assert_close(norm.variance.sqrt(), every.std(correction=0))
    torch.testing.assert_close(norm.normalize(every).std(correction=0), torch.ones((), dtype=torch.float64))
    fresh = RewardNorm()
    assert fresh.normalize(torch.tensor([2.0])).item() == 2
    fresh.update(torch.full((4, 1), 3.0))  # a constant does not blow up
    assert fresh.normalize(torch.tensor([3.0])).item() == 0
