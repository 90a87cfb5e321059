"""Grids of notebooks: what to run, running it, and what came out.

A notebook imports only `record`, so the rest is loaded when it is first asked for.
"""

from importlib import import_module
from typing import Any

from saftnb.batch.record import record

__all__ = ["load_grid", "record", "results", "run_grid", "run_one", "tables"]

_HOMES = {
    "load_grid": "saftnb.batch.grid",
    "results": "saftnb.batch.frames",
    "run_grid": "saftnb.batch.engine",
    "run_one": "saftnb.batch.run",
    "tables": "saftnb.batch.frames",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
