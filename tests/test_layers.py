"""Who may import whom, what only one place may do, and whether the docstrings' examples run."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "tdmarl"
LAYERS = [
    {"keys", "reduce", "seeds", "gru", "distributions", "tracing", "host", "compiling", "memory"},
    {"cuda_graph", "cpu_graph", "frozen", "fast_tanh", "cpu_loops", "row_blocks", "functions"},
    {"nets"},
    {"recurrent", "precision"},
    {"actors"},
    {"critics", "mixers", "q_actors", "action_critics", "deterministic_actors"},
    {"buffers", "losses", "prepare", "step", "compiled_step", "targets", "trust"},
    {"learners", "team_values", "team_actions", "replay"},
    {"mixing", "maddpg_loss"},
    {"envs", "log", "stats", "plot", "video", "distributed"},
    {"rollout", "chunk"},
    {"collect"},
    {"evaluate", "explain"},
    {"options"},
    {"run"},
    {"algorithms"},
    {"saving"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
NO_ALGORITHMS = {
    "envs",
    "rollout",
    "chunk",
    "collect",
    "evaluate",
    "run",
    "log",
    "stats",
    "plot",
    "video",
    "distributed",
    "step",
    "compiled_step",
    "explain",
    "trust",
    "learners",
}
NO_ENVIRONMENTS = {
    "compiling",
    "precision",
    "host",
    "keys",
    "reduce",
    "seeds",
    "gru",
    "nets",
    "recurrent",
    "distributions",
    "actors",
    "critics",
    "mixers",
    "q_actors",
    "buffers",
    "losses",
    "mixing",
    "maddpg_loss",
    "team_actions",
    "action_critics",
    "deterministic_actors",
    "replay",
    "targets",
    "team_values",
    "prepare",
    "step",
    "compiled_step",
    "tracing",
    "cuda_graph",
    "cpu_graph",
    "functions",
    "frozen",
    "fast_tanh",
    "cpu_loops",
    "row_blocks",
    "trust",
    "learners",
    "algorithms",
}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def part(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path, inner=True):
    """Top-level names imported; with ``inner`` also those inside functions."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if inner else [n for n in tree.body]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "tdmarl":
            yield from (f"tdmarl.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    me = part(path)
    assert me in RANK, f"{me} has no layer yet: give it one in {__file__}"
    for module in imports(path):
        if module.split(".")[0] != "tdmarl":
            continue
        assert "." in module, f"{path} imports the whole of tdmarl"
        other = module.split(".")[1]
        if other == "__version__":
            continue
        assert RANK[other] <= RANK[me], f"{path} imports {module}, which is above it"
        assert not (me in NO_ALGORITHMS and other == "algorithms"), f"{path} imports an algorithm"
        assert not (me in NO_ENVIRONMENTS and other == "envs"), f"{path} imports an environment"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_packages_are_imported_where_they_are_used(path):
    needed = {"torch", "torchrl", "tensordict", "tdmarl", "numpy"}  # torchrl needs numpy
    for module in imports(path, inner=False):
        top = module.split(".")[0]
        assert top in needed or top in sys.stdlib_module_names or top == "__future__", (
            f"{path} imports {top} at its top"
        )


def test_import_needs_only_torch_torchrl_and_tensordict():
    absent = ["vmas", "gym", "tyro", "tqdm", "wandb", "tensorboard", "matplotlib", "pettingzoo"]
    program = f"import sys; sys.modules.update(dict.fromkeys({absent})); import tdmarl"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


@pytest.mark.parametrize("name", [
    "losses", "mixing", "maddpg_loss", "team_actions", "prepare", "step", "trust", "learners", "critics", "replay",
    "buffers", "targets", "team_values",
])  # fmt: skip
def test_only_reduce_reduces(name):
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            function, owner = node.func.attr, getattr(node.func.value, "id", "")
            assert not (function in ("mean", "std", "var", "clip_grad_norm_") and owner != "reduce"), (
                f"{name}.py line {node.lineno}: {owner}.{function} would not know masks, seeds and ranks; use reduce"
            )


def test_only_step_goes_backward():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("backward", "autograd"):
                assert path.name in ("step.py", "trust.py"), f"{path} line {node.lineno} differentiates"


@pytest.mark.parametrize("name", sorted(NO_ENVIRONMENTS - {"algorithms"} | {"collect", "evaluate"}))
def test_no_number_is_sent_to_the_device(name):
    """`torch.where` with a Python number makes a tensor of it on the host and copies it; `masked_fill` does not."""
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "where":
            numbers = [a for a in node.args if isinstance(a, ast.Constant)]
            assert not numbers, f"{name}.py line {node.lineno}: use masked_fill"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda p: p.name)
def test_nobody_imports_recipes_and_recipes_stand_alone(path):
    for module in imports(path):
        top = module.split(".")[0]
        assert (
            top in ("tdmarl", "torch", "torchrl", "tensordict", "tyro") or top in sys.stdlib_module_names
        ), f"{path} imports {module}"
    name = f"recipes.{path.stem}"
    assert all(name not in set(imports(p)) for p in [*FILES, *(ROOT / "tests").rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_classes_are_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            lines = node.end_lineno - node.body[0].end_lineno  # without the docstring
            assert lines <= 170, f"{path}: {node.name} has {lines} lines"


def test_tests_mirror_the_package():
    for path in (ROOT / "tests").rglob("test_*.py"):
        name = path.stem.removeprefix("test_").removesuffix("_games")  # of algorithms: a file of their own
        folder = path.relative_to(ROOT / "tests").parent
        whole = {"axes", "layers", "recipes", "algorithms", "readme", "benchmarks", "same_as_vmas", "resets"}
        assert name in whole or (PACKAGE / folder / f"{name}.py").exists(), (
            f"{path} tests no file of the package"
        )
