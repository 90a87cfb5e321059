"""The folder of the run that this process belongs to, as the environment names it. Imports nothing heavy.

Below every room, because the checkpoint store notes here what a run rests on and `batch` reads it.
"""

import json
import os
from pathlib import Path
from typing import Any

from saftnb.disk import whole_file
from saftnb.paths import store_root

CHECKPOINTS = ".checkpoints.json"
BAR = ".bar.json"  # in a run's folder: the progress bar that moves
CURRENT = ".current.json"  # in a grid's folder: the ids of the runs that the grid file names now


def used_checkpoint(folder: Path, fingerprint: str) -> None:
    """Note that this run rests on the checkpoint in ``folder``; nothing happens outside a run.

    The note holds the folder's name under the store, so that a rerun of the grid sees when it is gone.
    """
    run = run_folder()
    if run is None:
        return
    folder, store = Path(folder).resolve(), store_root().resolve()
    name = folder.relative_to(store).as_posix() if folder.is_relative_to(store) else folder.name
    entry = {"name": name, "fingerprint": str(fingerprint)}
    known = read_json(run / CHECKPOINTS, [])
    if entry not in known:
        write_json(run / CHECKPOINTS, [*known, entry])


def run_folder() -> Path | None:
    """The folder of the run that this process belongs to, or None outside a grid."""
    named = os.environ.get("SAFTNB_RUN_DIR")
    return Path(named) if named else None


def read_json(path: Path, default: Any = None) -> Any:
    """The JSON in ``path``, or ``default`` where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write strict JSON so that a reader sees the old file or the new one, never a part of it.

    ``durable`` waits until it is on the disk. On a disk that is full nothing is left of the attempt.
    """
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        with whole_file(path, durable=durable) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None
