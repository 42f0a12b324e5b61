"""What a run writes down besides its checkpoints: its configuration, its metrics, its progress.

Every run keeps ``config.json`` and ``metrics.csv``, whatever else it logs to. Metrics are computed where the
data is; one transfer per iteration brings them to the host.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
import math
import netrc
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import (
    Binary, Bounded, Categorical, Composite, MultiCategorical, MultiOneHot, OneHot, TensorSpec, Unbounded,
)

from tdmarl import compiling
from tdmarl.keys import unbatched

Value = float | int | None

COLUMNS = (
    "iteration", "frames", "seconds", "frames_per_second",
    "return_mean_agents", "return_sum_agents", "eval_return_mean_agents", "eval_return_sum_agents",
    "eval_length",
)
SPECS = (Composite, Bounded, Unbounded, MultiCategorical, MultiOneHot, OneHot, Binary, Categorical)
PARAMETERS = "norm of the policy's parameters"
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def to_host(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Brings scalars to the host in one transfer.

    Args:
        values (mapping of str to Tensor): one element each; several, as of seeds, are averaged. Float64 holds
            every float32 and every count below 2**53 exactly.
    """
    if not values:
        return {}
    device = next(iter(values.values())).device
    scalars = [value.detach().to(device, torch.float64).mean() for value in values.values()]
    stacked = torch.stack(scalars)  # [entries]
    return dict(zip(values, stacked.tolist(), strict=True))


def episode_returns(batch: TensorDictBase) -> dict[str, Tensor]:
    """Sums up the episodes that ended within a batch, on the batch's device.

    ``return_mean_agents`` and ``return_sum_agents`` are undiscounted returns averaged and summed over all
    agents (of all groups), then averaged over the episodes that ended; NaN when none did. With several groups
    each has its ``return_<group>``, the average over its agents. ``episodes`` counts the episodes.

    Args:
        batch (TensorDictBase): ``[E, T]``, with ``("next", group, "episode_reward")``, ``("next", "done")``.
    """
    following = batch.get("next")
    ended = following.get("done").squeeze(-1)  # [E, T]
    episodes = ended.sum()
    sums, agents = {}, {}
    for group in sorted(key for key, value in following.items() if isinstance(value, TensorDictBase)):
        reward = following.get((group, "episode_reward"), None)  # [E, T, n, 1]
        if reward is None:
            continue
        total = reward.sum((-2, -1))  # [E, T]
        sums[group] = torch.where(ended, total, torch.zeros_like(total)).sum() / episodes
        agents[group] = reward.shape[-2]
    if not sums:
        return {"episodes": episodes}
    total = torch.stack(list(sums.values())).sum()
    values = {"return_mean_agents": total / sum(agents.values()), "return_sum_agents": total}
    if len(sums) > 1:
        values |= {f"return_{group}": value / agents[group] for group, value in sums.items()}
    return values | {"episodes": episodes}


def evaluation_means(returns: TensorDictBase | None) -> dict[str, Tensor]:
    """Averages what ``evaluate`` returns over its episodes; every name gets the prefix ``eval_``.

    Args:
        returns (TensorDictBase or None): ``[episodes]``; ``[episodes, n]`` under each group's name.
    """
    if returns is None:
        return {}
    means: dict[str, Tensor] = {}
    groups: dict[str, Tensor] = {}
    for name, value in sorted(returns.items()):
        kind = groups if value.ndim > 1 else means
        kind[name] = value.to(torch.float64).mean()
    if len(groups) > 1:  # with a single group it would be return_mean_agents again
        means |= {f"return_{group}": value for group, value in groups.items()}
    return {f"eval_{name}": value for name, value in means.items()}


def not_finite(values: Mapping[str, float]) -> str | None:
    """Names the first loss, gradient norm or parameter norm that is NaN or infinite; None where all is well.

    Args:
        values (mapping of str to float): an iteration's entries.
    """
    for name, value in values.items():
        if not math.isfinite(value) and any(word in name for word in ("loss", "grad_norm", PARAMETERS)):
            return f"{name} is {value}"
    return None


def _cell(value: Value) -> str:
    if value is None or math.isnan(value):
        return ""
    return str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else repr(value)


class Table:
    """Keeps a csv file of one row per iteration whose columns may grow, readable whenever the process dies.

    Args:
        path (Path): the file.
        columns (iterable of str): the first columns; others follow in the order in which they first appear.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.csv")
        >>> table = Table(path, ["iteration"])
        >>> table.append({"iteration": 1, "loss": 0.5}); table.append({"iteration": 2})
        >>> path.read_text().split()
        ['iteration,loss', '1,0.5', '2,']
    """

    def __init__(self, path: Path, columns: Iterable[str] = COLUMNS) -> None:
        self.path = path
        self.columns = list(columns)
        if path.exists():
            self.columns = path.read_text().split("\n")[0].split(",")

    def append(self, row: Mapping[str, Value]) -> None:
        """Adds a row; NaN and entries that it lacks become empty cells.

        Args:
            row (mapping of str to number): the row's entries.
        """
        new = [name for name in row if name not in self.columns]
        if new or not self.path.exists():
            self.columns += new
            self._rewrite(read_metrics(self.path) if self.path.exists() else [])
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([_cell(row.get(name)) for name in self.columns])
            file.flush()
            os.fsync(file.fileno())  # no checkpoint may be on the disk before its row

    def cut(self, iteration: int) -> None:
        """Drops the rows after an iteration, and a last row that a killed process left unfinished.

        Args:
            iteration (int): the last iteration to keep.
        """
        if self.path.exists():
            rows = [row for row in read_metrics(self.path) if int(row["iteration"]) <= iteration]
            self._rewrite(rows)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue())


def read_metrics(path: str | Path) -> list[dict[str, str]]:
    """The complete rows of a ``metrics.csv``, as written; an unfinished last one is left out.

    Args:
        path (str or Path): the file.
    """
    lines = Path(path).read_text().split("\n")[:-1]  # what follows the last line end is unfinished
    return list(csv.DictReader(lines))


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file's text so that a reader, also after a crash, finds the old text or the new one.

    Args:
        path (Path): the file.
        text (str): its new text.
    """
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def check_tracker(kind: str) -> None:
    """Raises ImportError with the command to type when a tracker's package is missing.

    Args:
        kind (str): ``"csv"``, ``"none"``, ``"tensorboard"``, ``"wandb"`` or ``"mlflow"``.
    """
    package = PACKAGES.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ImportError(f"--logger {kind} needs the package {package}: pip install {package}")


def open_tracker(kind: str, folder: Path, identity: str, config: Mapping[str, Any]) -> Any:
    """Opens the TorchRL logger that a run sends its rows to, continuing what its earlier part sent.

    Weights & Biases logs offline, into the folder, where no account is set up; it never asks for one.
    ``WANDB_MODE`` and ``MLFLOW_TRACKING_URI`` have the last word.

    Args:
        kind (str): the tracker, as in ``check_tracker``.
        folder (Path): the run's folder; its name is the run's name.
        identity (str): the run's id, the same after a resume.
        config (mapping): the run's options.
    """
    check_tracker(kind)
    logger: Any = None
    if kind == "tensorboard":
        from torchrl.record.loggers.tensorboard import TensorboardLogger

        logger = TensorboardLogger(exp_name="tensorboard", log_dir=str(folder))
    elif kind == "wandb":
        from torchrl.record.loggers.wandb import WandbLogger

        logger = WandbLogger(
            exp_name=folder.name, save_dir=str(folder), project="tdmarl", id=identity, log_env_packages=False,
            mode=os.environ.get("WANDB_MODE") or ("online" if _has_wandb_account() else "offline"),
            settings={"silent": True, "disable_git": True, "disable_code": True},
        )
        logger.log_hparams(dict(config))
    elif kind == "mlflow":
        import mlflow
        from torchrl.record.loggers.mlflow import MLFlowLogger

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        name = f"{folder.name}-{identity}"
        mlflow.set_tracking_uri(uri)
        before = mlflow.get_experiment_by_name(name)
        if before is not None:  # what start_run continues is told by a variable
            runs = mlflow.MlflowClient().search_runs([before.experiment_id], max_results=1)
            os.environ.update({"MLFLOW_RUN_ID": run.info.run_id for run in runs})
        logger = MLFlowLogger(exp_name=name, tracking_uri=uri)
    return logger


def track(logger: Any, row: Mapping[str, Value]) -> None:
    """Sends the measured entries of a row to a tracker, at the row's frames.

    Args:
        logger (Logger or None): what ``open_tracker`` returned.
        row (mapping of str to number): the row.
    """
    if logger is not None:
        measured = {name: value for name, value in row.items() if value is not None and not math.isnan(value)}
        logger.log_metrics(measured, step=int(row["frames"] or 0))


def close_tracker(logger: Any) -> None:
    """Ends a tracker's run so that nothing of it is lost when the process exits.

    Args:
        logger (Logger or None): what ``open_tracker`` returned.
    """
    kind = type(logger).__name__
    if kind == "WandbLogger":
        logger.experiment.finish()
    elif kind == "TensorboardLogger":
        logger.experiment.close()
    elif kind == "MLFlowLogger":
        import mlflow

        mlflow.end_run()


def _has_wandb_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)


class Bar:
    """Shows on a terminal how far a run is, how fast, and how well, and what is being compiled; nothing elsewhere.

    Args:
        shown (bool): whether it is wanted.
        description (str): what stands before it.
        total (int): frames of the whole run.
        initial (int): frames done before, by an earlier part of the run.
    """

    NAMES = {"return": "return_mean_agents", "evaluation": "eval_return_mean_agents"}

    def __init__(self, shown: bool, description: str, total: int, initial: int) -> None:
        self.bar: Any = None
        self.values: dict[str, Value] = {}
        self.clock = compiling.Clock(self.say)
        if shown and sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
            from tqdm import tqdm

            self.bar = tqdm(
                total=total, initial=initial, desc=description, unit_scale=True, dynamic_ncols=True,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
                "[{elapsed}<{remaining}{postfix}]",
            )

    def say(self, text: str) -> None:
        """Shows what takes time, such as compiling, in place of the last row."""
        if self.bar is not None:
            self.bar.set_postfix_str(text)

    def compiled(self) -> dict[str, Value]:
        """The entry ``compile_seconds`` of a row: what was spent since the last one; none if nothing was compiled."""
        seconds = self.clock.lap()
        return {"compile_seconds": round(seconds, 3)} if seconds else {}

    def advance(self, row: Mapping[str, Value]) -> None:
        """Moves to a row's frames and shows its speed and the returns last measured.

        Args:
            row (mapping of str to number): the row.
        """
        if self.bar is None:
            return
        measured = {short: row.get(name) for short, name in self.NAMES.items()}
        self.values |= {short: x for short, x in measured.items() if x is not None and not math.isnan(x)}
        shown = [f"{row['frames_per_second']:,.0f} frames/s"]
        shown += [f"{short} {self.values[short]:.3g}" for short in self.NAMES if short in self.values]
        self.bar.set_postfix_str(", ".join(shown), refresh=False)
        self.bar.update(int(row["frames"] or 0) - self.bar.n)

    @property
    def gap(self) -> str:
        """What must stand before other text on the terminal so that it does not share the bar's line."""
        return "" if self.bar is None else "\n"

    def close(self) -> None:
        """Leaves the last line on the terminal."""
        self.clock.stop()
        if self.bar is not None:
            self.bar.close()


def describe(
    options: Any, device: torch.device, algorithm: str, arguments: Mapping[str, Any], env: Any
) -> dict[str, Any]:
    """Everything needed to run a program again and to rebuild its policy, as it stands in ``config.json``.

    Args:
        options (dataclass): the run's options.
        device (torch.device): what ``options.device`` came to.
        algorithm (str): the algorithm's name.
        arguments (mapping): its keyword arguments; what JSON cannot hold is kept as the name of its type.
        env (EnvBase): read for its specs.
    """
    packages = ("torch", "torchrl", "tensordict", "vmas", "numpy", "tdmarl")
    return {
        "id": uuid.uuid4().hex[:8],
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": sys.argv,
        "algorithm": {"name": algorithm, "arguments": plain_arguments(arguments)},
        "options": stored_options(options),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),  # how a sum is split changes its last bits
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "commit": _commit(Path(sys.argv[0]).resolve().parent),
        "specs": describe_specs(env),
    }


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """An algorithm's keyword arguments as JSON; what it cannot hold as ``{"custom": <its type>}``.

    Args:
        arguments (mapping): the arguments.
    """
    return {name: _plain(value) for name, value in arguments.items()}


def stored_options(options: Any) -> dict[str, Any]:
    """A run's options as they are kept: all but where to resume from.

    Args:
        options (dataclass): the options.
    """
    return {name: value for name, value in dataclasses.asdict(options).items() if name != "resume"}


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes a run's ``config.json``.

    Args:
        folder (Path): the run's folder.
        config (mapping): what ``describe`` gave.
    """
    write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a run's folder; ValueError where the folder is not one of a run.

    Args:
        folder (str or Path): the run's folder.
    """
    path = Path(folder, "config.json")
    if not path.is_file():
        near = sorted(str(other.parent) for other in Path(folder).parent.glob("*/config.json"))[-3:]
        hint = f"; beside it are {', '.join(near)}" if near else ""
        raise ValueError(f"{folder} is not the folder of a run: it has no config.json{hint}")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or not {"algorithm", "options", "specs"} <= set(config):
        raise ValueError(f"{path} was not written by a run: it lacks algorithm, options or specs")
    return config


def describe_specs(env: Any) -> dict[str, Any]:
    """An environment's groups and unbatched specs in plain JSON, enough to build an algorithm for it.

    Args:
        env (EnvBase): the environment.
    """
    names = ("observation_spec", "full_action_spec", "full_reward_spec", "full_done_spec")
    dims = len(env.batch_size)
    return {
        "group_map": {group: list(agents) for group, agents in env.group_map.items()},
        **{name: describe_spec(unbatched(getattr(env, name), dims)) for name in names},
    }


def describe_spec(spec: TensorSpec) -> dict[str, Any]:
    """A spec in plain JSON. Entries of other types than ``SPECS`` are left out: no network reads them.

    Args:
        spec (TensorSpec): of one of the types in ``SPECS``.
    """
    kind, shape = next(kind.__name__ for kind in SPECS if isinstance(spec, kind)), list(spec.shape)
    if isinstance(spec, Composite):
        kept = {name: entry for name, entry in spec.items() if isinstance(entry, SPECS)}
        return {"kind": kind, "shape": shape, "entries": {name: describe_spec(kept[name]) for name in kept}}
    plain: dict[str, Any] = {"kind": kind, "shape": shape, "dtype": str(spec.dtype).removeprefix("torch.")}
    if isinstance(spec, Bounded):  # as text: JSON has no infinity
        plain |= {side: str(getattr(spec.space, side).tolist()) for side in ("low", "high")}
    elif isinstance(spec, (MultiCategorical, MultiOneHot)):
        plain["nvec"] = torch.as_tensor(spec.nvec).tolist()
    elif isinstance(spec, (OneHot, Categorical)) and not isinstance(spec, Binary):
        plain["n"] = int(spec.n)
    return plain


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return {"custom": type(value).__name__}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """The git commit of the running program, marked when files differ from it; None outside a repository."""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
