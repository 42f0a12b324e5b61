"""Draws the results of `simulate.py`: ratios per scenario, frames/s over environments, time over agents.

    python benchmarks/simulate_plot.py RESULTS.json [PICTURE.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from simulate_summary import STOCK

Case = dict[str, Any]
COLORS = {
    "tdmarl cudagraph": "#d55e00",
    "tdmarl compile": "#0072b2",
    "tdmarl trace": "#cc79a7",
    "tdmarl eager": "#56b4e9",
    "torchrl": "#777777",
    "vmas": "#111111",
}
LINES = ("-", "--", ":")
MARKERS = ("o", "s", "^")
DOT = {"linestyle": "", "marker": "o", "markersize": 4, "color": "white", "markeredgecolor": "#111111"}
FIRST = ("balance", "simple_spread", "navigation")  # in a panel of lines, where there are more than it holds


def plot(result: dict[str, Any], out: str | Path) -> None:
    """Draws what the results have; panels without data are left out.

    Args:
        result (dict): what `simulate.py` writes.
        out (str or Path): the picture's file; its ending chooses the format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures are drawn by the package matplotlib: pip install matplotlib") from error

    plain = [case for case in result["cases"] if case["n_agents"] is None]
    agents = [case for case in result["cases"] if case["n_agents"] is not None]
    compared = _most_scenarios([case for case in plain if case["ratios"] or case["failed"]])
    growing = _growing(plain, "num_envs"), _growing(agents, "n_agents")
    lines = [bool(cases) for cases in growing]
    if not (compared or any(lines)):
        return
    ours = list(dict.fromkeys(name for case in compared for name in case["ratios"]))
    height = 1.8 + len(compared) * (0.08 + 0.1 * max(1, len(ours)))
    right = sum(lines)
    width = (8 if compared else 0) + (6 if right else 0)
    figure = Figure(figsize=(width, max(4.2 * max(1, right), height)), layout="constrained")
    left: Any = figure
    aside: Any = figure
    if compared and right:
        both: Any = figure.subfigures(1, 2, width_ratios=(8, 6))
        left, aside = both
    about = f"{result['machine']['cpu']}, {result['settings']['threads']} thread(s)"
    gpus = {case.get("gpu") for case in result["cases"]} - {None}
    if compared:
        _bars(left.subplots(), compared, ours, ", ".join(sorted(gpus)) or about)
    if right:
        panels = iter(aside.subplots(right, 1, squeeze=False).flat)
        if lines[0]:
            axes = next(panels)
            _lines(axes, growing[0], "num_envs", "frames_per_second")
            axes.set(xlabel="environments", ylabel="frames/s (environment steps)")
            axes.set_title("Frames per second over environments", fontsize=10)
        if lines[1]:
            axes = next(panels)
            _lines(axes, growing[1], "n_agents", "seconds_per_step")
            axes.set(xlabel="agents", ylabel="seconds per step of all environments")
            sizes = sorted({case["num_envs"] for case in growing[1]})
            sizes_text = ", ".join(f"{size:,}" for size in sizes)
            axes.set_title(f"Time over agents, {sizes_text} environments", fontsize=10)
    figure.savefig(out, dpi=130)


def _most_scenarios(cases: list[Case]) -> list[Case]:
    """The cases of the number of environments with the most scenarios; of several, the largest."""
    sizes = sorted({case["num_envs"] for case in cases})
    groups = [[case for case in cases if case["num_envs"] == size] for size in reversed(sizes)]
    return max(groups, key=len, default=[])


def _growing(cases: list[Case], x: str) -> list[Case]:
    """The cases of up to three scenarios, those that were measured at the most sizes."""
    measured = [case for case in cases if case["measured"]]
    sizes = {name: {case[x] for case in measured if case["scenario"] == name} for name in _names(measured)}
    names = [name for name in sizes if len(sizes[name]) > 1]
    order = {name: place for place, name in enumerate(FIRST)}
    names.sort(key=lambda name: (-len(sizes[name]), order.get(name, len(FIRST)), name))
    return [case for case in cases if case["scenario"] in names[: len(LINES)]]


def _names(cases: list[Case]) -> list[str]:
    return list(dict.fromkeys(case["scenario"] for case in cases))


def _bars(axes: Any, cases: list[Case], ours: list[str], machine: str) -> None:
    """One bar per scenario and mode: how many times TorchRL's speed; a dot: how many times VMAS's own."""

    def best(case: Case) -> float:
        found = [stock["torchrl"]["median"] for stock in case["ratios"].values() if "torchrl" in stock]
        return max(found, default=0.0)

    cases = sorted(cases, key=best)
    thickness = 0.8 / max(1, len(ours))
    dots = False
    for place, name in enumerate(ours):
        offset = 0.4 - thickness * (place + 0.5)
        color, label = COLORS.get(name, "#009e73"), name
        for row, case in enumerate(cases):
            found = case["ratios"].get(name, {})
            fell_back = bool(case["measured"].get(name, {}).get("fallback_reason"))
            if "torchrl" in found:
                value = found["torchrl"]["median"]
                axes.barh(
                    row + offset,
                    value - 1,
                    left=1,
                    height=thickness,
                    color="none" if fell_back else color,
                    edgecolor=color,
                    hatch="////" if fell_back else None,
                    linewidth=0.5,
                    label=label,
                )
                label = "_"
            if "vmas" in found:
                axes.plot(found["vmas"]["median"], row + offset, zorder=3, **DOT)
                dots = True
    for row, case in enumerate(cases):
        if not case["ratios"]:
            axes.text(1.02, row, "not measured beside tdmarl", va="center", fontsize=7, color="#777777")
    if dots:
        axes.plot([], [], **DOT, label="against raw VMAS")
    axes.axvline(1, color="#111111", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(axes.get_xlim()[0] / 1.1, axes.get_xlim()[1] * 1.1)
    ticks = _ticks(*axes.get_xlim())
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(cases)), [case["scenario"] for case in cases], fontsize=8)
    axes.set_ylim(-0.6, len(cases) - 0.4)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.set_xlabel("times as many frames/s as TorchRL's VmasEnv and Collector (hatched: ran eagerly)")
    axes.set_title(f"{cases[0]['num_envs']:,} environments, {machine}", fontsize=10)
    axes.legend(frameon=True, framealpha=0.9, fontsize=8, loc="lower right")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within the limits of a logarithmic axis, at most ten where it can be done."""
    for digits in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        found = [float(f"{digit}e{power}") for power in range(-4, 7) for digit in digits]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) <= 10:
            break
    return found


def _lines(axes: Any, cases: list[Case], x: str, y: str) -> None:
    """A line per scenario and contender."""
    names = list(dict.fromkeys(name for case in cases for name in case["measured"]))
    for name in sorted(names, key=lambda name: (name in STOCK, name)):
        axes.plot([], [], color=COLORS.get(name, "#009e73"), linewidth=3, label=name)
    for place, scenario in enumerate(_names(cases)):
        style = dict(linestyle=LINES[place], marker=MARKERS[place], markersize=4)
        axes.plot([], [], color="#111111", linewidth=1, label=scenario, **style)
        for name in names:
            points = sorted(
                (case[x], case["measured"][name][y])
                for case in cases
                if case["scenario"] == scenario and name in case["measured"]
            )
            axes.plot(*zip(*points), color=COLORS.get(name, "#009e73"), linewidth=1.5, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({case[x] for case in cases})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
    axes.grid(alpha=0.25)
    axes.legend(frameon=True, framealpha=0.9, fontsize=8)


if __name__ == "__main__":
    results = Path(sys.argv[1])
    plot(json.loads(results.read_text()), sys.argv[2] if len(sys.argv) > 2 else results.with_suffix(".png"))
