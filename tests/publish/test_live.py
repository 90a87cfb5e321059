"""The report that grows with its grid."""

import threading
from pathlib import Path

import pytest

import saftnb.publish.live as live_module
from saftnb.publish import LiveReport
from tests.tools.waiting import until


def test_it_is_written_with_the_first_run_and_again_after_each(add_run, runs: Path, tmp_path: Path, headline) -> None:
    said, out = [], tmp_path / "report"
    report = LiveReport(runs, out, said.append)
    add_run("01_saft-aaaa", results={"headline": headline})
    report()
    until(lambda: report.last.done())
    assert (out / "01_saft-aaaa.html").exists()
    assert said == [f"report   {out / 'index.html'} stands, and grows with each run"]
    add_run("02_more-bbbb", results={"headline": headline})
    report()
    until(lambda: report.last.done())
    assert "02_more-bbbb.html" in (out / "index.html").read_text()
    assert report.close() == out / "index.html"
    assert len(said) == 1


def test_calls_that_come_while_it_writes_are_answered_by_one_more_writing(tmp_path: Path, monkeypatch) -> None:
    began, go, written = threading.Event(), threading.Event(), []

    def slow(runs: Path, out: Path) -> Path:
        began.set()
        go.wait(10)
        written.append(out)
        return out

    monkeypatch.setattr(live_module, "publish_runs", slow)
    report = LiveReport(tmp_path, tmp_path / "out", lambda _: None)
    report()
    began.wait(10)
    for _ in range(5):
        report()
    go.set()
    until(lambda: report.last.done())
    assert len(written) == 2
    report.close()
    assert len(written) == 3


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("odd notebook")])
def test_a_writing_that_fails_is_one_line_and_stops_nothing(tmp_path: Path, monkeypatch, error: Exception) -> None:
    def fails(runs: Path, out: Path) -> Path:
        raise error

    said: list[str] = []
    report = LiveReport(tmp_path, tmp_path / "out", said.append)
    monkeypatch.setattr(live_module, "publish_runs", fails)
    report()
    assert report.close() is None
    assert set(said) == {f"report   cannot be written: {error}"}
    monkeypatch.setattr(live_module, "publish_runs", lambda runs, out: out)
    report = LiveReport(tmp_path, tmp_path / "out", said.append)
    report()
    until(lambda: report.last.done())
    assert said[-1] == f"report   {tmp_path / 'out'} stands, and grows with each run"


def test_a_folder_of_something_else_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"thesis\.tex, which no report wrote"):
        LiveReport(tmp_path, tmp_path)
