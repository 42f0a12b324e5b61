from __future__ import annotations

import ast
import csv
import dataclasses
import inspect
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.checkpoint import Checkpoint, StateDictCheckpointAdapter
from torchrl.data import Bounded, Composite, Unbounded

from tdmarl import log, run
from tdmarl.options import OffPolicyOptions, OnPolicyOptions
from tdmarl.run import Options, Run, launch


@dataclasses.dataclass(kw_only=True)
class TinyOptions(Options):
    """Options of the program below."""

    num_envs: int = 2
    frames_per_batch: int = 8
    total_frames: int = 40
    eval_every: int = 2
    lr: float = 0.1
    share: bool = True


class Env:
    """Specs, and nothing that steps."""

    group_map = {"agents": ["agent_0", "agent_1"]}
    batch_size = ()
    observation_spec = Composite(agents=Composite(observation=Unbounded((2, 3)), shape=(2,)))
    full_action_spec = Composite(agents=Composite(action=Bounded(-1, 1, (2, 1)), shape=(2,)))
    full_reward_spec = Composite(agents=Composite(reward=Unbounded((2, 1)), shape=(2,)))
    full_done_spec = Composite(done=Unbounded((1,), dtype=torch.bool))


class Collector:
    """Draws from its own generator and from each of the process's, as environments do."""

    def __init__(self, options: Options) -> None:
        self.options, self.frames = options, 0
        self.generator = torch.Generator().manual_seed(options.seed)

    def __iter__(self) -> Iterator[TensorDict]:
        while self.frames < self.options.total_frames:
            self.frames += self.options.frames_per_batch
            reward = torch.rand(2, 4, 2, 1, generator=self.generator) + torch.rand(2, 4, 2, 1)
            reward += np.random.rand() + random.random()
            done = torch.zeros(2, 4, 1, dtype=torch.bool)
            done[:, self.frames // 8 % 4] = True
            nested = {"done": done, "agents": {"episode_reward": reward}}
            yield TensorDict({"next": TensorDict(nested, batch_size=[2, 4])}, batch_size=[2, 4])

    def state_dict(self) -> dict[str, Any]:
        return {"frames": self.frames, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.frames = state["frames"]
        self.generator.set_state(state["generator"])


class Learner:
    """A network and Adam, which has an empty state until its first step."""

    def __init__(self, options: TinyOptions) -> None:
        torch.manual_seed(options.seed + 1)
        self.net, self.calls = nn.Linear(1, 1), 0
        self.optim = torch.optim.Adam(self.net.parameters(), lr=options.lr)
        self.hooks: dict[int, Any] = {}

    def __call__(self, batch: TensorDict) -> TensorDict:
        self.calls += 1
        target = batch["next", "agents", "episode_reward"].reshape(-1, 1)
        loss = (self.net(torch.randn_like(target)) - target).square().mean()
        self.optim.zero_grad()
        loss.backward()
        self.optim.step()
        extra = self.hooks.get(self.calls, lambda: {})() or {}
        return TensorDict({"loss_critic": loss.detach(), "scale": torch.tensor(2.0), **extra})

    def state_dict(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "optim": self.optim.state_dict(), "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optim.load_state_dict(state["optim"])
        self.calls = state["calls"]


HOOKS: dict[int, Any] = {}
LAST: list[Learner] = []


def program(options: TinyOptions) -> None:
    """A recipe's loop around the fakes; what happens in an iteration can be hooked by its number."""
    learner, collector = Learner(options), Collector(options)
    learner.hooks = HOOKS
    LAST.append(learner)
    with Run(
        options,
        algorithm="tiny",
        arguments={"lr": options.lr, "actor": learner.net},
        env=Env(),
        policy=learner.net,
        learner=learner,
        collector=collector,
    ) as this:
        for batch in collector:
            metrics = learner(batch)
            returns = None
            if this.evaluates():
                values = batch["next", "agents", "episode_reward"].mean((1, 2, 3)) - learner.net.weight.sum()
                returns = TensorDict({"return_mean_agents": values.detach()}, batch_size=[2])
            this.log(batch, metrics, returns)


def call(*argv: str) -> int:
    """The exit code of the program under a command line."""
    try:
        launch(program, TinyOptions, argv)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    HOOKS.clear()
    LAST.clear()
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def rows(folder: str | Path) -> list[dict[str, str]]:
    """The table without what a clock measured."""
    with Path(folder, "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "frames_per_second")} for row in table]


def weights(folder: str | Path) -> list[float]:
    """The parameters in the folder's complete checkpoint."""
    net = nn.Linear(1, 1)
    reader = Checkpoint().register("policy", net, adapter=StateDictCheckpointAdapter())
    reader.load(Path(folder, "checkpoints", "last.torchrl"))
    return [parameter.item() for parameter in net.parameters()]


def disturb() -> None:
    """Leaves the process's generators where no run would."""
    torch.rand(7)
    np.random.rand(3)
    random.random()


def test_a_run_leaves_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--out", "a", "--seed", "3") == 0
    table = rows("a")
    assert [row["iteration"] for row in table] == ["1", "2", "3", "4", "5"]
    assert [row["frames"] for row in table] == ["8", "16", "24", "32", "40"]
    assert list(table[0])[:2] == ["iteration", "frames"] and "loss_critic" in table[0]
    # evaluated every second iteration, and the last one whatever its number
    assert [bool(row["eval_return_mean_agents"]) for row in table] == [False, True, False, True, True]
    with open("a/metrics.csv") as file:
        header = file.readline().strip().split(",")
    assert header[:7] == [
        "iteration",
        "frames",
        "seconds",
        "frames_per_second",
        "return_mean_agents",
        "return_sum_agents",
        "eval_return_mean_agents",
    ]
    config = json.loads(Path("a/config.json").read_text())
    assert config["options"]["seed"] == 3 and "resume" not in config["options"]
    assert config["algorithm"] == {"name": "tiny", "arguments": {"lr": 0.1, "actor": {"custom": "Linear"}}}
    assert set(config["versions"]) >= {"python", "torch", "torchrl", "tensordict", "vmas", "tdmarl"}
    assert sorted(path.name for path in Path("a/checkpoints").iterdir()) == ["best.torchrl", "last.torchrl"]
    assert set(Checkpoint.manifest("a/checkpoints/best.torchrl")["components"]) == {"policy", "run"}
    best = max(float(row["eval_return_mean_agents"]) for row in table if row["eval_return_mean_agents"])
    assert Checkpoint.manifest("a/checkpoints/best.torchrl")["metadata"]["best"] == best
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("a: 40 frames in ") and out.count("\n") == 1


def test_the_default_folder_is_named_after_the_run() -> None:
    assert call("--scenario", "balance", "--seed", "7") == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("tiny-balance-7-2")


def test_one_seed_is_one_result_whatever_the_process_drew_before() -> None:
    assert call("--out", "a") == 0
    disturb()
    assert call("--out", "b") == 0
    assert rows("a") == rows("b")
    assert call("--out", "c", "--seed", "1") == 0
    assert rows("a") != rows("c")


@pytest.mark.parametrize("every", ["1", "2", "0"])
def test_a_longer_run_after_a_resume_equals_an_undisturbed_one(every: str) -> None:
    assert call("--out", "whole", "--total-frames", "72", "--eval-every", "1") == 0
    whole, end = rows("whole"), weights("whole")
    assert call("--out", "a", "--eval-every", "1", "--checkpoint-every", every) == 0
    seconds = float(log.read_metrics("a/metrics.csv")[-1]["seconds"])
    disturb()
    assert call("--resume", "a", "--total-frames", "72") == 0
    assert rows("a") == whole and weights("a") == end
    assert LAST[-1].calls == 9  # 5 + 4: only the missing iterations were run
    assert float(log.read_metrics("a/metrics.csv")[5]["seconds"]) > seconds
    config = json.loads(Path("a/config.json").read_text())
    assert config["options"]["total_frames"] == 72 and config["resumes"][0]["iteration"] == 5


def test_a_finished_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--out", "a") == 0
    before = {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert call("--resume", "a") == 0
    out, err = capsys.readouterr()
    assert out == "a is finished: 40 of 40 frames; a larger --total-frames takes it further\n" and err == ""
    assert {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file()} == before


def forked(function: Any) -> int:
    """Runs a function in a copy of this process; the status it ended with."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            function()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def test_runs_of_one_second_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    for lr in ("0.1", "0.2", "0.3"):
        assert call("--lr", lr, "--scenario", "x") == 0
    found = {folder.name: log.read_config(folder)["options"]["lr"] for folder in Path("runs").iterdir()}
    assert found == {"tiny-x-0-now": 0.1, "tiny-x-0-now-2": 0.2, "tiny-x-0-now-3": 0.3}


def test_a_kill_at_any_write_can_be_resumed_to_the_same_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL before each call that makes something of a checkpoint or of a table appear on the disk."""
    assert call("--out", "whole") == 0
    whole, end = rows("whole"), weights("whole")
    names = ("replace", "fsync", "mkdir", "rename")
    real = {name: getattr(os, name) for name in names}

    def dying(fatal: int) -> Any:
        count = iter(range(1_000_000))

        def make(name: str) -> Any:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                if next(count) == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real[name](*args, **kwargs)

            return wrapped

        def run_and_die() -> None:
            for name in names:
                setattr(os, name, make(name))
            call("--out", f"k{fatal}")

        return run_and_die

    fatal, killed, midway = 0, 0, 0
    while forked(dying(fatal)) == signal.SIGKILL:
        folder = Path(f"k{fatal}")
        if (folder / "config.json").exists():
            killed += 1
            midway += any(folder.glob("checkpoints/.*"))
            disturb()
            assert call("--resume", str(folder)) == 0, fatal
            assert rows(folder) == whole and weights(folder) == end, fatal
            assert not any(folder.glob("checkpoints/.*")), fatal
        fatal += 1 if fatal < 12 else 3
    assert killed > 8 and midway > 4


def test_a_kill_at_random_moments_can_be_resumed_to_the_same_end() -> None:
    start = time.monotonic()
    assert call("--out", "whole", "--total-frames", "160") == 0
    whole, end, took = rows("whole"), weights("whole"), time.monotonic() - start
    chance = random.Random(0)
    for trial in range(4):
        folder = f"r{trial}"
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            call("--out", folder, "--total-frames", "160")
            os._exit(0)
        while not Path(folder, "metrics.csv").exists():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, took))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        disturb()
        assert call("--resume", folder) == 0
        assert rows(folder) == whole and weights(folder) == end


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_iteration_and_leaves_a_checkpoint(
    number: int, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("--out", "whole") == 0
    whole, end = rows("whole"), weights("whole")
    HOOKS[3] = lambda: os.kill(os.getpid(), number)
    before = signal.getsignal(signal.SIGINT)
    assert call("--out", "a", "--checkpoint-every", "0") == code
    assert signal.getsignal(signal.SIGINT) is before
    assert [row["iteration"] for row in rows("a")] == ["1", "2", "3"]
    assert capfd.readouterr().err.startswith("stopping after this iteration and its checkpoint")
    HOOKS.clear()
    disturb()
    assert call("--resume", "a", "--checkpoint-every", "1") == 0
    assert rows("a") == whole and weights("a") == end


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_at_once_and_keeps_the_last_checkpoint(number: int, code: int) -> None:
    def twice() -> None:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    HOOKS[3] = twice
    assert call("--out", "a") == code
    assert [row["iteration"] for row in rows("a")] == ["1", "2"]
    assert Checkpoint.manifest("a/checkpoints/last.torchrl")["metadata"]["iteration"] == 2


@pytest.mark.parametrize("name, value", [("loss_critic", "nan"), ("grad_norm_actor", "inf")])
def test_a_loss_that_is_no_number_stops_the_run(
    name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    HOOKS[4] = lambda: {name: torch.tensor(float(value))}
    assert call("--out", "a") == 1
    out, err = capsys.readouterr()
    assert err.endswith(f"error: iteration 4: {name} is {value}; a keeps the checkpoint of iteration 3\n")
    assert err.count("\n") == 1 and "Traceback" not in err
    assert Checkpoint.manifest("a/checkpoints/last.torchrl")["metadata"]["iteration"] == 3
    assert len(rows("a")) == 3


def test_a_parameter_that_is_no_number_stops_the_run_too() -> None:
    HOOKS[2] = lambda: LAST[-1].net.weight.data.fill_(float("nan")) and None
    assert call("--out", "a", "--eval-every", "0") == 1
    assert Checkpoint.manifest("a/checkpoints/last.torchrl")["metadata"]["iteration"] == 1


def test_metrics_that_may_be_undefined_do_not_stop_it() -> None:
    HOOKS[2] = lambda: {"explained_variance": torch.tensor(float("nan"))}
    assert call("--out", "a") == 0
    assert [row["explained_variance"] for row in rows("a")] == [""] * 5


def test_a_defect_in_the_loop_keeps_its_traceback() -> None:
    def broken() -> None:
        raise ValueError("a defect")

    HOOKS[2] = broken
    with pytest.raises(ValueError, match="a defect"):
        call("--out", "a")
    assert Checkpoint.manifest("a/checkpoints/last.torchrl")["metadata"]["iteration"] == 1


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--frames-per-batch", "9"], "--frames-per-batch 9 is not a multiple of --num-envs 2; 8 would be"),
        (["--num-envs", "0"], "--num-envs must be at least 1"),
        (["--eval-every", "-1"], "--eval-every must not be negative"),
        (["--device", "cuda:99"], "--device cuda:99 is not there: torch finds"),
        (["--device", "gpu"], "--device gpu is none of auto, cpu, cuda and cuda:N"),
        (["--resume", "nothing"], "nothing is not the folder of a run"),
        (["--sceanrio", "x"], "Unrecognized options: --sceanrio, x"),
        (["--num-envs", "many"], "Error parsing --num-envs"),
        (["--mode", "fast"], "--mode"),
        (["--precision", "tf32", "--device", "cpu"], "tf32 is a GPU's way to multiply, and this run's device is cpu"),
        (["--resume", "taken", "--precision", "bfloat16"], "--precision cannot change"),
        (["--out", "taken"], "taken already holds a run; --resume taken continues it"),
        (
            ["--resume", "taken", "--seed", "1", "--lr", "2"],
            "--seed, --lr cannot change, only --total-frames",
        ),
        (["--resume", "taken", "--no-share"], "--share cannot change"),
        (["--resume", "foreign"], "they differ in --gamma"),
        (["--resume", "other"], "holds a run of qmix, not of tiny"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--out", "taken", "--total-frames", "8") == 0
    config = json.loads(Path("taken/config.json").read_text())
    for folder, change in (
        ("foreign", {"options": {**config["options"], "gamma": 1}}),
        ("other", {"algorithm": {"name": "qmix", "arguments": {}}}),
    ):
        Path(folder).mkdir()
        Path(folder, "config.json").write_text(json.dumps(config | change))
    capsys.readouterr()
    assert call(*argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err


def test_a_missing_command_line_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tyro", None)
    assert call("--out", "a") == 2
    assert "pip install tyro" in capsys.readouterr().err


def test_every_option_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(Options):
        assert "--" + field.name.replace("_", "-") in text
    body = ast.parse(inspect.getsource(Options)).body[0].body  # type: ignore[attr-defined]
    for field, text_after in zip(body, body[1:]):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(text_after, ast.Expr) and isinstance(text_after.value, ast.Constant)
    for words in ("Name of the VMAS scenario", "--no-progress", "metrics.csv, which is always written"):
        assert words in text


def test_the_class_stays_small_and_has_no_loop_over_iterations() -> None:
    source = inspect.getsource(Run)
    assert len(source.splitlines()) <= 155
    loops = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.For, ast.While))]
    assert [ast.unparse(loop).split(":")[0] for loop in loops] == [
        "for number, handler in self.handlers.items()"
    ]
    assert "mappo" not in inspect.getsource(run).replace('algorithm="mappo"', "")


def test_a_resumed_run_simulates_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(Env, "mode", "compile", raising=False)
    monkeypatch.setattr(Env, "compile", lambda self: compiled.append(self.mode), raising=False)
    assert call("--out", str(tmp_path / "run")) == 0
    assert compiled == ["compile"]  # before the first step
    longer = TinyOptions(resume=str(tmp_path / "run"), total_frames=10**9)
    assert longer.simulation() == {"mode": "compile", "expected_steps": 500_000_000}
    assert TinyOptions().simulation() == {"mode": "auto", "expected_steps": 20}


def test_updates_are_compiled_where_there_are_many_and_a_resumed_run_keeps_its_choice(tmp_path: Path) -> None:
    def mode(**options: Any) -> str:
        return OffPolicyOptions(frames_per_batch=512, num_updates=10, device="cpu", **options).arguments()[
            "mode"
        ]

    assert mode(total_frames=512 * 799) == "eager" and mode(total_frames=512 * 800) == "compile"
    assert mode(total_frames=512 * 1000, mode="eager") == "eager"
    for name, arguments in (
        ("one", {"mode": "eager"}),
        ("teams", {"agent": {"arguments": {"mode": "eager"}}}),
    ):
        (tmp_path / name).mkdir()
        config = {"options": {}, "specs": {}}
        log.write_config(tmp_path / name, config | {"algorithm": {"arguments": arguments}})
        assert mode(total_frames=512 * 1000, resume=str(tmp_path / name)) == "eager"


def test_the_precision_is_the_networks_or_the_processs(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    assert call("--out", "one", "--precision", "bfloat16", "--total-frames", "8") == 0
    assert set_to == [] and json.loads(Path("one/config.json").read_text())["options"]["precision"] == "bfloat16"
    monkeypatch.setattr(Options, "pick_device", lambda self: torch.device("cuda"))
    launch(lambda options: None, TinyOptions, ["--precision", "tf32"])
    assert set_to == ["high"]
    kinds = (OnPolicyOptions, OffPolicyOptions)
    for asked, given in (("tf32", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")):
        assert [kind(precision=asked).arguments()["precision"] for kind in kinds] == [given] * 2
