"""MAPPO by tdmarl, with every choice that the other contenders make.

A contender of ``train.py``, which starts it; not meant to be run by hand.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tree that is measured, installed or not

import tdmarl  # noqa: E402
from train_worker import Settings, Worker  # noqa: E402


def initialize(network: torch.nn.Module) -> None:
    """Draw the weights as ``torch.nn.Linear`` does, in place of tdmarl's orthogonal ones."""
    for layer in network.modules():
        if isinstance(layer, tdmarl.AgentLinear):
            bound = 1 / math.sqrt(layer.weight.shape[-2])
            torch.nn.init.uniform_(layer.weight, -bound, bound)
            torch.nn.init.uniform_(layer.bias, -bound, bound)


def build(settings: Settings, env: tdmarl.VmasEnv) -> tdmarl.Algorithm:
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
        optim=lambda params: torch.optim.Adam(params, settings.lr, eps=settings.adam_eps, fused=True),
        gamma=settings.gamma,
        lmbda=settings.lmbda,
        clip_epsilon=settings.clip_epsilon,
        entropy_coeff=settings.entropy_coeff,
        num_epochs=settings.epochs,
        minibatch_size=settings.minibatch_size,
        max_grad_norm=settings.max_grad_norm,
        value_clip=False,
        value_norm=False,
        huber_delta=math.inf,
        normalize_advantage=None,
        seed=settings.seed,
        mode=settings.mode,
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
        **settings.scenario_args,
    )
    algo = build(settings, env)
    collector = tdmarl.Collector(
        env, algo.explore, frames_per_batch=settings.frames, total_frames=10**6 * settings.frames
    )
    actor, critic = (part.params for part in algo.learner.step.parts)

    worker.start(algo.policy, {"actor": actor, "critic": critic})
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
