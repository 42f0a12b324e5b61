"""Critics: what a state is worth to each agent, from as much of the state as training may see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.data import Bounded
from torchrl.envs import EnvBase

from tdmarl import reduce
from tdmarl.distributions import choices, one_hot
from tdmarl.keys import Group, Team, entry, team
from tdmarl.nets import Sharing
from tdmarl.recurrent import agent_net, as_module

SCOPES = ("agent", "group", "team", "state")


class JointAction(nn.Module):
    """The actions of several groups as one vector, in which it is known what is whose.

    Continuous actions stand as they are, discrete ones as one-hot vectors side by side; so do floating-point entries
    of that width, such as the relaxed actions that gradients go through.

    Args:
        groups (sequence of Group): in order; agents by index within.
        group (Group): one of them, whose agents have a row each in :attr:`mine`.

    Example:
        >>> from torchrl.data import Categorical
        >>> pair = Group("agents", 2, 1, Categorical(3, shape=(2,)))
        >>> joint = JointAction([pair], pair)
        >>> joint(torch.tensor([0, 2]))
        tensor([1., 0., 0., 0., 0., 1.])
        >>> joint.replaced(joint(torch.tensor([0, 2])), torch.tensor([[0.0, 0.5, 0.5], [0.0, 1.0, 0.0]]))
        tensor([[0.0000, 0.5000, 0.5000, 0.0000, 0.0000, 1.0000],
                [1.0000, 0.0000, 0.0000, 0.0000, 1.0000, 0.0000]])
    """

    def __init__(self, groups: Sequence[Group], group: Group) -> None:
        super().__init__()
        self.in_keys: list[NestedKey] = [g.key("action") for g in groups]
        self.encoders: list[tuple[int, ...] | None] = []  # sizes of discrete choices to be made one-hot
        widths: list[int] = []
        first: dict[str, int] = {}
        for g in groups:
            first[g.name] = sum(widths)
            if isinstance(g.action_spec, Bounded):
                self.encoders.append(None)
                width = g.action_spec.shape[-1]
            else:
                nvec, one_hot = choices(g.action_spec, g.key("action"))
                self.encoders.append(None if one_hot else nvec)
                width = sum(nvec)
            widths += [width] * g.n_agents
        self.features, self.width, self.n_agents = sum(widths), width_of(group), group.n_agents
        self.before = first[group.name]
        column = torch.arange(self.features) - self.before
        agent = torch.arange(group.n_agents).unsqueeze(-1)
        self.mine: Tensor
        self.register_buffer(
            "mine", (column // self.width == agent).to(group.device), persistent=False
        )  # [n, all action entries]

    def forward(self, *actions: Tensor) -> Tensor:
        parts = [encoded(a, nvec).flatten(-2) for a, nvec in zip(actions, self.encoders)]
        return torch.cat(parts, -1)  # [*B, f]

    def others(self, joint: Tensor) -> Tensor:
        """What each agent of the group does not decide, ``[*B, n, f]``: its own entries are zero."""
        return joint.unsqueeze(-2).masked_fill(self.mine, 0)

    def replaced(self, joint: Tensor, own: Tensor) -> Tensor:
        """The joint action if each agent alone did as ``own`` ``[*B, n, width]`` says, ``[*B, n, f]``."""
        after = self.features - self.before - self.n_agents * self.width
        spread = F.pad(own.repeat(*[1] * (own.ndim - 1), self.n_agents), (self.before, after))
        return torch.where(self.mine, spread, joint.unsqueeze(-2))


def encoded(action: Tensor, nvec: Sequence[int] | None) -> Tensor:
    """Actions as a network reads them, ``[*B, n, a]``.

    Args:
        action (Tensor): continuous, one-hot, relaxed (floating-point) or indices: ``[*B, n]``, or
            ``[*B, n, len(nvec)]`` for several choices.
        nvec (sequence of int, optional): how many actions each choice has; None if they are vectors already.
    """
    if action.is_floating_point():
        return action
    if nvec is None:
        return action.float()
    parts = action.unbind(-1) if len(nvec) > 1 else (action,)
    return torch.cat([one_hot(p, k) for p, k in zip(parts, nvec)], -1).float()


def width_of(group: Group) -> int:
    """How many entries an agent's action has in a network's input."""
    spec = group.action_spec
    return spec.shape[-1] if isinstance(spec, Bounded) else sum(choices(spec, group.key("action"))[0])


class JointInput(nn.Module):
    """Gathers what a critic of one group sees: the scope's observations, and the other agents' actions if asked.

    Args:
        team (Team): the team, whose order of agents the input follows.
        group (Group): the group that the critic values.
        scope (str): ``agent`` (its own observation), ``group``, ``team`` (all observations) or ``state``.
        other_actions (bool): append the actions of all agents of the team but the agent's own, which is zeroed.

    Shape:
        the entries of :attr:`in_keys` to ``[*B, n, f]``, or ``[*B, 1, f]`` where all agents see the same.
    """

    def __init__(self, team: Team, group: Group, scope: str, other_actions: bool) -> None:
        super().__init__()
        self.scope, self.n_agents = scope, group.n_agents
        seen = {"agent": [group], "group": [group], "team": list(team), "state": []}[scope]
        self.in_keys: list[NestedKey] = [g.key("observation") for g in seen] if seen else ["state"]
        self.n_observed = len(self.in_keys)
        if scope == "agent":
            self.features = group.observation_size
        elif scope == "state":
            assert team.state_size is not None  # check_scope
            self.features = team.state_size
        else:
            self.features = sum(g.n_agents * g.observation_size for g in seen)
        self.actions = JointAction(list(team), group) if other_actions else None
        if self.actions is not None:
            self.in_keys += self.actions.in_keys
            self.features += self.actions.features

    def forward(self, *inputs: Tensor) -> Tensor:
        observed, actions = inputs[: self.n_observed], inputs[self.n_observed :]
        if self.scope == "agent":
            x = observed[0]  # [*B, n, o]
        elif self.scope == "state":
            x = observed[0].unsqueeze(-2)  # [*B, 1, s]
        else:
            x = torch.cat([o.flatten(-2) for o in observed], -1).unsqueeze(-2)  # [*B, 1, sum of n * o]
        if self.actions is None:
            return x
        rest = self.actions.others(self.actions(*actions)).to(x.dtype)  # [*B, n, all action entries]
        return torch.cat([x.expand(*rest.shape[:-1], -1), rest], -1)


def check_scope(members: Team, scope: str, who: str) -> None:
    """Raises ValueError for a scope that there is not."""
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} of {who} must be one of {SCOPES}.")
    if scope == "state" and members.state_size is None:
        raise ValueError(
            "scope='state' needs a root entry 'state' in the environment's observation spec; this one has none. "
            "Use scope='team' for the joint observation."
        )


class _Valued(nn.Module):
    """Joint input and network as one module, for a TensorDict module to name its entries.

    Args:
        joint (JointInput): its inputs come first, then those of a network with memory: the state and ``is_init``.
        net (nn.Module): ``[*B, n, f] -> [*B, n, 1]``.
        of_team (bool): the network is that of a group of one; the value loses the agents' dimension.
    """

    def __init__(self, joint: JointInput, net: nn.Module, of_team: bool = False) -> None:
        super().__init__()
        self.joint, self.net, self.of_team = joint, net, of_team

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        seen, memory = inputs[: len(self.joint.in_keys)], inputs[len(self.joint.in_keys) :]
        value, *states = self.net(self.joint(*seen), *memory) if memory else (self.net(self.joint(*seen)),)
        value = value.squeeze(-2) if self.of_team else value
        return (value, *states) if memory else value


def state_critic(
    env: EnvBase,
    group: str | Sequence[str] | None = None,
    *,
    scope: str = "team",
    other_actions: bool = False,
    joint: bool = False,
    share_params: Sharing = True,
    agent_id: bool = True,
    hidden: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.Tanh,
    layer_norm: bool = False,
    recurrent: str | int | None = None,
) -> TensorDictModuleBase:
    """Builds V, the critic of the PPO family.

    IPPO's sees an agent's own observation (``scope="agent"``), MAPPO's the whole team's (``"team"``) or the
    environment's global ``state``. With ``other_actions`` it is ``V(o, s, u')`` with ``u'`` the actions of all
    agents but the one valued: a baseline that may know what the others do, since the advantage of the agent's own
    action stays unbiased as long as the agent's own action is left out.

    Args:
        env (EnvBase): whose specs give the sizes; it is not stepped.
        group (str or sequence of str, optional): the team; for several groups one network each, in sequence.
        scope (str): ``agent``, ``group``, ``team`` or ``state``.
        other_actions (bool): see above. The gradient with respect to the agent's own action is exactly zero.
        joint (bool): one value of the whole team, at the root, in place of one for each agent.
        share_params (bool or map): which agents of a group share a network; see :data:`tdmarl.nets.Sharing`.
        agent_id (bool): tell a shared network whom it values. Without it a shared critic of a common input gives
            every agent the same value, which is wrong as soon as rewards differ.
        hidden, activation, layer_norm: see :class:`~tdmarl.nets.AgentMLP`.
        recurrent ("gru", int or None): let the critic remember; see :func:`tdmarl.recurrent.agent_net`. It then
            carries the state ``(group, "critic_hidden")``, ``"critic_hidden"`` if ``joint``, and the collector has
            to run :class:`tdmarl.recurrent.CarryHidden` behind the policy.

    Returns:
        TensorDictModuleBase: writes ``(group, "state_value")`` ``[*B, n, 1]`` for each group; ``"state_value"``
        ``[*B, 1]`` if ``joint``.
    """
    members = team(env, group)
    check_scope(members, scope, "state_critic")
    if joint:
        if scope not in ("team", "state") or other_actions:
            raise ValueError(
                f"joint=True needs scope 'team' or 'state' and other_actions=False; got scope={scope!r}."
            )
        seen = JointInput(members, members.groups[0], scope, False)
        one = agent_net(
            1, seen.features, 1, hidden=hidden, activation=activation, layer_norm=layer_norm, output_gain=1.0,
            device=members.groups[0].device, recurrent=recurrent,
        )  # fmt: skip
        valued = _Valued(seen, one, of_team=True)
        return as_module(valued, seen.in_keys, ["state_value"], "critic_hidden", one.state_shape)
    modules: list[TensorDictModuleBase] = []
    for member in members:
        seen = JointInput(members, member, scope, other_actions)
        net = agent_net(
            member.n_agents, seen.features, 1, hidden=hidden, share=share_params,
            agent_id=agent_id and share_params is not False and member.n_agents > 1, activation=activation,
            layer_norm=layer_norm, output_gain=1.0, device=member.device, recurrent=recurrent,
        )  # fmt: skip
        value, state = member.key("state_value"), member.key("critic_hidden")
        modules.append(as_module(_Valued(seen, net), seen.in_keys, [value], state, net.state_shape))
    return modules[0] if len(modules) == 1 else TensorDictSequential(*modules)


class ValueNorm(nn.Module):
    """Running moments of the returns, so that a critic may regress standardized targets.

    MAPPO's value normalization (often called PopArt, which it is not: no layer is rescaled): exponential averages
    of the batch mean and mean square, divided by the average's own weight,

        ``m <- beta m + (1 - beta) mean(R)``, ``s <- beta s + (1 - beta) mean(R^2)``, ``w <- beta w + (1 - beta)``,
        ``mu = m / w``, ``var = max(s / w - mu^2, 1e-2)``.

    Source: Yu et al. 2022, "The Surprising Effectiveness of PPO in Cooperative Multi-Agent Games", and its code.

    Args:
        shape (sequence of int): ``(1,)``; ``(n, 1)`` for moments of each agent; ``(seeds, 1, ...)`` with a seed axis.
        beta (float): weight of the past.
        device (torch.device, optional): where the moments live.

    Example:
        >>> norm = ValueNorm()
        >>> norm.update(torch.tensor([[1.0], [3.0], [8.0]]))
        >>> norm.normalize(torch.tensor([3.0]))
        tensor([-0.3397])
    """

    def __init__(
        self, shape: Sequence[int] = (1,), *, beta: float = 0.99999, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.beta = beta
        self.mean: Tensor
        self.mean_square: Tensor
        self.weight: Tensor
        for name in ("mean", "mean_square", "weight"):  # double: 1 - beta is lost in single precision
            self.register_buffer(name, torch.zeros(tuple(shape), dtype=torch.float64, device=device))

    @torch.no_grad()
    def update(self, returns: Tensor, mask: Tensor | None = None) -> None:
        """Takes in a batch of returns ``[*B, n, 1]``, of all ranks, where ``mask`` is True."""
        per_agent = self.mean.ndim > 1 and self.mean.shape[-2] > 1
        centre = reduce.mean(returns.double(), mask, per_agent=per_agent).reshape(self.mean.shape)
        square = reduce.mean(returns.double().square(), mask, per_agent=per_agent).reshape(self.mean.shape)
        ones = torch.ones_like(returns, dtype=torch.float64)
        # 0 where nobody is alive
        present = reduce.mean(ones, mask, per_agent=per_agent).reshape(self.mean.shape)
        for moment, new in ((self.mean, centre), (self.mean_square, square), (self.weight, present)):
            moment.mul_(1 - (1 - self.beta) * present).add_(new, alpha=1 - self.beta)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Debiased mean and standard deviation; 0 and 0.1 before the first update."""
        weight = self.weight.clamp_min(1e-5)
        centre = self.mean / weight
        std = (self.mean_square / weight - centre.square()).clamp_min(1e-2).sqrt()
        return centre.float(), std.float()

    def normalize(self, returns: Tensor) -> Tensor:
        """Reward units to the network's."""
        centre, std = self.moments()
        return (returns - centre) / std

    def denormalize(self, values: Tensor) -> Tensor:
        """The network's units to reward units."""
        centre, std = self.moments()
        return values * std + centre


class NormalizedCritic(TensorDictModuleBase):
    """Lets any critic regress standardized returns while everybody else reads reward units.

    What the wrapped critic writes as ``(group, "state_value")`` becomes ``(group, "state_value_normalized")``, and
    ``(group, "state_value")`` is that in reward units by the current moments: advantages, logs and TorchRL's
    estimators never see the network's unit.

    Args:
        critic (TensorDictModuleBase): writes ``(group, "state_value")`` for each of ``norms``' groups.
        norms (mapping of str or None to ValueNorm): the moments of each group's returns; None is the team's value,
            which stands at the root.
    """

    def __init__(
        self, critic: TensorDictModuleBase, norms: Mapping[str, ValueNorm] | Mapping[None, ValueNorm]
    ) -> None:
        super().__init__()
        self.critic, self.groups, self.norms = critic, list(norms), nn.ModuleList(norms.values())
        self.in_keys = list(critic.in_keys)
        written = [entry(group, "state_value_normalized") for group in self.groups]
        self.out_keys = list(critic.out_keys) + [key for key in written if key not in critic.out_keys]

    @property
    def moments(self) -> dict[Any, ValueNorm]:
        """The moments by group."""
        return dict(zip(self.groups, self.norms))  # type: ignore[arg-type]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        tensordict = self.critic(tensordict)
        for group, norm in zip(self.groups, self.norms):
            value = tensordict.get(entry(group, "state_value"))
            tensordict.set(entry(group, "state_value_normalized"), value)
            tensordict.set(entry(group, "state_value"), norm.denormalize(value))  # type: ignore[operator]
        return tensordict
