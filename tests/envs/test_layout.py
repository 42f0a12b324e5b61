"""With environments last in memory every value and shape stays what it was."""

from __future__ import annotations

from typing import Callable

import pytest
import torch
from torch import Tensor

from torch.utils._python_dispatch import TorchDispatchMode

from tdmarl.envs.layout import environments_last, is_wide, last, rows
from tdmarl.tracing import trace

E = 7
EXAMPLES = [(E, 2), (E, 3, 2), (E,), (3,)]


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in EXAMPLES]


def is_last(x: Tensor, envs: int = E) -> bool:
    """Whether neighbours in memory are neighbouring environments."""
    if envs not in x.shape:
        return True
    place = list(x.shape).index(envs)
    return x.stride(place) == 1 and x.movedim(place, -1).is_contiguous()


def test_last_moves_memory_alone() -> None:
    x = torch.arange(E * 3 * 2.0).reshape(E, 3, 2)
    found = last(x, E)
    assert torch.equal(found, x) and found.stride() == (1, 2 * E, E)
    assert last(torch.ones(4, 2).T, E).is_contiguous()
    assert last(torch.zeros(3, E, 2), E).stride() == (2 * E, 1, E)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, c, d: a * 2 + c[:, None],
        lambda a, b, c, d: torch.stack([a, a + 1, a * c.unsqueeze(-1)], 1) - b,
        lambda a, b, c, d: torch.stack([c, -c], -1),
        lambda a, b, c, d: torch.stack([a, a], 0),
        lambda a, b, c, d: torch.stack([a, a, a], 1) + b,
        lambda a, b, c, d: d[:, None].expand(3, 2).reshape(6) + 1,
        lambda a, b, c, d: torch.cat([a, b.flatten(1), c[:, None]], -1),
        lambda a, b, c, d: torch.cat([a, a + 1], 0),
        lambda a, b, c, d: torch.linalg.vector_norm(b - a[:, None], dim=-1),
        lambda a, b, c, d: b.sum(-1) + b.sum((1, 2), keepdim=True)[..., 0],
        lambda a, b, c, d: b.sum(),
        lambda a, b, c, d: b.mean(0) + d[:, None],
        lambda a, b, c, d: (b > 0).any(-1),
        lambda a, b, c, d: (b > 0).all(),
        lambda a, b, c, d: b.amin(1),
        lambda a, b, c, d: b.min(1).values + b.max(1, keepdim=True).values[:, 0],
        lambda a, b, c, d: b.min(1).indices,
        lambda a, b, c, d: b.argmax(1),
        lambda a, b, c, d: b.sort(dim=1).values,
        lambda a, b, c, d: b.cumsum(1),
        lambda a, b, c, d: b.gather(1, b.argmax(1, keepdim=True)),
        lambda a, b, c, d: a.view(E, 1, 2).expand(-1, 3, -1).reshape(E, 6),
        lambda a, b, c, d: b.reshape(E * 3, 2),
        lambda a, b, c, d: b.transpose(1, 2) @ b,
        lambda a, b, c, d: torch.einsum("eij,ekj->eik", b, b),
        lambda a, b, c, d: torch.where(c[:, None] > 0, a, d[:2]),
        lambda a, b, c, d: a.unsqueeze(0) - a.unsqueeze(1),
        lambda a, b, c, d: torch.full((E, 2), 0.5) + a,
        lambda a, b, c, d: torch.zeros(E, 3, 2).clone() + b.clone(),
        lambda a, b, c, d: a.to(torch.float64).round().to(torch.int64),
        lambda a, b, c, d: b[:, 1] + b.select(1, 0) - b[:, [2, 0, 1]].sum(1),
        lambda a, b, c, d: a.roll(1, 0) + a.flip(0),
        lambda a, b, c, d: torch.nn.functional.pad(a, (0, 3)),
        lambda a, b, c, d: torch.cross(torch.cat([a, c[:, None]], 1), b.flatten(1)[:, :3], dim=1),
        lambda a, b, c, d: torch.atan2(a[:, 0], a[:, 1]).clamp(-1, 1),
        lambda a, b, c, d: a.as_strided((2, 2), (1, 2)) + 0,
    ],
)
@pytest.mark.parametrize("contiguous", [False, True])
def test_values_stay_and_environments_are_last(function: Callable[..., Tensor], contiguous: bool) -> None:
    given = inputs()
    expected = function(*given)
    graph = trace(lambda *x: [function(*x)], given)
    laid = environments_last(graph, [last(x, E) for x in given], E, {0} if contiguous else set())
    (found,) = laid(*[last(x, E) for x in given])
    assert found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert found.is_contiguous() if contiguous else is_last(found)


def test_writes_into_parts_stay() -> None:
    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        x = x.clone()
        x[:, 1] = y
        x[:, 0, 1:] += 1
        x[2] = 0
        return [x]

    given = [torch.randn(E, 3, 2), torch.randn(E, 2)]
    laid = environments_last(trace(function, given), [last(x, E) for x in given], E, set())
    (found,) = laid(*[last(x, E) for x in given])
    assert torch.equal(found, function(*given)[0]) and is_last(found)


@pytest.mark.parametrize(
    "function, entries",
    [
        (lambda a, b: torch.cos(a[:, None].expand(-1, 3, -1)), 2 * E),
        (lambda a, b: torch.cos(a[:1].expand(E, -1)), 2),
        (lambda a, b: torch.cos((a[:, None] + 1).expand(-1, 3, -1)).exp() + b, 2 * E),
        (lambda a, b: torch.cos(a[:, None] + b), 6 * E),
    ],
)
def test_what_is_computed_of_repetitions_is_computed_once(
    function: Callable[..., Tensor], entries: int
) -> None:
    given = [torch.randn(E, 2), torch.randn(E, 3, 2)]
    laid = environments_last(trace(lambda *x: [function(*x)], given), [last(x, E) for x in given], E, set())
    counted = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.aten.cos.default:
                counted.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    with Count():
        (found,) = laid(*[last(x, E) for x in given])
    assert counted == [entries]
    assert torch.equal(found, function(*given)) and is_last(found)


def test_constants_have_environments_last_too() -> None:
    table = torch.randn(E, 300)  # too large to be computed ahead
    graph = trace(lambda x: [x[:, :1] + table], [torch.randn(E, 2)])
    laid = environments_last(graph, [last(torch.randn(E, 2), E)], E, set())
    assert [is_last(constant) for constant in laid.buffers()] == [True]


def test_rows_of_many_entries_are_contiguous() -> None:
    few, many = torch.randn(E, 3, 5), torch.randn(E, 4, 4)
    assert not is_wide(few.shape, E) and is_last(rows(few, E))
    assert is_wide(many.shape, E) and rows(last(many, E), E).is_contiguous()
    assert torch.equal(rows(few, E), few) and torch.equal(rows(last(many, E), E), many)


def test_draws_are_those_of_pytorch() -> None:
    """The same numbers in the same places, whatever the order in memory."""

    def function(x: Tensor) -> list[Tensor]:
        return [x + torch.rand(E, 2), torch.randn_like(x), torch.empty(E, 3, 2).uniform_(-1, 1) + 0]

    given = [torch.randn(E, 2)]
    torch.manual_seed(0)
    expected = function(*given)
    laid = environments_last(trace(function, given), [last(given[0], E)], E, set())
    torch.manual_seed(0)
    for a, b in zip(laid(last(given[0], E)), expected):
        assert torch.equal(a, b) and is_last(a)


@pytest.mark.parametrize("envs", [1, 2, 3, 6])
def test_a_number_of_environments_that_other_sizes_have_too(envs: int) -> None:
    """Then another dimension may be taken for that of environments, which costs time and changes nothing."""

    def function(a: Tensor, b: Tensor) -> list[Tensor]:
        both = torch.cat([a[:, None], b], 1)  # [E, 4, 2]
        near = (both[:, :, None] - both[:, None]).norm(dim=-1)  # [E, 4, 4]
        stacked = torch.stack([b.sum(1), a, a], 0)  # [3, E, 2]
        return [near.amin(-1), both.flatten(1), stacked, stacked.transpose(0, 1).sum(1), near > 0.5]

    given = [torch.randn(envs, 2), torch.randn(envs, 3, 2)]
    laid = environments_last(trace(function, given), [last(x, envs) for x in given], envs, {1})
    for a, b in zip(laid(*[last(x, envs) for x in given]), function(*given)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
