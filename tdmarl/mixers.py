"""Mixers: the value of a joint action from the agents' own values, such that each agent's best is the team's best."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.envs import EnvBase

from tdmarl.keys import Team, team
from tdmarl.recurrent import Direct


class VDNMixer(nn.Module):
    """The sum of the agents' values, whatever their groups: ``Q_tot = sum_i Q_i``.

    Shape:
        one or more ``[*B, n, 1]`` to ``[*B, 1]``.
    """

    def forward(self, *values: Tensor) -> Tensor:
        return torch.cat(values, -2).sum(-2)


class QMIXMixer(nn.Module):
    """QMIX's monotonic mixing network, whose weights are functions of the state and never negative.

        ``Q_tot = |W2(s)|^T elu(|W1(s)|^T q + b1(s)) + V(s)``

    so that ``dQ_tot / dQ_i >= 0`` and the joint argmax is each agent's own. The absolute value is on the weights
    only. Source: Rashid et al. 2018, "QMIX: Monotonic Value Function Factorisation for Deep Multi-Agent
    Reinforcement Learning", and its code.

    Args:
        n_agents (int): of all groups together, ``N``.
        state_size (int): ``s``.
        n_groups (int): how many entries hold the agents' values.
        embed_dim (int): width of the mixing network, ``E``.
        hypernet_layers (1 or 2): of the networks that make ``W1`` and ``W2``.
        hypernet_embed (int): their hidden width, with two layers.
        masked (sequence of bool): for a state made of observations, which groups' masks follow them; empty if the
            state is one entry.
        device (torch.device, optional): where the parameters live.

    Shape:
        ``n_groups`` values ``[*B, n, 1]``, then the state ``[*B, s]``, or each group's observations ``[*B, n, o]``
        and after them the masks ``[*B, n]``; to ``[*B, 1]``. Dead agents' observations count as zeros.

    Example:
        >>> QMIXMixer(3, 4)(torch.zeros(5, 3, 1), torch.zeros(5, 4)).shape
        torch.Size([5, 1])
    """

    def __init__(
        self,
        n_agents: int,
        state_size: int,
        *,
        n_groups: int = 1,
        embed_dim: int = 32,
        hypernet_layers: int = 2,
        hypernet_embed: int = 64,
        masked: Sequence[bool] = (),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if hypernet_layers not in (1, 2):
            raise ValueError(f"hypernet_layers={hypernet_layers} must be 1 or 2.")
        self.n_agents, self.n_groups, self.embed_dim, self.masked = (
            n_agents,
            n_groups,
            embed_dim,
            tuple(masked),
        )

        def hypernet(out: int) -> nn.Module:
            if hypernet_layers == 1:
                return nn.Linear(state_size, out)
            return nn.Sequential(
                nn.Linear(state_size, hypernet_embed), nn.ReLU(), nn.Linear(hypernet_embed, out)
            )

        self.hyper_w_1 = hypernet(n_agents * embed_dim)
        self.hyper_w_final = hypernet(embed_dim)
        self.hyper_b_1 = nn.Linear(state_size, embed_dim)
        self.V = nn.Sequential(nn.Linear(state_size, embed_dim), nn.ReLU(), nn.Linear(embed_dim, 1))
        self.to(device)

    def forward(self, *inputs: Tensor) -> Tensor:
        q = torch.cat(inputs[: self.n_groups], -2)  # [*B, N, 1]
        s = self.state(inputs[self.n_groups :])  # [*B, s]
        w1 = self.hyper_w_1(s).abs().unflatten(-1, (self.n_agents, self.embed_dim))  # [*B, N, E]
        hidden = F.elu((q * w1).sum(-2) + self.hyper_b_1(s))  # [*B, E]
        w2 = self.hyper_w_final(s).abs()  # [*B, E]
        return (hidden * w2).sum(-1, keepdim=True) + self.V(s)

    def state(self, seen: Sequence[Tensor]) -> Tensor:
        """The state ``[*B, s]``, or the team's observations one after the other."""
        if not self.masked:
            return seen[0]
        masks, parts = iter(seen[len(self.masked) :]), []
        for observation, masked in zip(seen, self.masked):
            if masked:
                observation = observation.masked_fill(~next(masks).unsqueeze(-1), 0)
            parts.append(observation.flatten(-2))
        return torch.cat(parts, -1)


def _values(members: Team) -> list[NestedKey]:
    return [g.key("chosen_action_value") for g in members]


def vdn_mixer(env: EnvBase, group: str | Sequence[str] | None = None) -> TensorDictModule:
    """Builds VDN's mixer, the sum.

    Args:
        env (EnvBase): whose specs name the groups; it is not stepped.
        group (str or sequence of str, optional): the team.

    Returns:
        TensorDictModule: reads ``(group, "chosen_action_value")`` ``[*B, n, 1]`` of each group, writes
        ``"chosen_action_value"`` ``[*B, 1]``.
    """
    return Direct(VDNMixer(), _values(team(env, group)), ["chosen_action_value"])


def qmix_mixer(
    env: EnvBase,
    group: str | Sequence[str] | None = None,
    *,
    embed_dim: int = 32,
    hypernet_layers: int = 2,
    hypernet_embed: int = 64,
    state: str = "auto",
) -> TensorDictModule:
    """Builds QMIX's monotonic mixer.

    Args:
        env (EnvBase): whose specs give the sizes; it is not stepped.
        group (str or sequence of str, optional): the team.
        embed_dim, hypernet_layers, hypernet_embed: see :class:`QMIXMixer`.
        state (str): what the hypernetworks see: ``"state"``, the environment's root entry; ``"observation"``, the
            observations of the whole team; ``"auto"``, the first if it is there.

    Returns:
        TensorDictModule: reads ``(group, "chosen_action_value")`` ``[*B, n, 1]`` of each group and the state, writes
        ``"chosen_action_value"`` ``[*B, 1]``.
    """
    members = team(env, group)
    if state not in ("auto", "state", "observation"):
        raise ValueError(f"state={state!r} must be 'auto', 'state' or 'observation'.")
    if state == "state" and members.state_size is None:
        raise ValueError(
            "state='state' needs a root entry 'state' in the environment's observation spec; this one has "
            f"{sorted(map(str, env.full_observation_spec.keys()))}. Use state='observation' for the joint observation."
        )
    if state != "observation" and members.state_size is not None:
        size, masked = members.state_size, []
        seen: list[NestedKey] = ["state"]
    else:
        size = sum(g.n_agents * g.observation_size for g in members)
        masked = [g.has_mask for g in members]
        seen = [g.key("observation") for g in members]
        seen += [g.key("mask") for g in members if g.has_mask]
    mixer = QMIXMixer(
        members.n_agents, size, n_groups=len(members), embed_dim=embed_dim, hypernet_layers=hypernet_layers,
        hypernet_embed=hypernet_embed, masked=masked, device=members.groups[0].device,
    )  # fmt: skip
    return Direct(mixer, [*_values(members), *seen], ["chosen_action_value"])
