"""Value-based policies of a group: the network that values actions, the greedy choice, and exploration around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase, TensorDictPrimer
from torchrl.envs.utils import ExplorationType, exploration_type

from tdmarl.distributions import choices, one_hot
from tdmarl.keys import Group, team
from tdmarl.nets import Sharing
from tdmarl.recurrent import Direct, Recurrent, agent_net


class Actions:
    """Numbers an agent's joint choices ``0 .. count - 1``, however the environment writes an action.

    Args:
        spec (TensorSpec): ``Categorical`` or ``OneHot``; ``MultiCategorical``, whose combinations are numbered.
        key (NestedKey): the entry's name, for errors.

    Example:
        >>> from torchrl.data import MultiCategorical
        >>> actions = Actions(MultiCategorical(torch.tensor([3, 2]).expand(4, 2), shape=(4, 2)))
        >>> actions.count, actions.index(torch.tensor([[2, 1]])), actions.action(torch.tensor([5]))
        (6, tensor([5]), tensor([[2, 1]]))
    """

    def __init__(self, spec: TensorSpec, key: NestedKey = "action") -> None:
        self.nvec, self.one_hot = choices(spec, key)
        self.count, self.dtype = math.prod(self.nvec), spec.dtype
        self.strides = [math.prod(self.nvec[i + 1 :]) for i in range(len(self.nvec))]

    def index(self, action: Tensor) -> Tensor:
        """The number of each agent's action, ``[*B, n]``."""
        if self.one_hot:
            return action.to(torch.uint8).argmax(-1)
        if len(self.nvec) == 1:
            return action
        parts = [part * stride for part, stride in zip(action.unbind(-1), self.strides)]
        return torch.stack(parts).sum(0)

    def action(self, index: Tensor) -> Tensor:
        """The environment's way of writing action number ``index`` ``[*B, n]``."""
        if self.one_hot:
            return one_hot(index, self.count).to(self.dtype)
        if len(self.nvec) == 1:
            return index
        parts = [
            torch.div(index, stride, rounding_mode="floor") % k for k, stride in zip(self.nvec, self.strides)
        ]
        return torch.stack(parts, -1)

    def available(self, mask: Tensor | None) -> Tensor | None:
        """Which numbers may be taken, ``[*B, n, count]``, from what each choice allows, ``[*B, n, sum(nvec)]``."""
        if mask is None or len(self.nvec) == 1:
            return mask
        first, *others = mask.split(self.nvec, -1)
        for part in others:
            first = (first.unsqueeze(-1) & part.unsqueeze(-2)).flatten(-2)
        return first

    def encode(self, action: Tensor) -> Tensor:
        """An action as a network's input, ``[*B, n, count]``."""
        return one_hot(self.index(action), self.count).to(torch.get_default_dtype())


def best(values: Tensor, available: Tensor | None) -> Tensor:
    """The available action with the largest value, ``[*B, n]``; action 0 where none is available."""
    if available is not None:
        values = values.masked_fill(~available, torch.finfo(values.dtype).min)
    return values.argmax(-1)


def value_of(values: Tensor, index: Tensor, available: Tensor | None = None) -> Tensor:
    """The value of action number ``index``, ``[*B, n, 1]``; 0 where no action is available at all."""
    value = values.gather(-1, index.unsqueeze(-1))
    return value if available is None else value.masked_fill(~available.any(-1, keepdim=True), 0)


class ActionValues(nn.Module):
    """Joins what a Q network sees: the observation and, if asked, the agent's last action.

    Args:
        net (nn.Module): ``[*B, n, in] -> [*B, n, K]``; one with memory also takes a state and ``is_init``.
        last_action (bool): the entry after the observation is the last action ``[*B, n, K]``, and the last of all is
            ``is_init`` ``[*B, 1]``, which says where there is none.
    """

    def __init__(self, net: nn.Module, last_action: bool) -> None:
        super().__init__()
        self.net, self.last_action, self.remembers = net, last_action, net.state_shape is not None

    def forward(self, observation: Tensor, *others: Tensor) -> Any:
        if self.last_action:
            last, *others = others  # type: ignore[assignment]
            last = last.masked_fill(others[-1].unsqueeze(-1), 0)
            observation = torch.cat([observation, last], -1)
        return self.net(observation, *others) if self.remembers else self.net(observation)


class Greedy(TensorDictModuleBase):
    """Takes the available action with the largest value.

    Args:
        group (str): the group.
        actions (Actions): how the environment writes actions.
        has_mask (bool): whether there is ``(group, "action_mask")``.

    Reads ``(group, action_value)`` ``[*B, n, K]``; writes ``(group, action)`` and ``(group, chosen_action_value)``
    ``[*B, n, 1]``.
    """

    def __init__(self, group: str, actions: Actions, has_mask: bool) -> None:
        super().__init__()
        self.group, self.actions = group, actions
        self.in_keys = [(group, "action_value")] + ([(group, "action_mask")] if has_mask else [])
        self.out_keys = [(group, "action"), (group, "chosen_action_value")]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        values, *mask = (tensordict.get(key) for key in self.in_keys)
        available = self.actions.available(mask[0] if mask else None)
        index = best(values, available)
        tensordict.set(self.out_keys[0], self.actions.action(index))
        return tensordict.set(self.out_keys[1], value_of(values, index, available))


class LastAction(TensorDictModuleBase):
    """Carries the action that was really taken to the next step, where the network reads it.

    It is carried like a recurrent state: collectors and ``evaluate`` start it at zeros. Whoever replaces the
    action after the policy has acted (exploration, random actions) calls this module again; it is found by its
    attribute ``follows_action``.

    Reads ``(group, action)``; writes ``("next", group, "last_action")`` ``[*B, n, K]``, one-hot.
    """

    follows_action = True

    def __init__(self, member: Group, actions: Actions) -> None:
        super().__init__()
        self.group, self.actions, self.n_agents = member.name, actions, member.n_agents
        self.in_keys, self.out_keys = [member.key("action")], [member.next("last_action")]

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """What a collector has to carry."""
        entry = Unbounded((self.n_agents, self.actions.count))
        group = Composite({"last_action": entry}, shape=(self.n_agents,))
        return TensorDictPrimer(Composite({self.group: group}), expand_specs=False)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.set(self.out_keys[0], self.actions.encode(tensordict.get(self.in_keys[0])))


def q_actor(
    env: EnvBase,
    group: str | Sequence[str] | None = None,
    share_params: Sharing = True,
    *,
    hidden: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.ReLU,
    layer_norm: bool = False,
    agent_id: bool = True,
    last_action: bool = False,
    output_gain: float = 1.0,
    recurrent: str | int | None = None,
    start: str = "stored",
    burn_in: int = 0,
) -> TensorDictModuleBase:
    """Builds the greedy policy of a group with discrete actions: a network that values them, and its argmax.

    Args:
        env (EnvBase): whose specs give the sizes; it is not stepped.
        group (str or sequence of str, optional): the group; for several, one actor each, in sequence.
        share_params (bool or map): which agents share a network; see :data:`tdmarl.nets.Sharing`.
        agent_id (bool): let a network that several agents share know whom it serves.
        last_action (bool): let the network see the agent's last action; zeros in an episode's first step.
        hidden, activation, layer_norm, output_gain: see :class:`~tdmarl.nets.AgentMLP`.
        recurrent ("gru", int or None): let the network remember; see :func:`tdmarl.recurrent.agent_net`. It then
            carries the state ``(group, "actor_hidden")``, and learns from rows ``[M, L]``.
        start ("stored" or "zero"), burn_in (int): how it enters rows; see :class:`tdmarl.recurrent.Recurrent`.

    Returns:
        TensorDictModuleBase: reads ``(group, "observation")`` (and ``(group, "action_mask")`` where the environment
        has it), writes ``(group, "action_value")`` ``[*B, n, K]``, ``(group, "action")`` and
        ``(group, "chosen_action_value")`` ``[*B, n, 1]``. Several choices at once (``MultiCategorical``) are valued
        in all their combinations, ``K`` of them. The actor does not explore; :class:`EpsilonGreedy` does.
    """

    def build(member: Group) -> TensorDictModuleBase:
        actions = Actions(member.action_spec, member.key("action"))
        seen = member.observation_size + (actions.count if last_action else 0)
        net = agent_net(
            member.n_agents, seen, actions.count, hidden=hidden, share=share_params,
            agent_id=agent_id and share_params is not False and member.n_agents > 1, activation=activation,
            layer_norm=layer_norm, output_gain=output_gain, device=member.device, recurrent=recurrent,
        )  # fmt: skip
        inputs: list[NestedKey] = [member.key("observation")] + (
            [member.key("last_action")] if last_action else []
        )
        values, network = member.key("action_value"), ActionValues(net, last_action)
        valued: TensorDictModule
        if net.state_shape is not None:
            state = member.key("actor_hidden")
            valued = Recurrent(
                network, inputs, [values], state, net.state_shape, start=start, burn_in=burn_in
            )
        else:
            valued = Direct(network, inputs + (["is_init"] if last_action else []), [values])
        parts = [valued, Greedy(member.name, actions, member.has_action_mask)]
        return TensorDictSequential(*parts, *([LastAction(member, actions)] if last_action else []))

    modules = [build(member) for member in team(env, group)]
    return modules[0] if len(modules) == 1 else TensorDictSequential(*modules)


def fallen(frames: Tensor, start: float, end: float, horizon: int) -> Tensor:
    """What falls linearly from ``start`` to ``end`` over ``horizon`` frames and stays there, ``[]``."""
    left = (1 - frames.double() / horizon).clamp_min(0)
    return (end + (start - end) * left).float()


class EpsilonGreedy(TensorDictModuleBase):
    """Replaces actions by random available ones with a probability that falls linearly with the frames seen.

        ``epsilon(t) = max(end, start - (start - end) t / anneal_frames)``

    Every agent tosses its own coin. ``t`` counts the environment steps on which this module has acted under
    ``ExplorationType.RANDOM``; under any other type it does nothing, and the schedule stands still. The counter is a
    tensor on the device and part of the state; nothing depends on the length of the run.

    Args:
        env (EnvBase): whose specs say what may be drawn.
        group (str or sequence of str, optional): the groups whose actions are replaced.
        start, end (float): the probability at the first frame, and from ``anneal_frames`` on.
        anneal_frames (int): the horizon.

    Example:
        >>> import tdmarl
        >>> env = tdmarl.VmasEnv("balance", num_envs=2, continuous_actions=False, seed=0)
        >>> explore = EpsilonGreedy(env, anneal_frames=50_000)
        >>> explore.frames.fill_(25_000), explore.epsilon()
        (tensor(25000), tensor(0.5250))
    """

    def __init__(
        self,
        env: EnvBase,
        group: str | Sequence[str] | None = None,
        *,
        start: float = 1.0,
        end: float = 0.05,
        anneal_frames: int = 50_000,
    ) -> None:
        super().__init__()
        for name, number in (("start", start), ("end", end)):
            if not 0 <= number <= 1:
                raise ValueError(f"{name}={number} is a probability: it must be between 0 and 1.")
        if anneal_frames < 1:
            raise ValueError(f"anneal_frames={anneal_frames} must be at least 1.")
        self.start, self.end, self.horizon = start, end, anneal_frames
        self.members = list(team(env, group))
        self.actions = [Actions(g.action_spec, g.key("action")) for g in self.members]
        self.frames: Tensor
        device = self.members[0].device
        self.register_buffer("frames", torch.zeros((), dtype=torch.int64, device=device))
        masks = [g.key("action_mask") for g in self.members if g.has_action_mask]
        self.in_keys = [*(g.key("action") for g in self.members), *masks]
        self.out_keys = [g.key("action") for g in self.members]

    def epsilon(self) -> Tensor:
        """The present probability, ``[]``."""
        return fallen(self.frames, self.start, self.end, self.horizon)

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if exploration_type() is not ExplorationType.RANDOM:
            return tensordict
        epsilon = self.epsilon()
        for member, actions in zip(self.members, self.actions):
            index = actions.index(tensordict.get(member.key("action")))  # [*B, n]
            mask = tensordict.get(member.key("action_mask")) if member.has_action_mask else None
            score = torch.rand((*index.shape, actions.count), device=index.device)
            at_random = best(score, actions.available(mask))
            coin = torch.rand(index.shape, device=index.device) < epsilon
            tensordict.set(member.key("action"), actions.action(torch.where(coin, at_random, index)))
        self.frames += tensordict.numel()
        return tensordict


def exploring(actor: TensorDictModuleBase, explore: EpsilonGreedy) -> TensorDictSequential:
    """The actor, then exploration, then what has to know the action really taken.

    Args:
        actor (TensorDictModuleBase): from :func:`q_actor`, or one's own.
        explore (EpsilonGreedy): changes the actions.
    """
    followers = [m for m in actor.modules() if getattr(m, "follows_action", False)]
    return TensorDictSequential(actor, explore, *followers)
