"""Records Python as one graph of tensor operations, and refuses what a graph would silently freeze.

`trace` runs a function once and returns the graph of what it did to its inputs, without mutation, without
operations that nothing depends on, and without two that compute the same. A question that Python asks the
device, and whose answer can change, would be frozen into the graph: it raises `HostRead` with the line that asks.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from typing import Any, Callable

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten

OWN_FILES = {__file__}  # whose lines are not those that ask

# Answers that go to the host. `Tensor.__contains__`, `tuple(x)` and the like end in one of these.
_READS = {
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    torch.equal,
    Tensor.equal,
    torch.allclose,
    Tensor.allclose,
}
# Results whose size depends on values.
_SIZES = {
    torch.nonzero,
    Tensor.nonzero,
    torch.argwhere,
    Tensor.argwhere,
    torch.masked_select,
    Tensor.masked_select,
    torch.unique,
    Tensor.unique,
    torch.unique_consecutive,
    Tensor.unique_consecutive,
}
_DRAWS = (
    "uniform",
    "normal",
    "rand",
    "bernoulli",
    "multinomial",
    "exponential",
    "poisson",
    "cauchy",
    "geometric",
)


_recording = 0


def is_recording() -> bool:
    """Whether Python runs to be recorded, so that what it decides by a tensor's value would be frozen."""
    return _recording > 0


class Untraceable(RuntimeError):
    """What a graph would freeze or miss; the message names the line or the attribute, and what it does."""


class HostRead(Untraceable):
    """A line of Python asks the device for something that changes from step to step."""

    def __init__(self, place: str, what: str) -> None:
        super().__init__(f"{place} {what}")


class Recorder(TorchDispatchMode):
    """Writes down every operation of tensors that runs inside, as nodes of a graph.

    `make_fx` does the same and more, at ten times the cost for each operation.

    Attributes:
        graph (GraphModule): what was written down so far.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.graph = fx.GraphModule(torch.nn.Module(), fx.Graph())
        self._nodes = WeakIdKeyDictionary()
        self._constants: dict[int, fx.Node] = {}
        for i, x in enumerate(inputs):
            self._nodes[x] = self.graph.graph.placeholder(f"input{i}")
            describe(self._nodes[x], x)

    def __enter__(self) -> Any:
        global _recording
        _recording += 1
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        global _recording
        _recording -= 1
        super().__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":  # marks of time, and no tensors
            return func(*args, **kwargs)
        if func is aten.lift_fresh.default:  # a new tensor from Python numbers, in every step
            func = aten.lift_fresh_copy.default
        if func is aten._local_scalar_dense.default and self.changes(args[0]):
            raise HostRead(_place(), "reads a tensor's value")
        if func._overloadname == "from":  # a word of Python's, which the graph's code could not say
            raise Untraceable(f"{_place()} draws by Tensor.random_(from, to); torch.randint can be recorded")
        nodes, named = pytree.tree_map_only(Tensor, self.node, (args, kwargs))
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            self._nodes[out] = self.graph.graph.call_function(func, nodes, named)
            describe(self._nodes[out], out)
        elif isinstance(out, (tuple, list)) and any(isinstance(x, Tensor) for x in out):
            node = self.graph.graph.call_function(func, nodes, named)
            for i, x in enumerate(out):
                if isinstance(x, Tensor):
                    self._nodes[x] = self.graph.graph.call_function(operator.getitem, (node, i))
                    describe(self._nodes[x], x)
        elif out is None:
            self.graph.graph.call_function(func, nodes, named)
        return out

    def node(self, tensor: Tensor) -> fx.Node:
        """The node that made a tensor; one that was not made here is a constant."""
        found = self._nodes.get(tensor)
        if found is None:
            name = f"constant{len(self._constants)}"
            self.graph.register_buffer(name, tensor)
            found = self._nodes[tensor] = self._constants[id(tensor)] = self.graph.graph.get_attr(name)
            describe(found, tensor)
        return found

    def changes(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on an input or on a random number."""
        stack, seen = [self._nodes.get(tensor)], set()
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                if node.op == "placeholder" or is_draw(node):
                    return True
                stack += node.all_input_nodes
        return False

    def finish(self, outputs: list[Tensor]) -> fx.GraphModule:
        """The graph that returns `outputs`."""
        self.graph.graph.output([self.node(x) for x in outputs])
        self.graph.recompile()
        return self.graph


def describe(node: fx.Node, tensor: Tensor) -> fx.Node:
    """Notes shape and type at the node."""
    node.meta.update(shape=tensor.shape, dtype=tensor.dtype)
    return node


class Watch(torch.overrides.TorchFunctionMode):
    """Lets questions through whose answer is the same in every step, and raises at the others."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            if any(self._recorder.changes(a) for a in args if isinstance(a, Tensor)):
                raise HostRead(_place(), f"reads a tensor's value ({func.__name__.strip('_')})")
        elif func in _SIZES or func is torch.where and len(args) == 1:
            raise HostRead(_place(), f"makes a tensor whose size depends on values ({func.__name__})")
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost line outside torch and this package's tracing."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename in OWN_FILES or "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def is_draw(node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    return node.op == "call_function" and any(name in str(node.target) for name in _DRAWS)


def trace(function: Callable[..., list[Tensor]], inputs: list[Tensor]) -> fx.GraphModule:
    """The graph of `function(*inputs)`, which returns a list of tensors.

    Args:
        function (callable): what to record; it may change Python objects and tensors in place.
        inputs (list of Tensor): stand for all later inputs of the same shapes.

    Raises:
        Untraceable: the function asks for a value that depends on its inputs or on random numbers, or writes
            into a tensor that is neither an input nor its own.
    """

    def own(*args: Tensor) -> list[Tensor]:
        return function(
            *[x.clone() for x in args]
        )  # what it writes into its inputs must not reach the caller's

    with torch.no_grad():
        graph = record(own, inputs, watch=True)
        _refuse_written_constants(graph)
        _copy_constants(graph)
        graph = record(torch.func.functionalize(graph, remove="mutations"), inputs)
        simplify(graph)
    return graph


def record(
    function: Callable[..., list[Tensor]], inputs: list[Tensor], watch: bool = False
) -> fx.GraphModule:
    """The graph of `function(*inputs)` as it is, mutations included, which it makes."""
    inputs = [x.detach() for x in inputs]  # objects of our own, one for each input
    recorder = Recorder(inputs)
    with recorder, Watch(recorder) if watch else contextlib.nullcontext():
        outputs = function(*inputs)
        return recorder.finish(list(outputs))


def has_draws(graph: fx.GraphModule) -> bool:
    """Whether the graph draws random numbers."""
    return any(map(is_draw, graph.graph.nodes))


def _refuse_written_constants(graph: fx.GraphModule) -> None:
    """A constant that the graph writes into is state that is not among the inputs."""
    origin: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            origin[node] = node
        schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
        first = node.args[0] if node.args else None
        if schema is None or not isinstance(first, fx.Node) or first not in origin:
            continue
        alias = schema.arguments[0].alias_info
        if alias is not None:
            origin[node] = origin[first]
            if alias.is_write:
                shape = tuple(operator.attrgetter(str(origin[first].target))(graph).shape)
                raise Untraceable(f"a tensor of shape {shape} that is not known as state is written in place")


def _copy_constants(graph: fx.GraphModule) -> None:
    """Lets every user of a constant have a copy, because `functionalize` does not know it as a tensor of its own."""
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            with graph.graph.inserting_after(node):
                copy = graph.graph.call_function(aten.lift_fresh_copy.default, (node,))
            node.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)
    graph.recompile()


def simplify(graph: fx.GraphModule) -> None:
    """Merges equal nodes, computes what is small and constant, and drops copies and what nothing depends on."""
    _drop_copies(graph.graph)
    _drop_places(graph.graph)
    _fold(graph)
    _merge(graph.graph)
    _drop_repetitions(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def tidy(graph: fx.GraphModule) -> None:
    """As `simplify` for a graph that writes into its inputs at its end: copies stay where they are."""
    _fold(graph)
    _merge(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()


_IDENTITIES = {aten.alias.default, aten.detach.default, aten.clone.default, aten.lift_fresh_copy.default}


def _drop_copies(graph: fx.Graph) -> None:
    """Without mutation a copy is the same as the original; layouts are chosen afterwards."""
    for node in list(graph.nodes):
        if node.op != "call_function" or (source := _same(node)) is None:
            continue
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def _same(node: Any) -> fx.Node | None:
    """The node whose value this one has, too."""
    if node.target in _IDENTITIES and "memory_format" not in node.kwargs:
        return node.args[0]
    if node.target is aten.copy.default:
        old, new = node.args[:2]
        known = isinstance(new, fx.Node) and "shape" in old.meta and "shape" in new.meta
        if known and all(old.meta[k] == new.meta[k] for k in ("shape", "dtype")):
            return new
    if node.target is aten.expand.default and list(node.args[0].meta.get("shape", ())) == list(node.args[1]):
        return node.args[0]
    return None


def _drop_places(graph: fx.Graph) -> None:
    """`min` and `max` along a dimension also find where; if nobody asks, their values alone are cheaper."""
    values = {aten.min.dim: aten.amin.default, aten.max.dim: aten.amax.default}
    nodes: list[Any] = list(graph.nodes)
    for node in nodes:
        if node.target not in values or any(user.args[1] != 0 for user in node.users):
            continue
        x, dim, *keep = node.args
        for user in list(node.users):
            with graph.inserting_before(user):
                found = graph.call_function(values[node.target], (x, [dim], *keep), dict(node.kwargs))
            found.meta.update(user.meta)
            user.replace_all_uses_with(found)
            graph.erase_node(user)
        graph.erase_node(node)


def _merge(graph: fx.Graph) -> None:
    """One node for all that compute the same. Draws are never the same: PyTorch's own pass merges two `uniform`."""
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or is_draw(node):
            continue
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        key = node.target, tuple((type(a), repr(a) if isinstance(a, float) else a) for a in leaves), spec
        first = known.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _drop_repetitions(graph: fx.Graph) -> None:
    """A tensor that is stacked or joined with itself is written once and looked at several times."""
    for node in list(graph.nodes):
        if node.target not in (aten.stack.default, aten.cat.default) or "shape" not in node.meta:
            continue
        parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
        first, shape = parts[0], node.meta["shape"]
        if len(parts) < 2 or any(part is not first for part in parts):
            continue
        with graph.inserting_before(node):
            if node.target is aten.stack.default:
                first = graph.call_function(aten.unsqueeze.default, (first, dim))
            elif first.meta["shape"][dim] != 1:
                continue
            found = graph.call_function(aten.expand.default, (first, list(shape)))
        first.meta.update(
            dtype=node.meta["dtype"],
            shape=torch.Size([*shape[: dim % len(shape)], 1, *shape[dim % len(shape) + 1 :]]),
        )
        found.meta.update(node.meta)
        node.replace_all_uses_with(found)
        graph.erase_node(node)


_SMALL = 256  # elements; larger constants are cheaper to compute in a fused loop than to read


def _fold(graph: fx.GraphModule) -> None:
    """Replaces small constant results, and constant checks that passed, by their values."""
    values: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(graph)
        elif (
            node.op == "call_function"
            and not is_draw(node)
            and all(n in values for n in node.all_input_nodes)
        ):
            args, kwargs = pytree.tree_map_only(fx.Node, values.__getitem__, (node.args, node.kwargs))
            values[node] = node.target(*args, **kwargs)

    def is_small(node: fx.Node) -> bool:
        return isinstance(values.get(node), Tensor) and values[node].numel() <= _SMALL

    for number, node in enumerate(list(graph.graph.nodes)):
        if node.op != "call_function":
            continue
        if "_linalg_check_errors" in str(node.target):
            if node not in values:
                raise HostRead("a factorization of a matrix", "checks its success on the host")
            graph.graph.erase_node(node)
            continue
        if is_small(node) and not all(map(is_small, node.users)):
            name = f"_constant{number}"
            while hasattr(graph, name):
                name += "_"
            value = values[node]
            graph.register_buffer(name, value.clone())
            with graph.graph.inserting_before(node):
                constant = graph.graph.get_attr(name)
            describe(constant, value)
            values[constant] = value
            node.replace_all_uses_with(constant)


def needed(graph: fx.GraphModule, outputs: list[int]) -> set[int]:
    """Indices of the inputs on which the given outputs depend."""
    nodes = list(graph.graph.nodes)
    places = {node: i for i, node in enumerate(n for n in nodes if n.op == "placeholder")}
    results = nodes[-1].args[0]
    stack, seen = [results[i] for i in outputs], set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return {places[node] for node in seen & places.keys()}


def restrict(graph: fx.GraphModule, inputs: list[int], outputs: list[int]) -> None:
    """Leaves the graph only some inputs and outputs; the dropped inputs must not be needed."""
    *_, output = graph.graph.nodes
    output.args = ([output.args[0][i] for i in outputs],)
    graph.graph.eliminate_dead_code()
    for i, node in enumerate([n for n in graph.graph.nodes if n.op == "placeholder"]):
        if i not in inputs:
            graph.graph.erase_node(node)
    graph.recompile()


def outputs(graph: fx.GraphModule) -> int:
    """How many tensors the graph returns."""
    *_, output = graph.graph.nodes
    return len(output.args[0])


def output_shapes(graph: fx.GraphModule) -> list[torch.Size]:
    """The shapes of the tensors that the graph returns."""
    *_, output = graph.graph.nodes
    return [node.meta["shape"] for node in output.args[0]]


def operations(graph: fx.GraphModule) -> int:
    """How many nodes compute."""
    return sum(node.op == "call_function" for node in graph.graph.nodes)
