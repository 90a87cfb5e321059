"""Real notebooks in real kernels: how each ends, what its manifest says, and when it is run again.

Kernels take seconds to start, so one grid is executed once and each test looks at a part of what it left.
"""

import getpass
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
import psutil
import pytest

from saftnb.batch import load_grid, results, run_grid
from saftnb.batch import manifest as manifests
from saftnb.batch import plan as plans
from saftnb.batch import run as runs
from saftnb.batch.grid import GridError
from saftnb.batch.manifest import reason_to_run
from saftnb.run_folder import RunFolder, find_runs
from saftnb.scrub import one_line

TRAIN = [
    """
import os, sys
from pathlib import Path
import saftnb
from saftnb.batch import record
from saftnb.run_folder import used_checkpoint
folder = Path(os.environ["SAFTNB_STORE"]) / task
trained = not folder.exists()
if trained:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
used_checkpoint(folder, "f-" + task)
record(lr_twice=lr * 2, kind=type(lr).__name__, table={"a": [1]})
""",
    """
package = str(Path(saftnb.__file__).parent)
threads, backend = os.environ["OMP_NUM_THREADS"], os.environ["MPLBACKEND"]
seen = [sys.executable, os.getcwd(), threads, package, trained, backend]
print("|".join(map(str, seen)))
""",
]
ORPHAN = """
import os
from pathlib import Path
Path("orphan.pid").write_text(str(os.getpid()))
os.kill(os.getppid(), 9)
import time; time.sleep(600)
"""
TOKEN = "tok-5f3a9c1b"
GRID = """
jobs: 2
runs:
  - {notebook: train, zip: {task: [x, y], lr: [1e-3, 1]}}
  - {notebook: raises, budget: 60}
  - {notebook: dies}
  - {notebook: leaves}
  - {notebook: orphan}
  - {notebook: shot}
  - {notebook: hungry, resources: {memory: 0.5}}
  - {notebook: late, resources: {time_limit: 8}}
  - {notebook: silent, after: [dies]}
"""


library_sha256 = manifests.library_sha256


@pytest.fixture(scope="module", autouse=True)
def library():
    """A library that stays as it is while these tests run, whoever edits it."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (manifests, runs, plans):
            patch.setattr(module, "library_sha256", lambda: "library")
        yield


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory, write_notebook):
    """A folder in which GRID was executed once; its statuses and the lines that were printed."""
    desk = tmp_path_factory.mktemp("of{f}ice")  # papermill formats paths: braces must not matter
    books = desk / "notebooks"
    declared = "task: str = 'x'\nlr: float = 0.1  # rate, a = b\nseed: int = 3\ndevice: str = 'cpu'"
    write_notebook(books / "train.ipynb", *TRAIN, parameters=declared)
    write_notebook(
        books / "raises.ipynb",
        "1",
        "import os, warnings",
        "raise ValueError('\\x1b[31mno\\x1b[0m ' + os.environ['DESK_TOKEN'] + '\\nfile /home/jo/data/x.txt')",
        "2",
    )
    write_notebook(books / "dies.ipynb", "1", "import os; os._exit(0)", "2")
    write_notebook(
        books / "leaves.ipynb", "from saftnb.batch import record; record(a=1)", "import sys; sys.exit(0)", "2"
    )
    write_notebook(books / "orphan.ipynb", ORPHAN)
    write_notebook(books / "silent.ipynb", "1")
    write_notebook(books / "shot.ipynb", "1", "import os; os.kill(os.getpid(), 9)", "2")
    write_notebook(books / "hungry.ipynb", "import time", "much = b'x' * 2**30; time.sleep(60)", "2")
    write_notebook(books / "late.ipynb", "import time; time.sleep(60)", "2")
    (desk / "grid.yaml").write_text(GRID)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFTNB_STORE", "store")  # relative: the kernel runs in another folder
        kernel = desk / "jupyter" / "kernels" / "python3" / "kernel.json"  # somebody's other Python
        kernel.parent.mkdir(parents=True)
        kernel.write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
        patch.setenv("JUPYTER_PATH", str(desk / "jupyter"))
        sockets = Path(tempfile.mkdtemp(dir="/tmp"))
        patch.setenv("TMPDIR", str(sockets))
        patch.setattr(tempfile, "tempdir", None)
        patch.setenv("MPLBACKEND", "agg")
        patch.setenv("DESK_TOKEN", TOKEN)
        patch.chdir(desk)
        lines: list[str] = []
        statuses = run_grid(load_grid("grid.yaml"), say=lines.append)
    assert (desk / "store" / "x").is_dir()
    sockets.rmdir()  # which fails if anything is left in it
    return desk, statuses, lines


@pytest.fixture
def copy(office, desk: Path):
    """The grid of a fresh copy of the office, to be altered."""
    shutil.copytree(office[0], desk, dirs_exist_ok=True)
    return load_grid("grid.yaml")


def manifest_of(office, notebook: str, task: str = "x") -> tuple[Path, dict]:
    found = [
        run
        for run in find_runs(office[0] / "runs")
        if run.notebook == notebook and run.parameters.get("task", task) == task
    ]
    assert len(found) == 1
    return found[0].path, found[0].manifest


def test_done(office) -> None:
    folder, manifest = manifest_of(office, "train", "x")
    assert sorted(path.name for path in folder.iterdir()) == [
        "log.txt",
        "manifest.json",
        "results.json",
        "run.ipynb",
    ]
    assert not list((office[0] / "notebooks").glob(".*"))
    results = json.loads((folder / "results.json").read_text())
    assert results == {"lr_twice": 0.002, "kind": "float", "table": {"a": [1]}}
    assert (manifest["status"], manifest["reason"], manifest["grid"]) == ("done", None, "grid")
    assert manifest["parameters"] == {"task": "x", "lr": 0.001, "seed": 3, "device": "cpu"}
    assert manifest["overrides"] == {"task": "x", "lr": 0.001}
    assert (manifest["seed"], manifest["device"], manifest["threads"]) == (3, "cpu", 1)
    assert manifest["checkpoints"] == [{"name": "x", "fingerprint": "f-x"}]
    assert manifest["versions"]["python"] == platform.python_version()
    assert {"papermill", "torch", "saftnb"} <= manifest["versions"].keys()
    assert 0 < manifest["seconds"] < 120
    assert manifest["started"] <= manifest["finished"]
    assert manifest["started"].endswith("+00:00")
    assert manifest["library_sha256"] == "library"
    assert RunFolder(folder).done


def test_the_kernel_is_this_python_in_the_notebooks_folder_with_its_share_of_threads(office) -> None:
    folder, _ = manifest_of(office, "train", "x")
    notebook = nbformat.read(folder / "run.ipynb", as_version=4)
    printed = notebook.cells[-1].outputs[0].text.strip()
    executable, cwd, threads, package, trained, backend = printed.split("|")
    assert Path(executable).samefile(sys.executable)
    assert Path(executable).parent == Path(sys.executable).parent  # the venv's, not what it links to
    assert Path(cwd) == office[0] / "notebooks"
    assert (threads, trained) == ("1", "True")
    assert backend.endswith("inline")  # and not the shell's, with which figures vanish
    assert Path(package) == Path(manifests.__file__).parent.parent


def test_failed_killed_and_left_early(office) -> None:
    expected = {
        "raises": ("failed", "ValueError: no *** file …/x.txt (cell 3)"),
        "dies": ("killed", "the kernel died (cell 2)"),
        "leaves": ("failed", "stopped early: 1 cells were not run"),
        "orphan": ("killed", "the notebook's process got SIGKILL"),
        "shot": ("killed", "the kernel got SIGKILL, as when memory runs out (cell 2)"),
        "late": ("killed", "over its time limit of 8 s"),
    }
    for notebook, (status, reason) in expected.items():
        folder, manifest = manifest_of(office, notebook)
        said = manifest["reason"].removesuffix(" (cell 1)")  # on a busy machine the kernel may not be there yet
        assert (manifest["status"], said) == (status, reason)
        assert not RunFolder(folder).done
        assert office[1][folder.name] == status
    assert manifest_of(office, "raises")[1]["budget"] == 60
    _, hungry = manifest_of(office, "hungry")
    assert hungry["status"] == "killed"
    assert re.fullmatch(r"out of memory: its processes took [01]\.\d\d GiB of 0\.5 GiB \(cell 2\)", hungry["reason"])
    assert hungry["peak_memory"] > 0.5
    assert hungry["resources"] == {"memory": 0.5}
    assert manifest_of(office, "late")[1]["seconds"] < 30
    assert "Kernel died" in (manifest_of(office, "dies")[0] / "log.txt").read_text()


def test_a_kernel_whose_process_was_killed_does_not_stay(office) -> None:
    pid = int((office[0] / "notebooks" / "orphan.pid").read_text())
    try:
        kernel = psutil.Process(pid)
        if kernel.status() != psutil.STATUS_ZOMBIE:
            kernel.wait(timeout=10)
    except psutil.NoSuchProcess:
        pass


def test_what_waits_for_a_failure_is_blocked_and_leaves_nothing(office) -> None:
    desk, statuses, lines = office
    blocked = [run_id for run_id, status in statuses.items() if status == "blocked"]
    assert len(blocked) == 1
    assert blocked[0].startswith("silent-")
    assert not (desk / "runs" / "grid" / blocked[0]).exists()
    assert any(line.startswith(f"blocked  {blocked[0]}: dies-") and "is killed" in line for line in lines)
    assert lines[-1].startswith("grid grid: 10 runs: ")
    assert all(part in lines[-1] for part in ("2 done", "2 failed", "5 killed", "1 blocked"))


def test_manifests_name_no_place_and_no_one(office) -> None:
    secrets = [str(office[0]), str(Path.home()), str(Path.cwd()), sys.prefix, "/home/", TOKEN]
    secrets += [name for name in (platform.node(), getpass.getuser()) if len(name) > 2]
    for run in find_runs(office[0] / "runs"):
        text = run.manifest_file.read_text()
        assert [secret for secret in secrets if secret in text] == []
        metadata = nbformat.read(run.notebook_file, as_version=4).metadata
        assert str(office[0]) not in json.dumps(metadata)


def test_reasons_are_cleaned(monkeypatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node-17")
    monkeypatch.setenv("API_KEY", "k-0123456789")
    raw = f"\x1b[0;31mX\x1b[0m:\n  {Path.home()}/a b/c {Path.home()}/data/d node-17 k-0123456789"
    raw += " /opt/x y/z https://a.org/b/c 1/2 'a/b' /code/theirs/e.py:3"
    assert one_line(raw) == "X: ~/a b/c …/d host *** …/x y/z https://a.org/b/c 1/2 'a/b' …/e.py:3"
    assert len(one_line("x" * 1000)) == 300
    assert one_line("no /data/my own/f.txt", [Path("/data/my own")]) == "no f.txt"


def test_results_are_one_tidy_row_per_run(office) -> None:
    every = results(office[0] / "runs")
    assert sorted(every["notebook"]) == [
        "dies", "hungry", "late", "leaves", "orphan", "raises", "shot", "train", "train",
    ]  # fmt: skip
    named = every.set_index("notebook")
    assert named.loc["leaves", "status"] == "failed"
    assert "a" not in every, "what a run recorded that is not done is no result"
    assert list(every.columns) == [
        "grid", "run", "notebook", "status", "seconds", "task", "lr", "seed", "device", "lr_twice", "kind",
    ]  # fmt: skip
    frame = every[every["status"] == "done"].set_index("task")
    assert sorted(frame.index) == ["x", "y"]
    assert frame.loc["x", "lr_twice"] == 0.002
    assert frame.loc["y", "lr_twice"] == 2.0
    assert frame.loc["y", "kind"] == "float"
    folder, _ = manifest_of(office, "train", "x")
    assert len(results(folder)) == 1
    with pytest.raises(FileNotFoundError, match="no such folder of runs"):
        results(office[0] / "none")


def test_results_keep_a_name_that_is_also_a_parameter_apart(copy, desk: Path, monkeypatch) -> None:
    finish_with(monkeypatch, "done", {"lr": 5, "seed": 3})
    runs.run_one(copy.runs[0])
    row = results(copy.runs[0].folder.path).iloc[0]
    assert (row["lr"], row["results.lr"], row["results.seed"]) == (0.001, 5, 3)


@pytest.mark.parametrize("text", ["{1", "[]", "", "[" * 10**6])
def test_results_that_a_notebook_broke_are_no_success(copy, monkeypatch, text) -> None:
    def execute(run, *_):
        run.folder.results_file.write_text(text)
        return {"status": "done"}

    monkeypatch.setattr(runs, "_execute", execute)
    manifest = runs.run_one(copy.runs[0])
    assert manifest["status"] == "failed"
    assert manifest["reason"] == "results.json is no JSON object: the notebook wrote it"


def test_an_unchanged_grid_does_only_what_is_missing(copy) -> None:
    reasons = [reason_to_run(run) for run in copy.runs]
    assert reasons[:6] == [None, None, "failed before", "killed before", "failed before", "killed before"]
    assert reasons[6:] == ["killed before", "killed before", "killed before", "new"]


def test_retry_failed_takes_up_what_failed_and_what_waited_for_it(copy) -> None:
    ids = {run.id: run.notebook.name for run in copy.runs}
    shutil.rmtree(copy.runs[1].folder.path)  # new, and so not its business
    planned = plans.plan(copy, retry_failed=True)
    assert {ids[run_id] for run_id in planned.todo} == {
        "raises", "dies", "leaves", "orphan", "shot", "hungry", "late", "silent",
    }  # fmt: skip
    assert {step.run.id for step in planned.steps if step.left_out} == {copy.runs[0].id, copy.runs[1].id}
    lines = list(planned.lines())
    assert lines[0] == f"left out {copy.runs[0].id} (task=x, lr=0.001): done before"
    assert lines[1] == f"left out {copy.runs[1].id} (task=y, lr=1.0): new"


def test_planning_reads_every_manifest_once(copy, monkeypatch) -> None:
    read, looked = Path.read_text, []
    monkeypatch.setattr(Path, "read_text", lambda path, **how: looked.append(path) or read(path, **how))
    plans.plan(copy, retry_failed=True)
    manifests_read = [path for path in looked if path.name == "manifest.json"]
    assert sorted(manifests_read) == sorted(run.folder.manifest_file for run in copy.runs)


def test_only_takes_what_matches_and_what_it_comes_after(copy) -> None:
    ids = {run.id: run.notebook.name for run in copy.runs}
    assert {ids[i] for i in plans.plan(copy, only=["sil*"]).todo} == {"silent", "dies"}
    assert plans.plan(copy, only=["train"]).todo == set()
    first = copy.runs[0].id
    assert plans.plan(copy, only=[first], force=True).todo == {first}
    assert plans.plan(copy, only=["sil*", first], force=True).todo == {
        first, *(i for i, name in ids.items() if name in ("silent", "dies")),
    }  # fmt: skip
    assert {ids[i] for i in plans.plan(copy, only=["train", "late"], retry_failed=True).todo} == {"late"}
    with pytest.raises(GridError, match=r"--only none\* matches no run of grid grid; its notebooks are: train, raises"):
        plans.plan(copy, only=["none*"])


def test_another_grid_of_the_same_name_is_refused(copy, desk: Path, write_notebook) -> None:
    """Their runs would have the same folders."""
    write_notebook(desk / "other" / "notebooks" / "silent.ipynb", "2")
    other = desk / "other" / "grid.yaml"
    other.write_text("runs: [{notebook: silent}]")
    with pytest.raises(GridError, match=r"runs/grid has the runs of .*/grid\.yaml; give this grid another name"):
        run_grid(load_grid(other))
    (desk / "grid.yaml").rename(desk / "moved.yaml")  # whose file is gone belongs to nobody
    assert plans.plan(load_grid(other)).todo


def test_what_was_left_out_is_no_failure_and_is_not_run(copy, monkeypatch) -> None:
    finish_with(monkeypatch, "done", {})
    statuses = run_grid(copy, only=["late"], say=lambda _: None)
    names = {run.id: run.notebook.name for run in copy.runs}
    assert {names[i]: status for i, status in statuses.items()} == {
        "train": "done", "late": "done",
        **dict.fromkeys(["raises", "dies", "leaves", "orphan", "shot", "hungry", "silent"], "left out"),
    }  # fmt: skip


def alter_manifest(folder: Path, **changes: object) -> None:
    RunFolder(folder).seal(RunFolder(folder).manifest | changes)


def test_why_a_done_run_is_run_again(copy, desk: Path, write_notebook, monkeypatch) -> None:
    run = copy.runs[0]
    assert reason_to_run(run) is None
    assert reason_to_run(run, "another hash") == "library changed"
    for name, reason in [
        ("results.json", "results.json was altered or is gone"),
        ("run.ipynb", "run.ipynb was altered or is gone"),
    ]:
        before = (run.folder.path / name).read_bytes()
        (run.folder.path / name).write_bytes(before + b" ")
        assert (reason_to_run(run), run.folder.done) == (reason, False)
        (run.folder.path / name).unlink()
        assert (reason_to_run(run), run.folder.done) == (reason, False)
        (run.folder.path / name).write_bytes(before)
    assert reason_to_run(run) is None
    manifest = (run.folder.path / "manifest.json").read_text()
    for changes, reason in [
        ({"status": "running"}, "cut off before"),
        ({"schema": 0}, "its manifest is another run's"),
        ({"parameters": {}}, "its manifest is another run's"),
    ]:
        alter_manifest(run.folder.path, **changes)
        assert reason_to_run(run) == reason
        (run.folder.path / "manifest.json").write_text(manifest)
    (run.folder.path / "manifest.json").write_text(manifest[:100])
    assert (reason_to_run(run), run.folder.done) == ("its manifest cannot be read", False)
    (run.folder.path / "manifest.json").write_text(manifest)
    shutil.rmtree(desk / "store" / "x")
    assert reason_to_run(run) == "checkpoint x is gone"
    assert reason_to_run(copy.runs[1]) is None
    write_notebook(
        run.notebook.path, *TRAIN, "3", parameters="task: str = 'x'\nlr: float = 0.1\nseed = 3\ndevice = 'cpu'"
    )
    assert reason_to_run(load_grid("grid.yaml").runs[0]) == "notebook changed"


def test_executing_a_notebook_in_place_is_no_change(copy, desk: Path) -> None:
    run = copy.runs[0]
    shutil.copy(run.folder.path / "run.ipynb", run.notebook.path)  # outputs, counts and an injected cell
    assert reason_to_run(load_grid("grid.yaml").runs[0]) is None


def test_the_librarys_hash_sees_code_and_data_but_not_what_runs_cannot_use(desk: Path, monkeypatch) -> None:
    package = desk / "saftnb"
    files = ("batch/manifest.py", "merging/ties.py", "backbones/w.safetensors", "publish/page.css", "cli.py")
    for name in files:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("a")
    monkeypatch.setattr(manifests, "__file__", str(package / "batch" / "manifest.py"))
    before = library_sha256()
    for name in (
        "publish/page.css",
        "cli.py",
        "batch/display.py",
        "merging/__pycache__/x.pyc",
        "merging/.x.py.swp",
        "a.md",
    ):
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text("b")
    assert library_sha256() == before
    seen = {before}
    for name in ("merging/ties.py", "backbones/w.safetensors", "merging/new.py"):
        (package / name).write_text("b")
        seen.add(library_sha256())
    assert len(seen) == 4


def finish_with(monkeypatch, status: str, recorded: dict) -> None:
    """Let run_one pretend that the notebook ended so."""

    def pretend(run, *_):  # no process
        assert json.loads((run.folder.path / "manifest.json").read_text())["status"] == "running"
        (run.folder.path / "results.json").write_text(json.dumps(recorded))
        return {"status": status, "reason": "boom"} if status != "done" else {"status": status}

    monkeypatch.setattr(runs, "_execute", pretend)


def test_what_was_complete_survives_a_rerun_that_is_not(copy, desk: Path, monkeypatch) -> None:
    run = copy.runs[0]
    complete = {path.name: path.read_bytes() for path in run.folder.path.iterdir()}
    complete["manifest.previous.json"] = complete.pop("manifest.json")
    previous = run.folder.path.parent / ".previous" / run.id
    for status in ("failed", "interrupted", "killed"):  # the second and third find the first's folder
        finish_with(monkeypatch, status, {"half": 1})
        assert runs.run_one(run)["status"] == status
        assert json.loads((run.folder.path / "manifest.json").read_text())["status"] == status
        assert {path.name: path.read_bytes() for path in previous.iterdir()} == complete
        whole = results(desk / "runs").query("status == 'done'")
        assert whole["task"].tolist() == ["y"]
    finish_with(monkeypatch, "done", {"whole": 1})
    assert runs.run_one(run)["status"] == "done"
    assert not previous.exists()
    assert json.loads((run.folder.path / "results.json").read_text()) == {"whole": 1}


def test_a_rerun_repairs_what_was_altered_and_retrains_only_what_is_gone(copy, desk: Path) -> None:
    first, second = copy.runs[:2]
    before = [json.loads((run.folder.path / "manifest.json").read_text()) for run in (first, second)]
    shutil.rmtree(desk / "store" / "y")
    (desk / "grid.yaml").write_text(GRID.split("  - {notebook: raises")[0])
    lines: list[str] = []
    statuses = run_grid(load_grid("grid.yaml"), say=lines.append)
    assert list(statuses.values()) == ["done", "done"]
    assert [line.split()[0] for line in lines[1:-1]] == ["skip", "start", "done"]
    assert lines[2].endswith("checkpoint y is gone")
    assert (desk / "store" / "y" / "manifest.json").exists()
    after = [json.loads((run.folder.path / "manifest.json").read_text()) for run in (first, second)]
    assert after[0] == before[0]
    assert after[1]["run_sha256"] != before[1]["run_sha256"]
    assert after[1]["results_sha256"] == before[1]["results_sha256"]
    assert run_grid(load_grid("grid.yaml"), say=lines.append) == statuses
    assert [line.split()[0] for line in lines[-3:-1]] == ["skip", "skip"]
    assert os.environ["SAFTNB_STORE"] == str(desk / "store")


def test_leaving_in_the_last_cell_is_not_being_done(tmp_path, write_notebook, monkeypatch):
    write_notebook(tmp_path / "ends.ipynb", "1", "import sys; sys.exit(0); raise ValueError")
    (tmp_path / "grid.yaml").write_text("runs: [{notebook: ends.ipynb}]")
    monkeypatch.chdir(tmp_path)
    grid = load_grid("grid.yaml")
    assert list(run_grid(grid).values()) == ["failed"]
    assert grid.runs[0].folder.reason.startswith("stopped early: SystemExit (cell 2)")
