"""tdmarl: composable multi-agent reinforcement learning on TorchRL and TensorDict."""

from tdmarl import reduce
from tdmarl.actors import categorical_actor, gaussian_actor, stochastic_actor
from tdmarl.algorithms import Algorithm, ippo, mappo
from tdmarl.collect import Collector
from tdmarl.critics import NormalizedCritic, ValueNorm, state_critic
from tdmarl.envs.check import check_env
from tdmarl.envs.vmas import VmasEnv
from tdmarl.evaluate import evaluate
from tdmarl.keys import Group, Team, team
from tdmarl.learners import BatchBuffer, Learner, replay_buffer
from tdmarl.losses import PolicyLoss, ValueLoss
from tdmarl.nets import AgentLinear, AgentMLP
from tdmarl.prepare import Advantage, TeamReward, generalized_advantage
from tdmarl.run import Options, Run
from tdmarl.saving import load_policy
from tdmarl.step import Annealing, Part, Step

__version__ = "0.1.0"

__all__ = [
    "Advantage",
    "AgentLinear",
    "AgentMLP",
    "Algorithm",
    "Annealing",
    "BatchBuffer",
    "Collector",
    "Group",
    "Learner",
    "NormalizedCritic",
    "Options",
    "Part",
    "PolicyLoss",
    "Run",
    "Step",
    "Team",
    "TeamReward",
    "ValueLoss",
    "ValueNorm",
    "VmasEnv",
    "categorical_actor",
    "check_env",
    "evaluate",
    "gaussian_actor",
    "generalized_advantage",
    "ippo",
    "load_policy",
    "mappo",
    "reduce",
    "replay_buffer",
    "state_critic",
    "stochastic_actor",
    "team",
]
