"""What is recorded computes the same; what a graph would freeze is refused; equal nodes are one, draws are not."""

from __future__ import annotations

import inspect
from typing import Any, Callable

import pytest
import torch
from torch import Tensor, fx

from tdmarl import tracing
from tdmarl.tracing import HostRead, Untraceable, trace

aten = torch.ops.aten
X, Y = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.5, 2.0])


def kinds(graph: fx.GraphModule) -> list[str]:
    return [str(node.target).split(".")[1] for node in graph.graph.nodes if node.op == "call_function"]


def line_of(function: Callable[..., Any], text: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if text in line)


def test_a_graph_is_a_function_of_its_inputs() -> None:
    graph = trace(lambda x, y: [x * y + 1, x.sum()], [X, Y])
    assert [v.tolist() for v in graph(X, Y)] == [[1.5, 0.0, 7.0], 2.0]
    assert [v.tolist() for v in graph(Y, Y)] == [[1.25, 1.25, 5.0], 3.0]
    assert tracing.operations(graph) == 3 and tracing.outputs(graph) == 2


def test_writing_in_place_stays_inside() -> None:
    """An input that is written into is a new tensor; views of one tensor see each other's writes."""

    def function(x: Tensor) -> list[Tensor]:
        view = x[1:]
        view += 10
        x[0] = 7
        return [x, view]

    kept = X.clone()
    graph = trace(function, [X])
    assert torch.equal(X, kept)
    assert [v.tolist() for v in graph(X)] == [[7, 8, 13], [8, 13]] and torch.equal(X, kept)
    assert not any(node.target._schema.is_mutable for node in graph.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize(
    "read",
    [
        lambda x: bool(x.sum() > 0),
        lambda x: float(x[0]),
        lambda x: int(x[0]),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: torch.unique(x),
        lambda x: torch.equal(x, x + 1),
        lambda x: range(5)[x.sum().long()],
        lambda x: 3.0 in x,
        lambda x: torch.masked_select(x, x > 0),
    ],
)
def test_questions_raise_with_their_line(read: Callable[[Tensor], Any]) -> None:
    def function(x: Tensor) -> list[Tensor]:
        read(x)
        return [x]

    with pytest.raises(HostRead, match=rf"{__file__}:\d+ (reads|makes)"):
        trace(function, [X])


def test_the_line_is_the_one_that_asks() -> None:
    def function(x: Tensor) -> list[Tensor]:
        y = x * 2
        if y.sum() > 0:
            return [x]
        return [y]

    with pytest.raises(HostRead, match=rf"{__file__}:{line_of(function, 'if y.sum')} reads a tensor's value"):
        trace(function, [X])


def test_questions_about_draws_raise_and_about_constants_do_not() -> None:
    with pytest.raises(HostRead, match="reads"):
        trace(lambda x: [x * (torch.rand(()) > 0.5).item()], [X])
    constant = torch.tensor(4.0)
    graph = trace(lambda x: [x * constant.item() if constant > 3 else x], [X])
    assert graph(X)[0].tolist() == [4.0, -8.0, 12.0]
    assert trace(lambda x: [x * x.shape[0]], [X])(X)[0].tolist() == [3.0, -6.0, 9.0]


def test_state_that_is_not_an_input_is_refused() -> None:
    count = torch.zeros(2, 3)

    def function(x: Tensor) -> list[Tensor]:
        count[1] += 1
        return [x + count[1]]

    with pytest.raises(Untraceable, match=r"shape \(2, 3\).*in place"):
        trace(function, [X])


def test_equal_nodes_are_one_and_useless_ones_none() -> None:
    graph = trace(lambda x, y: [(x + y) * (x + y), (x - y) if x is None else (x + y) * 2], [X, Y])
    assert sorted(kinds(graph)) == ["add", "mul", "mul"]
    graph = trace(lambda x, y: [x.sin() + 0 * 1, x + y][1:], [X, Y])
    assert kinds(graph) == ["add"]
    scaled = trace(lambda x: [x * 2.0, x * -0.0, x * 0.0], [X])  # -0.0 == 0.0 in Python
    assert torch.equal(scaled(X)[1].signbit(), torch.tensor([True, False, True]))
    assert torch.equal(scaled(X)[2].signbit(), torch.tensor([False, True, False]))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(50),
        lambda: torch.randn(50),
        lambda: torch.empty(50).uniform_(0, 1),
        lambda: torch.empty(50).normal_(),
        lambda: torch.randint(0, 1000, (50,)).float(),
        lambda: torch.randperm(50).float(),
        lambda: torch.full((50,), 0.5).bernoulli(),
        lambda: torch.bernoulli(torch.full((50,), 0.5)),
        lambda: torch.multinomial(torch.ones(50), 20).float(),
        lambda: torch.empty(50).exponential_(),
        lambda: torch.rand_like(torch.zeros(50)),
        lambda: torch.randn_like(torch.zeros(50)),
        lambda: torch.normal(torch.zeros(50), torch.ones(50)),
        lambda: torch.poisson(torch.full((50,), 9.0)),
        lambda: torch.empty(50).random_(),
        lambda: torch.empty(50).log_normal_(),
    ],
)
def test_two_draws_are_two_and_those_of_pytorch(draw: Callable[[], Tensor]) -> None:
    graph = trace(lambda x: [x[:1] + draw(), x[:1] + draw()], [X])
    assert tracing.has_draws(graph)
    torch.manual_seed(5)
    first = [X[:1] + draw() for _ in range(2)]
    torch.manual_seed(5)
    found = graph(X)
    assert torch.equal(found[0], first[0]) and torch.equal(found[1], first[1])
    assert not torch.equal(found[0], found[1]), "one draw for two"
    assert not torch.equal(graph(X)[0], found[0]), "one draw for two replays"


def test_small_constants_are_computed_once() -> None:
    graph = trace(lambda x: [x + torch.tensor([1.0, 2.0, 3.0]).cumsum(0)], [X])
    assert kinds(graph) == ["add"] and graph(X)[0].tolist() == [2.0, 1.0, 9.0]
    weight = torch.eye(3)
    graph = trace(lambda x: [torch.linalg.cholesky(weight * 4) @ x], [X])  # a factorization checks itself
    assert graph(X)[0].tolist() == [2.0, -4.0, 6.0] and not any("check" in kind for kind in kinds(graph))
    with pytest.raises(HostRead, match="factorization"):
        trace(lambda x: [torch.linalg.cholesky(torch.diag(x * x))], [X])


def test_needed_and_restrict() -> None:
    graph = trace(lambda x, y, z: [x + 1, y * 2, x * z], [X, Y, Y])
    assert [tracing.needed(graph, [i]) for i in range(3)] == [{0}, {1}, {0, 2}]
    assert tracing.needed(graph, [0, 1]) == {0, 1}
    tracing.restrict(graph, [0, 2], [2, 0])
    assert [v.tolist() for v in graph(X, Y)] == [[0.5, -1.0, 6.0], [2.0, -1.0, 4.0]]
    assert tracing.outputs(graph) == 2 and "mul" in kinds(graph) and len(kinds(graph)) == 2


def test_a_draw_that_code_cannot_name_is_refused_with_its_line() -> None:
    with pytest.raises(Untraceable, match=r"test_tracing\.py:\d+ draws by Tensor.random_\(from, to\); torch.randint"):
        trace(lambda x: [x.clone().random_(0, 5)], [X])


def test_repeated_parts_and_small_constants_are_not_computed() -> None:
    """A stack of one tensor is a view of it; a constant is found where only a larger one is made of it."""

    def function(x: Tensor) -> list[Tensor]:
        ones = torch.stack([torch.tensor(1.0), torch.tensor(2.0)])  # [2]
        rows = torch.stack([x, x], 1)  # [3, 2]
        joined = torch.cat([x[:1], x[:1]])  # [2]
        return [rows * 2, joined + 1, x.new_zeros(400, 2) + ones + x[0]]

    graph = trace(function, [X])
    for found, expected in zip(graph(X), function(X)):
        assert torch.equal(found, expected)
    left = {str(node.target) for node in graph.graph.nodes}
    assert not {name for name in left if "stack" in name or "cat" in name}
    assert "aten.expand.default" in left
