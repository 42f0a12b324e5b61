from __future__ import annotations

import pytest
import torch

from tdmarl import tracing
from tdmarl.cpu_graph import Compiled
from tdmarl.cpu_loops import (
    cut_long_products, keep_numbers, keep_what_repeats, norm_one_by_one, sum_by_products, turn_narrow_products,
)  # fmt: skip

aten = torch.ops.aten


def _products(graph):
    return [node for node in graph.graph.nodes if node.target in (aten.mm.default, aten.bmm.default)]


def test_rows_come_to_lie_last_and_numbers_stay():
    x, w, bias = torch.randn(100, 7), torch.randn(7, 3), torch.randn(3)
    stacked, weights = torch.randn(2, 100, 7), torch.randn(2, 7, 1)

    def function(x, w, bias, stacked, weights):
        return [torch.addmm(bias, x, w), x @ w, stacked @ weights, torch.baddbmm(bias[:1], stacked, weights)]

    inputs = [x, w, bias, stacked, weights]
    graph = tracing.trace(function, inputs)
    turn_narrow_products(graph)
    assert [tuple(node.meta["shape"]) for node in _products(graph)] == [(3, 100)] * 2 + [(2, 1, 100)] * 2
    found, expected = graph(*inputs), function(*inputs)
    for ours, plain in zip(found, expected):
        torch.testing.assert_close(ours, plain)
    assert found[0].stride() == (1, 100)  # one row after the other lies side by side


def test_wide_products_few_rows_and_scaled_sums_stay_as_they_are():
    x, few, w, wide, bias = (
        torch.randn(100, 7),
        torch.randn(5, 7),
        torch.randn(7, 3),
        torch.randn(7, 40),
        torch.randn(3),
    )

    def function(x, few, w, wide, bias):
        return [x @ wide, few @ w, torch.addmm(bias, x, w, beta=2)]

    inputs = [x, few, w, wide, bias]
    graph = tracing.trace(function, inputs)
    before = [node.target for node in graph.graph.nodes]
    turn_narrow_products(graph)
    assert [node.target for node in graph.graph.nodes] == before


def test_columns_of_tall_matrices_are_summed_by_products():
    x, low, ints = torch.randn(100, 40), torch.randn(20, 40), torch.ones(100, 40, dtype=torch.int64)
    stack = torch.randn(3, 100, 40)

    def function(x, low, ints, stack):
        others = [low.sum(0), x.sum(1), ints.sum(0), stack.sum((0, 1)), stack.sum(0)]
        return [x.sum(0), x.sum(0, keepdim=True), stack.sum(1, keepdim=True), stack.sum(-2), *others]

    inputs = [x, low, ints, stack]
    graph = tracing.trace(function, inputs)
    sum_by_products(graph)
    assert [tuple(node.meta["shape"]) for node in _products(graph)] == [(1, 40)] * 2 + [(3, 1, 40)] * 2
    for ours, plain in zip(graph(*inputs), function(*inputs)):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("threads, parts", [(1, 4), (2, 4), (6, 8)])
def test_sums_over_very_many_rows_are_cut_for_the_threads(threads, parts):
    x, g, total = torch.randn(8192, 14), torch.randn(8192, 64), torch.randn(14, 64)
    odd, few, wide = torch.randn(8190, 14), torch.randn(2048, 14), torch.randn(600, 8192)

    def function(x, g, total, odd, few, wide):
        others = [odd.T @ odd, few.T @ few, wide @ x, torch.addmm(total, x.T, g, beta=2), x @ total]
        return [x.T @ g, torch.addmm(total, x.T, g), *others]

    inputs = [x, g, total, odd, few, wide]
    graph, before = tracing.trace(function, inputs), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cut_long_products(graph)
    finally:
        torch.set_num_threads(before)
    assert [tuple(n.meta["shape"]) for n in _products(graph) if len(n.meta["shape"]) == 3] == [(parts, 14, 64)] * 2
    for ours, compiled, plain in zip(graph(*inputs), Compiled(graph, inputs, {})(*inputs), function(*inputs)):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-3)


def _kept(graph):
    kept = torch.ops._inductor_test.realize.default
    return [node.args[0].target for node in graph.graph.nodes if node.target is kept]


def test_a_number_that_many_values_are_computed_from_is_computed_once():
    def function(x, few, count, plain):
        correction = (1 - 0.9 ** count.double()).float()  # Adam's
        scale = (10 / (x.sum() + 1)).clamp(max=1.0)[None]  # a clip's, seen through a view
        return [x / correction, x * scale, few * correction, x + plain, x * plain[None], correction + scale]

    inputs = [torch.rand(20, 40), torch.rand(5), torch.tensor(3.0), torch.tensor(0.5)]
    graph = tracing.trace(function, inputs)
    keep_numbers(graph)
    assert len(_kept(graph)) == 2  # neither what is in memory, nor for a few values
    found, expected = graph(*inputs), function(*inputs)
    for ours, compiled, plain in zip(found, Compiled(graph, inputs, {})(*inputs), expected):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)
        torch.testing.assert_close(compiled, plain)
    assert torch.equal(found[0], inputs[0] / torch.tensor(1 - 0.9**3))


def test_norms_of_a_list_are_the_compilers_own_sums():
    tensors = [torch.randn(20, 40), torch.randn(3), torch.tensor([3.0, 4.0])]

    def function(*tensors):
        return [*torch._foreach_norm(tensors), *torch._foreach_norm(tensors[2:], 1)]

    graph = tracing.trace(function, tensors)
    norm_one_by_one(graph)
    assert aten._foreach_norm.Scalar not in [node.target for node in graph.graph.nodes]
    found = graph(*tensors)
    torch.testing.assert_close(found, function(*tensors))
    assert found[2] == 5 and found[3] == 7


def test_what_many_values_are_computed_from_is_kept():
    places, angles = torch.randn(5, 100), torch.randn(12, 100)

    def function(places, angles):
        near = places - places[:1]  # each is read by twelve rays
        pairs = near.unsqueeze(1) * angles.cos()  # as is each of these by five entities
        return [pairs.amin(0), (angles * 2)[:, None].expand(12, 3, 100) + 1]  # three are too few to keep anything for

    graph = tracing.trace(function, [places, angles])
    keep_what_repeats(graph)
    assert _kept(graph) == [aten.sub.Tensor, aten.cos.default]
    found, expected = graph(places, angles), function(places, angles)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(Compiled(graph, [places, angles], {})(places, angles), expected)
