"""Shows where an iteration's time goes, as a picture: a bar for each algorithm, a piece for each part of the work.

    python benchmarks/where_time_goes.py
    python benchmarks/where_time_goes.py --algorithms mappo --mode compile --device cuda --num-envs 4096

(Its name is not `profile`: Python's own module of that name is looked for here first by programs of this folder.)

The time of a part is its own, without that of the parts it calls. A step that is compiled or captured is one part, and
so are the recorded steps of a rollout on a CPU: policy, simulation, writing the batch. On CUDA the device is waited for
at the ends of every part, so that its work counts where it was asked for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the tree that is measured, installed or not

import tdmarl  # noqa: E402
from measuring import RESULTS, add_ways_to_run, begin, command_line, picture, waiting, where, write  # noqa: E402
from tdmarl import chunk, reduce, rollout  # noqa: E402
from tdmarl.envs.compiled import CompiledVmas  # noqa: E402

ALGORITHMS = ("mappo", "happo", "qmix", "maddpg")
PARTS = {  # in the order of the bar, with their colors: collecting in blues, learning in warm ones
    "policy": "#08519c",
    "simulation": "#3182bd",
    "recorded steps": "#08306b",
    "resets": "#6baed6",
    "writing the batch": "#9ecae1",
    "rest of collecting": "#deebf7",
    "prepare": "#762a83",
    "buffer": "#c2a5cf",
    "forward": "#a63603",
    "backward": "#e6550d",
    "clipping": "#fd8d3c",
    "optimizer": "#fdae6b",
    "targets": "#fdd0a2",
    "whole step": "#e6550d",
    "rest of learning": "#fee6ce",
}


class Stopwatch:
    """Adds up what named parts take, each without the parts inside it.

    Args:
        wait (callable): waits for the device.

    Example:
        >>> now = iter([0.0, 1.0, 4.0, 9.0])
        >>> watch = Stopwatch(lambda: None, lambda: next(now))
        >>> watch.timed("outer", watch.timed("inner", lambda: None))()
        >>> watch.spent
        {'inner': 3.0, 'outer': 6.0}
    """

    def __init__(self, wait: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> None:
        self.spent: dict[str, float] = {}
        self._wait, self._clock = wait, clock
        self._inside: list[float] = []  # of each part under way, what parts in it took

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._wait()
            start = self._clock()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                self._wait()
                took = self._clock() - start
                self.spent[name] = self.spent.get(name, 0.0) + took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        return call

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Times what an object, a class or a module calls by that attribute, from now on."""
        setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))


def watch_shared(stopwatch: Stopwatch) -> Callable[[], None]:
    """Times what all algorithms share; returns what undoes it."""
    places: list[tuple[Any, str, str]] = [
        (rollout.Rollout, "_written", "policy"),
        (chunk.Chunk, "__call__", "recorded steps"),
        (CompiledVmas, "transition", "simulation"),
        (rollout.OneGraph, "__call__", "simulation"),
        (rollout.Columns, "add", "writing the batch"),
        (torch.autograd, "grad", "backward"),
        (reduce, "clip_gradients", "clipping"),
    ]
    before = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in places]
    for place in places:
        stopwatch.watch(*place)

    def undo() -> None:
        for owner, attribute, function in before:
            setattr(owner, attribute, function)

    return undo


def watch_learner(stopwatch: Stopwatch, learner: Any, inside: bool) -> None:
    """Times a learner's parts: those of its steps, too, or each step as one.

    Args:
        stopwatch (Stopwatch): gets the times.
        learner (Learner or SequentialLearner): whose.
        inside (bool): steps are plain Python.
    """
    stopwatch.watch(learner, "prepare", "prepare")
    stopwatch.watch(learner.buffer, "extend", "buffer")
    stopwatch.watch(learner.buffer, "sample", "buffer")
    sequential = isinstance(learner, tdmarl.SequentialLearner)
    learners = [learner, learner.critic] if sequential else [learner]
    steps = [agent.step for agent in learner.agents] + [learner.critic.step] if sequential else [learner.step]
    if sequential:
        stopwatch.watch(learner.critic.buffer, "extend", "buffer")
        stopwatch.watch(learner.critic.buffer, "sample", "buffer")
    if not inside:
        for one in learners:
            take = one.accelerated
            one.accelerated = (
                [stopwatch.timed("whole step", each) for each in take]
                if isinstance(take, list)
                else stopwatch.timed("whole step", take)
            )
        return
    for step in steps:
        for part in step.parts:
            stopwatch.watch(part.loss, "forward", "forward")
            stopwatch.watch(part.optim, "step", "optimizer")
        if step.after is not None:
            step.after = stopwatch.timed("targets", step.after)


class Iterations:
    """An algorithm that collects and learns under a stopwatch.

    Args:
        algorithm (str): which.
        args (Namespace): sizes, device and modes.
    """

    def __init__(self, algorithm: str, args: argparse.Namespace) -> None:
        env = tdmarl.VmasEnv(
            args.scenario, num_envs=args.num_envs, max_steps=100, device=args.device, seed=0, mode=args.simulation,
            continuous_actions=algorithm != "qmix",
        )  # fmt: skip
        env.compile()
        frames = args.num_envs * args.steps
        common: dict[str, Any] = {"hidden": (args.width,) * 2, "mode": args.mode}
        common["minibatch_size"] = min(args.minibatch_size, frames)
        if algorithm in ("mappo", "happo"):
            common["num_epochs"] = args.epochs
        else:
            common |= {
                "buffer_size": 2 * frames,
                "num_updates": args.epochs * -(-frames // common["minibatch_size"]),
            }
        algo = getattr(tdmarl, algorithm)(env, **common)
        self._stopwatch = Stopwatch(waiting(args.device))
        self._collector = tdmarl.Collector(env, algo.explore, frames_per_batch=frames, seed=0)
        self._learner = algo.learner
        self.collect = self._stopwatch.timed("rest of collecting", self._collector.rollout)
        self.learn = self._stopwatch.timed("rest of learning", algo.learner)
        self.eager = args.mode == "eager"
        self._env = env

    def warm_up(self) -> None:
        """Compiles what is to be compiled; nothing is watched yet."""
        for _ in range(2):
            self._learner(self._collector.rollout())
        watch_learner(self._stopwatch, self._learner, self.eager)
        if self._env.transitions() is None:
            self._stopwatch.watch(self._collector._stepper, "policy", "policy")
            self._stopwatch.watch(self._env, "step", "simulation")
            self._stopwatch.watch(self._env, "reset_done", "resets")

    def __call__(self) -> dict[str, float]:
        """One iteration; seconds of its parts."""
        undo = watch_shared(self._stopwatch)
        try:
            self.learn(self.collect())
        finally:
            undo()
        spent = dict(self._stopwatch.spent)
        self._stopwatch.spent.clear()
        return spent


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All algorithms in turns: the median of each part's seconds over the rounds."""
    sides = {}
    for algorithm in args.algorithms:
        sides[algorithm] = Iterations(algorithm, args)
        sides[algorithm].warm_up()
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            rounds[name].append(side())
    found = []
    for name, each in rounds.items():
        parts = {part: statistics.median(one.get(part, 0.0) for one in each) for part in PARTS}
        kept = {part: value for part, value in parts.items() if value > 0}
        whole = statistics.median(sum(one.values()) for one in each)
        found.append({"algorithm": name, "seconds": whole, "parts": kept, "rounds": each})
    return found


def table(result: dict[str, Any]) -> str:
    """Shares of the iteration in markdown."""
    found = result["iterations"]
    names = [part for part in PARTS if any(part in one["parts"] for one in found)]
    lines = ["| share of the iteration | " + " | ".join(one["algorithm"] for one in found) + " |"]
    lines += ["|---|" + "---|" * len(found)]
    for part in names:
        shares = [one["parts"].get(part, 0.0) / sum(one["parts"].values()) for one in found]
        lines.append(f"| {part} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |")
    lines.append("| seconds in all | " + " | ".join(f"{one['seconds']:.3f}" for one in found) + " |")
    return "\n".join(lines)


def draw(result: dict[str, Any], figure: Any) -> None:
    """A bar for each algorithm."""
    axes, found, labelled = figure.subplots(), result["iterations"], set()
    for row, one in enumerate(reversed(found)):
        left, whole = 0.0, sum(one["parts"].values())
        for part, value in one["parts"].items():
            label = None if part in labelled else part
            labelled.add(part)
            axes.barh(row, value, left=left, color=PARTS[part], edgecolor="white", linewidth=0.6, label=label)
            if value > 0.06 * max(sum(other["parts"].values()) for other in found):
                dark = int(PARTS[part][1:3], 16) + int(PARTS[part][3:5], 16) < 330
                axes.text(left + value / 2, row, f"{100 * value / whole:.0f} %", ha="center", va="center", fontsize=8,
                          color="white" if dark else "black")  # fmt: skip
            left += value
    axes.set_yticks(range(len(found)), [one["algorithm"] for one in reversed(found)])
    s = result["settings"]
    axes.set_xlabel("seconds of an iteration")
    title = f"{s['scenario']}, {s['num_envs']:,} x {s['steps']} frames, {s['width']} x {s['width']}, {where(result)}"
    axes.set_title(f"{title}, steps {s['mode']}, simulator {s['simulation']}", fontsize=9)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: list(PARTS).index(labels[i]))
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="outside right center", fontsize=8
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults are the committed measurement."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), help="a bar each")
    add("--scenario", default="navigation")
    add("--num-envs", type=int, default=256, help="environments")
    add("--steps", type=int, default=100, help="of each environment in a batch")
    add("--width", type=int, default=64, help="units in each of two hidden layers")
    add("--epochs", type=int, default=4, help="how often a batch is gone through")
    add("--minibatch-size", type=int, default=3200, help="frames of a minibatch")
    add("--rounds", type=int, default=5, help="iterations of each, after two that warm up")
    add_ways_to_run(parser, RESULTS / "where_time_goes.json")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    result: dict[str, Any] = {**begin(args), "iterations": measure(args)}
    write(result, args.out)
    picture(draw, result, args.out, (11, max(3.0, 1.2 + 0.7 * len(args.algorithms))))  # the legend's height
    print(table(result))


if __name__ == "__main__":
    main()
