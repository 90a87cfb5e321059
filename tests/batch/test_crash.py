"""A launcher that is stopped or killed: what it leaves, and what the next one makes of it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

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


class Office:
    """A folder with a slow notebook; each launcher is a real ``saftnb grid`` process."""

    def __init__(self, desk: Path) -> None:
        self.desk, self.books = desk, desk / "notebooks"

    def launch(self, *options: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "saftnb", "grid", "grid.yaml", *options]
        return subprocess.Popen(command, cwd=self.desk, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

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


@pytest.fixture
def office(desk: Path, write_notebook):
    write_notebook(desk / "notebooks" / "slow.ipynb", SLOW, parameters="seed: int = 0")
    (desk / "grid.yaml").write_text(GRID)
    office, launched = Office(desk), []
    launch = office.launch
    office.launch = lambda *options: launched.append(launch(*options)) or launched[-1]
    yield office
    (desk / "notebooks" / "go").touch()
    for process in launched:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_stopped_killed_and_taken_up_again(office: Office) -> None:
    # Ctrl-C: the notebook is ended, and nothing else is started
    launcher = office.launch()
    processes = office.processes()
    assert office.manifests()[1]["status"] == "running"
    launcher.send_signal(signal.SIGINT)
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 130, output
    assert all(gone(process) for process in processes)
    assert {seed: manifest["status"] for seed, manifest in office.manifests().items()} == {1: "interrupted"}
    assert office.manifests()[1]["reason"] == "stopped by the user"
    assert "1 interrupted, 1 not started" in output.splitlines()[-1]

    # kill -9: nobody is left to say so, and still the notebook ends and the manifest claims nothing
    launcher = office.launch()
    processes = office.processes()
    launcher.kill()
    launcher.communicate()
    killed = time.monotonic()
    until(lambda: all(gone(process) for process in processes), 5)
    assert time.monotonic() - killed < 5
    left = office.manifests()[1]
    assert left["status"] == "running"
    assert {"pid", "token"} <= left.keys()
    assert not any(is_done(folder) for folder, _ in find_runs(office.desk / "runs"))

    # two launchers at once: each run is executed once
    (office.books / "count").unlink()
    first = office.launch()
    office.processes()
    second = office.launch()
    seen = iter(second.stdout.readline, "")
    assert any(line.startswith("wait ") for line in seen)
    (office.books / "go").touch()
    output, _ = first.communicate(timeout=60)
    second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), output
    assert "cut off before" in output
    assert (office.books / "count").read_text() == "xx"
    assert all(is_done(folder) for folder, _ in find_runs(office.desk / "runs"))
    assert not {"pid", "token"} & office.manifests()[1].keys()

    # what came out is what an undisturbed grid gives
    undisturbed = office.launch("--runs", "elsewhere", "--jobs", "2")
    undisturbed.communicate(timeout=60)
    assert undisturbed.returncode == 0
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
    from saftnb.batch.run import Stopped, _lock

    run = Run("g", Notebook("n", desk / "n.ipynb", "", "", {}), {}, {}, root=desk / "runs")
    with _lock(run, Event(), print) as (descriptor, waited):
        assert not waited
        other = subprocess.Popen(["sleep", "60"], pass_fds=(descriptor,))
    stop, said = Event(), []

    def say(line: str) -> None:
        said.append(line)
        stop.set()

    with pytest.raises(Stopped), _lock(run, stop, say):
        raise AssertionError("the lock was free")
    assert len(said) == 1
    assert said[0].endswith("it is being run by another process")
    other.kill()
    other.wait()
    with _lock(run, Event(), print) as (_, waited):
        assert not waited


def test_sockets_do_not_pile_up(office: Office, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a notebook that ends nor one whose launcher is killed leaves a folder of sockets."""
    short = Path("/tmp") / f"saftnb-test-{os.getpid()}"
    short.mkdir()
    monkeypatch.setenv("TMPDIR", str(short))
    try:
        launcher = office.launch()
        processes = office.processes()
        sockets = list(short.glob("saftnb-*/*"))
        assert any(path.is_socket() for path in sockets)
        assert json.loads(next(path for path in sockets if path.name == "kernel.json").read_text())["transport"] == "ipc"
        launcher.kill()
        until(lambda: all(gone(process) for process in processes), 5)
        until(lambda: not list(short.glob("saftnb-*")), 5)
    finally:
        for path in sorted(short.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        short.rmdir()
