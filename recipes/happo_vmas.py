"""HAPPO on a VMAS scenario: agents update one after the other, weighted by what the earlier ones changed.

    python recipes/happo_vmas.py --scenario navigation
    python recipes/happo_vmas.py --algorithm hatrpo
    python recipes/happo_vmas.py --resume runs/happo-navigation-0-... --total-frames 2000000
    python -m tdmarl.plot runs/*

The run's folder holds config.json, metrics.csv and checkpoints/; tdmarl.load_policy(folder) gives the policy
back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tdmarl
from tdmarl.options import OnPolicyOptions
from tdmarl.run import Run, launch


@dataclass(kw_only=True)
class HAPPOOptions(OnPolicyOptions):
    """HAPPO on a VMAS scenario: agents update one after the other, weighted by what the earlier ones changed."""

    total_frames: int = 1_497_600
    anneal: bool = True
    """Let the learning rates and the entropy bonus fall to zero over --total-frames."""
    algorithm: Literal["happo", "haa2c", "hatrpo"] = "happo"
    """haa2c does not clip; hatrpo takes a step in a trust region for each agent."""
    max_kl: float = 0.01
    """Of hatrpo: how far a step may move an agent's policy."""
    share_params: bool = False
    """One network each, as the method has it, or one for all agents of a group."""
    team_reward: Literal["mean", "sum"] = "mean"
    """How the agents' rewards become the team's."""


def main(options: HAPPOOptions) -> None:
    """Trains until the frames are used up; what is on the disk then is the run's folder."""
    env = tdmarl.VmasEnv(
        options.scenario,
        num_envs=options.num_envs,
        max_steps=options.max_steps,
        device=options.pick_device(),
        seed=options.seed,
        **options.simulation(),
        **options.task(),
    )
    arguments = options.arguments() | {
        "group": tuple(env.group_map),  # several groups: one team
        "share_params": options.share_params,
        "team_reward": options.team_reward,
    }
    if options.algorithm == "haa2c":
        del arguments["clip_epsilon"]
    elif options.algorithm == "hatrpo":
        del arguments["entropy_coeff"]
        arguments |= {"max_kl": options.max_kl, "mode": options.mode}
    algo = getattr(tdmarl, options.algorithm)(env, **arguments)
    collector = tdmarl.Collector(
        env,
        algo.explore,
        frames_per_batch=options.frames_per_batch,
        total_frames=options.total_frames,
        seed=options.seed,
    )
    with Run(
        options, algorithm=options.algorithm, arguments=arguments, env=env, policy=algo.policy,
        learner=algo.learner, collector=collector,
    ) as run:  # fmt: skip
        for batch in collector:
            metrics = algo.learner(batch)
            returns = None
            if run.evaluates():
                returns = tdmarl.evaluate(env, algo.policy, episodes=options.eval_episodes, seed=options.seed)
            run.log(batch, metrics, returns)
            del batch  # or two would be in memory while the next is collected


if __name__ == "__main__":
    launch(main, HAPPOOptions)
