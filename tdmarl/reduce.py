"""The only place that adds up: means, moments and norms that know masks, seeds and ranks.

Three things change what "the mean" is, and all of them are decided here: a mask says which entries count (dead
agents, padding), a seed axis keeps the first dimension apart (one program, several seeds), and an initialized
process group makes every mean one over all ranks. With none of them these are the plain functions of torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_seed_dims = 0


@contextlib.contextmanager
def seed_axis(active: bool = True) -> Iterator[None]:
    """Inside the block the first dimension of parameters and data is one of seeds and is never reduced."""
    global _seed_dims
    before, _seed_dims = _seed_dims, int(active)
    try:
        yield
    finally:
        _seed_dims = before


def has_seed_axis() -> bool:
    """Whether the first dimension is one of seeds."""
    return bool(_seed_dims)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def over_ranks(x: Tensor) -> Tensor:
    """The sum over ranks; without gradient."""
    if _ranks() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def _sums(x: Tensor, mask: Tensor | None, per_agent: bool) -> tuple[Tensor, Tensor]:
    """Sum and count over all dimensions but the seeds' and, if asked, the agents' (the last but one)."""
    keep = set(range(_seed_dims)) | ({x.ndim - 2} if per_agent else set())
    dims = [d for d in range(x.ndim) if d not in keep]
    if mask is None:
        count = x.new_full((), float(torch.Size([x.shape[d] for d in dims]).numel()))
        return x.sum(dims), count
    while mask.ndim < x.ndim:
        mask = mask.unsqueeze(-1)
    mask = mask.expand(x.shape)
    return x.masked_fill(~mask, 0).sum(dims), mask.sum(dims).to(x.dtype)


def mean(x: Tensor, mask: Tensor | None = None, *, per_agent: bool = False) -> Tensor:
    """The mean over entries that count: of all ranks, each seed apart.

    The value is the one over all ranks; the gradient is this rank's share, so that gradients *summed* over ranks
    (:func:`sum_gradients`) are those of the value.

    Args:
        x (Tensor): ``[*B, n, 1]`` or any shape.
        mask (Tensor, optional): boolean, ``[*B, n]``, or any leading part of ``x``'s shape. Where it is False the
            entry has no part in value or gradient, whatever it holds.
        per_agent (bool): keep the last dimension but one.

    Returns:
        Tensor: ``[]``, ``[seeds]``, ``[n]`` or ``[seeds, n]``; 0 where nothing counts.

    Example:
        >>> mean(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    total, count = _sums(x, mask, per_agent)
    share = total / over_ranks(count).clamp_min(1)
    if _ranks() > 1:
        share = share + (over_ranks(share) - share.detach())
    return share


def total(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The sum over entries that count: of all ranks, each seed apart; without gradient. See :func:`mean`."""
    return over_ranks(_sums(x, mask, False)[0])


def scalar(x: Tensor) -> Tensor:
    """A metric of any shape as one number, or as one for each seed: the mean of what is left over."""
    return mean(x.float()) if x.ndim > _seed_dims else x


def moments(x: Tensor, mask: Tensor | None = None, *, per_agent: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance over entries that count: of all ranks, each seed apart; see :func:`mean`.

    Returns:
        tuple[Tensor, Tensor]: shaped to broadcast against ``x``.
    """
    centre = _broadcastable(mean(x, mask, per_agent=per_agent), x, per_agent)
    return centre, _broadcastable(mean((x - centre).square(), mask, per_agent=per_agent), x, per_agent)


def _broadcastable(value: Tensor, x: Tensor, per_agent: bool) -> Tensor:
    shape = [1] * x.ndim
    if _seed_dims:
        shape[0] = x.shape[0]
    if per_agent:
        shape[x.ndim - 2] = x.shape[-2]
    return value.reshape(shape)


def standardize(
    x: Tensor, mask: Tensor | None = None, *, per_agent: bool = False, eps: float = 1e-5
) -> Tensor:
    """``(x - mean) / (std + eps)`` over entries that count, and 0 elsewhere; the biased std, as the papers' code."""
    centre, variance = moments(x, mask, per_agent=per_agent)
    out = (x - centre) / (variance.sqrt() + eps)
    if mask is None:
        return out
    while mask.ndim < x.ndim:
        mask = mask.unsqueeze(-1)
    return out.masked_fill(~mask, 0)


def sum_gradients(params: Iterable[Tensor]) -> None:
    """Replaces each gradient by its sum over ranks, in one message; nothing on one rank."""
    if _ranks() == 1:
        return
    grads = []
    for p in params:
        if p.grad is None:  # every rank must send the same entries
            p.grad = torch.zeros_like(p)
        grads.append(p.grad)
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([g.numel() for g in grads])):
        grad.copy_(part.view_as(grad))


def grad_norm(params: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, ``[]`` or ``[seeds]``."""
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.zeros(())
    if not _seed_dims:
        return torch.nn.utils.get_total_norm(grads)
    return torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()


def clip_gradients(params: Sequence[Tensor], max_norm: float | None) -> Tensor:
    """Scales the gradients so that their norm is at most ``max_norm``; returns the norm before, without a host read.

    Args:
        params (sequence of Tensor): whose ``.grad`` is clipped in place, each seed by its own norm.
        max_norm (float, optional): None only measures.
    """
    norm = grad_norm(params)
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp_max(1.0)
        for p in params:
            if p.grad is not None:
                p.grad.mul_(scale.reshape(-1, *[1] * (p.grad.ndim - 1)) if _seed_dims else scale)
    return norm
