"""IPPO on a VMAS scenario: PPO for every agent, with a critic that sees what that agent sees.

    python recipes/ippo_vmas.py --scenario navigation
    python recipes/ippo_vmas.py --resume runs/ippo-navigation-0-... --total-frames 1000000
    python -m tdmarl.plot runs/*

The run's folder holds config.json, metrics.csv and checkpoints/; tdmarl.load_policy(folder) gives the policy
back.
"""

from __future__ import annotations

from dataclasses import dataclass

import tdmarl
from tdmarl.options import OnPolicyOptions
from tdmarl.run import Run, launch


@dataclass(kw_only=True)
class IPPOOptions(OnPolicyOptions):
    """IPPO on a VMAS scenario: PPO for every agent, with a critic that sees what that agent sees."""

    share_params: bool = True
    """One network for all agents of a group, or one each."""
    share_buffer: bool = True
    """All agents learn from the same rows of a batch, or each draws its own."""


def main(options: IPPOOptions) -> None:
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
        "share_buffer": options.share_buffer,
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
    ) as run:  # fmt: skip
        for batch in collector:
            metrics = algo.learner(batch)
            returns = None
            if run.evaluates():
                returns = tdmarl.evaluate(env, algo.policy, episodes=options.eval_episodes, seed=options.seed)
            run.log(batch, metrics, returns)
            del batch  # or two would be in memory while the next is collected


if __name__ == "__main__":
    launch(main, IPPOOptions)
