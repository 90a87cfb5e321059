"""On a small disk of its own: full at every page that the work writes, and made read-only."""

import ctypes
import errno
import os
import traceback
import warnings

import pandas as pd
import pytest
import torch

from saftnb.finetune import store
from saftnb.finetune.resume import save_state
from saftnb.formats.writing import TensorFile, new_folder
from saftnb.run_folder import write_json
from saftnb.task_vector import TaskVector
from tests.faults.injector import files

PAGE = 4096
NEW_MOUNTS, NEW_USER, PRIVATE, REMOUNT, READ_ONLY = 0x20000, 0x10000000, 0x44000, 0x20, 0x1
LIBC = ctypes.CDLL(None, use_errno=True)


def on_its_own_mounts(work):
    """Do the work in a process that may mount; returns what went wrong, None where it may not."""
    there, back = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        pid = os.fork()
    if pid == 0:
        said = b"not allowed"
        try:
            if LIBC.unshare(NEW_MOUNTS if os.geteuid() == 0 else NEW_MOUNTS | NEW_USER) == 0 and mounted("/", PRIVATE):
                said = b""
                work()
        except BaseException:
            said = traceback.format_exc().encode()
        finally:
            os.write(back, said)
            os._exit(0)
    os.close(back)
    with os.fdopen(there, "rb") as answer:
        said = answer.read().decode()
    os.waitpid(pid, 0)
    return None if said == "not allowed" else said


def mounted(path, flags, options=""):
    return LIBC.mount(b"none", str(path).encode(), b"tmpfs", flags, options.encode()) == 0


def error_of(work, disk):
    """The number of the system's error with which the work ends; None where it ends well."""
    try:
        work(disk)
    except OSError as error:
        return error.errno
    return None


def checkpoint(root):
    known = {"suite": "s", "task": "t", "recipe": {"name": "r"}, "seed": 0}
    history = pd.DataFrame([(1, 0.5, 0.25)] * 300, columns=["step", "loss", "validation_accuracy"])
    head = torch.arange(3000.0).reshape(3, 1000)
    vector = TaskVector({"w": torch.arange(5000.0)})
    store.save(store.FineTuned(vector, history, 0.25, 1.0, store.fingerprint(known), known, head=head), root)


def state(root):
    save_state({"weights": torch.arange(9000.0)}, root / "a.pt")


def vector(root):
    TaskVector({"w": torch.arange(9000.0)}).save(root / "a.safetensors")


def document(root):
    write_json(root / "a.json", list(range(5000)))


def model(root):
    with (
        new_folder(root / "out", force=True) as folder,
        TensorFile(folder / "model.safetensors", {"w": (torch.float32, torch.Size([9000]))}) as out,
    ):
        out.write("w", torch.arange(9000.0))


@pytest.mark.parametrize("work", [checkpoint, state, vector, document, model])
def test_full_at_every_page_and_read_only(tmp_path, work):
    disk = tmp_path / "disk"
    disk.mkdir()

    def fill():
        pages, room, new = 0, 0, None
        while room < 2:  # enough, and a page more
            pages += 1
            assert mounted(disk, 0, f"size={PAGE * pages}")
            if (number := error_of(work, disk)) is None:
                room += 1
            else:
                assert number == errno.ENOSPC
                assert files(disk).keys() <= {".partial"}, files(disk).keys()
                assert mounted(disk, REMOUNT, f"size={PAGE * 1000}")
                work(disk)
            new = new or files(disk)
            assert files(disk) == new
            LIBC.umount(str(disk).encode())
        assert pages > 5
        assert mounted(disk, 0, f"size={PAGE * 1000}")
        assert mounted(disk, REMOUNT | READ_ONLY)
        assert error_of(work, disk) == errno.EROFS
        assert not files(disk)

    if (said := on_its_own_mounts(fill)) is None:
        pytest.skip("this process may mount nothing")
    assert not said, said
