"""The command line: what it prints, what it exits with, and that it starts quickly."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest

from saftnb import cli


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("notebooks").mkdir()
    cell = nbformat.v4.new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), "notebooks/a.ipynb")
    file = tmp_path / "g.yaml"
    file.write_text("runs: [{notebook: a, sweep: {seed: [0, 1]}}]")
    return file


def installed(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def test_python_m_saftnb_is_saftnb_and_neither_needs_torch(grid: Path) -> None:
    outputs = []
    for command in ([installed("saftnb")], [sys.executable, "-X", "importtime", "-m", "saftnb"]):
        shown = subprocess.run([*command, "grid", str(grid), "--dry-run"], capture_output=True, text=True)
        assert shown.returncode == 0
        outputs.append(shown.stdout)
    assert outputs[0] == outputs[1]
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
    assert "saftnb.batch.grid" in imported
    assert not imported & {"torch", "pandas", "numpy", "papermill", "nbformat", "jupyter_client"}


def test_a_dry_run_writes_nothing(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["grid", str(grid), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop() == "2 to do"
    assert len(lines) == 2
    assert all(line.startswith("run      a-") and line.endswith(": new") for line in lines)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "runs: [{notebook: a, parameters: {sede: 1}}]",
            [],
            "saftnb: g.yaml:1: a: unknown parameter 'sede'; it declares: seed\n",
        ),
        ("runs: [{notebook: b}]", [], "saftnb: g.yaml:1: there is no notebook 'b'; there are: a"),
        ("runs: [{notebook: a}]", ["--jobs", "0"], "saftnb: --jobs is 0, not a whole number of at least 1\n"),
        (None, [], "saftnb: g.yaml: no such grid file\n"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(grid, capsys, text, options, message) -> None:
    grid.unlink()
    if text is not None:
        grid.write_text(text)
    assert cli.main(["grid", "g.yaml", *options]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(message)
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["done", "done"], 0),
        (["done", "failed"], 1),
        (["done", "killed"], 1),
        (["blocked", "done"], 1),
        (["done", "running"], 1),
        (["interrupted", "done"], 130),
        (["failed", "not started"], 130),
    ],
)
def test_the_exit_code_is_0_only_if_every_run_is_done(grid, monkeypatch, statuses, code) -> None:
    given = []

    def run_grid(loaded, jobs, force, **_):
        given.append((loaded.runs[0].root, jobs, force))
        return dict(enumerate(statuses))

    monkeypatch.setattr("saftnb.batch.engine.run_grid", run_grid)
    assert cli.main(["grid", "g.yaml", "--runs", "there", "--jobs", "3", "--force"]) == code
    assert given == [(grid.parent / "there", 3, True)]


def test_report_and_fetch_hand_over(grid: Path, monkeypatch, capsys) -> None:
    calls = []
    publish = types.SimpleNamespace(publish_runs=lambda runs, out, *, code: calls.append((runs, out, code)) or out)

    def fetch(suite: str) -> None:
        calls.append(suite)
        if suite == "none":
            raise ValueError("no suite 'none';\nthere is: pocket")

    monkeypatch.setitem(sys.modules, "saftnb.publish", publish)
    monkeypatch.setitem(sys.modules, "saftnb.prepare", types.SimpleNamespace(fetch=fetch))
    assert cli.main(["report", "notebooks", "-o", "out"]) == 0
    assert cli.main(["fetch", "pocket"]) == 0
    assert calls == [(Path("notebooks"), Path("out"), True), "pocket"]
    assert cli.main(["report", "none", "-o", "out"]) == 2
    assert cli.main(["fetch", "none"]) == 2
    assert capsys.readouterr().err == (
        "saftnb: none: no such folder of runs\nsaftnb: no suite 'none'; there is: pocket\n"
    )
    assert len(calls) == 3


def test_an_error_of_ours_keeps_its_traceback(grid: Path, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("saftnb.batch.engine.run_grid", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["grid", "g.yaml"])


def test_one_real_grid_with_a_library_that_is_not_the_installed_one(grid: Path) -> None:
    package = Path(cli.__file__).parent
    shutil.copytree(package, "saftnb", ignore=shutil.ignore_patterns("__pycache__"))
    cells = [
        nbformat.v4.new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(f"import saftnb; assert saftnb.__file__.startswith({str(grid.parent)!r})"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), "notebooks/a.ipynb")
    command = [sys.executable, "-m", "saftnb", "grid", "g.yaml", "--jobs", "1", "--report", "out"]
    environment = os.environ | {"PATH": "/usr/bin:/bin"}  # no python of the venv to be found by name
    first = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    assert len(list(Path("runs/g").glob("a-*/manifest.json"))) == 2
    assert len(list(Path("out").glob("a-*.html"))) == 2
    lines = first.stdout.splitlines()
    assert next(i for i, line in enumerate(lines) if line.startswith("report")) < len(lines) - 2, "before the grid ends"
    assert lines[-1] == "open out/index.html"
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0
    assert again.stdout.count("done before") == 2
    Path("out/notes.txt").write_text("mine")
    refused = subprocess.run([*command, "--force"], capture_output=True, text=True, env=environment)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "saftnb: out holds notes.txt, which no report wrote; choose another folder\n"


def test_an_engine_that_cannot_be_had_is_one_line(grid: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "saftnb.batch.cluster", raising=False)
    assert cli.main(["grid", "g.yaml", "--engine", "ray"]) == 2
    assert cli.main(["grid", "g.yaml", "--address", "here:1"]) == 2
    grid.write_text("engine: ray\nruns: [{notebook: a}]")
    assert cli.main(["grid", "g.yaml"]) == 2
    shown = capsys.readouterr()
    needs = "saftnb: the engine ray needs Ray: pip install 'saftnb[cluster]'\n"
    assert shown.err == f"{needs}saftnb: --address is for --engine ray\n{needs}"
    assert shown.out == ""
    assert not Path("runs").exists()


def test_a_terminal_of_another_alphabet_ends_no_command(tmp_path):
    told = {**os.environ, "PYTHONIOENCODING": "ascii"}
    grid = tmp_path / "g.yaml"
    cell = nbformat.v4.new_code_cell("s: str = ''", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "a.ipynb")
    grid.write_text("runs: [{notebook: a.ipynb, parameters: {s: grün}}]", encoding="utf-8")
    command = [sys.executable, "-m", "saftnb", "grid", str(grid), "--runs", str(tmp_path), "--dry-run"]
    said = subprocess.run(command, env=told, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "s=gr\\xfcn" in said.stdout
