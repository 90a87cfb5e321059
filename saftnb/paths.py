"""Where the project, its checkpoint store and its downloads are. Imports nothing heavy.

Both folders raise NotADirectoryError for the home of a user that there is not.
"""

import errno
import os
from pathlib import Path


def project_root() -> Path:
    """The folder that holds ``pyproject.toml`` beside the package; the current folder when there is none."""
    beside = Path(__file__).resolve().parent.parent
    return beside if (beside / "pyproject.toml").is_file() else Path.cwd()


def store_root() -> Path:
    """The checkpoint store: the folder ``SAFTNB_STORE``, by default ``runs/store`` under the project root."""
    return _chosen("SAFTNB_STORE", "store")


def data_root() -> Path:
    """Downloaded data and weights, and rendered pictures: the folder ``SAFTNB_DATA``, by default ``runs/data`` under
    the project root."""
    return _chosen("SAFTNB_DATA", "data")


def _chosen(variable: str, name: str) -> Path:
    chosen = os.environ.get(variable)
    if not chosen:
        return project_root() / "runs" / name
    try:
        return Path(chosen).expanduser().absolute()
    except RuntimeError:
        raise NotADirectoryError(errno.ENOTDIR, f"{variable} names no user's home", chosen) from None
