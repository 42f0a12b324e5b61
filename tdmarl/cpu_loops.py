"""Rewrites recorded graphs for a CPU: loops run along what is long, and nothing is computed again for each vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import test_operators  # noqa: F401  # defines the operation that keeps a number in memory

from tdmarl.fast_tanh import replace_tanh

aten = torch.ops.aten

_NARROW = 16  # columns; a vector has eight numbers of float32, or sixteen
_ROWS = 64  # as few rows are no loop worth turning
_REPEATED = 8  # values that are computed from one
_MANY = 64  # values that are computed from one number: below, to keep it costs as much as to compute it again
_LONG = 4096  # rows that a product sums over: the gradient of a matrix of weights
_SMALL = 2**16  # numbers in what it makes
# What the compiler computes again for each of several users, or once within another loop, reads at most so much.
_READS, _READS_ONCE, _STEPS = 4, 12, 40
_UNROLLED = 8  # terms of a sum that is no loop
_LARGE_MASK = 2**13  # truth values
_KEPT = torch.ops._inductor_test.realize.default
_SLOW = {aten.sin.default, aten.cos.default, aten.tan.default, aten.atan2.default, aten.acos.default, aten.asin.default}
_FACTORS = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0, aten.baddbmm.default: 1}


def suit_cpu(graph: fx.GraphModule) -> None:
    """All that makes the loops of networks and losses fast on a CPU; a graph is the same function to rounding."""
    replace_tanh(graph)
    turn_narrow_products(graph)
    sum_by_products(graph)
    cut_long_products(graph)
    norm_one_by_one(graph)
    keep_numbers(graph)


def turn_narrow_products(graph: fx.GraphModule) -> None:
    """Computes products ``x w [M, k]`` of many rows and few columns as ``(w' x')'``, so that rows are last in memory.

    An actor's or critic's last layer has a handful of columns. What follows it, such as a log-probability, is a loop
    over rows and columns in the order that they have in memory, and a loop over a handful fills no vector.
    """
    for node in list(graph.graph.nodes):
        place = _FACTORS.get(node.target)
        if place is None or not _is_narrow(node) or (place and (len(node.args) > 3 or node.kwargs)):
            continue
        x, w = node.args[place : place + 2]
        shape = node.meta["shape"]
        product = aten.mm.default if len(shape) == 2 else aten.bmm.default
        with graph.graph.inserting_before(node):
            turned = _turned(graph.graph, w), _turned(graph.graph, x)
            found = _turned(graph.graph, _call(graph.graph, product, turned, {}, node, _swapped(shape)))
            if place:
                found = _call(graph.graph, aten.add.Tensor, (found, node.args[0]), {}, node, shape)
        node.replace_all_uses_with(found)
        graph.graph.erase_node(node)
    graph.recompile()


def sum_by_products(graph: fx.GraphModule) -> None:
    """Sums the columns of tall matrices, or of stacks of them, as every bias's gradient is, by a product with ones.

    A compiled loop takes eight columns at a time through all rows, and reads each line of memory several times.
    """
    for node in list(graph.graph.nodes):
        if node.target is not aten.sum.dim_IntList or not _is_tall_sum(node):
            continue
        x = node.args[0]
        *stack, rows, columns = x.meta["shape"]
        device = {"dtype": x.meta["dtype"], "device": torch.device("cpu")}
        with graph.graph.inserting_before(node):
            ones = _call(
                graph.graph, aten.full.default, ([*stack, 1, rows], 1.0), device, node, [*stack, 1, rows]
            )
            product = aten.bmm.default if stack else aten.mm.default
            found = _call(graph.graph, product, (ones, x), {}, node, [*stack, 1, columns])
            if len(node.args) < 3 or not node.args[2]:
                found = _call(graph.graph, aten.squeeze.dim, (found, -2), {}, node, [*stack, columns])
        node.replace_all_uses_with(found)
        graph.graph.erase_node(node)
    graph.recompile()


def cut_long_products(graph: fx.GraphModule) -> None:
    """Computes products that sum over very many rows in parts, so that each thread has some of its own.

    The library would cut what is made, which is small, and each thread would read all rows.
    """
    parts = 4
    while parts < torch.get_num_threads():
        parts *= 2
    for node in list(graph.graph.nodes):
        place = {aten.mm.default: 0, aten.addmm.default: 1}.get(node.target)
        if place is None or len(node.args) > place + 2 or node.kwargs:
            continue
        a, b = node.args[place:]
        rows, shape = b.meta["shape"][0], node.meta["shape"]
        if rows < _LONG or rows % parts or shape.numel() > _SMALL or rows < 16 * max(shape):
            continue
        (m, n), size = shape, rows // parts
        with graph.graph.inserting_before(node):
            left = _call(graph.graph, aten.view.default, (a, [m, parts, size]), {}, node, [m, parts, size])
            left = _call(graph.graph, aten.permute.default, (left, [1, 0, 2]), {}, node, [parts, m, size])
            cut = [parts, size, n]
            right = _call(graph.graph, aten.view.default, (b, cut), {}, node, cut)
            found = _call(graph.graph, aten.bmm.default, (left, right), {}, node, [parts, m, n])
            found = _call(graph.graph, aten.sum.dim_IntList, (found, [0]), {}, node, shape)
            if place:
                found = _call(graph.graph, aten.add.Tensor, (found, node.args[0]), {}, node, shape)
        node.replace_all_uses_with(found)
        graph.graph.erase_node(node)
    graph.recompile()


def norm_one_by_one(graph: fx.GraphModule) -> None:
    """Computes the norms of a list of tensors, of all gradients when they are clipped, by the compiler's own sums.

    It knows none for a list and would call PyTorch, which takes them one number at a time.
    """
    for node in list(graph.graph.nodes):
        if node.target is not aten._foreach_norm.Scalar or node.kwargs or len(node.args) > 2:
            continue
        for taken in list(node.users):
            args = (node.args[0][taken.args[1]], *node.args[1:])
            with graph.graph.inserting_before(taken):
                norm = _call(graph.graph, aten.linalg_vector_norm.default, args, {}, taken, ())
            taken.replace_all_uses_with(norm)
            graph.graph.erase_node(taken)
        graph.graph.erase_node(node)
    graph.recompile()


def keep_numbers(graph: fx.GraphModule) -> None:
    """Computes a single number that many values are computed from once, such as Adam's corrections or a clip's factor.

    The compiler would put it into their loop, as its source is in memory that the loop may seem to write: two powers of
    float64 for each vector of an optimizer's step take three quarters of its time.
    """
    for node in list(graph.graph.nodes):
        if not _is_number(node):
            continue
        many = [user for user in node.users if _size(user) >= _MANY]
        if not many:
            continue
        with graph.graph.inserting_after(node):
            kept = _call(graph.graph, _KEPT, (node,), {}, node, node.meta["shape"])
        for user in many:
            user.replace_input_with(node, kept)
    graph.recompile()


def keep_what_repeats(graph: fx.GraphModule) -> None:
    """Computes what many values are computed from once: in place of `keep_numbers`, for graphs that broadcast.

    The compiler would put it into every loop that reads it: a ray's direction once for each entity that it may meet,
    an entity's place once for each ray. Sines and the like are kept even for two that read them.
    """
    for node in list(graph.graph.nodes):
        if "shape" not in node.meta or getattr(node.target, "is_view", False) or not node.all_input_nodes:
            continue
        if node.target not in _SLOW and _most(node) < _REPEATED * _size(node):
            continue
        with graph.graph.inserting_after(node):
            kept = _call(graph.graph, _KEPT, (node,), {}, node, node.meta["shape"])
        node.replace_all_uses_with(kept, lambda user, kept=kept: user is not kept)
    graph.recompile()


def keep_no_masks(graph: fx.GraphModule) -> None:
    """Keeps what a mask is computed from, where the compiler would keep the mask: a vector of truth values takes forty
    times as long to store as one of numbers.

    Which ones these are follows from its rule: it computes again for each user what reads and computes little.
    """
    _Masks(graph.graph).run()
    graph.recompile()


class _Masks:
    """Follows the compiler's decisions through a graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        # What each node reads from memory and computes if it is inlined; it computes nothing if it lies in memory.
        self._inlined: dict[fx.Node, tuple[frozenset[Any], frozenset[Any]]] = {}

    def run(self) -> None:
        for node in list(self._graph.nodes):
            self._inlined[node] = self._costs(node)
            if self._is_stored(node):
                if node.meta.get("dtype") is torch.bool and _size(node) > 1:
                    for x in node.all_input_nodes:
                        self._keep(x)
                    self._inlined[node] = self._costs(node)
                else:
                    self._set(node, frozenset([node]), frozenset())

    def _costs(self, node: fx.Node) -> tuple[frozenset[Any], frozenset[Any]]:
        if getattr(node.target, "is_view", False):
            return self._seen(node)
        here = frozenset([node])
        times = _repetitions(node)
        if not times:
            return here, frozenset()
        costs = [self._inlined[x] for x in node.all_input_nodes]
        reads, steps = (frozenset().union(*kind) for kind in zip(*costs))
        if times > 1:
            reads, steps = (frozenset((x, i) for x in kind for i in range(times)) for kind in (reads, steps))
        return reads, steps | here

    def _seen(self, view: fx.Node) -> tuple[frozenset[Any], frozenset[Any]]:
        """What a view costs: each part of something that is computed is another one."""
        source = view.all_input_nodes[0]
        reads, steps = self._inlined[source]
        if not steps:
            return frozenset([view]), steps
        if _size(view) >= _size(source):
            return reads, steps
        return frozenset((read, view) for read in reads), frozenset((step, view) for step in steps)

    def _is_stored(self, node: fx.Node) -> bool:
        reads, steps = self._inlined[node]
        several = len(node.users) > 1 or _most(node) > _size(node)  # what broadcasts it counts as several users
        return len(reads) > (_READS if several else _READS_ONCE) or bool(steps) and len(reads) + len(steps) > _STEPS

    def _keep(self, node: Any) -> None:
        """Sees to it that a node lies in memory, as numbers."""
        while getattr(node.target, "is_view", False):
            node = node.args[0]
        reads, steps = self._inlined[node]
        is_mask, shape = node.meta.get("dtype") is torch.bool, node.meta.get("shape")
        # It lies there, or is computed from one number that does.
        if not steps or shape is None or is_mask and len(reads) == 1:
            return
        number = node
        if is_mask:
            with self._graph.inserting_after(node):
                number = _call(self._graph, aten._to_copy.default, (node,), {"dtype": torch.float32}, node, shape)
            number.meta["dtype"] = torch.float32
        with self._graph.inserting_after(number):
            kept = found = _call(self._graph, _KEPT, (number,), {}, number, shape)
        if is_mask:
            with self._graph.inserting_after(kept):
                found = _call(self._graph, aten.ne.Scalar, (kept, 0), {}, node, shape)
        node.replace_all_uses_with(found, lambda user: user not in (number, kept))
        self._inlined[number] = self._inlined[kept] = frozenset([kept]), frozenset()
        self._set(found, frozenset([kept]), frozenset([found] if is_mask else []))

    def _set(self, node: fx.Node, reads: frozenset[Any], steps: frozenset[Any]) -> None:
        self._inlined[node] = reads, steps
        for user in node.users:
            if user in self._inlined and getattr(user.target, "is_view", False):
                self._set(user, *self._seen(user))


def move_masks_as_they_are(graph: fx.GraphModule) -> None:
    """Leaves it to PyTorch to copy and to write into large masks that lie in memory, such as a grid of visited cells.

    Compiled loops take ten times as long for a truth value as for a number.
    """
    stored: set[fx.Node] = set()
    for node in list(graph.graph.nodes):
        if node.meta.get("dtype") is not torch.bool or _size(node) < _LARGE_MASK:
            continue
        if node.op != "call_function":
            stored.add(node)
        elif any(x in stored and _size(x) <= _size(node) for x in node.all_input_nodes):
            stored.add(node)
            if not getattr(node.target, "is_view", False):
                node.meta["custom"] = {"fallback_to_eager": True}


def _most(node: fx.Node) -> int:
    """How many values the largest of those has that are computed from a node, views of it included."""
    return max(
        (_most(user) if getattr(user.target, "is_view", False) else _size(user) for user in node.users), default=0
    )


def _size(node: fx.Node) -> int:
    shape = node.meta.get("shape")
    return 0 if shape is None else torch.Size(shape).numel()


def _repetitions(node: fx.Node) -> int:
    """How often the compiler would compute the operands where it computes a node; never if they lie in memory."""
    tags = getattr(node.target, "tags", ())
    if node.target is _KEPT or not node.all_input_nodes:
        return 0
    if torch.Tag.pointwise in tags:
        return 1
    if torch.Tag.reduction in tags and "shape" in node.meta:
        summed = _size(node.all_input_nodes[0]) // max(_size(node), 1)
        return summed if summed < _UNROLLED else 0
    return 0


def _is_number(node: fx.Node) -> bool:
    """Whether it is one number that something is computed for."""
    if _size(node) != 1 or node.op != "call_function" or not node.all_input_nodes:
        return False
    return not getattr(node.target, "is_view", False) or any(map(_is_number, node.all_input_nodes))


def _is_narrow(node: fx.Node) -> bool:
    *_, rows, columns = node.meta["shape"]
    return columns <= _NARROW and rows >= _ROWS


def _is_tall_sum(node: Any) -> bool:
    x, dims = node.args[:2]
    shape = x.meta["shape"]
    if node.kwargs or len(shape) not in (2, 3) or [dim % len(shape) for dim in dims] != [len(shape) - 2]:
        return False
    return x.meta["dtype"] in (torch.float32, torch.float64) and shape[-1] > _NARROW and shape[-2] >= _ROWS


def _call(
    graph: fx.Graph, target: Any, args: Any, kwargs: Any, like: fx.Node, shape: Sequence[int]
) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    node.meta.update(dtype=like.meta.get("dtype"), shape=torch.Size(shape))
    return node


def _turned(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return _call(graph, aten.transpose.int, (node, -2, -1), {}, node, _swapped(node.meta["shape"]))


def _swapped(shape: Sequence[int]) -> list[int]:
    return [*shape[:-2], shape[-1], shape[-2]]
