"""Finished runs in a list that git can hold: ``saftnb keep`` writes it, ``saftnb grid`` goes on from it.

A grid of hours is run once. Its file names the list (``kept: ../../reports/NAME/runs.json``); beside it stand the
tables and figures of the runs that come after the others. On a fresh clone ``saftnb grid`` takes the runs of the list
for done, as long as their parameters and the code of their notebook are the same, and runs only what is missing:
usually the notebooks that read the others. The library may have changed since; ``--fresh`` runs everything here.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from saftnb.batch.grid import Grid, GridError, Run
from saftnb.batch.manifest import reason_to_run
from saftnb.batch.run import run_lock
from saftnb.disk import whole_file
from saftnb.run_folder import read_json, write_json

SCHEMA = 1
KEPT = (
    "schema", "grid", "notebook", "status", "parameters", "overrides", "seed", "device", "threads", "notebook_sha256",
    "code_sha256", "library_sha256", "git", "versions", "finished", "seconds",
)  # fmt: skip
Entry = Mapping[str, Any]  # of the list: id, manifest (the keys of KEPT), results


def read_kept(grid: Grid) -> dict[str, Entry]:
    """The entries of the grid's list by run id; empty where the grid has no list or it is not written yet.

    Raises GridError where the file is not such a list.
    """
    if grid.kept is None or not grid.kept.exists():
        return {}
    try:
        listed = read_json(grid.kept)
        entries = {entry["id"]: entry for entry in listed["runs"]}
        for entry in entries.values():
            whole = {"parameters", "code_sha256"} <= entry["manifest"].keys() and isinstance(entry["results"], dict)
            if not whole or entry["manifest"]["status"] != "done":
                raise ValueError
        if listed["schema"] != SCHEMA:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise GridError(f"{grid.kept.name}: not a list of kept runs of schema {SCHEMA}") from None
    return entries


def fits(run: Run, entry: Entry | None) -> bool:
    """Whether a kept run is this run: equal parameters, and a notebook of equal code."""
    if entry is None:
        return False
    manifest = entry["manifest"]
    return manifest["parameters"] == run.parameters and manifest["code_sha256"] == run.notebook.code_sha256


def entry_sha256(entry: Entry) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def take(run: Run, entry: Entry, source: str, again: bool = True) -> dict[str, Any]:
    """Fill the run's folder as the list tells it and return the manifest; its notebook holds no outputs.

    Takes the run's lock, as an execution does, and sets aside a run that was executed here. Raises as `run_one` does.
    """
    with run_lock(run, Event()):
        if not again and reason_to_run(run) is None:
            return run.folder.manifest | {"found": True}
        folder = run.folder
        folder.set_aside()
        write_json(folder.results_file, entry["results"])
        folder.notebook_file.write_text(run.notebook.text, encoding="utf-8")
        folder.log_file.write_text(f"taken from {source}, not executed here\n", encoding="utf-8")
        own = {"reason": None, "budget": run.budget, "checkpoints": []}
        return folder.seal(entry["manifest"] | own | {"taken": source, "taken_sha256": entry_sha256(entry)})


@dataclass(frozen=True)
class Kept:
    """What `keep` did: runs that the list holds and that fit the grid, entries that it dropped, files it wrote."""

    runs: int
    dropped: int
    files: list[Path]


def keep(grid: Grid) -> Kept:
    """Write the grid's list, and beside it the tables and headline figures of the runs that come after others.

    An entry stays until the same run, with the code that its notebook has now, is executed to the end here; entries of
    runs that the grid no longer has are dropped. Tables and figures are written of runs that are done and unchanged.
    Raises GridError where the grid names no list, no run is done, or two tables or figures would have one name.
    """
    if grid.kept is None:
        raise GridError(f"grid {grid.name} names no list of kept runs: add a line, kept: ../../reports/NAME/runs.json")
    before = read_kept(grid)
    first = [run for run in grid.runs if not run.after]
    entries = [entry for run in first if (entry := _entry(run) or before.get(run.id))]
    if not entries:
        raise GridError(f"grid {grid.name}: no run is done")
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False, allow_nan=False) for entry in entries)
    contents: dict[str, bytes] = {}
    for run in grid.runs:
        if run.after and reason_to_run(run) is None:
            for name, content in _exhibits(run):
                if name in contents:
                    raise GridError(f"grid {grid.name}: two tables or figures of its later runs are called {name}")
                contents[name] = content
    contents[grid.kept.name] = f'{{"schema": {SCHEMA}, "runs": [\n{lines}\n]}}\n'.encode()
    grid.kept.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as together:  # each takes its place when all are written: the last to come first, the list last
        for name, content in reversed(contents.items()):
            together.enter_context(whole_file(grid.kept.parent / name)).write_bytes(content)
    kept = {entry["id"]: entry for entry in entries}
    fitting = sum(fits(run, kept.get(run.id)) for run in first)
    return Kept(fitting, len(before.keys() - kept.keys()), [grid.kept.parent / name for name in contents])


def _entry(run: Run) -> Entry | None:
    """A run that was executed to the end here, with the code that its notebook has now, as an entry of the list."""
    folder = run.folder
    if not folder.done or folder.taken or "code_sha256" not in folder.manifest:
        return None
    kept = {name: folder.manifest[name] for name in KEPT if name in folder.manifest}
    entry = {"id": run.id, "manifest": kept, "results": folder.results}
    return entry if fits(run, entry) else None


def _exhibits(run: Run) -> list[tuple[str, bytes]]:
    """File names and contents: every recorded table as CSV, numbers to six digits, and the headline figure as PNG."""
    import pandas

    found = []
    for name, value in run.folder.results.items():
        if isinstance(value, dict) and value.get("type") == "table":
            frame = pandas.DataFrame(value["data"], columns=value["columns"])
            found.append((f"{name}.csv", frame.to_csv(index=False, float_format="%.6g").encode()))
    figures = headline_figures(read_json(run.folder.notebook_file))
    return found + [(f"{run.notebook.name}.png", png) for png in figures]


def headline_figures(notebook: Mapping[str, Any]) -> list[bytes]:
    """The figures, as PNG, that a notebook's cells tagged ``headline-figure`` show."""
    cells = [c for c in notebook["cells"] if "headline-figure" in c["metadata"].get("tags", [])]
    data = [out.get("data", {}) for cell in cells for out in cell["outputs"]]
    return [base64.b64decode(shown["image/png"]) for shown in data if "image/png" in shown]
