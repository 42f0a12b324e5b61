"""Modules as functions of tensors: compiled once for a layout, and only for that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdmarl import functions, tracing
from tdmarl.functions import Accelerated, Function, Layout


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands in for the compiler; the shapes of first inputs for which it was asked."""
    asked: list[Any] = []

    def compiled(graph: Any, inputs: list[Tensor], options: Any) -> Any:
        asked.append(tuple(inputs[-1].shape))
        return graph

    monkeypatch.setattr("tdmarl.cpu_graph.Compiled", compiled)
    return asked


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.times = nn.Parameter(torch.tensor([[2.0]])), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.times * x * self.weight


def make() -> tuple[Scaled, Accelerated]:
    net = Scaled()
    return net, Accelerated(TensorDictModule(net, [("g", "x")], [("g", "y")]), "values")


def rows(n: int, k: int = 3) -> TensorDict:
    x = torch.arange(float(n * k)).view(n, k, 1)
    return TensorDict({"g": TensorDict({"x": x, "unread": x.bool()}, [n, k])}, [n])


def test_one_layout_is_compiled_and_others_are_not(compilers: list[Any]) -> None:
    net, values = make()
    for n in (4, 2, 4, 7, 4):
        values.begin()
        found = values(rows(n))
        assert set(found.keys(True, True)) == {("g", "y")} and found.batch_size == (n,)
        assert found["g"].batch_size == (n, 3) and not found["g", "y"].requires_grad
        assert torch.equal(found["g", "y"], 2 * rows(n)["g", "x"])
    assert len(compilers) == 1 and values.reason == ""
    with torch.no_grad():
        net.weight.fill_(5.0)
    assert torch.equal(values(rows(4))["g", "y"], 5 * rows(4)["g", "x"]), "parameters are read where they are"
    assert len(compilers) == 1


def test_what_python_changes_is_compiled_anew_and_then_called(compilers: list[Any]) -> None:
    net, values = make()
    with pytest.warns(UserWarning, match="Values run as mode='eager': its Python changed 3 times"):
        for i in range(6):
            net.times = 1.0 + i
            values.begin()
            assert torch.equal(values(rows(4))["g", "y"], (2 + 2 * i) * rows(4)["g", "x"])
    assert len(compilers) == functions.MOST_BUILDS and "3 times" in values.reason


def test_what_cannot_be_recorded_is_called_after_one_warning(compilers: list[Any]) -> None:
    def reads(x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x

    values = Accelerated(TensorDictModule(reads, [("g", "x")], [("g", "y")]), "values")
    with pytest.warns(UserWarning, match="Values run as mode='eager'.*reads a tensor") as caught:
        for _ in range(3):
            assert torch.equal(values(rows(2))["g", "y"], rows(2)["g", "x"])
    assert len(caught) == 1 and not compilers


def test_inputs_that_are_not_needed_are_not_passed_on(compilers: list[Any]) -> None:
    a, b = torch.ones(3), torch.full((3,), 2.0)
    function = Function(tracing.trace(lambda x, y, z: [x * 2, x + z], [a, b, a]), [a, b, a], "compile")
    assert function.used == [0, 2] and not function.draws
    first, second = function([a, b, b])
    assert torch.equal(first, 2 * a) and torch.equal(second, a + b)


def test_a_layout_nests_entries_with_a_dimension_of_time() -> None:
    layout = Layout(rows(2))
    x = torch.zeros(2, 5, 3, 1)
    found = layout.nest({("g", "x"): x, ("next", "g", "x"): x, ("done",): x[:, :, 0]}, time=5)
    assert found.batch_size == (2, 5) and found["g"].batch_size == (2, 5, 3)
    assert found["next", "g"].batch_size == (2, 5, 3) and found["done"].shape == (2, 5, 1)
