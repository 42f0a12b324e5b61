"""Evaluation: whole episodes, the first of each environment, without a trace in the training run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdmarl import seeds
from tdmarl.collect import Stepper, env_state, is_held, load_env_state


@torch.no_grad()
def evaluate(
    env: EnvBase,
    policy: Any,
    *,
    episodes: int = 64,
    seed: int = 0,
    deterministic: bool = True,
    max_steps: int = 100_000,
) -> TensorDict:
    """Measures a policy by the undiscounted returns of whole episodes.

    Each environment is reset and contributes its *first* episode, in as many rounds as are needed, so that short
    episodes are not counted more often than long ones. Afterwards the environment's state and all generators are as
    they were. An environment without explicit state (no ``state_dict``) cannot be put back: give evaluation one of
    its own, which is left at the end of its last episode.

    Args:
        env (EnvBase): any environment with agents in groups.
        policy (TensorDictModuleBase): what acts.
        episodes (int): how many.
        seed (int): of the initial states and of acting: equal seeds, equal episodes.
        deterministic (bool): act without exploring.
        max_steps (int): an episode longer than that is an error.

    Returns:
        TensorDict: ``[episodes]``: ``return_mean_agents`` and ``return_sum_agents`` (over all agents of all
        groups), for each group its agents' returns ``[episodes, n]`` under the group's name, and ``length``.

    Raises:
        RuntimeError: if an episode does not end within ``max_steps``, or if a live collector is in the middle of
            episodes that cannot be put back.
    """
    if episodes < 1:
        raise ValueError(f"episodes={episodes} must be at least 1.")
    n_envs = env.batch_size.numel()
    rounds = []
    exploration = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    with _restored(env, seed), set_exploration_type(exploration):
        stepper = Stepper(env, policy)
        for _ in range(-(-episodes // n_envs)):
            rounds.append(_round(stepper, max_steps).reshape(-1))
    return torch.cat(rounds)[:episodes].contiguous()


def _round(stepper: Stepper, max_steps: int) -> TensorDict:
    """The first episode of each environment, ``[*E]``."""
    env, root = stepper.env, stepper.start()
    running = torch.ones_like(root.get("done")).squeeze(-1)  # [*E]
    length = torch.zeros_like(running, dtype=torch.int64)
    totals: dict[str, Tensor] = {}
    for _ in range(max_steps):
        step, root = stepper(root)
        after = step.get("next")
        length += running
        for name, reward in _rewards(env, after).items():
            gained = reward.masked_fill(~running.unsqueeze(-1), 0)
            totals[name] = totals[name] + gained if name in totals else gained  # [*E, n]
        running = running & ~after.get("done").squeeze(-1)
        if not running.any():  # one host read a step, outside of training
            break
    else:
        raise RuntimeError(
            f"{int(running.sum())} of {running.numel()} episodes did not end within max_steps={max_steps}: give the "
            "environment a time limit, or evaluate with a larger max_steps."
        )
    agents = torch.cat(list(totals.values()), -1)
    total = agents.sum(-1)
    out = {
        "return_mean_agents": total / agents.shape[-1],
        "return_sum_agents": total,
        "length": length,
        **totals,
    }
    return TensorDict(out, batch_size=env.batch_size)


def _rewards(env: EnvBase, after: TensorDictBase) -> dict[str, Tensor]:
    """Each group's rewards, ``[*E, n]``; an environment with a reward at the root is one agent named ``reward``."""
    found = {}
    for key in env.reward_keys:
        name = key if isinstance(key, str) else key[0]
        reward = after.get(key)
        found[name] = reward if isinstance(key, str) else reward.squeeze(-1)
    return found


@contextlib.contextmanager
def _restored(env: EnvBase, seed: int) -> Iterator[None]:
    """Seeds the environment and torch's streams for the block, and puts everything back after it."""
    saved = env_state(env)
    if saved is None and is_held(env):
        raise RuntimeError(
            f"{type(env).__name__} has no explicit state and a live collector is in the middle of its episodes: "
            "evaluation could not put it back. Give evaluate an environment of its own."
        )
    device = env.device or torch.device("cpu")
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(seeds.routed(seeds.generator(seed, "evaluation", device)))
        env.set_seed(seeds.derive(seed, "evaluation"))
        try:
            yield
        finally:
            if saved is not None:
                load_env_state(env, saved)
