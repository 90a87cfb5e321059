"""What a run needs and what a machine has: cores, GPUs, memory, time."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Resources:
    """What a run asks for; None where it does not say.

    ``cpus``: cores, to which its numerical libraries are limited. ``gpus``: whole ones, or a share of one below 1.
    ``memory``: GiB of its processes' resident memory together. ``time_limit``: seconds. A run that takes more
    memory or time is killed.
    """

    cpus: int | None = None
    gpus: float | None = None
    memory: float | None = None
    time_limit: float | None = None


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
