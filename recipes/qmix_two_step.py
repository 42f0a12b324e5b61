"""The QMIX paper's two-step game: the values that QMIX, VDN or IQL learn on it, beside the paper's.

    python recipes/qmix_two_step.py
    python recipes/qmix_two_step.py --algorithm vdn --seed 1

In the first state agent 1 chooses between 2A, where everything pays 7, and 2B, where both agents have to play B for
8 and get 0 or 1 otherwise. All three algorithms see every joint action equally often (epsilon stays at 1). A sum of
two values cannot represent 2B, so VDN prefers the safe 7; QMIX's table is the true one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from tensordict import TensorDict
from torch import Tensor
from torchrl.envs import EnvBase

import tdmarl

# Rashid et al. 2018, table 2; for IQL, which has no table there, what it converges to: means over the other's play
PAPER = {
    "qmix": [[[6.93, 6.93], [7.92, 7.92]], [[7.00, 7.00], [7.00, 7.00]], [[0.00, 1.00], [1.00, 8.00]]],
    "vdn": [[[6.94, 6.94], [6.35, 6.36]], [[6.99, 7.02], [6.99, 7.02]], [[-1.87, 2.31], [2.33, 6.51]]],
    "iql": [[[6.93, 4.455], [5.6925, 5.6925]], [[7.00, 7.00], [7.00, 7.00]], [[0.50, 4.50], [0.50, 4.50]]],
}


@dataclass(kw_only=True)
class TwoStepOptions:
    """Learns the QMIX paper's two-step game and prints the table beside the paper's."""

    algorithm: Literal["qmix", "vdn", "iql"] = "qmix"
    """Which of the three."""
    total_frames: int = 40_960
    """Frames of the run, two to an episode."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "cpu"
    """Where it runs."""


def table(env: EnvBase, algo: tdmarl.Algorithm) -> Tensor:
    """The values of all joint actions in each state, ``[3, 2, 2]``; IQL's of each agent's actions, ``[3, n, 2]``."""
    learner: Any = algo.learner
    loss = learner.step.parts[0].loss
    state = torch.eye(3, device=env.device)
    agents = TensorDict({"observation": state.unsqueeze(1).repeat(1, 2, 1)}, [3, 2])
    seen = algo.policy(TensorDict({"agents": agents, "state": state}, [3]))
    values = seen["agents", "action_value"]  # [3, n, 2]
    if not loss.mixed:
        return values
    cells = []
    for first in range(2):
        for second in range(2):
            index = torch.tensor([first, second], device=env.device).expand(3, 2).unsqueeze(-1)
            seen["agents", "chosen_action_value"] = values.gather(-1, index)
            cells.append(loss.mixer_network(seen)["chosen_action_value"])
    return torch.cat(cells, -1).unflatten(-1, (2, 2))


def main(options: TwoStepOptions) -> None:
    """Trains and prints."""
    env = tdmarl.two_step_game(num_envs=64, device=options.device)
    learn: Callable[..., tdmarl.Algorithm] = getattr(tdmarl, options.algorithm)
    more = {"embed_dim": 8} if options.algorithm == "qmix" else {}
    algo = learn(
        env, epsilon_end=1.0, num_updates=8, minibatch_size=256, buffer_size=8192, lr=2e-3, target_every=100,
        anneal_frames=options.total_frames, seed=options.seed, **more,
    )  # fmt: skip
    collector = tdmarl.Collector(
        env, algo.explore, frames_per_batch=128, total_frames=options.total_frames, seed=options.seed
    )
    for batch in collector:
        algo.learner(batch)
    with torch.no_grad():
        found = table(env, algo)
    paper = torch.tensor(PAPER[options.algorithm], device=found.device)
    for name, mine, theirs in zip(("first", "2A", "2B"), found.tolist(), paper.tolist()):
        for left, right in zip(mine, theirs):
            print(f"{name:>6} {left[0]:8.3f} {left[1]:8.3f}   paper {right[0]:8.3f} {right[1]:8.3f}")
            name = ""
    greedy = tdmarl.evaluate(env, algo.policy, episodes=64)["return_mean_agents"].mean()
    print(f"largest difference {(found - paper).abs().max():.3f}, greedy return {greedy:.2f}")


if __name__ == "__main__":
    main(tyro.cli(TwoStepOptions))
