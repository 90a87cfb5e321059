"""`saftnb merge`: adapters or models of others, from files to files, checked before any work.

Adapters are merged as `merge` does, and written as one adapter of the lowest rank that holds the result. Models are
merged tensor by tensor: beside the files, memory holds one tensor of every input at a time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Size, Tensor

import saftnb
from saftnb.delta import Delta, LowRank, is_finite, squared_norm
from saftnb.formats.adapter import (
    CONFIG,
    WEIGHTS,
    Adapter,
    different_bases,
    fill_missing,
    is_adapter,
    read_adapter,
)
from saftnb.formats.checkpoint import Checkpoint, find, open_checkpoint
from saftnb.formats.models import dtype_of, in_names_of, is_task_vector, require_same_activation
from saftnb.formats.writing import new_folder
from saftnb.merging.bases import SAME_IN_EVERY_SPACE
from saftnb.merging.combine import merge
from saftnb.merging.deltas import lowest_rank
from saftnb.merging.registry import methods, spaces
from saftnb.merging.result_folder import HEADING, digests, require_free, write_readme
from saftnb.merging.whole_models import ELEMENTWISE, SPAN, LazyVector, merged_shapes, write_model
from saftnb.progress import progress_bar
from saftnb.task_vector import TaskVector, require_same_parameters


@dataclass(frozen=True, eq=False)
class Plan:
    """A merge of files that was checked, and not begun.

    Attributes:
        kind: "adapters", "models", or "task vectors" (files that `TaskVector.save` wrote).
        out: None for a dry run that was given no place.
        vectors: of adapters and task vectors. tuned, base: of models, by the base's names.
        values: the complete hyperparameters, of method and space. notes: what the user should know, a line each.
    """

    kind: str
    sources: Sequence[Path]
    out: Path | None
    method: str
    space: str
    values: Mapping[str, Any]
    force: bool = False
    rank: int | None = None
    vectors: Mapping[str, TaskVector] = field(default_factory=dict)
    adapters: Sequence[Adapter] = ()
    tuned: Sequence[Mapping[str, Tensor]] = ()
    base: Checkpoint | None = None
    notes: Sequence[str] = ()

    @property
    def shapes(self) -> dict[str, Size]:
        """Of everything that is merged."""
        if self.base is not None:
            return merged_shapes(self.base, self.tuned)
        return {name: delta.shape for name, delta in next(iter(self.vectors.values())).items()}

    def lines(self) -> list[str]:
        """For a dry run: what would be merged, the memory that it takes, and about how long."""
        shapes = self.shapes
        entries = sum(shape.numel() for shape in shapes.values())
        sizes = sorted({tuple(shape) for shape in shapes.values()}, key=lambda shape: -Size(shape).numel())
        shown = ", ".join("×".join(map(str, size)) or "1" for size in sizes[:4]) + (", …" if sizes[4:] else "")
        values = ", ".join(f"{name} {value}" for name, value in self.values.items())
        return [
            f"{len(self.sources)} {self.kind}: {len(shapes)} tensors ({shown}), {entries:,} entries each",
            f"{self.method} in {self.space}" + (f": {values}" if values else ""),
            *self.notes,
            f"memory: about {_size(self._memory(shapes))}; time: about {_trial(self, shapes)}",
            f"would write {self._written(shapes)}" + (f" into {self.out}" if self.out else ""),
        ]

    def _written(self, shapes: Mapping[str, Size]) -> str:
        """What the result would be, and its size at most."""
        if self.base is not None:
            total = sum(self.base.shape(name).numel() * self.base.dtype(name).itemsize for name in self.base)
            return f"a model of {_size(total)}"
        if not self.adapters:
            return f"a task vector of at most {_size(4 * _entries(shapes))}"
        low = self.space != "weights" or self.method in SAME_IN_EVERY_SPACE
        ranks: dict[str, int] = {}
        for name, shape in shapes.items():
            together = sum(_rank(vector[name]) for vector in self.vectors.values()) if low else min(shape)
            ranks[name] = min(together, *shape, *([self.rank] if self.rank else []))
        size = 4 * sum(rank * sum(shapes[name]) for name, rank in ranks.items())
        return f"an adapter of rank {max(ranks.values())} at most, {_size(size)}"

    def _memory(self, shapes: Mapping[str, Size]) -> int:
        largest = max((shape.numel() for shape in shapes.values()), default=0)
        if self.kind == "models" and self.method in ELEMENTWISE:
            return (len(self.tuned) + 2) * largest * 4 + 4 * (2 * len(self.tuned) + 3) * SPAN
        if self.kind == "models":
            return (2 * len(self.tuned) + 6) * largest * 4
        factors = sum(_held(delta) for vector in self.vectors.values() for delta in vector.values())
        dense = self.method not in SAME_IN_EVERY_SPACE and self.space == "weights"
        return 4 * (3 * factors + (len(self.vectors) + 1 if "dare" in self.method else 1) * dense * _entries(shapes))


def plan(
    sources: Sequence[str],
    out: str | Path | None,
    method: str,
    *,
    space: str = "weights",
    values: Mapping[str, object] | None = None,
    base: str | None = None,
    rank: int | None = None,
    any_base: bool = False,
    force: bool = False,
) -> Plan:
    """Read what is to be merged and check that it can be.

    Args:
        sources: PEFT adapters' folders; models' files or folders; files of `TaskVector.save`; ids on the hub of what
            the local cache has; all of one kind. out: a folder that is not there yet; None for a dry run.
        values: hyperparameters of method and space, numbers and booleans as such or as text.
        base: the model that the models were fine-tuned from; of adapters, one whose names and shapes they have to fit.
        rank: of the merged adapter at most; what is lost is told. any_base: also merge adapters whose configs name
            different base models. force: replace `out`, where it is the result of such a merge.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one line on what is wrong.
    """
    paths = [find(source) for source in sources]
    if len(paths) < 2:
        raise ValueError(f"a merge takes two models or more, got {len(paths)}")
    complete = _complete(method, space, values or {})
    if rank is not None and rank < 1:
        raise ValueError(f"--rank is {rank}, not a whole number of at least 1")
    kinds = [_kind(path) for path in paths]
    if len(set(kinds)) > 1:
        other = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
        raise ValueError(f"{paths[0]} is of {kinds[0]}, {paths[other]} of {kinds[other]}: merge one kind at a time")
    if rank is not None and kinds[0] != "adapters":
        raise ValueError(f"--rank is of a merged adapter; {paths[0]} is of {kinds[0]}")
    out = None if out is None else Path(out)
    make = partial(Plan, kinds[0], paths, out=out, method=method, space=space, values=complete, force=force)
    if kinds[0] == "models":
        planned = _plan_models(paths, base, make)
    elif kinds[0] == "adapters":
        planned = _plan_adapters(paths, base, any_base, rank, make)
    elif base is not None:
        raise ValueError(f"--base is of models and adapters; {paths[0]} is a task vector, which has one already")
    else:
        vectors = {name: TaskVector.load(path) for name, path in zip(_names(paths), paths, strict=True)}
        _require_fitting(vectors)
        planned = make(vectors=vectors)
    twice = sorted({str(path) for path in paths if sum(path.samefile(other) for other in paths) > 1})
    if twice:
        planned = replace(planned, notes=[*planned.notes, f"given more than once: {', '.join(twice)}"])
    if out is not None:
        require_free(out, [*paths, *([find(base)] if base else [])], force)
    return planned


def _kind(path: Path) -> str:
    if is_adapter(path):
        return "adapters"
    inside = path if path.is_dir() else path.parent
    if any((inside / name).is_file() for name in WEIGHTS) and (path.is_dir() or path.name in WEIGHTS):
        if path.is_dir():
            raise FileNotFoundError(f"{path}: an adapter's weights without its {CONFIG}")
        raise ValueError(f"{path} is a file of an adapter: name its folder, {path.parent}")
    if is_task_vector(path):
        return "task vectors"
    if path.is_dir():
        open_checkpoint(path)  # the error that names what was looked for
    return "models"


def _plan_adapters(
    paths: Sequence[Path], base: str | None, any_base: bool, rank: int | None, make: Callable[..., Plan]
) -> Plan:
    known = None
    if base is not None:
        found = open_checkpoint(base)
        known = {name: found.shape(name) for name in found}
    adapters = [read_adapter(path, known) for path in paths]
    if (different := different_bases(adapters)) and not any_base:
        raise ValueError(f"{different}; --any-base merges them all the same")
    named = dict(zip(_names(paths), adapters, strict=True))
    if Counter(name for adapter in adapters for name in adapter.vector).most_common(1)[0][1] == 1:
        raise ValueError(f"no two of the adapters adapt the same layer, {paths[0]} and the others: nothing to merge")
    if len({bool(adapter.more.get("fan_in_fan_out")) for adapter in adapters}) > 1:
        raise ValueError("fan_in_fan_out is True in the configs of some adapters alone: they are of different models")
    vectors, lacking = fill_missing({name: adapter.vector for name, adapter in named.items()})
    _require_fitting(vectors)
    heads = [adapter.folder.name for adapter in adapters if adapter.head]
    notes = [line for line in (different, lacking) if line]
    if heads:
        notes.append(f"classification heads stay with their tasks and are not merged: {', '.join(heads)}")
    return make(vectors=vectors, adapters=adapters, notes=notes, rank=rank)


def _plan_models(paths: Sequence[Path], base: str | None, make: Callable[..., Plan]) -> Plan:
    if base is None:
        raise ValueError(f"{paths[0]} is a full model: --base names the model that all were fine-tuned from")
    before, found = open_checkpoint(base), [open_checkpoint(path) for path in paths]
    for one in found:
        require_same_activation(before, one)
    planned = make(tuned=[in_names_of(before, one) for one in found], base=before)
    for one, tuned in zip(found, planned.tuned, strict=True):
        for name in tuned:
            kinds = dtype_of(before, name), dtype_of(tuned, name)
            if kinds[0].is_floating_point != kinds[1].is_floating_point:
                raise ValueError(f"{one.path}: {name!r} is {kinds[1]} there and {kinds[0]} in the base: quantised?")
    if planned.space != "weights" and planned.method not in SAME_IN_EVERY_SPACE:
        raise ValueError(f"full models are merged in the space 'weights', not in {planned.space!r}")
    if planned.method.startswith("dare"):
        raise ValueError(f"{planned.method} draws over whole models at once; use it on adapters or in the library")
    untouched = [name for name in before if name not in planned.shapes]
    notes = [f"stays as in the base: {untouched[0]!r} and {len(untouched) - 1} more"] if untouched else []
    return replace(planned, notes=notes)


def execute(planned: Plan, *, progress: bool = True) -> list[str]:
    """Merge, and write the folder; it appears whole or not at all. Returns lines that say what was written."""
    if planned.out is None:
        raise ValueError("the plan of a dry run has no folder to write: give `plan` one")
    with new_folder(planned.out, force=planned.force) as folder:
        if planned.base is not None:
            said = write_model(planned.base, planned.tuned, planned.method, planned.values, folder, progress)
        else:
            merged = merge(planned.vectors, planned.method, space=planned.space, **planned.values)
            low = bool(planned.adapters) or all(isinstance(delta, LowRank) for delta in merged.values())
            said = _write_adapter(planned, merged, folder, progress) if low else _write_vector(merged, folder)
        write_readme(folder, _readme(planned, said))
        require_free(planned.out, planned.sources, planned.force)  # hours later: someone may have put something there
    return said


def _write_vector(merged: TaskVector, folder: Path) -> list[str]:
    merged.dense().save(folder / "task_vector.safetensors")
    return [f"a task vector of {len(merged)} tensors: TaskVector.load(…), then .apply_to(model)"]


def _write_adapter(planned: Plan, merged: TaskVector, folder: Path, progress: bool) -> list[str]:
    found: dict[str, LowRank] = {}
    worst, lost, total = 0.0, 0.0, 0.0
    bar = progress_bar(merged.items(), total=len(merged), desc="writing", disable=not progress)
    for name, delta in bar:
        found[name] = lowest_rank(delta)
        if planned.rank is not None:
            whole = squared_norm(delta)
            total += whole
            if found[name].B.shape[1] > planned.rank:
                found[name] = lowest_rank(delta, planned.rank)
                gone = max(whole - squared_norm(found[name]), 0.0)  # what is cut is orthogonal to what is kept
                lost, worst = lost + gone, max(worst, (gone / whole) ** 0.5 if whole else 0.0)
    first = planned.adapters[0] if planned.adapters else None
    if first:
        own = _shared(planned.adapters)
        TaskVector(found).to_adapter(folder, base=first.base, revision=first.revision, more=own)
    else:
        TaskVector(found).to_adapter(folder)
    ranks = sorted({delta.B.shape[1] for delta in found.values()})
    said = [f"an adapter of rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[1:] else "") + f", {len(found)} layers"]
    if planned.rank is not None and lost:
        share = (lost / total) ** 0.5 if total else 0.0
        cut = f"{share:.2%} of the update's norm is lost, {worst:.2%} at worst in a layer"
        said.append(f"cut to rank {planned.rank}: {cut}")
    return said


def _shared(adapters: Sequence[Adapter]) -> dict[str, object]:
    """What all adapters' configs say alike of the kind of model that they are of."""
    first = adapters[0].more
    return {key: value for key, value in first.items() if all(one.more.get(key) == value for one in adapters)}


def _complete(method: str, space: str, values: Mapping[str, object]) -> dict[str, Any]:
    """Every hyperparameter of method and space, checked; text becomes what the method's signature asks for."""
    for name, known, kind in ((method, methods(), "method"), (space, spaces(), "space")):
        if name not in known:
            raise ValueError(f"there is no merge {kind} {name!r}; allowed are {', '.join(sorted(known))}")
    if methods()[method].needs_statistics:
        raise ValueError(f"{method} needs statistics of pictures or texts; use it in the library or a notebook")
    own, others = spaces()[space].hyperparameters, methods()[method].hyperparameters
    given: dict[str, object] = {}
    for name, value in values.items():
        elsewhere = [other for other, one in spaces().items() if name in one.hyperparameters and other != space]
        if elsewhere and name not in own and name not in others:
            raise ValueError(f"{name} is of the space {elsewhere[0]!r}: --space {elsewhere[0]} is needed for it")
        schema = own.get(name) or others.get(name)
        given[name] = _read(name, value, schema.type) if schema and isinstance(value, str) else value
    of_space = {name: value for name, value in given.items() if name in own}
    rest = {name: value for name, value in given.items() if name not in own}
    return spaces()[space].check(of_space) | methods()[method].check(rest)


def _read(name: str, text: str, kind: type[Any]) -> object:
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        wanted = {float: "a number", int: "a whole number", bool: "true or false"}[kind]
        raise ValueError(f"--{name.replace('_', '-')} {text}: not {wanted}") from None


def _require_fitting(vectors: Mapping[str, TaskVector]) -> None:
    names = list(vectors)
    for other in names[1:]:
        require_same_parameters(vectors[names[0]], vectors[other], names[0], other)
    for name, vector in vectors.items():
        if bad := [key for key, delta in vector.items() if not is_finite(delta)]:
            raise ValueError(f"{name} has NaN or infinite values in {bad[0]!r}")


def _names(paths: Sequence[Path]) -> list[str]:
    """Every source's own name; its whole path and number where two are called alike."""
    known = [path.name for path in paths]
    return [path.name if known.count(path.name) == 1 else f"{path}#{i}" for i, path in enumerate(paths)]


def _trial(planned: Plan, shapes: Mapping[str, Size]) -> str:
    """How long the merge would take, from one of its largest tensors."""
    if not shapes:
        return "no time"
    name = max(shapes, key=lambda key: shapes[key].numel())
    start = time.monotonic()
    if planned.base is not None:
        alone = [LazyVector(planned.base, tuned, shapes).only(name) for tuned in planned.tuned]
        merge(alone, planned.method, **planned.values)
    else:
        alone = [TaskVector({name: vector[name]}) for vector in planned.vectors.values()]
        merged = merge(alone, planned.method, space=planned.space, **planned.values)
        if planned.adapters:
            lowest_rank(merged[name], planned.rank)
    seconds = (time.monotonic() - start) * _entries(shapes) / shapes[name].numel()
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _readme(planned: Plan, said: Sequence[str]) -> str:
    values = "".join(f", {name} {value}" for name, value in planned.values.items())
    inputs = [f"- `{line}" for path in planned.sources for line in digests(path)]
    if planned.base is not None:
        inputs += [f"- base: `{line}" for line in digests(planned.base.path)]
    elif planned.adapters and planned.adapters[0].base:
        inputs.append(f"- base, by the first adapter's config: `{planned.adapters[0].base}`")
    lines = [
        HEADING, "", f"Merged by saftnb {saftnb.__version__}: {planned.method} in {planned.space}{values}.",
        "", *inputs, "", *(f"{line}." for line in (*said, *planned.notes)),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _entries(shapes: Mapping[str, Size]) -> int:
    return sum(shape.numel() for shape in shapes.values())


def _rank(delta: Delta) -> int:
    return delta.B.shape[1] if isinstance(delta, LowRank) else min(delta.shape)


def _held(delta: Delta) -> int:
    return delta.B.numel() + delta.A.numel() if isinstance(delta, LowRank) else delta.numel()


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def listing() -> list[str]:
    """Methods and spaces with their hyperparameters and ranges, one line each."""
    shown = ["methods:"]
    for name, method in sorted(methods().items()):
        needs = "  (needs statistics: in the library alone)" if method.needs_statistics else ""
        shown.append(f"  {method}{needs}" if method.hyperparameters else f"  {name}(){needs}")
    return [*shown, "spaces:", *(f"  {space}" for _, space in sorted(spaces().items()))]
