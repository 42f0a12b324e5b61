"""The algorithms, each one function of an environment's specs."""

from tdmarl.algorithms.contract import Algorithm
from tdmarl.algorithms.happo import haa2c, happo, hatrpo
from tdmarl.algorithms.maddpg import maddpg
from tdmarl.algorithms.ppo import ippo, mappo
from tdmarl.algorithms.q import iql, qmix, vdn
from tdmarl.algorithms.teams import per_group, random_policy

__all__ = [
    "Algorithm", "haa2c", "happo", "hatrpo", "ippo", "iql", "maddpg", "mappo", "per_group", "qmix", "random_policy",
    "vdn",
]  # fmt: skip
