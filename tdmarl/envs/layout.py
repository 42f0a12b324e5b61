"""Lays every tensor of a graph out with environments last in memory, so that each loop runs along them.

VMAS's tensors are `[E, 2]` or `[E, entities, 2]`: loops over the last dimension are two long and use neither a
CPU's vector units nor neighbouring threads of a GPU. Here each operation is done on tensors `[2, E]` in memory
and viewed back. Shapes and values stay; only the order in memory changes.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tdmarl.tracing import describe, is_draw, simplify

aten = torch.ops.aten

_COPIES = {aten.clone.default, aten._to_copy.default, aten.copy.default, aten.lift_fresh_copy.default}
_CREATE = {aten.full.default, aten.zeros.default, aten.ones.default}
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_ALONG = {
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amin.default,
    aten.amax.default,
    aten.any.dim,
    aten.all.dim,
    aten.min.dim,
    aten.max.dim,
    aten.argmin.default,
    aten.argmax.default,
    aten.prod.dim_int,
    aten.linalg_vector_norm.default,
    aten.cumsum.default,
    aten.sort.default,
    aten.sort.stable,
    aten.gather.default,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.logsumexp.default,
}


def environments_last(
    graph: fx.GraphModule, inputs: list[Tensor], envs: int, contiguous: set[int]
) -> fx.GraphModule:
    """The same function with environments last in memory.

    Args:
        graph (GraphModule): without mutation.
        inputs (list of Tensor): example inputs, in the order in memory that later inputs have.
        envs (int): size of the dimension to put last, wherever it is found first in a shape.
        contiguous (set of int): which outputs are contiguous, as others expect them; the rest have environments last.
    """
    with torch.no_grad():
        found = _Rewriter(graph, envs).run(inputs, contiguous)
    simplify(found)
    return found


def last(x: Tensor, envs: int) -> Tensor:
    """`x` with the environments' dimension last in memory, copied if need be."""
    place = _place(x.shape, envs)
    return x.contiguous() if place is None else x.movedim(place, -1).contiguous().movedim(-1, place)


_WIDE = 16  # entries of an environment; fewer are no vector, and to bring them together costs more than a step's sums


def is_wide(shape: torch.Size, envs: int) -> bool:
    """Whether an environment has so many entries that compiled code stores them side by side at little cost."""
    return shape.numel() >= _WIDE * envs


def rows(x: Tensor, envs: int) -> Tensor:
    """`x` as it is shown: contiguous if it is wide, else with environments last; copied if need be."""
    return x.contiguous() if is_wide(x.shape, envs) else last(x, envs)


def _place(shape: torch.Size, envs: int) -> int | None:
    """The environments' dimension."""
    return next((i for i, size in enumerate(shape) if size == envs), None)


class _Value(NamedTuple):
    """A tensor and the node of the new graph that makes it."""

    tensor: Tensor
    node: fx.Node

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def ndim(self) -> int:
        return self.tensor.ndim


def _is_value(x: Any) -> bool:
    return isinstance(x, _Value)


class _Rewriter:
    """Runs a graph and writes another one that computes the same."""

    def __init__(self, graph: fx.GraphModule, envs: int) -> None:
        self.old, self.envs = graph, envs
        self.new = fx.GraphModule(torch.nn.Module(), fx.Graph())
        self._moved: dict[fx.Node, tuple[_Value, int, int]] = {}

    def run(self, inputs: list[Tensor], contiguous: set[int]) -> fx.GraphModule:
        """The new graph."""
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for node in self.old.graph.nodes:
            if node.op == "placeholder":
                values[node] = _described(self.new.graph.placeholder(node.name), next(given))
            elif node.op == "get_attr":
                constant = last(operator.attrgetter(node.target)(self.old), self.envs)
                self.new.register_buffer(node.target, constant)
                values[node] = _Value(constant, self.new.graph.get_attr(node.target))
            elif node.op == "call_function":
                args, kwargs = pytree.tree_map_only(fx.Node, values.__getitem__, (node.args, node.kwargs))
                values[node] = self.rewrite(node.target, args, kwargs, is_draw(node))
            else:
                outputs = [values[x] for x in node.args[0]]
                laid = [
                    self.contiguous(x) if i in contiguous else self.last(x) for i, x in enumerate(outputs)
                ]
                self.new.graph.output([x.node for x in laid])
        self.new.recompile()
        return self.new

    def emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs one operation and writes it down."""
        tensors, named = pytree.tree_map_only(_Value, lambda v: v.tensor, (args, kwargs), is_leaf=_is_value)
        nodes = pytree.tree_map_only(_Value, lambda v: v.node, (args, kwargs), is_leaf=_is_value)
        result, node = target(*tensors, **named), self.new.graph.call_function(target, *nodes)
        if isinstance(result, (tuple, list)):
            return [
                _described(self.new.graph.call_function(operator.getitem, (node, i)), x)
                for i, x in enumerate(result)
            ]
        return _described(node, result)

    def move(self, x: _Value, place: int, to: int) -> _Value:
        """`movedim`, a view."""
        place, to = place % x.ndim, to % x.ndim
        if place == to:
            return x
        origin, *back = self._moved.get(x.node, (None,))
        if origin is not None and back == [to, place]:
            return origin
        order = [i for i in range(x.ndim) if i != place]
        order.insert(to, place)
        moved = self.emit(aten.permute.default, x, order)
        self._moved[moved.node] = x, place, to
        return moved

    def contiguous(self, x: _Value) -> _Value:
        return self.emit(aten.clone.default, x, memory_format=torch.contiguous_format)

    def last(self, x: _Value) -> _Value:
        place = _place(x.shape, self.envs)
        return (
            self.contiguous(x)
            if place is None
            else self.move(self.contiguous(self.move(x, place, -1)), -1, place)
        )

    def rewrite(self, target: Any, args: Any, kwargs: Any, draws: bool) -> Any:
        """One operation of the old graph, with environments last."""
        if target is operator.getitem:
            return args[0][args[1]]
        if target in _VIEWS:
            x = args[0]
            viewable = torch.empty_strided(x.shape, x.tensor.stride(), device="meta")
            try:
                viewable.view(args[1])
            except RuntimeError:
                x = self.contiguous(x)
            return self.emit(aten.view.default, x, args[1])
        if draws or target is aten.as_strided.default:  # both depend on the order in memory
            args = [self.contiguous(a) if isinstance(a, _Value) else a for a in args]
            return self.emit(target, *args, **kwargs)
        if target in _CREATE:
            place = _place(torch.Size(args[0]), self.envs)
            if place is not None:
                size = [s for i, s in enumerate(args[0]) if i != place] + [self.envs]
                return self.move(self.emit(target, size, *args[1:], **kwargs), -1, place)
        elif target in (aten.cat.default, aten.stack.default):
            return self.join(target, *args, **kwargs)
        elif target in _COPIES or torch.Tag.pointwise in getattr(target, "tags", ()):
            return self.pointwise(target, args, kwargs)
        elif target is aten.index_select.default:
            return self.pick(*args)
        elif target in _ALONG:
            return self.along(target, args, kwargs)
        return self.emit(target, *args, **kwargs)

    def pointwise(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Operations on corresponding elements, with broadcasting."""
        shapes = [a.shape for a in args if isinstance(a, _Value)]
        shape = shapes[0] if target is aten.copy.default else torch.broadcast_shapes(*shapes)
        place, rank = _place(shape, self.envs), len(shape)
        if place is None:
            return self.emit(target, *args, **kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key != "memory_format"}
        moved = []
        for a in args:
            if isinstance(a, _Value) and a.ndim:
                for _ in range(rank - a.ndim):
                    a = self.emit(aten.unsqueeze.default, a, 0)
                a = self.move(a, place, -1)
            moved.append(a)
        if target in _COPIES:
            if target is aten.clone.default:
                kwargs["memory_format"] = torch.contiguous_format
            return self.move(self.emit(target, *moved, **kwargs), -1, place)
        size = [*shape[:place], *shape[place + 1 :], shape[place]]
        repeated = [i for i in range(rank) if size[i] > 1 and all(map(partial(_is_repeated, i), moved))]
        if repeated:  # computed once
            moved = [self.first(a, repeated) for a in moved]
        found = self.emit(target, *moved, **kwargs)
        return self.move(self.emit(aten.expand.default, found, size) if repeated else found, -1, place)

    def first(self, x: Any, dims: list[int]) -> Any:
        """One entry along some dimensions, which stay."""
        if isinstance(x, _Value) and x.ndim:
            for dim in dims:
                if x.shape[dim] > 1:
                    x = self.emit(aten.slice.Tensor, x, dim, 0, 1)
        return x

    def join(self, target: Any, tensors: list[_Value], dim: int = 0) -> Any:
        """`cat` and `stack`."""
        stack = target is aten.stack.default
        dim %= max(t.ndim for t in tensors) + stack
        if stack:
            tensors = [self.emit(aten.unsqueeze.default, t, dim) for t in tensors]
        tensors = [t for t in tensors if t.ndim > 1 or t.tensor.numel()]
        places = [i for i, size in enumerate(tensors[0].shape) if size == self.envs and i != dim]
        if not places:
            return self.emit(aten.cat.default, tensors, dim)
        place = places[0]
        moved = [self.move(t, place, -1) for t in tensors]
        return self.move(self.emit(aten.cat.default, moved, dim - (dim > place)), -1, place)

    def pick(self, x: _Value, dim: int, index: _Value) -> Any:
        """`index_select`."""
        place, dim = _place(x.shape, self.envs), dim % max(x.ndim, 1)
        if place is None or place == dim:
            return self.emit(aten.index_select.default, x, dim, index)
        x = self.move(x, place, -1)
        return self.move(self.emit(aten.index_select.default, x, dim - (dim > place), index), -1, place)

    def along(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Operations along dimensions: reductions, sorts, gathers, scatters into a slice."""
        x, place = args[0], _place(args[0].shape, self.envs)
        index = [argument.name for argument in target._schema.arguments].index("dim")
        given = args[index] if index < len(args) else None
        dims = [d % x.ndim for d in ([given] if isinstance(given, int) else given or [])]
        if place is None or not dims or place in dims:
            return self.emit(target, *args, **kwargs)
        after = place - sum(d < place for d in dims)  # where environments are once those dimensions are gone
        mapped = [d - (d > place) for d in dims]
        changed = [
            self.move(a, place if a.ndim == x.ndim else after, -1) if isinstance(a, _Value) else a
            for a in args
        ]
        changed[index] = mapped[0] if isinstance(given, int) else mapped
        result = self.emit(target, *changed, **kwargs)
        results = [self.move(y, -1, place if y.ndim == x.ndim else after) for y in _listed(result)]
        return results if isinstance(result, list) else results[0]


def _is_repeated(dim: int, x: Any) -> bool:
    """Whether an operand is the same all along a dimension."""
    return not (isinstance(x, _Value) and x.ndim) or x.shape[dim] == 1 or x.tensor.stride(dim) == 0


def _described(node: fx.Node, tensor: Tensor) -> _Value:
    return _Value(tensor, describe(node, tensor))


def _listed(result: Any) -> list[_Value]:
    return result if isinstance(result, list) else [result]
