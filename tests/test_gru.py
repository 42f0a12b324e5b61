"""Both ways of resetting inside a sequence against torch's own unit, run on each episode alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tdmarl.gru import cells, fused, gru

WAYS = pytest.mark.parametrize("way", [cells, fused])
LENGTH, ROWS, WIDTH, HIDDEN = 9, 5, 3, 4


def inputs(seed=0, share_of_resets=0.3):
    torch.manual_seed(seed)
    unit = nn.GRU(WIDTH, HIDDEN)
    x, hidden = torch.randn(LENGTH, ROWS, WIDTH), torch.randn(ROWS, HIDDEN).tanh()
    reset = torch.rand(LENGTH, ROWS) < share_of_resets
    return unit, [t.requires_grad_() for t in (x, hidden)], reset


def by_episode(unit, x, hidden, reset):
    """Every episode of every row by itself through ``torch.nn.GRU``."""
    rows = []
    for row in range(ROWS):
        starts = [0, *(t for t in range(1, LENGTH) if reset[t, row]), LENGTH]
        state = torch.zeros(1, HIDDEN) if reset[0, row] else hidden[row : row + 1]
        pieces = []
        for begin, end in zip(starts, starts[1:]):
            pieces.append(unit(x[begin:end, row], state)[0])
            state = torch.zeros(1, HIDDEN)
        rows.append(torch.cat(pieces))
    return torch.stack(rows, 1)


@WAYS
@pytest.mark.parametrize("share_of_resets", [0.0, 0.3, 1.0])
def test_values_and_gradients_are_those_of_torch_for_each_episode(way, share_of_resets):
    unit, leaves, reset = inputs(share_of_resets=share_of_resets)
    weights = list(unit.parameters())
    expected, found = by_episode(unit, *leaves, reset), way(*leaves, reset, weights)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    direction = torch.randn_like(expected)
    one, other = (
        torch.autograd.grad((y * direction).sum(), [*leaves, *weights], materialize_grads=True)
        for y in (found, expected)
    )
    for mine, torchs in zip(one, other):
        torch.testing.assert_close(mine, torchs, atol=1e-5, rtol=1e-5)


@WAYS
def test_nothing_passes_a_beginning(way):
    unit, (x, hidden), reset = inputs()
    reset[4] = True
    out = way(x, hidden, reset, list(unit.parameters()))
    gradients = torch.autograd.grad(out[4:].sum(), [x, hidden])
    assert not gradients[0][:4].any() and not gradients[1].any() and gradients[0][4:].any()
    far = hidden.detach().clone()
    far[:] = 1e3  # beyond what a state can be: the inserted step still empties it to the last bit
    torch.testing.assert_close(way(x, far, reset, list(unit.parameters()))[4:], out[4:], atol=0, rtol=0)


@WAYS
def test_no_value_is_read_on_the_host(way):
    unit, (x, hidden), reset = inputs()
    meta = [t.detach().to("meta") for t in (x, hidden, reset)]
    assert way(*meta, [p.to("meta") for p in unit.parameters()]).shape == (LENGTH, ROWS, HIDDEN)


def test_compiled_it_is_one_graph_with_the_same_values():
    unit, (x, hidden), reset = inputs()
    weights = list(unit.parameters())
    compiled = torch.compile(gru, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, hidden, reset, weights), cells(x, hidden, reset, weights))
