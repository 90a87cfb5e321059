"""Scheduling, with runs that only pretend: order, how many at once, failures, Ctrl-C."""

import os
import threading
import time
from pathlib import Path

import pytest

from saftnb.batch import load_grid, local, run_grid
from saftnb.batch.engine import PAUSE
from saftnb.batch.grid import GridError, Resources, Run
from saftnb.batch.local import Local, Machine
from saftnb.batch.notebooks import Notebook
from saftnb.batch.run import Elsewhere, Stopped, _environment


@pytest.fixture
def stage(desk: Path, write_notebook, monkeypatch: pytest.MonkeyPatch):
    """Three notebooks; each run takes a moment, and those whose notebook is in ``bad`` fail."""
    for name in ("a", "b", "c"):
        write_notebook(desk / "notebooks" / f"{name}.ipynb", "1", parameters="seed: int = 0")

    class Stage:
        bad: set[str] = set()  # noqa: RUF012
        log: list[tuple[str, str]] = []  # noqa: RUF012
        threads: list = []  # noqa: RUF012
        taken: dict[str, int] = {}  # noqa: RUF012
        most = now = 0
        lock = threading.Lock()

        def run_one(self, run, threads, gpus, stop, again):
            if stop.is_set():
                raise Stopped
            name = f"{run.notebook.name}{run.parameters['seed']}"
            with self.lock:
                if name in self.taken:
                    self.taken[name] -= 1
                    if self.taken[name] < 0:
                        return {"status": "done", "seconds": 1.0, "found": True}
                    raise Elsewhere(run.id)
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
    stage.bad, stage.log, stage.threads, stage.taken = set(), [], [], {}
    monkeypatch.setattr(Machine, "here", lambda: Machine(8))
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
    assert set(stage.threads) == {8 // jobs}, "each has an equal share of eight cores"


SEEDS = "runs: [{notebook: a, sweep: {seed: [0, 1, 2, 3]}}]"


def test_the_grid_says_how_many_and_how_wide(stage) -> None:
    run_grid(stage.grid(f"jobs: 3\nresources: {{cpus: 2}}\n{SEEDS}"), say=lambda _: None)
    assert (stage.most, set(stage.threads)) == (3, {2})


def test_no_core_is_promised_twice(stage) -> None:
    lines: list[str] = []
    run_grid(stage.grid(f"jobs: 4\nresources: {{cpus: 3}}\n{SEEDS}"), say=lines.append)
    assert (stage.most, set(stage.threads)) == (2, {3})
    few = Local(4, Machine(2))
    assert few.describe(stage.grid(SEEDS)) == "2 at a time (not 4: 2 cores)"
    run_grid(stage.grid(SEEDS), engine=few, say=lambda _: None)
    assert stage.threads[-1] == 1
    run_grid(stage.grid(f"resources: {{cpus: 9}}\n{SEEDS}"), say=lambda _: None)
    assert stage.threads[-1] == 8, "no more threads than cores"


def a_run(name: str, **resources) -> Run:
    notebook = Notebook(name, Path(f"{name}.ipynb"), "", "", "", {})
    return Run("g", notebook, {}, {}, resources=Resources(**resources), place="g.yaml:7")


def test_gpus_are_given_out_one_by_one_in_shares_and_to_one_run_each(monkeypatch) -> None:
    given: dict[str, tuple] = {}
    monkeypatch.setattr(local, "run_one", lambda run, cpus, gpus, *_: given.update({run.notebook.name: gpus}))
    engine = Local(6, Machine(12, ("0", "3", "MIG-a")))
    runs = [a_run(name) for name in "abcd"]
    assert [engine.start(run, True) is not None for run in runs] == [True, True, True, False]
    engine.release(runs[1])
    halves = [a_run("e", gpus=0.5), a_run("f", gpus=0.5), a_run("g", gpus=0.3), a_run("h", gpus=0)]
    assert [engine.start(run, True) is not None for run in halves] == [True, True, False, True]
    for run in (runs[0], runs[2], halves[0]):
        engine.release(run)
    both = engine.start(a_run("i", gpus=2), True)
    assert both is not None
    both.result()
    engine.close()
    assert given == {
        "a": ("0",), "b": ("3",), "c": ("MIG-a",), "e": ("3",), "f": ("3",), "h": (), "i": ("0", "MIG-a"),
    }  # fmt: skip
    assert Local(None, Machine(4, ("0", "1"))).jobs == 2, "as many at a time as there are GPUs"


def test_a_notebook_sees_the_gpus_of_its_run_and_no_other(desk: Path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    for gpus, seen in [(None, "5,6"), ((), ""), (("6",), "6"), (("5", "MIG-a"), "5,MIG-a")]:
        environment = _environment(a_run("a"), 3, gpus)
        assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == (seen, "3")


def test_memory_is_given_out_and_what_never_fits_is_refused_before_anything_starts(stage) -> None:
    engine = Local(3, Machine(6, (), 10.0))
    large = [a_run(name, memory=4) for name in "abc"]
    assert [engine._share(run) is not None for run in large] == [True] * 3
    engine.held = {run.id: engine._share(run) for run in large[:2]}
    assert engine._share(large[2]) is None
    engine.close()
    for asked, message in [
        ("gpus: 2", "g.yaml:2: a needs 2 GPUs; here are 0"),
        ("memory: 99", "g.yaml:2: a needs 99 GiB of memory; here are 16.0"),
    ]:
        grid = stage.grid(f"runs:\n  - {{notebook: a, resources: {{{asked}}}}}")
        with pytest.raises(GridError, match=message):
            run_grid(grid, engine=Local(1, Machine(2, (), 16.0)), say=lambda _: None)
    assert not stage.log
    assert not Path("runs").exists()


def test_the_machines_gpus_are_those_that_this_process_may_see(desk, monkeypatch) -> None:
    for visible, names in [("", ()), ("-1", ()), ("2, 0", ("2", "0")), ("1,-1,0", ("1",)), ("GPU-ab", ("GPU-ab",))]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert Machine.here().gpus == names
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (desk / "nvidia-smi").write_text("#!/bin/sh\nprintf '0\\n1\\n'")
    (desk / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{desk}:{os.environ['PATH']}")
    assert Machine.here().gpus == ("0", "1")
    (desk / "nvidia-smi").write_text("#!/bin/sh\nexit 9")
    assert Machine.here().gpus == ()
    assert Machine.here().cpus >= 1
    assert 0 < Machine.here().memory < 1e6


def test_a_run_that_another_launcher_has_waits_while_others_go_on(stage) -> None:
    stage.taken = {"a0": 3}
    lines: list[str] = []
    began = time.monotonic()
    statuses = run_grid(stage.grid(SEEDS), jobs=1, say=lines.append)
    assert set(statuses.values()) == {"done"}
    assert [name for what, name in stage.log if what == "start"] == ["a1", "a2", "a3"]
    assert [line.split()[0] for line in lines].count("wait") == 1
    assert any(line.startswith("skip     a-") and line.endswith("meanwhile by another launcher") for line in lines)
    assert time.monotonic() - began > 2 * PAUSE


def test_what_another_launcher_did_meanwhile_is_not_forced_a_second_time(stage, monkeypatch) -> None:
    stage.taken, forced = {"a0": 1}, []

    def watched(run, threads, gpus, stop, again):
        forced.append(again)
        return stage.run_one(run, threads, gpus, stop, again)

    monkeypatch.setattr(local, "run_one", watched)
    assert set(run_grid(stage.grid("runs: [{notebook: a}]"), force=True, say=lambda _: None).values()) == {"done"}
    assert forced == [True, False]


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

    once = iter([KeyboardInterrupt])

    def say(line: str) -> None:
        if line.startswith("done"):
            for error in once:
                raise error

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
