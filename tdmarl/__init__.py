"""tdmarl: composable multi-agent reinforcement learning on TorchRL and TensorDict."""

from tdmarl import reduce
from tdmarl.actors import categorical_actor, gaussian_actor, stochastic_actor
from tdmarl.algorithms import Algorithm, happo, ippo, mappo
from tdmarl.collect import Collector
from tdmarl.critics import NormalizedCritic, ValueNorm, state_critic
from tdmarl.envs.check import check_env
from tdmarl.envs.combat import combat
from tdmarl.envs.foraging import foraging
from tdmarl.envs.games import continuous_game, matrix_game, memory_game, two_step_game
from tdmarl.envs.pettingzoo import PettingZooEnv
from tdmarl.envs.vmas import VmasEnv
from tdmarl.evaluate import evaluate
from tdmarl.keys import Group, Team, team
from tdmarl.learners import BatchBuffer, Learner, SequentialLearner, replay_buffer
from tdmarl.losses import PolicyLoss, ValueLoss
from tdmarl.nets import AgentLinear, AgentMLP
from tdmarl.prepare import Advantage, HAPPOFactor, JointAdvantage, TeamReward, generalized_advantage
from tdmarl.options import OnPolicyOptions, Options
from tdmarl.run import Run
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
    "HAPPOFactor",
    "JointAdvantage",
    "Learner",
    "NormalizedCritic",
    "OnPolicyOptions",
    "Options",
    "Part",
    "PettingZooEnv",
    "PolicyLoss",
    "Run",
    "SequentialLearner",
    "Step",
    "Team",
    "TeamReward",
    "ValueLoss",
    "ValueNorm",
    "VmasEnv",
    "categorical_actor",
    "check_env",
    "combat",
    "continuous_game",
    "evaluate",
    "foraging",
    "gaussian_actor",
    "generalized_advantage",
    "happo",
    "ippo",
    "load_policy",
    "mappo",
    "matrix_game",
    "memory_game",
    "reduce",
    "replay_buffer",
    "state_critic",
    "stochastic_actor",
    "team",
    "two_step_game",
]
