"""What a notebook can report, and what the file then says."""

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saftnb.batch import record
from saftnb.paths import project_root, store_root
from saftnb.run_folder import read_json, used_checkpoint, write_json

names = st.text(alphabet="abcxyz_", min_size=1)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@pytest.fixture
def folder(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = desk / "runs" / "g" / "a-1"
    folder.mkdir(parents=True)
    monkeypatch.setenv("SAFTNB_RUN_DIR", str(folder))
    return folder


def recorded(folder: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(st.dictionaries(names, plain, min_size=1))
def test_plain_values_come_back_as_they_were(folder: Path, values: dict) -> None:
    (folder / "results.json").unlink(missing_ok=True)
    record(**values)
    assert recorded(folder) == values


def test_calls_add_up_and_the_last_word_counts(folder: Path) -> None:
    record(a=1, b=[1, 2])
    record(b=3, c={1: "x", "y": (True, None)})
    assert recorded(folder) == {"a": 1, "b": 3, "c": {"1": "x", "y": [True, None]}}
    assert [path.name for path in folder.iterdir()] == ["results.json"]


def test_numbers_of_other_libraries(folder: Path) -> None:
    record(
        a=np.float32(0.5),
        b=np.int64(3),
        c=np.bool_(True),
        d=torch.tensor(0.25, requires_grad=True),
        e=np.array([1.0, math.nan]),
        f=torch.tensor([[1, 2]]),
        g=np.array(7),
        h=np.float64(2.5),
    )
    values = recorded(folder)
    expected = {"a": 0.5, "b": 3, "c": True, "d": 0.25, "e": [1.0, None], "f": [[1, 2]], "g": 7, "h": 2.5}
    assert values == expected
    assert [type(values[name]) for name in "abc"] == [float, int, bool]


def test_tables(folder: Path) -> None:
    frame = pd.DataFrame({"task": ["a", "b"], "accuracy": [0.5, math.nan], "n": [1, 2]})
    record(plain=frame, indexed=frame.set_index("task"), crossed=pd.DataFrame([[1]], columns=[("x", "y")]))
    holes = pd.DataFrame({"n": pd.array([1, None], dtype="Int64"), "when": [pd.NaT, None]})
    record(holes=holes, steps=pd.DataFrame({"loss": [0.5]}, index=pd.RangeIndex(1, name="step")))
    values = recorded(folder)
    assert values["plain"] == {
        "type": "table",
        "columns": ["task", "accuracy", "n"],
        "data": [["a", 0.5, 1], ["b", None, 2]],
    }
    assert values["indexed"] == values["plain"]
    assert values["crossed"]["columns"] == ["x / y"]
    assert values["holes"]["data"] == [[1, None], [None, None]]
    assert (values["steps"]["columns"], values["steps"]["data"]) == (["step", "loss"], [[0, 0.5]])
    rebuilt = pd.DataFrame(values["plain"]["data"], columns=values["plain"]["columns"])
    pd.testing.assert_frame_equal(rebuilt, frame)


def test_what_is_not_finite_becomes_null_and_an_infinity_says_so(folder: Path) -> None:
    record(nan=math.nan, nested={"x": [np.float32("nan")]})
    with pytest.warns(UserWarning, match=r"record: loss\[0\] is -inf, stored as null"):
        record(loss=[-math.inf])
    assert recorded(folder) == {"nan": None, "nested": {"x": [None]}, "loss": [None]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"x": [object()]}, r"a\['x'\]\[0\] is a object"),
        ({1.5: 2}, r"a has the key 1.5"),
        ({1, 2}, r"a is a set"),
        (Path("x"), r"a is a PosixPath"),
        (1j, r"a is a complex"),
        (np.array([object()]), r"a\[0\] is a object"),
        (np.array(1j), r"a is a complex"),
        (pd.DataFrame({"x": [object()]}), r"a\[0\] is a object"),
    ],
)
@pytest.mark.parametrize("inside", [True, False])
def test_what_json_cannot_hold_is_refused_everywhere(folder, monkeypatch, value, message, inside) -> None:
    record(a=1)
    if not inside:
        monkeypatch.delenv("SAFTNB_RUN_DIR")
    with pytest.raises(TypeError, match=message):
        record(b=2, a=value)
    assert recorded(folder) == {"a": 1}


def test_outside_a_grid_nothing_is_written(desk: Path) -> None:
    assert record(a=1, b=pd.DataFrame({"x": [1]})) is None
    used_checkpoint(desk / "store" / "x", "f00")
    assert list(desk.iterdir()) == []


def test_checkpoints_are_named_relative_to_the_store(folder: Path, desk: Path) -> None:
    for _ in range(2):
        used_checkpoint(desk / "store" / "pocket" / "mnist-1", "f00")
    used_checkpoint(desk / "elsewhere" / "x", "ba5")
    assert json.loads((folder / ".checkpoints.json").read_text()) == [
        {"name": "pocket/mnist-1", "fingerprint": "f00"},
        {"name": "x", "fingerprint": "ba5"},
    ]


def test_a_write_that_fails_leaves_the_old_file(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = desk / "x.json"
    write_json(file, {"a": 1})

    def crash(*_: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(OSError, match="no space"):
        write_json(file, {"a": list(range(1000))})
    assert json.loads(file.read_text()) == {"a": 1}


def test_recording_and_launching_load_nothing_heavy() -> None:
    code = (
        "import sys; from saftnb.batch import record; import saftnb.cli, saftnb.batch.engine\n"
        "heavy = {'torch', 'pandas', 'numpy', 'papermill', 'nbformat'}\n"
        "print(sorted(heavy & set(sys.modules)), callable(record))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[] True"


def test_where_the_store_is(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store_root() == desk / "store"
    monkeypatch.setenv("SAFTNB_STORE", "here")
    assert store_root() == desk / "here"
    monkeypatch.setenv("SAFTNB_STORE", "~nobody-of-that-name/store")
    with pytest.raises(NotADirectoryError, match="SAFTNB_STORE names no user's home"):
        store_root()
    monkeypatch.setenv("SAFTNB_STORE", "")
    assert store_root() == project_root() / "runs" / "store"  # whatever the current folder
    assert (project_root() / "pyproject.toml").exists()
    monkeypatch.setattr("saftnb.paths.__file__", str(desk / "site-packages" / "saftnb" / "paths.py"))
    assert project_root() == desk


def test_what_threads_record_at_once_is_all_there(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_RUN_DIR", str(tmp_path))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: record(**{f"value{number}": number}), range(16)))
    assert read_json(tmp_path / "results.json") == {f"value{number}": number for number in range(16)}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_what_threads_note_at_once_is_all_there(folder, desk):
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: used_checkpoint(desk / "store" / f"c{number}", "f"), range(16)))
    noted = read_json(folder / ".checkpoints.json")
    assert sorted(entry["name"] for entry in noted) == sorted(f"c{number}" for number in range(16))
    assert not (folder / ".checkpoints.lock").exists()


def test_keys_that_would_become_one_are_refused():
    with pytest.raises(TypeError, match="x has two keys that are the same text"):
        record(x={1: "a", "1": "b"})
