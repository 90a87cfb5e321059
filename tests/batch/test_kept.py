"""Finished runs in a committed list: kept whole, taken only where they fit, never in place of what is here."""

import json
import shutil
from pathlib import Path
from threading import Event

import pandas as pd
import pytest

from saftnb import cli
from saftnb.batch import load_grid, run_grid, tables
from saftnb.batch.grid import GridError
from saftnb.batch.kept import keep, read_kept, take
from saftnb.batch.manifest import reason_to_run
from saftnb.batch.plan import Plan, plan
from saftnb.batch.run import Elsewhere, run_lock
from saftnb.run_folder import RunFolder, find_runs, read_json, write_json

SEED = """
import pandas as pd
from saftnb.batch import record
record(double=2 * seed, scores=pd.DataFrame({"task": ["x", "y"], "accuracy": [seed / 3, 0.5]}), seeds=[seed])
"""
TOTAL = """
import matplotlib.pyplot as plt
from saftnb.batch import record, tables
from saftnb.run_folder import run_folder
frame = tables(run_folder().parent, "scores")
record(total=frame.groupby("task")["accuracy"].sum().reset_index())
"""
PICTURE = "plt.plot([1, 2]);"
GRID = """
name: g
kept: kept/runs.json
runs:
  - {notebook: one, budget: 30, sweep: {seed: [0, 1]}}
  - {notebook: total, budget: 90, after: [one]}
"""


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, write_notebook) -> Path:
    """A desk on which the grid was executed once; tests work on copies of it."""
    desk = tmp_path_factory.mktemp("desk")
    write_notebook(desk / "notebooks" / "one.ipynb", SEED, parameters="seed: int = 0")
    write_notebook(desk / "notebooks" / "total.ipynb", TOTAL, PICTURE, parameters="x: int = 0")
    notebook = read_json(desk / "notebooks" / "total.ipynb")
    notebook["cells"][-1]["metadata"]["tags"] = ["headline-figure"]
    write_json(desk / "notebooks" / "total.ipynb", notebook)
    (desk / "g.yaml").write_text(GRID)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        patch.setenv("SAFTNB_STORE", str(desk / "store"))
        grid = load_grid("g.yaml")
        assert set(run_grid(grid, 2, say=silent).values()) == {"done"}
    return desk


@pytest.fixture
def desk(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "desk"
    shutil.copytree(finished, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("SAFTNB_STORE", str(copy / "store"))
    return copy


def ids(notebook: str) -> list[str]:
    return [run.id for run in load_grid("g.yaml").runs if run.notebook.name == notebook]


def taken(planned: Plan) -> set[str]:
    return {step.run.id for step in planned.steps if step.entry}


def test_keep_writes_the_list_the_tables_and_the_figure(desk: Path, capsys) -> None:
    assert cli.main(["keep", "g.yaml"]) == 0
    assert capsys.readouterr().out == "2 of 2 runs kept; wrote total.csv, total.png, runs.json\n"
    listed = read_json(desk / "kept" / "runs.json")["runs"]
    assert [entry["id"] for entry in listed] == ids("one")
    assert [entry["results"]["double"] for entry in listed] == [0, 2]
    assert listed[1]["manifest"]["parameters"] == {"seed": 1}
    text = (desk / "kept" / "runs.json").read_text()
    assert str(desk) not in text
    assert len(text.splitlines()) == 4  # a run a line, so that a diff shows runs
    frame = pd.read_csv(desk / "kept" / "total.csv")
    assert frame.to_dict("list") == {"task": ["x", "y"], "accuracy": [0.333333, 1.0]}
    assert (desk / "kept" / "total.png").read_bytes().startswith(b"\x89PNG")


def test_a_fresh_clone_takes_what_is_kept_and_reproduces_the_tables(desk: Path) -> None:
    keep(load_grid("g.yaml"))
    before = {path.name: path.read_bytes() for path in (desk / "kept").iterdir()}
    shutil.rmtree("runs")
    said: list[str] = []
    assert set(run_grid(load_grid("g.yaml"), 2, say=said.append).values()) == {"done"}
    assert said[0] == "grid g: 3 runs, 1 to do, 2 at a time, about 2 min by their budgets"
    assert sum(line.startswith("take ") and line.endswith("done before, in runs.json") for line in said) == 2
    assert sum(line.startswith("start ") for line in said) == 1
    for run_id in ids("one"):
        manifest = RunFolder(Path("runs/g") / run_id).manifest
        assert manifest["taken"] == "runs.json"
        assert manifest["checkpoints"] == []
    assert plan(load_grid("g.yaml")).todo == set()
    keep(load_grid("g.yaml"))
    assert {path.name: path.read_bytes() for path in (desk / "kept").iterdir()} == before


def test_what_is_taken_outlives_a_change_of_the_library_and_of_prose_but_not_of_code(desk: Path, monkeypatch) -> None:
    keep(load_grid("g.yaml"))
    shutil.rmtree("runs")
    for module in ("plan", "manifest"):
        monkeypatch.setattr(f"saftnb.batch.{module}.library_sha256", lambda: "another")
    assert taken(plan(load_grid("g.yaml"))) == set(ids("one"))
    notebook = read_json(desk / "notebooks" / "one.ipynb")
    notebook["cells"].insert(0, {"cell_type": "markdown", "metadata": {}, "source": "prose", "id": "p"})
    write_json(desk / "notebooks" / "one.ipynb", notebook)
    assert taken(plan(load_grid("g.yaml"))) == set(ids("one"))
    run_grid(load_grid("g.yaml"), 2, say=silent)
    assert not plan(load_grid("g.yaml")).todo & set(ids("one"))
    notebook["cells"][-1]["source"] += "\n2"
    write_json(desk / "notebooks" / "one.ipynb", notebook)
    changed = plan(load_grid("g.yaml"))
    assert taken(changed) == set()
    assert {step.reason for step in changed.steps if step.run.id in ids("one")} == {"notebook changed"}


def test_runs_of_this_machine_come_before_kept_ones_and_fresh_ignores_those(desk: Path) -> None:
    grid = load_grid("g.yaml")
    keep(grid)
    assert taken(plan(grid)) == set()  # all are done here
    first = ids("one")[0]
    shutil.rmtree(grid.runs[0].folder.path)
    assert taken(plan(grid)) == {first}
    assert plan(grid, fresh=True).todo == {first, grid.runs[2].id}
    assert taken(plan(grid, force=True)) == set()
    run_grid(grid, 2, say=silent)
    assert plan(grid).todo == set()
    assert plan(grid, fresh=True).steps[0].reason == "taken before"


def test_a_part_of_the_runs_never_replaces_more_of_them(desk: Path) -> None:
    grid = load_grid("g.yaml")
    keep(grid)
    whole = (desk / "kept" / "runs.json").read_text()
    shutil.rmtree(grid.runs[0].folder.path)
    keep(grid)
    assert (desk / "kept" / "runs.json").read_text() == whole
    grid.runs[1].folder.seal(grid.runs[1].folder.manifest | {"seconds": 1234.5})
    keep(grid)
    assert json.loads((desk / "kept" / "runs.json").read_text())["runs"][1]["manifest"]["seconds"] == 1234.5
    Path("g.yaml").write_text(GRID.replace("[0, 1]", "[1]"))
    kept = keep(load_grid("g.yaml"))
    assert (kept.runs, kept.dropped) == (1, 1)
    assert len(read_json(desk / "kept" / "runs.json")["runs"]) == 1


def test_a_run_that_was_executed_here_is_set_aside_not_lost(desk: Path, monkeypatch) -> None:
    grid = load_grid("g.yaml")
    keep(grid)
    run = grid.runs[0]
    executed = (run.folder.path / "run.ipynb").read_bytes()
    for module in ("plan", "manifest"):
        monkeypatch.setattr(f"saftnb.batch.{module}.library_sha256", lambda: "another")
    run_grid(grid, 2, say=silent)
    assert run.folder.manifest["taken"] == "runs.json"
    aside = run.folder.path.parent / ".previous" / run.id
    assert (aside / "run.ipynb").read_bytes() == executed
    run.folder.set_aside()  # what was only taken may go; what was executed stays aside
    assert (aside / "run.ipynb").read_bytes() == executed


def test_a_newer_list_replaces_what_was_taken_and_is_never_replaced_by_it(desk: Path) -> None:
    grid = load_grid("g.yaml")
    keep(grid)
    shutil.rmtree("runs")
    run_grid(grid, 2, say=silent)
    listed = read_json(desk / "kept" / "runs.json")
    listed["runs"][0]["results"]["scores"]["data"][1][1] = 0.25
    write_json(desk / "kept" / "runs.json", listed)
    keep(grid)
    assert read_json(desk / "kept" / "runs.json")["runs"] == listed["runs"]
    planned = plan(grid)
    assert taken(planned) == {run.id for run in grid.runs[:1]}
    assert planned.todo == {grid.runs[2].id}
    run_grid(grid, 2, say=silent)
    keep(grid)
    assert pd.read_csv("kept/total.csv")["accuracy"].tolist() == [0.333333, 0.75]


def test_runs_of_older_code_are_not_kept_nor_are_their_tables(desk: Path) -> None:
    keep(load_grid("g.yaml"))
    whole = (desk / "kept" / "runs.json").read_text()
    for name in ("one", "total"):
        notebook = read_json(desk / "notebooks" / f"{name}.ipynb")
        notebook["cells"][-1]["source"] += "\n2"
        write_json(desk / "notebooks" / f"{name}.ipynb", notebook)
    kept = keep(load_grid("g.yaml"))
    assert (kept.runs, [file.name for file in kept.files]) == (0, ["runs.json"])
    assert (desk / "kept" / "runs.json").read_text() == whole


def test_a_run_after_others_is_done_again_when_their_results_change(desk: Path) -> None:
    grid = load_grid("g.yaml")
    Path("g.yaml").write_text(GRID.replace("[0, 1]", "[0, 1, 2]"))
    more = plan(load_grid("g.yaml"))
    assert more.todo == {run.id for run in load_grid("g.yaml").runs[2:]}
    results = read_json(grid.runs[0].folder.path / "results.json")
    write_json(grid.runs[0].folder.path / "results.json", results | {"double": 7})
    grid.runs[0].folder.seal(grid.runs[0].folder.manifest)
    assert reason_to_run(grid.runs[2]) == "a run before it has other results"
    assert keep(grid).files == [grid.kept]


def test_a_run_that_another_launcher_has_is_not_taken(desk: Path) -> None:
    grid = load_grid("g.yaml")
    keep(grid)
    entry, run = read_kept(grid)[grid.runs[0].id], grid.runs[0]
    run.folder.set_aside()
    with run_lock(run, Event()), pytest.raises(Elsewhere):
        take(run, entry, "runs.json")
    assert not (run.folder.path / "manifest.json").exists()
    assert take(run, entry, "runs.json")["taken"] == "runs.json"
    assert "found" in take(run, entry, "runs.json", again=False)


def test_a_full_disk_fails_the_run_that_is_taken_and_no_other(desk: Path, monkeypatch) -> None:
    grid = load_grid("g.yaml")
    keep(grid)
    shutil.rmtree("runs")
    first = grid.runs[0].id

    def full(run, *rest):
        if run.id == first:
            raise OSError("no space left")
        return take(run, *rest)

    monkeypatch.setattr("saftnb.batch.engine.take", full)
    statuses = run_grid(grid, 2, say=silent)
    assert [statuses[run.id] for run in grid.runs] == ["failed", "done", "blocked"]


def test_two_tables_of_one_name_are_refused_before_anything_is_written(desk: Path) -> None:
    Path("g.yaml").write_text(GRID.replace("budget: 90", "budget: 90, sweep: {x: [0, 1]}"))
    grid = load_grid("g.yaml")
    run_grid(grid, 2, say=silent)
    with pytest.raises(GridError, match=r"two tables or figures of its later runs are called total\.csv"):
        keep(grid)
    assert not Path("kept").exists()


def test_tables_reads_folders_and_lists_alike(desk: Path) -> None:
    keep(load_grid("g.yaml"))
    from_list, from_runs = tables("kept/runs.json", "scores"), tables("runs/g", "scores")
    assert list(from_list.columns) == ["run", "seed", "task", "accuracy"]
    assert from_list["accuracy"].tolist() == [0.0, 0.5, 1 / 3, 0.5]
    key = ["run", "task"]
    pd.testing.assert_frame_equal(
        from_list.sort_values(key, ignore_index=True), from_runs.sort_values(key, ignore_index=True)
    )
    with pytest.raises(ValueError, match=r"runs\.json: no done run recorded a table 'total'"):
        tables("kept/runs.json", "total")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        tables("nowhere", "scores")


def test_what_cannot_be_kept_or_read_is_said_in_one_line(desk: Path, capsys) -> None:
    shutil.rmtree("runs")
    with pytest.raises(GridError, match="grid g: no run is done"):
        keep(load_grid("g.yaml"))
    Path("kept").mkdir()
    halves = (
        '{"schema": 1, "runs": [{"id": "x"}]}',
        '{"schema": 1, "runs": [{"id": "x", "manifest": {}, "results": {}}]}',
    )
    for text in ("{", '{"schema": 9, "runs": []}', "[]", *halves):
        Path("kept/runs.json").write_text(text)
        assert cli.main(["grid", "g.yaml", "--dry-run"]) == 2
        assert capsys.readouterr().err == "saftnb: runs.json: not a list of kept runs of schema 1\n"
    Path("g.yaml").write_text("runs: [{notebook: one}]")
    assert cli.main(["keep", "g.yaml"]) == 2
    assert "names no list of kept runs" in capsys.readouterr().err
    Path("g.yaml").write_text("kept: 3\nruns: [{notebook: one}]")
    assert cli.main(["keep", "g.yaml"]) == 2
    assert capsys.readouterr().err == "saftnb: g.yaml:1: kept is 3, not the path of a .json file\n"
    assert not list(find_runs("."))
