"""Scheduling, with runs that only pretend: order, how many at once, failures, Ctrl-C."""

import threading
import time
from pathlib import Path

import pytest

from saftnb.batch import load_grid, local, run_grid
from saftnb.batch.run import Stopped


@pytest.fixture
def stage(desk: Path, write_notebook, monkeypatch: pytest.MonkeyPatch):
    """Three notebooks; each run takes a moment, and those whose notebook is in ``bad`` fail."""
    for name in ("a", "b", "c"):
        write_notebook(desk / "notebooks" / f"{name}.ipynb", "1", parameters="seed: int = 0")

    class Stage:
        bad: set[str] = set()  # noqa: RUF012
        log: list[tuple[str, str]] = []  # noqa: RUF012
        threads: list = []  # noqa: RUF012
        most = now = 0
        lock = threading.Lock()

        def run_one(self, run, threads, stop, say):
            if stop.is_set():
                raise Stopped
            name = f"{run.notebook.name}{run.parameters['seed']}"
            with self.lock:
                self.log.append(("start", name))
                self.threads.append(threads)
                self.now += 1
                self.most = max(self.most, self.now)
            stop.wait(0.05)
            with self.lock:
                self.now -= 1
                self.log.append(("end", name))
            if "disk" in self.bad:
                raise OSError("no space left")
            status = "interrupted" if stop.is_set() else "failed" if run.notebook.name in self.bad else "done"
            return {"status": status, "reason": "boom", "seconds": 0.05}

        def grid(self, text: str):
            Path("g.yaml").write_text(text)
            return load_grid("g.yaml")

    stage = Stage()
    stage.bad, stage.log, stage.threads = set(), [], []
    monkeypatch.setattr(local, "run_one", stage.run_one)
    return stage


CHAIN = """
runs:
  - {notebook: c, after: [b]}
  - {notebook: a, sweep: {seed: [0, 1, 2]}}
  - {notebook: b, after: [a]}
"""


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_after_is_respected_and_no_more_run_than_allowed(stage, jobs: int) -> None:
    statuses = run_grid(stage.grid(CHAIN), jobs=jobs, say=lambda _: None)
    assert list(statuses.values()) == ["done"] * 5
    position = {entry: i for i, entry in enumerate(stage.log)}
    assert max(position["end", f"a{i}"] for i in range(3)) < position["start", "b0"]
    assert position["end", "b0"] < position["start", "c0"]
    assert stage.most == min(jobs, 3)
    assert set(stage.threads) == {None if jobs == 1 else 1}


def test_the_grid_says_how_many_and_how_wide(stage) -> None:
    run_grid(stage.grid("jobs: 3\nthreads: 2\nruns: [{notebook: a, sweep: {seed: [0, 1, 2, 3]}}]"), say=lambda _: None)
    assert (stage.most, set(stage.threads)) == (3, {2})


def test_a_failure_blocks_only_what_waits_for_it(stage) -> None:
    stage.bad = {"a"}
    lines: list[str] = []
    statuses = run_grid(stage.grid(CHAIN + "  - {notebook: b, parameters: {seed: 9}}"), say=lines.append)
    by_name = {run_id.split("-")[0]: status for run_id, status in statuses.items()}
    assert by_name == {"a": "failed", "b": "done", "c": "blocked"}
    assert sorted(statuses.values()) == ["blocked", "blocked", "done", "failed", "failed", "failed"]
    assert ("start", "b9") in stage.log
    assert sum(line.startswith("failed") and "boom; see runs/g/a-" in line for line in lines) == 3


def test_a_disk_error_fails_the_run_and_not_the_grid(stage) -> None:
    stage.bad = {"disk"}
    lines: list[str] = []
    statuses = run_grid(stage.grid("runs: [{notebook: a, sweep: {seed: [0, 1]}}]"), say=lines.append)
    assert list(statuses.values()) == ["failed", "failed"]
    assert any("no space left" in line for line in lines)


def test_ctrl_c_ends_what_runs_and_starts_nothing_more(stage) -> None:
    grid = stage.grid("runs: [{notebook: a, sweep: {seed: [0, 1, 2, 3, 4, 5]}}]")

    def say(line: str) -> None:
        if line.startswith("start") and len(stage.log) > 2:
            raise KeyboardInterrupt

    began = time.monotonic()
    statuses = run_grid(grid, jobs=2, say=say)
    assert len(statuses) == 6
    assert set(statuses.values()) <= {"done", "interrupted", "not started"}
    assert list(statuses.values()).count("not started") >= 2
    assert time.monotonic() - began < 5


def test_an_error_of_ours_is_not_swallowed(stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(local, "run_one", broken)
    with pytest.raises(ZeroDivisionError):
        run_grid(stage.grid("runs: [{notebook: a}]"), say=lambda _: None)
