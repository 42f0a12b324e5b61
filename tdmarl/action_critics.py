"""Critics of actions: what the actions of all agents are worth to each, from as much of the state as training sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import nn
from torchrl.envs import EnvBase

from tdmarl.critics import JointAction, JointInput, check_scope
from tdmarl.keys import Group, Team, present, team
from tdmarl.nets import AgentMLP, Sharing


class ActionCritic(TensorDictModuleBase):
    """Values the agents of one group by what all agents of a team see and do.

    Beside the actions in the batch it can be told what each agent would do *instead*, all others' actions as they
    are: where ``own_key`` is there, agent i's value is that of its own entry and the others' stored actions. That is
    what the gradient of MADDPG's actors needs, and it takes one pass for all agents.

    Args:
        members (Team): the team.
        member (Group): the group.
        scope (str): see :func:`action_critic`.
        make (callable): from ``f``, the number of entries that an agent's network sees, to networks ``[*B, n, f] ->
            [*B, n, 1]``; ``[*B, 1, f]`` where all agents see the same.

    Attributes:
        own_key (tuple): ``(group, "own_action")``, ``[*B, n, a]``; discrete actions one-hot or relaxed.
    """

    def __init__(
        self, members: Team, member: Group, scope: str, make: Callable[[int], Sequence[nn.Module]]
    ) -> None:
        super().__init__()
        seen = [member] if scope in ("agent", "group") else list(members)
        self.scope, self.own_key = scope, member.key("own_action")
        self.observed = JointInput(members, member, scope, False)
        self.actions = JointAction(seen, member)
        acted = self.actions.width if scope == "agent" else self.actions.features
        self.nets = nn.ModuleList(make(self.observed.features + acted))
        self.in_keys: list[NestedKey] = [*self.observed.in_keys, *self.actions.in_keys]
        self.out_keys = [member.key("state_action_value")]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        entries, n = present(tensordict, self.in_keys), len(self.observed.in_keys)
        x = self.observed(*entries[:n])  # [*B, 1 or n, o]
        joint = self.actions(*entries[n:])  # [*B, all action entries]
        own = tensordict.get(self.own_key, None)
        if self.scope == "agent":
            u = joint.unflatten(-1, (-1, self.actions.width)) if own is None else own
        else:
            u = joint.unsqueeze(-2) if own is None else self.actions.replaced(joint, own)
        seen = torch.cat([x.expand(*u.shape[:-1], -1), u.to(x.dtype)], -1)  # [*B, 1 or n, f]
        return tensordict.set(self.out_keys[0], torch.cat([net(seen) for net in self.nets], -1))


def action_critic(
    env: EnvBase,
    group: str | Sequence[str] | None = None,
    *,
    scope: str = "team",
    twin: bool = False,
    share_params: Sharing = False,
    agent_id: bool = True,
    hidden: Sequence[int] = (64, 64),
    activation: type[nn.Module] = nn.ReLU,
    layer_norm: bool = False,
) -> TensorDictModuleBase:
    """Builds Q, the critic of MADDPG: the value to each agent of what all agents do.

    Args:
        env (EnvBase): whose specs give the sizes; it is not stepped.
        group (str or sequence of str, optional): the team; for several groups one critic each, in sequence, all of
            which see the whole team.
        scope (str): ``team`` (all observations and actions), ``state`` (the environment's global state and all
            actions), ``group`` (those of the agent's group), or ``agent``: its own observation and action alone,
            which makes the learner independent (IDDPG).
        twin (bool): two networks, whose smaller value counts (TD3, MATD3).
        share_params (bool or map): which agents of a group share a network; see :data:`tdmarl.nets.Sharing`.
        agent_id (bool): tell a shared network whom it values. Without it a shared critic of a common input gives
            every agent the same value, which is wrong as soon as rewards differ.
        hidden, activation, layer_norm: see :class:`~tdmarl.nets.AgentMLP`.

    Returns:
        TensorDictModuleBase: writes ``(group, "state_action_value")`` ``[*B, n, 1]`` (``[*B, n, 2]`` with ``twin``)
        for each group.

    Example:
        >>> import tdmarl
        >>> env = tdmarl.VmasEnv("simple_tag", num_envs=2, seed=0)
        >>> critic = tdmarl.action_critic(env, ("adversary", "agent"))
        >>> critic(env.rand_step(env.reset()))["adversary", "state_action_value"].shape
        torch.Size([2, 3, 1])
    """
    members = team(env, group)
    check_scope(members, scope, "action_critic")

    def build(member: Group) -> ActionCritic:
        options: dict[str, Any] = {
            "hidden": hidden, "activation": activation, "layer_norm": layer_norm, "share": share_params,
            "agent_id": agent_id and share_params is not False and member.n_agents > 1, "device": member.device,
        }  # fmt: skip

        def make(features: int) -> list[nn.Module]:
            return [AgentMLP(member.n_agents, features, 1, **options) for _ in range(2 if twin else 1)]

        return ActionCritic(members, member, scope, make)

    modules = [build(member) for member in members]
    return modules[0] if len(modules) == 1 else TensorDictSequential(*modules)
