"""Several teams in one environment: an algorithm for each, or a policy that only acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import nn
from torchrl.envs import EnvBase

from tdmarl.algorithms.contract import Algorithm
from tdmarl.distributions import RandomAction
from tdmarl.keys import Team, team


class TeamLearners:
    """Lets each team's learner learn from the same batch.

    Args:
        learners (mapping of str to learner): by the teams' names.

    Returns:
        calling it with a batch ``[*B, T]`` returns their metrics, nested by name. Each gets a shallow copy of the
        batch: what one adds, the others do not see, and no data is copied.
    """

    def __init__(self, learners: Mapping[str, Any]) -> None:
        self.learners = dict(learners)

    def __call__(self, batch: TensorDictBase) -> TensorDict:
        return TensorDict({name: learner(batch.copy()) for name, learner in self.learners.items()})

    def state_dict(self) -> dict[str, Any]:
        """All that learning changes, by team."""
        return {name: learner.state_dict() for name, learner in self.learners.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        if set(state) != set(self.learners):
            raise ValueError(f"The state holds the teams {sorted(state)}; these are {sorted(self.learners)}.")
        for name, learner in self.learners.items():
            learner.load_state_dict(state[name])


def per_group(env: EnvBase | None = None, /, **teams: Algorithm | TensorDictModuleBase) -> Algorithm:
    """Composes independent algorithms, and policies that only act, into one algorithm for all groups.

    On-policy and off-policy algorithms go together: each learner does with the batch what it does alone. An agent of
    another team is part of the environment to it. A critic that shall see several groups' *actions* must have their
    actors in its own learner, a tuple: ``maddpg(env, group=("adversary", "agent"))``.

    Args:
        env (EnvBase, optional): checks that every group is acted for.
        **teams (Algorithm or TensorDictModuleBase): by name: that of the group, or any name for a team of several. A
            module that writes ``(group, "action")``, such as :func:`random_policy`, or the policy of a run
            (:func:`tdmarl.load_policy`), acts and does not learn; while batches are collected it explores as it does
            under ``ExplorationType.RANDOM``. To freeze a policy that goes on training elsewhere, give a copy,
            ``copy.deepcopy(algo.policy)``. Algorithms of equal shapes and seeds begin with equal weights: give each
            a ``seed`` of its own.

    A :class:`tdmarl.Run` of it is given ``algorithm="per_group"`` and, as ``arguments``, for each team
    ``{"algorithm": "mappo", "arguments": {...}}``, so that :func:`tdmarl.load_policy` builds all policies again; a
    team whose policy was no algorithm's may hold anything else, and is then passed as ``actor={name: policy}``.

    Returns:
        Algorithm: a policy that runs all, the same for ``explore``, and a learner whose metrics are nested by name.

    Raises:
        ValueError: if a group is acted for twice, or not at all, or nobody learns.

    Example:
        >>> import tdmarl
        >>> env = tdmarl.VmasEnv("simple_tag", num_envs=2, max_steps=10, seed=0)
        >>> algo = tdmarl.per_group(
        ...     env, adversary=tdmarl.mappo(env, "adversary"), agent=tdmarl.random_policy(env, "agent")
        ... )
        >>> batch = tdmarl.Collector(env, algo.explore, frames_per_batch=20).rollout()
        >>> algo.learner(batch)["adversary", "loss_objective"].shape
        torch.Size([])
    """
    policies = {name: part.policy if isinstance(part, Algorithm) else part for name, part in teams.items()}
    acts: dict[str, str] = {}  # group to team
    for name, policy in policies.items():
        groups = [key[0] for key in policy.out_keys if isinstance(key, tuple) and key[1:] == ("action",)]
        if not groups:
            raise ValueError(
                f"{name}: writes {policy.out_keys}, no (group, 'action') that an environment could use."
            )
        if len(groups) == 1 and groups[0] != name:
            raise ValueError(f"{name}=... acts for the group {groups[0]!r}: call it so, {groups[0]}=...")
        for group in groups:
            if group in acts:
                raise ValueError(f"Both {acts[group]}=... and {name}=... act for the group {group!r}.")
            acts[group] = name
    if env is not None:
        missing = [group for group in env.group_map if group not in acts]
        if missing:
            raise ValueError(
                f"Nobody acts for the groups {missing}: give each an algorithm or a policy, such as "
                f"{missing[0]}=tdmarl.random_policy(env, {missing[0]!r})."
            )
    learners = {name: part.learner for name, part in teams.items() if isinstance(part, Algorithm)}
    if not learners:
        raise ValueError(
            f"None of {sorted(teams)} learns: to run policies alone, put them into a TensorDictSequential."
        )
    exploring = [part.explore if isinstance(part, Algorithm) else part for part in teams.values()]
    return Algorithm(
        policy=TensorDictSequential(*policies.values()),
        explore=TensorDictSequential(*exploring),
        learner=TeamLearners(learners),
    )


class RandomPolicy(TensorDictModuleBase):
    """Acts at random, whatever the exploration type: uniform in the box, or over the available actions.

    Args:
        members (Team): for whom.
    """

    def __init__(self, members: Team) -> None:
        super().__init__()
        self.draws = nn.ModuleDict({g.name: RandomAction(g.action_spec, g.key("action")) for g in members})
        self.masked = {g.name for g in members if g.has_action_mask}
        masks = [(name, "action_mask") for name in members.names if name in self.masked]
        self.in_keys = [*((name, "observation") for name in members.names), *masks]
        self.out_keys = [(name, "action") for name in members.names]

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        for name, draw in self.draws.items():
            mask = tensordict.get((name, "action_mask")) if name in self.masked else None
            tensordict.set((name, "action"), draw(tensordict.batch_size, mask))
        return tensordict


def random_policy(env: EnvBase, group: str | Sequence[str] | None = None) -> RandomPolicy:
    """Builds a policy that acts at random: an opponent to measure against, or a stand-in for a group.

    Args:
        env (EnvBase): whose specs say what may be drawn.
        group (str or sequence of str, optional): for whom; None means the only group.
    """
    return RandomPolicy(team(env, group))
