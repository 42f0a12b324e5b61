"""IQL on a VMAS scenario with discrete actions: each agent learns its own values.

    python recipes/iql_vmas.py --scenario navigation
    python recipes/iql_vmas.py --resume runs/iql-navigation-0-... --total-frames 1000000
    python -m tdmarl.plot runs/*

The run's folder holds config.json, metrics.csv and checkpoints/; tdmarl.load_policy(folder) gives the policy
back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tdmarl
from tdmarl.options import ValueOptions
from tdmarl.run import Run, launch


@dataclass(kw_only=True)
class IQLOptions(ValueOptions):
    """IQL on a VMAS scenario with discrete actions: each agent learns its own values."""

    team_reward: Literal["own", "sum", "mean"] = "own"
    """What each agent is rewarded with: its own reward, or the team's."""
    share_buffer: bool = True
    """All agents learn from the same rows of the replay buffer, or each draws its own."""


def main(options: IQLOptions) -> None:
    """Trains until the frames are used up; what is on the disk then is the run's folder."""
    env = tdmarl.VmasEnv(
        options.scenario,
        num_envs=options.num_envs,
        max_steps=options.max_steps,
        continuous_actions=False,
        device=options.pick_device(),
        seed=options.seed,
        **options.simulation(),
        **options.task(),
    )
    arguments = options.arguments() | {
        "group": tuple(env.group_map),  # several groups: one team
        "team_reward": None if options.team_reward == "own" else options.team_reward,
        "share_buffer": options.share_buffer,
    }
    algo = tdmarl.iql(env, **arguments)
    collector = tdmarl.Collector(
        env,
        algo.explore,
        frames_per_batch=options.frames_per_batch,
        total_frames=options.total_frames,
        init_random_frames=options.init_random_frames,
        seed=options.seed,
    )
    with Run(
        options, algorithm="iql", arguments=arguments, env=env, policy=algo.policy, learner=algo.learner,
        collector=collector,
    ) as run:  # fmt: skip
        for batch in collector:
            metrics = algo.learner(batch)
            returns = None
            if run.evaluates():
                returns = tdmarl.evaluate(env, algo.policy, episodes=options.eval_episodes, seed=options.seed)
            run.log(batch, metrics, returns)


if __name__ == "__main__":
    launch(main, IQLOptions)
