"""Where the copies of an environment run: in this process, or spread over processes that share memory with it."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from tdmarl.envs import copies
from tdmarl.envs.copies import Copies, Layout, Places

_PROGRAM = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='tdmarl_worker')"


class WorkerError(RuntimeError):
    """A worker process failed; holds its traceback, or how it ended."""


class InProcess:
    """All copies one after the other in this process."""

    def __init__(self, make: Callable[[], Any], num_envs: int) -> None:
        self._copies = Copies(make, 0, num_envs)

    def describe(self) -> dict[str, Any]:
        """See :meth:`Copies.describe`."""
        return self._copies.describe()

    def bind(self, size: int, layout: Layout, places: Places, max_steps: int | None) -> Any:
        """Makes the arrays' memory and tells the copies of it."""
        buffer = bytearray(size)
        self._copies.bind(buffer, layout, places, max_steps)
        return buffer

    def reset(self, seeds: dict[int, int]) -> None:
        """Starts episodes in the copies named."""
        self._copies.reset(seeds)

    def step(self) -> None:
        """Steps all copies by the actions in the arrays."""
        self._copies.step()

    def close(self) -> None:
        """Closes the copies."""
        self._copies.close()


class Processes:
    """The copies in equal shares over processes, each with an interpreter of its own.

    A worker runs ``copies.py`` alone and imports what the environment needs: neither torch nor the main program, which
    thus needs no guard. Whatever goes wrong, here or in a worker, closes all of them; when this process ends, in
    whatever way, their input does, and they end too.

    Args:
        make (callable): makes a copy; sent by cloudpickle, so a lambda or a local function is fine.
        num_envs (int): how many copies.
        num_workers (int): how many processes, at most one per copy.
    """

    def __init__(self, make: Callable[[], Any], num_envs: int, num_workers: int) -> None:
        import cloudpickle  # torchrl brings it

        program, each = cloudpickle.dumps(make), -(-num_envs // num_workers)
        self._firsts = list(range(0, num_envs, each))
        environ = {"OMP_NUM_THREADS": "1", "PYGAME_HIDE_SUPPORT_PROMPT": "1", **os.environ}
        command = [sys.executable, "-c", _PROGRAM, copies.__file__]
        self._workers: list[subprocess.Popen[bytes]] = []
        self._counts = [min(each, num_envs - first) for first in self._firsts]
        try:
            for _ in self._firsts:
                pipe = subprocess.PIPE
                self._workers.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environ))
            self._all("start", [(sys.path, program, *share) for share in zip(self._firsts, self._counts)])
        except BaseException:
            self.close()
            raise

    def describe(self) -> dict[str, Any]:
        """See :meth:`Copies.describe`."""
        return self._all("describe", [()] + [None] * (len(self._workers) - 1))[0]

    def bind(self, size: int, layout: Layout, places: Places, max_steps: int | None) -> Any:
        """Makes the shared memory and tells the copies of it."""
        path = _make_file(size)
        try:
            buffer = copies.mapped(path)
            self._all("bind", [(path, layout, places, max_steps)] * len(self._workers))
        finally:
            os.unlink(path)  # all have it open: it lives until the last of them ends
        return buffer

    def reset(self, seeds: dict[int, int]) -> None:
        """Starts episodes in the copies named."""
        shares = [
            {e: seeds[e] for e in range(first, first + count) if e in seeds}
            for first, count in zip(self._firsts, self._counts)
        ]
        self._all("reset", [(share,) if share else None for share in shares])

    def step(self) -> None:
        """Steps all copies by the actions in the arrays."""
        self._all("step", [()] * len(self._workers))

    def close(self) -> None:
        """Ends the processes: by closing their input, and by force where that is not enough."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                assert worker.stdin is not None
                worker.stdin.close()
        for worker in self._workers:
            try:
                worker.wait(2)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()
        self._workers = []

    def _all(self, command: str, arguments: list[tuple[Any, ...] | None]) -> list[Any]:
        """Sends a command to the workers that have arguments, and waits for all their answers."""
        if not self._workers:
            raise RuntimeError("The environment is closed: make a new one.")
        asked = [(i, a) for i, a in enumerate(arguments) if a is not None]
        try:
            for i, a in asked:
                stdin = self._workers[i].stdin
                assert stdin is not None
                with contextlib.suppress(BrokenPipeError):  # it ended; its answer will not come, and says so
                    pickle.dump((command, a), stdin)
                    stdin.flush()
            return [self._answer(i, command) for i, _ in asked]
        except BaseException:  # KeyboardInterrupt too: answers are under way that nobody will read
            self.close()
            raise

    def _answer(self, i: int, command: str) -> Any:
        worker, last = self._workers[i], self._firsts[i] + self._counts[i] - 1
        name = f"worker {i} (environments {self._firsts[i]} to {last})"
        assert worker.stdout is not None
        try:
            good, answer = pickle.load(worker.stdout)
        except (EOFError, pickle.UnpicklingError) as error:
            code = worker.wait()
            raise WorkerError(
                f"{name} ended with exit code {code} in '{command}': a negative one is the signal that killed it; what "
                "it printed is above. With num_workers=0 the environments run in this process, under a debugger too."
            ) from error
        if not good:
            raise WorkerError(f"{name} failed in '{command}':\n{answer}")
        return answer


def _make_file(size: int) -> str:
    """A file of that size for memory that processes share: in memory where there is room, else on the disk."""
    folders = [folder for folder in ("/dev/shm", tempfile.gettempdir()) if os.path.isdir(folder)]
    for folder in folders:
        handle, path = tempfile.mkstemp(prefix="tdmarl-", dir=folder)
        try:
            if hasattr(
                os, "posix_fallocate"
            ):  # a full /dev/shm would otherwise kill the process at a later write
                os.posix_fallocate(handle, 0, size)
            os.ftruncate(handle, size)
            return path
        except OSError:
            os.unlink(path)
            if folder is folders[-1]:
                raise
        finally:
            os.close(handle)
    raise OSError("no folder for shared memory")
