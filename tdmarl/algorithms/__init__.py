"""The algorithms, each one function of an environment's specs."""

from tdmarl.algorithms.contract import Algorithm
from tdmarl.algorithms.happo import happo
from tdmarl.algorithms.ppo import ippo, mappo
from tdmarl.algorithms.q import iql, qmix, vdn

__all__ = ["Algorithm", "happo", "ippo", "iql", "mappo", "qmix", "vdn"]
