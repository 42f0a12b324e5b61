from __future__ import annotations

import math

import pytest
import torch

from tdmarl import tracing
from tdmarl.fast_tanh import fast_tanh, replace_tanh


@pytest.mark.parametrize("x", [0.0, 1e-3, 0.5, 1.0, 2.5, 5.0, 8.9, 9.1, 40.0, math.inf])
def test_values_are_those_of_the_standard_library(x):
    found = fast_tanh(torch.tensor([x, -x]))
    assert found[0].item() == pytest.approx(math.tanh(x), abs=2e-7, rel=4e-7) and found[1] == -found[0]


def test_it_never_leaves_minus_one_to_one_and_keeps_nan():
    x = torch.linspace(-20, 20, 400_001)
    assert fast_tanh(x).abs().max() <= 1
    assert (fast_tanh(x).double() - x.double().tanh()).abs().max() < 2.5e-7
    assert fast_tanh(torch.tensor([math.nan])).isnan().all()


def test_a_graph_computes_it_in_place_of_the_librarys_in_float32_alone():
    def function(x, y):
        return [(x.tanh() + 1).tanh(), y.tanh()]

    inputs = [torch.linspace(-3, 3, 7), torch.linspace(-3, 3, 7, dtype=torch.float64)]
    graph = tracing.trace(function, inputs)
    replace_tanh(graph)
    kinds = [node for node in graph.graph.nodes if node.target is torch.ops.aten.tanh.default]
    assert len(kinds) == 1  # the one of float64
    for found, expected in zip(graph(*inputs), function(*inputs)):
        torch.testing.assert_close(found, expected, atol=3e-7, rtol=1e-6)
