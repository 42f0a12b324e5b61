"""MADDPG on the particle environments of its paper (extra pettingzoo), with discrete or continuous actions.

    python recipes/maddpg_mpe.py --scenario simple_speaker_listener_v4
    python recipes/maddpg_mpe.py --scenario simple_spread_v3 --continuous

The speaker sees which landmark is meant and can only talk; the listener can only move and hears. They are two groups
with one critic each, which see both. Other PettingZoo environments go the same way: tdmarl.PettingZooEnv in make's
place.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass

import tdmarl
from tdmarl.options import DeterministicOptions
from tdmarl.run import Run, launch


@dataclass(kw_only=True)
class MPEOptions(DeterministicOptions):
    """MADDPG on the particle environments of its paper, with discrete or continuous actions."""

    scenario: str = "simple_speaker_listener_v4"
    """Name of the environment's module in the package mpe2."""
    continuous: bool = False
    """Continuous actions, or discrete ones."""
    num_workers: int = 2
    """Processes that run the copies of the environment; 0 runs them in this one."""
    num_envs: int = 32
    """Environments side by side."""
    max_steps: int = 25
    """Steps after which an episode is cut; the future beyond them still counts."""
    frames_per_batch: int = 800
    """Frames between two rounds of updates; a multiple of --num-envs."""
    total_frames: int = 500_000
    """Frames of the whole run, those before a resume included."""
    num_updates: int = 40
    """Optimization steps after each batch."""
    critic_lr: float = 2e-3
    """Learning rate of the critics."""
    twin: bool = True
    """Two critics for each agent, whose smaller value counts (TD3)."""
    target_noise: float = 0.2
    """Smooth the targets of continuous actions by noise of this size (TD3: 0.2)."""
    noise_start: float = 0.4
    """Size of the noise at first, in units of half the action range."""
    noise_end: float = 0.05
    """Size of the noise from --noise-frames on."""
    noise_frames: int = 300_000
    """Frames until then."""
    epsilon_start: float = 0.3
    """Probability of a random discrete action at first."""
    epsilon_end: float = 0.05
    """Probability of a random discrete action from --epsilon-frames on."""
    minibatch_size: int = 1_024
    """Frames per minibatch."""
    gamma: float = 0.95
    """Discount of rewards."""
    width: int = 128
    """Of each of the networks' two hidden layers."""
    action_reg: float = 0.001
    """Weight of the mean square of what actions are made of, before tanh or softmax."""
    eval_every: int = 50
    """Iterations between two evaluations; 0: only the last one is evaluated."""
    checkpoint_every: int = 100
    """Iterations between two checkpoints, which hold the replay buffer; 0: only at the end. A signal writes one."""

    def make(self, num_envs: int, seed: int) -> tdmarl.PettingZooEnv:
        """The environment; one of its own for evaluation, as it cannot be put back."""
        module = importlib.import_module(f"mpe2.{self.scenario}")
        arguments = {"continuous_actions": self.continuous, "max_cycles": self.max_steps} | json.loads(
            self.scenario_args
        )
        return tdmarl.PettingZooEnv(
            lambda: module.parallel_env(**arguments), self.num_workers, num_envs=num_envs, seed=seed,
            device=self.pick_device(),
        )  # fmt: skip


def main(options: MPEOptions) -> None:
    """Trains until the frames are used up; what is on the disk then is the run's folder."""
    env = options.make(options.num_envs, options.seed)
    played = options.make(min(options.num_envs, options.eval_episodes), options.seed + 1)
    arguments = options.arguments() | {"group": tuple(env.group_map)}
    if not options.continuous:  # a draw from the target policy smooths already
        arguments["target_noise"] = 0.0
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
                returns = tdmarl.evaluate(
                    played, algo.policy, episodes=options.eval_episodes, seed=options.seed
                )
            run.log(batch, metrics, returns)


if __name__ == "__main__":
    launch(main, MPEOptions)
