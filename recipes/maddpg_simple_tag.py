"""Predator and prey learn against each other by MADDPG, and are then played against chance and against their past.

    python recipes/maddpg_simple_tag.py
    python recipes/maddpg_simple_tag.py --scenario-args '{"num_adversaries": 2}'

One learner trains both groups; every agent has a critic of its own reward that sees all of them. At the end all
adversaries meet all runners, random ones, those of the middle of the run, and the last: the table says how often a
runner is touched in an episode. It is printed, and written into the run's folder as cross_play.csv.
"""

from __future__ import annotations

import copy
import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict.nn import TensorDictSequential

import tdmarl
from tdmarl.options import DeterministicOptions
from tdmarl.run import Run, launch

GROUPS = ("adversary", "agent")


@dataclass(kw_only=True)
class TagOptions(DeterministicOptions):
    """Predator and prey learn against each other by MADDPG."""

    scenario: str = "simple_tag"
    """Name of the VMAS scenario, with groups adversary and agent."""
    gamma: float = 0.95
    """Discount of rewards."""
    cross_play_episodes: int = 256
    """Episodes of each pairing at the end; 0 leaves the table out."""

    def task(self) -> dict[str, Any]:
        """The scenario's arguments: adversaries are also drawn to the runners, over which --scenario-args go."""
        return {"shape_adversary_rew": True} | super().task()

    def check(self) -> None:
        """Raises ValueError for options that cannot be meant."""
        super().check()
        if self.cross_play_episodes < 0 or self.task().get("shape_agent_rew"):
            raise ValueError(
                "--cross-play-episodes counts touches by the runners' reward: not negative, not shaped"
            )


def cross_play(env: tdmarl.VmasEnv, past: dict[str, Any], episodes: int, seed: int) -> list[list[Any]]:
    """How often a runner is touched in an episode: a row for each of the adversaries, a column for the runners."""
    rows: list[list[Any]] = [["adversaries / runners", *past]]
    for hunters, hunting in past.items():
        row: list[Any] = [hunters]
        for running in past.values():
            both = TensorDictSequential(hunting["adversary"], running["agent"])
            returns = tdmarl.evaluate(env, both, episodes=episodes, seed=seed)
            row.append(0.0 - round(returns["agent"].mean().item() / 10, 2))  # a touch costs its runner ten
        rows.append(row)
    return rows


def main(options: TagOptions) -> None:
    """Trains, then plays; what is on the disk then is the run's folder."""
    env = tdmarl.VmasEnv(
        options.scenario,
        num_envs=options.num_envs,
        max_steps=options.max_steps,
        device=options.pick_device(),
        seed=options.seed,
        **options.simulation(),
        **options.task(),
    )
    arguments = options.arguments() | {"group": GROUPS}
    algo = tdmarl.maddpg(env, **arguments)
    collector = tdmarl.Collector(
        env,
        algo.explore,
        frames_per_batch=options.frames_per_batch,
        total_frames=options.total_frames,
        init_random_frames=options.init_random_frames,
        seed=options.seed,
    )
    past: dict[str, Any] = {"random": {g: tdmarl.random_policy(env, g) for g in GROUPS}}
    with Run(
        options, algorithm="maddpg", arguments=arguments, env=env, policy=algo.policy, learner=algo.learner,
        collector=collector,
    ) as run:  # fmt: skip
        middle = Path(run.folder, "middle.pt")  # on the disk, for a run that is resumed
        for batch in collector:
            metrics = algo.learner(batch)
            returns = None
            if run.evaluates():
                returns = tdmarl.evaluate(env, algo.policy, episodes=options.eval_episodes, seed=options.seed)
            run.log(batch, metrics, returns)
            if not middle.exists() and collector.frames >= options.total_frames / 2:
                torch.save(algo.policy.state_dict(), middle)
    past["middle"] = acting_alone(algo.policy, torch.load(middle, weights_only=True))
    past["last"] = acting_alone(algo.policy)
    if options.cross_play_episodes:
        table = cross_play(env, past, options.cross_play_episodes, options.seed)
        with Path(run.folder, "cross_play.csv").open("w", newline="") as file:
            csv.writer(file).writerows(table)
        for row in table:
            print("".join(f"{cell!s:>23}" for cell in row))


def acting_alone(policy: TensorDictSequential, weights: dict[str, Any] | None = None) -> dict[str, Any]:
    """A frozen copy of each group's part of a policy, with the weights of another moment if given."""
    kept = copy.deepcopy(policy).requires_grad_(False)
    kept.load_state_dict(weights or policy.state_dict())
    return {g: kept.select_subsequence(out_keys=[(g, "action")]) for g in GROUPS}


if __name__ == "__main__":
    launch(main, TagOptions)
