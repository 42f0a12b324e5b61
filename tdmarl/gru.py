"""A gated recurrent unit over sequences inside which episodes may begin: exact, without a host read.

Torch's fused unit carries its state through the whole sequence, and cutting the sequences where episodes begin needs
their places on the host. Two ways around it, both exact:

*cells*: one ``torch.gru_cell`` a step, on the state with the beginnings set to zero. On a CPU torch's own unit is
such a loop, too, and no faster; a compiler unrolls it. So this is the way there.

*fused*: before each step that begins an episode another one is inserted that does nothing but empty the state. With

    ``r = s(W_r x + U_r h)``, ``z = s(W_z x + U_z h)``, ``n = tanh(W_n x + r (U_n h))``, ``h' = (1 - z) n + z h``

an input that drives ``r`` and ``z`` to minus infinity and ``W_n x`` to zero gives ``h' = tanh(0) = 0``, whatever
``h`` was. Two more input columns do that: a constant one, which carries the input's bias, and one for the inserted
steps. The sequence becomes ``2 L - 1`` steps long, however many episodes begin, so shapes never change, and a GPU
is spared ``L`` launches of each of a cell's operations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

NEVER = -1e4  # the sigmoid of it is zero in single and in half precision, whatever a bounded state adds


def gru(x: Tensor, hidden: Tensor, reset: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The states of a GRU after each step, with the state emptied before the steps where ``reset`` is True.

    Args:
        x (Tensor): ``[L, R, in]``, ``R`` sequences of length ``L``.
        hidden (Tensor): ``[R, h]``, the state before the first step.
        reset (Tensor): boolean, ``[L, R]``.
        weights (sequence of Tensor): ``weight_ih`` ``[3 h, in]``, ``weight_hh`` ``[3 h, h]``, ``bias_ih`` and
            ``bias_hh`` ``[3 h]``, as ``torch.nn.GRU`` has them.

    Returns:
        Tensor: ``[L, R, h]``.
    """
    if x.device.type == "cuda" and not torch.compiler.is_compiling():
        with _full_precision():
            return fused(x, hidden, reset, weights)
    return cells(x, hidden, reset, weights)


def cells(x: Tensor, hidden: Tensor, reset: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """:func:`gru` step by step."""
    states = []
    for now, begins in zip(x.unbind(0), reset.unsqueeze(-1).unbind(0)):
        hidden = torch.gru_cell(now, hidden.masked_fill(begins, 0), *weights)
        states.append(hidden)
    return torch.stack(states)


def fused(x: Tensor, hidden: Tensor, reset: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """:func:`gru` as one call of torch's unit, with steps inserted that empty the state."""
    length, rows, width = x.shape
    hidden = hidden.masked_fill(reset[0].unsqueeze(-1), 0)
    inserted = torch.cat([torch.zeros_like(reset[:1]), reset[1:]]).cumsum(
        0
    )  # [L, R], before and at each step
    place = (torch.arange(length, device=x.device).unsqueeze(-1) + inserted).unsqueeze(-1)  # [L, R, 1]
    steps = torch.cat([x, x.new_ones(length, rows, 1), x.new_zeros(length, rows, 1)], -1)
    empty = torch.zeros_like(steps[:1])
    empty[..., -1] = 1
    long = empty.expand(2 * length - 1, -1, -1).scatter(0, place.expand_as(steps), steps)
    out = torch.gru(long, hidden.unsqueeze(0), _extended(weights), True, 1, 0.0, False, False, False)[0]
    return out.gather(0, place.expand(-1, -1, out.shape[-1]))


def _extended(weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights with the two more columns, as parts of one piece of memory, which cuDNN would make of them."""
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    empties = torch.zeros_like(bias_ih)
    empties[: 2 * weight_hh.shape[-1]] = NEVER
    wide = torch.cat([weight_ih, bias_ih.unsqueeze(-1), empties.unsqueeze(-1)], -1)
    parts = [wide, weight_hh, torch.zeros_like(bias_ih), bias_hh]
    flat = torch.cat([part.reshape(-1) for part in parts])
    return [piece.view(part.shape) for piece, part in zip(flat.split([p.numel() for p in parts]), parts)]


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Keeps cuDNN from rounding to ten bits, its default: the sequence must give what single steps gave."""
    switch: Any = torch.backends.cudnn.rnn
    before, switch.fp32_precision = switch.fp32_precision, "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before
