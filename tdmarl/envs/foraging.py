"""Level-Based Foraging, many copies over worker processes."""

from __future__ import annotations

from typing import Any

import torch

from tdmarl.envs.pettingzoo import PettingZooEnv


def foraging(
    name: str = "Foraging-8x8-2p-3f-v3",
    num_envs: int = 8,
    num_workers: int = 2,
    max_steps: int | None = None,
    seed: int = 0,
    *,
    device: torch.device | str | None = None,
    **options: Any,
) -> PettingZooEnv:
    """Trains on Level-Based Foraging (Papoudakis et al. 2021), where agents must go to food together to lift it.

    The package is ``lbforaging``. An episode's ``return_sum_agents`` is 1 when all food is collected, and is at most
    that. Its step limit with food left is ``truncated``; the package itself calls that terminated.

    Args:
        name (str): which grid, how many players and how much food, as ``lbforaging`` registers it.
        num_envs (int): number of copies, ``E``.
        num_workers (int): processes that run them; 0 runs them in this one.
        max_steps (int, optional): a limit below the package's own of 50.
        seed (int): of the episodes.
        device (torch.device, optional): where the tensors are.
        **options: for ``gymnasium.make``, such as ``force_coop`` or ``sight``.

    Example:
        >>> env = foraging("Foraging-5x5-2p-1f-v3", num_envs=2, num_workers=0)
        >>> env.rollout(3)["agents", "observation"].shape
        torch.Size([2, 3, 2, 9])
    """

    def make() -> Any:
        """What a worker makes; it is sent by value, so that tdmarl need not be there."""
        import gymnasium
        import lbforaging  # noqa: F401 - registers the names

        class Foraging:
            """A PettingZoo environment around Gymnasium's, which has lists where PettingZoo has dictionaries."""

            def __init__(self) -> None:
                made: Any = gymnasium.make(name, disable_env_checker=True, **options)
                self.env = made.unwrapped
                self.possible_agents = [f"agent_{i}" for i in range(len(self.env.players))]
                self.metadata = {"name": name}

            def observation_space(self, agent: str) -> Any:
                return self.env.observation_space[self.possible_agents.index(agent)]

            def action_space(self, agent: str) -> Any:
                return self.env.action_space[self.possible_agents.index(agent)]

            def reset(self, seed: int | None = None, options: Any = None) -> Any:
                self.agents = self.possible_agents[:]
                for player in self.env.players:  # else they avoid where they stood last, whatever the seed
                    player.position = None
                return dict(zip(self.agents, self.env.reset(seed=seed)[0])), {}

            def step(self, actions: Any) -> Any:
                acting = self.possible_agents
                seen, rewards, over, _, _ = self.env.step([actions[agent] for agent in acting])
                collected = not self.env.field.any()
                self.agents = [] if over else acting[:]
                ended, cut = (
                    dict.fromkeys(acting, over and collected),
                    dict.fromkeys(acting, over and not collected),
                )
                return dict(zip(acting, seen)), dict(zip(acting, rewards)), ended, cut, {}

            def close(self) -> None:
                self.env.close()

        return Foraging()

    return PettingZooEnv(make, num_workers, max_steps, seed, num_envs=num_envs, device=device)
