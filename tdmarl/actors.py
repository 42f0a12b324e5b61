"""Decentralized policies of a group: what each agent does given what it alone sees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.distributions.kl import register_kl
from torch.nn import functional as F
from torchrl.data import Binary, Bounded, Categorical, MultiCategorical, MultiOneHot, OneHot, TensorSpec
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor

from tdmarl.keys import Group, team
from tdmarl.nets import Sharing, Views, alone
from tdmarl.recurrent import Recurrent, agent_net, as_module

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


class _Box(Distribution):
    """An independent normal per action dimension of a box; dimensions with ``low == high`` are padding."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> None:
        self.loc, self.scale, self.low, self.high = loc, scale, low, high
        self.real = high > low
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def _noise(self, sample_shape: Sequence[int]) -> Tensor:
        shape = torch.Size(sample_shape) + self.loc.shape
        return self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)

    def _normal_log_prob(self, x: Tensor) -> Tensor:
        return -0.5 * ((x - self.loc) / self.scale).square() - self.scale.log() - 0.5 * math.log(2 * math.pi)

    def _normal_entropy(self) -> Tensor:
        return self.scale.log() + 0.5 * (1 + math.log(2 * math.pi))

    def _sum(self, x: Tensor) -> Tensor:
        return x.masked_fill(~self.real, 0).sum(-1)

    @property
    def deterministic_sample(self) -> Tensor:
        """What the policy does when it does not explore."""
        return self.mode

    @property
    def mean(self) -> Tensor:
        return self.mode


class ClippedNormal(_Box):
    """A normal whose samples the environment clips to its box, as MAPPO's and HARL's code has it.

    The sample, and with it the log-probability and the entropy, is that of the unclipped normal: it may lie outside
    the box (``tdmarl.VmasEnv`` clips). The mode is clipped.

    Args:
        loc (Tensor): ``[*B, n, a]``.
        scale (Tensor): ``[*B, n, a]``, positive.
        low (Tensor): ``[n, a]``.
        high (Tensor): ``[n, a]``. Where it equals ``low`` the dimension is padding: no part in log-probability or
            entropy, and always ``low``.
    """

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:  # type: ignore[override]
        return torch.where(self.real, self._noise(sample_shape), self.low)

    def log_prob(self, value: Tensor) -> Tensor:
        return self._sum(self._normal_log_prob(value))

    def entropy(self) -> Tensor:
        return self._sum(self._normal_entropy())

    @property
    def mode(self) -> Tensor:
        return torch.minimum(torch.maximum(self.loc, self.low), self.high)


class TanhNormal(_Box):
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

    @staticmethod
    def _log_slope(x: Tensor) -> Tensor:
        """``log(1 - tanh(x)^2)`` without cancellation."""
        return 2 * (math.log(2) - x - F.softplus(-2 * x))

    def log_prob(self, value: Tensor) -> Tensor:
        half = self._half()
        y = ((value - (self.high + self.low) / 2) / half).clamp(-self.limit, self.limit)
        x = torch.atanh(y)
        return self._sum(self._normal_log_prob(x) - self._log_slope(x) - half.log())

    def entropy(self) -> Tensor:
        correction = torch.zeros_like(self.loc)
        for node, weight in zip(_NODES, _WEIGHTS):
            step = node * self.scale
            correction = correction + weight * (
                self._log_slope(self.loc + step) + self._log_slope(self.loc - step)
            )
        return self._sum(self._normal_entropy() + correction + self._half().log())

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
def _kl_of_boxes(p: _Box, q: _Box) -> Tensor:
    """That of the normals: one map squashes both, and the environment clips both."""
    ratio, shift = p.scale / q.scale, (p.loc - q.loc) / q.scale
    return p._sum(0.5 * (ratio.square() + shift.square() - 1) - ratio.log())


@register_kl(MaskedCategorical, MaskedCategorical)
def _kl_of_choices(p: MaskedCategorical, q: MaskedCategorical) -> Tensor:
    least = torch.finfo(p.parts[0].dtype).min  # of what is unavailable to both
    pairs = zip(p.parts, q.parts)
    return torch.stack([(a.exp() * (a.clamp_min(least) - b.clamp_min(least))).sum(-1) for a, b in pairs]).sum(0)


class GaussianHead(nn.Module):
    """Turns a network's output into the mean and standard deviation of a normal, and those into a distribution.

    Args:
        net (nn.Module): ``[*B, n, o] -> [*B, n, 2 * a]``, or ``[*B, n, a]`` for a free standard deviation. A
            recurrent one's states are handed on, in and out.
        kind (type): :class:`TanhNormal` or :class:`ClippedNormal`.
        spec (Bounded): the actions' ``[n, a]``, whose bounds are buffers here, so that they move with the module.
        std ("state" or "free"): a function of the observation, or one parameter per agent and dimension.
        init_std (float): the standard deviation of a network whose output is zero.
        min_std (float): the least standard deviation.
    """

    def __init__(
        self,
        net: nn.Module,
        kind: type[_Box],
        spec: Bounded,
        *,
        std: str = "state",
        init_std: float = 1.0,
        min_std: float = 1e-3,
    ) -> None:
        super().__init__()
        if std not in ("state", "free"):
            raise ValueError(
                f"std={std!r} must be 'state' (a function of the observation) or 'free' (a parameter)."
            )
        if init_std <= min_std:
            raise ValueError(f"init_std={init_std} must be above min_std={min_std}.")
        self.net, self.kind, self.min_std = net, kind, min_std
        self.low: Tensor
        self.high: Tensor
        self.register_buffer("low", spec.space.low.clone(), persistent=False)
        self.register_buffer("high", spec.space.high.clone(), persistent=False)
        self.shift = math.log(math.expm1(init_std - min_std))  # softplus(shift) + min_std == init_std
        free = std == "free"
        self.raw_std = nn.Parameter(torch.zeros_like(self.low)) if free else None  # [n, a]
        self.rows = [{"low": i, "high": i} | ({"raw_std": i} if free else {}) for i in range(len(self.low))]

    def forward(self, observation: Tensor, *memory: Tensor) -> tuple[Tensor, ...]:
        out, *states = self.net(observation, *memory) if memory else (self.net(observation),)
        loc, raw = out.chunk(2, -1) if self.raw_std is None else (out, self.raw_std.expand(out.shape))
        return (loc, F.softplus(raw + self.shift) + self.min_std, *states)

    def distribution(self, loc: Tensor, scale: Tensor) -> Distribution:
        """The policy's distribution, what a ``ProbabilisticActor`` calls."""
        return self.kind(loc, scale, self.low, self.high)


def _for_each_group(env: EnvBase, group: str | Sequence[str] | None, build: Any) -> TensorDictModuleBase:
    modules = [build(member) for member in team(env, group)]
    return modules[0] if len(modules) == 1 else TensorDictSequential(*modules)


def gaussian_actor(
    env: EnvBase,
    group: str | Sequence[str] | None = None,
    share_params: Sharing = True,
    *,
    distribution: str = "tanh",
    std: str = "state",
    init_std: float = 1.0,
    hidden: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.Tanh,
    layer_norm: bool = False,
    agent_id: bool = False,
    output_gain: float = 0.01,
    recurrent: str | int | None = None,
) -> TensorDictModuleBase:
    """Builds the stochastic policy of a group with continuous actions.

    Args:
        env (EnvBase): whose specs give the sizes; it is not stepped.
        group (str or sequence of str, optional): the group; for several, one actor each, in sequence.
        share_params (bool or map): which agents share a network; see :data:`tdmarl.nets.Sharing`.
        distribution ("tanh" or "clipped"): a squashed normal, or a normal that the environment clips.
        std ("state" or "free"): a function of the observation, or one parameter per agent and dimension.
        init_std (float): the standard deviation at the beginning, before squashing.
        hidden, activation, layer_norm, agent_id, output_gain: see :class:`~tdmarl.nets.AgentMLP`.
        recurrent ("gru", int or None): let the policy remember; see :func:`tdmarl.recurrent.agent_net`. It then
            carries the state ``(group, "actor_hidden")``; see :class:`tdmarl.recurrent.Recurrent`.

    Returns:
        TensorDictModuleBase: reads ``(group, "observation")``, writes ``(group, "action")`` ``[*B, n, a]`` and
        ``(group, "action_log_prob")`` ``[*B, n]``; under ``ExplorationType.DETERMINISTIC`` its mode.
    """
    classes: dict[str, type[_Box]] = {"tanh": TanhNormal, "clipped": ClippedNormal}
    if distribution not in classes:
        raise ValueError(f"distribution={distribution!r} must be one of {sorted(classes)}.")

    def build(member: Group) -> TensorDictModuleBase:
        spec = member.action_spec
        if not isinstance(spec, Bounded):
            raise ValueError(
                f"({member.name!r}, 'action') is {type(spec).__name__}{tuple(spec.shape)}; gaussian_actor needs a "
                "Bounded spec [n_agents, action_size]. Use categorical_actor for discrete actions."
            )
        size = spec.shape[-1]
        net = agent_net(
            member.n_agents, member.observation_size, size * (2 if std == "state" else 1), hidden=hidden,
            share=share_params, agent_id=agent_id, activation=activation, layer_norm=layer_norm,
            output_gain=output_gain, device=member.device, recurrent=recurrent,
        )  # fmt: skip
        head = GaussianHead(net, classes[distribution], spec, std=std, init_std=init_std)
        loc, scale = member.key("loc"), member.key("scale")
        return ProbabilisticActor(
            as_module(
                head, [member.key("observation")], [loc, scale], member.key("actor_hidden"), net.state_shape
            ),
            in_keys={"loc": loc, "scale": scale},
            out_keys=[member.key("action")],
            distribution_class=head.distribution,
            return_log_prob=True,
            log_prob_key=member.key("action_log_prob"),
        )

    return _for_each_group(env, group, build)


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


def categorical_actor(
    env: EnvBase,
    group: str | Sequence[str] | None = None,
    share_params: Sharing = True,
    *,
    hidden: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.Tanh,
    layer_norm: bool = False,
    agent_id: bool = False,
    output_gain: float = 0.01,
    recurrent: str | int | None = None,
) -> TensorDictModuleBase:
    """Builds the stochastic policy of a group with discrete actions: one choice, one-hot, or several at once.

    Where the environment has ``(group, "action_mask")`` the policy reads it and never takes what it forbids.

    Args:
        env, group, share_params, hidden, activation, layer_norm, agent_id, output_gain, recurrent: see
            :func:`gaussian_actor`.

    Returns:
        TensorDictModuleBase: writes ``(group, "action")`` and ``(group, "action_log_prob")`` ``[*B, n]``.
    """

    def build(member: Group) -> TensorDictModuleBase:
        nvec, one_hot = choices(member.action_spec, member.key("action"))
        net = agent_net(
            member.n_agents, member.observation_size, sum(nvec), hidden=hidden, share=share_params,
            agent_id=agent_id, activation=activation, layer_norm=layer_norm, output_gain=output_gain,
            device=member.device, recurrent=recurrent,
        )  # fmt: skip
        logits = member.key("logits")
        keys = {"logits": logits} | ({"mask": member.key("action_mask")} if member.has_action_mask else {})
        return ProbabilisticActor(
            as_module(
                net, [member.key("observation")], [logits], member.key("actor_hidden"), net.state_shape
            ),
            in_keys=keys,
            out_keys=[member.key("action")],
            distribution_class=MaskedCategorical,
            distribution_kwargs={"nvec": nvec, "one_hot": one_hot},
            return_log_prob=True,
            log_prob_key=member.key("action_log_prob"),
        )

    return _for_each_group(env, group, build)


class _Unstacked(nn.Module):
    """A network for a group of one as a network without the agents' dimension."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, observation: Tensor, *memory: Tensor) -> Any:
        if memory:  # the state [*B, layers, h], and is_init, which is no agent's
            state, is_init = memory
            *out, states = self.net(observation.unsqueeze(-2), state.unsqueeze(-3), is_init)
            return (*(x.squeeze(-2) for x in out), states.squeeze(-3))
        out = self.net(observation.unsqueeze(-2))
        return tuple(x.squeeze(-2) for x in out) if isinstance(out, tuple) else out.squeeze(-2)


def agent_actor(actor: TensorDictModuleBase, index: int, views: Views) -> TensorDictModuleBase:
    """One agent's part of a group's actor, with flat keys, on the same memory.

    Args:
        actor (TensorDictModuleBase): from :func:`gaussian_actor` or :func:`categorical_actor`, of one group.
        index (int): the agent.
        views (dict): see :func:`tdmarl.nets.alone`.

    Returns:
        TensorDictModuleBase: reads ``"observation"`` ``[*B, o]`` (and ``"action_mask"``), writes ``"action"`` and
        ``"action_log_prob"`` ``[*B]``; a recurrent one carries ``"actor_hidden"`` ``[*B, layers, h]``.
    """
    module, sampler = actor[0], actor[-1]  # type: ignore[index]
    if not hasattr(module.module, "rows"):
        raise ValueError(
            f"{type(module.module).__name__} is no network of tdmarl.nets: give each agent's actor itself, "
            "actor={group: [actor of agent 0, ...]}, with flat keys such as 'observation' and 'action'."
        )
    net = alone(module.module, index, views)
    kind = net.distribution if isinstance(net, GaussianHead) else sampler.distribution_class
    keys = {k: _flat(key) for k, key in zip(sampler.dist_keys, sampler.in_keys)}
    flat_in, flat_out = [_flat(k) for k in module.in_keys], [_flat(k) for k in module.out_keys]
    if isinstance(module, Recurrent):
        hidden = _flat(module.hidden)
        own = Recurrent(_Unstacked(net), flat_in[:-2], flat_out[:-1], hidden, module.state_shape[1:])
    else:
        own = TensorDictModule(_Unstacked(net), flat_in, flat_out)
    return ProbabilisticActor(
        own,
        in_keys=keys,
        out_keys=["action"],
        distribution_class=kind,
        distribution_kwargs=dict(sampler.distribution_kwargs),
        return_log_prob=True,
        log_prob_key="action_log_prob",
    )


def _flat(key: NestedKey) -> str:
    return key if isinstance(key, str) else key[-1]


def stochastic_actor(
    env: EnvBase,
    group: str | Sequence[str] | None = None,
    share_params: Sharing = True,
    *,
    gaussian: Mapping[str, Any] | None = None,
    **options: Any,
) -> TensorDictModuleBase:
    """Builds :func:`gaussian_actor` or :func:`categorical_actor`, group by group, as the action specs ask.

    Args:
        env, group, share_params: see :func:`gaussian_actor`.
        gaussian (mapping, optional): options of :func:`gaussian_actor` alone, such as ``{"std": "free"}``.
        **options: those of both.
    """

    def build(member: Group) -> TensorDictModuleBase:
        if isinstance(member.action_spec, Bounded):
            return gaussian_actor(env, member.name, share_params, **options, **(gaussian or {}))
        return categorical_actor(env, member.name, share_params, **options)

    return _for_each_group(env, group, build)
