"""The local engine: runs in processes on this machine, as many at a time as were asked for and fit."""

import os
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from saftnb.batch.grid import Grid, GridError, Run
from saftnb.batch.run import run_one


@dataclass(frozen=True)
class Machine:
    """The cores, the names of the GPUs (as in CUDA_VISIBLE_DEVICES) and the memory, in GiB, of a machine."""

    cpus: int
    gpus: tuple[str, ...] = ()
    memory: float = float("inf")

    @classmethod
    def here(cls) -> "Machine":
        """This machine, as far as this process may use it."""
        return cls(_cpus(), _gpus(), _memory())


@dataclass(frozen=True)
class Share:
    """What one run has of the machine while it runs; of each GPU a part, up to 1."""

    cpus: int
    gpus: dict[str, float]
    memory: float


class Local:
    """Each run gets its cores (by default an equal share, with the thread limits set) and its GPUs (one, if any).

    No core is promised twice, so fewer than ``jobs`` run at once where they do not fit.
    """

    def __init__(self, jobs: int | None = None, machine: Machine | None = None) -> None:
        self.machine = machine or Machine.here()
        self.jobs = jobs or max(1, len(self.machine.gpus))
        self.pool = ThreadPoolExecutor(self.jobs)
        self.stop = Event()
        self.held: dict[str, Share] = {}

    def check(self, runs: list[Run]) -> None:
        """Raises GridError for a run that this machine can never hold."""
        for run in runs:
            gpus, memory = run.resources.gpus or 0, run.resources.memory or 0.0
            if gpus > len(self.machine.gpus):
                raise GridError(
                    f"{run.place}: {run.notebook.name} needs {gpus:g} GPUs; here are {len(self.machine.gpus)}"
                )
            if memory > self.machine.memory:
                here = f"{self.machine.memory:.1f}"
                raise GridError(f"{run.place}: {run.notebook.name} needs {memory:g} GiB of memory; here are {here}")

    @property
    def width(self) -> int:
        return min(self.jobs, self.machine.cpus)

    def describe(self, grid: Grid) -> str:
        """How many runs go at once, in words."""
        gpus = f" on {len(self.machine.gpus)} GPUs" if len(self.machine.gpus) > 1 else ""
        fewer = f" (not {self.jobs}: {self.machine.cpus} cores)" if self.width < self.jobs else ""
        return f"{self.width} at a time{gpus}{fewer}"

    def start(self, run: Run, again: bool) -> Future[dict[str, Any]] | None:
        """Start the run, or None where there is no room for it now."""
        share = self._share(run)
        if share is None:
            return None
        self.held[run.id] = share
        return self.pool.submit(run_one, run, share.cpus, tuple(share.gpus), self.stop, again)

    def release(self, run: Run) -> None:
        """The run has ended."""
        self.held.pop(run.id, None)

    def interrupt(self) -> None:
        """End what runs."""
        self.stop.set()

    def close(self) -> None:
        self.stop.set()
        self.pool.shutdown(cancel_futures=True)

    def _share(self, run: Run) -> Share | None:
        wanted, held = run.resources, self.held.values()
        cpus = min(wanted.cpus or max(1, self.machine.cpus // self.jobs), self.machine.cpus)
        memory = wanted.memory or 0.0
        if len(self.held) >= self.jobs or cpus + sum(share.cpus for share in held) > self.machine.cpus:
            return None
        if memory + sum(share.memory for share in held) > self.machine.memory:
            return None
        gpus = self._free_gpus(wanted.gpus if wanted.gpus is not None else min(1, len(self.machine.gpus)))
        return None if gpus is None else Share(cpus, gpus, memory)

    def _free_gpus(self, amount: float) -> dict[str, float] | None:
        """The fullest GPU that a share fits in, or so many free ones; None where there are not enough."""
        used = {gpu: sum(share.gpus.get(gpu, 0.0) for share in self.held.values()) for gpu in self.machine.gpus}
        if 0 < amount < 1:
            fits = [gpu for gpu in used if used[gpu] + amount <= 1 + 1e-9]
            return {max(fits, key=used.__getitem__): amount} if fits else None
        free = [gpu for gpu in used if not used[gpu]][: int(amount)]
        return dict.fromkeys(free, 1.0) if len(free) == amount else None


def _cpus() -> int:
    """The cores that this process may use, by its affinity and its container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _control("cpu.max").partition(" ")
    return max(1, min(allowed, int(quota) // int(period))) if quota.isdigit() and period.isdigit() else allowed


def _control(name: str) -> str:
    """A limit of this process's container, "" where there is none."""
    file = Path("/sys/fs/cgroup") / name
    return file.read_text().strip() if file.is_file() else ""


def _gpus() -> tuple[str, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return tuple(names[: names.index("-1")] if "-1" in names else filter(None, names))
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in shown.splitlines() if line.strip().isdigit())


def _memory() -> float:
    import psutil

    total, limit = psutil.virtual_memory().total, _control("memory.max")
    return min(total, int(limit) if limit.isdigit() else total) / 2**30
