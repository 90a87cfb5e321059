"""The folder of a run as one value: read once where it is held, and judged alike by all who ask."""

from pathlib import Path

import pytest

from saftnb.run_folder import RunFolder, find_runs, write_json


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "g" / "a-1")
    folder.set_aside()
    write_json(folder.results_file, {"x": 1, "verdict": "yes"})
    folder.notebook_file.write_text("{}")
    folder.seal({"notebook": "a", "status": "done", "seconds": 2.5})
    return RunFolder(folder.path)


def test_what_was_read_stays_and_another_value_looks_again(folder: RunFolder) -> None:
    assert (folder.done, folder.results["x"], folder.scalars, folder.verdict) == (True, 1, {"x": 1}, "yes")
    write_json(folder.results_file, {"x": 2})
    assert (folder.done, folder.results["x"]) == (True, 1)
    again = RunFolder(folder.path)
    assert (again.done, again.status, again.scalars, again.verdict) == (False, "not done", {}, "")
    assert again.reason == "results.json was altered after the run, or is gone"


def test_a_run_that_was_executed_is_moved_away_and_one_from_a_list_is_dropped(folder: RunFolder) -> None:
    RunFolder(folder.path).set_aside()
    assert list(folder.path.iterdir()) == []
    assert RunFolder(folder.path).seconds == 2.5, "what it took before is still known"
    write_json(folder.manifest_file, {"notebook": "a", "status": "done", "taken": "runs.json", "seconds": 7.0})
    assert RunFolder(folder.path).taken
    RunFolder(folder.path).set_aside()
    assert RunFolder(folder.path).seconds == 2.5
    folder.forget_previous()
    assert RunFolder(folder.path).seconds is None
    assert list(find_runs(folder.path.parent)) == []


def test_files_that_cannot_be_read_say_nothing_and_stop_nobody(folder: RunFolder) -> None:
    for text in ("{", "[]", '{"status": "done"}'):
        folder.manifest_file.write_text(text)
        broken = RunFolder(folder.path)
        assert (broken.manifest, broken.done, broken.notebook) == ({}, False, "a")
        assert broken.reason == "manifest.json cannot be read"
    folder.progress_file.write_text('{"cell"')
    assert folder.at == {"bar": {}}
    write_json(folder.progress_file, {"cell": 3})
    assert folder.at == {"cell": 3, "bar": {}}, "where it is now is never kept"
