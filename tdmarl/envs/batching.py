"""Does what a graph does many times over, once for each agent, entity or pair, as one operation on a stack.

VMAS loops in Python over agents, entities and pairs of them, so a graph of its operations grows with their
number, and so do the times to compile and to run it. The loops meet again where their results are stacked: in
the forces of all pairs, in the distances from which a reward takes the smallest, in what the agents of a group
observe. From there this module walks back. Where all that is stacked comes from one kind of operation, the
operation is done once on the stack of its inputs:

    stack(f(a, x), f(b, y), f(c, x))  ->  f(stack(a, b, c), stack(x, y, x))

Operations that are done together stand at the same depth of the graph, so that none depends on another. Values
stay as they are.
"""

from __future__ import annotations

import heapq
import itertools
import operator
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tdmarl.envs.tracing import is_draw, simplify

aten = torch.ops.aten

_FEWEST = 3  # operations that are worth a stack

_PLAIN = {aten.clone.default, aten._to_copy.default, aten.copy.default}
_ALONG = {  # operations whose argument 1 is one or several dimensions
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
    aten.cumsum.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.squeeze.dim,
    aten.gather.default,
}
_NORM = aten.linalg_vector_norm.default  # its argument 2 is dimensions
_SIZED = {aten.view.default, aten._unsafe_view.default, aten.expand.default}
_JOINS = {aten.stack.default, aten.cat.default}


@dataclass
class _Group:
    """Operations of one kind at one depth; `indices` are the places of selections from one tensor."""

    members: list[fx.Node]
    depth: int
    selects: bool = False
    made: Any = None
    slots: dict[fx.Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slots = {node: i for i, node in enumerate(self.members)}


def batch(graph: fx.GraphModule, carried: int) -> fx.GraphModule:
    """The same function with fewer, larger operations.

    Args:
        graph (GraphModule): without mutation, from `trace`.
        carried (int): so many of the first outputs are state, whose parts are computed alike for all entities.
    """
    plan = _Plan(graph)
    *_, output = graph.graph.nodes
    plan.together(output.args[0][:carried])
    for node in reversed(list(graph.graph.nodes)):
        if node.target in _JOINS and len(node.args[0]) >= _FEWEST:
            plan.later(node.args[0], plan.depth[node])
    plan.finish()
    with torch.no_grad():
        found = _Writer(graph, plan).run()
    simplify(found)
    return found


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, in order and as often as they stand there."""
    return [a for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, fx.Node)]


class _Plan:
    """Which operations are done together."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.depth: dict[fx.Node, int] = {}
        self.group: dict[fx.Node, _Group] = {}
        last_draw = 0
        for node in graph.graph.nodes:
            below = [self.depth[n] for n in node.all_input_nodes]
            self.depth[node] = 1 + max(below, default=-1)
            if is_draw(node):  # draws stay in their order
                self.depth[node] = last_draw = max(self.depth[node], last_draw + 1)
        self._count = itertools.count()
        self._queue: list[tuple[int, int, list[fx.Node]]] = []

    def later(self, nodes: Any, depth: int) -> None:
        """These nodes are wanted as a stack."""
        heapq.heappush(self._queue, (-depth, next(self._count), list(nodes)))

    def finish(self) -> None:
        """Groups what is wanted as stacks, deepest first, and then their inputs."""
        while self._queue:
            _, _, nodes = heapq.heappop(self._queue)
            self.together(nodes)

    def together(self, nodes: Any) -> None:
        """Groups those of the nodes that are alike."""
        kinds: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in dict.fromkeys(nodes):
            if node.op == "call_function" and node not in self.group and not is_draw(node):
                kind = self._kind(node)
                if kind is not None:
                    kinds[kind].append(node)
        for kind, members in kinds.items():
            if len(members) >= _FEWEST:
                self._make(members, selects=kind[0] == "select")

    def _make(self, members: list[fx.Node], selects: bool) -> None:
        group = _Group(members, self.depth[members[0]], selects)
        for node in members:
            self.group[node] = group
        if not selects:
            for inputs in zip(*map(_inputs, members)):
                if len(set(inputs)) > 1:
                    self.later(inputs, max(self.depth[n] for n in inputs))

    def _kind(self, node: fx.Node) -> Any:
        """What operations must have in common to be done together, or None."""
        target, depth = node.target, self.depth[node]
        if target is aten.select.int:
            return "select", node.args[0], node.args[1], depth
        pointwise = target in _PLAIN or torch.Tag.pointwise in getattr(target, "tags", ())
        known = target in _ALONG or target in _SIZED or target in _JOINS or target in (
            _NORM, aten.unsqueeze.default, aten.permute.default, aten.transpose.int, aten.alias.default,
            aten.detach.default, operator.getitem,
        )  # fmt: skip
        if not (pointwise or known) or any("shape" not in n.meta for n in node.all_input_nodes):
            return None
        if any(isinstance(a, list) and a and target not in _JOINS and isinstance(a[0], fx.Node) for a in node.args):
            return None
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        static = tuple(
            ("node", tuple(a.meta["shape"])) if isinstance(a, fx.Node) else (type(a).__name__, repr(a)) for a in leaves
        )
        return target, static, spec, depth


class _Writer:
    """Writes the graph anew, by depth."""

    def __init__(self, graph: fx.GraphModule, plan: _Plan) -> None:
        self.old, self.plan = graph, plan
        self.new = fx.GraphModule(torch.nn.Module(), fx.Graph())
        self.made: dict[fx.Node, fx.Node] = {}
        self._stacks: dict[Any, fx.Node] = {}
        self._constants = itertools.count()

    def run(self) -> fx.GraphModule:
        """The new graph."""
        *nodes, output = self.old.graph.nodes
        places = {node: i for i, node in enumerate(nodes)}
        for node in nodes:
            if node.op == "placeholder":
                self.made[node] = self.new.graph.placeholder(node.name)
            elif node.op == "get_attr":
                self.new.register_buffer(node.target, operator.attrgetter(node.target)(self.old))
                self.made[node] = self.new.graph.get_attr(node.target)
            else:
                continue
            self.made[node].meta["shape"] = node.meta["shape"]
        units: dict[int, Any] = {}
        for node in nodes:
            if node.op == "call_function":
                group = self.plan.group.get(node)
                units[id(node if group is None else group)] = node if group is None else group
        depth = self.plan.depth
        ordered = sorted(
            units.values(),
            key=lambda u: (u.depth, places[u.members[0]]) if isinstance(u, _Group) else (depth[u], places[u]),
        )
        for unit in ordered:
            if isinstance(unit, _Group):
                unit.made = self.selections(unit) if unit.selects else self.operation(unit)
            elif unit.target is aten.stack.default and len(unit.args[0]) >= _FEWEST:
                dim = unit.args[1] if len(unit.args) > 1 else 0
                stacked = self.lanes(list(unit.args[0]))
                self.made[unit] = self.moved(stacked, 0, dim % len(stacked.meta["shape"]))
            else:
                args, kwargs = pytree.tree_map_only(fx.Node, self.value, (unit.args, unit.kwargs))
                self.made[unit] = self.new.graph.call_function(unit.target, args, kwargs)
                self.made[unit].meta.update(unit.meta)
        self.new.graph.output([self.value(node) for node in output.args[0]])
        self.new.recompile()
        return self.new

    def emit(self, shape: Any, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.new.graph.call_function(target, args, kwargs)
        if shape is not None:
            node.meta["shape"] = torch.Size(shape)
        return node

    def value(self, node: fx.Node) -> fx.Node:
        """What stands for one node of the old graph."""
        if node not in self.made:
            group = self.plan.group[node]
            if group.members[0].meta.get("shape") is None:
                raise AssertionError("a tuple is only read by operations of its group")
            self.made[node] = self.emit(node.meta["shape"], aten.select.int, group.made, 0, group.slots[node])
        return self.made[node]

    def lanes(self, nodes: list[fx.Node]) -> fx.Node:
        """A stack `[k, ...]` of nodes of the old graph."""
        key = tuple(nodes)
        if key not in self._stacks:
            self._stacks[key] = self._lanes(nodes)
        return self._stacks[key]

    def _lanes(self, nodes: list[fx.Node]) -> fx.Node:
        shape = nodes[0].meta["shape"]
        groups = [self.plan.group.get(node) for node in nodes]
        sources = list({id(g): g for g in groups if g is not None}.values())
        if None in groups or sum(len(g.members) for g in sources) > 2 * len(nodes):
            unique = list(dict.fromkeys(nodes))
            stacked = self.emit((len(unique), *shape), aten.stack.default, [self.value(n) for n in unique], 0)
            places = [unique.index(n) for n in nodes] if len(unique) < len(nodes) else list(range(len(nodes)))
            return self.picked(stacked, places)
        if len(sources) == 1:
            joined = sources[0].made
        else:
            key = tuple(map(id, sources))
            total = sum(len(g.members) for g in sources)
            if key not in self._stacks:
                made = [g.made for g in sources]
                self._stacks[key] = self.emit((total, *shape), aten.cat.default, made, 0)
            joined = self._stacks[key]
        starts = dict(zip(map(id, sources), itertools.accumulate([0] + [len(g.members) for g in sources])))
        return self.picked(joined, [starts[id(g)] + g.slots[n] for g, n in zip(groups, nodes)])

    def picked(self, stacked: fx.Node, places: list[int], dim: int = 0) -> fx.Node:
        """Rows of a stack."""
        size = list(stacked.meta["shape"])
        if places == list(range(size[dim])):
            return stacked
        size[dim] = len(places)
        if places == list(range(places[0], places[0] + len(places))):
            return self.emit(size, aten.slice.Tensor, stacked, dim, places[0], places[0] + len(places))
        name = f"_places{next(self._constants)}"
        self.new.register_buffer(name, torch.tensor(places, device=self._device()))
        index = self.new.graph.get_attr(name)
        index.meta["shape"] = torch.Size([len(places)])
        return self.emit(size, aten.index_select.default, stacked, dim, index)

    def _device(self) -> torch.device:
        return next(iter(self.old.buffers()), torch.zeros(())).device

    def moved(self, x: fx.Node, place: int, to: int) -> fx.Node:
        """`movedim`."""
        if place == to:
            return x
        order = [i for i in range(len(x.meta["shape"])) if i != place]
        order.insert(to, place)
        return self.emit([x.meta["shape"][i] for i in order], aten.permute.default, x, order)

    def selections(self, group: _Group) -> fx.Node:
        """Many selections from one tensor as one."""
        source, dim = self.value(group.members[0].args[0]), group.members[0].args[1]
        shape = group.members[0].args[0].meta["shape"]
        dim %= len(shape)
        places = [node.args[2] % shape[dim] for node in group.members]
        return self.moved(self.picked(source, places, dim), dim, 0)

    def operation(self, group: _Group) -> Any:
        """One operation on stacks for the operations of a group."""
        first, k = group.members[0], len(group.members)
        target, rank = first.target, len(first.meta.get("shape", ()))
        if target is operator.getitem:
            inner = self.plan.group.get(first.args[0])
            return self.emit((k, *first.meta["shape"]), target, inner.made, first.args[1])
        inputs = iter([list(x) for x in zip(*map(_inputs, group.members))])
        stacks: Iterator[fx.Node] = (self._input(nodes, k) for nodes in inputs)
        pointwise = target in _PLAIN or torch.Tag.pointwise in target.tags
        args, kwargs = pytree.tree_map_only(
            fx.Node, lambda _: self._aligned(next(stacks), rank) if pointwise else next(stacks), (first.args, first.kwargs)
        )
        kwargs = {key: value for key, value in kwargs.items() if key != "memory_format"}
        if not pointwise:
            args = self._shifted(target, first, list(args), k)
        shape = (k, *first.meta["shape"]) if "shape" in first.meta else None
        return self.emit(shape, target, *args, **kwargs)

    def _input(self, nodes: list[fx.Node], k: int) -> fx.Node:
        if len(set(nodes)) > 1:
            return self.lanes(nodes)
        one = self.value(nodes[0])
        shape = one.meta["shape"]
        once = self.emit((1, *shape), aten.unsqueeze.default, one, 0)
        return self.emit((k, *shape), aten.expand.default, once, [k, *shape])

    def _aligned(self, x: fx.Node, rank: int) -> fx.Node:
        """`[k, ...]` with ones after k, so that the rest broadcasts as it did without k."""
        for _ in range(rank + 1 - len(x.meta["shape"])):
            k, *rest = x.meta["shape"]
            x = self.emit((k, 1, *rest), aten.unsqueeze.default, x, 1)
        return x

    def _shifted(self, target: Any, first: fx.Node, args: list[Any], k: int) -> list[Any]:
        """Arguments that name dimensions or sizes, for tensors with one more dimension in front."""
        rank = len(_inputs(first)[0].meta["shape"])

        def shift(dim: Any, of: int = rank) -> Any:
            return [shift(d, of) for d in dim] if isinstance(dim, (list, tuple)) else dim % of + 1

        if target in _ALONG:
            if len(args) > 1:
                args[1] = shift(args[1])
            else:
                args.append(1)  # slice's default
        elif target is _NORM:
            args[2] = shift(args[2])
        elif target is aten.unsqueeze.default:
            args[1] = shift(args[1], rank + 1)
        elif target is aten.permute.default:
            args[1] = [0, *shift(args[1])]
        elif target is aten.transpose.int:
            args[1:] = shift(args[1:])
        elif target in _SIZED:
            size = list(args[1])
            if target is aten.expand.default:
                args[0] = self._aligned(args[0], len(size))
            args[1] = [k, *size]
        elif target in _JOINS:
            dim = args[1] if len(args) > 1 else 0
            args = [args[0], shift(dim, rank + (target is aten.stack.default))]
        return args


