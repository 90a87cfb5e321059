"""Waiting for what other processes do."""

import time
from collections.abc import Callable

import psutil


def until(true: Callable[[], object], what: str = "it", seconds: float = 60) -> None:
    """Wait until ``true()``; AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def gone(process: psutil.Process) -> bool:
    """Whether the process has ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
