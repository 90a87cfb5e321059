"""Finished runs in a list that git can hold: ``saftnb keep`` writes it, ``saftnb grid`` goes on from it.

A grid of hours is run once. Its file names the list (``kept: ../../reports/NAME/runs.json``); beside it stand the
tables and figures of the runs that come after the others. On a fresh clone ``saftnb grid`` takes the runs of the list
for done, as long as their parameters and the code of their notebook are the same, and runs only what is missing:
usually the notebooks that read the others. The library may have changed since; ``--fresh`` runs everything here.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saftnb.batch.grid import Grid, GridError, Run
from saftnb.batch.manifest import LOG, MANIFEST, NOTEBOOK, is_done, read_manifest, sha256_of
from saftnb.batch.record import RESULTS
from saftnb.run_folder import read_json, write_json

SCHEMA = 1
KEPT = (
    "schema", "grid", "notebook", "status", "parameters", "overrides", "seed", "device", "threads", "notebook_sha256",
    "code_sha256", "library_sha256", "git", "versions", "finished", "seconds",
)  # fmt: skip


def read_kept(grid: Grid) -> dict[str, dict[str, Any]]:
    """The entries of the grid's list by run id; empty where the grid has no list or it is not written yet.

    Raises GridError where the file is not such a list.
    """
    if grid.kept is None or not grid.kept.exists():
        return {}
    try:
        listed = read_json(grid.kept)
        if listed["schema"] != SCHEMA:
            raise ValueError
        return {entry["id"]: entry for entry in listed["runs"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise GridError(f"{grid.kept.name}: not a list of kept runs of schema {SCHEMA}") from None


def fits(run: Run, entry: Mapping[str, Any] | None) -> bool:
    """Whether a kept run is this run: equal parameters, and a notebook of equal code."""
    if entry is None:
        return False
    manifest = entry["manifest"]
    return manifest["parameters"] == run.parameters and manifest["code_sha256"] == run.notebook.code_sha256


def take(run: Run, entry: Mapping[str, Any], source: Path) -> None:
    """Write the run's folder as the list tells it; its notebook holds no outputs."""
    folder = run.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # until the end, there is no done run here
    write_json(folder / RESULTS, entry["results"])
    (folder / NOTEBOOK).write_text(run.notebook.text, encoding="utf-8")
    (folder / LOG).write_text(f"taken from {source.name}, not executed here\n", encoding="utf-8")
    hashes = {"results_sha256": sha256_of(folder / RESULTS), "run_sha256": sha256_of(folder / NOTEBOOK)}
    own = {"reason": None, "budget": run.budget, "checkpoints": [], "taken": source.name}
    write_json(folder / MANIFEST, entry["manifest"] | own | hashes)


def keep(grid: Grid) -> tuple[int, list[Path]]:
    """Write the grid's list, and beside it the tables and headline figures of the runs that come after others.

    An entry of the list stays until a run of the same id is done here; entries of runs that the grid no longer has
    are dropped. Returns how many runs the list holds, and the files that were written.
    Raises GridError where the grid names no list or no run is done.
    """
    if grid.kept is None:
        raise GridError(
            f"grid {grid.name} names no list of kept runs: add a line such as kept: ../../reports/x/runs.json"
        )
    before = read_kept(grid)
    first = [run for run in grid.runs if not run.after]
    entries = [entry for run in first if (entry := _entry(run) or before.get(run.id))]
    if not entries:
        raise GridError(f"grid {grid.name}: no run is done")
    grid.kept.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False, allow_nan=False) for entry in entries)
    temporary = grid.kept.with_suffix(".part")
    temporary.write_text(f'{{"schema": {SCHEMA}, "runs": [\n{lines}\n]}}\n', encoding="utf-8")
    temporary.replace(grid.kept)
    later = [run for run in grid.runs if run.after and is_done(run.folder)]
    return len(entries), [grid.kept, *(path for run in later for path in _exhibits(run, grid.kept.parent))]


def _entry(run: Run) -> dict[str, Any] | None:
    """A done run as an entry of the list. One that was taken from the list is the entry that it was."""
    if not is_done(run.folder):
        return None
    manifest = read_manifest(run.folder) or {}
    if "code_sha256" not in manifest:
        return None
    kept = {name: manifest[name] for name in KEPT if name in manifest}
    return {"id": run.id, "manifest": kept, "results": read_json(run.folder / RESULTS)}


def _exhibits(run: Run, folder: Path) -> list[Path]:
    """Every recorded table as CSV, numbers to six significant digits, and the headline figure as PNG."""
    import pandas

    written = []
    for name, value in read_json(run.folder / RESULTS).items():
        if isinstance(value, dict) and value.get("type") == "table":
            written.append(folder / f"{name}.csv")
            frame = pandas.DataFrame(value["data"], columns=value["columns"])
            frame.to_csv(written[-1], index=False, float_format="%.6g")
    for png in headline_figures(read_json(run.folder / NOTEBOOK)):
        written.append(folder / f"{run.notebook.name}.png")
        written[-1].write_bytes(png)
    return written


def headline_figures(notebook: Mapping[str, Any]) -> list[bytes]:
    """The figures, as PNG, that a notebook's cells tagged ``headline-figure`` show."""
    cells = [c for c in notebook["cells"] if "headline-figure" in c["metadata"].get("tags", [])]
    data = [out.get("data", {}) for cell in cells for out in cell["outputs"]]
    return [base64.b64decode(shown["image/png"]) for shown in data if "image/png" in shown]
