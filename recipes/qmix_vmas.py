"""QMIX on a VMAS scenario with discrete actions: the team's value is a monotonic function of the agents'.

    python recipes/qmix_vmas.py --scenario navigation
    python recipes/qmix_vmas.py --resume runs/qmix-navigation-0-... --total-frames 1000000
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
class QMIXOptions(ValueOptions):
    """QMIX on a VMAS scenario with discrete actions: the team's value is a monotonic function of the agents'."""

    team_reward: Literal["sum", "mean"] = "sum"
    """How the agents' rewards make the team's. A sum keeps each agent's value on the scale of its own reward."""
    embed_dim: int = 32
    """Width of the mixing network."""
    hypernet_layers: Literal[1, 2] = 1
    """Layers of the networks that make its weights."""


def main(options: QMIXOptions) -> None:
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
        "team_reward": options.team_reward,
        "embed_dim": options.embed_dim,
        "hypernet_layers": options.hypernet_layers,
    }
    algo = tdmarl.qmix(env, **arguments)
    collector = tdmarl.Collector(
        env,
        algo.explore,
        frames_per_batch=options.frames_per_batch,
        total_frames=options.total_frames,
        init_random_frames=options.init_random_frames,
        seed=options.seed,
    )
    with Run(
        options, algorithm="qmix", arguments=arguments, env=env, policy=algo.policy, learner=algo.learner,
        collector=collector,
    ) as run:  # fmt: skip
        for batch in collector:
            metrics = algo.learner(batch)
            returns = None
            if run.evaluates():
                returns = tdmarl.evaluate(env, algo.policy, episodes=options.eval_episodes, seed=options.seed)
            run.log(batch, metrics, returns)


if __name__ == "__main__":
    launch(main, QMIXOptions)
