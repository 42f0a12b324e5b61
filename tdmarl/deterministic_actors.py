"""Deterministic policies of a group, as the deterministic policy gradient trains them, and noise to explore with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, TensorDictPrimer
from torchrl.envs.utils import ExplorationType, exploration_type

from tdmarl.distributions import MaskedCategorical, choices, one_hot
from tdmarl.keys import Group, team
from tdmarl.nets import AgentMLP, Sharing
from tdmarl.q_actors import fallen
from tdmarl.recurrent import Direct, after


class Box(nn.Module):
    """The box of a group's continuous actions; dimensions with ``low == high`` are padding.

    Args:
        spec (Bounded): ``[n, a]``.
    """

    def __init__(self, spec: Bounded) -> None:
        super().__init__()
        if not (spec.space.low.isfinite() & spec.space.high.isfinite()).all():
            raise ValueError(
                f"Actions of a box without bounds ({spec.space.low.min():g} to {spec.space.high.max():g}) cannot be "
                "squashed into it: bound the action spec, or give an actor of your own."
            )
        self.low: Tensor
        self.high: Tensor
        self.register_buffer("low", spec.space.low.clone(), persistent=False)
        self.register_buffer("high", spec.space.high.clone(), persistent=False)

    @property
    def half_range(self) -> Tensor:
        """Half of each dimension's range, ``[n, a]``; 0 for padding."""
        return (self.high - self.low) / 2

    def squash(self, x: Tensor) -> Tensor:
        """``mid + half * tanh(x)``."""
        return (self.high + self.low) / 2 + self.half_range * x.tanh()

    def clip(self, action: Tensor) -> Tensor:
        """The nearest action in the box."""
        return torch.minimum(torch.maximum(action, self.low), self.high)


class DeterministicHead(nn.Module):
    """Turns a network's output into an action: ``u = mid + half * tanh(x)``.

    Args:
        net (nn.Module): ``[*B, n, o] -> [*B, n, a]``.
        box (Box): the actions'.
    """

    def __init__(self, net: nn.Module, box: Box) -> None:
        super().__init__()
        self.net, self.box = net, box

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        x = self.net(observation)
        return x, self.box.squash(x)


class Choose(TensorDictModuleBase):
    """Takes the most likely available action, or one drawn from the logits when it explores.

    Drawing is adding Gumbel noise to the logits and taking the largest: how the official MADDPG explores.

    Args:
        member (Group): with discrete actions, one choice, one-hot, or several at once.

    Reads ``(group, "logits")`` and ``(group, "action_mask")`` where there is one; writes ``(group, "action")``.
    """

    def __init__(self, member: Group) -> None:
        super().__init__()
        self.group = member.name
        self.nvec, self.one_hot = choices(member.action_spec, member.key("action"))
        masks = [member.key("action_mask")] if member.has_action_mask else []
        self.in_keys, self.out_keys = [member.key("logits"), *masks], [member.key("action")]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        logits, *mask = (tensordict.get(key) for key in self.in_keys)
        dist = MaskedCategorical(logits, mask[0] if mask else None, nvec=self.nvec, one_hot=self.one_hot)
        explores = exploration_type() is ExplorationType.RANDOM
        return tensordict.set(self.out_keys[0], dist.sample() if explores else dist.mode)


def relaxed(
    logits: Tensor,
    mask: Tensor | None = None,
    *,
    nvec: Sequence[int] = (),
    temperature: float = 1.0,
    hard: bool = True,
) -> Tensor:
    """Draws discrete actions as vectors that a gradient goes through: Gumbel-softmax.

        ``y = softmax((logits + g) / temperature)``,  ``g = -log(E)``, ``E ~ Exp(1)``

    Source: Jang et al. 2017, "Categorical Reparameterization with Gumbel-Softmax".

    Args:
        logits (Tensor): ``[*B, n, sum(nvec)]``.
        mask (Tensor, optional): boolean, of the same shape; an unavailable action gets exactly 0. Where a choice has
            no available action all count as available.
        nvec (sequence of int): how many actions each choice has.
        temperature (float): lower is closer to one-hot.
        hard (bool): straight-through: the value is the one-hot vector of the largest entry, the gradient that of ``y``.

    Returns:
        Tensor: ``[*B, n, sum(nvec)]``; each choice's part adds up to 1.
    """
    out = []
    sizes = tuple(nvec) or (logits.shape[-1],)
    masks: Sequence[Tensor | None] = [None] * len(sizes) if mask is None else mask.split(sizes, -1)
    for part, available in zip(logits.split(sizes, -1), masks):
        noisy = part - torch.empty_like(part).exponential_().log()
        if available is not None:
            available = available | ~available.any(-1, keepdim=True)
            noisy = noisy.masked_fill(~available, float("-inf"))
        soft = (noisy / temperature).softmax(-1)
        if hard:
            taken = one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
            soft = taken + (soft - soft.detach())
        out.append(soft)
    return out[0] if len(out) == 1 else torch.cat(out, -1)


def deterministic_actor(
    env: EnvBase,
    group: str | Sequence[str] | None = None,
    share_params: Sharing = False,
    *,
    hidden: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.ReLU,
    layer_norm: bool = False,
    agent_id: bool = True,
    output_gain: float = 0.01,
) -> TensorDictModuleBase:
    """Builds the policy that the deterministic policy gradient trains, group by group, as the action specs ask.

    With continuous actions it is ``u = mid + half * tanh(net(o))``; :class:`ActionNoise` explores. With discrete
    ones it takes the largest of the network's logits, and explores by drawing from them.

    Args:
        env (EnvBase): whose specs give the sizes; it is not stepped.
        group (str or sequence of str, optional): the group; for several, one actor each, in sequence.
        share_params (bool or map): which agents share a network; see :data:`tdmarl.nets.Sharing`.
        agent_id (bool): let a network that several agents share know whom it serves.
        hidden, activation, layer_norm, output_gain: see :class:`~tdmarl.nets.AgentMLP`.

    Returns:
        TensorDictModuleBase: reads ``(group, "observation")`` (and ``(group, "action_mask")`` where the environment
        has it), writes ``(group, "action")``, and before it what the action is made of: ``(group, "loc")``
        ``[*B, n, a]``, or ``(group, "logits")`` ``[*B, n, sum(nvec)]``.
    """

    def build(member: Group) -> list[TensorDictModuleBase]:
        spec = member.action_spec
        box = isinstance(spec, Bounded)
        if isinstance(spec, Unbounded):
            raise ValueError(
                f"{member.key('action')} is {type(spec).__name__}{tuple(spec.shape)}: a deterministic actor squashes "
                "its actions into a box and needs a Bounded spec [n_agents, action_size], or a discrete one."
            )
        size = spec.shape[-1] if isinstance(spec, Bounded) else sum(choices(spec, member.key("action"))[0])
        net = AgentMLP(
            member.n_agents, member.observation_size, size, hidden=hidden, share=share_params,
            agent_id=agent_id and share_params is not False and member.n_agents > 1, activation=activation,
            layer_norm=layer_norm, output_gain=output_gain, device=member.device,
        )  # fmt: skip
        if box:
            head = DeterministicHead(net, Box(spec))
            return [Direct(head, [member.key("observation")], [member.key("loc"), member.key("action")])]
        return [Direct(net, [member.key("observation")], [member.key("logits")]), Choose(member)]

    modules = [module for member in team(env, group) for module in build(member)]
    return modules[0] if len(modules) == 1 else TensorDictSequential(*modules)


class ActionNoise(TensorDictModuleBase):
    """Adds Gaussian noise to continuous actions, of a size that falls linearly with the frames seen.

        ``u <- clip(u + sigma half N(0, 1))``,  ``sigma(t) = max(end, start - (start - end) t / anneal_frames)``

    with ``half`` half of the range of each action dimension. ``t`` counts the environment steps on which this module
    has acted under ``ExplorationType.RANDOM``; under any other type it does nothing, and the schedule stands still.
    Groups with discrete actions are left alone. The counter is a tensor on the device and part of the state.

    Args:
        env (EnvBase): whose specs give the boxes.
        group (str or sequence of str, optional): the groups whose actions are changed.
        start, end (float): ``sigma`` at the first frame, and from ``anneal_frames`` on.
        anneal_frames (int): the horizon.

    Example:
        >>> import tdmarl
        >>> env = tdmarl.VmasEnv("balance", num_envs=2, seed=0)
        >>> noise = ActionNoise(env, start=1.0, end=0.0, anneal_frames=100)
        >>> noise.frames.fill_(75), noise.sigma()
        (tensor(75), tensor(0.2500))
    """

    def __init__(
        self,
        env: EnvBase,
        group: str | Sequence[str] | None = None,
        *,
        start: float = 0.1,
        end: float = 0.1,
        anneal_frames: int = 1,
    ) -> None:
        super().__init__()
        if start < 0 or end < 0 or anneal_frames < 1:
            raise ValueError(
                f"start={start} and end={end} must not be negative, and anneal_frames={anneal_frames} at least 1."
            )
        self.start, self.end, self.horizon = start, end, anneal_frames
        groups = team(env, group).groups
        self.members = [g for g in groups if isinstance(g.action_spec, Bounded)]
        self.boxes = nn.ModuleList(Box(g.action_spec) for g in self.members)
        self.frames: Tensor
        self.register_buffer("frames", torch.zeros((), dtype=torch.int64, device=groups[0].device))
        self.in_keys: list[NestedKey] = [g.key("action") for g in self.members]
        self.out_keys: list[NestedKey] = list(self.in_keys)

    def sigma(self) -> Tensor:
        """The present size, ``[]``."""
        return fallen(self.frames, self.start, self.end, self.horizon)

    def noise(self, member: Group, tensordict: TensorDictBase, drawn: Tensor) -> Tensor:
        """What is added to the actions ``[*B, n, a]``, in units of ``half``, from ``sigma N(0, 1)``."""
        return drawn

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if exploration_type() is not ExplorationType.RANDOM:
            return tensordict
        sigma = self.sigma()
        for member, box in zip(self.members, self.boxes):
            action = tensordict.get(member.key("action"))
            noise = self.noise(member, tensordict, sigma * torch.randn_like(action))
            tensordict.set(member.key("action"), box.clip(action + box.half_range * noise))  # type: ignore[operator]
        self.frames += tensordict.numel()
        return tensordict


class OrnsteinUhlenbeckNoise(ActionNoise):
    """Adds noise that wanders, so that an agent keeps pushing one way for a while.

        ``x <- (1 - theta) x + sigma N(0, 1)``, ``u <- clip(u + half x)``, with ``x = 0`` where an episode begins

    The state ``x`` is carried from step to step as a recurrent policy's is, under ``(group, "noise")``.

    Source: Lillicrap et al. 2016, "Continuous control with deep reinforcement learning" (theta .15, sigma .2).

    Args:
        env (EnvBase): whose specs give the boxes.
        group (str or sequence of str, optional): the groups whose actions are changed.
        theta (float): how fast the process forgets.
        **schedule: ``start``, ``end`` and ``anneal_frames`` of :class:`ActionNoise`.
    """

    def __init__(
        self, env: EnvBase, group: str | Sequence[str] | None = None, *, theta: float = 0.15, **schedule: Any
    ) -> None:
        super().__init__(env, group, **schedule)
        if not 0 <= theta <= 1:
            raise ValueError(f"theta={theta} must be between 0 and 1.")
        self.theta = theta
        states = [g.key("noise") for g in self.members]
        self.in_keys += [*states, "is_init"]
        self.out_keys += [after(key) for key in states]

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """What a collector has to carry."""
        entries = {
            g.name: Composite({"noise": Unbounded(g.action_spec.shape)}, shape=(g.n_agents,))
            for g in self.members
        }
        return TensorDictPrimer(Composite(entries), expand_specs=False)

    def noise(self, member: Group, tensordict: TensorDictBase, drawn: Tensor) -> Tensor:
        begins = tensordict.get("is_init").unsqueeze(-1)  # [*B, 1, 1]
        x = (1 - self.theta) * tensordict.get(member.key("noise")).masked_fill(begins, 0) + drawn
        tensordict.set(after(member.key("noise")), x)
        return x

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        for member in self.members:  # carried on where nothing is added
            tensordict.set(after(member.key("noise")), tensordict.get(member.key("noise")))
        return super().forward(tensordict)
