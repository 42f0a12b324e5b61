"""What the benchmarks share: what they ran on, clocks, memory, processes that answer, and how files are written.

The standard library only: some of it runs in interpreters with another TorchRL, and a child's peak memory starts at
its parent's.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import math
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PACKAGES = "torch", "torchrl", "tensordict", "vmas"
# what makes processors of one name differ in speed, the fastest first
VECTORS = {"avx512_bf16": "AVX-512 with BF16", "avx512f": "AVX-512", "avx2": "AVX2"}

MODES = ("eager", "compile", "cudagraph")


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """A program's command line, whose help begins with its docstring's first line and tells all defaults."""
    described = (doc or "").partition("\n")[0]
    return argparse.ArgumentParser(
        description=described, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def add_ways_to_run(parser: argparse.ArgumentParser, out: Path) -> None:
    """The options of a program that learns and simulates in its own process, and where its results go."""
    add = parser.add_argument
    add("--mode", default="eager", choices=MODES, help="of the updates")
    add("--simulation", default="compile", choices=MODES, help="mode of the simulator")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=1)
    add("--out", type=Path, default=out, help="results file, with a picture beside it")


def begin(args: argparse.Namespace) -> dict[str, Any]:
    """Sets this process up as :func:`add_ways_to_run` was answered; the head of its results."""
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    return about(vars(args), torch.cuda.get_device_name() if args.device.startswith("cuda") else None)


def commit() -> str | None:
    """The commit that is measured, with a plus where the library or a benchmark differs from it; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(HERE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/tdmarl", ":/benchmarks/*.py")
        return git("rev-parse", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """What the numbers are measured on and with; the GPU is told by what runs on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []

    def first(name: str) -> str:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")

    flags = first("flags").split()
    return {
        "cpu": first("model name") or platform.processor(),
        "vectors": next((said for flag, said in VECTORS.items() if flag in flags), None),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }


def about(settings: dict[str, Any], gpu: str | None = None) -> dict[str, Any]:
    """The head of every results file: machine, versions, commit, load, and the settings with the mode among them."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    kept = {name: os.path.relpath(value) if isinstance(value, Path) else value for name, value in settings.items()}
    here = {**machine(), "gpu": gpu, "load": round(os.getloadavg()[0], 2)}
    return {"date": now, "commit": commit(), "machine": here, "settings": kept}


def where(result: dict[str, Any]) -> str:
    """The machine of a results file in a few words, for a picture's title."""
    here, threads = result["machine"], result["settings"].get("threads", 1)
    vectors = f" ({here['vectors']})" if here.get("vectors") else ""
    return here["gpu"] or f"{here['cpu']}{vectors}, {threads} thread{'s' * (threads != 1)}"


def write(result: dict[str, Any], out: Path) -> None:
    """Puts a result in its file, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(out)


def picture(
    draw: Callable[[dict[str, Any], Any], None], result: dict[str, Any], out: Path, size: Any
) -> None:
    """Draws a result beside its file where matplotlib is installed.

    Args:
        draw (callable): given the result and a figure to draw on.
        result (dict): what the file holds.
        out (Path): the results file.
        size (pair of float): the figure's, in inches.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f"no picture: {error}", file=sys.stderr)
        return
    figure = Figure(figsize=size, layout="constrained")
    draw(result, figure)
    figure.savefig(out.with_suffix(".png"), dpi=130)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def ratios(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """How many times the others the values are, turn by turn, so that load by others meets both."""
    return spread([mine / other for mine, other in zip(values, others)])


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """p of the power law y = c x^p that fits best in logarithms; None where the points do not say."""
    if len({x for x, _ in points}) < 2 or min(y for _, y in points) <= 0:
        return None
    xs, ys = ([math.log(point[i]) for point in points] for i in (0, 1))
    x_mean, y_mean = statistics.mean(xs), statistics.mean(ys)
    covariance = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys))
    return covariance / sum((x - x_mean) ** 2 for x in xs)


def seconds(function: Callable[[], Any], device: str = "cpu") -> tuple[float, float, Any]:
    """Wall time and this process's processor time of one call, the device's work included, and what it returned."""
    wait = waiting(device)
    wait()
    start, cpu = time.perf_counter(), time.process_time()
    found = function()
    wait()
    return time.perf_counter() - start, time.process_time() - cpu, found


def waiting(device: str) -> Callable[[], Any]:
    """What waits until a device has done its work."""
    if not str(device).startswith("cuda"):
        return lambda: None
    import torch

    return torch.cuda.synchronize


class Memory:
    """How much memory this process, or its CUDA device, comes to need over a while.

    On CUDA it is what PyTorch has allocated. On a CPU it is resident memory; what was freed before is given back first,
    so that it is not counted as there already.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.before = 0

    def begin(self) -> None:
        """From here on."""
        gc.collect()
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak is the present from now on
            self.before = _resident("VmRSS")

    def peak(self, held: int) -> int:
        """The most bytes since :meth:`begin`.

        Args:
            held (int): bytes of the tensors that there were then; on CUDA they are known.
        """
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated()
        return _resident("VmHWM") - self.before + held


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class ProcessFailed(Exception):
    """A process died, hung or could not be started; the message ends with its last words."""


class Process:
    """A program that is asked by lines of JSON on its input and answers by lines of JSON on its output.

    What it says on stderr is kept for the report. The first answer comes unasked, once it is ready.

    Args:
        name (str): for reports.
        command (sequence of str): the program.
        threads (int): that it may use.
        timeout (float): seconds that an answer may take.
        environment (dict, optional): variables, in place of this process's.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        threads: int,
        timeout: float,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name, self.timeout = name, timeout
        self._stderr = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=of_threads(threads, os.environ if environment is None else environment),
        )
        started = time.perf_counter()
        self.about = {**self._answer(), "start_seconds": time.perf_counter() - started}

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            ProcessFailed: there is none.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ProcessFailed(self._last_words("ended")) from error
        return self._answer()

    def finish(self) -> None:
        """Ends it; it has its own time to shut down, not more than a minute."""
        try:
            self._process.communicate(timeout=60)  # closes its input
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.kill()

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], self.timeout)
        if not ready:
            self.kill()
            raise ProcessFailed(self._last_words(f"gave no answer in {self.timeout:.0f} s"))
        line = self._process.stdout.readline()
        if not line:
            raise ProcessFailed(self._last_words("ended"))
        return json.loads(line)

    def _last_words(self, what: str) -> str:
        self._process.wait(60)
        self._stderr.seek(0)
        words = self._stderr.read()[-2000:].strip()
        return f"{self.name} {what} (exit code {self._process.returncode}): {words}"


def of_threads(threads: int, environment: Any) -> dict[str, str]:
    """The variables of a process that uses so many threads."""
    return {**environment, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


class Answers:
    """The other end of :class:`Process`: the program's own prints go to stderr, its answers to the asker."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def requests(self) -> Any:
        """Each request, until there are no more."""
        for line in sys.stdin:
            yield json.loads(line)

    def answer(self, **content: Any) -> None:
        """Answers the last request."""
        self._answers.write(json.dumps(content) + "\n")
        self._answers.flush()
