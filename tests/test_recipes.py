"""Every recipe as a user runs it: a process of its own, tiny sizes, killed, stopped and resumed."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint

import tdmarl
from tdmarl.log import read_metrics
from tdmarl.plot import main as plot
from tdmarl.saving import load_policy

ROOT = Path(__file__).parent.parent
ALL = sorted((ROOT / "recipes").glob("*.py"))
RECIPES = [recipe for recipe in ALL if recipe.stem.endswith("_vmas")]  # one per algorithm, each keeps a run
LOOPS = [r for r in RECIPES if r.stem.split("_")[0] in ("happo", "maddpg", "mappo", "qmix")]  # one of a kind
RECURRENT = [recipe for recipe in LOOPS if recipe.stem != "maddpg_vmas"]
TINY = [
    "--num-envs", "4", "--max-steps", "10", "--frames-per-batch", "40", "--total-frames", "400",
    "--minibatch-size", "20", "--eval-every", "3", "--eval-episodes", "4", "--device", "cpu",
]  # fmt: skip
DISCRETE = ("iql", "qmix", "vdn")
REPLAYING = (*DISCRETE, "maddpg")
ITERATIONS = 10
TIMES = "seconds", "frames_per_second", "compile_seconds"


def tiny(recipe: Path) -> list[str]:
    """A recipe's arguments for a run of seconds."""
    if recipe.stem == "qmix_two_step":
        return ["--total-frames", "256"]
    if family(recipe) in REPLAYING:  # with buffers that are overwritten
        few = ["--cross-play-episodes", "4"] if recipe.stem == "maddpg_simple_tag" else []
        return [
            *TINY,
            *few,
            "--num-updates",
            "2",
            "--buffer-size",
            "100",
            "--checkpoint-every",
            "1",
            "--no-anneal",
        ]
    return [*TINY, "--num-epochs", "2"]


def family(recipe: Path) -> str:
    """The algorithm's name."""
    return recipe.stem.split("_")[0]


# a process whose generators were used before the recipe starts
DISTURBED = """
import random, runpy, sys
import numpy, torch
torch.rand(5), numpy.random.rand(3), random.random()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(recipe: Path, *argv: str, disturbed: bool = False) -> subprocess.Popen[str]:
    """A recipe's process, from outside the project's folder."""
    before = ["-c", DISTURBED] if disturbed else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *before, str(recipe), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """What a process wrote, once it has ended with the exit code expected."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out, err


def rows(folder: Path) -> list[dict[str, str]]:
    """The table without what a clock measured."""
    with (folder / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in TIMES} for row in table]


def wait_for_rows(folder: Path, number: int, process: subprocess.Popen[str]) -> None:
    """Until the table has so many rows."""
    path = folder / "metrics.csv"
    while not path.exists() or path.read_text().count("\n") <= number:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def complete_state(folder: Path) -> dict[str, str]:
    """Digests of the last checkpoint's bytes but the run's clock: parameters, optimizers, generators, simulator.

    Not the bytes: the difference that pytest shows of two large ones takes it many minutes.
    """
    with zipfile.ZipFile(folder / "checkpoints" / "last.torchrl") as archive:
        names = [name for name in archive.namelist() if name.startswith("components/")]
        kept = {name: archive.read(name) for name in names if "-run/" not in name}
    return {name: hashlib.sha256(content).hexdigest() for name, content in kept.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each recipe's undisturbed run."""
    base = tmp_path_factory.mktemp("whole")
    folders = {recipe.stem: base / recipe.stem for recipe in RECIPES}
    for recipe in RECIPES:
        out, err = finish(start(recipe, *tiny(recipe), "--out", str(folders[recipe.stem])))
        *said, last = out.splitlines()
        assert err == "" and last.startswith(f"{folders[recipe.stem]}: 400 frames in ")  # piped: no bar
        if family(recipe) in REPLAYING:
            assert len(said) == 1 and said[0].startswith("replay: 100 rows of ")  # before it is allocated
        else:
            assert not said
    return folders


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_leaves_a_run_that_acts_again(recipe: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    folder = whole[recipe.stem]
    table = rows(folder)
    assert [int(row["frames"]) for row in table] == [40 * (i + 1) for i in range(ITERATIONS)]
    assert [i + 1 for i, row in enumerate(table) if row["eval_return_mean_agents"]] == [3, 6, 9, 10]
    assert all(row["return_mean_agents"] for row in table)
    config = json.loads((folder / "config.json").read_text())
    assert config["algorithm"]["name"] == recipe.stem.split("_")[0] and config["options"]["num_envs"] == 4
    policy = load_policy(folder)
    seen = TensorDict({"agents": TensorDict({"observation": torch.zeros(2, 3, 18)}, [2, 3])}, [2])
    action = policy(seen)["agents", "action"]
    assert action.shape == ((2, 3) if family(recipe) in DISCRETE else (2, 3, 2))
    assert plot([str(folder), "--out", str(tmp_path / "curve.png")]) == 0


@pytest.mark.parametrize("recipe", LOOPS, ids=lambda recipe: recipe.stem)
def test_a_killed_run_resumes_to_the_bits_of_an_undisturbed_one(
    recipe: Path, whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start(recipe, *tiny(recipe), "--out", str(folder))
    wait_for_rows(folder, 2, process)
    time.sleep(random.Random(recipe.stem).uniform(0, 0.5))
    process.kill()
    process.communicate()
    done = int(Checkpoint.manifest(folder / "checkpoints" / "last.torchrl")["metadata"]["iteration"])
    assert 1 <= done < ITERATIONS
    kept = read_metrics(folder / "metrics.csv")[:done]
    finish(start(recipe, "--resume", str(folder), disturbed=True))
    table = read_metrics(folder / "metrics.csv")
    assert table[:done] == kept and len(table) == ITERATIONS  # seconds included: not run again
    assert json.loads((folder / "config.json").read_text())["resumes"][0]["iteration"] == done
    assert rows(folder) == rows(whole[recipe.stem])
    assert complete_state(folder) == complete_state(whole[recipe.stem])


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_to_resume_from(
    number: int, code: int, whole: dict[str, Path], tmp_path: Path
) -> None:
    recipe, folder = RECIPES[code % len(RECIPES)], tmp_path / "run"
    process = start(recipe, *tiny(recipe), "--out", str(folder), "--checkpoint-every", "0", disturbed=True)
    wait_for_rows(folder, 2, process)
    process.send_signal(number)
    _, err = finish(process, code)
    assert err.count("\n") == 1 and "Traceback" not in err
    done = int(Checkpoint.manifest(folder / "checkpoints" / "last.torchrl")["metadata"]["iteration"])
    assert len(rows(folder)) == done >= 2
    finish(start(recipe, "--resume", str(folder)))
    assert rows(folder) == rows(whole[recipe.stem])


@pytest.mark.parametrize("argv, words", [
    (["--scenario", "navigatoin"], "navigation"),
    (["--minibatch-size", "101"], "--minibatch-size 101 must be between 1 and the "),
    (["--frames-per-batch", "42"], "--frames-per-batch 42 is not a multiple of --num-envs 4; 40 would be"),
    (["--device", "cuda:9"], "--device cuda:9 is not there"),
    (["--logger", "mlflow"], "--logger mlflow needs the package mlflow: pip install mlflow"),
])  # fmt: skip
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_bad_argument_is_one_line_and_exit_code_2(
    recipe: Path,
    argv: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else find(name))
    module = load(recipe)
    (kind,) = (
        v for n, v in vars(module).items() if n.endswith("Options") and v.__module__ == module.__name__
    )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        module.launch(module.main, kind, [*tiny(recipe), "--out", str(tmp_path / "run"), *argv])
    signal.signal(signal.SIGTERM, before)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1 and words in err
    assert not (tmp_path / "run").exists()


SEQUENCES = ["--recurrent", "--chunk-length", "5", "--total-frames", "80", "--eval-every", "0"]


@pytest.mark.parametrize("recipe", RECURRENT, ids=lambda recipe: recipe.stem)
def test_a_recipe_with_memory_leaves_a_policy_with_memory(recipe: Path, tmp_path: Path) -> None:
    finish(start(recipe, *tiny(recipe), *SEQUENCES, "--out", str(tmp_path / "run")))
    policy = load_policy(tmp_path / "run")
    assert ("agents", "actor_hidden") in policy.in_keys
    discrete = family(recipe) in DISCRETE
    env = tdmarl.VmasEnv(
        "navigation", num_envs=2, max_steps=3, continuous_actions=not discrete, seed=0, n_agents=3
    )
    assert tdmarl.evaluate(env, policy, episodes=2)["length"].tolist() == [3, 3]


@pytest.mark.parametrize("name", ["mappo", "qmix"])
def test_a_run_with_memory_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / f"{name}_vmas.py"
    finish(
        start(recipe, *tiny(recipe), *SEQUENCES, "--total-frames", "160", "--out", str(tmp_path / "whole"))
    )
    finish(start(recipe, *tiny(recipe), *SEQUENCES, "--out", str(tmp_path / "run")))
    finish(start(recipe, "--resume", str(tmp_path / "run"), "--total-frames", "160", disturbed=True))
    assert complete_state(tmp_path / "run") == complete_state(tmp_path / "whole")


@pytest.mark.parametrize("name", ["haa2c", "hatrpo"])
def test_happos_kin_resume_to_the_same_bits_and_act_again(name: str, tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "happo_vmas.py"
    argv = [*tiny(recipe), "--algorithm", name, "--eval-every", "0", "--no-anneal", "--total-frames"]
    finish(start(recipe, *argv, "160", "--out", str(tmp_path / "whole")))
    finish(start(recipe, *argv, "80", "--out", str(tmp_path / "run")))
    finish(start(recipe, "--resume", str(tmp_path / "run"), "--total-frames", "160", disturbed=True))
    assert complete_state(tmp_path / "run") == complete_state(tmp_path / "whole")
    seen = TensorDict({"agents": TensorDict({"observation": torch.zeros(2, 3, 18)}, [2, 3])}, [2])
    assert load_policy(tmp_path / "run")(seen)["agents", "action"].shape == (2, 3, 2)


@pytest.mark.parametrize("name, sizes", [
    ("happo", {"agents_0": (2, 8), "agent_1": (1, 9)}),
    ("mappo-unshared", {"agents_0": (2, 8), "agent_1": (1, 9)}),
    ("mappo", {"agents": (3, 9)}),
])  # fmt: skip
def test_joints_of_a_robot_train_resume_and_act_again(
    name: str, sizes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    recipe, folder = ROOT / "recipes" / "happo_mamujoco.py", tmp_path / "run"
    argv = [
        *tiny(recipe),
        "--algorithm",
        name,
        "--scenario",
        "Hopper",
        "--partition",
        "3x1",
        "--eval-every",
        "0",
    ]
    finish(start(recipe, *argv, "--total-frames", "80", "--out", str(folder)))
    _, err = finish(start(recipe, "--resume", str(folder), "--total-frames", "160"))
    assert "starts new episodes" in err and len(rows(folder)) == 4
    seen = TensorDict(
        {g: TensorDict({"observation": torch.zeros(2, *s)}, [2, s[0]]) for g, s in sizes.items()}, [2]
    )
    acted = load_policy(folder)(seen)
    assert all(acted[group, "action"].shape == (2, n, 1) for group, (n, _) in sizes.items())


@pytest.mark.parametrize("argv, words", [
    (["--chunk-length", "3"], "--chunk-length 3 must divide the 10 steps of a batch"),
    (["--minibatch-size", "9"], "--minibatch-size 9 holds no sequence of --chunk-length 10"),
])  # fmt: skip
def test_sequences_that_do_not_fit_are_one_line(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, before = ROOT / "recipes" / "happo_vmas.py", signal.getsignal(signal.SIGTERM)
    module, given = load(recipe), [*tiny(recipe), "--recurrent", *argv, "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        module.launch(module.main, module.HAPPOOptions, given)
    signal.signal(signal.SIGTERM, before)
    assert end.value.code == 2 and words in capsys.readouterr().err


def load(recipe: Path) -> Any:
    """A recipe's module, without running it."""
    spec = importlib.util.spec_from_file_location(f"recipe_{recipe.stem}", recipe)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_without_vmas_the_command_to_type_is_named(tmp_path: Path) -> None:
    (tmp_path / "vmas.py").write_text("raise ModuleNotFoundError(\"No module named 'vmas'\", name='vmas')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + DISTURBED
    done = subprocess.run(
        [sys.executable, "-c", code, str(RECIPES[0]), *tiny(RECIPES[0]), "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "pip install" in done.stderr and "vmas" in done.stderr


@pytest.mark.parametrize("recipe", [r for r in ALL if r not in RECIPES], ids=lambda recipe: recipe.stem)
def test_every_other_recipe_runs(recipe: Path, tmp_path: Path) -> None:
    keeps_no_run = recipe.stem == "embed_in_torchrl"  # TorchRL's trainer does
    argv = [a for a in tiny(recipe) if not keeps_no_run or a not in ("--eval-every", "3")]
    if recipe.stem != "qmix_two_step":
        argv += ["--total-frames", "80", "--out", str(tmp_path / "run")]
    out, err = finish(start(recipe, *argv))
    assert out and "Traceback" not in err


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.stem)
def test_a_recipe_stays_short(recipe: Path) -> None:
    assert len(recipe.read_text().splitlines()) <= 120


def test_predator_and_prey_are_played_against_their_past_also_after_a_resume(tmp_path: Path) -> None:
    recipe, folder = ROOT / "recipes" / "maddpg_simple_tag.py", tmp_path / "run"
    argv = [*tiny(recipe), "--out", str(folder)]
    finish(start(recipe, *argv, "--total-frames", "80"))
    out, _ = finish(start(recipe, "--resume", str(folder), "--total-frames", "160"))
    with (folder / "cross_play.csv").open() as file:
        table = list(csv.reader(file))
    assert table[0][1:] == ["random", "middle", "last"] == [row[0] for row in table[1:]]
    assert all(float(cell) >= 0 for row in table[1:] for cell in row[1:]) and out.count("middle") == 2
    again, _ = finish(start(recipe, "--resume", str(folder)))
    assert "is finished" in again and "-0.0" not in out


@pytest.mark.parametrize("continuous", [False, True])
def test_maddpg_learns_in_the_particle_environments(continuous: bool, tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "maddpg_mpe.py"
    more = ["--continuous"] if continuous else []
    finish(
        start(
            recipe,
            *tiny(recipe),
            *more,
            "--num-workers",
            "0",
            "--total-frames",
            "80",
            "--out",
            str(tmp_path / "run"),
        )
    )
    policy = load_policy(tmp_path / "run")
    assert {("speaker", "action"), ("listener", "action")} <= set(policy.out_keys)
