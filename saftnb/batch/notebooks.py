"""Finding a notebook by name or path, and what decides its result: sources, tags and parameters."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saftnb.batch.parameters import Parameter, ParameterError, cell_source, declared_parameters
from saftnb.paths import project_root


class NotebookError(ValueError):
    """A notebook that is not there or that no run can use."""


@dataclass(frozen=True)
class Notebook:
    """A notebook as it was read: what is checked, hashed and executed are the same bytes."""

    name: str
    path: Path
    text: str = field(repr=False)
    sha256: str = field(repr=False)
    code_sha256: str = field(repr=False)  # of the code cells alone: prose may change without changing a result
    parameters: dict[str, Parameter] = field(repr=False)


def read_notebook(path: Path) -> Notebook:
    """The notebook in ``path``. Raises NotebookError."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if content["nbformat"] != 4:
            raise NotebookError(f"{path.name} is in notebook format {content['nbformat']}, not 4")
        return Notebook(path.stem, path, text, *_sha256(content), declared_parameters(content))
    except ParameterError as error:
        raise NotebookError(f"{path.name}: {error}") from None
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError):
        raise NotebookError(f"{path.name} is not a notebook") from None


def find_notebook(wanted: str, grid_file: Path) -> Notebook:
    """The notebook that a grid calls ``wanted``: a name from ``notebooks/`` or a path.

    A bare name is looked up in ``notebooks/`` and ``notebooks/appendix/``; a path (with a slash or
    ``.ipynb``) first beside the grid file, then in the current folder. Raises NotebookError, which names
    what there is.
    """
    libraries = list(_libraries(grid_file))
    beside = [grid_file.absolute().parent, Path.cwd()]
    is_path = "/" in wanted or wanted.endswith(".ipynb")
    for folder in beside + libraries if is_path else libraries + beside:
        for candidate in (folder / wanted, folder / f"{wanted}.ipynb"):
            if candidate.suffix == ".ipynb" and candidate.is_file():
                return read_notebook(candidate.resolve())
    there = dict.fromkeys(path.stem for folder in libraries for path in sorted(folder.glob("*.ipynb")))
    raise NotebookError(f"there is no notebook '{wanted}'; there are: {', '.join(there) or 'none'}")


def _libraries(grid_file: Path) -> Iterator[Path]:
    """The folders of named notebooks, nearest first: around the grid file, here, in the project."""
    above = grid_file.absolute().parent.parent
    nearest = [above] if grid_file.absolute().parent.name == "grids" else []
    for folder in [*nearest, Path.cwd() / "notebooks", project_root() / "notebooks"]:
        if folder.is_dir():
            yield from (folder, folder / "appendix")


def _sha256(content: dict[str, Any]) -> tuple[str, str]:
    """Hashes of the cells' kinds, sources and tags, and of the code alone; outputs, and what papermill injects, do
    not count."""
    cells, code = [], []
    for cell in content["cells"]:
        tags = sorted(cell.get("metadata", {}).get("tags", []))
        if "injected-parameters" in tags:
            continue
        cells.append([cell["cell_type"], cell_source(cell), tags])
        if cell["cell_type"] == "code":
            code += [cell_source(cell), *(tag for tag in tags if tag in ("skip-execution", "raises-exception"))]
    whole, alone = (hashlib.sha256(json.dumps(part).encode()).hexdigest() for part in (cells, code))
    return whole, alone
