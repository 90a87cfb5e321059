"""What a notebook reports about itself: its headline numbers and the checkpoints that it used.

Inside a grid the environment variable ``SAFTNB_RUN_DIR`` names the run's folder; elsewhere (JupyterLab)
the same calls check their arguments and write nothing, so a notebook behaves alike in both places.
"""

import math
import warnings
from typing import Any

from saftnb.disk import locked
from saftnb.run_folder import RunFolder, read_json, run_folder, write_json


def record(**values: Any) -> None:
    """Add named results to the run's ``results.json``; a name that was there before is replaced.

    A value is a JSON scalar, a list or dict of such, a NumPy or torch scalar or array (stored as numbers or
    nested lists) or a pandas DataFrame, stored as ``{"type": "table", "columns": [...], "data": [...]}``
    with a named or non-default index as its first columns. The file is strict JSON: NaN, which pandas
    reads back from null, becomes null silently, and an infinity becomes null with a warning.

    Raises TypeError, naming the place inside the value, for anything else.
    """
    encoded = {name: _encode(value, name) for name, value in values.items()}
    folder = run_folder()
    if folder is not None:
        file = RunFolder(folder).results_file
        with locked(file.with_name(".results.lock"), "records results"):  # threads and processes of the notebook
            write_json(file, read_json(file, {}) | encoded)


def _encode(value: Any, where: str) -> Any:
    """``value`` as strict JSON; ``where`` is its place, for the error."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return _finite(value, where)
    if isinstance(value, (list, tuple)):
        return [_encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        found = {_key(key, where): _encode(item, f"{where}[{key!r}]") for key, item in value.items()}
        if len(found) < len(value):
            raise TypeError(f"record: {where} has two keys that are the same text in JSON")
        return found
    if hasattr(value, "columns") and hasattr(value, "itertuples"):
        return _table(value, where)
    if hasattr(value, "tolist"):  # NumPy and torch, without importing either
        plain = value.tolist()
        if not hasattr(plain, "tolist"):
            return _encode(plain, where)
    raise TypeError(f"record: {where} is a {type(value).__name__}, which JSON cannot hold")


def _finite(value: float, where: str) -> float | None:
    if math.isfinite(value):
        return value
    if math.isinf(value):
        warnings.warn(f"record: {where} is {value}, stored as null", stacklevel=4)
    return None


def _key(key: Any, where: str) -> str:
    if isinstance(key, (str, int)):
        return str(key)
    raise TypeError(f"record: {where} has the key {key!r}; keys are strings or whole numbers")


def _table(frame: Any, where: str) -> dict[str, Any]:
    """A DataFrame as a tagged table; missing values become null."""
    index = frame.index
    if index.nlevels > 1 or index.name is not None or list(index) != list(range(len(frame))):
        frame = frame.reset_index()
    columns = [" / ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in frame.columns]
    missing = frame.isna().to_numpy()
    data = [
        [None if gone else _encode(cell, f"{where}[{i}]") for cell, gone in zip(row, missing[i], strict=True)]
        for i, row in enumerate(frame.itertuples(index=False, name=None))
    ]
    return {"type": "table", "columns": columns, "data": data}
