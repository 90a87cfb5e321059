"""Task vectors: the shared value of this library.

A task vector τ = θ_tuned − θ_base (Ilharco et al. 2023, arXiv 2212.04089, §2) holds one delta per parameter,
either a Tensor or `LowRank(B, A)`, which means the product B A without ever forming it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from importlib import import_module
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from saftnb.delta import Delta, LowRank, dense, finite, is_finite, largest, require_floating, squared_norm, summed
from saftnb.disk import whole_file

KEY, FORMAT = "saftnb", "task vector, version 1"  # one entry: safetensors writes several in a random order
FACTORS = ("::B", "::A")  # the suffixes under which a file holds the two factors of a LowRank
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm


class TaskVector(Mapping[str, Delta]):
    """A mapping from parameter name to delta, with the arithmetic of a vector space.

    The mapping cannot be changed; its tensors are shared with the caller, detached, not copied.
    `+` and `-` need equal names and shapes; `*` and `/` take a finite number. Two task vectors are `==` only if they
    are the same object: compare values with `torch.testing.assert_close(dict(a.dense()), dict(b.dense()))`.
    Raises ValueError on what is no mapping, a name that is no string or a delta that is no floating tensor.
    """

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]  (a Mapping has none)
    __eq__ = object.__eq__
    __array_ufunc__ = None  # so that numpy's scalars leave `*` to us

    def __init__(self, deltas: Mapping[str, Delta]) -> None:
        if not isinstance(deltas, Mapping):
            raise ValueError(
                f"a task vector is made of a mapping from names to deltas, not of a {type(deltas).__name__}"
            )
        self._deltas: dict[str, Delta] = {}
        for name, delta in deltas.items():
            if not isinstance(name, str):
                raise ValueError(f"a task vector's names are strings, got {name!r}")
            if not isinstance(delta, LowRank):
                require_floating(delta, f"the delta of {name!r}")
                delta = delta.detach()
            self._deltas[name] = delta

    @classmethod
    def between(cls, base: Mapping[str, Tensor] | nn.Module, tuned: Mapping[str, Tensor] | nn.Module) -> TaskVector:
        """τ = θ_tuned − θ_base of two state dicts, or of the parameters of two models (Ilharco et al. 2023, §2).

        A weight that a state dict holds under two names (tied) counts once, under the first. Statistics of BatchNorm
        are no weights: they stay the base's, and a warning says so. Entries that are not floating (counters, position
        ids) have no delta: they must be equal, and are left out. Raises ValueError on names or shapes that differ, on
        such an entry that differs, on tied weights that came apart, and on values that are not finite, by name.
        """
        base, tuned = (_parameters(state) if isinstance(state, nn.Module) else state for state in (base, tuned))
        require_same_parameters(base, tuned, "base", "tuned")
        deltas: dict[str, Tensor] = {}
        first: dict[Hashable, str] = {}
        statistics: list[str] = []
        for name in base:
            before, after = base[name], tuned[name]
            if name.rpartition(".")[2] in STATISTICS:
                statistics += [] if torch.equal(before, after) else [name]
            elif before.is_floating_point() and after.is_floating_point():
                for value, where in ((before, "base"), (after, "tuned")):
                    require_floating(value, f"{name!r} of {where}")
                    if not is_finite(value):
                        raise ValueError(f"{name!r} of {where} has NaN or infinite values")
                delta = after.detach() - before.detach()
                twin = first.setdefault(_place(before), name)
                if twin == name:
                    deltas[name] = delta
                elif not torch.equal(deltas[twin], delta):
                    raise ValueError(f"{twin!r} and {name!r} are one weight in base, and differ in tuned")
            elif before.dtype != after.dtype or not torch.equal(before, after):
                raise ValueError(f"{name!r} is not a floating tensor and differs between base and tuned")
        if statistics:
            more = f" and {len(statistics) - 1} more" if statistics[1:] else ""
            warnings.warn(f"statistics are no weights, the base's stay: {statistics[0]!r}{more}", stacklevel=2)
        return cls(deltas)

    def __getitem__(self, name: str) -> Delta:
        return self._deltas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    def __repr__(self) -> str:
        dtypes = ", ".join(sorted({str(d.dtype).removeprefix("torch.") for d in self.values()})) or "empty"
        low = sum(isinstance(d, LowRank) for d in self.values())
        return f"TaskVector({len(self)} parameters, {low} low-rank, {self.numel():,} entries, {dtypes})"

    def _map(self, f: Callable[[Delta], Delta]) -> TaskVector:
        return TaskVector({name: f(delta) for name, delta in self.items()})

    def _zip(self, other: TaskVector, f: Callable[[Delta, Delta], Delta]) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        require_same_parameters(self, other, "the left task vector", "the right one")
        return TaskVector({name: f(delta, other[name]) for name, delta in self.items()})

    def __add__(self, other: TaskVector) -> TaskVector:
        return self._zip(other, lambda mine, theirs: mine + theirs)

    def __radd__(self, other: int) -> TaskVector:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # so that sum(vectors) works

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self._zip(other, lambda mine, theirs: mine - theirs)

    def __neg__(self) -> TaskVector:
        return self._map(lambda delta: -delta)

    def __mul__(self, scalar: float) -> TaskVector:
        return self._map(lambda delta: delta * scalar) if isinstance(finite(scalar), Real) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, scalar: float) -> TaskVector:
        return self * (1 / finite(scalar))

    def numel(self) -> int:
        """The number of entries, low-rank deltas counted as the matrices they stand for."""
        return sum(delta.numel() for delta in self.values())

    def norm(self) -> float:
        """‖τ‖₂ over all entries, in float64; low-rank deltas by ‖B A‖² = ⟨BᵀB, A Aᵀ⟩, never formed."""
        return sum(squared_norm(delta) for delta in self.values()) ** 0.5

    def dense(self) -> TaskVector:
        """The same task vector with every LowRank multiplied out."""
        return self._map(lambda delta: delta.dense() if isinstance(delta, LowRank) else delta)

    def to(self, *args: Any, **kwargs: Any) -> TaskVector:
        """Every tensor through `Tensor.to`: a device, a dtype or both."""
        return self._map(lambda delta: delta.to(*args, **kwargs))

    def apply_to(self, model: nn.Module) -> nn.Module:
        """Adds every delta to the parameter or buffer of its name, IN PLACE, and returns the model.

        A weight that the model holds under two names, or in two parameters of one memory (tied), is changed once.
        Half-precision parameters get the sum formed in float32, rounded once. Raises ValueError, before anything is
        changed, if the model lacks a name, a shape differs, tied names disagree, a delta is not finite, or a sum
        overflows.
        """
        targets = dict(model.named_buffers(remove_duplicate=False))
        targets |= dict(model.named_parameters(remove_duplicate=False))
        first: dict[Hashable, str] = {}
        for name, delta in self.items():
            target = targets.get(name)
            if target is None:
                raise ValueError(f"{type(model).__name__} has no parameter {name!r} to apply a delta to")
            if target.shape != delta.shape or not target.is_floating_point():
                kind = f"{tuple(target.shape)} {target.dtype}"
                raise ValueError(f"{name!r} is {kind} in the model, {tuple(delta.shape)} in the task vector")
            require_floating(target, f"the model's {name!r}")
            if target.is_meta or delta.device.type == "meta":
                raise ValueError(f"{name!r} lies on meta, which has no values: load it on a device")
            twin = first.setdefault(_place(target), name)
            if twin != name and not torch.equal(dense(self[twin]), dense(delta)):
                raise ValueError(f"{twin!r} and {name!r} are one parameter, but their deltas differ")
        with torch.no_grad():
            for name in first.values():
                target = targets[name]
                if not is_finite(self[name]):
                    raise ValueError(f"the delta of {name!r} has NaN or infinite values")
                if 2 * (largest(target) + largest(self[name])) < torch.finfo(target.dtype).max:
                    continue
                if (summed(target, self[name]).isfinite() < target.isfinite()).any():
                    raise ValueError(f"{name!r} plus its delta overflows the model's {target.dtype}")
            for name in first.values():
                targets[name].copy_(summed(targets[name], self[name]))
        return model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, a LowRank as `<name>::B` and `<name>::A`, exactly (dtypes are kept).

        Written beside `path` under a temporary name, synced and renamed: `path` is the old file or the whole
        new one, never a part. A checksum of names and values stands in the file's metadata. Equal task vectors give
        equal bytes. Raises ValueError if a name ends like a factor's, or a delta is not finite.
        """
        path = Path(path)
        for name in self:
            if name.endswith(FACTORS):
                raise ValueError(f"cannot save {name!r}: a name that ends so is a low-rank factor's")
            if name == "__metadata__":
                raise ValueError("cannot save '__metadata__': safetensors files have another use for that name")
        self._require_finite("save")
        tensors = _apart(self.tensors())
        metadata = {KEY: f"{FORMAT}, sha256 {_checksum(tensors)}"}
        with whole_file(path, alone=True) as temporary:
            save_tensors(tensors, temporary, metadata)

    def _require_finite(self, do: str) -> None:
        for name, delta in self.items():
            if not is_finite(delta):
                raise ValueError(f"cannot {do} {name!r}: it has NaN or infinite values")

    def checksum(self) -> str:
        """SHA-256 over names, dtypes, shapes and values, whatever the order of the names and the device."""
        return _checksum(_apart(self.tensors()))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under the name that a file has for it."""
        tensors: dict[str, Tensor] = {}
        for name, delta in self.items():
            parts = {"::B": delta.B, "::A": delta.A} if isinstance(delta, LowRank) else {"": delta}
            tensors |= {name + suffix: part for suffix, part in parts.items()}
        return tensors

    def to_adapter(
        self, folder: str | os.PathLike[str], *, base: str = "", revision: str = "",
        more: Mapping[str, object] | None = None,
    ) -> Path:  # fmt: skip
        """Writes low-rank deltas of weights as one LoRA adapter in PEFT's own format, α = r; returns the folder.

        Layers may differ in rank. Each file is renamed into place when it is whole, the weights first. `base`,
        `revision`: of the base model, for the adapter's config. `more`: other fields of it, such as `task_type`. Raises
        ValueError if a delta is not low-rank, not of a weight, or not finite.
        """
        self._require_finite("write")
        layers: dict[str, LowRank] = {}
        for name, delta in self.items():
            if not isinstance(delta, LowRank) or not name.endswith(".weight"):
                raise ValueError(f"{name!r} is not a low-rank delta of a weight: only those make a LoRA adapter")
            empty = LowRank(delta.B.new_zeros(delta.shape[0], 1), delta.A.new_zeros(1, delta.shape[1]))
            layers[name.removesuffix(".weight")] = delta if delta.B.shape[1] else empty  # PEFT has no rank 0
        ranks = {layer: delta.B.shape[1] for layer, delta in layers.items()}
        most = max(ranks.values(), default=1)
        # PEFT takes the keys for patterns of the ends of names: only whole ones are meant.
        others = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != most}
        config = {
            "peft_type": "LORA", "r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": others,
            "target_modules": sorted(layers), "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
            "base_model_name_or_path": base or None, "revision": revision or None, "task_type": None,
            "use_rslora": False, "use_dora": False, "init_lora_weights": True, "modules_to_save": None,
            **(more or {}),
        }  # fmt: skip
        state: dict[str, Tensor] = {}
        for layer, delta in layers.items():
            state[f"base_model.model.{layer}.lora_B.weight"] = delta.B
            state[f"base_model.model.{layer}.lora_A.weight"] = delta.A
        state = _apart(state)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config, indent=2, sort_keys=True)
        with whole_file(folder / "adapter_model.safetensors", alone=True) as temporary:
            save_tensors(state, temporary, {"format": "pt"})
        with whole_file(folder / "adapter_config.json") as temporary:
            temporary.write_text(text)
        return folder

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TaskVector:
        """Reads what `save` wrote, onto the CPU. Raises ValueError on any other file, and on one whose values do not
        match its checksum (files that were written before there was one are taken as they are)."""
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
                form, _, checksum = found.get(KEY, "").partition(", sha256 ")
                names = file.keys() if form == FORMAT else []
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
        if form != FORMAT:
            raise ValueError(f"{path} is not a {FORMAT}: its metadata is {found or None}")
        if checksum and checksum != _checksum(tensors):
            raise ValueError(f"{path} is damaged: its values do not match the checksum in its metadata")
        deltas: dict[str, Delta] = {}
        for name, tensor in tensors.items():
            stem, mark, factor = name.rpartition("::")
            if mark and factor == "B":
                deltas[stem] = LowRank(tensor, tensors[f"{stem}::A"])
            elif not name.endswith(FACTORS):
                deltas[name] = tensor
        return cls(deltas)


def require_same_parameters(first: Mapping[str, Delta], second: Mapping[str, Delta], one: str, other: str) -> None:
    """Raises ValueError, naming the first difference, unless both have the same names and shapes."""
    for a, b, has, lacks in ((first, second, one, other), (second, first, other, one)):
        extra = [name for name in a if name not in b]
        if extra:
            more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
            raise ValueError(f"{has} has {', '.join(map(repr, extra[:3]))}{more}, {lacks} has not")
    for name in first:
        if first[name].shape != second[name].shape:
            shapes = tuple(first[name].shape), tuple(second[name].shape)
            raise ValueError(f"{name!r} is {shapes[0]} in {one} and {shapes[1]} in {other}")


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def _place(tensor: Tensor) -> Hashable:
    """Where a tensor lies in memory, or something of its own where it lies nowhere."""
    storage = tensor.untyped_storage()
    where = storage.data_ptr() if storage.nbytes() else id(tensor)
    return where, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous on the CPU, none sharing memory with another, as safetensors demands."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        start = tensor.untyped_storage().data_ptr()
        if start in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(start)
        apart[name] = tensor
    return apart


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """`save_file`, which writes a file beside `path` first; but its errors, on a full disk, say, are OSErrors."""
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise OSError(f"cannot write {path.parent}: {error}") from None
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Callable(ModuleType):
    """`sn.task_vector(source, base=…)` is `saftnb.formats.task_vector`, since Python gives the name to this room."""

    def __call__(self, *arguments: object, **options: object) -> TaskVector:
        return import_module("saftnb.formats").task_vector(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
