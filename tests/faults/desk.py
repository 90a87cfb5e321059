"""Runs of notebooks in no time: without a kernel, and without hashing the library."""

import sys
from pathlib import Path

import nbformat

from saftnb.batch import load_grid

# What a run's process does, without a kernel: results and an executed notebook, then the word that it is done.
EXECUTOR = """#!/bin/sh
read job
number=$(sed -n 's/.*"value = \\([0-9]*\\)".*/\\1/p' run.ipynb)
echo '{"total": {"type": "table", "columns": ["value"], "data": [['"$number"']]}}' > results.json
sed -i 's/"execution_count": null/"execution_count": 1/' run.ipynb
echo '{"status": "done"}' > .outcome.json
"""


def place_desk(root, folder, monkeypatch):
    """A grid of two runs in `folder`, one after the other, whose notebooks' process is a few lines of shell. What
    they write goes to `root`, which is returned."""
    script = folder / "executor"
    script.write_text(EXECUTOR)
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    for module in ("run", "manifest"):  # which take their time
        monkeypatch.setattr(f"saftnb.batch.{module}.library_sha256", lambda: "library", raising=False)
        monkeypatch.setattr(f"saftnb.batch.{module}.environment", lambda: {}, raising=False)
    monkeypatch.chdir(folder)
    write_notebooks(1)
    Path("g.yaml").write_text(
        "name: g\nkept: KEPT/runs.json\nruns: [{notebook: one}, {notebook: two, after: [one]}]".replace(
            "KEPT", str(root / "kept")
        )
    )
    return root


def write_notebooks(value):
    Path("notebooks").mkdir(exist_ok=True)
    for name in ("one", "two"):
        first = nbformat.v4.new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]}, id="a")
        then = nbformat.v4.new_code_cell(f"value = {value}", id="b")
        nbformat.write(nbformat.v4.new_notebook(cells=[first, then]), f"notebooks/{name}.ipynb")


def runs(root):
    return load_grid("g.yaml", root / "runs").runs
