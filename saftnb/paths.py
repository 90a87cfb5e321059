"""Where the project, its checkpoint store and its downloads are. Imports nothing heavy."""

import os
from pathlib import Path


def project_root() -> Path:
    """The folder that holds ``pyproject.toml`` beside the package; the current folder when there is none."""
    beside = Path(__file__).resolve().parent.parent
    return beside if (beside / "pyproject.toml").is_file() else Path.cwd()


def store_root() -> Path:
    """The checkpoint store: the folder ``SAFTNB_STORE``, by default ``runs/store`` under the project root."""
    chosen = os.environ.get("SAFTNB_STORE")
    return Path(chosen).expanduser().absolute() if chosen else project_root() / "runs" / "store"


def data_root() -> Path:
    """Downloaded data and weights: the folder ``SAFTNB_DATA``, by default ``runs/data`` under the project root."""
    chosen = os.environ.get("SAFTNB_DATA")
    return Path(chosen).expanduser().absolute() if chosen else project_root() / "runs" / "data"
