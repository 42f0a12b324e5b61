"""MADDPG on a VMAS scenario: decentralized actors climb on critics that know what everybody sees and does.

    python recipes/maddpg_vmas.py --scenario navigation
    python recipes/maddpg_vmas.py --no-twin --target-noise 0     # as in the paper; the default is near MATD3
    python recipes/maddpg_vmas.py --scope agent                  # independent learners, IDDPG
    python recipes/maddpg_vmas.py --resume runs/maddpg-navigation-0-... --total-frames 1000000
    python -m tdmarl.plot runs/*

The run's folder holds config.json, metrics.csv and checkpoints/; tdmarl.load_policy(folder) gives the policy
back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tdmarl
from tdmarl.options import DeterministicOptions
from tdmarl.run import Run, launch


@dataclass(kw_only=True)
class MADDPGOptions(DeterministicOptions):
    """MADDPG on a VMAS scenario: decentralized actors climb on critics that know what everybody sees and does."""

    scope: Literal["team", "group", "agent"] = "team"
    """What critics see: everybody's observations and actions, those of the agent's group, or the agent's own."""
    continuous: bool = True
    """Continuous actions, or the scenario's discrete ones."""
    twin: bool = True
    """Two critics for each agent, whose smaller value counts (TD3)."""
    target_noise: float = 0.2
    """Smooth the targets of continuous actions by noise of this size (TD3: 0.2)."""
    total_frames: int = 1_024_000
    minibatch_size: int = 1_024
    """Frames per minibatch."""
    num_updates: int = 48
    """Optimization steps after each batch."""
    noise_end: float = 0.05
    """Size of the noise from --noise-frames on."""


def main(options: MADDPGOptions) -> None:
    """Trains until the frames are used up; what is on the disk then is the run's folder."""
    env = tdmarl.VmasEnv(
        options.scenario,
        num_envs=options.num_envs,
        max_steps=options.max_steps,
        continuous_actions=options.continuous,
        device=options.pick_device(),
        seed=options.seed,
        **options.simulation(),
        **options.task(),
    )
    arguments = options.arguments() | {
        "group": tuple(env.group_map),  # several groups: each agent still has its own critic and reward
        "scope": options.scope,
        "target_noise": options.target_noise if options.continuous else 0.0,
    }
    algo = tdmarl.maddpg(env, **arguments)
    collector = tdmarl.Collector(
        env,
        algo.explore,
        frames_per_batch=options.frames_per_batch,
        total_frames=options.total_frames,
        init_random_frames=options.init_random_frames,
        seed=options.seed,
    )
    with Run(
        options, algorithm="maddpg", arguments=arguments, env=env, policy=algo.policy, learner=algo.learner,
        collector=collector,
    ) as run:  # fmt: skip
        for batch in collector:
            metrics = algo.learner(batch)
            returns = None
            if run.evaluates():
                returns = tdmarl.evaluate(env, algo.policy, episodes=options.eval_episodes, seed=options.seed)
            run.log(batch, metrics, returns)


if __name__ == "__main__":
    launch(main, MADDPGOptions)
