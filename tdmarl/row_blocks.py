"""Runs a recorded step block by block of its minibatch's rows, so that what lies between two layers stays in the cache.

A step on many rows writes and reads every layer's outputs in memory many times, and needs room for all of them at
once. But most of it treats each row by itself, and what it says about all rows together are sums: losses, gradients,
moments. So a step is cut into stages: what needs no rows, what each row needs (a loop over blocks, in which sums add
up), what follows from the sums, and so on. The gradients of a whole minibatch are the sums of those of its blocks,
to rounding; nothing is approximated.

Which dimension of a tensor is rows is read off two recordings of one step, for the whole minibatch and for a block:
it is where their shapes differ.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tdmarl import cpu_graph, tracing

aten = torch.ops.aten
Compile = Callable[[fx.GraphModule, list[Tensor]], Callable[..., Any]]

_CACHE = 1 << 21  # bytes of a block's largest tensor; what belongs to the block then stays in the caches
_SMALL = 1 << 22  # bytes of a step's largest tensor
_WORTH = 3  # blocks; two are no gain

# What treats each row by itself whatever its other arguments are, besides all that PyTorch calls pointwise.
_BY_ROW = {
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.view, aten._unsafe_view, aten.reshape, aten.permute,
    aten.t, aten.transpose, aten.expand, aten.unsqueeze, aten.squeeze, aten.clone, aten.alias, aten.detach, aten.copy,
    aten._to_copy, aten.full, aten.full_like, aten.zeros_like, aten.ones_like, aten.empty_like, aten.lift_fresh_copy,
    aten.select_backward, aten.slice_backward, aten.constant_pad_nd, aten.repeat, aten.stack,
    aten.softplus_backward, aten.elu, aten.elu_backward, aten.masked_fill, aten.native_layer_norm,
    aten.native_layer_norm_backward, aten.sum, aten.mean, aten.amax, aten.amin, aten.any, aten.all, aten.prod,
    aten.logsumexp, aten.argmax, aten.argmin, aten.max, aten.min, aten.var,
}  # fmt: skip
# The same if they do it along another dimension than that of the rows: the place of that argument.
_ALONG = {
    aten.cat: 1, aten.select: 1, aten.slice: 1, aten.unbind: 1,
    aten.split: 2, aten.unsafe_split: 2, aten.split_with_sizes: 2,
    aten.gather: 1, aten.scatter: 1, aten.scatter_add: 1, aten._softmax: 1, aten._log_softmax: 1,
    aten._softmax_backward_data: 2, aten._log_softmax_backward_data: 2,
}  # fmt: skip
_VIEWS = {aten.view, aten._unsafe_view, aten.reshape}
_MADE = {
    aten.new_full: None,
    aten.new_zeros: 0,
    aten.new_ones: 1,
    aten.zeros_like: 0,
    aten.ones_like: 1,
    aten.full_like: None,
}
_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv}


class NotByRow(Exception):
    """A step does something across rows that is no sum; the message says what."""


def block_size(graph: fx.GraphModule, rows: int) -> int:
    """How many rows a block should have: a divisor of ``rows``, or ``rows`` itself where blocks are no gain."""
    if rows < 2 * _WORTH:
        return rows
    widest = 1  # bytes
    for node in graph.graph.nodes:
        shape, dtype = node.meta.get("shape"), node.meta.get("dtype")
        if node.op == "call_function" and dtype is not None and shape.numel() % rows == 0:
            widest = max(widest, shape.numel() // rows * dtype.itemsize)
    most = max(2, _CACHE // widest)  # of one row, PyTorch goes other ways
    if rows < _WORTH * most:
        return rows
    found = next((size for size in range(most, 1, -1) if rows % size == 0), 0)
    return found if found * 4 >= most else rows


def fits_caches(graph: fx.GraphModule) -> bool:
    """Whether its largest tensor does."""
    made = [node.meta for node in graph.graph.nodes if node.op == "call_function" and node.meta.get("dtype")]
    return all(meta["shape"].numel() * meta["dtype"].itemsize <= _SMALL for meta in made)


class Plan:
    """Which stage each node of a recorded step belongs to.

    Args:
        whole (GraphModule): the step for all rows; it writes into its inputs only at its end.
        block (GraphModule): the same for a block of rows.

    Attributes:
        rows (dict): for each node that has rows, the dimension; None for one of several results, some of which have.
        sums (dict): for each node that sums over rows, the weight of a block's sum.
        blocks (float): how many.
        stage (dict): of every operation: even for what needs no rows, odd for loops over blocks.
        twin (dict): each node's counterpart in ``block``.

    Raises:
        NotByRow: the step cannot be cut.
    """

    def __init__(self, whole: fx.GraphModule, block: fx.GraphModule) -> None:
        for graph in (whole, block):
            _make_from_nothing(graph.graph)
        self.twin = _twins(whole.graph, block.graph)
        self.rows: dict[fx.Node, int | None] = {}
        self.sums: dict[fx.Node, float] = {}
        for node in whole.graph.nodes:
            if node.op != "output" and _has_rows(node, self.twin):
                self.rows[node] = self._row_dim(node)
        ratios = {
            node: _ratio(node, self.twin[node], dim) for node, dim in self.rows.items() if dim is not None
        }
        self.blocks = min(ratios.values(), default=1)
        for node, ratio in ratios.items():
            if ratio != self.blocks:
                raise NotByRow(f"{node.target} adds rows to those that there are")
        for node in whole.graph.nodes:
            if node.op == "call_function":
                self._check(node)
        self.stage = self._stages(whole.graph)
        self.last = max([0, *self.stage.values()])

    def _row_dim(self, node: fx.Node) -> int | None:
        if "shape" not in node.meta:
            return None
        shape, part = node.meta["shape"], self.twin[node].meta["shape"]
        (dim,) = [d for d, (n, m) in enumerate(zip(shape, part)) if n != m]
        return dim

    def _check(self, node: fx.Node) -> None:
        """Raises NotByRow for what is neither done row by row nor a sum over rows; notes the sums."""
        sources = [source for source in node.all_input_nodes if source in self.rows]
        target = getattr(node.target, "overloadpacket", node.target)
        if not sources:
            if node in self.rows and target not in (aten.full, aten.expand):
                raise NotByRow(f"{target} makes rows from something else")
            return
        if tracing.is_draw(node):
            raise NotByRow(f"{target} draws random numbers for the rows")
        if node not in self.rows:
            self.sums[node] = self._weight(node, target)
            return
        if target is operator.getitem or target in _BY_ROW or _is_pointwise(node):
            pass
        elif target in _ALONG:
            place = _ALONG[target]
            dim: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
            if any(self.rows[x] is None or dim % len(x.meta["shape"]) == self.rows[x] for x in sources):
                raise NotByRow(f"{target} works along the rows")
        else:
            raise NotByRow(f"{target} may work across rows")
        if target in _VIEWS:
            if not self._keeps_order(sources[0], node):
                raise NotByRow(f"{target} reorders rows")
        elif any(
            self._count(x) != self._count(node)
            for x in sources
            if None not in (self.rows[x], self.rows[node])
        ):
            raise NotByRow(f"{target} changes how many rows there are")

    def _count(self, node: fx.Node) -> int:
        return node.meta["shape"][self.rows[node]]

    def _keeps_order(self, source: fx.Node, node: fx.Node) -> bool:
        """Whether as many numbers of a row come before the next row as before."""
        before, after = self.rows[source], self.rows[node]
        assert before is not None and after is not None
        return source.meta["shape"][:before].numel() == node.meta["shape"][:after].numel()

    def _weight(self, node: fx.Node, target: Any) -> float:
        (source, *_) = [source for source in node.all_input_nodes if source in self.rows]
        if target in (aten.sum, aten.mm, aten.bmm, aten.mv, aten.dot):
            return 1.0
        if target is aten.mean:
            return self.twin[source].meta["shape"].numel() / source.meta["shape"].numel()
        if target is operator.getitem and source.target is aten.native_layer_norm_backward.default:
            return 1.0
        raise NotByRow(f"{target} says something about all rows that is no sum")

    def _stages(self, graph: fx.Graph) -> dict[fx.Node, int]:
        """As late as possible, so that a loop has what it needs at hand and little is kept between two loops."""
        nodes = [node for node in graph.nodes if node.op == "call_function"]
        early: dict[fx.Node, int] = {}
        for node in nodes:
            loops = self._loops(node)
            found = [int(loops)]
            for source in node.all_input_nodes:
                if source in early:
                    found.append(early[source] + self._gap(source, node))
            early[node] = max(found)
        last = max([0, *early.values()])
        last += last % 2
        late: dict[fx.Node, int] = {}
        for node in reversed(nodes):
            found = [last - self._loops(node)]
            for user in node.users:
                if user in late:
                    found.append(late[user] - self._gap(node, user))
            late[node] = min(found)
        for node in nodes:
            if node.target is operator.getitem:
                late[node] = late[node.args[0]]  # type: ignore[index]
            if node.target is aten.copy_.default:
                late[node] = last
        return {node: late[node] for node in nodes}

    def _loops(self, node: fx.Node) -> bool:
        return node in self.rows or node in self.sums

    def _gap(self, source: fx.Node, user: fx.Node) -> int:
        """How many stages must lie between a node and its user."""
        if source in self.sums:
            return 2 if self._loops(user) else 1
        return int(self._loops(source) != self._loops(user))


class RowBlocks:
    """A recorded step as stages, every other one of which is a loop over blocks of rows.

    Args:
        whole, block: see :class:`Plan`.
        inputs (list of Tensor): of the whole, as examples; they are written into.
        compiler (callable): makes a function of a stage's graph and of example inputs.

    Raises:
        NotByRow: the step cannot be cut.
    """

    def __init__(
        self, whole: fx.GraphModule, block: fx.GraphModule, inputs: list[Tensor], compiler: Compile
    ) -> None:
        plan = Plan(whole, block)
        *_, output = whole.graph.nodes
        self._outputs: list[fx.Node] = list(output.args[0])  # type: ignore[arg-type]
        self._inputs = [node for node in whole.graph.nodes if node.op == "placeholder"]
        self._fixed = {
            node: operator.attrgetter(str(node.target))(whole)
            for node in whole.graph.nodes
            if node.op == "get_attr"
        }
        values: dict[fx.Node, Any] = dict(zip(self._inputs, inputs)) | self._fixed
        self.stages = []
        for number in range(plan.last + 1):
            nodes = [node for node, stage in plan.stage.items() if stage == number]
            if nodes:
                stage = _Stage(plan, nodes, set(self._outputs), values, compiler)
                self.stages.append(stage)
        self.blocks = max(stage.blocks for stage in self.stages)
        self.operations = sum(stage.operations for stage in self.stages)

    def __call__(self, *inputs: Tensor) -> list[Any]:
        values: dict[fx.Node, Any] = dict(zip(self._inputs, inputs)) | self._fixed
        for stage in self.stages:
            stage(values)
        return [values[node] for node in self._outputs]


class _Stage:
    """Some nodes of a plan as one function, called once or for each block.

    Args:
        plan (Plan): where they are from.
        nodes (list of Node): in order.
        shown (set of Node): what the step returns.
        values (dict): of all nodes before, as examples; those of this stage are added.
        compiler (callable): see :class:`RowBlocks`.
    """

    def __init__(
        self,
        plan: Plan,
        nodes: list[fx.Node],
        shown: set[fx.Node],
        values: dict[fx.Node, Any],
        compiler: Compile,
    ) -> None:
        mine = set(nodes)
        needed = [
            n for n in nodes if n in shown or any(user not in mine for user in n.users if user.op != "output")
        ]
        needed = [n for n in needed if "shape" in n.meta]  # of several results each is a node of its own
        loops = any(getattr(n.target, "overloadpacket", None) in _PRODUCTS and plan._loops(n) for n in nodes)
        self.sums = [n for n in needed if loops and n in plan.sums]
        self.kept = [n for n in needed if n not in self.sums]
        self._dims = [plan.rows.get(n) if loops else None for n in self.kept]
        sources = dict.fromkeys(source for n in nodes for source in n.all_input_nodes if source not in mine)
        self.takes = [(n, plan.rows.get(n) if loops else None) for n in sources]
        self.blocks = int(plan.blocks) if loops else 1
        self._sizes: list[Any] = [
            None if dim is None else plan.twin[n].meta["shape"][dim] for n, dim in self.takes
        ]
        self._zeros = [torch.zeros(n.meta["shape"], dtype=n.meta["dtype"]) for n in self.sums]
        graph = self._graph(plan, nodes, loops)
        tracing.tidy(graph)
        self.operations = tracing.operations(graph)
        self._call = compiler(graph, [*self._zeros, *self._given(values, 0)])
        self(values)

    def _graph(self, plan: Plan, nodes: list[fx.Node], loops: bool) -> fx.GraphModule:
        graph = fx.GraphModule(torch.nn.Module(), fx.Graph())
        new: dict[fx.Node, fx.Node] = {}
        totals = []
        for i, n in enumerate(self.sums):
            totals.append(graph.graph.placeholder(f"total{i}"))
            totals[-1].meta.update(n.meta)
        for i, (n, _) in enumerate(self.takes):
            new[n] = graph.graph.placeholder(f"given{i}")
            new[n].meta.update(plan.twin[n].meta if loops else n.meta)
        for n in nodes:
            twin = plan.twin[n] if loops else n
            args = _arguments(n, twin) if loops else n.args
            kwargs = n.kwargs
            args, kwargs = pytree.tree_map_only(fx.Node, new.__getitem__, (args, kwargs))
            new[n] = graph.graph.call_function(n.target, args, kwargs)  # type: ignore[arg-type]
            new[n].meta.update(twin.meta)
        outputs = []
        for n, total in zip(self.sums, totals):
            part = new[n]
            if plan.sums[n] != 1:
                part = graph.graph.call_function(aten.mul.Tensor, (part, plan.sums[n]))
                part.meta.update(n.meta)
            outputs.append(graph.graph.call_function(aten.add.Tensor, (total, part)))
            outputs[-1].meta.update(n.meta)
        graph.graph.output([*outputs, *(new[n] for n in self.kept)])
        graph.recompile()
        return graph

    def _given(self, values: dict[fx.Node, Any], number: int) -> list[Tensor]:
        """What a block is called with."""
        return [
            values[n] if dim is None else values[n].narrow(dim, number * size, size)
            for (n, dim), size in zip(self.takes, self._sizes)
        ]

    def __call__(self, values: dict[fx.Node, Any]) -> None:
        totals, k, turns = self._zeros, len(self.sums), cpu_graph.Turns()
        for number in range(self.blocks):
            with turns.next():
                outputs = list(self._call(*totals, *self._given(values, number)))
            totals = outputs[:k]
            turns.carry(totals)
            for n, dim, part in zip(self.kept, self._dims, outputs[k:]):
                if dim is None or self.blocks == 1:
                    values[n] = part
                    continue
                size = part.shape[dim]
                if not number:
                    shape = [*part.shape[:dim], self.blocks * size, *part.shape[dim + 1 :]]
                    values[n] = cpu_graph.empty(shape, part.dtype)
                values[n].narrow(dim, number * size, size).copy_(part)
        values.update(zip(self.sums, totals))


def _make_from_nothing(graph: fx.Graph) -> None:
    """Lets tensors of one number be made as they are; recorded, they are made in the likeness of another."""
    for node in list(graph.nodes):
        target = getattr(node.target, "overloadpacket", None)
        if target not in _MADE or "shape" not in node.meta:
            continue
        value = _MADE[target]
        if value is None:
            value = node.args[2] if target is aten.new_full else node.args[1]
        with graph.inserting_before(node):
            kwargs = {"dtype": node.meta["dtype"], "device": torch.device("cpu")}
            found = graph.call_function(aten.full.default, (list(node.meta["shape"]), value), kwargs)
        found.meta.update(node.meta)
        node.replace_all_uses_with(found)
        graph.erase_node(node)


def _twins(whole: fx.Graph, block: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Each node's counterpart in the recording of a block."""
    ours, theirs = list(whole.nodes), list(block.nodes)
    if [n.target for n in ours] != [n.target for n in theirs]:
        raise NotByRow("it does something else for fewer rows")
    return dict(zip(ours, theirs))


def _has_rows(node: fx.Node, twin: dict[fx.Node, fx.Node]) -> bool:
    if "shape" not in node.meta:
        return any("shape" in x.meta and _has_rows(x, twin) for x in [*node.users, *node.all_input_nodes])
    shape, part = node.meta["shape"], twin[node].meta["shape"]
    if len(shape) != len(part) or sum(n != m for n, m in zip(shape, part)) > 1:
        raise NotByRow(f"{node.target} of shape {tuple(shape)} is {tuple(part)} for a block")
    return shape != part


def _ratio(node: fx.Node, twin: fx.Node, dim: int) -> float:
    return node.meta["shape"][dim] / twin.meta["shape"][dim]


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _arguments(node: fx.Node, twin: fx.Node) -> tuple[Any, ...]:
    """Sizes are the block's, while numbers to compute with, such as how many rows there are, are the whole's."""
    found = []
    for whole, block in zip(node.args, twin.args):
        is_size = isinstance(block, (list, tuple)) and all(isinstance(x, int) for x in block)
        if not is_size and isinstance(whole, (int, float)) and whole != block:
            if not _is_pointwise(node) and node.target is not aten.full.default:
                raise NotByRow(f"{node.target} has the argument {whole}, for a block {block}")
        found.append(block if is_size else whole)
    return tuple(found)
