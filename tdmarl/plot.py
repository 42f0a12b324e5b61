"""Learning curves of runs as a picture: ``python -m tdmarl.plot RUN_DIR... --out curve.png``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdmarl.log import read_config, read_metrics

Curve = tuple[list[float], list[float]]


def curve(run_dir: str | Path, column: str) -> Curve:
    """The frames and the values of a column of a run's ``metrics.csv``, where it was measured.

    Args:
        run_dir (str or Path): the run's folder.
        column (str): the column, such as ``"eval_return_mean_agents"``.

    Raises:
        ValueError: if the folder holds no run, no rows yet, or no such column.
    """
    read_config(run_dir)
    path = Path(run_dir, "metrics.csv")
    rows = read_metrics(path) if path.is_file() else []
    if not rows:
        raise ValueError(f"{run_dir} has no iterations yet: there is nothing to draw")
    if column not in rows[0]:
        raise ValueError(f"{path} has no column {column!r}; it has {', '.join(rows[0])}")
    measured = [row for row in rows if row[column]]
    return [float(row["frames"]) for row in measured], [float(row[column]) for row in measured]


def plot(run_dirs: Sequence[str | Path], out: str | Path, column: str = "return_mean_agents") -> None:
    """Draws a column over frames, one color per run: while training (thin) and as evaluated (dots).

    Args:
        run_dirs (sequence of str or Path): the runs' folders.
        out (str or Path): the picture's file; its ending chooses the format.
        column (str): the column; the one of the same name with ``eval_`` before it is the evaluated one.
    """
    curves = {str(run_dir): _curves(run_dir, column) for run_dir in run_dirs}
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures are drawn by the package matplotlib: pip install matplotlib") from error

    figure = Figure(figsize=(8, 5), layout="constrained")  # without pyplot: no display, no global state
    axes: Any = figure.add_subplot()
    for index, (run_dir, (training, evaluated)) in enumerate(curves.items()):
        color, label = f"C{index % 10}", Path(run_dir).resolve().name
        if evaluated[0]:
            axes.plot(*training, color=color, linewidth=1, alpha=0.5)
            axes.plot(*evaluated, color=color, linewidth=2, marker="o", markersize=4, label=label)
        else:
            axes.plot(*training, color=color, linewidth=1.5, label=label)
    both = any(evaluated[0] for _, evaluated in curves.values())
    axes.set_xlabel("frames (environment steps)")
    axes.set_ylabel(_title(column))
    alone = "evaluated" if column.startswith("eval_") else "while exploring"
    axes.set_title("thin: while exploring;  dots: evaluated" if both else alone, fontsize=10)
    axes.xaxis.set_major_formatter(_frames)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(out, dpi=150)


def _curves(run_dir: str | Path, column: str) -> tuple[Curve, Curve]:
    training = curve(run_dir, column)
    evaluated = f"eval_{column}"
    has_evaluated = evaluated in read_metrics(Path(run_dir, "metrics.csv"))[0]
    return training, curve(run_dir, evaluated) if has_evaluated else ([], [])


def _title(column: str) -> str:
    known = {
        "return_mean_agents": "episode return, mean over agents",
        "return_sum_agents": "episode return, sum over agents",
    }
    return known.get(column, column)


def _frames(value: float, position: int | None = None) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code.

    Args:
        argv (sequence of str, optional): the arguments. Default: the command line's.
    """
    parser = argparse.ArgumentParser(prog="python -m tdmarl.plot", description=__doc__)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="folder of a run")
    parser.add_argument("--out", default="curve.png", help="the picture's file (default: curve.png)")
    parser.add_argument(
        "--column", default="return_mean_agents", help="column of metrics.csv (default: return_mean_agents)"
    )
    options = parser.parse_args(argv)
    try:
        plot(options.run_dirs, options.out, options.column)
    except (ValueError, ImportError, OSError) as error:
        print(f"tdmarl.plot: error: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
