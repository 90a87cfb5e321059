"""Re-execute the committed notebooks at their default parameters and keep the outputs (`make notebooks`).

    python tests/tools/execute_notebooks.py [NAME ...]        all notebooks where none is named

A notebook that fails leaves the committed one as it was.
"""

import sys

import nbformat
from thimble_notebooks import NOTEBOOKS, notebooks

from saftnb.batch import run_one
from saftnb.batch.grid import Run
from saftnb.batch.kept import headline_figures
from saftnb.batch.notebooks import find_notebook

GALLERY = NOTEBOOKS.parent / "reports" / "gallery"


def cleaned(executed: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without papermill's traces: its metadata, the injected parameters, the progress bars."""
    executed.metadata = {key: executed.metadata[key] for key in ("kernelspec", "language_info")}
    executed.metadata["kernelspec"]["display_name"] = "Python 3 (ipykernel)"
    executed.metadata["language_info"] = {"name": "python"}
    executed.cells = [cell for cell in executed.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    count = 0
    for cell in executed.cells:
        cell.metadata = {key: cell.metadata[key] for key in ("tags", "alt") if cell.metadata.get(key)}
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            cell.outputs = [out for out in cell.outputs if not is_progress(out)]
            for out in cell.outputs:
                if "execution_count" in out:
                    out.execution_count = count
    return executed


def is_progress(output: nbformat.NotebookNode) -> bool:
    return output.output_type == "stream" and output.name == "stderr" and "%|" in output.text


def main(names: list[str]) -> None:
    wanted = [path for path in notebooks() if not names or path.stem in names]
    for path in wanted:
        notebook = find_notebook(str(path), path)
        parameters = {p.name: p.default for p in notebook.parameters.values()}
        manifest = run_one(Run("notebooks", notebook, parameters, {}, root=NOTEBOOKS.parent / "runs"))
        print(f"{path.relative_to(NOTEBOOKS)}: {manifest['status']} in {manifest['seconds']} s", flush=True)
        if manifest["status"] != "done":
            sys.exit(f"{path.name}: {manifest['reason']}")
        folder = Run("notebooks", notebook, parameters, {}, root=NOTEBOOKS.parent / "runs").folder
        executed = cleaned(nbformat.read(folder.notebook_file, as_version=4))
        nbformat.write(executed, path)
        for png in headline_figures(executed):
            (GALLERY / f"{path.stem}.png").write_bytes(png)


if __name__ == "__main__":
    main(sys.argv[1:])
