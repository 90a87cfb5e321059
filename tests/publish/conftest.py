"""Small notebooks and run folders, written by hand: no kernel is started."""

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

HEADLINE = {"columns": ["recipe", "merged"], "data": [["sgd", 0.7012], ["saft", 0.755]]}


@pytest.fixture(scope="session")
def png() -> str:
    """A 40 x 30 picture as a notebook stores it."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "#e07b39").save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="session")
def figure(png: str):
    """An output that shows a figure."""
    return new_output("display_data", data={"image/png": png, "text/plain": "<Figure size 640x480>"})


@pytest.fixture(scope="session")
def cells(figure) -> list:
    """A notebook as this project writes them: title, claim, parameters, formula, figure, what we see."""
    return [
        new_markdown_cell(r"# Flat minima merge better for $\rho > 0$"),
        new_markdown_cell("**Claim.** The flatter, the better (SAFT, Table 2). Second sentence."),
        new_code_cell("secret_parameter = 0.05", metadata={"tags": ["parameters"]}),
        new_markdown_cell("## The worst loss nearby\n\n$$\\max_{\\|\\epsilon\\|\\le\\rho} L(w+\\epsilon)$$"),
        new_code_cell("secret_call()", outputs=[figure], metadata={"tags": ["headline-figure"]}),
        new_markdown_cell("**What we see.** SAFT stays above. Everywhere."),
    ]


@pytest.fixture
def notebook(tmp_path: Path) -> Callable[..., Path]:
    """Write a notebook of the given cells and return its path."""

    def write(*cells, path: Path = tmp_path / "notebook.ipynb") -> Path:
        nbformat.write(new_notebook(cells=list(cells)), path)
        return path

    return write


def publish_notebook(path: Path, out: Path, *, code: bool = True, **manifest) -> Path:
    """The page of a notebook that was run."""
    from saftnb.publish.index import publish_runs

    folder = path.parent / f"{out.stem}-runs" / "pocket" / "01_saft-a"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, folder / "run.ipynb")
    if (path.parent / "drawings").exists():
        shutil.copytree(path.parent / "drawings", folder / "drawings", dirs_exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"notebook": "01_saft", "status": "done"} | manifest))
    publish_runs(folder.parent, path.parent / f"{out.stem}-report", code=code)
    return shutil.copy(path.parent / f"{out.stem}-report" / "01_saft-a.html", out)


@pytest.fixture
def page(tmp_path: Path, notebook) -> Callable[..., str]:
    """Publish a notebook of the given cells and return the HTML."""

    def publish(*cells, **options) -> str:
        out = publish_notebook(notebook(*cells), tmp_path / "page.html", **options)
        return out.read_text(encoding="utf-8")

    return publish


@pytest.fixture
def shown(page) -> Callable[..., str]:
    """Publish one code cell with one output and return the page's <main>."""

    def publish(kind: str, **fields) -> str:
        return (
            page(new_code_cell("x", outputs=[new_output(kind, **fields)]), code=False)
            .partition("<main>")[2]
            .partition("</main>")[0]
        )

    return publish


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "runs" / "pocket").mkdir(parents=True)
    return tmp_path / "runs" / "pocket"


@pytest.fixture
def add_run(runs: Path, cells) -> Callable[..., Path]:
    """Add a run folder; keywords change its manifest."""
    return adding(runs, cells)


def adding(runs: Path, cells: list) -> Callable[..., Path]:
    def add(name: str, *, results: dict | None = None, own_cells: list | None = None, **changes) -> Path:
        folder = runs / name
        folder.mkdir()
        nbformat.write(new_notebook(cells=own_cells or cells), folder / "run.ipynb")
        manifest = {
            "grid": "pocket", "notebook": name.rpartition("-")[0],
            "parameters": {"suite": "pocket", "rho": 0.05}, "overrides": {}, "status": "done", "reason": "",
            "seconds": 75.2, "budget": 600,
            "started": "2026-02-01T10:00:00+00:00", "finished": "2026-02-01T10:01:15+00:00",
            "git": {"commit": "0123456789abcdef", "dirty": True}, "versions": {"torch": "2.14.1"},
        }  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps(manifest | changes))
        (folder / "results.json").write_text(json.dumps({} if results is None else results))
        return folder

    return add


@pytest.fixture
def headline() -> dict:
    return HEADLINE
