"""Records what compiled functions do on a CPU and does it again: kernels and operations, in fixed places of memory.

A compiled function of a small batch takes longer to allocate its results, to make views of them and to get through
its wrappers than to compute. None of that depends on values, so it is done once: a :class:`Tape` keeps the kernels
that Inductor made and the operations of PyTorch that were called, with the tensors they were called with. Doing them
again computes the same function of what lies in the same places now, as a CUDA graph does on a GPU.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import functools
import itertools
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, _guards, fx
from torch._functorch import config as functorch
from torch._inductor import compile_fx, cpu_vec_isa
from torch._prims_common import make_contiguous_strides_for
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_DRAWS = {aten.randn.default: Tensor.normal_, aten.rand.default: Tensor.uniform_}  # the same numbers in place
_MOST_BYTES = 2**26  # that one function keeps: beyond, its work outweighs its Python
_LARGE_PRODUCT = 2**22  # multiplications, from which on two threads share one at no loss
_local = threading.local()  # its `tape` is the one that records in this thread
# What Inductor's code uses besides kernels and constants: what needs no second call, or is seen as an operation.
_HELPERS = {
    "torch", "aten", "device", "inductor_ops", "extern_kernels", "empty_strided_cpu", "empty_strided",
    "reinterpret_tensor", "assert_size_stride", "assert_alignment",
}  # fmt: skip


class NotRecordable(Exception):
    """A function does something that cannot be done again without its Python."""


class Compiled:
    """A graph compiled by Inductor, which a :class:`Tape` can record.

    Args:
        graph (GraphModule): of tensors, returns a list of tensors.
        examples (sequence of Tensor): inputs, in the order in memory that later ones have.
        options (dict): Inductor's.
    """

    def __init__(self, graph: fx.GraphModule, examples: Sequence[Tensor], options: dict[str, Any]) -> None:
        self._inner: list[Any] = []

        def make(*args: Any, **kwargs: Any) -> Any:
            made = compile_fx.compile_fx_inner(*args, **kwargs)
            self._inner.append(made)
            return made

        given: list[Any] = list(examples)
        # Inductor looks for what it compiled before, on disk, only where somebody keeps account of symbolic sizes;
        # what is kept of the stage before it would not pass by `make`.
        shapes = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
        kept = functorch.patch(enable_autograd_cache=False)
        with torch.no_grad(), kept, _guards.tracing(_guards.TracingContext(shapes)):
            self._call: Any = compile_fx.compile_fx(
                graph, given, inner_compile=make, config_patches={**options, **_machine()}
            )

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        tape: Tape | None = getattr(_local, "tape", None)
        if tape is not None:
            return list(tape.run(self._inner, self._call, inputs))
        return list(self._call(*inputs))


def _machine() -> dict[str, Any]:
    """What C++ is written for: what was written for other threads or vectors is not what is looked for on disk."""
    return {"cpp.threads": torch.get_num_threads(), "cpp.simdlen": cpu_vec_isa.pick_vec_isa().bit_width()}


class Tape(TorchDispatchMode):
    """Records what happens on a CPU while it is entered; calling it does that again.

    Tensors that are made while it records keep their places, which each call overwrites. What Python decides is
    decided once.

    Args:
        allocate (callable, optional): gives the memory for a result or an intermediate, from how many there were
            before in this recording, size, stride and type.

    Attributes:
        calls (list of callable): what is done.
        allocated (list of Tensor): results and intermediates, in order.

    Raises:
        NotRecordable: while recording: a value is read, or a compiled function is not of the known kind.

    Example:
        >>> a = torch.ones(2)
        >>> with Tape() as tape:
        ...     b = a * 2 + 1
        >>> a.fill_(5.0), tape(), b
        (tensor([5., 5.]), None, tensor([11., 11.]))
    """

    def __init__(
        self, allocate: Callable[[int, tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []
        self.allocated: list[Tensor] = []
        self._allocate = allocate
        self._passes = False  # what is called now is on the tape as a whole

    def __enter__(self) -> Tape:
        super().__enter__()
        _local.tape = self
        return self

    def __exit__(self, *args: Any) -> None:
        _local.tape = None
        super().__exit__(*args)

    def __call__(self) -> None:
        for call in self.calls:
            call()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._passes:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            raise NotRecordable("a tensor's value is read")
        found = func(*args, **kwargs)
        again = functools.partial(func, *args, **kwargs)
        known = {_place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        is_new = [_place(x) not in known for x in tree_leaves(found) if isinstance(x, Tensor)]
        if func._schema.is_mutable:
            if any(is_new):
                raise NotRecordable(f"{func} writes into its inputs and makes tensors, too")
            self.calls.append(again)
            return found
        if not any(is_new):
            return found  # views, which stay
        if not isinstance(found, Tensor):
            places = list(found)
            if not all(is_new) or len(is_new) < len(places):
                raise NotRecordable(f"{func} returns more than new tensors")
            self.calls.append(lambda: torch._foreach_copy_(places, list(again())))
            return found
        with self._apart():
            place = self._empty(_empty_strided, found.shape, found.stride(), found.dtype).copy_(found)
        if func is aten.clone.default:
            self.calls.append(functools.partial(place.copy_, args[0]))
        elif func in _DRAWS and kwargs.get("generator") is None and place.is_contiguous():
            self.calls.append(functools.partial(_DRAWS[func], place))
        else:
            self.calls.append(lambda: place.copy_(again()))
        return place

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """What is called inside is on the tape as a whole, or not at all."""
        before, self._passes = self._passes, True
        try:
            yield
        finally:
            self._passes = before

    def run(self, inner: Sequence[Any], outer: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        """What a compiled function returns, its kernels recorded.

        Args:
            inner (sequence of CompiledFxGraph): Inductor's part of it.
            outer (callable): with the wrappers around, whose operations are recorded as any others.
            inputs (sequence of Tensor): its arguments.
        """
        if not inner:
            raise NotRecordable("of a compiled function it is not known what Inductor made")
        inner = [made for made in inner if hasattr(made, "current_callable")]  # others hand on what they are given
        before = [made.current_callable for made in inner]
        try:
            for made in inner:
                made.current_callable = self._taped(made.current_callable)
            return outer(*inputs)
        finally:
            for made, call in zip(inner, before):
                made.current_callable = call

    def _taped(self, call: Any) -> Callable[..., Any]:
        """The code that Inductor wrote, with its kernels and its memory taken from here."""
        function = getattr(call, "__func__", None)
        names = dict(getattr(function, "__globals__", {}))
        if function is None or not _HELPERS <= set(names):
            raise NotRecordable(f"Inductor's code is of an unknown kind, {type(call).__name__}")
        used = {step.argval for step in dis.get_instructions(function.__code__) if step.opname == "LOAD_GLOBAL"}
        for name in used - _HELPERS:
            value = names.get(name, getattr(builtins, name, None))
            if isinstance(value, types.BuiltinFunctionType) and name in names:
                names[name] = self._recorded(value)  # a kernel
            elif not isinstance(value, (Tensor, types.BuiltinFunctionType, type)):
                raise NotRecordable(f"Inductor's code uses {name}, of which it is not known what it does")
        names["extern_kernels"] = _ExternKernels(self, names["extern_kernels"])
        names["empty_strided_cpu"] = functools.partial(self._empty, names["empty_strided_cpu"])
        return functools.partial(types.FunctionType(function.__code__, names), call.__self__)

    def _recorded(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(functools.partial(kernel, *args, **kwargs))
            with self._apart():
                return kernel(*args, **kwargs)

        return run

    def _empty(self, make: Any, size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        """Memory for a result."""
        with self._apart():
            number = len(self.allocated)
            give = self._allocate
            found = make(size, stride, dtype) if give is None else give(number, size, stride, dtype)
        self.allocated.append(found)
        return found


class Turns:
    """Memory for the turns of a loop while a :class:`Tape` records them: each writes where the last one wrote.

    What a turn reads of the last one's results, its own must not overwrite: see `carry`. Where nothing records, this
    does nothing.

    Example:
        >>> a, turns = torch.ones(2), Turns()
        >>> with Tape() as tape:
        ...     for _ in range(4):
        ...         with turns.next():
        ...             a = (a * 2) + 1
        ...         turns.carry([a])
        >>> a, len({x.data_ptr() for x in tape.allocated})
        (tensor([31., 31.]), 3)
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[int, int], Tensor] = {}
        self._carried: set[int] = set()
        self._number = 0

    @contextlib.contextmanager
    def next(self) -> Iterator[None]:
        """One turn."""
        tape: Tape | None = getattr(_local, "tape", None)
        if tape is None or tape._allocate is not None:
            yield
            return
        count = itertools.count()

        def allocate(_: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
            n = next(count)
            place = n, self._number % 2 if n in self._carried else 0
            found = self._memory.get(place)
            if found is None or (*found.shape, *found.stride(), found.dtype) != (*size, *stride, dtype):
                found = self._memory[place] = _empty_strided(size, stride, dtype)
            return found

        tape._allocate = allocate
        try:
            yield
        finally:
            tape._allocate = None
            self._number += 1

    def carry(self, results: Iterable[Tensor]) -> None:
        """Keeps a turn's results for the next one, which makes its own beside them."""
        kept = {x.untyped_storage().data_ptr() for x in results}
        self._carried |= {n for (n, _), x in self._memory.items() if x.untyped_storage().data_ptr() in kept}


def empty(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `torch.empty`, on a CPU; while a :class:`Tape` records, memory that is always the same."""
    tape: Tape | None = getattr(_local, "tape", None)
    if tape is None:
        return torch.empty(size, dtype=dtype)
    return tape._empty(_empty_strided, size, make_contiguous_strides_for(torch.Size(size)), dtype)


class Replayed:
    """A compiled function whose kernels are recorded in its first call, and called alone from then on.

    Args:
        function (callable): tensors in, list of tensors out; what it writes into is written in place.
        given (int): so many inputs first are different tensors in each call; the others are always the same ones.

    Attributes:
        whole_because (str): why the function is called as it is, if it is.
    """

    def __init__(self, function: Callable[..., list[Tensor]], given: int) -> None:
        self._function, self._given = function, given
        self._tape: Tape | None = None
        self._places: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self.whole_because = ""

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        if self.whole_because:
            return self._function(*inputs)
        if self._tape is None:
            return self._record(inputs)
        torch._foreach_copy_(self._places, inputs[: self._given])
        self._tape()
        return [x.clone() for x in self._outputs]

    def _record(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        own = [x.clone() for x in inputs[: self._given]]  # compiled code does not look how they lie
        before = [x.clone() for x in inputs[self._given :]]
        tape = Tape()
        try:
            with tape:
                found = self._function(*own, *inputs[self._given :])
        except NotRecordable as error:
            for x, was in zip(inputs[self._given :], before):  # a part of it may be done
                x.copy_(was)
            self.whole_because = str(error)
            return self._function(*inputs)
        size = sum(x.nbytes for x in {id(x): x for x in [*tape.allocated, *own]}.values())
        if size > _MOST_BYTES:
            self.whole_because = f"its results and intermediates are {size / 1e6:.0f} MB"
            return found
        self._tape, self._places, self._outputs = tape, own, found
        return [x.clone() for x in found]


class _ExternKernels:
    """Inductor's calls of library functions; those that write their result into given memory are recorded as such."""

    def __init__(self, tape: Tape, kernels: Any) -> None:
        self._tape, self._kernels = tape, kernels

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self._kernels, name)
        by_one: Any = {"bmm": torch.mm, "baddbmm": torch.addmm}.get(name)

        def run(*args: Any, **kwargs: Any) -> Any:
            if "out" not in kwargs:
                return kernel(*args, **kwargs)
            rest = 0 if by_one is None else _unshared(*args[-2:])
            if by_one is None or not rest:
                return self._tape._recorded(kernel)(*args, **kwargs)
            out = kwargs.pop("out")
            self._tape._recorded(kernel)(*(x[:-rest] for x in args), **kwargs, out=out[:-rest])
            for i in range(-rest, 0):
                self._tape._recorded(by_one)(*(x[i] for x in args), **kwargs, out=out[i])
            return out

        return run


def _unshared(a: Tensor, b: Tensor) -> int:
    """How many products of a stack are better computed by all threads together.

    The library gives whole products to its threads: of three on two threads the last one is computed by one of them.
    """
    stack, threads = len(a), torch.get_num_threads()
    is_large = a[0].numel() * b.shape[-1] >= _LARGE_PRODUCT
    return stack % threads if is_large and stack > threads else 0


def _empty_strided(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype)


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
