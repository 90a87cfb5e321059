"""A folder whose files are put through faults, and a store in it."""

import os
import tempfile
from pathlib import Path

import pytest

from saftnb import disk
from tests.faults.injector import works_here


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder, in memory where that is possible: fsync takes its time on a disk. Leftovers of dead processes
    are swept at once, not after a minute."""
    if not works_here():
        pytest.skip("this system has no notifications of system calls (Linux's seccomp)")
    monkeypatch.setattr(disk, "HERE", -1.0)
    monkeypatch.delenv("SAFTNB_RUN_DIR", raising=False)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        root = Path(folder).resolve() / "root"
        root.mkdir()
        monkeypatch.setenv("SAFTNB_STORE", str(root / "store"))
        yield root
