"""A grid file becomes a validated list of runs.

    name: pocket                                  # of its folder of runs, its own; default: the file's stem
    defaults: {suite: pocket}                     # for the notebooks that declare these parameters
    engine: local                                 # or ray, see `saftnb.batch.cluster`
    jobs: 2                                       # runs at a time; default: as many as there are GPUs, else 1
    resources: {cpus: 1}                          # for each run; default: its share of the cores, one GPU if any
    kept: ../../reports/pocket/runs.json          # finished runs to take over, see `saftnb.batch.kept`
    runs:
      - notebook: 01_sharpness_aware_finetuning   # a name in notebooks/, or a path
        parameters: {seed: 0}
        sweep: {task: [mnist, digits]}            # every combination
        zip: {rho: [0.05, 0.5], steps: [50, 60]}  # side by side
      - notebook: 02_merging_comparison
        after: [01_sharpness_aware_finetuning]    # waits for all runs of that notebook
        budget: 120                               # seconds it should take, kept in the manifest
        resources: {gpus: 1, cpus: 8, memory: 64, time_limit: 7200}  # memory in GiB and time in seconds: limits
        gradients: 8000                           # training work, in gradients of a full batch, for the dry run
        merges: 200                               # and how often all tasks' models are merged, on the CPU

Everything is checked before anything starts; an error is one line with the file and the line in it.
"""

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from saftnb.batch.notebooks import Notebook, NotebookError, find_notebook
from saftnb.batch.parameters import coerce
from saftnb.batch.source import GridError, GridFile, Place
from saftnb.run_folder import CURRENT, OWNER, RunFolder, read_json, write_json

__all__ = ["Grid", "GridError", "Run", "load_grid"]

ENGINES = ("local", "ray")
GRID_KEYS = ("name", "engine", "defaults", "jobs", "resources", "kept", "runs")
ENTRY_KEYS = ("notebook", "parameters", "sweep", "zip", "after", "budget", "resources", "gradients", "merges")
RESOURCE_KEYS = ("cpus", "gpus", "memory", "time_limit")
_UNITS = {"memory": "GiB", "time_limit": "seconds", "budget": "seconds", "gradients": "gradients", "merges": "merges"}
_COUNT = (lambda n: type(n) is int and n >= 1, "a whole number of at least 1")
_SHARE = (lambda n: 0 <= n < 1 or (1 <= n < math.inf and n % 1 == 0), "a whole number or a share below 1")
# what is accepted where a number is wanted, and that in words
NUMBERS = {
    **{key: (lambda n: 0 < n < math.inf, f"a number of {unit}") for key, unit in _UNITS.items()},
    **{"jobs": _COUNT, "cpus": _COUNT, "gpus": _SHARE},
}


@dataclass(frozen=True)
class Resources:
    """What a run asks for; None where it does not say.

    ``cpus``: cores, to which its numerical libraries are limited. ``gpus``: whole ones, or a share of one below 1.
    ``memory``: GiB of its processes' resident memory together. ``time_limit``: seconds. A run that takes more
    memory or time is killed.
    """

    cpus: int | None = None
    gpus: float | None = None
    memory: float | None = None
    time_limit: float | None = None


@dataclass(frozen=True)
class Run:
    """One execution of one notebook. ``parameters`` are all of them, ``overrides`` those that were given."""

    grid: str
    notebook: Notebook
    parameters: dict[str, Any]
    overrides: dict[str, Any]
    root: Path = field(default=Path("runs"), repr=False)
    after: tuple[str, ...] = ()
    budget: float | None = None
    gradients: float | None = None
    merges: float | None = None
    resources: Resources = field(default_factory=Resources)
    place: str = field(default="", compare=False)  # the grid file's name and line, for errors

    @property
    def id(self) -> str:
        """``<notebook>-<hash>``; the hash covers the notebook's name and the effective parameters."""
        text = json.dumps([self.notebook.name, self.parameters], sort_keys=True, allow_nan=False)
        return f"{self.notebook.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    @property
    def label(self) -> str:
        """The id, and what was given."""
        given = ", ".join(f"{name}={value}" for name, value in self.overrides.items())
        return f"{self.id} ({given})" if given else self.id

    @property
    def folder(self) -> RunFolder:
        """Where the run's files are, ``<root>/<grid>/<id>``; each time as they are then."""
        return RunFolder(self.root / self.grid / self.id)


@dataclass(frozen=True)
class Grid:
    """A named list of runs, in the order of the file."""

    name: str
    runs: tuple[Run, ...]
    file: Path
    jobs: int | None = None
    engine: str = "local"
    kept: Path | None = None

    @property
    def folder(self) -> Path:
        """Where the folders of its runs are."""
        return self.runs[0].folder.path.parent

    def claim(self) -> None:
        """Note in the folder whose it is, and the ids of the runs that the grid file names now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / OWNER, os.path.relpath(self.file, self.folder))
        write_json(self.folder / CURRENT, [run.id for run in self.runs])

    def check_owner(self) -> None:
        """GridError where another grid file, which is still there, has its runs in the folder: one's runs would take
        the places of the other's."""
        try:
            said = read_json(self.folder / OWNER)
        except ValueError:
            said = None
        owner = Path(os.path.normpath(self.folder / said)) if isinstance(said, str) else self.file
        if owner.is_file() and not owner.samefile(self.file):
            raise GridError(f"{self.folder} has the runs of {owner}; give this grid another name, or another --runs")


def load_grid(file: Path | str, runs: Path | str = "runs") -> Grid:
    """Read and validate a grid file; run folders will be under ``runs``. Raises GridError."""
    source = GridFile(Path(file))
    data = source.keys((), source.data, GRID_KEYS, "the grid")
    name = data.get("name", source.path.stem)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == "store":
        source.fail(("name",), f"the name {name!r} is not made of letters, digits, - _ . (or is 'store')")
    engine = data.get("engine", "local")
    if engine not in ENGINES:
        source.fail(("engine",), f"unknown engine {engine!r}; there are: {', '.join(ENGINES)}")
    jobs = _numbers(source, (), data, ("jobs",)).get("jobs")
    usual = _resources(source, ("resources",), data.get("resources"))
    kept = data.get("kept")
    if kept is not None and not (isinstance(kept, str) and kept.endswith(".json")):
        source.fail(("kept",), f"kept is {kept!r}, not the path of a .json file")
    entries = data.get("runs")
    if not isinstance(entries, list) or not entries:
        source.fail(("runs",), "the grid has no list of runs")
    notebooks = [_notebook(source, ("runs", i), entry) for i, entry in enumerate(entries)]
    defaults = _defaults(source, data.get("defaults"), notebooks)
    made = [
        [
            Run(
                name,
                notebook,
                {p.name: p.default for p in notebook.parameters.values()} | given,
                given,
                Path(runs).absolute(),
                **_numbers(source, ("runs", i), entry, ("budget", "gradients", "merges")),
                resources=Resources(**usual | _resources(source, ("runs", i, "resources"), entry.get("resources"))),
                place=f"{source.path.name}:{source.line(('runs', i))}",
            )
            for given in _points(source, ("runs", i), entry, notebook, defaults)
        ]
        for i, (entry, notebook) in enumerate(zip(entries, notebooks, strict=True))
    ]
    _check_distinct(source, made)
    list_of_kept = (source.path.parent / kept).resolve() if kept else None
    return Grid(name, tuple(_ordered(source, entries, made)), source.path.absolute(), jobs, engine, list_of_kept)


def _numbers(source: GridFile, place: Place, given: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Those of ``keys`` that are given, checked."""
    found = {key: given[key] for key in keys if key in given}
    for key, value in found.items():
        fits, words = NUMBERS[key]
        if value is not None and not (type(value) in (int, float) and fits(value)):
            source.fail((*place, key), f"{key} is {value!r}, not {words}")
    return found


def _resources(source: GridFile, place: Place, value: Any) -> dict[str, Any]:
    given = source.keys(place, {} if value is None else value, RESOURCE_KEYS, "resources")
    return _numbers(source, place, given, RESOURCE_KEYS)


def _notebook(source: GridFile, place: Place, entry: Any) -> Notebook:
    source.keys(place, entry, ENTRY_KEYS, "a run")
    wanted = entry.get("notebook")
    if not isinstance(wanted, str) or not wanted:
        source.fail((*place, "notebook"), "the run names no notebook")
    try:
        notebook = find_notebook(wanted, source.path)
    except NotebookError as error:
        source.fail((*place, "notebook"), str(error))
    if "merges" in entry and "gradients" not in entry:
        source.fail((*place, "merges"), f"{notebook.name}: merges stand beside gradients")
    if "gradients" in entry and not {"suite", "backbone"} <= notebook.parameters.keys():
        source.fail((*place, "gradients"), f"{notebook.name}: gradients are of a notebook with a suite and a backbone")
    return notebook


def _defaults(source: GridFile, values: Any, notebooks: list[Notebook]) -> dict[str, Any]:
    values = _mapping(source, ("defaults",), values)
    for name in values:
        if not any(name in notebook.parameters for notebook in notebooks):
            source.fail(("defaults", name), f"no notebook of this grid declares the default '{name}'")
    return values


def _mapping(source: GridFile, place: Place, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        source.fail(place, f"{place[-1]} is not a mapping from parameter to value")
    return value or {}


def _points(
    source: GridFile, place: Place, entry: Mapping[str, Any], notebook: Notebook, defaults: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The parameters that one entry gives, coerced: fixed ones x zipped ones x every swept combination."""
    typed: dict[str, Any] = {}
    for name, value in defaults.items():
        if name in notebook.parameters:
            typed[name] = _coerced(source, ("defaults", name), notebook, name, value)
    seen: set[str] = set()
    for name, value in _mapping(source, (*place, "parameters"), entry.get("parameters")).items():
        seen.add(name)
        typed[name] = _coerced(source, (*place, "parameters", name), notebook, name, value)
    axes: dict[str, dict[str, list[Any]]] = {"zip": {}, "sweep": {}}
    for key, lists in axes.items():
        for name, values in _mapping(source, (*place, key), entry.get(key)).items():
            at = (*place, key, name)
            if name in seen:
                source.fail(at, f"{notebook.name}: the parameter '{name}' is given twice")
            if not isinstance(values, list) or not values:
                source.fail(at, f"{notebook.name}: the {key} over '{name}' is empty or no list")
            seen.add(name)
            lists[name] = [_coerced(source, (*at, i), notebook, name, v) for i, v in enumerate(values)]
    if len({len(values) for values in axes["zip"].values()}) > 1:
        source.fail((*place, "zip"), f"{notebook.name}: the lists in zip differ in length")
    rows = list(zip(*axes["zip"].values(), strict=True)) or [()]
    for row, *swept in itertools.product(rows, *axes["sweep"].values()):
        yield typed | dict(zip(axes["zip"], row, strict=False)) | dict(zip(axes["sweep"], swept, strict=True))


def _coerced(source: GridFile, place: Place, notebook: Notebook, name: str, value: Any) -> Any:
    if name not in notebook.parameters:
        declared = ", ".join(notebook.parameters) or "none"
        source.fail(place, f"{notebook.name}: unknown parameter '{name}'; it declares: {declared}")
    try:
        return coerce(value, notebook.parameters[name].kind)
    except ValueError as error:
        source.fail(place, f"{notebook.name}: parameter '{name}': {error}")


def _check_distinct(source: GridFile, made: list[list[Run]]) -> None:
    first: dict[str, int] = {}
    paths: dict[str, Path] = {}
    for i, runs in enumerate(made):
        for run in runs:
            if paths.setdefault(run.notebook.name, run.notebook.path) != run.notebook.path:
                source.fail(("runs", i), f"two different notebooks are called {run.notebook.name}")
            if run.id in first:
                line = source.line(("runs", first[run.id]))
                source.fail(
                    ("runs", i),
                    f"duplicate run of {run.notebook.name}: the entry at line {line} "
                    f"already has the parameters {run.overrides}",
                )
            first[run.id] = i


def _ordered(source: GridFile, entries: list[Any], made: list[list[Run]]) -> Iterator[Run]:
    """The runs with `after` as run ids; unknown names and cycles are errors."""
    ids: dict[str, list[str]] = {}
    for runs in made:
        ids.setdefault(runs[0].notebook.name, []).extend(run.id for run in runs)
    graph: dict[str, set[str]] = {name: set() for name in ids}
    for i, (entry, runs) in enumerate(zip(entries, made, strict=True)):
        after = entry.get("after") or []
        after = [after] if isinstance(after, str) else after
        place = ("runs", i, "after")
        if not isinstance(after, list) or not all(isinstance(name, str) for name in after):
            source.fail(place, "after is not a list of notebooks")
        names = [name.rsplit("/", 1)[-1].removesuffix(".ipynb") for name in after]
        for name in names:
            if name not in ids:
                source.fail(place, f"after names '{name}', not in this grid; it has: {', '.join(ids)}")
        graph[runs[0].notebook.name].update(names)
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            source.fail(place, f"after goes round in a circle: {' <- '.join(error.args[1])}")
        waits = tuple(dict.fromkeys(run_id for name in names for run_id in ids[name]))
        yield from (replace(run, after=waits) for run in runs)
