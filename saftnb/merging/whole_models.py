"""Whole models from files to files: base plus merged, tensor by tensor.

Beside the files, memory holds one tensor of every model at a time, in the file's dtype, and pieces of it in float32.
Methods that work on singular vectors hold that tensor's differences whole.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Size, Tensor

from saftnb.delta import LowRank, is_finite
from saftnb.formats.checkpoint import Checkpoint
from saftnb.formats.writing import TensorFile
from saftnb.merging.combine import merge
from saftnb.merging.spans import Span
from saftnb.merging.ties import hold_election, merge_piece
from saftnb.progress import progress_bar
from saftnb.task_vector import STATISTICS, TaskVector

ELEMENTWISE = frozenset({"average", "task_arithmetic", "ties"})  # of which a part of a tensor can be merged
SPAN = 2**19  # entries that these look at together


def write_model(
    base: Checkpoint, tuned: Sequence[Mapping[str, Tensor]], method: str, values: Mapping[str, Any], folder: Path,
    progress: bool = True,
) -> list[str]:  # fmt: skip
    """Base plus merged, in the base's files, names and dtypes. Returns a line that says what was written.

    Args:
        tuned: the models, by the base's names; what one lacks is as in the base. values: the method's hyperparameters.

    Raises:
        ValueError: values that are not finite, in a model or in the result.
    """
    shapes = merged_shapes(base, tuned)
    shared = _LastRead(base)
    lazy = [LazyVector(shared, one, shapes) for one in tuned]
    piece = _elementwise(method, values, lazy, shapes) if method in ELEMENTWISE else None
    with progress_bar(total=len(base), desc="merging", disable=not progress) as bar:
        for file in base.files:
            held = {name: (base.dtype(name), base.shape(name)) for name in base.shards()[file.name]}
            with TensorFile(folder / _out_name(file), held) as target:
                for name in held:
                    value, twin = shared[name], _twin(base, name)
                    if twin in shapes:
                        value = _moved(value, twin, lazy, piece, method, values)
                    target.write(name, value)
                    bar.update()
    _copy_small_files(base, folder)
    return [f"a model of {len(base)} tensors in {len(base.files)} file(s), {len(shapes)} of them merged"]


def _moved(
    before: Tensor, name: str, lazy: Sequence[LazyVector], piece: Callable[[Span], Tensor] | None, method: str,
    values: Mapping[str, Any],
) -> Tensor:  # fmt: skip
    """One tensor of the base plus its merged delta, in the base's dtype."""
    if piece is None:
        merged = merge([vector.only(name) for vector in lazy], method, **values)[name]
        merged = (merged.dense() if isinstance(merged, LowRank) else merged).reshape(-1)
        found = (before.reshape(-1).float() + merged).to(before.dtype)
    else:
        found, flat = torch.empty(before.numel(), dtype=before.dtype), before.reshape(-1)
        for span in _spans({name: before.shape}):
            part = slice(span.start, span.stop)
            found[part] = (flat[part].float() + piece(span)).to(before.dtype)
    if not is_finite(found):
        raise ValueError(f"{name!r}: the merged model has NaN or infinite values there, in its {before.dtype}")
    return found.view(before.shape)


def _elementwise(
    method: str, values: Mapping[str, Any], lazy: Sequence[LazyVector], shapes: Mapping[str, Size]
) -> Callable[[Span], Tensor]:
    """A function that gives the merged entries of a span."""
    if method == "ties":
        workers = 1  # each would hold tensors of its own
        election = hold_election(lazy, _spans(shapes), keep=values["keep"], workers=workers)
        rest = {name: value for name, value in values.items() if name != "keep"}
        return lambda span: merge_piece(lazy, election, span, **rest)
    scale = 1 / len(lazy) if method == "average" else values["scale"]
    return lambda span: sum((vector.entries(span) for vector in lazy), torch.zeros(())) * scale


class _Difference:
    """tuned − base of one tensor, in float32, computed for the entries that are asked for."""

    device = torch.device("cpu")

    def __init__(self, base: Tensor, tuned: Tensor | None, what: str):
        self._base, self._tuned, self._what = base.reshape(-1), None if tuned is None else tuned.reshape(-1), what

    def view(self, _: int) -> _Difference:
        return self

    def is_contiguous(self) -> bool:
        return True

    def __getitem__(self, part: slice) -> Tensor:
        if self._tuned is None:
            return torch.zeros_like(self._base[part], dtype=torch.float32)
        found = self._tuned[part].float() - self._base[part].float()
        if not is_finite(found):
            raise ValueError(f"{self._what} has NaN or infinite values")
        return found


class _LastRead:
    """A checkpoint's tensors, of which a thread keeps the one that it read last: all models share the base's."""

    def __init__(self, found: Checkpoint):
        self._found, self._kept = found, threading.local()

    def __getitem__(self, name: str) -> Tensor:
        if getattr(self._kept, "name", None) != name:
            self._kept.name, self._kept.value = None, None  # free the old one first
            self._kept.name, self._kept.value = name, self._found[name]
        return self._kept.value


class LazyVector(TaskVector):
    """A model's task vector on the disk: a difference is made when its name is asked for; a thread keeps its last."""

    def __init__(self, base: Checkpoint | _LastRead, tuned: Mapping[str, Tensor], shapes: Mapping[str, Size]):
        self._base, self._tuned, self._shapes, self._kept = base, tuned, shapes, threading.local()

    def __getitem__(self, name: str) -> Tensor:
        return cast(Tensor, self._difference(name))  # all that `saftnb.merging.spans.read` asks of one

    def entries(self, span: Span) -> Tensor:
        """Those of a span, (len(span),)."""
        return self._difference(span.name)[span.start : span.stop]

    def _difference(self, name: str) -> _Difference:
        if getattr(self._kept, "name", None) != name:
            path = getattr(getattr(self._tuned, "found", None), "path", "a model")
            self._kept.name, self._kept.value = None, None  # free the old one first
            value = _Difference(self._base[name], self._tuned.get(name), f"{name!r} of {path}")
            self._kept.name, self._kept.value = name, value
        return self._kept.value

    def only(self, name: str) -> TaskVector:
        """One tensor's difference, in memory."""
        return TaskVector({name: self._difference(name)[:].view(self._shapes[name])})

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def numel(self) -> int:
        return sum(shape.numel() for shape in self._shapes.values())


def _spans(shapes: Mapping[str, Size]) -> list[Span]:
    found: list[Span] = []
    for name, shape in shapes.items():
        found += [Span(name, start, min(start + SPAN, shape.numel())) for start in range(0, shape.numel(), SPAN)]
    return found


def merged_shapes(base: Checkpoint, tuned: Sequence[Mapping[str, Tensor]]) -> dict[str, Size]:
    """What is merged: weights that a model has, tied ones once."""
    return {
        name: base.shape(name)
        for name in base
        if any(name in one for one in tuned)
        and base.dtype(name).is_floating_point
        and name.rpartition(".")[2] not in STATISTICS
        and _twin(base, name) == name
    }


def _twin(base: Checkpoint, name: str) -> str:
    """The first name of the same tensor: a pickled state dict may hold one under two names."""
    return base.twins.get(name, name)


def _out_name(file: Path) -> str:
    return file.name if file.suffix == ".safetensors" else f"{file.stem}.safetensors"


def _copy_small_files(base: Checkpoint, folder: Path) -> None:
    """What transformers and open_clip want beside the weights: configs, tokenizers, an index."""
    beside = base.files[0].parent if base.path.is_dir() else None
    for file in sorted(beside.iterdir()) if beside else ():
        small = file.is_file() and file.stat().st_size < 2**26
        if small and file.suffix in (".json", ".txt", ".model") and not file.name.startswith("adapter"):
            text = file.read_bytes()
            for held in base.files:  # an index names files that may be called otherwise now
                text = text.replace(held.name.encode(), _out_name(held).encode())
            name = file.name.replace("pytorch_model.bin.index", "model.safetensors.index")
            (folder / name).write_bytes(text)
    if any(held.name == "pytorch_model.bin" for held in base.files):
        shutil.move(folder / "pytorch_model.safetensors", folder / "model.safetensors")
