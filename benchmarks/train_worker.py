"""What the contenders of ``train.py`` share: settings, the pipe to the driver, how returns are measured.

Runs in every contender's own interpreter, whatever its TorchRL, so it uses nothing of tdmarl or BenchMARL and
of TorchRL only the switch to deterministic actions.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from importlib import metadata
from typing import Any, Callable, Iterable, NamedTuple

import torch
from measuring import Answers
from tensordict import TensorDict, TensorDictBase

Policy = Callable[[TensorDictBase], TensorDictBase]
EMBED = 32  # width of QMIX's mixer
PACKAGES = ("torch", "tensordict", "torchrl", "vmas", "benchmarl", "numpy")


class Moment(NamedTuple):
    """A reading of both clocks."""

    wall: float
    cpu: float  # processor seconds of all threads: other load on the machine moves them little


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers that are the same for every contender; ``train.py`` sends them as JSON."""

    algorithm: str
    scenario: str
    scenario_args: dict[str, Any]
    num_envs: int
    max_steps: int
    epochs: int
    minibatch_size: int
    lr: float
    adam_eps: float
    gamma: float
    lmbda: float
    clip_epsilon: float
    entropy_coeff: float
    max_grad_norm: float
    hidden: list[int]
    updates: int
    buffer_size: int
    tau: float
    explore_start: float  # QMIX's epsilon, the deviation of MADDPG's noise
    explore_end: float
    explore_frames: int
    seed: int
    threads: int
    device: str
    mode: str
    precision: str  # of tdmarl's products; the others' are float32

    @property
    def frames(self) -> int:
        """Frames of one batch: every environment makes one episode's length of steps."""
        return self.num_envs * self.max_steps

    @property
    def continuous(self) -> bool:
        """Whether actions are; QMIX chooses among some."""
        return self.algorithm != "qmix"


class Worker:
    """One contender's end of the pipe: waits for the driver's word, reports what an iteration took.

    The request ``iterate`` lets :meth:`wait` return True, the end of requests lets it return False, ``evaluate`` is
    answered at once.
    """

    def __init__(self) -> None:
        self._answers = Answers()
        self.settings = Settings(**json.loads(sys.argv[1]))
        self._cuda = self.settings.device.startswith("cuda")
        torch.set_num_threads(self.settings.threads)
        self._policy: Policy | None = None

    def start(self, policy: Policy, parameters: dict[str, Iterable[torch.Tensor]]) -> None:
        """Tell the driver that everything is built.

        Args:
            policy (callable): writes ("agents", "action") given ("agents", "observation").
            parameters (dict): the trained tensors by network, to show that the networks are equally large.
        """
        self._policy = policy
        self._answers.answer(
            versions={name: _version(name) for name in PACKAGES},
            python=sys.version.split()[0],
            device_name=torch.cuda.get_device_name() if self._cuda else None,
            parameters={name: sum(p.numel() for p in tensors) for name, tensors in parameters.items()},
        )

    def wait(self) -> bool:
        """True when the driver asks for another iteration, False when it is done; evaluates in between."""
        for request in self._answers.requests():
            if request["do"] == "iterate":
                return True
            self._answers.answer(**self._evaluate(request["episodes"], request["seed"]))
        return False

    def clock(self) -> Moment:
        """Now, after the work handed to the device is done."""
        if self._cuda:
            torch.cuda.synchronize()
        return Moment(time.perf_counter(), time.process_time())

    def report(self, started: Moment, collected: Moment, updated: Moment, batch: TensorDictBase) -> None:
        """Tell the driver what one iteration took.

        Args:
            started, collected, updated (Moment): clock before collection, after it and after the update.
            batch (tensordict): the batch, with ("next", "done") and ("next", "agents", "episode_reward").
        """
        ended = batch["next", "done"].squeeze(-1)  # [E, T]
        returns = batch["next", "agents", "episode_reward"].squeeze(-1).mean(-1)[ended]  # [ended episodes]
        self._answers.answer(
            frames=batch.numel(),
            collect_seconds=collected.wall - started.wall,
            update_seconds=updated.wall - collected.wall,
            collect_cpu_seconds=collected.cpu - started.cpu,
            update_cpu_seconds=updated.cpu - collected.cpu,
            episodes=returns.numel(),
            train_return=returns.mean().item() if returns.numel() else None,
            peak_memory_mb=_peak_memory_mb(),
            peak_device_memory_mb=self._peak_device_memory_mb(),
        )

    def _evaluate(self, episodes: int, seed: int) -> dict[str, float]:
        """Returns of the deterministic policy in stock VMAS, training left as if nothing had happened."""
        from vmas.simulator.environment import Environment

        assert self._policy is not None
        # Stock VMAS draws from one state for all environments of the process: training must get it back.
        vmas_state = list(Environment.vmas_random_state)
        devices = [torch.cuda.current_device()] if self._cuda else []
        with torch.random.fork_rng(devices):
            returns, lengths = evaluate(self._policy, self.settings, episodes, seed)
        Environment.vmas_random_state[:] = vmas_state
        return {
            "episodes": episodes,
            "return": returns.mean().item(),
            "return_std": returns.std().item(),
            "length": lengths.mean().item(),
        }

    def _peak_device_memory_mb(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**20 if self._cuda else None


@torch.no_grad()
def evaluate(
    policy: Policy, settings: Settings, episodes: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Undiscounted returns, averaged over agents, of whole deterministic episodes in stock VMAS.

    The first episode of each of ``episodes`` environments counts: short ones are not counted more often.
    The same seed gives the same initial states to every contender.

    Returns:
        returns and lengths, each [episodes].
    """
    import vmas
    from torchrl.envs.utils import ExplorationType, set_exploration_type

    env = vmas.make_env(
        settings.scenario,
        num_envs=episodes,
        device=settings.device,
        continuous_actions=settings.continuous,
        max_steps=settings.max_steps,
        seed=seed,
        clamp_actions=True,
        **settings.scenario_args,
    )
    observations = env.reset()
    returns = torch.zeros(episodes, device=settings.device)
    lengths = torch.zeros(episodes, device=settings.device)
    running = torch.ones(episodes, dtype=torch.bool, device=settings.device)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        for _ in range(settings.max_steps):
            step = TensorDict(
                {("agents", "observation"): torch.stack(observations, 1)},  # [E, n, o]
                batch_size=[episodes],
                device=settings.device,
            )
            actions = policy(step)["agents", "action"]  # [E, n, a], or choices [E, n]
            actions = actions if settings.continuous else actions.unsqueeze(-1)
            observations, rewards, done, _ = env.step(list(actions.unbind(1)))
            returns += torch.stack(rewards, 1).mean(1) * running
            lengths += running
            running &= ~done
    if running.any():
        unfinished = int(running.sum())
        raise RuntimeError(f"{unfinished} of {episodes} episodes did not end in {settings.max_steps} steps")
    return returns, lengths


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _peak_memory_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, KiB on Linux
