"""Files whole or not at all, what killed writers leave behind, and locks, with real processes."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from saftnb import disk
from saftnb.disk import locked, restore, sweep, whole_file, whole_folder

fork = multiprocessing.get_context("fork")


def test_a_file_appears_whole_or_stays_as_it_was(tmp_path):
    file = tmp_path / "a.txt"
    with whole_file(file) as part:
        part.write_text("one")
        assert not file.exists()
    with pytest.raises(KeyError), whole_file(file, durable=False) as part:
        part.write_text("half")
        raise KeyError
    assert file.read_text() == "one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_appears_whole_or_stays_as_it_was(tmp_path):
    folder = tmp_path / "out"
    for text in ("one", "two"):
        with whole_folder(folder) as part:
            (part / "deep").mkdir()
            (part / "deep" / "a.txt").write_text(text)
        assert (folder / "deep" / "a.txt").read_text() == text
    with pytest.raises(KeyError), whole_folder(folder, tmp_path / "inside") as part:
        assert part.parent == tmp_path / "inside"
        raise KeyError
    assert (folder / "deep" / "a.txt").read_text() == "two"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["inside", "out"]
    assert not list((tmp_path / "inside").iterdir())


@pytest.mark.parametrize("at", [1, 2])
def test_a_crash_between_the_two_renamings_loses_nothing(tmp_path, at):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    code = f"""
import os
from pathlib import Path
from saftnb import disk
from saftnb.disk import whole_folder
disk._exchanged = lambda *_: False
calls, rename = [], Path.rename
def counted(self, target):
    calls.append(self)
    if len(calls) == {at}:
        os._exit(9)
    return rename(self, target)
Path.rename = counted
with whole_folder(Path({str(folder)!r})) as part:
    (part / "a.txt").write_text("two")
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    restore(folder)
    assert (folder / "a.txt").read_text() == "one"


def named(file, host, pid):
    return file.with_name(f".{file.name}.{host}-{pid}.0a1b2c3d.part")


def gone_process():
    done = subprocess.Popen(["true"])
    done.wait()
    return done.pid


def test_what_is_swept_is_what_nobody_writes_any_more(tmp_path):
    file, here = tmp_path / "a[1].u8", disk._host()
    dead, alive = named(file, here, gone_process()), named(file, here, os.getpid())
    theirs_old, theirs = named(file, "far-away", 1), named(file, "far-away", 2)
    young, other = named(file, here, gone_process() + 10**6), named(tmp_path / "b.u8", here, gone_process())
    for entry in (dead, alive, theirs_old, theirs, young, other):
        entry.write_text("half")
    for entry in (dead, alive, other):
        os.utime(entry, (0, time.time() - 2 * disk.HERE))
    os.utime(theirs_old, (0, time.time() - 2 * disk.ELSEWHERE))
    os.utime(theirs, (0, time.time() - disk.ELSEWHERE / 2))
    sweep(file)
    assert set(tmp_path.iterdir()) == {alive, theirs, young, other}


def test_a_container_of_the_same_name_is_elsewhere(tmp_path, monkeypatch):
    """Its processes cannot be seen from here, and theirs there not."""
    theirs = named(tmp_path / "a.u8", disk._host(), gone_process())
    theirs.write_text("half")
    os.utime(theirs, (0, time.time() - 2 * disk.HERE))
    disk._processes.cache_clear()
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    try:
        sweep(tmp_path / "a.u8")
    finally:
        disk._processes.cache_clear()
    assert theirs.exists()
    monkeypatch.undo()
    sweep(tmp_path / "a.u8")
    assert not theirs.exists()


def add_one(file, lock, times):
    for _ in range(times):
        with locked(lock, "counts"):
            before = int(file.read_text())
            time.sleep(0.001)
            file.write_text(str(before + 1))


def test_a_name_that_begins_like_another_is_another(tmp_path):
    state = named(tmp_path / "a.pt", disk._host(), gone_process())
    state.write_text("half")
    os.utime(state, (0, time.time() - 2 * disk.HERE))
    sweep(tmp_path / "a")
    assert state.exists()
    sweep(tmp_path / "a.pt")
    assert not state.exists()


def test_what_is_forgotten_does_not_come_back(tmp_path, monkeypatch):
    """Killed while the old folder is removed: its rest is no former state."""
    folder = tmp_path / "out"
    for text in ("one", "two"):
        with monkeypatch.context() as patch:
            patch.setattr(disk, "_remove", lambda path: None)
            with whole_folder(folder) as part:
                (part / "a.txt").write_text(text)
    shutil.rmtree(folder)
    restore(folder)
    assert not folder.exists()


def test_a_forked_process_that_lives_on_does_not_keep_the_lock(tmp_path):
    lock, there = tmp_path / "a.lock", fork.Event()
    with locked(lock, "forks"):
        child = fork.Process(target=there.wait, args=(20,))
        child.start()
        os.link(lock, tmp_path / "same")  # who waits on it holds the same file
    descriptor = os.open(tmp_path / "same", os.O_RDWR)
    disk.fcntl.flock(descriptor, disk.fcntl.LOCK_EX | disk.fcntl.LOCK_NB)
    os.close(descriptor)
    there.set()
    child.join()


def test_eight_processes_and_one_lock(tmp_path):
    file, lock = tmp_path / "count", tmp_path / "locks" / "count.lock"
    file.write_text("0")
    crowd = [fork.Process(target=add_one, args=(file, lock, 20)) for _ in range(8)]
    for one in crowd:
        one.start()
    for one in crowd:
        one.join()
    assert file.read_text() == "160"
    assert not list(lock.parent.iterdir())  # it goes away with the last one


def hold(lock, there):
    with locked(lock, "sleeps"):
        there.set()
        time.sleep(60)


def test_a_dead_holder_does_not_block_and_a_live_one_is_named(tmp_path, capfd):
    lock, there = tmp_path / "a.lock", fork.Event()
    holder = fork.Process(target=hold, args=(lock, there))
    holder.start()
    there.wait(10)
    waiter = fork.Process(target=add_one, args=(tmp_path / "count", lock, 1))
    (tmp_path / "count").write_text("0")
    waiter.start()
    waiter.join(0.5)
    assert waiter.is_alive()
    os.kill(holder.pid, signal.SIGKILL)
    waiter.join(10)
    assert (tmp_path / "count").read_text() == "1"
    assert "waiting for another process that counts" in capfd.readouterr().out
    assert not lock.exists()


def test_a_lock_file_that_cannot_be_removed_is_unlocked(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "unlink", partial(_refuse, errno.EROFS))
        with locked(tmp_path / "a.lock", "works"):
            pass
    assert (tmp_path / "a.lock").exists()
    descriptor = os.open(tmp_path / "a.lock", os.O_RDWR)
    disk.fcntl.flock(descriptor, disk.fcntl.LOCK_EX | disk.fcntl.LOCK_NB)
    os.close(descriptor)
    with locked(tmp_path / "a.lock", "works"):
        pass
    assert not (tmp_path / "a.lock").exists()


def test_a_file_system_without_locks_is_said_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(disk.fcntl, "flock", partial(_refuse, errno.ENOSYS))
    with locked(tmp_path / "a.lock", "works"):
        pass
    assert "no locks on this file system" in capsys.readouterr().out
    monkeypatch.setattr(disk.fcntl, "flock", partial(_refuse, errno.EIO))
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path / "a.lock", "works"):
        pass


def test_doctor_says_where_locks_hold(tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    mounts.write_text("")
    assert disk.lock_fault(tmp_path / "not" / "there", mounts) is None
    lines = ["sysfs / ext4 rw 0 0", f"mgs@tcp:/fs {tmp_path} lustre rw,flock,lazystatfs 0 0"]
    mounts.write_text("\n".join(lines))
    assert disk.lock_fault(tmp_path, mounts) is None
    mounts.write_text("\n".join(lines).replace(",flock", ",localflock"))
    assert disk.lock_fault(tmp_path, mounts) == "lustre is mounted with localflock: locks hold on this machine alone"
    monkeypatch.setattr(disk.fcntl, "flock", partial(_refuse, errno.ENOSYS))
    assert disk.lock_fault(tmp_path) == "no locks here (Function not implemented); Lustre needs the mount option flock"
    monkeypatch.setattr(disk.fcntl, "flock", lambda *_: None)
    assert disk.lock_fault(tmp_path) == "a lock was given to two at once"
    assert not list(tmp_path.glob(".lock*"))


def _refuse(number, *_, **__):
    raise OSError(number, os.strerror(number))
