"""What `simulate.py` compares: ways to step VMAS and to reset what ended, each timed in the same manner."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn

import tdmarl

SLOW = 2  # steps in a batch of a contender that makes no whole batch in a turn's time
PERIOD = 16  # rounds that a mean is over at least; some of the work of resets is done at every sixteenth
SETTLING = 10  # so many turns' time at most goes into a contender's warm-up


class Policy(TensorDictModuleBase):
    """Acts for all groups at a fixed cost: within the bounds, a linear map and unit noise through a tanh."""

    def __init__(self, env: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.groups = list(env.group_map)
        self.in_keys = [(group, "observation") for group in self.groups]
        self.out_keys = [(group, "action") for group in self.groups]
        self.linears = nn.ModuleList()
        for i, (observation, action) in enumerate(zip(self.in_keys, self.out_keys)):
            space = env.full_action_spec_unbatched[action].space
            size = env.observation_spec_unbatched[observation].shape[-1]
            self.linears.append(nn.Linear(size, space.high.shape[-1]))
            self.register_buffer(f"middle_{i}", (space.high + space.low) / 2)  # [n, a]
            self.register_buffer(f"half_{i}", (space.high - space.low) / 2)  # [n, a]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Adds every group's action."""
        for i, (observation, action) in enumerate(zip(self.in_keys, self.out_keys)):
            mean = self.linears[i](tensordict.get(observation))  # [E, n, a]
            noisy = torch.tanh(mean + torch.randn_like(mean))
            middle, half = getattr(self, f"middle_{i}"), getattr(self, f"half_{i}")
            tensordict.set(action, torch.addcmul(middle, half, noisy))
        return tensordict


Batch = Callable[[], Any]  # makes some steps of all environments; how many episodes ended


class Contender:
    """One way to simulate: warmed up, then measured for about as long as it is told.

    Args:
        make (callable): from a number of steps, what makes so many.
        num_envs (int): environments, each of which makes the steps.
        device (torch.device): where it runs.
    """

    def __init__(self, make: Callable[[int], Batch], num_envs: int, device: torch.device) -> None:
        self._make, self._num_envs, self._device = make, num_envs, device
        self._collect: Batch | None = None
        self._seconds_per_batch = 0.0
        self.steps = 0
        self.repetitions: list[dict[str, Any]] = []

    def settle(self, steps: int, warmup: int, seconds: float) -> None:
        """Makes `warmup` steps, or as many as the time allows, and finds how many steps a batch can have.

        A batch is a contender's smallest unit, so slow ones get small batches.
        """
        self._warm(min(steps, SLOW), warmup, seconds)
        if self.steps < steps and self._seconds_per_batch / self.steps * steps <= seconds:
            self._warm(steps, warmup, seconds)

    def measure(self, seconds: float) -> None:
        """One repetition: as many batches as are expected to take the time."""
        batches = max(1, round(seconds / self._seconds_per_batch))
        elapsed, cpu, ended = self._time(batches)
        self._seconds_per_batch = elapsed / batches
        frames = batches * self.steps * self._num_envs
        row = {"frames": frames, "seconds": elapsed, "cpu_seconds": cpu, "ends": int(ended)}
        self.repetitions.append(row)

    def result(self) -> dict[str, Any]:
        """The medians, and the repetitions themselves."""
        speed = statistics.median(row["frames"] / row["seconds"] for row in self.repetitions)
        frames, ends = (sum(row[name] for row in self.repetitions) for name in ("frames", "ends"))
        return {
            "frames_per_second": speed,
            "seconds_per_step": self._num_envs / speed,
            "ends_per_frame": ends / frames,
            "steps_per_batch": self.steps,
            "repetitions": self.repetitions,
        }

    def _warm(self, steps: int, warmup: int, seconds: float) -> None:
        self._collect = None  # the last one's memory goes before the next one is made
        self.steps, self._collect = steps, self._make(steps)
        made, start = 0, time.perf_counter()
        while True:
            self._seconds_per_batch = self._time(1)[0]
            made += steps
            if made >= max(warmup, 2 * steps) or time.perf_counter() - start > SETTLING * seconds:
                return

    def _time(self, batches: int) -> tuple[float, float, Any]:
        """Wall time, this process's CPU time, and how many episodes ended."""
        assert self._collect is not None
        _synchronize(self._device)
        start, cpu, ended = time.perf_counter(), time.process_time(), 0
        for _ in range(batches):
            ended = ended + self._collect()
        _synchronize(self._device)
        return time.perf_counter() - start, time.process_time() - cpu, ended


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def collecting(make: Callable[[int], Any], num_envs: int) -> Callable[[int], Batch]:
    """A collector's side; `make` makes one from frames per batch."""

    def batch_of(steps: int) -> Batch:
        iterator = iter(make(num_envs * steps))
        return lambda: next(iterator)["next", "done"].sum()

    return batch_of


def raw(env: Any) -> Callable[[int], Batch]:
    """VMAS itself: random actions, and what ended is reset one by one, since it has nothing else.

    Observations are asked for once after the resets, not by each of them.
    """

    def batch_of(steps: int) -> Batch:
        @torch.no_grad()
        def collect() -> int:
            ended = 0
            for _ in range(steps):
                done = env.step(env.get_random_actions())[2]
                for index in done.nonzero().flatten().tolist():
                    env.reset_at(index, return_observations=False)
                    ended += 1
                if done.any():
                    env.get_from_scenario(
                        get_observations=True, get_rewards=False, get_infos=False, get_dones=False
                    )
            return ended

        return collect

    return batch_of


def alone(env: tdmarl.VmasEnv, policy: Policy, seconds: float) -> dict[str, dict[str, float]]:
    """Seconds of the policy, a step, and resets of one and half of the environments, each by itself.

    They alternate; medians and means, since resets are not all alike (see `PERIOD`). On a CPU
    processor time, which others' load moves least.
    """

    def reset(count: int) -> Callable[[], Any]:
        mask = (torch.arange(env.num_envs, device=env.device) < count).unsqueeze(-1)  # [E, 1]
        # A tensordict each time: `reset` takes the mask out of it, and without one it resets everything.
        return lambda: env.reset(TensorDict({"_reset": mask}, batch_size=env.batch_size, device=env.device))

    root = policy(env.reset())
    parts: dict[str, Callable[[], Any]] = {
        "policy": lambda: policy(root),
        "step": lambda: env.step(root),
        "reset_one": reset(1),
        "reset_half": reset(env.num_envs // 2),
    }
    found: dict[str, list[float]] = {name: [] for name in parts}
    until = time.perf_counter() + seconds
    with torch.no_grad():
        while len(found["reset_half"]) < PERIOD or time.perf_counter() < until:
            for name, function in parts.items():
                _synchronize(env.device)
                start, cpu = time.perf_counter(), time.process_time()
                function()
                _synchronize(env.device)
                on_cpu = env.device.type == "cpu"
                found[name].append(time.process_time() - cpu if on_cpu else time.perf_counter() - start)
    return {
        "median": {name: statistics.median(times) for name, times in found.items()},
        "mean": {name: statistics.mean(times) for name, times in found.items()},
    }
