"""QMIX or VDN outside VMAS: on the combat game, where agents die, and on Level-Based Foraging (extra lbforaging).

    python recipes/qmix_games.py
    python recipes/qmix_games.py --scenario Foraging-8x8-2p-3f-v3 --algorithm vdn

Other PettingZoo environments go the same way: tdmarl.PettingZooEnv in make's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torchrl.envs import EnvBase

import tdmarl
from tdmarl.options import ValueOptions
from tdmarl.run import Run, launch


@dataclass(kw_only=True)
class GameOptions(ValueOptions):
    """QMIX or VDN outside VMAS: on the combat game, where agents die, and on Level-Based Foraging."""

    scenario: str = "combat"
    """combat, or a name of Level-Based Foraging such as Foraging-8x8-2p-3f-v3."""
    algorithm: Literal["qmix", "vdn"] = "qmix"
    """Which of the two."""
    max_steps: int = 60
    """Steps after which an episode is cut."""
    gamma: float = 0.98
    """Discount of rewards."""
    num_workers: int = 2
    """Processes that run the copies of a foraging environment."""

    def make(self, num_envs: int, seed: int) -> EnvBase:
        """The environment; one of its own for evaluation, where it cannot be put back."""
        more: dict[str, Any] = {"max_steps": self.max_steps, "seed": seed, "device": self.pick_device()}
        if self.scenario == "combat":
            return tdmarl.combat(num_envs, **more, **self.task())
        return tdmarl.foraging(self.scenario, num_envs, self.num_workers, **more, **self.task())


def main(options: GameOptions) -> None:
    """Trains until the frames are used up; what is on the disk then is the run's folder."""
    env = options.make(options.num_envs, options.seed)
    played = (
        env if options.scenario == "combat" else options.make(min(options.num_envs, 32), options.seed + 1)
    )
    arguments = options.arguments() | {"team_reward": "mean" if options.scenario == "combat" else "sum"}
    learn = tdmarl.qmix if options.algorithm == "qmix" else tdmarl.vdn
    algo = learn(env, **arguments)
    collector = tdmarl.Collector(
        env,
        algo.explore,
        frames_per_batch=options.frames_per_batch,
        total_frames=options.total_frames,
        init_random_frames=options.init_random_frames,
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
                returns = tdmarl.evaluate(
                    played, algo.policy, episodes=options.eval_episodes, seed=options.seed
                )
            run.log(batch, metrics, returns)


if __name__ == "__main__":
    launch(main, GameOptions)
