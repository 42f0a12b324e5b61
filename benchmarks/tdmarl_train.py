"""MAPPO, QMIX or MADDPG by tdmarl, with every choice that the other contenders make.

A contender of ``train.py``, which starts it; not meant to be run by hand.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tree that is measured, installed or not

import tdmarl  # noqa: E402
from train_worker import EMBED, Settings, Worker  # noqa: E402


def initialize(network: torch.nn.Module) -> None:
    """Draw the weights as ``torch.nn.Linear`` does, in place of tdmarl's orthogonal ones."""
    for layer in network.modules():
        if isinstance(layer, tdmarl.AgentLinear):
            bound = 1 / math.sqrt(layer.weight.shape[-2])
            torch.nn.init.uniform_(layer.weight, -bound, bound)
            torch.nn.init.uniform_(layer.bias, -bound, bound)


def build(settings: Settings, env: tdmarl.VmasEnv) -> tdmarl.Algorithm:
    """The algorithm as the other contenders have it."""
    common: dict[str, Any] = {
        "optim": lambda params: torch.optim.Adam(params, settings.lr, eps=settings.adam_eps, fused=True),
        "gamma": settings.gamma,
        "minibatch_size": settings.minibatch_size,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "mode": settings.mode,
        "precision": settings.precision,
    }
    if settings.algorithm == "mappo":
        return mappo(settings, env, common)
    common |= {"num_updates": settings.updates, "buffer_size": settings.buffer_size, "tau": settings.tau}
    return (qmix if settings.algorithm == "qmix" else maddpg)(settings, env, common)


def mappo(settings: Settings, env: tdmarl.VmasEnv, common: dict[str, Any]) -> tdmarl.Algorithm:
    """MAPPO as the other contenders have it.

    A squashed normal whose deviation is a function of the observation, one value for the whole team, squared
    error, no clipping of values, nothing standardized, weights drawn as PyTorch does.
    """
    nets = {"hidden": settings.hidden, "activation": torch.nn.Tanh}
    actor = tdmarl.gaussian_actor(env, distribution="tanh", std="state", **nets)
    critic = tdmarl.state_critic(env, scope="team", agent_id=False, **nets)
    initialize(actor)
    initialize(critic)
    return tdmarl.mappo(
        env,
        actor=actor,
        critic=critic,
        lmbda=settings.lmbda,
        clip_epsilon=settings.clip_epsilon,
        entropy_coeff=settings.entropy_coeff,
        num_epochs=settings.epochs,
        value_clip=False,
        value_norm=False,
        huber_delta=math.inf,
        normalize_advantage=None,
        **common,
    )


def qmix(settings: Settings, env: tdmarl.VmasEnv, common: dict[str, Any]) -> tdmarl.Algorithm:
    """QMIX as the other contenders have it: no double Q, no agent identity, one layer in the hypernetworks."""
    actor = tdmarl.q_actor(env, hidden=settings.hidden, activation=torch.nn.Tanh, agent_id=False)
    initialize(actor)
    return tdmarl.qmix(
        env,
        actor=actor,
        team_reward="mean",
        embed_dim=EMBED,
        hypernet_layers=1,
        double_q=False,
        epsilon_start=settings.explore_start,
        epsilon_end=settings.explore_end,
        epsilon_frames=settings.explore_frames,
        **common,
    )


def maddpg(settings: Settings, env: tdmarl.VmasEnv, common: dict[str, Any]) -> tdmarl.Algorithm:
    """MADDPG, the paper's: an actor and a critic for each agent, which follows the gradient of its own value."""
    nets = {"hidden": settings.hidden, "activation": torch.nn.Tanh, "agent_id": False, "share_params": False}
    actor, critic = tdmarl.deterministic_actor(env, **nets), tdmarl.action_critic(env, **nets)
    initialize(actor)
    initialize(critic)
    return tdmarl.maddpg(
        env,
        actor=actor,
        critic=critic,
        agent_id=False,
        noise_start=settings.explore_start,
        noise_end=settings.explore_end,
        noise_frames=settings.explore_frames,
        **common,
    )


def main() -> None:
    worker = Worker()
    settings = worker.settings
    torch.manual_seed(settings.seed)
    env = tdmarl.VmasEnv(
        settings.scenario,
        num_envs=settings.num_envs,
        max_steps=settings.max_steps,
        device=settings.device,
        seed=settings.seed,
        time_limit="terminate",
        continuous_actions=settings.continuous,
        mode=settings.mode,
        **settings.scenario_args,
    )
    algo = build(settings, env)
    collector = tdmarl.Collector(
        env, algo.explore, frames_per_batch=settings.frames, total_frames=10**6 * settings.frames
    )
    worker.start(algo.policy, {part.name or "values": part.params for part in algo.learner.step.parts})
    batches = iter(collector)
    while worker.wait():
        started = worker.clock()
        batch = next(batches)
        collected = worker.clock()
        algo.learner(batch)
        worker.report(started, collected, worker.clock(), batch)
    collector.shutdown()


if __name__ == "__main__":
    main()
