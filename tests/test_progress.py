"""Which progress bar stands where, and what a headless one leaves."""

import json
import sys
import types

import pytest
from tqdm import tqdm

from saftnb import progress
from saftnb.progress import OneLine, progress_bar


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*progress.LIVE, "SAFTNB_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)


def in_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))


def test_a_terminal_a_headless_kernel_and_a_live_one(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    assert progress._kind() is tqdm
    in_a_kernel(monkeypatch)
    assert progress._kind() is OneLine
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    assert progress._kind().__name__ == "tqdm_notebook"
    monkeypatch.setenv("SAFTNB_RUN_DIR", str(tmp_path))
    assert progress._kind() is OneLine, "a grid that was started from a notebook"


def test_a_headless_bar_leaves_one_line(monkeypatch, capsys) -> None:
    in_a_kernel(monkeypatch)
    assert list(progress_bar(range(3), desc="train mnist", mininterval=0)) == [0, 1, 2]
    with progress_bar(total=7, desc="search", initial=2) as bar:
        bar.update(4)
        bar.set_postfix_str("validation 0.5", refresh=True)
    with progress_bar(total=9, desc="silent", disable=True) as bar:
        bar.update(9)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "\r" not in shown.err
    lines = shown.err.splitlines()
    assert [line.split("|")[0] for line in lines] == ["train mnist: 100%", "search:  86%"]
    assert "6/7" in lines[1]
    assert "validation 0.5" in lines[1]


def test_a_run_says_in_its_folder_where_its_bar_is(monkeypatch, capsys, tmp_path) -> None:
    in_a_kernel(monkeypatch)
    monkeypatch.setenv("SAFTNB_RUN_DIR", str(tmp_path))
    with progress_bar(total=5, desc="train", mininterval=0) as bar:
        bar.noted -= 2
        bar.update(3)
        assert json.loads((tmp_path / ".bar.json").read_text()) == {"desc": "train", "n": 3, "total": 5}
    assert not list(tmp_path.iterdir())
