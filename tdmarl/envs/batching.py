"""Makes one operation of many equal ones, so that a graph and the time to compile it do not grow with agents.

Scenarios loop in Python over agents and over pairs of entities, and each turn becomes operations of its own. Here
operations that are equal but for their inputs, and do not depend on each other, become one on stacked inputs, by
`torch.vmap`. What each reads is picked out of earlier stacks by constant indices.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tdmarl.tracing import describe, is_draw, record, simplify

aten = torch.ops.aten

Node = Any  # an `fx.Node`, of whose arguments a type checker knows nothing

_JOINS = {aten.cat.default, aten.stack.default}
_SUMS = {aten.add.Tensor: 1, aten.sub.Tensor: -1}
_LONG = 4  # terms of a sum that is taken at once
_LARGER = 8  # times what is read, that is not worth copying for it
_MANY = 3  # operations that are worth a stack
_VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
}
_PARTS = {aten.slice.Tensor: (1, 3), aten.slice_scatter.default: (2, 4)}  # places of dimension and end
_ENTRIES = {operator.getitem, aten.select.int, aten.unbind.int}


def batched(graph: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
    """The same function in fewer operations; sums are added up in another order, all else is the same to the bit.

    Args:
        graph (GraphModule): without mutation.
        inputs (list of Tensor): example inputs.
    """
    graph = copy.deepcopy(graph)
    _prepare(graph.graph, inputs[0].device)
    _add_at_once(graph, inputs[0].device)
    with torch.no_grad():
        found = record(_Batches(graph).run, inputs)
        simplify(found)
    return found


def _prepare(graph: fx.Graph, device: torch.device) -> None:
    """Filled tensors depend on their shape alone, nothing neutral is added, and parts end where their tensor does.

    `torch.vmap` cannot write into a part that ends at the largest integer, which is Python's way to say the end.
    """
    nodes: list[Node] = list(graph.nodes)
    for node in nodes:
        if node.target in (aten.zeros_like.default, aten.full_like.default, aten.fill.Scalar):
            value = 0 if node.target is aten.zeros_like.default else node.args[1]
            args, kwargs = (list(node.meta["shape"]), value), dict(dtype=node.meta["dtype"], device=device)
            target = aten.full.default
        elif node.target in _PARTS:
            dim, end = _PARTS[node.target]
            if len(node.args) > end and node.args[end] is not None:
                size = node.args[0].meta["shape"][node.args[dim]]
                node.args = (*node.args[:end], min(node.args[end], size), *node.args[end + 1 :])
            continue
        elif _adds_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        elif node.target is aten.fill.Tensor and node.args[1].meta["dtype"] == node.meta["dtype"]:
            target, args, kwargs = aten.expand.default, (node.args[1], list(node.meta["shape"])), {}
        else:
            continue
        with graph.inserting_before(node):
            found = graph.call_function(target, args, kwargs)
        found.meta.update(node.meta)
        node.replace_all_uses_with(found)
        graph.erase_node(node)


def _adds_nothing(node: Any) -> bool:
    """Whether a node adds zero, or multiplies or divides by one."""
    neutral = {aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1}
    if node.target not in neutral or len(node.args) != 2 or node.kwargs:
        return False
    x, number = node.args
    same = isinstance(x, fx.Node) and x.meta["dtype"] == node.meta["dtype"]
    return same and isinstance(number, (int, float)) and number == neutral[node.target]


def _add_at_once(graph: fx.GraphModule, device: torch.device) -> None:
    """Chains ``x + a - b + ...`` become ``x`` and one sum of a stack, in which a term that comes again is weighted."""
    _subtract_where(graph.graph)
    inner: set[Node] = set()
    nodes: list[Node] = list(graph.graph.nodes)
    for node in reversed(nodes):
        if node in inner or not _is_sum(node):
            continue
        terms: list[Node] = []
        signs: Counter[Node] = Counter()
        first = node
        while _is_sum(first) and (first is node or len(first.users) == 1):
            inner.add(first)
            before, term = first.args
            signs[term] += _SUMS[first.target]
            terms.append(term)
            first = before
        if len(terms) < _LONG:
            continue
        weights = {term: float(signs[term]) for term in dict.fromkeys(reversed(terms))}
        with graph.graph.inserting_before(node):
            total = _weighted(graph, weights, device)
            found = graph.graph.call_function(aten.add.Tensor, (first, total))
        found.meta.update(node.meta)
        node.replace_all_uses_with(found)
    graph.graph.eliminate_dead_code()


def _weighted(graph: fx.GraphModule, weights: dict[Node, float], device: torch.device) -> Node:
    """The sum of terms by their weights."""
    meta = next(iter(weights)).meta
    shape, dtype = meta["shape"], meta["dtype"]
    node = graph.graph.call_function(aten.stack.default, (list(weights),))
    node.meta.update(shape=torch.Size([len(weights), *shape]), dtype=dtype)
    if set(weights.values()) != {1.0}:
        factors = torch.tensor(list(weights.values()), dtype=dtype, device=device).view(-1, *[1] * len(shape))
        name = f"weights_{node.name}"
        graph.register_buffer(name, factors)
        constant = graph.graph.get_attr(name)
        describe(constant, factors)
        stack, node = node, graph.graph.call_function(aten.mul.Tensor, (node, constant))
        node.meta.update(stack.meta)
    total = graph.graph.call_function(aten.sum.dim_IntList, (node, [0]))
    total.meta.update(meta)
    return total


def _is_sum(node: Any) -> bool:
    """Whether a node adds to or subtracts from a tensor another one of its shape."""
    if not (isinstance(node, fx.Node) and node.op == "call_function" and node.target in _SUMS):
        return False
    operands: tuple[Node, ...] = node.args
    if node.kwargs or len(operands) != 2 or not all(isinstance(a, fx.Node) for a in operands):
        return False
    same = all(a.meta.get(k) == node.meta.get(k) for a in operands for k in ("shape", "dtype"))
    return same and node.meta["dtype"].is_floating_point


def _subtract_where(graph: fx.Graph) -> None:
    """``where(m, x - 1, x)`` is ``x - where(m, 1, 0)``, a term of a chain."""
    nodes: list[Node] = list(graph.nodes)
    for node in nodes:
        if node.target is not aten.where.self:
            continue
        mask, new, old = node.args
        if not (isinstance(new, fx.Node) and new.target in _SUMS and len(new.users) == 1 and not new.kwargs):
            continue
        x, number = new.args
        if x is not old or not isinstance(number, (int, float)) or node.meta["dtype"] != torch.float32:
            continue
        if mask.meta["shape"] != node.meta["shape"]:
            continue
        with graph.inserting_before(node):
            term = graph.call_function(aten.where.Scalar, (mask, float(number), 0.0))
            found = graph.call_function(new.target, (x, term))
        term.meta.update(node.meta)
        found.meta.update(node.meta)
        node.replace_all_uses_with(found)
        graph.erase_node(node)
        graph.erase_node(new)


class _Member(NamedTuple):
    """One of what was computed together: the given entry of a stack, or of each of several."""

    stack: Any
    place: int


class _Values:
    """What was computed so far, and pieces of it put together."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self._order = {node: i for i, node in enumerate(graph.graph.nodes)}
        self.values: dict[Node, Any] = {}
        self.plain: dict[Node, Any] = {}  # those values that are no members
        self._stacks: dict[Any, tuple[Tensor, dict[Any, int]]] = {}  # with places of nodes and stacks
        self._moved: dict[tuple[Node, int], Tensor] = {}

    def _source(self, node: Node) -> Any:
        value = self.values[node]
        return id(value.stack) if isinstance(value, _Member) else None

    def _picks(self, node: Node) -> bool:
        """Whether a node is an entry of something and known without an operation; those of one tensor are members."""
        x, *rest = node.args
        value = self.values[x]
        if node.target is operator.getitem:
            (place,) = rest
            member = isinstance(value, _Member)
            self.values[node] = value._replace(stack=value.stack[place]) if member else value[place]
            return True
        if isinstance(value, _Member):
            return False
        dim, *places = rest or [0]
        if (x, dim) not in self._moved:
            self._moved[x, dim] = value.movedim(dim, 0)
        stack = self._moved[x, dim]
        members = [_Member(stack, place) for place in range(len(stack))]
        self.values[node] = members[places[0]] if places else members
        return True

    def _one(self, node: Node) -> Any:
        """The value of a node by itself."""
        value = self.values[node]
        if not isinstance(value, _Member):
            return value
        if node not in self.plain:
            self.plain[node] = pytree.tree_map(lambda stack: stack[value.place], value.stack)
        return self.plain[node]

    def _alone(self, node: Node) -> Any:
        if node.target in _JOINS:
            runs = self._runs([(x,) for x in node.args[0]])
            if any(
                self._source(run[0][0]) is not None or 2 * len(set(run)) <= len(run)
                for run in runs
                if len(run) > 2
            ):
                return self._join([node])[0]
        args, kwargs = pytree.tree_map_only(fx.Node, self._one, (node.args, node.kwargs))
        return node.target(*args, **kwargs)

    def _gather(self, nodes: list[Node]) -> Tensor:
        """Values of nodes, stacked."""
        unique = list(dict.fromkeys(nodes))
        used = Counter(map(self._source, unique))
        whole: dict[int, Tensor] = {}  # stacks of which much is used
        rest = []
        for node in unique:
            value = self.values[node]
            if isinstance(value, _Member) and (
                len(used) == 1 or 2 * used[id(value.stack)] >= len(value.stack)
            ):
                whole[id(value.stack)] = value.stack
            else:
                rest.append(node)
        key = frozenset([*whole, *rest])
        if key not in self._stacks:
            parts = [*whole.values(), *([torch.stack([self._one(node) for node in rest])] if rest else [])]
            starts, start = {}, 0
            for name, stack in whole.items():
                starts[name], start = start, start + len(stack)
            starts |= {node: start + i for i, node in enumerate(rest)}
            self._stacks[key] = parts[0] if len(parts) == 1 else torch.cat(parts), starts
        stack, starts = self._stacks[key]
        places = {
            node: starts[node] if node in starts else starts[self._source(node)] + self.values[node].place
            for node in unique
        }
        return _picked(stack, [places[node] for node in nodes])

    def _join(self, nodes: list[Node]) -> Tensor:
        """`cat` or `stack` of each node's tensors, stacked; neighbours from one source are picked together."""
        first, g = nodes[0], len(nodes)
        dim = (first.args[1] if len(first.args) > 1 else 0) % len(first.meta["shape"])
        cat = first.target is aten.cat.default
        parts = []
        for run in self._runs(list(zip(*[node.args[0] for node in nodes]))):
            k, shape = len(run), run[0][0].meta["shape"]
            x = self._gather([column[i] for i in range(g) for column in run])  # [g * k, ...]
            if k == 1 and cat:
                parts.append(x)
                continue
            x = x.view(g, k, *shape).movedim(1, 1 + dim)  # [g, ..., k, ...]
            parts.append(x.flatten(1 + dim, 2 + dim) if cat else x)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1 + dim)

    def _runs(self, columns: list[tuple[Node, ...]]) -> list[list[tuple[Node, ...]]]:
        """Neighbours of one shape and source."""
        runs: list[list[Any]] = []
        last: Any = None
        for column in columns:
            sources = {self._source(x) for x in column}
            found = sources if len(sources) == 1 else "several", column[0].meta["shape"]
            if found != last:
                runs.append([])
            runs[-1].append(column)
            last = found
        return runs


class _Batches(_Values):
    """Runs a graph, equal operations together."""

    def run(self, *inputs: Tensor) -> list[Tensor]:
        """What the graph returns."""
        given = iter(inputs)
        *nodes, output = self.graph.graph.nodes
        waits: dict[Node, int] = {}  # for how many nodes
        users: dict[Node, list[Node]] = defaultdict(list)
        left = Counter(map(_kind, nodes))
        ready: dict[Any, list[Node]] = defaultdict(list)
        draw = None
        for node in nodes:
            before = set(node.all_input_nodes)
            if is_draw(node):  # in their order
                before |= {draw} - {None}
                draw = node
            for other in before:
                users[other].append(node)
            waits[node] = len(before)
            if not before:
                ready[_kind(node)].append(node)
        while ready:
            # Operations wait until all of their kind are ready, where that is possible.
            kind = max(ready, key=lambda k: (_is_first(ready[k][0]), len(ready[k]) / left[k]))
            group = sorted(ready.pop(kind), key=self._order.__getitem__)
            left[kind] -= len(group)
            for node in group:
                if node.op == "placeholder":
                    self.values[node] = next(given)
                elif node.op == "get_attr":
                    self.values[node] = operator.attrgetter(str(node.target))(self.graph)
            if group[0].op == "call_function":
                self._compute(group)
            for node in group:
                for user in users[node]:
                    waits[user] -= 1
                    if not waits[user]:
                        ready[_kind(user)].append(user)
        return [self._one(x) for x in output.args[0]]

    def _compute(self, nodes: list[Node]) -> None:
        """Values of operations of one kind."""
        first = nodes[0]
        if first.target in _ENTRIES:
            nodes = [node for node in nodes if not self._picks(node)]
        groups: dict[Any, list[Node]] = defaultdict(list)
        for node in nodes:
            sources = None if node.target in _JOINS else [self._source(x) for x in node.all_input_nodes]
            rest = node.args[1:] if first.target is aten.select.int else None
            groups[str(sources), rest].append(node)
        for group in groups.values():
            if self._is_worth(group):
                self._together(group)
            else:
                for node in group:
                    self.values[node] = self._alone(node)

    def _is_worth(self, nodes: list[Node]) -> bool:
        """Whether nodes become one operation.

        Not if they are only returned, or only views, or small parts of what they read, and that would have to be
        stacked for it.
        """
        first, *others = nodes
        if is_draw(first) or not first.all_input_nodes:
            return False
        if first.target in _JOINS:
            return len(nodes) > 1
        returned = all(user.op == "output" for node in nodes for user in node.users)
        shared = set(first.all_input_nodes).intersection(*[node.all_input_nodes for node in others])
        copied = [x for x in first.all_input_nodes if x not in shared and self._source(x) is None]
        if "shape" in first.meta:
            size = first.meta["shape"].numel()
            if any(x.meta["shape"].numel() > _LARGER * size for x in copied):
                return False
        return len(nodes) >= _MANY and (not copied or not returned and first.target not in _VIEWS)

    def _together(self, nodes: list[Node]) -> None:
        """One operation for all nodes."""
        first = nodes[0]
        if first.target in _JOINS:
            stack: Any = self._join(nodes)
        else:
            _, spec = pytree.tree_flatten((first.args, first.kwargs))
            columns = list(zip(*[pytree.tree_leaves((node.args, node.kwargs)) for node in nodes]))
            leaves: list[Any] = []
            dims: list[int | None] = []
            for column in columns:
                isnode = isinstance(column[0], fx.Node)
                shared = not isnode or all(x is column[0] for x in column)
                leaves.append(
                    column[0]
                    if not isnode
                    else self._one(column[0])
                    if shared
                    else self._gather(list(column))
                )
                dims.append(None if shared else 0)
            batch = [x for x, dim in zip(leaves, dims) if dim == 0]

            def call(*own: Tensor) -> Any:
                given = iter(own)
                args, kwargs = pytree.tree_unflatten(
                    [x if dim is None else next(given) for x, dim in zip(leaves, dims)], spec
                )
                return first.target(*args, **kwargs)

            try:
                stack = torch.vmap(call)(*batch)
            except RuntimeError:  # it has no rule for this operation
                self.values.update({node: self._alone(node) for node in nodes})
                return
        for place, node in enumerate(nodes):
            self.values[node] = _Member(stack, place)


def _is_first(node: Node) -> bool:
    """Whether a node never waits: random numbers are drawn in order, and entries are known without an operation."""
    return is_draw(node) or node.target in _ENTRIES


def _picked(stack: Tensor, places: list[int]) -> Tensor:
    """Entries of a stack in the given order."""
    start, count = places[0], len(places)
    if places == list(range(start, start + count)):
        return stack if count == len(stack) else stack[start : start + count]
    if all(place == start for place in places):
        return stack[start : start + 1].expand(count, *stack.shape[1:])
    return stack.index_select(0, torch.tensor(places, device=stack.device))


def _kind(node: Node) -> Any:
    """What is the same for operations that can be one: all but the inputs' values."""
    if node.op != "call_function":
        return node.op
    if node.target is aten.select.int:
        return node.target
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    return (
        node.target,
        tuple(
            (a.meta.get("shape"), a.meta.get("dtype"))
            if isinstance(a, fx.Node)
            else (type(a), repr(a) if isinstance(a, float) else a)
            for a in leaves
        ),
        spec,
    )
