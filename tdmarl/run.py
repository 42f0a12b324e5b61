"""A training run around a recipe's own loop: its options, its command line, its folder, its resume.

A recipe writes the loop; ``Run`` keeps the folder beside it, and ``launch`` turns a command line into options
and errors into exit codes. Neither knows an algorithm.

    with tdmarl.Run(options, algorithm="mappo", arguments=arguments, env=env, policy=algo.policy,
                    learner=algo.learner, collector=collector) as run:
        for batch in collector:
            metrics = algo.learner(batch)
            returns = tdmarl.evaluate(env, algo.policy, episodes=64) if run.evaluates() else None
            run.log(batch, metrics, returns)
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.checkpoint import Checkpoint, GlobalRNGState, StateDictCheckpointAdapter

from tdmarl import log, seeds
from tdmarl.options import Options, flag

OVERRIDABLE = (
    "total_frames", "logger", "progress", "device", "eval_every", "eval_episodes", "checkpoint_every",
)


class Diverged(RuntimeError):
    """Says that a loss, a gradient or a parameter is no number any more; the last good checkpoint is kept."""


class Run:
    """Keeps what one training run leaves behind: configuration, metrics and checkpoints, in one folder.

    Entering makes the folder, or restores everything from it when ``options.resume`` names it. ``log`` ends
    an iteration: a row in ``metrics.csv``, then the checkpoint ``checkpoints/last.torchrl``, complete, and
    ``checkpoints/best.torchrl``, the policy alone, whenever an evaluation beats the earlier ones. Ctrl-C and
    SIGTERM let the iteration end, write the checkpoint and raise SystemExit with 130 or 143; a second one
    stops at once.

    Args:
        options (Options): the run's options.
        algorithm (str): the algorithm's name, for ``load_policy`` and the default folder.
        arguments (mapping): the algorithm's keyword arguments, for ``load_policy``. Parts of one's own may be
            among them; an actor then has to be given to ``load_policy`` again.
        env (EnvBase): its specs are kept, so that the policy can be rebuilt without the simulator.
        policy (nn.Module): what is evaluated.
        learner: has ``state_dict`` and ``load_state_dict``.
        collector: has those two and ``frames``, cumulative over resumes.
    """

    def __init__(
        self, options: Options, *, algorithm: str, arguments: Mapping[str, Any], env: Any, policy: nn.Module,
        learner: Any, collector: Any,
    ) -> None:
        self.options, self.algorithm, self.arguments, self.env = options, algorithm, arguments, env
        self.policy, self.collector = policy, collector
        name = f"{algorithm}-{options.scenario}-{options.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(options.resume or options.out or _new_folder(name))
        self.state: dict[str, Any] = {"iteration": 0, "frames": 0, "seconds": 0.0, "best": None}
        self.saved = 0
        self.signal = 0
        self.handlers: dict[int, Any] = {}
        parts = {"policy": policy, "learner": learner, "collector": collector, "random": _Generators()}
        self.checkpoints = _Checkpoints(self.folder / "checkpoints", self.state, parts)

    def __enter__(self) -> Run:
        options = self.options
        config = self._resume() if options.resume else self._begin()
        self.table = log.Table(self.folder / "metrics.csv")
        self.tracker = log.open_tracker(options.logger, self.folder, config["id"], config["options"])
        title = f"{self.algorithm} {options.scenario}"
        self.bar = log.Bar(options.progress, title, options.total_frames, self.state["frames"])
        if getattr(self.env, "mode", "eager") != "eager":
            self.env.compile()
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self.handlers = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        self.clock = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None and self.saved < self.state["iteration"]:
                self.save()
        finally:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            self.bar.close()
            log.close_tracker(self.tracker)
        if error is None:
            best = "" if self.state["best"] is None else f", best evaluation {self.state['best']:.4g}"
            print(f"{self.folder}: {self.state['frames']} frames in {self.state['seconds']:.0f} s{best}")
        else:
            error.__dict__["iteration"] = self.state["iteration"]  # tells launch that no argument was refused

    def evaluates(self) -> bool:
        """Whether the iteration under way is to be evaluated: every ``eval_every``-th one, and the last."""
        return self._is_last() or _is_due(self.state["iteration"] + 1, self.options.eval_every)

    def log(
        self, batch: TensorDictBase, metrics: TensorDictBase, returns: TensorDictBase | None = None
    ) -> dict[str, log.Value]:
        """Ends an iteration: its row, its checkpoint, and the run itself where a signal asked for it.

        Args:
            batch (TensorDictBase): what the collector gave, ``[E, T]``.
            metrics (TensorDictBase): what the learner gave, scalars.
            returns (TensorDictBase, optional): what ``evaluate`` gave, ``[episodes]``.

        Raises:
            Diverged: when a loss, a gradient norm or a parameter is not finite.
        """
        norm = nn.utils.get_total_norm([parameter.detach() for parameter in self.policy.parameters()])
        values = log.to_host({
            **log.episode_returns(batch), **log.evaluation_means(returns),
            **dict(sorted(metrics.flatten_keys("/").items())), log.PARAMETERS: norm,
        })
        self._refuse(log.not_finite(values))
        del values[log.PARAMETERS]
        now, frames, iteration = time.monotonic(), int(self.collector.frames), self.state["iteration"] + 1
        elapsed, new_frames, self.clock = now - self.clock, frames - self.state["frames"], now
        self.state.update(iteration=iteration, frames=frames, seconds=self.state["seconds"] + elapsed)
        row: dict[str, log.Value] = {
            "iteration": iteration, "frames": frames, "seconds": round(self.state["seconds"], 3),
            "frames_per_second": round(new_frames / max(elapsed, 1e-9), 1), **values, **self.bar.compiled(),
        }
        self.table.append(row)
        log.track(self.tracker, row)
        self.bar.advance(row)
        best, result = self.state["best"], values.get("eval_return_mean_agents", -math.inf)
        if result > (-math.inf if best is None else best):  # never so for NaN
            self.state["best"] = result
            self.checkpoints.write("best", ["policy", "run"])
        stopping = self.signal  # read once: it may arrive while the checkpoint is written
        if stopping or self._is_last() or _is_due(iteration, self.options.checkpoint_every):
            self.save()
        if stopping:
            raise SystemExit(128 + stopping)
        return row

    def save(self) -> None:
        """Writes the complete checkpoint ``last``; between two iterations only."""
        self.checkpoints.write("last")
        self.saved = self.state["iteration"]

    def _is_last(self) -> bool:
        return int(self.collector.frames) >= self.options.total_frames

    def _refuse(self, broken: str | None) -> None:
        if broken is not None:
            kept = f"the checkpoint of iteration {self.saved}" if self.saved else "no checkpoint"
            raise Diverged(f"iteration {self.state['iteration'] + 1}: {broken}; {self.folder} keeps {kept}")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number
        text = "stopping after this iteration and its checkpoint; again to stop at once\n"
        os.write(2, (self.bar.gap + text).encode())  # not print: it fails in the middle of another one

    def _begin(self) -> dict[str, Any]:
        if (self.folder / "config.json").exists():
            raise FileExistsError(f"{self.folder} already holds a run; --resume {self.folder} continues it")
        self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
        device = self.options.pick_device()
        config = log.describe(self.options, device, self.algorithm, self.arguments, self.env)
        config["simulation"] = getattr(self.env, "mode", None)
        log.write_config(self.folder, config)
        return config

    def _resume(self) -> dict[str, Any]:
        config = log.read_config(self.folder)
        if config["algorithm"]["name"] != self.algorithm:
            trained = config["algorithm"]["name"]
            raise ValueError(f"--resume {self.folder} holds a run of {trained}, not of {self.algorithm}")
        self.checkpoints.read("last", _same_kind(config["device"], self.options.pick_device()))
        self.saved = self.state["iteration"]
        log.Table(self.folder / "metrics.csv").cut(self.saved)
        config["options"] = log.stored_options(self.options)
        config["algorithm"]["arguments"] = log.plain_arguments(self.arguments)
        config["resumes"] = [*config.get("resumes", []), {"iteration": self.saved, "argv": sys.argv}]
        log.write_config(self.folder, config)
        return config


def _new_folder(name: str) -> Path:
    """A folder in `runs` that is no other run's, also of one like it that began in the same second."""
    folder, count = Path("runs", name), 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            count += 1
            folder = Path("runs", f"{name}-{count}")


class _Checkpoints:
    """TorchRL's checkpoints under fixed names, such that no moment of writing is one without a complete file.

    Args:
        folder (Path): where they lie.
        state (dict): the run's own numbers; restored in place.
        parts (mapping): what has ``state_dict`` and ``load_state_dict``; restored in the names' order.
    """

    def __init__(self, folder: Path, state: dict[str, Any], parts: Mapping[str, Any]) -> None:
        self.folder, self.state = folder, state
        self.checkpoint = Checkpoint(format="archive", run=state)
        for part, value in parts.items():
            self.checkpoint.register(part, value, adapter=StateDictCheckpointAdapter("consolidated"))

    def write(self, name: str, components: list[str] | None = None) -> None:
        path = self.folder / f"{name}.torchrl"
        fresh = path.with_name(f".{name}.new")  # replacing itself, Checkpoint moves the old file away first
        self.checkpoint.save(fresh, components=components, metadata=self.state)
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(fresh, path)

    def read(self, name: str, device: torch.device) -> None:
        for left in self.folder.glob(".*"):  # by a process killed while it wrote
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        path = self.folder / f"{name}.torchrl"
        if path.exists():
            self.checkpoint.load(path, map_location={f"cuda:{index}": str(device) for index in range(16)})


class _Generators(GlobalRNGState):
    """The process's generators; those of GPUs that this machine lacks are not restored."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        lacking = len(state_dict.get("torch_cuda", ())) > found
        kept = {name: value for name, value in state_dict.items() if not (lacking and name == "torch_cuda")}
        super().load_state_dict(kept)


Chosen = TypeVar("Chosen", bound=Options)


def launch(
    main: Callable[[Chosen], None], options: type[Chosen], argv: Sequence[str] | None = None
) -> None:
    """Runs a recipe's ``main`` from the command line; the process's exit code tells how it went.

    0: done, also when a resumed run had nothing left to do. 1: a loss stopped being a number. 2: a bad
    argument, with one line on the error stream. 130, 143: stopped by Ctrl-C or SIGTERM, with a checkpoint.
    Anything else that goes wrong inside the loop is a defect and keeps its traceback.

    Args:
        main (callable): takes the options.
        options (type): the recipe's dataclass, a subclass of ``Options``.
        argv (sequence of str, optional): the arguments. Default: the command line's.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        chosen = _parse(options, list(sys.argv[1:] if argv is None else argv))
        chosen.check()
        if _is_finished(chosen):
            return
        if chosen.precision == "tf32":
            torch.set_float32_matmul_precision("high")
        # what is drawn without a generator of its own must not depend on what the process drew before
        start = seeds.derive(chosen.seed, "global")
        torch.manual_seed(start)
        np.random.seed(start)
        random.seed(start)
        main(chosen)
    except Diverged as error:
        _complain(str(error))
        raise SystemExit(1) from None
    except (ValueError, ImportError, OSError, NotImplementedError) as error:
        if hasattr(error, "iteration"):  # raised inside the loop
            raise
        name = error.name if isinstance(error, ModuleNotFoundError) else None
        _complain(f"{error}: pip install {name.split('.')[0]}" if name else str(error))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


def _parse(kind: type[Chosen], argv: list[str]) -> Chosen:
    try:
        import tyro
    except ImportError as error:
        raise ImportError("command lines are read by the package tyro: pip install tyro") from error

    with _one_line():
        given = tyro.cli(kind, args=argv)
    if given.resume is None:
        return given
    folder, stored = given.resume, log.read_config(given.resume)["options"]
    strange = set(stored) ^ {field.name for field in dataclasses.fields(kind) if field.name != "resume"}
    if strange:
        names = ", ".join(flag(name) for name in sorted(strange))
        raise ValueError(f"--resume {folder} was written by another program: they differ in {names}")
    before = kind(**stored, resume=folder)
    given = tyro.cli(kind, args=argv, default=before)
    fixed = [name for name in stored if name not in OVERRIDABLE]
    changed = [flag(name) for name in fixed if getattr(given, name) != getattr(before, name)]
    if changed:
        raise ValueError(
            f"--resume continues {folder} as it was begun: {', '.join(changed)} cannot change, "
            f"only {', '.join(flag(name) for name in OVERRIDABLE)}"
        )
    return given


def _is_finished(options: Options) -> bool:
    last = Path(options.resume or "", "checkpoints", "last.torchrl")
    if options.resume is None or not last.exists():
        return False
    done = int(Checkpoint.manifest(last)["metadata"]["frames"])
    if done < options.total_frames:
        return False
    asked = options.total_frames
    print(f"{options.resume} is finished: {done} of {asked} frames; a larger --total-frames takes it further")
    return True


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Turns the parser's box on the error stream into the text of one ValueError."""
    stream = io.StringIO()
    try:
        with contextlib.redirect_stderr(stream):
            yield
    except SystemExit as end:
        if end.code != 2:
            raise
        lines = [line.strip("│ ") for line in stream.getvalue().splitlines() if line[0] not in "╭╰"]
        message = " ".join(itertools.takewhile(lambda line: not line.startswith("─"), lines))
        flags = [line.split()[0] for line in lines if line.startswith("--")]
        near = f"; nearest: {', '.join(flags)}" if "Perhaps you meant:" in lines else ""
        raise ValueError(f"{message}{near} (--help lists all options)") from None


def _same_kind(before: str, now: torch.device) -> torch.device:
    if torch.device(before).type != now.type:
        raise ValueError(
            f"the run to resume ran on {before}, whose random generators {now} cannot continue; --device {before}"
        )
    return now


def _is_due(iteration: int, every: int) -> bool:
    return every > 0 and iteration % every == 0


def _complain(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
