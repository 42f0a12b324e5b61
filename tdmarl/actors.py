"""Decentralized policies of a group: what each agent does given what it alone sees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F
from torchrl.data import Bounded
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor

from tdmarl.distributions import BoxedNormal, ClippedNormal, MaskedCategorical, TanhNormal, choices, dimensions_first
from tdmarl.keys import Group, team
from tdmarl.nets import Sharing, Views, alone
from tdmarl.recurrent import Recurrent, agent_net, as_module


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
        kind: type[BoxedNormal],
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
        box = spec.space.low, spec.space.high
        if box[0].device.type != "meta" and all(bool((bound == bound[:1]).all()) for bound in box):
            box = box[0][:1], box[1][:1]  # then loops run along all agents' rows at once
        self.register_buffer("low", box[0].clone(), persistent=False)
        self.register_buffer("high", box[1].clone(), persistent=False)
        self.shift = math.log(math.expm1(init_std - min_std))  # softplus(shift) + min_std == init_std
        free = std == "free"
        shape, device = spec.shape, spec.device
        self.raw_std = nn.Parameter(torch.zeros(shape, device=device)) if free else None  # [n, a]
        last = len(self.low) - 1
        self.rows = [
            {"low": min(i, last), "high": min(i, last)} | ({"raw_std": i} if free else {}) for i in range(shape[0])
        ]

    def forward(self, observation: Tensor, *memory: Tensor) -> tuple[Tensor, ...]:
        out, *states = self.net(observation, *memory) if memory else (self.net(observation),)
        if self.raw_std is None:
            loc, raw = dimensions_first(out)[0].chunk(2)
        else:
            loc, raw = dimensions_first(out, self.raw_std)
            raw = raw.expand(loc.shape)
        scale = F.softplus(raw + self.shift) + self.min_std
        return (loc.movedim(0, -1), scale.movedim(0, -1), *states)

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
    classes: dict[str, type[BoxedNormal]] = {"tanh": TanhNormal, "clipped": ClippedNormal}
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
