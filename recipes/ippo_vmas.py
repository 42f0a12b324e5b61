"""IPPO on a VMAS scenario: PPO for every agent, with a critic that sees what that agent sees.

    python recipes/ippo_vmas.py --scenario navigation
    python recipes/ippo_vmas.py --resume runs/ippo-navigation-0-... --total-frames 1000000
    python -m tdmarl.plot runs/*

The run's folder holds config.json, metrics.csv and checkpoints/; tdmarl.load_policy(folder) gives the policy
back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tdmarl
from tdmarl.run import Options, Run, launch


@dataclass(kw_only=True)
class IPPOOptions(Options):
    """IPPO on a VMAS scenario: PPO for every agent, with a critic that sees what that agent sees."""

    lr: float = 1e-3
    """Learning rate of actor and critic."""
    num_epochs: int = 4
    """How often each batch is gone through."""
    minibatch_size: int = 3_200
    """Frames per minibatch, at most --frames-per-batch."""
    gamma: float = 0.9
    """Discount of rewards; 0.9 suits the short errands of most VMAS scenarios."""
    lmbda: float = 0.95
    """GAE's weight of long returns."""
    clip_epsilon: float = 0.2
    """How far a policy's probability ratio may move within a batch."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 10.0
    """Largest norm of the actor's and of the critic's gradient."""
    share_params: bool = True
    """One network for all agents of a group, or one each."""

    def check(self) -> None:
        """Raises ValueError for options that cannot be meant."""
        super().check()
        if not 1 <= self.minibatch_size <= self.frames_per_batch:
            raise ValueError(
                f"--minibatch-size {self.minibatch_size} must be between 1 and the batch's "
                f"{self.frames_per_batch} frames (--frames-per-batch)"
            )


def main(options: IPPOOptions) -> None:
    """Trains until the frames are used up; what is on the disk then is the run's folder."""
    env = tdmarl.VmasEnv(
        options.scenario,
        num_envs=options.num_envs,
        max_steps=options.max_steps,
        device=options.pick_device(),
        seed=options.seed,
        **options.task(),
    )
    arguments: dict[str, Any] = {
        "lr": options.lr,
        "num_epochs": options.num_epochs,
        "minibatch_size": options.minibatch_size,
        "gamma": options.gamma,
        "lmbda": options.lmbda,
        "clip_epsilon": options.clip_epsilon,
        "entropy_coeff": options.entropy_coeff,
        "max_grad_norm": options.max_grad_norm,
        "share_params": options.share_params,
        "group": tuple(env.group_map),  # several groups: one team
        "seed": options.seed,
        "mode": options.mode,
    }
    algo = tdmarl.ippo(env, **arguments)
    collector = tdmarl.Collector(
        env,
        algo.explore,
        frames_per_batch=options.frames_per_batch,
        total_frames=options.total_frames,
        seed=options.seed,
    )
    with Run(
        options, algorithm="ippo", arguments=arguments, env=env, policy=algo.policy, learner=algo.learner,
        collector=collector,
    ) as run:
        for batch in collector:
            metrics = algo.learner(batch)
            returns = None
            if run.evaluates():
                returns = tdmarl.evaluate(
                    env, algo.policy, episodes=options.eval_episodes, seed=options.seed
                )
            run.log(batch, metrics, returns)


if __name__ == "__main__":
    launch(main, IPPOOptions)
