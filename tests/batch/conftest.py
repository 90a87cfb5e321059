"""Tiny notebooks and grids, built in a temporary folder that is the current one."""

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest


@pytest.fixture(scope="module")
def write_notebook() -> Callable[..., Path]:
    def write(path: Path, *cells: str, parameters: str | None = None) -> Path:
        notebook = nbformat.v4.new_notebook()
        if parameters is not None:
            cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
            notebook.cells.append(cell)
        notebook.cells += [nbformat.v4.new_code_cell(source) for source in cells]
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
        return path

    return write


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a store of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("SAFTNB_RUN_DIR", raising=False)
    return tmp_path
