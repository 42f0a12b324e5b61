"""Measures MADDPG's updates: tdmarl beside BenchMARL's and beside the bare network arithmetic, in turns.

    python benchmarks/maddpg_update.py
    python benchmarks/maddpg_update.py --minibatch-size 128 1024 --updates 50 --rounds 5

Both learn navigation with continuous actions from a replay buffer of the same size: one actor and one critic of 256 and
256 tanh units for each agent, one update at a time: draw a minibatch, critics, actors, targets. BenchMARL's own
``Experiment`` makes its updates in a process of its own (see ``train.py`` for its environment). Its loss sends each
actor the gradient of all agents' values and bootstraps with the trained actors, so it runs one actor less for the
target. ``bare`` is what MADDPG cannot do without: these networks' products, activations, backward passes and Adam on
tensors that lie ready.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the tree that is measured, installed or not

import tdmarl  # noqa: E402
from measuring import machine  # noqa: E402
from train import BENCHMARL_VENV, benchmarl_python  # noqa: E402

NAVIGATION = {
    "n_agents": 3, "collisions": True, "agents_with_same_goal": 1, "split_goals": False, "observe_all_goals": False,
    "shared_rew": False, "lidar_range": 0.35, "agent_radius": 0.1,
}  # fmt: skip
FRAMES, ENVS, WIDTH, LR = 6_000, 60, 256, 5e-5


class Ours:
    """tdmarl's updates, the paper's: others as in the buffer, target actors of all agents."""

    def __init__(self, size: int) -> None:
        env = tdmarl.VmasEnv("navigation", num_envs=ENVS, max_steps=100, seed=0, device="cpu", **NAVIGATION)
        algo = tdmarl.maddpg(
            env, hidden=(WIDTH, WIDTH), activation=nn.Tanh, num_updates=1, minibatch_size=size, buffer_size=FRAMES,
            lr=LR, agent_id=False,
        )  # fmt: skip
        batch = tdmarl.Collector(env, algo.explore, frames_per_batch=FRAMES).rollout()
        algo.learner(batch)
        self.step, self.buffer = algo.learner.step, algo.learner.buffer
        self.sizes = {"agents": 3, "observation": batch["agents", "observation"].shape[-1]}

    def __call__(self, updates: int) -> float:
        start = time.perf_counter()
        for _ in range(updates):
            self.step(self.buffer.sample())
        return time.perf_counter() - start


class Bare:
    """The products and activations of those networks, forward and backward, and Adam."""

    def __init__(self, size: int, agents: int, observation: int) -> None:
        seen = agents * (observation + 2)

        def net(inputs: int, outputs: int) -> list[Tensor]:
            shapes = ((inputs, WIDTH), (WIDTH, WIDTH), (WIDTH, outputs))
            return [nn.Parameter(torch.randn(agents, a, b) * a**-0.5) for a, b in shapes]

        self.actor, self.critic = net(observation, 2), net(seen, 1)
        self.target_actor, self.target_critic, self.frozen = (
            [w.detach() for w in ws] for ws in (self.actor, self.critic, self.critic)
        )
        self.optims = [torch.optim.Adam(ws, LR, fused=True) for ws in (self.actor, self.critic)]
        self.own, self.joint = torch.randn(agents, size, observation), torch.randn(agents, size, seen)

    @staticmethod
    def forward(weights: list[Tensor], x: Tensor) -> Tensor:
        """``[n, M, in]`` to ``[n, M, out]``."""
        for w in weights[:-1]:
            x = torch.bmm(x, w).tanh()
        return torch.bmm(x, weights[-1])

    def update(self) -> None:
        """One."""
        with torch.no_grad():
            self.forward(self.target_actor, self.own).tanh()
            target = self.forward(self.target_critic, self.joint)
        loss = (self.forward(self.critic, self.joint) - target).square().sum()
        action = self.forward(self.actor, self.own).tanh()
        value = self.forward(self.frozen, torch.cat([self.joint[..., :-2], action], -1)).sum()
        for weights, total, optim in (
            (self.critic, loss, self.optims[1]),
            (self.actor, -value, self.optims[0]),
        ):
            for w, grad in zip(weights, torch.autograd.grad(total, weights)):
                w.grad = grad
            optim.step()

    def __call__(self, updates: int) -> float:
        start = time.perf_counter()
        for _ in range(updates):
            self.update()
        return time.perf_counter() - start


class BenchMARL:
    """BenchMARL's updates, made by its own code in another process when asked."""

    def __init__(self, python: str, size: int, threads: int) -> None:
        settings = {"task": NAVIGATION, "frames": FRAMES, "envs": ENVS, "width": WIDTH, "lr": LR, "size": size,
                    "threads": threads}  # fmt: skip
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [python, str(HERE / "benchmarl_maddpg.py"), json.dumps(settings)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.errors.seek(0)
        raise SystemExit(f"BenchMARL ended: {self.errors.read()[-2000:]}")

    def __call__(self, updates: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{updates}\n")
        self.process.stdin.flush()
        return self._answer()["seconds"]

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def measure(python: str, size: int, updates: int, rounds: int, threads: int) -> dict[str, Any]:
    """All sides in turns; milliseconds of an update, medians over the rounds after the first."""
    ours = Ours(size)
    theirs = BenchMARL(python, size, threads)
    sides: dict[str, Callable[[int], float]] = {
        "tdmarl": ours, "benchmarl": theirs, "bare": Bare(size, ours.sizes["agents"], ours.sizes["observation"])
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            found[name].append(1e3 * side(updates) / updates)
    theirs.close()
    found = {name: values[1:] for name, values in found.items()}
    return {
        "minibatch_size": size,
        "milliseconds": found,
        "medians": {name: statistics.median(values) for name, values in found.items()},
        "faster_than_benchmarl": statistics.median(
            b / a for a, b in zip(found["tdmarl"], found["benchmarl"])
        ),
        "over_bare": statistics.median(a / b for a, b in zip(found["tdmarl"], found["bare"])),
        "benchmarl": theirs.about,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minibatch-size", nargs="+", type=int, default=[128, 1024])
    parser.add_argument("--updates", type=int, default=30, help="of each side in a round")
    parser.add_argument("--rounds", type=int, default=5, help="that count, after one that warms up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--benchmarl-venv", type=Path, default=BENCHMARL_VENV, help="see train.py")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "maddpg_update.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    python = benchmarl_python(args.benchmarl_venv, None)
    results = [measure(python, size, args.updates, args.rounds, args.threads) for size in args.minibatch_size]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"machine": machine(), "threads": args.threads, "results": results}, indent=1) + "\n"
    )
    print("| minibatch | tdmarl, ms | BenchMARL, ms | times faster | over bare |\n|---|---|---|---|---|")
    for r in results:
        m = r["medians"]
        print(f"| {r['minibatch_size']} | {m['tdmarl']:.2f} | {m['benchmarl']:.2f} | "
              f"{r['faster_than_benchmarl']:.2f} | {r['over_bare']:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
