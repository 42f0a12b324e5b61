"""Mixers: the monotonic network against its formula and its promise, states of several kinds, any memory layout."""

from __future__ import annotations

import itertools

import pytest
import torch
from tensordict import TensorDict
from toys import ToyEnv

from tdmarl.mixers import QMIXMixer, VDNMixer, qmix_mixer, vdn_mixer


def test_each_agents_best_is_the_teams_for_a_thousand_networks_and_states():
    """dQ_tot / dQ_i >= 0, and the joint argmax over all actions is each agent's own argmax."""
    torch.manual_seed(0)
    n, K, s = 3, 4, 5
    joint = torch.tensor(list(itertools.product(range(K), repeat=n)))  # [64, n]
    for trial in range(1000):
        mixer = QMIXMixer(n, s, embed_dim=8, hypernet_layers=1 + trial % 2, hypernet_embed=8)
        with torch.no_grad():
            for p in mixer.parameters():
                p.normal_(0, 2)
        state, q = torch.randn(s) * 3, (torch.randn(n, K) * 3)
        values = q[torch.arange(n), joint].unsqueeze(-1).requires_grad_()  # [64, n, 1]
        total = mixer(values, state.expand(len(joint), s))
        (slope,) = torch.autograd.grad(total.sum(), values)
        assert (slope >= 0).all()
        own = (joint == q.argmax(-1)).all(-1).nonzero().item()
        assert total[own] == total.max()


@pytest.mark.parametrize("layers", [1, 2])
def test_the_network_is_its_formula(layers):
    """|W2|' elu(|W1|' q + b1) + V, with biases and V of any sign."""
    torch.manual_seed(0)
    mixer = QMIXMixer(2, 3, embed_dim=4, hypernet_layers=layers)
    q, s = torch.randn(6, 2, 1), torch.randn(6, 3)
    w1, w2 = mixer.hyper_w_1(s).reshape(6, 2, 4).abs(), mixer.hyper_w_final(s).abs().unsqueeze(-1)
    hidden = torch.nn.functional.elu(torch.einsum("bne,bn->be", w1, q.squeeze(-1)) + mixer.hyper_b_1(s))
    torch.testing.assert_close(mixer(q, s), torch.bmm(hidden.unsqueeze(1), w2).squeeze(1) + mixer.V(s))
    assert sum(isinstance(m, torch.nn.Linear) for m in mixer.hyper_w_1.modules()) == layers
    with torch.no_grad():
        assert (mixer.hyper_b_1(s) < 0).any() and (mixer.V(s) != mixer.V(s).abs()).any()


def test_any_memory_layout_and_any_batch():
    mixer = QMIXMixer(2, 3)
    q, s = torch.randn(4, 5, 2, 1), torch.randn(4, 5, 3)
    strided = (
        q.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
        s.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert not strided[0].is_contiguous() and not strided[1].is_contiguous()
    torch.testing.assert_close(mixer(*strided), mixer(q, s))
    torch.testing.assert_close(mixer(q[0, 0], s[0, 0]), mixer(q, s)[0, 0])
    assert VDNMixer()(strided[0]).shape == (4, 5, 1)


def values(env, td):
    for g, (n, *_) in env.groups.items():
        td[g, "chosen_action_value"] = torch.randn(*td.shape, n, 1)
    return td


def test_the_state_is_the_environments_or_all_observations_of_the_team():
    env = ToyEnv(choices=3, state=True)
    assert "state" in qmix_mixer(env).in_keys and "state" not in qmix_mixer(env, state="observation").in_keys
    assert qmix_mixer(env, state="observation").module.V[0].in_features == 3 * 4
    groups = {"a": (2, 3, 1), "b": (1, 5, 2)}
    env = ToyEnv(choices=3, groups=groups)
    mixer, total = qmix_mixer(env, ("a", "b")), vdn_mixer(env, ("a", "b"))
    assert mixer.module.V[0].in_features == 2 * 3 + 5
    td = values(env, env.reset())
    assert mixer(td.copy())["chosen_action_value"].shape == (4, 1)
    both = td["a", "chosen_action_value"].sum(-2) + td["b", "chosen_action_value"].sum(-2)
    torch.testing.assert_close(total(td.copy())["chosen_action_value"], both)
    td["a", "observation"].requires_grad_()
    mixer(td)["chosen_action_value"].sum().backward()
    assert td["a", "observation"].grad.any()
    with pytest.raises(ValueError, match="state='state' needs a root entry"):
        qmix_mixer(env, ("a", "b"), state="state")
    with pytest.raises(ValueError, match="state='all'"):
        qmix_mixer(env, ("a", "b"), state="all")
    with pytest.raises(ValueError, match="hypernet_layers=3"):
        qmix_mixer(env, ("a", "b"), hypernet_layers=3)


def test_what_the_dead_see_is_no_part_of_the_state():
    env = ToyEnv(choices=3, mortal=True)
    mixer, td = qmix_mixer(env), values(env, env.reset())
    td["agents", "mask"][:, -1] = False
    spoiled = td.clone()
    spoiled["agents", "observation"][:, -1] = 1e3
    torch.testing.assert_close(mixer(spoiled)["chosen_action_value"], mixer(td)["chosen_action_value"])
    assert isinstance(td, TensorDict)
