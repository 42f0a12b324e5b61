"""Steps cut into blocks of rows, against the whole step and against sums by hand."""

from __future__ import annotations

import pytest
import torch

from tdmarl import row_blocks, tracing
from tdmarl.row_blocks import NotByRow, RowBlocks, block_size


def cut(function, inputs, size, rowless=()):
    """The blocks of a function whose inputs have rows, but for those whose places are given."""
    few = [x if i in rowless else x[:size] for i, x in enumerate(inputs)]
    whole, block = (tracing.trace(function, given) for given in (inputs, few))
    return RowBlocks(whole, block, list(inputs), lambda graph, _: graph)


def test_sums_and_means_of_blocks_add_up_to_those_by_hand():
    x, w = torch.arange(12.0).reshape(6, 2), torch.tensor([[1.0], [10.0]])

    def function(x, w):
        y = x @ w  # 10, 32, 54, 76, 98, 120
        return [y.sum(), y.mean(), x.t() @ y, y * 2]

    blocks = cut(function, [x, w], 2, rowless=[1])
    total, mean, product, rows = blocks(x, w)
    assert blocks.blocks == 3 and (total.item(), mean.item()) == (390.0, 65.0)
    assert product.flatten().tolist() == [2720.0, 3110.0]  # 10*0 + 32*2 + 54*4 + ..., and 390 more
    assert rows.flatten().tolist() == [20.0, 64.0, 108.0, 152.0, 196.0, 240.0]


def test_what_follows_from_a_sum_over_all_rows_waits_for_it():
    """The variance about the mean of all rows, whose blocks have other means: (0, 0, 6, 6) has 9, each half 0."""
    x, w = torch.tensor([[0.0], [0.0], [6.0], [6.0]]), torch.ones(1, 1)

    def function(x, w):
        y = x @ w
        return [((y - y.mean()) @ w).square().mean(), (x.t() @ (y - y.mean())).sum()]

    blocks = cut(function, [x, w], 2, rowless=[1])
    assert [value.item() for value in blocks(x, w)] == [9.0, 36.0]
    assert [stage.blocks for stage in blocks.stages].count(
        2
    ) == 2  # one loop for the mean, one for what needs it


def test_gradients_of_a_network_are_those_of_the_whole():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(5, 8), torch.nn.LayerNorm(8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    )
    x, mask = torch.randn(60, 2, 5), torch.rand(60, 2) > 0.3

    def function(x, mask):
        y = net(x).log_softmax(-1)
        loss = (y.square().sum(-1) * mask).sum() / mask.sum()
        return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]

    with torch.enable_grad():
        expected = function(x, mask)
    graphs = []
    for size in (60, 12):
        with torch.enable_grad():
            graphs.append(tracing.record(function, [x[:size], mask[:size]]))
    blocks = RowBlocks(*graphs, [x, mask], lambda graph, _: graph)
    assert blocks.blocks == 5
    for found, value in zip(blocks(x, mask), expected):
        torch.testing.assert_close(found, value)


@pytest.mark.parametrize("function, why", [
    (lambda x: [x.flip(0)], "flip may work across rows"),
    (lambda x: [x.cumsum(0)], "cumsum may work across rows"),
    (lambda x: [x.softmax(0)], "softmax works along the rows"),
    (lambda x: [torch.cat([x, x])], "cat works along the rows"),
    (lambda x: [x.t().reshape(-1)], "reorders rows"),
    (lambda x: [x.repeat(2, 1)], "repeat changes how many rows there are"),
    (lambda x: [torch.nn.functional.pad(x, (0, 0, 1, 1)) * 2], "adds rows to those that there are"),
    (lambda x: [x.amax(0)], "amax says something about all rows that is no sum"),
    (lambda x: [x[0]], "select says something about all rows that is no sum"),
    (lambda x: [x + torch.rand_like(x)], "draws random numbers for the rows"),
])  # fmt: skip
def test_what_works_across_rows_is_refused(function, why):
    with pytest.raises(NotByRow, match=why):
        cut(function, [torch.randn(8, 3)], 2)


def test_the_number_of_rows_is_the_whole_minibatchs_in_a_block():
    x = torch.ones(8, 3)
    (found,) = cut(lambda x: [(x / len(x)).sum() + x.mm(torch.ones(3, 1)).mean()], [x], 2)(x)
    assert found.item() == 6.0  # 24 / 8, and 3


def test_rows_that_are_made_in_a_loop_are_as_many_as_there_are():
    """Ones for 8 rows, of which each block makes 2; nothing of the inputs has rows there."""
    (found, _) = cut(
        lambda x: [torch.ones(len(x), 300).mm(torch.ones(300, 2)).sum(), x * 2], [torch.ones(8, 3)], 2
    )(torch.ones(8, 3))
    assert found.item() == 4800.0


def test_a_constant_with_rows_is_cut_like_an_input():
    x = torch.zeros(8, 3)
    (found,) = cut(lambda x: [(x + torch.arange(len(x))[:, None]) @ torch.ones(3, 1)], [x], 2)(x)
    assert found.flatten().tolist() == [0.0, 3.0, 6.0, 9.0, 12.0, 15.0, 18.0, 21.0]


def test_blocks_are_a_divisor_that_fits_and_only_where_there_are_several(monkeypatch):
    def size(rows):
        graph = tracing.trace(lambda x: [x @ torch.ones(4, 8)], [torch.ones(rows, 4)])  # 32 bytes a row
        return block_size(graph, rows)

    monkeypatch.setattr(row_blocks, "_CACHE", 3200)  # 100 rows
    assert (size(1000), size(990), size(300), size(299)) == (100, 99, 100, 299)
    assert size(997) == 997  # a prime
