"""Multi-Agent MuJoCo: one robot, its joints shared out among agents, in many copies over worker processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from tdmarl.envs.pettingzoo import PettingZooEnv

PARTITIONS: dict[str, tuple[str, ...]] = {  # the package knows them only one by one
    "Ant": ("2x4", "2x4d", "4x2"),
    "CoupledHalfCheetah": ("1p1",),
    "HalfCheetah": ("2x3", "6x1"),
    "Hopper": ("3x1",),
    "Humanoid": ("9|8",),
    "HumanoidStandup": ("9|8",),
    "InvertedDoublePendulum": (),
    "InvertedPendulum": (),
    "ManySegmentAnt": (),
    "ManySegmentSwimmer": (),
    "Pusher": ("3p",),
    "Reacher": ("2x1",),
    "Swimmer": ("2x1",),
    "Walker2d": ("2x3",),
}
JOINTS = {
    "Ant": 8, "HalfCheetah": 6, "Hopper": 3, "Humanoid": 17, "HumanoidStandup": 17, "Pusher": 7, "Reacher": 2,
    "Swimmer": 2, "Walker2d": 6,
}  # fmt: skip
_FILE = Path(__file__).with_name("robot.py")


def mamujoco(
    scenario: str,
    partition: str | None,
    num_envs: int | None = None,
    num_workers: int = 8,
    max_steps: int | None = None,
    seed: int = 0,
    *,
    agent_obsk: int | None = 1,
    pad: bool = False,
    infos: bool = True,
    agent_factorization: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> PettingZooEnv:
    """Trains agents that each move some joints of one robot (Peng et al. 2021), with real MuJoCo.

    The package is ``gymnasium-robotics`` (extra ``mujoco``). All agents get the robot's reward; its fall is
    ``terminated``, the limit of 1000 steps is ``truncated``. What a single agent would see is the root ``state``.
    Agents that see or do unlike much form several groups, ``agent_0``, ``agents_1``, ..., one team; give
    ``group=tuple(env.group_map)`` to an algorithm.

    Args:
        scenario (str): the robot, such as ``Ant``, ``HalfCheetah`` or ``Humanoid``.
        partition (str, optional): how its joints are shared out: a name that the package has, such as ``4x2``, or
            ``<agents>x<joints>`` with as many joints as the robot has, such as ``17x1`` for Humanoid, in the order of
            its actuators. None is one agent that sees and does all.
        num_envs (int, optional): number of copies, ``E``; None is one per worker.
        num_workers (int): processes that run them; 0 runs them in this one.
        max_steps (int, optional): another time limit.
        seed (int): of the episodes.
        agent_obsk (int, optional): how many joints away an agent sees; None is one agent that sees and does all.
        pad (bool): agents form one group, what they see and do filled up with zeros to one size, so that they can
            share a network.
        infos (bool): keep the numbers of the step's infos under ``("agents", "info", name)``.
        agent_factorization (dict, optional): a partition of your own as the package takes it: ``partition``, ``edges``
            and ``globals``. ``partition`` is then but its name.
        device (torch.device, optional): where the tensors are.
        **options: for the package's environment, such as ``local_categories``, or the robot, such as
            ``ctrl_cost_weight``.

    Raises:
        ValueError: an unknown robot or partition; the message lists the known.

    Example:
        >>> env = mamujoco("HalfCheetah", "2x3", num_envs=2, num_workers=0)
        >>> env.rollout(3)["agents", "observation"].shape
        torch.Size([2, 3, 2, 12])
    """
    agents = check(scenario, partition) if agent_factorization is None else None
    if partition is None or agent_obsk is None:
        partition = agent_obsk = None
    if agent_obsk is not None and agent_obsk < 0:
        raise ValueError(
            f"agent_obsk={agent_obsk} must be at least 0, the number of joints away an agent sees."
        )
    if scenario != "CoupledHalfCheetah":  # the others are made by gymnasium.make
        options = {"disable_env_checker": True} | options
        if max_steps is not None:
            options["max_episode_steps"] = max_steps
    file = str(_FILE)

    def make() -> Any:
        """What a worker makes; it is sent by value, so that tdmarl need not be there."""
        import runpy

        module = runpy.run_path(file)
        joints = agent_factorization
        if agents is not None:
            joints = module["split"](scenario, PARTITIONS[scenario][0], agents)
        return module["Robot"](scenario, partition, agent_obsk, options, joints, infos)

    return PettingZooEnv(make, num_workers, max_steps, seed, num_envs=num_envs, device=device, pad=pad)


def check(scenario: str, partition: str | None) -> int | None:
    """For a partition that the package lacks the number of agents that share the joints evenly, else None.

    Raises:
        ValueError: there is no such robot, or no such partition of it.
    """
    if scenario not in PARTITIONS:
        raise ValueError(f"scenario={scenario!r} is none of {', '.join(PARTITIONS)}.")
    shipped, joints = PARTITIONS[scenario], JOINTS.get(scenario)
    if partition is None or partition in shipped:
        if partition is None and scenario.startswith("ManySegment"):
            raise ValueError(f"partition=None is not for {scenario}, which needs '<agents>x<segments>'.")
        return None
    even = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", partition)
    if even and scenario.startswith("ManySegment"):
        return None
    if even and joints == int(even[1]) * int(even[2]):
        return int(even[1])
    known = [*map(repr, shipped)]
    if scenario.startswith("ManySegment"):
        known.append("'<agents>x<segments>'")
    else:
        known += [f"'<agents>x<joints>' of {joints} joints"] * (joints is not None) + ["None"]
    raise ValueError(f"partition={partition!r} of {scenario} is none of {', '.join(known)}.")
