from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from tdmarl import tracing
from tdmarl.cpu_graph import Compiled
from tdmarl.cpu_loops import (
    cut_long_products, keep_no_masks, keep_numbers, keep_what_repeats, move_masks_as_they_are, norm_one_by_one,
    sum_by_products, turn_narrow_products,
)  # fmt: skip
from tdmarl.functions import Function

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


def _nearest(*x):
    """The nearest of four places, and of those behind; each mask is used for distances and for places."""
    least, found = torch.full_like(x[0][0], torch.inf), torch.zeros_like(x[0])
    for i in range(0, 8, 2):
        distance = torch.linalg.vector_norm(x[i] * x[i + 1] - x[i + 1] / 3 + x[i - 1], dim=0)
        is_less = distance < least
        least, found = torch.where(is_less, distance, least), torch.where(is_less.unsqueeze(0), x[i], found)
    behind = (found[0] * x[1][0] > x[2][0] - x[3][1]) & (found[1] + x[4][1] < x[5][0]) & (least < x[6][1] * x[7][1])
    return [least, found, torch.where(behind, found, 0.0), torch.where(behind, least, 1.0), behind.float().sum(0)]


def _parts(*x):
    """Masks of parts of what is computed: every part reads what the whole does."""
    crossed = x[0] * x[1] - x[2] * x[3]
    inside = (crossed[0] > 0) & (crossed[1] / crossed[0] >= 0) & (crossed[1] <= crossed[0])
    return [torch.where(inside, x[4], torch.inf), torch.where(inside, crossed[0], 0.0)]


@pytest.mark.parametrize("function", [_nearest, _parts])
def test_no_mask_lies_in_memory(function):
    inputs = [torch.randn(2, 16, 64) for _ in range(8)]
    codes = []
    for suited in (False, True):
        graph = tracing.trace(function, inputs)
        if suited:
            keep_no_masks(graph)
            torch.testing.assert_close(graph(*inputs), function(*inputs), rtol=0, atol=0, equal_nan=True)
        options = {**Function.options, "fx_graph_cache": False}
        found, code = run_and_get_code(lambda graph=graph: Compiled(graph, inputs, options)(*inputs))
        torch.testing.assert_close(found, function(*inputs), rtol=1e-4, atol=1e-5, equal_nan=True)
        codes.append("".join(code))
    assert "bool* " in codes[0] and "bool* " not in codes[1]


def test_large_masks_in_memory_are_moved_by_pytorch():
    grid, ints = torch.rand(8, 40, 40) > 0.5, torch.randint(40, (2, 8))
    new, row = torch.tensor([True, False] * 4).view(8, 1, 1), torch.arange(8)

    def function(grid, ints, new):
        written = grid.index_put((row, ints[0], ints[1]), torch.tensor(True))
        seen = written[row, ints[1], ints[0]].float()  # a few, which a loop may look up
        return [torch.where(new, grid, written).clone(memory_format=torch.contiguous_format), seen]

    graph = tracing.trace(function, [grid, ints, new])
    move_masks_as_they_are(graph)
    left = [node.target for node in graph.graph.nodes if node.meta.get("custom") == {"fallback_to_eager": True}]
    assert left == [aten.index_put.default, aten.where.self, aten.clone.default]
    found, code = run_and_get_code(lambda: Compiled(graph, [grid, ints, new], {})(grid, ints, new))
    torch.testing.assert_close(found, function(grid, ints, new), rtol=0, atol=0)
    assert found[1].sum() >= (ints[0] == ints[1]).sum() and "bool* out_ptr" not in "".join(code)
