"""A launcher that is stopped or killed: what it leaves, and what the next one makes of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from saftnb import paths
from saftnb.batch.manifest import find_runs, is_done

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
        return {manifest["seed"]: manifest for _, manifest in find_runs(self.desk / runs)}


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


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
    until(lambda: all(gone(process) for process in processes), 5)
    until(lambda: not list(office.sockets.iterdir()), 5)
    left = office.manifests()[1]
    assert left["status"] == "running"
    assert {"pid", "token"} <= left.keys()
    assert not any(is_done(folder) for folder, _ in find_runs(office.desk / "runs"))

    # two launchers at once: each run is executed once
    (office.books / "count").unlink()
    first = office.launch()
    office.processes()
    second = office.launch()
    until(lambda: "wait     slow-" in second.output.read_text(), 20)
    (office.books / "go").touch()
    assert any("cut off before" in line for line in first.ends_with(0))
    second.ends_with(0)
    assert (office.books / "count").read_text() == "xx"
    assert all(is_done(folder) for folder, _ in find_runs(office.desk / "runs"))
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
    from saftnb.batch.run import Stopped, run_lock

    run = Run("g", Notebook("n", desk / "n.ipynb", "", "", "", {}), {}, {}, root=desk / "runs")
    with run_lock(run, Event(), print) as (descriptor, waited):
        assert not waited
        other = subprocess.Popen(["sleep", "60"], pass_fds=(descriptor,))
    stop, said = Event(), []

    def say(line: str) -> None:
        said.append(line)
        stop.set()

    with pytest.raises(Stopped), run_lock(run, stop, say):
        raise AssertionError("the lock was free")
    assert len(said) == 1
    assert said[0].endswith("it is being run by another process")
    other.kill()
    other.wait()
    with run_lock(run, Event(), print) as (_, waited):
        assert not waited


def test_a_polite_kill_is_like_ctrl_c(office: Office) -> None:
    launcher = office.launch()
    processes = office.processes()
    launcher.process.terminate()
    launcher.ends_with(130)
    assert all(gone(process) for process in processes)
    assert office.manifests()[1]["status"] == "interrupted"
