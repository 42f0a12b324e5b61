"""What policies draw actions from: normals in a box, choices under a mask, and chance alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.distributions.kl import register_kl
from torchrl.data import Binary, Bounded, Categorical, MultiCategorical, MultiOneHot, OneHot, TensorSpec

# Gauss-Hermite nodes and weights for the standard normal, probabilists' convention, the positive half of ten. The
# entropy correction of a squashed normal is off by at most 3e-4 for standard deviations up to 1, by 2e-2 at 2.
_NODES = (0.4849357075154977, 1.4659890943911582, 2.484325841638955, 3.5818234835519268, 4.859462828332313)
_WEIGHTS = (
    0.3446423349320191,
    0.13548370298026785,
    0.019111580500770286,
    7.580709343122177e-04,
    4.310652630718282e-06,
)


def one_hot(index: Tensor, count: int) -> Tensor:
    """Indices as vectors ``[*B, count]`` of integers. ``torch``'s function of that name reads the CPU's memory.

    Example:
        >>> one_hot(torch.tensor([2, 0]), 3)
        tensor([[0, 0, 1],
                [1, 0, 0]])
    """
    return (index.unsqueeze(-1) == torch.arange(count, device=index.device)).to(torch.int64)


def dimensions_first(*tensors: Tensor) -> list[Tensor]:
    """Tensors ``[*B, n, a]`` as views ``[a, *B, n]``, fewer batch dimensions filled up, so that they still broadcast.

    There are few dimensions to an action and many rows: a loop that runs along the rows makes use of a processor's
    vectors, one along two or three dimensions does not.

    Example:
        >>> [tuple(x.shape) for x in dimensions_first(torch.zeros(7, 3, 2), torch.zeros(3, 2))]
        [(2, 7, 3), (2, 1, 3)]
    """
    ndim = max(x.ndim for x in tensors)
    return [x.movedim(-1, 0)[(slice(None), *[None] * (ndim - x.ndim))] for x in tensors]


def _normal_log_prob(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return -0.5 * ((x - loc) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)


def _normal_entropy(scale: Tensor) -> Tensor:
    return scale.log() + 0.5 * (1 + math.log(2 * math.pi))


def log_slope(x: Tensor) -> Tensor:
    """``log(1 - tanh(x)^2)`` without cancellation, with one exponential in it and in its derivative."""
    size = x.abs()
    return 2 * (math.log(2) - size - (-2 * size).exp().log1p())


class BoxedNormal(Distribution):
    """An independent normal per action dimension of a box; dimensions with ``low == high`` are padding.

    A box that is the same for all agents may have ``n = 1``.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> None:
        self.loc, self.scale, self.low, self.high = loc, scale, low, high
        self.real = high > low
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def _noise(self, sample_shape: Sequence[int]) -> Tensor:
        shape = torch.Size(sample_shape) + self.loc.shape
        return self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)

    def _sum(self, x: Tensor) -> Tensor:
        """Over the dimensions that are no padding, of ``[a, *B, n]``."""
        real, _ = dimensions_first(self.real, x.movedim(0, -1))
        return x.masked_fill(~real, 0).sum(0)

    @property
    def deterministic_sample(self) -> Tensor:
        """What the policy does when it does not explore."""
        return self.mode

    @property
    def mean(self) -> Tensor:
        return self.mode


class ClippedNormal(BoxedNormal):
    """A normal whose samples the environment clips to its box, as MAPPO's and HARL's code has it.

    The sample, and with it the log-probability and the entropy, is that of the unclipped normal: it may lie outside
    the box (``tdmarl.VmasEnv`` clips). The mode is clipped.

    Args:
        loc (Tensor): ``[*B, n, a]``.
        scale (Tensor): ``[*B, n, a]``, positive.
        low (Tensor): ``[n, a]``, or ``[1, a]`` for all agents.
        high (Tensor): as ``low``. Where it equals ``low`` the dimension is padding: no part in log-probability or
            entropy, and always ``low``.
    """

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:  # type: ignore[override]
        return torch.where(self.real, self._noise(sample_shape), self.low)

    def log_prob(self, value: Tensor) -> Tensor:
        return self._sum(_normal_log_prob(*dimensions_first(value, self.loc, self.scale)))

    def entropy(self) -> Tensor:
        return self._sum(_normal_entropy(*dimensions_first(self.scale)))

    @property
    def mode(self) -> Tensor:
        return torch.minimum(torch.maximum(self.loc, self.low), self.high)


class TanhNormal(BoxedNormal):
    """A normal squashed into its box by tanh: ``a = mid + half * tanh(x)``, ``x ~ N(loc, scale)``.

    Unlike TorchRL's class of the same name it has no host read, knows padding, and has an entropy: that of the
    normal plus ``E[log(1 - tanh(x)^2)] + log(half)``, by ten-point Gauss-Hermite quadrature, so that no random
    number is drawn for it.

    Args:
        loc, scale, low, high: as for :class:`ClippedNormal`.
    """

    limit = 1 - 1e-6  # of tanh(x), in sample and log_prob alike, so that both see the same x

    def _half(self) -> Tensor:
        return ((self.high - self.low) / 2).masked_fill(~self.real, 1)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:  # type: ignore[override]
        return self._squash(self._noise(sample_shape))

    def _squash(self, x: Tensor) -> Tensor:
        y = x.tanh().clamp(-self.limit, self.limit)
        return torch.where(self.real, (self.high + self.low) / 2 + self._half() * y, self.low)

    def log_prob(self, value: Tensor) -> Tensor:
        mid = (self.high + self.low) / 2
        value, loc, scale, mid, half = dimensions_first(value, self.loc, self.scale, mid, self._half())
        x = torch.atanh(((value - mid) / half).clamp(-self.limit, self.limit))
        return self._sum(_normal_log_prob(x, loc, scale) - log_slope(x) - half.log())

    def entropy(self) -> Tensor:
        loc, scale, half = dimensions_first(self.loc, self.scale, self._half())
        correction = torch.zeros_like(loc)
        for node, weight in zip(_NODES, _WEIGHTS):
            step = node * scale
            correction = correction + weight * (log_slope(loc + step) + log_slope(loc - step))
        return self._sum(_normal_entropy(scale) + correction + half.log())

    @property
    def mode(self) -> Tensor:
        return self._squash(self.loc)


class MaskedCategorical(Distribution):
    """One discrete choice, or several at once, over the available actions only.

    An unavailable action is never taken and has no gradient and no part in the entropy. If nothing is available
    (a dead agent) every action counts as available: what the agent does then is masked elsewhere.

    Args:
        logits (Tensor): ``[*B, n, sum(nvec)]``.
        mask (Tensor, optional): boolean, of the same shape, True where available.
        nvec (sequence of int): how many actions each choice has; one number for a single choice.
        one_hot (bool): a single choice as a one-hot vector instead of an index.

    Shape:
        Samples are ``[*B, n]``, ``[*B, n, len(nvec)]`` for several choices, ``[*B, n, K]`` for ``one_hot``;
        log-probabilities and entropies ``[*B, n]``, summed over the choices.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_enumerate_support = False

    def __init__(
        self, logits: Tensor, mask: Tensor | None = None, *, nvec: Sequence[int] = (), one_hot: bool = False
    ) -> None:
        self.nvec, self.one_hot = tuple(nvec) or (logits.shape[-1],), one_hot
        parts = logits.split(self.nvec, -1)
        masks: Sequence[Tensor | None] = [None] * len(parts) if mask is None else mask.split(self.nvec, -1)
        self.parts = [self._normalized(part, available) for part, available in zip(parts, masks)]
        event = logits.shape[-1:] if one_hot else torch.Size([len(self.nvec)] if len(self.nvec) > 1 else [])
        super().__init__(logits.shape[:-1], event, validate_args=False)

    @staticmethod
    def _normalized(logits: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            mask = mask | ~mask.any(-1, keepdim=True)
            logits = logits.masked_fill(~mask, float("-inf"))
        return logits.log_softmax(-1)

    def _joined(self, choices: list[Tensor]) -> Tensor:
        if self.one_hot:
            return one_hot(choices[0], self.nvec[0])
        return torch.stack(choices, -1) if len(choices) > 1 else choices[0]

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:  # type: ignore[override]
        with torch.no_grad():  # the Gumbel trick: no host read, and minus infinity stays unavailable
            shapes = [torch.Size(sample_shape) + part.shape for part in self.parts]
            noise = [
                -torch.empty(s, device=p.device, dtype=p.dtype).exponential_().log()
                for s, p in zip(shapes, self.parts)
            ]
            return self._joined([(part + g).argmax(-1) for part, g in zip(self.parts, noise)])

    def log_prob(self, value: Tensor) -> Tensor:
        if self.one_hot:
            value = value.argmax(-1)
        choices = value.unbind(-1) if len(self.nvec) > 1 else (value,)
        taken = [p.gather(-1, c.unsqueeze(-1)).squeeze(-1) for p, c in zip(self.parts, choices)]
        return torch.stack(taken).sum(0)

    def entropy(self) -> Tensor:
        finite = [part.clamp_min(torch.finfo(part.dtype).min) for part in self.parts]
        return -torch.stack([(part.exp() * f).sum(-1) for part, f in zip(self.parts, finite)]).sum(0)

    @property
    def mode(self) -> Tensor:
        return self._joined([part.argmax(-1) for part in self.parts])

    @property
    def deterministic_sample(self) -> Tensor:
        """What the policy does when it does not explore: the most likely available action."""
        return self.mode


@register_kl(ClippedNormal, ClippedNormal)
@register_kl(TanhNormal, TanhNormal)
def _kl_of_boxes(p: BoxedNormal, q: BoxedNormal) -> Tensor:
    """That of the normals: one map squashes both, and the environment clips both."""
    loc, scale, other_loc, other_scale = dimensions_first(p.loc, p.scale, q.loc, q.scale)
    ratio, shift = scale / other_scale, (loc - other_loc) / other_scale
    return p._sum(0.5 * (ratio.square() + shift.square() - 1) - ratio.log())


@register_kl(MaskedCategorical, MaskedCategorical)
def _kl_of_choices(p: MaskedCategorical, q: MaskedCategorical) -> Tensor:
    least = torch.finfo(p.parts[0].dtype).min  # of what is unavailable to both
    pairs = zip(p.parts, q.parts)
    return torch.stack([(a.exp() * (a.clamp_min(least) - b.clamp_min(least))).sum(-1) for a, b in pairs]).sum(
        0
    )


def choices(spec: TensorSpec, key: Any = "action") -> tuple[tuple[int, ...], bool]:
    """How many actions each discrete choice of an agent has, and whether a choice is a one-hot vector.

    Example:
        >>> choices(Categorical(5, shape=(3,))), choices(OneHot(4, shape=(3, 4)))
        (((5,), False), ((4,), True))
    """
    if isinstance(spec, (MultiOneHot, Binary)):
        raise ValueError(
            f"{key} is {type(spec).__name__}{tuple(spec.shape)}, several choices as one vector: a discrete actor needs "
            "them as indices, a MultiCategorical spec (tdmarl.VmasEnv(categorical_actions=True))."
        )
    if isinstance(spec, MultiCategorical):
        nvec = spec.nvec.reshape(-1, spec.shape[-1])  # [n, choices]
        if not (nvec == nvec[0]).all():
            raise ValueError(
                f"{key} gives agents of one group different numbers of choices, {nvec.tolist()}: put them into "
                "different groups, or pad them (tdmarl.VmasEnv(pad=True))."
            )
        return tuple(nvec[0].tolist()), False
    if isinstance(spec, OneHot):
        return (spec.space.n,), True
    if isinstance(spec, Categorical):
        return (spec.space.n,), False
    raise ValueError(
        f"{key} is {type(spec).__name__}{tuple(spec.shape)}; a discrete actor needs a Categorical, OneHot or "
        "MultiCategorical spec. Use gaussian_actor for continuous actions."
    )


class RandomAction(nn.Module):
    """Draws a group's actions at random: uniform in the box, or over the available ones, without a host read.

    Args:
        spec (TensorSpec): unbatched, ``[n, ...]``; one that is no box and no choice is asked itself.
        key (NestedKey): the entry's name, for errors.
    """

    def __init__(self, spec: TensorSpec, key: Any = "action") -> None:
        super().__init__()
        self.spec, self.discrete = spec, isinstance(spec, (Categorical, MultiCategorical, OneHot))
        self.boxed = isinstance(spec, Bounded) and spec.dtype.is_floating_point
        self.boxed = self.boxed and bool((spec.space.high - spec.space.low).isfinite().all())
        self.low: Tensor
        self.high: Tensor
        if self.boxed:
            self.register_buffer("low", spec.space.low.clone(), persistent=False)
            self.register_buffer("high", spec.space.high.clone(), persistent=False)
        if self.discrete:
            self.nvec, self.one_hot = choices(spec, key)

    def forward(self, batch: Sequence[int], mask: Tensor | None = None) -> Tensor:
        if self.boxed:
            share = torch.rand((*batch, *self.low.shape), dtype=self.low.dtype, device=self.low.device)
            return self.low + share * (self.high - self.low)
        if not self.discrete:
            return self.spec.rand(batch)
        apart = self.one_hot or isinstance(self.spec, MultiCategorical)  # a dimension is no agents'
        agents = self.spec.shape[:-1] if apart else self.spec.shape
        logits = torch.zeros((*batch, *agents, sum(self.nvec)), device=self.spec.device)
        drawn = MaskedCategorical(logits, mask, nvec=self.nvec, one_hot=self.one_hot).sample()
        return drawn.to(self.spec.dtype).reshape(*batch, *self.spec.shape)
