"""The algorithms, each one function of an environment's specs."""

from tdmarl.algorithms.contract import Algorithm
from tdmarl.algorithms.happo import haa2c, happo, hatrpo
from tdmarl.algorithms.ppo import ippo, mappo
from tdmarl.algorithms.q import iql, qmix, vdn

__all__ = ["Algorithm", "haa2c", "happo", "hatrpo", "ippo", "iql", "mappo", "qmix", "vdn"]
