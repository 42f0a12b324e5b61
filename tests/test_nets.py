from __future__ import annotations

import pytest
import torch
from torch import nn

from tdmarl.nets import AgentGRU, AgentLinear, AgentMLP, alone, parameter_sets


@pytest.mark.parametrize("share, sets", [(True, 1), (False, 3), ([[0, 2], [1]], 2)])
def test_each_set_of_parameters_starts_orthogonal(share, sets):
    layer = AgentLinear(3, 8, 5, share=share, gain=2.0)
    assert layer.weight.shape == (sets, 8, 5)
    for weight in layer.weight:
        torch.testing.assert_close(weight.T @ weight, 4 * torch.eye(5), atol=1e-5, rtol=0)
    assert not layer.bias.any()


@pytest.mark.parametrize("share", [True, False, [[0, 2], [1]]])
def test_linear_is_the_plain_layer_of_each_agent(share):
    layer, x = AgentLinear(3, 4, 2, share=share), torch.randn(6, 3, 4)
    nn.init.normal_(layer.bias)
    y = layer(x)
    for agent, s in enumerate(parameter_sets(3, share)):
        plain = nn.functional.linear(x[:, agent], layer.weight[s].T, layer.bias[s])
        torch.testing.assert_close(y[:, agent], plain)


def test_agent_id_is_a_one_hot_input():
    layer, x = AgentLinear(3, 4, 2, agent_id=True), torch.randn(6, 3, 4)
    whole = torch.cat([layer.weight[0], layer.agent])  # rows of the one-hot identity below those of the input
    one_hot = torch.cat([x, torch.eye(3).expand(6, 3, 3)], -1)
    torch.testing.assert_close(layer(x), one_hot @ whole + layer.bias[0])
    torch.testing.assert_close(whole.T @ whole, torch.eye(2), atol=1e-5, rtol=0)


def test_swapping_agents_swaps_the_outputs_of_a_shared_network_and_not_of_its_own():
    x = torch.randn(2, 3, 4)
    swapped = x[:, [1, 0, 2]]
    shared, own = AgentMLP(3, 4, 2), AgentMLP(3, 4, 2, share=False)
    torch.testing.assert_close(shared(swapped), shared(x)[:, [1, 0, 2]])
    assert not torch.allclose(own(swapped), own(x)[:, [1, 0, 2]])


def test_a_map_shares_where_it_says():
    net, x = AgentMLP(3, 4, 2, share=[[0, 1], [2]]), torch.randn(1, 1, 4).expand(2, 3, 4)
    y = net(x)
    assert torch.equal(y[:, 0], y[:, 1]) and not torch.allclose(y[:, 0], y[:, 2])


def test_a_common_input_is_worth_the_same_as_its_copies():
    for share in (True, False):
        for agent_id in (True, False):
            net, x = AgentMLP(3, 4, 2, share=share, agent_id=agent_id, layer_norm=True), torch.randn(5, 1, 4)
            torch.testing.assert_close(net(x), net(x.expand(5, 3, 4)))


def test_gradients_reach_only_the_agent_that_asks():
    net = AgentMLP(3, 4, 2, share=False)
    net(torch.randn(5, 3, 4))[:, 1].sum().backward()
    for p in net.parameters():
        assert p.grad[1].abs().sum() > 0 and not p.grad[[0, 2]].any()


def test_errors_say_what_is_expected():
    with pytest.raises(ValueError, match=r"\[\[0, 1\], \[2\]\]"):
        AgentMLP(3, 4, 2, share=[[0], [1]])
    with pytest.raises(ValueError, match=r"\(5, 2, 4\).*\[\*B, 3, 4\]"):
        AgentMLP(3, 4, 2)(torch.zeros(5, 2, 4))


@pytest.mark.parametrize("share", [True, False, [[0, 2], [1]]])
def test_traces_whole(share):
    net, x = AgentMLP(3, 4, 2, share=share, agent_id=share is True, layer_norm=True), torch.randn(5, 3, 4)
    traced = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(x), net(x))


@pytest.mark.parametrize("share", [True, False, [[0, 2], [1]]])
def test_an_agent_alone_is_its_part_of_the_whole_on_the_same_memory(share):
    net, x = AgentMLP(3, 4, 2, share=share, agent_id=share is True, layer_norm=True), torch.randn(5, 3, 4)
    views = {}
    parts = [alone(net, i, views) for i in range(3)]
    for i, part in enumerate(parts):
        torch.testing.assert_close(part(x[:, i : i + 1]), net(x)[:, i : i + 1])
    shared = {id(p) for p in parts[0].parameters()} & {id(p) for p in parts[2].parameters()}
    assert bool(shared) == (share is not False)
    before = net(x)
    with torch.no_grad():
        next(parts[1].parameters()).add_(1.0)
    changed = (net(x) != before).flatten(2).any(-1).any(0).tolist()
    assert changed == ([True] * 3 if share is True else [False, True, False])


def test_a_module_that_does_not_say_whose_its_parameters_are_is_refused():
    with pytest.raises(ValueError, match="PReLU"):
        alone(AgentMLP(3, 4, 2, share=False, activation=nn.PReLU), 0, {})


SHARES = pytest.mark.parametrize("share", [True, False, [[0, 2], [1]]])


def torchs(net, s):
    """``torch.nn.GRU`` with the parameters of set ``s``."""
    unit = nn.GRU(net.in_features, net.hidden_size, net.layers, batch_first=True)
    unit.load_state_dict({name: p[s] for name, p in net.state_dict().items()})
    return unit


@SHARES
@pytest.mark.parametrize("layers", [1, 2])
def test_a_recurrent_unit_is_torchs_for_each_agent(share, layers):
    torch.manual_seed(0)
    net = AgentGRU(3, 4, 5, layers=layers, share=share)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, state = torch.randn(6, 10, 3, 4, requires_grad=True), torch.randn(6, 3, layers, 5)
    states = net(x, state, torch.zeros(6, 10, 1, dtype=torch.bool))
    direction = torch.randn(6, 10, 3, 5)
    gradient = torch.autograd.grad((states[..., -1, :] * direction).sum(), x)[0]
    for agent, s in enumerate(parameter_sets(3, share)):
        own = x[:, :, agent].detach().requires_grad_()
        y, last = torchs(net, s)(own, state[:, agent].transpose(0, 1).contiguous())
        torch.testing.assert_close(states[:, :, agent, -1], y, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(states[:, -1, agent], last.transpose(0, 1), atol=1e-6, rtol=1e-5)
        theirs = torch.autograd.grad((y * direction[:, :, agent]).sum(), own)[0]
        torch.testing.assert_close(gradient[:, :, agent], theirs, atol=1e-5, rtol=1e-5)


@SHARES
@pytest.mark.parametrize("batch", [(6,), (2, 3)])
def test_steps_are_the_sequence_with_beginnings_inside(share, batch):
    torch.manual_seed(0)
    net = AgentGRU(3, 4, 5, layers=2, share=share)
    x, first = torch.randn(*batch, 12, 3, 4), torch.randn(*batch, 3, 2, 5)
    begins = torch.rand(*batch, 12, 1) < 0.3
    assert begins.any()
    direction, found = torch.randn(*batch, 12, 3, 2, 5), []
    state, steps = first, []
    for t in range(12):
        state = net(x[..., t, :, :], state, begins[..., t, :])
        steps.append(state)
    for states in (torch.stack(steps, -4), net(x, first, begins)):
        grads = torch.autograd.grad((states * direction).sum(), list(net.parameters()))
        found.append([states, *grads])
    for step, sequence in zip(*found):
        torch.testing.assert_close(step, sequence, atol=1e-5, rtol=1e-5)


def test_a_recurrent_unit_starts_orthogonal_and_one_agents_part_is_on_its_memory():
    net = AgentGRU(3, 4, 5, share=False)
    for weight in net.weight_hh_l0:
        torch.testing.assert_close(weight.T @ weight, torch.eye(5), atol=1e-5, rtol=0)
    part, x, state = alone(net, 1, {}), torch.randn(6, 7, 3, 4), torch.randn(6, 3, 1, 5)
    begins = torch.rand(6, 7, 1) < 0.3
    mine = part(x[:, :, 1:2], state[:, 1:2], begins)
    torch.testing.assert_close(mine, net(x, state, begins)[:, :, 1:2], atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        part.bias_ih_l0.fill_(3.0)
    assert torch.equal(net.bias_ih_l0[1], torch.full((15,), 3.0)) and not net.bias_ih_l0[0].any()


def test_a_recurrent_unit_says_what_it_expects():
    net, begins = AgentGRU(3, 4, 5), torch.zeros(6, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"input of shape \(6, 3, 2\).*expected \[\*B, 3, 4\]"):
        net(torch.zeros(6, 3, 2), torch.zeros(6, 3, 1, 5), begins)
    with pytest.raises(ValueError, match=r"state of shape \(6, 3, 5\).*state \[\*B, 3, 1, 5\]"):
        net(torch.zeros(6, 3, 4), torch.zeros(6, 3, 5), begins)
    with pytest.raises(ValueError, match=r"is_init of shape \(6, 1\); expected \(6, 7, 1\)"):
        net(torch.zeros(6, 7, 3, 4), torch.zeros(6, 3, 1, 5), begins)
    with pytest.raises(ValueError, match="at least 1"):
        AgentGRU(3, 4, 0)
