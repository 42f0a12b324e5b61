"""Products of few columns with their rows last, for compiled code on a CPU: what follows them then runs in vectors."""

from __future__ import annotations

import torch
from torch import fx


aten = torch.ops.aten

_NARROW = 16  # columns; a vector has eight numbers of float32, or sixteen
_ROWS = 64  # as few rows are no loop worth turning
_FACTORS = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0, aten.baddbmm.default: 1}


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
        with graph.graph.inserting_before(node):
            turned = [_turned(graph.graph, factor) for factor in (w, x)]
            out = graph.graph.call_function(
                aten.mm.default if len(node.meta["shape"]) == 2 else aten.bmm.default, tuple(turned)
            )
            out.meta.update(dtype=node.meta["dtype"], shape=_swapped(node.meta["shape"]))
            found = _turned(graph.graph, out)
            if place:
                found = graph.graph.call_function(aten.add.Tensor, (found, node.args[0]))
                found.meta.update(node.meta)
        node.replace_all_uses_with(found)
        graph.graph.erase_node(node)
    graph.recompile()


def _is_narrow(node: fx.Node) -> bool:
    *_, rows, columns = node.meta["shape"]
    return columns <= _NARROW and rows >= _ROWS


def _turned(graph: fx.Graph, node: fx.Node) -> fx.Node:
    found = graph.call_function(aten.transpose.int, (node, -2, -1))
    found.meta.update(dtype=node.meta.get("dtype"), shape=_swapped(node.meta["shape"]))
    return found


def _swapped(shape: torch.Size) -> torch.Size:
    return torch.Size([*shape[:-2], shape[-1], shape[-2]])
