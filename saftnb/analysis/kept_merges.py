"""Merges that were searched and tested, kept in the checkpoint store: a comparison that broke off goes on from there.

An entry is found by everything that decides it: the experts' fingerprints, the method, its grid, the space, how it was
chosen and tested, and the code of the library's rooms that took part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from safetensors.torch import load_file
from torch import Tensor

import saftnb
from saftnb.finetune import store
from saftnb.merging.grid_search import Search
from saftnb.task_vector import save_tensors

Hits = dict[str, Tensor]  # by task: for every picture or pair, whether it was a hit, bool (n,)
ROOMS = ("backbones", "suites", "merging", "delta.py", "task_vector.py", "evaluate.py", "analysis/comparison.py")


@dataclass(frozen=True, eq=False)
class Merged:
    """What is kept of a merge: the search without its vector (None for what is no merge), and the hits on test, of the
    shared coefficients and of those chosen for each task alone ({} where these were not asked for)."""

    search: Search | None
    tested: dict[str, Hits]
    targeted: Hits


def kept(inputs: store.Inputs | None, make: Callable[[], Merged]) -> Merged:
    """The entry of these inputs, made where there is none; with None for inputs nothing is kept."""
    if inputs is None:
        return make()
    inputs = inputs | {"code": CODE}
    found = store.read(inputs, _take, ("hits.safetensors", "found.json"))
    if found is not None:
        return found
    with store.locked(inputs):
        found = store.read(inputs, _take, ("hits.safetensors", "found.json"))
        if found is None:
            found = make()
            store.write(inputs, lambda folder: _fill(folder, found))
    return found


def _fill(folder: Path, found: Merged) -> None:
    hits = {f"targeted {task}": one for task, one in found.targeted.items()}
    hits |= {f"{model} {task}": one for model, by_task in found.tested.items() for task, one in by_task.items()}
    save_tensors({name: one.contiguous() for name, one in hits.items()}, folder / "hits.safetensors")
    about: dict[str, object] = {"models": {model: list(by_task) for model, by_task in found.tested.items()}}
    about["targeted"] = list(found.targeted)
    if found.search is not None:
        about |= {"best": found.search.best, "at_edge": found.search.at_edge}
        about["curve"] = found.search.curve.to_dict("split")
    (folder / "found.json").write_text(json.dumps(about) + "\n")


def _take(folder: Path, _: store.Manifest) -> Merged:
    about, hits = json.loads((folder / "found.json").read_text()), load_file(folder / "hits.safetensors")
    tested = {model: {task: hits[f"{model} {task}"] for task in tasks} for model, tasks in about["models"].items()}
    targeted = {task: hits[f"targeted {task}"] for task in about["targeted"]}
    if "curve" not in about:
        return Merged(None, tested, targeted)
    curve = pd.DataFrame(about["curve"]["data"], about["curve"]["index"], about["curve"]["columns"])
    search = Search(None, about["best"], curve, about["at_edge"])  # pyright: ignore[reportArgumentType]  (see `Merged`)
    return Merged(search, tested, targeted)


def code_sha256() -> str:
    """Of the rooms that take part in a merge and its evaluation, as their files are now."""
    digest, root = hashlib.sha256(), Path(saftnb.__file__).parent
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")) if (root / room).is_dir() else [root / room]:
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


CODE = code_sha256()  # of what is loaded: the files may change while this process runs
