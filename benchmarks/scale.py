"""Measures how an iteration's time and memory grow with environments, agents and the networks' width.

    python benchmarks/scale.py                                      # MAPPO, QMIX, MADDPG over all three
    python benchmarks/scale.py --algorithms mappo --axes num_envs --num-envs 1024 4096 16384 --mode compile

On each axis the other two numbers stay where they are (``--at``). Every size is a process of its own; those of an axis
take turns, an iteration each. An iteration collects a batch of ``--steps`` steps of all environments and goes through
it ``--epochs`` times in minibatches of one size (QMIX and MADDPG draw as many rows from a replay buffer of two
batches).

Memory is measured in processes of their own, by ``scale_worker.py``: the most that an iteration needs beside the
libraries, and how many times the bytes of batch, replay buffer, parameters and optimizer state that is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import MODES, RESULTS, Process, ProcessFailed, about, command_line, exponent, picture, where, write

HERE = Path(__file__).resolve().parent
AXES = {"num_envs": "environments", "n_agents": "agents", "width": "network width"}
TIMES = {"collect_seconds": "collection", "learn_seconds": "learning", "seconds": "iteration"}
COLORS = {"mappo": "#0072b2", "qmix": "#d55e00", "maddpg": "#009e73"}
ROWS = ("num_envs", "n_agents", "width")
# glibc keeps what is freed in small pieces, which is then no longer told from what is needed
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def points(args: argparse.Namespace, axis: str) -> list[dict[str, Any]]:
    """The sizes along an axis, as a worker's settings."""
    at = dict(zip(ROWS, args.at))
    common = {
        name: getattr(args, name)
        for name in ("steps", "minibatch_size", "epochs", "device", "mode", "threads")
    }
    return [{**common, "scenario": args.scenario, **at, axis: size} for size in getattr(args, axis)]


def worker(settings: dict[str, Any], args: argparse.Namespace, memory: bool) -> Process:
    """A size's process."""
    command = [sys.executable, str(HERE / "scale_worker.py"), json.dumps({**settings, "memory": memory})]
    name = f"{settings['algorithm']}, " + ", ".join(f"{settings[axis]} {what}" for axis, what in AXES.items())
    environment = {**os.environ, **(GIVE_BACK if memory else {})}
    return Process(name, command, args.threads, args.timeout, environment)


def measure(args: argparse.Namespace, algorithm: str, axis: str) -> dict[str, Any]:
    """All sizes of an axis: memory one after the other, then times in turns."""
    rows: list[dict[str, Any]] = []
    alive: list[tuple[dict[str, Any], Process]] = []
    failed: dict[str, str] = {}

    def attempt(what: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except ProcessFailed as failure:
            failed[what] = str(failure)
            return None

    for settings in points(args, axis):
        settings = {**settings, "algorithm": algorithm}
        what = f"{settings[axis]} {AXES[axis]}"
        print(f"{algorithm}, {what}", file=sys.stderr, flush=True)
        alone = attempt(f"{what}, memory", lambda s=settings: worker(s, args, True))
        if alone is not None:
            alone.finish()
        process = attempt(what, lambda s=settings: worker(s, args, False))
        if process is not None:
            row = {axis: settings[axis], "frames": process.about["frames"], "mode": process.about["mode"]}
            row |= {"gpu": process.about["gpu"], "fallback_reason": process.about["fallback_reason"]}
            row |= {"memory": alone.about["memory"] if alone is not None else None, "iterations": []}
            rows.append(row)
            alive.append((row, process))
    for _ in range(args.rounds):
        for row, process in alive:
            found = attempt(process.name, lambda p=process: p.ask())
            if found is not None:
                row["iterations"].append(found)
    for _, process in alive:
        process.finish()
    return {"algorithm": algorithm, "axis": axis, "sizes": rows, "failed": failed, **growth(rows, axis)}


def growth(rows: list[dict[str, Any]], axis: str) -> dict[str, Any]:
    """Adds each size's medians, and returns the exponents: over all sizes, and between the two largest.

    Args:
        rows (list of dict): a size each, with its ``iterations`` and ``memory``.
        axis (str): what grows.
    """
    for row in rows:
        for name in TIMES:
            values = [one[name] for one in row["iterations"]]
            row[name] = statistics.median(values) if values else None
        memory = row["memory"]
        row["peak"] = memory and memory["peak"]
        row["peak_over_needed"] = memory and memory["peak"] / memory["needed"]
    found: dict[str, dict[str, float | None]] = {"exponents": {}, "exponents_at_the_end": {}}
    for name in (*TIMES, "peak"):
        line = sorted((row[axis], row[name]) for row in rows if row[name])
        found["exponents"][name] = exponent(line) if line else None
        found["exponents_at_the_end"][name] = exponent(line[-2:]) if line else None
    return found


def table(result: dict[str, Any]) -> str:
    """Exponents, and the sizes they are of, in markdown."""
    lines = []
    for study in result["studies"]:
        what = AXES[study["axis"]]
        powers = ", ".join(
            f"{TIMES.get(name, name)} {value:.2f} (at the end {study['exponents_at_the_end'][name]:.2f})"
            for name, value in study["exponents"].items()
            if value is not None
        )
        lines += [f"{study['algorithm']} over {what}: exponents: {powers}", ""]
        lines += [
            f"| {what} | frames | collection, s | learning, s | iteration, s | peak, MB | of what is needed |"
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in study["sizes"]:
            cells = [f"{row[study['axis']]:,}", f"{row['frames']:,}"]
            cells += ["-" if row[name] is None else f"{row[name]:.3f}" for name in TIMES]
            cells += (
                ["-", "-"]
                if row["peak"] is None
                else [f"{row['peak'] / 1e6:,.1f}", f"{row['peak_over_needed']:.2f}"]
            )
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *(f"- {name} failed: {reason}" for name, reason in study["failed"].items())]
    return "\n".join(lines)


def draw(result: dict[str, Any], figure: Any) -> None:
    """A column for each axis: time above, memory below."""
    axes_found = list(dict.fromkeys(study["axis"] for study in result["studies"]))
    panels = figure.subplots(2, len(axes_found), squeeze=False)
    for column, axis in enumerate(axes_found):
        above, below = panels[:, column]
        for study in (one for one in result["studies"] if one["axis"] == axis):
            color, power = COLORS[study["algorithm"]], study["exponents"]
            timed = [row for row in study["sizes"] if row["seconds"]]
            label = study["algorithm"]
            if power["seconds"] is not None:
                label += f", exponent {power['seconds']:.2f}"
            xs = [row[axis] for row in timed]
            above.plot(xs, [row["seconds"] for row in timed], "o-", color=color, markersize=4, label=label)
            above.plot(xs, [row["collect_seconds"] for row in timed], ":", color=color, linewidth=1.2)
            weighed = [row for row in study["sizes"] if row["memory"]]
            label = study["algorithm"]
            if power["peak"] is not None:
                label += f", exponent {power['peak']:.2f}"
            xs = [row[axis] for row in weighed]
            below.plot(
                xs, [row["peak"] / 1e6 for row in weighed], "o-", color=color, markersize=4, label=label
            )
            needed = [row["memory"]["needed"] / 1e6 for row in weighed]
            below.plot(xs, needed, "--", color=color, linewidth=1)
        for panel, name in ((above, "seconds"), (below, "MB")):
            panel.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel=name)
            sizes = sorted(
                {row[axis] for study in result["studies"] if study["axis"] == axis for row in study["sizes"]}
            )
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
            panel.set_xticks([], minor=True)
            panel.grid(alpha=0.25)
            panel.legend(fontsize=8)
        above.set_title("an iteration; dotted: its collection", fontsize=9)
        below.set_title("peak memory; dashed: what is needed", fontsize=9)
    figure.suptitle(
        f"{result['settings']['scenario']}, {where(result)}, mode {result['settings']['mode']}", fontsize=10
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults are the committed measurement."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--algorithms", nargs="+", choices=list(COLORS), default=list(COLORS), help="who learns")
    add("--axes", nargs="+", choices=list(AXES), default=list(AXES), help="what grows")
    add("--num-envs", nargs="+", type=int, default=[64, 256, 1024, 4096], help="environments")
    add("--n-agents", nargs="+", type=int, default=[2, 4, 8, 16, 32, 64], help="agents")
    add(
        "--width",
        nargs="+",
        type=int,
        default=[32, 64, 128, 256, 512],
        help="units in each of two hidden layers",
    )
    add(
        "--at",
        nargs=3,
        type=int,
        default=[64, 4, 64],
        help="environments, agents and width on the other axes",
    )
    add("--scenario", default="simple_spread", help="one that takes n_agents")
    add("--steps", type=int, default=100, help="of each environment in a batch")
    add("--epochs", type=int, default=1, help="how often a batch is gone through")
    add("--minibatch-size", type=int, default=3200, help="frames of a minibatch")
    add("--rounds", type=int, default=5, help="timed iterations of each size, after two that warm up")
    add("--mode", default="eager", choices=MODES, help="of simulation and steps")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=1, help="threads of each process")
    add("--timeout", type=float, default=900.0, help="seconds a process may take to answer")
    add("--out", type=Path, default=RESULTS / "scale.json", help="results file, with a picture beside it")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    result: dict[str, Any] = {**about(vars(args)), "studies": []}
    for axis in args.axes:
        for algorithm in args.algorithms:
            result["studies"].append(measure(args, algorithm, axis))
            gpus = [row["gpu"] for row in result["studies"][-1]["sizes"] if row["gpu"]]
            result["machine"]["gpu"] = gpus[0] if gpus else None
            write(result, args.out)
    picture(draw, result, args.out, (max(5.5, 4.2 * len(args.axes)), 7))
    print(table(result))


if __name__ == "__main__":
    main()
