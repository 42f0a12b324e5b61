"""Compiled functions done again without their Python: the same numbers, in the same places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.fx.experimental.proxy_tensor import make_fx

from tdmarl import cpu_graph
from tdmarl.cpu_graph import Compiled, NotRecordable, Replayed, Tape, Turns

A, B = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(0, 2, 16).view(4, 4)


def layered(a: Tensor, b: Tensor) -> list[Tensor]:
    """A product, a draw, loops over both, views of a result and of an input, and an input itself."""
    x = torch.sin(a @ b)
    noise = torch.randn(3, 4) + torch.rand(3, 4)
    y = x.T * 2
    return [y, (x + noise).sum(0), x[:, 1:], a.view(-1), a, noise]


def graph_of(function: Any, *inputs: Tensor) -> fx.GraphModule:
    return make_fx(function)(*inputs)


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return Compiled(graph_of(layered, A, B), [A, B], {"fallback_random": True})


def test_a_tape_does_again_what_a_compiled_function_did(compiled: Compiled) -> None:
    a, b = A.clone(), B.clone()
    torch.manual_seed(0)
    expected = compiled(a, b)
    torch.manual_seed(0)
    with Tape() as tape:
        found = compiled(a, b)
    for x, y in zip(found, expected):
        assert torch.equal(x, y)
    places = [x.data_ptr() for x in found]
    for seed in (1, 2):
        a.copy_(A * seed + 0.5), b.copy_(B - seed)
        torch.manual_seed(seed)
        expected = compiled(a.clone(), b.clone())
        torch.manual_seed(seed)
        tape()
        assert torch.equal(torch.get_rng_state(), _after(seed, compiled))
        for x, y in zip(found, expected):
            assert torch.equal(x, y)
    assert [x.data_ptr() for x in found] == places
    kernels = [
        call for call in tape.calls if "kernel" in getattr(getattr(call, "func", None), "__name__", "")
    ]
    assert kernels and len(tape.calls) <= 6, "no allocation, no view and no wrapper is called again"


def _after(seed: int, compiled: Compiled) -> Tensor:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        compiled(A, B)
        return torch.get_rng_state()


def test_what_was_compiled_before_is_found_on_disk_and_can_be_recorded() -> None:
    with fresh_cache():
        Compiled(graph_of(layered, A, B), [A, B], {"fallback_random": True})
        counters.clear()
        again = Compiled(graph_of(layered, A, B), [A, B], {"fallback_random": True})
        assert counters["inductor"]["fxgraph_cache_hit"] == 1
        before = torch.get_num_threads()
        torch.set_num_threads(before + 1)
        try:
            Compiled(graph_of(layered, A, B), [A, B], {"fallback_random": True})
        finally:
            torch.set_num_threads(before)
        assert counters["inductor"]["fxgraph_cache_hit"] == 1, "its loops are for other threads"
        a, b = A.clone(), B.clone()
        with Tape() as tape:
            found = again(a, b)
        a.copy_(2 * A), b.copy_(B - 1)
        tape()
        torch.testing.assert_close(found[0], 2 * torch.sin(a @ b).T)
        again._inner.clear()
        with pytest.raises(NotRecordable, match="Inductor made"), Tape():
            again(a, b)


def test_a_tape_writes_where_its_function_wrote() -> None:
    def step(w: Tensor, grad: Tensor) -> list[Tensor]:
        new = w - 0.5 * grad.cos()
        w.copy_(new)
        return [new.sum()]

    w, grad = torch.ones(5), torch.linspace(0, 1, 5)
    made = Compiled(graph_of(step, w.clone(), grad), [w.clone(), grad], {})
    with Tape() as tape:
        (total,) = made(w, grad)
    torch.testing.assert_close(w, 1 - 0.5 * grad.cos())
    grad.zero_()
    tape()
    torch.testing.assert_close(w, 0.5 - 0.5 * torch.linspace(0, 1, 5).cos())
    torch.testing.assert_close(total, w.sum())


def test_operations_are_recorded_as_well() -> None:
    a = A.clone()
    with Tape() as tape:
        low, high = torch.aminmax(a, dim=1)
        first = a.unbind(0)[0]
        copy = a.clone()
        copy += low.unsqueeze(-1)
        flags = (a > 0).any()
    a.copy_(A.flip(0) * 3)
    tape()
    assert torch.equal(low, a.amin(1)) and torch.equal(high, a.amax(1)) and torch.equal(first, a[0])
    assert torch.equal(copy, a + a.amin(1, keepdim=True)) and flags.dtype == torch.bool
    a.fill_(-1)
    tape()
    assert not flags


@pytest.mark.parametrize("threads, stack, calls", [(2, 3, 2), (2, 4, 1), (4, 6, 3), (4, 3, 1), (1, 3, 1)])
def test_products_that_are_left_over_are_shared_by_the_threads(threads: int, stack: int, calls: int) -> None:
    before = torch.get_num_threads()
    a, b, bias = torch.randn(stack, 128, 256), torch.randn(stack, 256, 256), torch.randn(stack, 1, 256)
    inputs = a, b, bias
    function = Compiled(graph_of(lambda a, b, c: [a @ b, torch.baddbmm(c, a, b)], *inputs), inputs, {})
    torch.set_num_threads(threads)
    try:
        with Tape() as tape:
            found = function(*inputs)
        assert len(tape.calls) == 2 * calls
        for x in inputs:
            x.mul_(-0.5)
        tape()
        for x, y in zip(found, (a @ b, torch.baddbmm(bias, a, b))):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_what_python_reads_is_refused() -> None:
    with pytest.raises(NotRecordable, match="value is read"), Tape():
        float(A.sum())
    assert float(A.sum() * 0) == 0, "afterwards nothing is recorded"
    assert cpu_graph._local.tape is None


def test_code_of_another_kind_is_refused(compiled: Compiled) -> None:
    inner = compiled._inner[0]
    before = inner.current_callable
    inner.current_callable = lambda inputs: before(inputs)
    try:
        with pytest.raises(NotRecordable, match="unknown kind"), Tape():
            compiled(A, B)
        assert len(compiled(A, B)) == 6
    finally:
        inner.current_callable = before


def test_memory_comes_from_where_it_is_asked_for(compiled: Compiled) -> None:
    asked: list[tuple[int, Tensor]] = []

    def allocate(n: int, size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        asked.append((n, torch.zeros(100, dtype=dtype)))
        return asked[-1][1].as_strided(size, stride)

    with Tape(allocate) as tape:
        found = compiled(A, B)
    assert [n for n, _ in asked] == list(range(len(tape.allocated)))
    owned = {x.data_ptr() for _, x in asked}
    assert all(x.untyped_storage().data_ptr() in owned for i, x in enumerate(found) if i not in (3, 4))


def test_replayed_gives_results_of_their_own(compiled: Compiled) -> None:
    take = Replayed(compiled, 1)
    results = []
    for seed in range(3):
        a = A * (seed + 1)
        torch.manual_seed(seed)
        found = take(a.T.contiguous().T if seed == 2 else a, B)  # in another order in memory: it is copied
        torch.manual_seed(seed)
        results.append((found, compiled(a, B)))
    for found, expected in results:
        for x, y in zip(found, expected):
            assert torch.equal(x, y)
    assert take.whole_because == ""


def assert_same_twice(take: Replayed, compiled: Compiled) -> None:
    for _ in range(2):
        torch.manual_seed(0)
        found = take(A, B)
        torch.manual_seed(0)
        assert all(torch.equal(x, y) for x, y in zip(found, compiled(A, B)))


def test_replayed_calls_what_is_large_or_strange_as_it_is(compiled: Compiled, monkeypatch: Any) -> None:
    monkeypatch.setattr(cpu_graph, "_MOST_BYTES", 10)
    take = Replayed(compiled, 2)
    assert_same_twice(take, compiled)
    assert "MB" in take.whole_because
    inner = compiled._inner[0]
    before = inner.current_callable
    monkeypatch.setattr(inner, "current_callable", lambda inputs: before(inputs))
    take = Replayed(compiled, 2)
    assert_same_twice(take, compiled)
    assert "unknown kind" in take.whole_because


@pytest.mark.parametrize("turns", [1, 2, 5])
def test_turns_of_a_loop_share_their_memory(turns: int) -> None:
    """Each adds to the last one's sum; a whole is put together from parts of each."""
    x = torch.randn(turns * 3, 4)
    layer = Compiled(graph_of(lambda total, a: [total + a.sin().sum(0), a.exp() * 2], A[0], A), [A[0], A], {})

    def loop(x: Tensor) -> list[Tensor]:
        memory, total, whole = Turns(), torch.zeros(4), cpu_graph.empty(x.shape, x.dtype)
        for i in range(turns):
            with memory.next():
                total, part = layer(total, x[3 * i : 3 * i + 3])
            memory.carry([total])
            whole[3 * i : 3 * i + 3].copy_(part)
        return [total, whole]

    take = Replayed(loop, 1)
    for _ in range(3):
        x = torch.randn_like(x)
        for found, expected in zip(take(x), [x.sin().sum(0), x.exp() * 2]):
            torch.testing.assert_close(found, expected)
    assert take.whole_because == "" and take._tape is not None
    assert len({y.data_ptr() for y in take._tape.allocated}) <= 2 + min(turns, 2) + 1  # zeros, whole; sums; part


def test_a_half_recorded_step_is_taken_once(monkeypatch: Any) -> None:
    """Where recording ends in the middle, what was written by then is undone before the function is called."""

    def step(x: Tensor, w: Tensor) -> list[Tensor]:
        w += x
        if cpu_graph._local.__dict__.get("tape") is not None:
            raise NotRecordable("in the middle")
        return [w * 2]

    take, w = Replayed(step, 1), torch.zeros(2)
    for i in (1, 2):
        (found,) = take(torch.ones(2), w)
        assert torch.equal(w, torch.full((2,), float(i))) and torch.equal(found, 2 * w)
    assert take.whole_because == "in the middle"


def test_code_that_uses_what_nobody_knows_is_refused(compiled: Compiled, monkeypatch: Any) -> None:
    inner = compiled._inner[0]
    function = inner.current_callable.__func__
    kernel = next(name for name in function.__globals__ if name.startswith("cpp_fused"))
    before = function.__globals__[kernel]
    monkeypatch.setitem(function.__globals__, kernel, lambda *args: before(*args))
    with pytest.raises(NotRecordable, match=f"uses {kernel}"), Tape():
        compiled(A, B)
