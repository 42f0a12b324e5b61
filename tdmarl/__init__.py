"""tdmarl: composable multi-agent reinforcement learning on TorchRL and TensorDict."""

from tdmarl import reduce
from tdmarl.action_critics import action_critic
from tdmarl.actors import categorical_actor, gaussian_actor, stochastic_actor
from tdmarl.algorithms import (
    Algorithm,
    haa2c,
    happo,
    hatrpo,
    ippo,
    iql,
    maddpg,
    mappo,
    per_group,
    qmix,
    random_policy,
    vdn,
)
from tdmarl.collect import Collector
from tdmarl.critics import NormalizedCritic, ValueNorm, state_critic
from tdmarl.deterministic_actors import ActionNoise, OrnsteinUhlenbeckNoise, deterministic_actor
from tdmarl.envs.check import check_env
from tdmarl.envs.combat import combat
from tdmarl.envs.foraging import foraging
from tdmarl.envs.games import continuous_game, matrix_game, memory_game, two_step_game
from tdmarl.envs.mamujoco import mamujoco
from tdmarl.envs.pettingzoo import PettingZooEnv
from tdmarl.envs.vmas import VmasEnv
from tdmarl.evaluate import evaluate
from tdmarl.explain import explain
from tdmarl.keys import Group, Team, team
from tdmarl.learners import BatchBuffer, Learner, SequentialLearner
from tdmarl.losses import PolicyLoss, ValueLoss
from tdmarl.maddpg_loss import MADDPGLoss
from tdmarl.mixers import qmix_mixer, vdn_mixer
from tdmarl.mixing import MixingLoss
from tdmarl.nets import AgentGRU, AgentLinear, AgentMLP
from tdmarl.precision import set_precision
from tdmarl.prepare import (
    Advantage,
    HAPPOFactor,
    JointAdvantage,
    RewardNorm,
    TeamReward,
    generalized_advantage,
)
from tdmarl.options import (
    DeterministicOptions,
    OffPolicyOptions,
    OnPolicyOptions,
    Options,
    ValueOptions,
)
from tdmarl.q_actors import EpsilonGreedy, exploring, q_actor
from tdmarl.recurrent import AgentRNN, CarryHidden, Recurrent
from tdmarl.replay import ProportionalSampler, Replay
from tdmarl.run import Run
from tdmarl.saving import load_policy
from tdmarl.step import Annealing, Part, Step
from tdmarl.targets import TargetUpdate
from tdmarl.trust import TrustRegionStep

__version__ = "0.1.0"

__all__ = [
    "ActionNoise",
    "Advantage",
    "AgentGRU",
    "AgentLinear",
    "AgentMLP",
    "AgentRNN",
    "Algorithm",
    "Annealing",
    "BatchBuffer",
    "CarryHidden",
    "Collector",
    "DeterministicOptions",
    "EpsilonGreedy",
    "Group",
    "HAPPOFactor",
    "JointAdvantage",
    "Learner",
    "MADDPGLoss",
    "MixingLoss",
    "NormalizedCritic",
    "OffPolicyOptions",
    "OnPolicyOptions",
    "Options",
    "OrnsteinUhlenbeckNoise",
    "Part",
    "PettingZooEnv",
    "PolicyLoss",
    "ProportionalSampler",
    "Recurrent",
    "Replay",
    "RewardNorm",
    "Run",
    "SequentialLearner",
    "Step",
    "TargetUpdate",
    "Team",
    "TeamReward",
    "TrustRegionStep",
    "ValueLoss",
    "ValueNorm",
    "ValueOptions",
    "VmasEnv",
    "action_critic",
    "categorical_actor",
    "check_env",
    "combat",
    "continuous_game",
    "deterministic_actor",
    "evaluate",
    "explain",
    "exploring",
    "foraging",
    "gaussian_actor",
    "generalized_advantage",
    "haa2c",
    "happo",
    "hatrpo",
    "ippo",
    "iql",
    "load_policy",
    "maddpg",
    "mamujoco",
    "mappo",
    "q_actor",
    "qmix",
    "qmix_mixer",
    "matrix_game",
    "memory_game",
    "per_group",
    "random_policy",
    "reduce",
    "set_precision",
    "state_critic",
    "stochastic_actor",
    "team",
    "vdn",
    "vdn_mixer",
    "two_step_game",
]
