"""The temporal-difference loss against numbers of the papers' code, TorchRL's losses, and identities."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Categorical
from torchrl.objectives import DQNLoss, SoftUpdate, ValueEstimators
from torchrl.objectives.multiagent import QMixerLoss
from toys import SeededLinear, ToyEnv

import tdmarl
from tdmarl import reduce
from tdmarl.mixers import QMIXMixer
from tdmarl.mixing import MixingLoss, td_returns
from tdmarl.step import Part, Step
from tdmarl.targets import TargetUpdate

G = "agents"
GAMMA, B, T, N, K = 0.9, 2, 3, 2, 3


class Table(nn.Module):
    """Values ``[n, o, K]`` looked up by the one number that an agent observes."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, observation):
        index = observation.long().squeeze(-1)  # [*B, n]
        return torch.stack([self.table[i][index[..., i]] for i in range(len(self.table))], -2)


def fixture_data():
    """Two episodes, one cut by a time limit, one terminated and padded, as the formulas of the fixture say."""
    shape = (B, T)
    obs, nxt = np.zeros((B, T, N, 1)), np.zeros((B, T, N, 1))
    avail, navail = np.zeros((B, T, N, K), bool), np.zeros((B, T, N, K), bool)
    state, nstate = np.zeros((B, T, 2)), np.zeros((B, T, 2))
    action, reward = np.zeros((B, T, N), int), np.zeros((B, T, 1))
    term, done, filled = np.zeros((B, T, 1), bool), np.zeros((B, T, 1), bool), np.zeros((B, T), bool)

    def seen(b, t, i):
        return (t + b + i) % 3, np.array([not (t > 0 and a == (t + i) % 3) for a in range(K)])

    for b, length in ((0, 3), (1, 2)):
        for t in range(length):
            filled[b, t] = True
            state[b, t], nstate[b, t] = ([0.5 * b + 0.25 * s, 1 - 0.5 * s] for s in (t, t + 1))
            reward[b, t] = 1 + t - 2 * b
            for i in range(N):
                obs[b, t, i], avail[b, t, i] = seen(b, t, i)
                nxt[b, t, i], navail[b, t, i] = seen(b, t + 1, i)
                action[b, t, i] = (2 * i + 1 + b) % 3 if t == 0 else (t + i + 1) % 3
        done[b, length - 1], term[b, length - 1] = True, b == 1
    arrays = dict(obs=obs, nxt=nxt, avail=avail, navail=navail, state=state, nstate=nstate, action=action,
                  reward=reward, term=term, done=done, filled=filled)  # fmt: skip
    t = {k: torch.as_tensor(v, dtype=torch.float32 if v.dtype == float else None) for k, v in arrays.items()}
    per_agent = t["reward"].unsqueeze(-2).expand(B, T, N, 1).clone()
    following = {
        G: {"observation": t["nxt"], "action_mask": t["navail"], "reward": per_agent},
        "state": t["nstate"], "reward": t["reward"], "done": t["done"], "terminated": t["term"],
    }  # fmt: skip
    batch = {
        G: {"observation": t["obs"], "action_mask": t["avail"], "action": t["action"]}, "state": t["state"],
        "next": following, "collector": {"mask": t["filled"]},
    }  # fmt: skip
    return arrays, TensorDict(batch, batch_size=shape)


def tables():
    i, o, a = np.meshgrid(np.arange(N), np.arange(3), np.arange(K), indexing="ij")
    online = 0.3 * (i + 1) * np.cos(1 + o + 2 * a + i)
    return online, 0.5 * online + 0.1 * a


SHAPES = [(4, 2), (4,), (2, 2), (2,), (2, 2), (2,), (2, 2), (2,), (1, 2), (1,)]  # w1, w_final, b1, V.0, V.2


def mixer_parameters(c):
    return [c * np.cos(1.3 * np.arange(math.prod(s)) + j).reshape(s) for j, s in enumerate(SHAPES)]


def numpy_mix(q, s, p):
    """The mixing network written out; ``q`` ``[2]``, ``s`` ``[2]``."""
    w1 = np.abs(p[0] @ s + p[1]).reshape(N, 2)
    hidden = q @ w1 + (p[4] @ s + p[5])
    hidden = np.where(hidden > 0, hidden, np.exp(hidden) - 1)
    v = p[8] @ np.maximum(p[6] @ s + p[7], 0) + p[9]
    return (hidden @ np.abs(p[2] @ s + p[3]) + v).item()


def numpy_loss(arrays, kind, double_q):
    """The three losses by loops over episodes, steps and agents, from their definition."""
    online, target = tables()
    p, p_target = mixer_parameters(1.0), mixer_parameters(0.5)
    total = count = 0.0
    for b in range(B):
        for t in range(T):
            if not arrays["filled"][b, t]:
                continue
            chosen, following = np.zeros(N), np.zeros(N)
            for i in range(N):
                chosen[i] = online[i, int(arrays["obs"][b, t, i, 0]), arrays["action"][b, t, i]]
                o, available = int(arrays["nxt"][b, t, i, 0]), arrays["navail"][b, t, i]
                by = np.where(available, online[i, o] if double_q else target[i, o], -np.inf)
                following[i] = target[i, o, by.argmax()]
            r, go_on = arrays["reward"][b, t, 0], 1.0 - arrays["term"][b, t, 0]
            if kind == "iql":
                total += ((r + GAMMA * go_on * following - chosen) ** 2).sum()
                count += N
                continue
            mix = (lambda q, s, p: q.sum()) if kind == "vdn" else numpy_mix
            now = mix(chosen, arrays["state"][b, t], p)
            later = mix(following, arrays["nstate"][b, t], p_target)
            total, count = total + (r + GAMMA * go_on * later - now) ** 2, count + 1
    return total / count


def fixture_loss(kind, **options):
    online, target = (torch.tensor(x, dtype=torch.float32) for x in tables())
    actor = TensorDictModule(Table(online), [(G, "observation")], [(G, "action_value")])
    mixer = None
    if kind == "vdn":
        mixer = TensorDictModule(
            tdmarl.mixers.VDNMixer(), [(G, "chosen_action_value")], ["chosen_action_value"]
        )
    elif kind == "qmix":
        net = QMIXMixer(N, 2, embed_dim=2, hypernet_layers=1)
        mixer = TensorDictModule(net, [(G, "chosen_action_value"), "state"], ["chosen_action_value"])
        fill(net, 1.0)
    loss = MixingLoss(actor, mixer, gamma=GAMMA, **options)
    with torch.no_grad():
        loss.target_local_value_network.module.table.copy_(target)
    if kind == "qmix":
        fill(loss.target_mixer_network.module, 0.5)
    return loss


def fill(net, c):
    ordered = [net.hyper_w_1, net.hyper_w_final, net.hyper_b_1, net.V[0], net.V[2]]
    with torch.no_grad():
        for p, value in zip(
            (p for layer in ordered for p in (layer.weight, layer.bias)), mixer_parameters(c)
        ):
            p.copy_(torch.as_tensor(value))


# pymarl's q_learner on the same data; QMIX's by the loops above, which give the other four numbers, too
PYMARL = {
    ("iql", True): 4.835140,
    ("iql", False): 4.826468,
    ("vdn", True): 6.985057,
    ("vdn", False): 6.967650,
}


@pytest.mark.parametrize("double_q", [True, False])
@pytest.mark.parametrize("kind", ["iql", "vdn", "qmix"])
def test_the_loss_is_that_of_the_papers_code(kind, double_q):
    arrays, batch = fixture_data()
    expected = numpy_loss(arrays, kind, double_q)
    if kind != "qmix":
        assert expected == pytest.approx(PYMARL[kind, double_q], abs=2e-6)
    found = fixture_loss(kind, double_q=double_q)(batch)["loss_value"]
    assert found.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["iql", "vdn", "qmix"])
def test_what_cannot_be_done_and_padding_have_no_part(kind):
    """Unavailable actions with huge values, padded steps with anything in them: the same loss and gradient."""

    def gradient(change):
        _, batch = fixture_data()
        loss = fixture_loss(kind)
        change(loss, batch)
        value = loss(batch)["loss_value"]
        return [value.detach(), *torch.autograd.grad(value, list(loss.parameters()))]

    def spoil_padding(loss, batch):
        pad = ~batch["collector", "mask"]
        batch[G, "observation"][pad] = 2.0
        batch["next", "state"][pad] = 1e6
        batch["next", "reward"][pad] = float("inf")
        batch["next", G, "reward"][pad] = float("nan")
        batch[G, "action_mask"][pad] = False

    def raise_unavailable(loss, batch):
        batch[G, "action_mask"][..., 2] |= batch[G, "action"] == 2
        batch["next", G, "action_mask"][..., 0] = False
        with torch.no_grad():
            for net in (loss.local_value_network, loss.target_local_value_network):
                net.module.table[..., 0] += 1e4

    def same_without(loss, batch):
        batch["next", G, "action_mask"][..., 0] = False

    clean = gradient(lambda loss, batch: None)
    for a, b in zip(gradient(spoil_padding), clean):
        torch.testing.assert_close(a, b)
    _, batch = fixture_data()
    if not (batch[G, "action"][batch["collector", "mask"]] == 0).any():  # nobody took the raised one
        for a, b in zip(gradient(raise_unavailable), gradient(same_without)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["iql", "vdn", "qmix"])
def test_no_available_action_is_worth_nothing_and_never_infinite(kind):
    _, batch = fixture_data()
    batch["next", G, "action_mask"][0, 0] = False
    loss = fixture_loss(kind, reduction="none", double_q=False)
    values = loss(batch)["loss_value"]
    assert torch.isfinite(values).all()
    if kind == "iql":  # no future: (r - q)^2
        q = torch.tensor(tables()[0][0, 0, 1])
        assert values[0, 0, 0].item() == pytest.approx(((1 - q) ** 2).item(), abs=1e-5)


def test_reduction_weights_and_priorities():
    _, batch = fixture_data()
    each = fixture_loss("vdn", reduction="none")(batch.copy())["loss_value"]
    assert each.shape == (B, T, 1) and each[1, 2].item() == 0  # padding
    assert fixture_loss("vdn", reduction="sum")(batch.copy())["loss_value"].item() == pytest.approx(
        each.sum().item()
    )
    weighted = batch.copy().set("priority_weight", torch.tensor([[1.0], [0.5]]).expand(B, T))
    loss = fixture_loss("vdn", reduction="sum")
    expected = each[0].sum() + 0.5 * each[1].sum()
    torch.testing.assert_close(loss(weighted)["loss_value"], expected)
    torch.testing.assert_close(weighted["td_error"].square(), each.detach())
    loss.set_keys(priority=("mine", "priority"), priority_weight="unread")
    loss(weighted)
    torch.testing.assert_close(weighted["mine", "priority"], weighted["td_error"])
    per_agent = batch.copy()
    each = fixture_loss("iql", reduction="none")(per_agent)["loss_value"]
    torch.testing.assert_close(per_agent["td_error"].square(), each.detach().amax(-2))


@pytest.mark.parametrize("double_q", [True, False])
def test_independent_agents_are_torchrls_dqn_where_everybody_lives(double_q):
    env = ToyEnv()
    env = ToyEnv(choices=3)
    actor = tdmarl.q_actor(env)
    batch = tdmarl.Collector(
        env, tdmarl.exploring(actor, tdmarl.EpsilonGreedy(env)), frames_per_batch=40
    ).rollout()
    batch = batch.reshape(-1)
    for name in ("done", "terminated"):
        batch["next", G, name] = batch["next", name].unsqueeze(-2).expand(40, 3, 1)
    theirs = DQNLoss(actor, action_space="categorical", delay_value=True, double_dqn=double_q)
    theirs.set_keys(reward=(G, "reward"), done=(G, "done"), terminated=(G, "terminated"), action=(G, "action"),
                    action_value=(G, "action_value"), value=(G, "chosen_action_value"), priority="other")  # fmt: skip
    theirs.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    ours = MixingLoss(actor, gamma=0.9, double_q=double_q)
    with torch.no_grad():
        for target in (theirs.target_value_network_params, ours.target_local_value_network_params):
            target.apply(lambda x: x.data.mul_(0.7))
    a, b = ours(batch.copy())["loss_value"], theirs(batch.copy())["loss"]
    torch.testing.assert_close(a, b)
    for x, y in zip(*(torch.autograd.grad(v, list(actor.parameters())) for v in (a, b))):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("mixer", [tdmarl.vdn_mixer, tdmarl.qmix_mixer])
def test_our_mixers_work_in_torchrls_loss_and_give_the_same(mixer):
    env = ToyEnv(choices=3, state=True)
    actor, mix = tdmarl.q_actor(env), mixer(env)
    batch = tdmarl.Collector(env, actor, frames_per_batch=40, seed=0).rollout()
    batch = tdmarl.TeamReward([G], "mean")(batch).reshape(-1)
    theirs = QMixerLoss(actor, mix, action_space="categorical")
    theirs.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    SoftUpdate(theirs, tau=0.5)
    ours = MixingLoss(actor, mix, gamma=0.9, double_q=False)
    a, b = ours(batch.copy())["loss_value"], theirs(batch.copy())["loss"]
    torch.testing.assert_close(a, b)
    params = [*actor.parameters(), *mix.parameters()]
    for x, y in zip(*(torch.autograd.grad(v, params) for v in (a, b))):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("make", [None, tdmarl.vdn_mixer, tdmarl.qmix_mixer])
def test_targets_and_trained_networks_are_apart(make):
    """Moving only target parameters moves each loss; moving only trained ones does not move the target."""
    env = ToyEnv(choices=3)
    actor = tdmarl.q_actor(env)
    batch = tdmarl.Collector(env, actor, frames_per_batch=40, seed=0).rollout()
    batch = tdmarl.TeamReward([G], "mean")(batch).reshape(-1)
    loss = MixingLoss(actor, None if make is None else make(env), double_q=False)
    first = loss(batch.copy())
    trained = {id(p) for p in loss.parameters()}
    targets = [p for name, p in loss.state_dict(keep_vars=True).items() if name.startswith("target_")]
    assert targets and not trained & {id(p) for p in targets}
    for p in targets:
        with torch.no_grad():
            before = p.clone()
            p.add_(0.1)
        assert loss(batch.copy())["loss_value"] != first["loss_value"]
        with torch.no_grad():
            p.copy_(before)
    with torch.no_grad():
        for p in loss.parameters():
            p.add_(0.1)
    moved = loss(batch.copy())
    assert torch.equal(moved["q_target"], first["q_target"]) and moved["q_taken"] != first["q_taken"]
    moved["loss_value"].backward()
    assert all(p.grad is None for p in targets)
    without = MixingLoss(actor, None if make is None else make(env), delay_value=False)
    assert not [k for k in without.state_dict() if k.startswith("target_")]
    assert torch.isfinite(without(batch.copy())["loss_value"])


def test_torchrls_soft_update_and_moving_reach_the_networks():
    env = ToyEnv(choices=3)
    actor = tdmarl.q_actor(env)
    loss = MixingLoss(actor, tdmarl.qmix_mixer(env))
    update = SoftUpdate(loss, tau=1.0)
    with torch.no_grad():
        for p in loss.parameters():
            p.add_(1.0)
    update.step()
    for a, b in zip(loss.local_value_network.parameters(), loss.target_local_value_network.parameters()):
        assert torch.equal(a, b)
    loss.double()
    assert {p.dtype for p in actor.parameters()} == {torch.float64}
    assert {p.dtype for p in loss.target_mixer_network.parameters()} == {torch.float64}
    other = MixingLoss(tdmarl.q_actor(env), tdmarl.qmix_mixer(env)).double()
    other.load_state_dict(loss.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(actor.parameters(), other.local_value_network.parameters()))
    twin = copy.deepcopy(loss)
    with torch.no_grad():
        next(iter(twin.parameters())).add_(1)
    assert not torch.equal(next(iter(twin.local_value_network.parameters())), next(iter(actor.parameters())))


def test_returns_within_rows():
    """gamma 1/2; rewards 1, 2, 4, 8; values 16, 32, 64, 128 of the next states; an end after the second step."""
    r, v = torch.tensor([1.0, 2, 4, 8]), torch.tensor([16.0, 32, 64, 128])
    end = torch.tensor([False, True, False, False])
    kinds = {
        (1, 0.0): [9, 18, 36, 72],  # r + v / 2
        (2, 0.0): [1 + 18 / 2, 18, 4 + 72 / 2, 72],
        (4, 0.0): [1 + 18 / 2, 18, 4 + 72 / 2, 72],
        (1, 0.5): [1 + 0.5 * (8 + 9), 18, 4 + 0.5 * (32 + 36), 72],  # half the value, half the next return
        (1, 1.0): [1 + 18 / 2, 18, 4 + 72 / 2, 72],
    }
    for (n, lmbda), expected in kinds.items():
        found = td_returns(r, v, end, gamma=0.5, n_steps=n, lmbda=lmbda, time_dim=0)
        assert found.tolist() == expected, (n, lmbda)
        twice = td_returns(
            *(x.reshape(1, 4, 1, 1) for x in (r, v, end)), gamma=0.5, n_steps=n, lmbda=lmbda, time_dim=1
        )
        assert torch.equal(twice.flatten(), found)


def test_dead_agents_have_no_part():
    """What a dead agent saw, did and got changes neither loss nor gradient, nor do rows in which all are dead."""
    env = ToyEnv(choices=3, mortal=True)
    for make in (None, tdmarl.vdn_mixer, tdmarl.qmix_mixer):
        torch.manual_seed(0)
        actor = tdmarl.q_actor(env)
        loss = MixingLoss(actor, None if make is None else make(env))
        batch = tdmarl.Collector(env, actor, frames_per_batch=40, seed=0).rollout()
        batch = tdmarl.TeamReward([G], "mean")(batch).reshape(-1)

        def gradient(rows):
            value = loss(rows.clone())["loss_value"]
            return [value.detach(), *torch.autograd.grad(value, list(loss.parameters()))]

        clean, spoiled = gradient(batch), batch.clone()
        dead = ~spoiled[G, "mask"]
        assert dead.any() and not dead.all()
        spoiled[G, "observation"][dead] = 1e3
        spoiled["next", G, "observation"][~spoiled["next", G, "mask"]] = -1e3
        spoiled["next", G, "reward"][dead] = 1e3
        spoiled[G, "action"][dead] = 2
        all_dead = batch.clone()
        all_dead[G, "mask"][:] = False
        all_dead["next", "reward"][:] = 1e3
        for other in (spoiled, torch.cat([batch, all_dead])):
            for a, b in zip(gradient(other), clean):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_agent_that_ended_alone_is_worth_nothing_to_the_team():
    """Two agents valued 1 and 10 everywhere; the second ends, the team goes on: y = r + gamma (1 + 0)."""
    table = torch.tensor([[[1.0, 1.0]], [[10.0, 10.0]]])
    actor = TensorDictModule(Table(table), [(G, "observation")], [(G, "action_value")])
    mixer = TensorDictModule(tdmarl.mixers.VDNMixer(), [(G, "chosen_action_value")], ["chosen_action_value"])
    zeros, no = torch.zeros(1, 2, 1), torch.zeros(1, 1, dtype=torch.bool)
    ended = torch.tensor([[[False], [True]]])
    following = {G: {"observation": zeros, "terminated": ended}, "reward": torch.ones(1, 1), "done": no}
    following["terminated"] = no.clone()
    batch = TensorDict(
        {G: {"observation": zeros, "action": torch.zeros(1, 2, 1).long()}, "next": following}, [1]
    )
    out = MixingLoss(actor, mixer, gamma=0.5)(batch)
    assert out["q_taken"].item() == 11 and out["q_target"].item() == 1.5


def test_a_seed_axis_keeps_losses_apart():
    def data(seed):
        g = torch.Generator().manual_seed(seed)
        group = {
            "observation": torch.randn(8, 2, 4, generator=g),
            "action": torch.randint(3, (8, 2), generator=g),
        }
        later = {"observation": torch.randn(8, 2, 4, generator=g)}
        ends = {name: torch.rand(8, 1, generator=g) < 0.3 for name in ("done", "terminated")}
        return TensorDict(
            {G: group, "next": {G: later, "reward": torch.randn(8, 1, generator=g), **ends}}, [8]
        )

    def trained(seeds):
        net = SeededLinear(len(seeds), 4, 3)
        with torch.no_grad():
            weights = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(9))
            net.weight.copy_(weights[seeds])
        actor = TensorDictModule(net, [(G, "observation")], [(G, "action_value")])
        mixer = TensorDictModule(
            tdmarl.mixers.VDNMixer(), [(G, "chosen_action_value")], ["chosen_action_value"]
        )
        loss = MixingLoss(actor, mixer)
        step = Step([Part(loss, torch.optim.Adam(loss.parameters(), 0.1), 0.5)], after=TargetUpdate(loss, every=2),
                    seed_axis=True)  # fmt: skip
        batch = torch.stack([data(s) for s in seeds])
        for _ in range(3):
            metrics = step(batch)
        return net, metrics

    both, metrics = trained([0, 1])
    assert metrics["loss_value"].shape == (2,) and not reduce.has_seed_axis()
    for seed in (0, 1):
        alone, _ = trained([seed])
        torch.testing.assert_close(both.weight[seed], alone.weight[0])


def test_the_loss_compiles_into_one_graph_and_runs_on_meta():
    env = ToyEnv(choices=3, mortal=True)
    actor = tdmarl.q_actor(env)
    loss = MixingLoss(actor, tdmarl.qmix_mixer(env))
    batch = tdmarl.Collector(env, actor, frames_per_batch=40, seed=0).rollout()
    batch = (
        tdmarl.TeamReward([G], "mean")(batch)
        .reshape(-1)
        .select(*loss.in_keys, *loss.optional_keys, strict=False)
    )
    plain = loss(batch.copy())["loss_value"]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(batch.copy())["loss_value"]
    torch.testing.assert_close(plain, compiled)
    meta = MixingLoss(actor.to("meta"), tdmarl.qmix_mixer(env).to("meta"))
    assert meta(batch.to("meta"))["loss_value"].device.type == "meta"  # a host read would raise


@pytest.mark.parametrize("options, words", [
    ({"gamma": 1.5}, "gamma=1.5"), ({"n_steps": 0}, "n_steps=0"), ({"n_steps": 2, "lmbda": 0.5}, "choose one"),
    ({"reduction": "max"}, "reduction='max'"),
])  # fmt: skip
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        MixingLoss(tdmarl.q_actor(ToyEnv(choices=3)), **options)


def test_bad_input_is_named():
    env = ToyEnv(choices=3)
    with pytest.raises(KeyError, match="action_value"):
        MixingLoss(tdmarl.categorical_actor(env))
    loss = MixingLoss(
        TensorDictModule(Table(torch.zeros(2, 1, 3)), [(G, "observation")], [(G, "action_value")])
    )
    group = {"observation": torch.zeros(4, 2, 1), "action": torch.zeros(4, 2, 2).long()}
    with pytest.raises(ValueError, match=r"'action'\) comes to \(4, 2, 2\)"):
        loss(TensorDict({G: group}, [4]))
    assert Categorical(3, shape=(2,)).n == 3
