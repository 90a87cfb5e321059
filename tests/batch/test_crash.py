"""A launcher that is stopped or killed: what it leaves, and what the next one makes of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from saftnb import paths
from saftnb.run_folder import find_runs
from tests.tools.waiting import gone, until

SLOW = """
import os, time
from pathlib import Path
from saftnb.batch import record
Path("started").write_text(f"{os.getpid()} {os.getppid()}")
with open("count", "a") as file:
    file.write("x")
while not Path("go").exists():
    time.sleep(0.02)
record(value=0.1 + seed)
"""
GRID = "jobs: 1\nruns: [{notebook: slow, sweep: {seed: [1, 2]}}]"


def listen_to_ctrl_c() -> None:
    """A shell lets what it starts in the background ignore SIGINT, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Launcher:
    """A ``saftnb grid`` process whose output goes to a file."""

    def __init__(self, desk: Path, output: Path, options: tuple[str, ...]) -> None:
        self.output = output
        command = [sys.executable, "-m", "saftnb", "grid", "grid.yaml", *options]
        with open(output, "w") as file:
            self.process = subprocess.Popen(
                command, cwd=desk, stdout=file, stderr=subprocess.STDOUT, preexec_fn=listen_to_ctrl_c
            )

    def ends_with(self, code: int) -> list[str]:
        """Wait for the process; its lines."""
        lines = self.output.read_text
        assert self.process.wait(timeout=60) == code, lines()
        return lines().splitlines()


class Office:
    """A folder with a slow notebook; processes are real."""

    def __init__(self, desk: Path) -> None:
        self.desk, self.books = desk, desk / "notebooks"
        self.launched: list[Launcher] = []
        self.sockets = Path(tempfile.mkdtemp(dir="/tmp"))  # a short name: sockets' paths are limited

    def launch(self, *options: str) -> "Launcher":
        self.launched.append(Launcher(self.desk, self.desk / f"output-{len(self.launched)}.txt", options))
        return self.launched[-1]

    def processes(self) -> list[psutil.Process]:
        """Wait for the notebook to be in its loop; its kernel and the process that runs it."""
        until(lambda: (self.books / "started").exists() and " " in (self.books / "started").read_text())
        pids = (self.books / "started").read_text().split()
        (self.books / "started").unlink()
        return [psutil.Process(int(pid)) for pid in pids]

    def manifests(self, runs: str = "runs") -> dict[int, dict]:
        return {run.manifest["seed"]: run.manifest for run in find_runs(self.desk / runs)}


def is_lock(descriptor: Path) -> bool:
    try:
        return os.readlink(descriptor).endswith(".lock")
    except OSError:
        return False


@pytest.fixture
def office(desk: Path, write_notebook, monkeypatch: pytest.MonkeyPatch):
    write_notebook(desk / "notebooks" / "slow.ipynb", SLOW, parameters="seed: int = 0")
    (desk / "grid.yaml").write_text(GRID)
    package = Path(paths.__file__).parent  # a copy, which nobody edits while the tests run
    shutil.copytree(package, desk / "saftnb", ignore=shutil.ignore_patterns("__pycache__"))
    office = Office(desk)
    monkeypatch.setenv("TMPDIR", str(office.sockets))
    yield office
    (desk / "notebooks" / "go").touch()
    for launcher in office.launched:
        launcher.process.kill()
        launcher.process.wait()
    shutil.rmtree(office.sockets, ignore_errors=True)


def test_stopped_killed_and_taken_up_again(office: Office) -> None:
    # Ctrl-C: the notebook is ended, and nothing else is started
    launcher = office.launch()
    processes = office.processes()
    assert office.manifests()[1]["status"] == "running"
    if sys.platform == "linux":
        assert any(is_lock(path) for path in Path(f"/proc/{processes[1].pid}/fd").iterdir())
    assert json.loads(next(office.sockets.glob("*/kernel.json")).read_text())["transport"] == "ipc"
    launcher.process.send_signal(signal.SIGINT)
    lines = launcher.ends_with(130)
    assert all(gone(process) for process in processes)
    assert not list(office.sockets.iterdir())
    assert {seed: manifest["status"] for seed, manifest in office.manifests().items()} == {1: "interrupted"}
    assert office.manifests()[1]["reason"] == "stopped by the user"
    assert "1 interrupted, 1 not started" in lines[-1]

    # kill -9: nobody is left to say so, and still the notebook ends and the manifest claims nothing
    launcher = office.launch()
    processes = office.processes()
    launcher.process.kill()
    launcher.process.wait()
    until(lambda: all(gone(process) for process in processes), seconds=5)
    until(lambda: not list(office.sockets.iterdir()), seconds=5)
    left = office.manifests()[1]
    assert left["status"] == "running"
    assert {"pid", "token"} <= left.keys()
    assert not any(run.done for run in find_runs(office.desk / "runs"))

    # two launchers at once: each run is executed once
    (office.books / "count").unlink()
    first = office.launch()
    office.processes()
    second = office.launch()
    until(lambda: "wait     slow-" in second.output.read_text(), seconds=20)
    (office.books / "go").touch()
    assert any("cut off before" in line for line in first.ends_with(0))
    second.ends_with(0)
    assert (office.books / "count").read_text() == "xx"
    assert all(run.done for run in find_runs(office.desk / "runs"))
    assert not {"pid", "token"} & office.manifests()[1].keys()

    # what came out is what an undisturbed grid gives
    office.launch("--runs", "elsewhere", "--jobs", "2").ends_with(0)
    hashes = [{s: m["results_sha256"] for s, m in office.manifests(r).items()} for r in ("runs", "elsewhere")]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0].values())) == 2
    assert not list(office.desk.rglob("*.tmp"))
    assert not list(office.desk.rglob(".outcome.json"))


def test_a_lock_outlives_its_launcher_until_the_notebooks_process_has_left(desk: Path) -> None:
    """The descriptor of the lock is shared: closing ours does not free it while the other side has it."""
    from threading import Event

    from saftnb.batch.grid import Run
    from saftnb.batch.notebooks import Notebook
    from saftnb.batch.run import Elsewhere, run_lock

    run = Run("g", Notebook("n", desk / "n.ipynb", "", "", "", {}), {}, {}, root=desk / "runs")
    with pytest.raises(KeyboardInterrupt), run_lock(run, Event()) as descriptor:
        other = subprocess.Popen(["sleep", "60"], pass_fds=(descriptor,))
        raise KeyboardInterrupt
    with pytest.raises(Elsewhere), run_lock(run, Event()):
        raise AssertionError("the lock was free")
    other.kill()
    other.wait()
    with run_lock(run, Event()):
        pass


def test_a_polite_kill_is_like_ctrl_c(office: Office) -> None:
    launcher = office.launch()
    processes = office.processes()
    launcher.process.terminate()
    launcher.ends_with(130)
    assert all(gone(process) for process in processes)
    assert office.manifests()[1]["status"] == "interrupted"


def test_the_machine_goes_off(office: Office) -> None:
    """Launcher, notebook and kernel gone at one blow: what was done stays, what was cut off begins again."""
    (office.desk / "grid.yaml").write_text("jobs: 1\nruns: [{notebook: slow, sweep: {seed: [1, 2]}}]")
    (office.books / "go").touch()
    office.launch("--only", "slow-*").ends_with(0)
    done = office.manifests()
    write = (office.desk / "grid.yaml").write_text
    write("jobs: 1\nruns: [{notebook: slow, sweep: {seed: [1, 2, 3]}}]")
    (office.books / "go").unlink()
    (office.books / "started").unlink()
    launcher = office.launch()
    processes = [*office.processes(), psutil.Process(launcher.process.pid)]
    for process in processes:
        process.suspend()  # none of them may notice that another one is gone
    for process in processes:
        process.kill()
    launcher.process.wait()
    until(lambda: all(gone(process) for process in processes), seconds=10)
    left = office.manifests()
    assert [left[seed] for seed in (1, 2)] == [done[1], done[2]]
    assert left[3]["status"] == "running"
    assert sum(run.done for run in find_runs(office.desk / "runs")) == 2
    (office.books / "go").touch()
    lines = office.launch().ends_with(0)
    assert [line.split()[0] for line in lines[1:-1]] == ["skip", "skip", "start", "done"]
    assert lines[3].endswith("cut off before")


def test_a_full_disk(office: Office) -> None:
    """The launcher's limit on the size of files is 0: every write is refused, as on a full disk."""
    (office.books / "go").touch()
    office.launch("--only", "slow-*").ends_with(0)
    before = {path: path.read_bytes() for path in sorted((office.desk / "runs").rglob("*")) if path.is_file()}
    write = (office.desk / "grid.yaml").write_text
    write("jobs: 1\nruns: [{notebook: slow, sweep: {seed: [1, 2, 3]}}]")
    program = (
        "import resource, sys, tempfile; from saftnb import cli; from saftnb.batch import run\n"
        "tempfile.gettempdir()  # the full disk is another one\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)) if {early} else None\n"
        "execute = run._execute\n"
        "def full(*arguments):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "    return execute(*arguments)\n"
        "run._execute = full\n"
        "sys.exit(cli.main(['grid', 'grid.yaml']))"
    )
    early = subprocess.run(
        [sys.executable, "-c", program.format(early=True)], cwd=office.desk, capture_output=True, text=True
    )
    assert early.returncode == 2
    assert early.stderr == f"saftnb: {office.desk}/runs/grid/.grid.json: File too large\n"
    assert {path: path.read_bytes() for path in before} == before
    late = subprocess.run(
        [sys.executable, "-c", program.format(early=False)], cwd=office.desk, capture_output=True, text=True
    )
    assert late.returncode == 1, late.stderr
    assert "failed   slow-" in late.stdout
    assert "File too large" in late.stdout
    done = {path: content for path, content in before.items() if path.name != ".current.json"}
    assert {path: path.read_bytes() for path in done} == done
    assert office.manifests()[3]["status"] == "running", "it claims nothing"
    assert not list((office.desk / "runs").rglob("*.tmp"))
    lines = office.launch().ends_with(0)
    assert [line.split()[0] for line in lines[1:-1]] == ["skip", "skip", "start", "done"]


def test_a_notebook_is_edited_while_the_grid_runs(office: Office, write_notebook) -> None:
    """All runs of the grid see the notebook as it was; afterwards they are stale, and the launcher says so."""
    launcher = office.launch()
    office.processes()
    write_notebook(office.books / "slow.ipynb", SLOW + "record(edited=True)", parameters="seed: int = 0")
    library = office.desk / "saftnb" / "paths.py"
    library.write_text(library.read_text() + "# edited\n")
    (office.books / "go").touch()
    lines = launcher.ends_with(0)
    assert "changed  slow: its notebook was edited meanwhile; run the grid again" in lines
    assert "changed  the library was edited meanwhile; run the grid again for the runs from before" in lines
    values = [run.results for run in find_runs(office.desk / "runs")]
    assert [sorted(value) for value in values] == [["value"], ["value"]]
    lines = office.launch().ends_with(0)
    assert next(line for line in lines if line.startswith("start")).endswith("notebook changed")
    values = [run.results for run in find_runs(office.desk / "runs")]
    assert [sorted(value) for value in values] == [["edited", "value"], ["edited", "value"]]


def test_two_launchers_share_a_grid(office: Office) -> None:
    """Each run is executed once, by one of them; the second begins with what the first has not begun."""
    (office.desk / "grid.yaml").write_text("jobs: 1\nruns: [{notebook: slow, sweep: {seed: [1, 2, 3]}}]")
    first = office.launch()
    office.processes()
    second = office.launch()
    until(lambda: "start    slow-" in second.output.read_text(), seconds=30)
    (office.books / "go").touch()
    outputs = [first.ends_with(0), second.ends_with(0)]
    started = [line.split()[1] for lines in outputs for line in lines if line.startswith("start")]
    assert sorted(started) == sorted(set(started))
    assert len(started) == 3
    assert (office.books / "count").read_text() == "xxx"
    assert any(line.startswith("wait") for line in outputs[1])
    assert any("done meanwhile by another launcher" in line for lines in outputs for line in lines)
    assert all(run.done for run in find_runs(office.desk / "runs"))


def test_a_launcher_that_is_killed_before_it_sends_the_job_leaves_no_folder(tmp_path: Path) -> None:
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    command = [sys.executable, "-m", "saftnb.batch.execute", str(sockets)]
    done = subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.iterdir())
