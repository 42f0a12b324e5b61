"""Measures how fast VMAS is simulated: tdmarl's `VmasEnv` and `Collector`, TorchRL's, and VMAS by itself.

    python benchmarks/simulate.py --scenarios balance navigation --num-envs 1024  # two cases
    python benchmarks/simulate.py --scenarios all --resume-from all.json          # goes on where it stopped
    python benchmarks/simulate.py --scenarios simple_spread --agents 2 4 8 16     # how time grows with agents

A case is a scenario with a number of environments (and of agents). Each is measured in a process of its own,
so that one that crashes or takes too long is recorded with its reason and the others go on. Contenders take
turns, and ratios are taken turn by turn. Results are written after each case, a picture at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import commit, machine, of_threads, write
from simulate_summary import ratios, summary, table, text

HERE = Path(__file__).resolve().parent
MODES = ("eager", "trace", "compile", "cudagraph")
CONTENDERS = ("tdmarl", "torchrl", "vmas")
SAME = ("device", "threads", "max_steps", "warm_cache")  # what one results file has in common
KEY = ("scenario", "num_envs", "n_agents", "modes", "contenders")
LARGEST = 2**19  # frames of a batch, which is kept in memory


def shipped() -> list[str]:
    """The names of all scenarios that VMAS ships."""
    import vmas

    return sorted([*vmas.scenarios, *vmas.debug_scenarios, *vmas.mpe_scenarios])


def measure(settings: dict[str, Any], timeout: float, warm_cache: bool) -> dict[str, Any]:
    """One case in a process of its own; a record even where that process fails.

    Args:
        settings (dict): scenario, sizes, contenders and how to measure.
        timeout (float): seconds after which the process and all that it started are killed.
        warm_cache (bool): uses what PyTorch has compiled in earlier runs.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        given, out = Path(folder, "settings.json"), Path(folder, "result.json")
        given.write_text(json.dumps(settings))
        environment = of_threads(settings["threads"], os.environ)
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        if not warm_cache:
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder, "cache"))
        worker = subprocess.Popen(
            [sys.executable, str(HERE / "simulate_worker.py"), str(given), str(out)],
            stdout=said,
            stderr=said,
            env=environment,
            start_new_session=True,  # a compiler's own processes end with it
        )
        problem = None
        try:
            if worker.wait(timeout) != 0:
                problem = f"exit code {worker.returncode}"
        except subprocess.TimeoutExpired:
            problem = f"took more than {timeout:g} s"
        finally:
            try:
                os.killpg(worker.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            worker.wait()
        result = json.loads(out.read_text()) if out.exists() else {"measured": {}, "failed": {}}
        if problem is not None:
            said.seek(0)
            words = [line for line in said.read().splitlines() if line.strip()]
            result["failed"]["process"] = f"{problem}; last said: {' | '.join(words[-3:])[-600:]}"
    case = {name: settings[name] for name in KEY}
    return {**case, "commit": commit(), **result, "ratios": ratios(result["measured"])}


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Settings of all cases, small ones first."""
    names = shipped() if args.scenarios == ["all"] else args.scenarios
    found = []
    for num_envs, n_agents, scenario in itertools.product(args.num_envs, args.agents or [None], names):
        found.append(
            {
                "scenario": scenario,
                "num_envs": num_envs,
                "n_agents": n_agents,
                "modes": args.modes,
                "contenders": args.contenders,
                "steps": max(1, min(args.steps, LARGEST // num_envs)),
                **{name: getattr(args, name) for name in ("warmup", "seconds", "repetitions")},
                **{name: getattr(args, name) for name in ("device", "threads", "max_steps")},
            }
        )
    return found


def started(args: argparse.Namespace) -> dict[str, Any]:
    """The results to add to: those of `--resume-from`, or none.

    Raises:
        ValueError: they were measured on another machine or with other settings.
    """
    common = {name: getattr(args, name) for name in SAME}
    fresh: dict[str, Any] = {"machine": machine(), "settings": common, "cases": []}
    if args.resume_from is None or not args.resume_from.exists():
        return fresh
    found = json.loads(args.resume_from.read_text())
    for part in ("machine", "settings"):
        for name, value in fresh[part].items():
            if found[part].get(name) != value:
                raise ValueError(
                    f"{args.resume_from} was measured with {name}={found[part].get(name)!r}, this run has"
                    f" {value!r}: begin a new file with --out"
                )
    return {**fresh, "cases": found["cases"]}


def is_there(case: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a record is the case of the settings."""
    return all(case[name] == settings[name] for name in KEY)


def save(result: dict[str, Any], out: Path, picture: bool = True) -> None:
    """Writes the results with their summary, and the picture beside them where matplotlib is installed."""
    result["summary"] = summary(result["cases"])
    write(result, out)
    if picture:
        try:
            from simulate_plot import plot

            plot(result, out.with_suffix(".png"))
        except ImportError as error:
            print(f"no picture: {error}", file=sys.stderr)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--scenarios", nargs="+", default=["balance"], help="names, or all (default: balance)")
    add("--num-envs", nargs="+", type=int, default=[1024], help="numbers of environments")
    add("--agents", nargs="+", type=int, help="numbers of agents (n_agents), for scenarios that take one")
    add("--modes", nargs="+", choices=MODES, default=["eager", "compile"], help="tdmarl's modes")
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="who is measured")
    add("--max-steps", type=int, help="time limit; default: episodes end where the scenario ends them")
    add("--repetitions", type=int, default=5, help="turns of each contender")
    add("--seconds", type=float, default=1.0, help="length of a turn; at least one batch is made")
    add("--steps", type=int, default=32, help="steps in a batch; fewer where that is too large or slow")
    add("--warmup", type=int, default=100, help="steps before the first turn, in at most ten turns' time")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=1, help="threads of each contender")
    add("--timeout", type=float, default=1800.0, help="seconds that a case may take, compiling included")
    add("--warm-cache", action="store_true", help="use what was compiled before: no first compile times")
    add("--out", type=Path, help="results file (default: --resume-from, or results/simulate.json)")
    add("--resume-from", type=Path, help="results to add to; the cases that are there are left out")
    add("--retry", action="store_true", help="measure again the cases that are there with a failure")
    args = parser.parse_args(arguments)
    args.out = args.out or args.resume_from or HERE / "results" / "simulate.json"
    return args


def main(arguments: list[str] | None = None) -> int:
    """Measures what is not there yet; returns the exit code."""
    args = parse(arguments)
    try:
        result = started(args)
    except ValueError as error:
        print(f"simulate.py: error: {error}", file=sys.stderr)
        return 2
    wanted = cases(args)
    for place, settings in enumerate(wanted, 1):
        known = [case for case in result["cases"] if is_there(case, settings)]
        if known and not (args.retry and known[0]["failed"]):
            continue
        agents = "" if settings["n_agents"] is None else f", {settings['n_agents']} agents"
        print(
            f"{place} of {len(wanted)}: {settings['scenario']}, {settings['num_envs']} environments{agents}",
            file=sys.stderr,
            flush=True,
        )
        case = measure(settings, args.timeout, args.warm_cache)
        result["cases"] = [other for other in result["cases"] if other not in known] + [case]
        save(result, args.out, picture=False)
        print(table([case]), file=sys.stderr, flush=True)
    save(result, args.out)
    print(table(result["cases"]))
    print(text(result["summary"]))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the worker too
    sys.exit(main())
