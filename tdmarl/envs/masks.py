"""Boolean indexing without a data-dependent size, so that it needs no answer from the device."""

from __future__ import annotations

import ast
import functools
import linecache
import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from tdmarl import tracing

tracing.OWN_FILES.add(__file__)
_ASK_FOR_SOLID_BOXES = (
    "_box_sphere_vectorized_collision",
    "_box_line_vectorized_collision",
    "_box_box_vectorized_collision",
)


class FixedSize(torch.overrides.TorchFunctionMode):
    """Gives boolean indexing a fixed size: `x[mask] = v` becomes `where`, `x[mask]` keeps all rows.

    What is computed row by row from `x[mask]` is only kept where the mask holds, because it can only return
    through `y[mask] = ...`. The test of an `assert` is taken to hold, and so is VMAS's question whether any
    box is solid, which only saves work. Nothing of this changes the result of a simulator in which an
    environment does not depend on its neighbours, and nothing is read from the device. Random numbers for
    selected rows are drawn for all of them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ or func is Tensor.__setitem__:
            found = _split(args[0], args[1])
            if found is not None:
                return (
                    _write(args[0], *found, args[2])
                    if func is Tensor.__setitem__
                    else _gather(args[0], *found)
                )
        elif func is Tensor.__bool__ and _is_known_to_hold(sys._getframe(1)):
            return True
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool and index.ndim > 0


def _split(x: Tensor, index: Any) -> tuple[tuple[Any, ...], list[tuple[int, Tensor]]] | None:
    """The index without its boolean masks, and each mask with the axis of the result at which it starts."""
    index = index if isinstance(index, tuple) else (index,)
    if not any(map(_is_mask, index)):
        return None
    plain: list[Any] = []
    masks, axis = [], 0
    for i in index:
        if _is_mask(i):
            masks.append((axis, i))
            plain += [slice(None)] * i.ndim
            axis += i.ndim
            continue
        plain.append(i)
        if i is Ellipsis:
            axis += x.ndim - sum(
                j.ndim if _is_mask(j) else j is not None and j is not Ellipsis for j in index
            )
        elif not isinstance(i, int):
            axis += 1
    return tuple(plain), masks


def _gather(x: Tensor, index: tuple[Any, ...], masks: list[tuple[int, Tensor]]) -> Tensor:
    rows = x[index].clone()
    axis, mask = masks[0]
    return rows.flatten(axis, axis + mask.ndim - 1) if mask.ndim > 1 else rows


def _write(x: Tensor, index: tuple[Any, ...], masks: list[tuple[int, Tensor]], value: Any) -> None:
    view = x[index]
    value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    keep: Tensor | None = None
    for axis, mask in masks:
        if value.ndim and mask.ndim > 1 and value.numel() == view.numel():
            value = value.reshape(view.shape)
        mask = mask.reshape((1,) * axis + mask.shape + (1,) * (view.ndim - axis - mask.ndim))
        keep = mask if keep is None else keep & mask
    assert keep is not None
    view.copy_(torch.where(keep, value, view))


def _is_known_to_hold(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_name in _ASK_FOR_SOLID_BOXES or frame.f_lineno in _assert_lines(code.co_filename)


@functools.lru_cache(None)
def _assert_lines(filename: str) -> frozenset[int]:
    """The lines of a source file that `assert` statements cover."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return frozenset()
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    return frozenset(
        line for node in found for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    )
