from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded

from tdmarl import log


def test_scalars_arrive_in_one_transfer_and_exactly() -> None:
    values = {"a": torch.tensor(0.1), "n": torch.tensor(2**40 + 1), "flag": torch.tensor(True)}
    assert log.to_host(values) == {"a": torch.tensor(0.1).item(), "n": 2**40 + 1, "flag": 1.0}
    assert log.to_host({}) == {}
    calls = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if "_local_scalar_dense" in str(func):
                calls.append(func)
            return func(*args, **(kwargs or {}))

    with Counting():
        log.to_host({str(i): torch.tensor(float(i)) for i in range(20)})
    assert not calls  # tolist() copies once; .item() would read each scalar


def batch_of_two_groups() -> TensorDict:
    """Two environments, three steps: env 0 ends at step 1, env 1 at steps 0 and 2."""
    done = torch.tensor([[0, 1, 0], [1, 0, 1]], dtype=torch.bool).unsqueeze(-1)
    red = torch.arange(12.0).reshape(2, 3, 2, 1)  # two agents: env 0 step 1 -> 2, 3
    blue = 10 * torch.ones(2, 3, 1, 1)
    nested = {"done": done, "red": {"episode_reward": red}, "blue": {"episode_reward": blue}}
    return TensorDict({"next": TensorDict(nested, batch_size=[2, 3])}, batch_size=[2, 3])


def test_returns_average_the_episodes_that_ended() -> None:
    values = log.to_host(log.episode_returns(batch_of_two_groups()))
    # red sums of ended episodes: 2+3, 6+7, 10+11 -> mean 13; blue 10 each
    assert values == pytest.approx({
        "return_mean_agents": (13 + 10) / 3, "return_sum_agents": 23.0,
        "return_red": 6.5, "return_blue": 10.0, "episodes": 3.0,
    })


def test_no_ended_episode_leaves_the_return_unmeasured(tmp_path: Path) -> None:
    batch = batch_of_two_groups()
    batch["next", "done"].zero_()
    values = log.to_host(log.episode_returns(batch))
    table = log.Table(tmp_path / "m.csv", ["iteration"])
    table.append({"iteration": 1, **values})
    (row,) = log.read_metrics(tmp_path / "m.csv")
    assert row["return_mean_agents"] == "" and row["episodes"] == "0"


def test_evaluation_means_name_groups_only_where_there_are_several() -> None:
    returns = TensorDict({"return_mean_agents": torch.tensor([1.0, 3.0]), "red": torch.ones(2, 4)}, [2])
    assert log.to_host(log.evaluation_means(returns)) == {"eval_return_mean_agents": 2.0}
    returns["blue"] = torch.full((2, 1), 5.0)
    assert log.to_host(log.evaluation_means(returns)) == {
        "eval_return_mean_agents": 2.0, "eval_return_red": 1.0, "eval_return_blue": 5.0,
    }
    assert log.evaluation_means(None) == {}


def test_columns_grow_and_rows_are_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    table = log.Table(path, ["iteration", "x"])
    table.append({"iteration": 1, "x": 0.1})
    table.append({"iteration": 2, "loss": -0.5, "x": None})
    table.append({"iteration": 3, "x": 1e300, "loss": float("nan")})
    assert path.read_text() == "iteration,x,loss\n1,0.1,\n2,,-0.5\n3,1e+300,\n"
    with path.open("a") as file:
        file.write("4,0.")  # a process killed while it wrote
    assert [row["iteration"] for row in log.read_metrics(path)] == ["1", "2", "3"]
    log.Table(path, ["iteration", "x"]).cut(2)
    assert path.read_text() == "iteration,x,loss\n1,0.1,\n2,,-0.5\n"
    log.Table(path, ["iteration", "x"]).append({"iteration": 3, "loss": 2})
    assert path.read_text().endswith("3,,2\n")
    log.Table(path).cut(0)
    log.Table(path).append({"iteration": 1})
    assert path.read_text() == "iteration,x,loss\n1,,\n"


class Terminal(io.StringIO):
    """An error stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_bar_shows_progress_on_a_terminal_and_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for wanted in (True, False):
        bar = log.Bar(wanted, "mappo balance", total=200, initial=50)
        bar.advance({"frames": 80, "frames_per_second": 99.0, "eval_return_mean_agents": 3.5})
        bar.advance({"frames": 100, "frames_per_second": 1234.5, "return_mean_agents": 0.25})
        bar.close()
        shown = terminal.getvalue().split("\r")[-1]
        terminal.truncate(0)
        texts = ("mappo balance", " 50%", "1,234 frames/s", "return 0.25", "evaluation 3.5")
        assert all((text in shown) is wanted for text in texts)
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    bar = log.Bar(True, "mappo balance", 200, 0)
    bar.advance({"frames": 100, "frames_per_second": 1.0})
    bar.close()
    assert pipe.getvalue() == ""


def test_numbers_are_written_so_that_they_read_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    numbers = [random.Random(0).uniform(-1, 1) * 10.0**power for power in range(-30, 30)]
    log.Table(path, ["iteration"]).append({"iteration": 1, **{f"x{i}": n for i, n in enumerate(numbers)}})
    (row,) = log.read_metrics(path)
    assert [float(row[f"x{i}"]) for i in range(len(numbers))] == numbers


def test_only_losses_gradients_and_parameters_must_be_finite() -> None:
    assert log.not_finite({"explained_variance": float("nan"), "loss_critic": 0.1}) is None
    assert log.not_finite({"loss_critic": float("nan")}) == "loss_critic is nan"
    assert log.not_finite({"agents/grad_norm_actor": float("inf")}) == "agents/grad_norm_actor is inf"
    assert log.not_finite({log.PARAMETERS: float("-inf")}) is not None


def test_a_config_is_plain_json_without_infinities(tmp_path: Path) -> None:
    spec = Bounded(-float("inf"), 1.0, shape=(2,))
    text = json.dumps(log.describe_spec(spec), allow_nan=False)
    assert json.loads(text)["low"] == "[-inf, -inf]"
    assert log._plain({"a": (1, 2)}) == {"a": [1, 2]}
    assert log._plain(torch.nn.ReLU) == {"custom": "type"}


def test_a_folder_that_is_no_run_is_named_with_its_neighbours(tmp_path: Path) -> None:
    run = tmp_path / "mappo-0"
    run.mkdir()
    (run / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="nothing-here is not the folder of a run.*mappo-0"):
        log.read_config(tmp_path / "nothing-here")
    with pytest.raises(ValueError, match="lacks algorithm"):
        log.read_config(run)
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        log.read_config(run)


def test_a_missing_tracker_is_named_with_the_command_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    log.check_tracker("csv")
    log.check_tracker("none")
    with pytest.raises(ImportError, match="--logger mlflow needs the package mlflow: pip install mlflow"):
        log.check_tracker("mlflow")


def test_tensorboard_receives_every_measured_entry(tmp_path: Path) -> None:
    tracker = log.open_tracker("tensorboard", tmp_path, "id", {})
    for frames in (10, 20):
        log.track(tracker, {"frames": frames, "return_mean_agents": 0.5, "not": float("nan"), "no": None})
    log.close_tracker(tracker)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"frames", "return_mean_agents"}
    assert [event.step for event in events.Scalars("return_mean_agents")] == [10, 20]


WANDB = """
import socket, sys, pathlib
connect = socket.socket.connect
def local_only(self, address):
    if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost"):
        return connect(self, address)
    raise OSError("network is off in this test")
socket.socket.connect = local_only
from tdmarl import log
tracker = log.open_tracker("wandb", pathlib.Path(sys.argv[1]), "abc123", {"lr": 0.5})
log.track(tracker, {"frames": 10, "return_mean_agents": 0.25})
print(tracker.experiment.id, tracker.experiment.offline, "env" in dict(tracker.experiment.config))
log.close_tracker(tracker)
"""


def test_wandb_logs_offline_without_an_account_and_keeps_its_id(tmp_path: Path) -> None:
    drop = ("WANDB_API_KEY", "WANDB_MODE")
    environment = {key: value for key, value in os.environ.items() if key not in drop}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_DIR": str(tmp_path)}
    folder = tmp_path / "run"
    folder.mkdir()
    for part in (1, 2):  # the second time as after a resume
        done = subprocess.run(
            [sys.executable, "-c", WANDB, str(folder)], env=environment, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["abc123", "True", "False"]
        assert len(list(folder.glob("wandb/offline-run-*-abc123"))) == part
