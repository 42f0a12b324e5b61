"""HAPPO on Multi-Agent MuJoCo beside shared and unshared MAPPO: the papers' comparison as one program.

    python recipes/happo_mamujoco.py
    python recipes/happo_mamujoco.py --algorithm mappo --scenario Ant --partition 4x2
    python -m tdmarl.plot runs/* --out curves.png

Needs the extra "mujoco". The defaults are those of HAPPO's authors for this robot; for others they have 5 epochs, a
clip of 0.1 and no entropy bonus.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import tdmarl
from tdmarl.options import OnPolicyOptions
from tdmarl.run import Run, launch


@dataclass(kw_only=True)
class MuJoCoOptions(OnPolicyOptions):
    """HAPPO on Multi-Agent MuJoCo beside shared and unshared MAPPO."""

    algorithm: Literal["happo", "mappo-unshared", "mappo"] = "happo"
    """mappo-unshared is happo without its factor, mappo has one network for all agents."""
    scenario: str = "HalfCheetah"
    """The robot, such as HalfCheetah, Ant or Humanoid; --scenario-args are its own arguments."""
    partition: str = "2x3"
    """Agents x joints, or another name that the package has for a partition."""
    agent_obsk: int = 1
    """How many joints away an agent sees."""
    num_envs: int = 20
    """Copies of the environment."""
    num_workers: int = 2
    """Processes that run them; 0 runs them in this one."""
    max_steps: int = 1_000
    """Steps after which an episode is cut."""
    frames_per_batch: int = 4_000
    """Frames (environment steps over all copies) between two updates; a multiple of --num-envs."""
    total_frames: int = 1_000_000
    """Frames of the whole run, those before a resume included."""
    eval_every: int = 25
    """Iterations between two evaluations; 0: only the last one is evaluated."""
    eval_episodes: int = 10
    """Whole episodes per evaluation, played by the deterministic policy."""
    checkpoint_every: int = 25
    """Iterations between two checkpoints; 0: only at the end. A signal always writes one."""
    lr: float = 5e-4
    """Learning rate of actors and critic."""
    num_epochs: int = 15
    """How often each agent, and the critic, goes through a batch."""
    minibatch_size: int = 4_000
    """Frames per minibatch, at most --frames-per-batch."""
    clip_epsilon: float = 0.05
    """How far a policy's probability ratio may move within a batch."""
    entropy_coeff: float = 0.01
    """Weight of the entropy bonus."""

    def make(self, num_envs: int, seed: int) -> tdmarl.PettingZooEnv:
        """The environment; one of its own for evaluation, as it cannot be put back."""
        return tdmarl.mamujoco(
            self.scenario, self.partition, num_envs, min(self.num_workers, num_envs), self.max_steps, seed,
            agent_obsk=self.agent_obsk, pad=self.algorithm == "mappo", infos=False, device=self.pick_device(),
            **self.task(),
        )  # fmt: skip


def main(options: MuJoCoOptions) -> None:
    """Trains until the frames are used up; what is on the disk then is the run's folder."""
    env = options.make(options.num_envs, options.seed)
    played = options.make(min(options.eval_episodes, options.num_envs), options.seed + 1)
    arguments: dict[str, Any] = options.arguments() | {
        "group": tuple(env.group_map),  # unlike agents are several groups: one team
        "hidden": (128, 128, 128),
        "gaussian": {"distribution": "clipped", "std": "free", "init_std": 0.37},
    }
    if options.algorithm == "mappo":
        algo = tdmarl.mappo(env, **(arguments := arguments | {"agent_id": True}))
    else:
        algo = tdmarl.happo(env, **(arguments := arguments | {"factor": options.algorithm == "happo"}))
    collector = tdmarl.Collector(
        env,
        algo.explore,
        frames_per_batch=options.frames_per_batch,
        total_frames=options.total_frames,
        seed=options.seed,
    )
    name = options.algorithm.removesuffix("-unshared") if options.algorithm == "mappo" else "happo"
    with Run(
        options, algorithm=name, arguments=arguments, env=env, policy=algo.policy, learner=algo.learner,
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
    launch(main, MuJoCoOptions)
