from __future__ import annotations

import json
from pathlib import Path

import pytest

from tdmarl import log
from tdmarl.plot import curve, main, plot


def run_folder(folder: Path, offset: float = 0.0, rows: int = 6) -> Path:
    """The folder of a run of which every second iteration was evaluated."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"algorithm": {}, "options": {}, "specs": {}}))
    table = log.Table(folder / "metrics.csv")
    for i in range(1, rows + 1):
        evaluated = {"eval_return_mean_agents": i + offset} if i % 2 == 0 else {}
        row = {"iteration": i, "frames": 100 * i, "return_mean_agents": i / 2, "loss": 0.1}
        table.append({**row, **evaluated})
    return folder


def test_a_curve_holds_what_was_measured(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a")
    assert curve(folder, "eval_return_mean_agents") == ([200.0, 400.0, 600.0], [2.0, 4.0, 6.0])
    assert curve(folder, "return_mean_agents")[1] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


@pytest.mark.parametrize("name", ["curve.png", "curve.pdf"])
def test_several_runs_make_one_picture(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(run_folder(tmp_path / run, offset)) for run, offset in (("a", 0.0), ("b", 1.0))]
    out = tmp_path / name
    assert main([*folders, "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert out.read_bytes()[:4] in (b"\x89PNG", b"%PDF")


def test_every_run_is_drawn_twice_with_its_own_color(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    plot([run_folder(tmp_path / "a"), run_folder(tmp_path / "b", 1.0)], tmp_path / "c.png")
    (axes,) = drawn[0].axes
    assert [line.get_color() for line in axes.lines] == ["C0", "C0", "C1", "C1"]
    assert list(axes.lines[3].get_ydata()) == [3.0, 5.0, 7.0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    plot([tmp_path / "a"], tmp_path / "c.png", "loss")
    assert [list(line.get_ydata()) for line in drawn[1].axes[0].lines] == [[0.1] * 6]


def test_a_wrong_folder_or_column_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, empty = run_folder(tmp_path / "a"), run_folder(tmp_path / "empty", rows=0)
    for argv, words in (
        ([str(tmp_path / "no")], "is not the folder of a run"),
        ([str(empty)], "has no iterations yet"),
        ([str(folder), "--column", "los"], "has no column 'los'; it has iteration, frames"),
        ([str(folder), "--out", str(tmp_path / "no" / "c.png")], "No such file"),
        ([str(folder), "--out", str(tmp_path / "c.word")], "word"),
    ):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and words in err


def test_a_missing_package_is_named_with_the_command_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(run_folder(tmp_path / "a")), "--out", str(tmp_path / "c.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
