"""What the cases of `simulate.py` say together: ratios, growth over environments and agents, a table."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from measuring import exponent

Case = dict[str, Any]
STOCK = ("torchrl", "vmas")
FROM_ENVIRONMENTS = 1000  # below, a step costs what it costs with one environment
FEW_AGENTS = 16


def ratios(contenders: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """How many times the frames per second of each other contender ours has: median, least, greatest.

    Turns that follow each other are compared, so that load by others meets both; `cpu` is the ratio of frames
    per second of processor time.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for ours, stock in itertools.product(contenders, STOCK):
        if ours in STOCK or stock not in contenders:
            continue
        pairs = list(zip(contenders[ours]["repetitions"], contenders[stock]["repetitions"]))
        by_clock, by_cpu = (
            [mine["frames"] / mine[unit] * other[unit] / other["frames"] for mine, other in pairs]
            for unit in ("seconds", "cpu_seconds")
        )
        found.setdefault(ours, {})[stock] = {
            "median": statistics.median(by_clock),
            "least": min(by_clock),
            "greatest": max(by_clock),
            "cpu": statistics.median(by_cpu),
        }
    return found


def summary(cases: list[Case]) -> dict[str, Any]:
    """Medians over scenarios, what did not run compiled, and the exponents of growth."""
    return {
        "over_scenarios": _over_scenarios([case for case in cases if case["n_agents"] is None]),
        "over_environments": _over_environments(cases),
        "over_agents": _over_agents([case for case in cases if case["n_agents"] is not None]),
    }


def _over_scenarios(cases: list[Case]) -> list[dict[str, Any]]:
    found = []
    for num_envs in sorted({case["num_envs"] for case in cases}):
        mine = [case for case in cases if case["num_envs"] == num_envs]
        for name in dict.fromkeys(name for case in mine for name in case["measured"] if name not in STOCK):
            row: dict[str, Any] = {"num_envs": num_envs, "contender": name}
            for stock in STOCK:
                compared = {
                    case["scenario"]: case["ratios"][name][stock]["median"]
                    for case in mine
                    if stock in case["ratios"].get(name, {})
                }
                if compared:
                    least = min(compared, key=lambda scenario: compared[scenario])
                    row[stock] = {
                        "scenarios": len(compared),
                        "median": statistics.median(compared.values()),
                        "least": {least: compared[least]},
                        "below_1": sorted(scenario for scenario, ratio in compared.items() if ratio < 1),
                    }
            about = {case["scenario"]: case["measured"].get(name) for case in mine}
            row["in_its_mode"] = sum(
                one is not None and one["mode"] == name.removeprefix("tdmarl ") for one in about.values()
            )
            row["fell_back"] = {
                scenario: one["fallback_reason"]
                for scenario, one in about.items()
                if one is not None and one.get("fallback_reason")
            }
            row["failed"] = {
                case["scenario"]: reason
                for case in mine
                for who, reason in case["failed"].items()
                if who in (name, "process")
            }
            found.append(row)
    return found


def _over_environments(cases: list[Case]) -> list[dict[str, Any]]:
    found = []
    keys = dict.fromkeys((case["scenario"], case["n_agents"]) for case in cases)
    for scenario, n_agents in keys:
        mine = [case for case in cases if (case["scenario"], case["n_agents"]) == (scenario, n_agents)]
        for name, points in _points(mine, "num_envs", "seconds_per_step").items():
            large = [point for point in points if point[0] >= FROM_ENVIRONMENTS]
            power = exponent(large)
            if power is not None:
                sizes = sorted(x for x, _ in large)
                row = {"scenario": scenario, "n_agents": n_agents, "contender": name}
                found.append({**row, "num_envs": sizes, "time_exponent": power})
    return found


def _over_agents(cases: list[Case]) -> list[dict[str, Any]]:
    found = []
    keys = dict.fromkeys((case["scenario"], case["num_envs"]) for case in cases)
    for scenario, num_envs in keys:
        mine = [case for case in cases if (case["scenario"], case["num_envs"]) == (scenario, num_envs)]
        for name, points in _points(mine, "n_agents", "seconds_per_step").items():
            row = {"scenario": scenario, "num_envs": num_envs, "contender": name}
            row["n_agents"] = sorted(x for x, _ in points)
            columns = {
                "time": points,
                "operations": _points(mine, "n_agents", "operations").get(name, []),
                "compile": _points(mine, "n_agents", "compile_seconds").get(name, []),
            }
            for column, values in columns.items():
                few = [point for point in values if point[0] <= FEW_AGENTS]
                row[f"{column}_exponent_to_{FEW_AGENTS}"] = exponent(few) if few else None
                row[f"{column}_exponent"] = exponent(values) if values else None
            found.append(row)
    return found


def _points(cases: list[Case], x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    """For each contender, its points in the cases where it was measured."""
    found: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        for name, one in case["measured"].items():
            if one.get(y):
                found.setdefault(name, []).append((case[x], one[y]))
    return found


def table(cases: list[Case]) -> str:
    """The cases as a markdown table, failures and fallbacks below it.

    Frames/s are medians over the turns, ratios medians of the turns' ratios.
    """
    names = list(dict.fromkeys(name for case in cases for name in case["measured"]))
    ours = [name for name in names if name not in STOCK]
    compiled = [n for n in ours if any("operations" in case["measured"].get(n, {}) for case in cases)]
    titles = ["scenario", "environments", "agents", *(f"{name}, frames/s" for name in names)]
    titles += [f"{name} : {stock}" for name, stock in itertools.product(ours, STOCK)]
    titles += [f"{name}, {what}" for name, what in itertools.product(compiled, ("compile s", "operations"))]
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for case in cases:
        agents = sum(case.get("groups", {}).values())
        row = [case["scenario"], f"{case['num_envs']:,}", str(agents or "-")]
        row += [_cell(case["measured"], name, "frames_per_second", form=",.0f") for name in names]
        for name, stock in itertools.product(ours, STOCK):
            row.append(_cell(case["ratios"], name, stock, "median", form=".2f"))
        for name in compiled:
            row.append(_cell(case["measured"], name, "compile_seconds", form=".1f"))
            row.append(_cell(case["measured"], name, "operations", form=",d"))
        lines.append("| " + " | ".join(row) + " |")
    lines.append("")
    for case in cases:
        where = f"{case['scenario']}, {case['num_envs']:,} environments"
        lines += [f"- {where}: {name} failed: {reason}" for name, reason in case["failed"].items()]
        for name, one in case["measured"].items():
            if one.get("fallback_reason"):
                lines.append(f"- {where}: {name} ran eagerly: {one['fallback_reason']}")
    return "\n".join(lines)


def _cell(entry: Any, *keys: str, form: str) -> str:
    """A number from nested entries, or a dash where it was not measured."""
    for key in keys:
        if key not in entry:
            return "-"
        entry = entry[key]
    return format(entry, form)


def text(found: dict[str, Any]) -> str:
    """A summary in a line per number of environments and contender, or per scenario that grows."""
    lines = []
    for row in found["over_scenarios"]:
        parts = [f"{row['in_its_mode']} scenarios in their mode"]
        for stock in STOCK:
            if stock in row:
                ((name, least),) = row[stock]["least"].items()
                parts.append(
                    f"{row[stock]['median']:.2f} x {stock} (median of {row[stock]['scenarios']};"
                    f" least {least:.2f}, {name}; {len(row[stock]['below_1'])} below 1)"
                )
        parts += [f"{len(row['fell_back'])} fell back", f"{len(row['failed'])} failed"]
        lines.append(f"{row['contender']}, {row['num_envs']:,} environments: {'; '.join(parts)}")
    for row in found["over_environments"]:
        sizes = row["num_envs"]
        lines.append(
            f"{row['scenario']}, {row['contender']}: time over environments, {sizes[0]:,} to {sizes[-1]:,}:"
            f" exponent {row['time_exponent']:.2f}"
        )
    for row in found["over_agents"]:
        powers_of = {name: value for name, value in row.items() if "exponent" in name and value is not None}
        powers = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in powers_of.items())
        lines.append(f"{row['scenario']}, {row['contender']}: over {row['n_agents']} agents: {powers}")
    return "\n".join(lines)
