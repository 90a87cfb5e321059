"""State dicts of others, read tensor by tensor, without running their code.

A checkpoint is a safetensors file, a `.pt`, `.pth`, `.bin` or `.ckpt` file of tensors, or a folder that holds one, in
one piece or in shards with an index, as transformers and open_clip write them.
"""

import hashlib
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

# What a folder may hold, the first that is there is read
FILES = (
    "model.safetensors.index.json", "model.safetensors", "open_clip_model.safetensors",
    "pytorch_model.bin.index.json", "pytorch_model.bin", "open_clip_pytorch_model.bin",
)  # fmt: skip
_INSIDE = ("state_dict", "model_state_dict", "model", "module")  # keys under which training scripts keep it
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_LFS = b"version https://git-lfs"


class Checkpoint(Mapping[str, Tensor]):
    """A state dict on the disk: a mapping from name to tensor that reads a tensor when it is asked for.

    Names lose what torch.compile (`_orig_mod.`) and DataParallel (`module.`) put before them.

    Attributes:
        path: the file or folder. files: the files that hold the tensors. config: the `config.json` beside them, or {}.
    """

    def __init__(self, path: Path, files: list[Path], readers: Sequence["_Safetensors | _Pickled"]):
        self.path, self.files, self._readers = path, files, readers
        self._where: dict[str, tuple[int, str]] = {}
        for number, reader in enumerate(readers):
            for stored in reader.names:
                name = _bare(stored)
                if name in self._where:
                    raise ValueError(f"{path}: {name!r} stands in it twice")
                self._where[name] = number, stored

    def __getitem__(self, name: str) -> Tensor:
        number, stored = self._where[name]
        return self._readers[number].tensor(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, name: str) -> torch.Size:
        """Without reading the tensor."""
        number, stored = self._where[name]
        return self._readers[number].shape(stored)

    def dtype(self, name: str) -> torch.dtype:
        """Without reading the tensor."""
        number, stored = self._where[name]
        return self._readers[number].dtype(stored)

    def shards(self) -> dict[str, list[str]]:
        """File name -> the names that it holds."""
        held: dict[str, list[str]] = {file.name: [] for file in self.files}
        for name, (number, _) in self._where.items():
            held[self.files[number].name].append(name)
        return held

    @cached_property
    def twins(self) -> dict[str, str]:
        """Name -> the first name of the same tensor, for what a pickled state dict holds under two names (tied)."""
        first: dict[Hashable, str] = {}
        found = {}
        for name, (number, stored) in self._where.items():
            if (place := self._readers[number].place(stored)) is not None and first.setdefault(place, name) != name:
                found[name] = first[place]
        return found

    @cached_property
    def config(self) -> dict[str, Any]:
        """The `config.json` or `open_clip_config.json` beside the weights; {} where there is none."""
        folder = self.files[0].parent
        for name in ("config.json", "open_clip_config.json"):
            if (folder / name).is_file():
                return read_json(folder / name)
        return {}

    @cached_property
    def sha256(self) -> str:
        """Of the file; of several, over their own in their order."""
        digests = []
        for file in self.files:
            with open(file, "rb") as opened:
                digests.append(hashlib.file_digest(opened, "sha256"))
        together = hashlib.sha256(b"".join(one.digest() for one in digests))
        return (together if digests[1:] else digests[0]).hexdigest()


def open_checkpoint(path: str | os.PathLike[str], *, trust_pickle: bool = False) -> Checkpoint:
    """A checkpoint by its file, its folder, or the id under which the Hugging Face cache has it.

    Args:
        trust_pickle: also read a pickled module, which can run any code.

    Raises:
        FileNotFoundError: nothing there. ValueError: a file that is empty, cut off, or no checkpoint; a pickled object
            that is not trusted. One line each, which names the file.
    """
    path = find(path)
    if path.is_file():
        files = [path]
    else:
        found = next((path / name for name in FILES if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path}: no weights in this folder; looked for {', '.join(FILES)}")
        files = _shards(found) if found.suffix == ".json" else [found]
    return Checkpoint(path, files, [_reader(file, trust_pickle) for file in files])


def find(source: str | os.PathLike[str]) -> Path:
    """A file or folder, or what the Hugging Face cache has of a model's id ("owner/name"). Nothing is downloaded.

    Raises:
        FileNotFoundError: neither.
    """
    try:
        path = Path(source).expanduser()
    except RuntimeError:  # no home of such a user
        path = Path(source)
    if path.exists():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not Path(str(source).split("/")[0]).is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(str(source), local_files_only=True))
        except LocalEntryNotFoundError:
            raise FileNotFoundError(
                f"{source}: no such file or folder, and the hub's local cache has no such model; "
                f"`hf download {source}` brings it"
            ) from None
    raise FileNotFoundError(f"{source}: no such file or folder")


def _bare(name: str) -> str:
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _shards(index: Path) -> list[Path]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{index}: no weight_map in it; a sharded checkpoint's index maps names to files")
    files = [index.parent / name for name in sorted(set(listed.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{index}: it names {file.name}, which is not there")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError, in one line, where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def _reader(file: Path, trust_pickle: bool) -> "_Safetensors | _Pickled":
    with open(file, "rb") as opened:
        head = opened.read(64)
    if not head:
        raise ValueError(f"{file} is empty")
    if head.startswith(_LFS):
        raise ValueError(f"{file} is a pointer of Git LFS, not the weights: `git lfs pull` brings them")
    if file.suffix == ".safetensors":
        return _Safetensors(file)
    return _Pickled(_unpickled(file, trust_pickle), file)


class _Reader:
    names: list[str]

    def place(self, name: str) -> Hashable | None:
        """What two names of one tensor have in common; None where each has its own."""
        return None


class _Safetensors(_Reader):
    """Opened anew for each tensor: what was read is mapped memory, which counts as this process's while it is open."""

    def __init__(self, file: Path):
        self._path = file
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                self._shapes = {name: torch.Size(part.get_shape()) for name, part in slices.items()}
                self._dtypes = {name: part.get_dtype() for name, part in slices.items()}
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file: {error}") from None
        self.names = list(self._shapes)

    def tensor(self, name: str) -> Tensor:
        with safe_open(self._path, framework="pt") as opened:
            return opened.get_tensor(name)

    def shape(self, name: str) -> torch.Size:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        written = self._dtypes[name]
        return _DTYPES[written] if written in _DTYPES else self.tensor(name).dtype


class _Pickled(_Reader):
    def __init__(self, state: Mapping[str, Tensor], file: Path):
        self._state, self.names = state, list(state)

    def tensor(self, name: str) -> Tensor:
        return self._state[name].detach()

    def place(self, name: str) -> Hashable | None:
        value = self._state[name]
        return (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape) if value.numel() else None

    def shape(self, name: str) -> torch.Size:
        return self._state[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype


def _unpickled(file: Path, trust: bool) -> Mapping[str, Tensor]:
    """The state dict in a file that `torch.save` wrote, mapped into memory where its format allows."""
    mapped = zipfile.is_zipfile(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's protocol: what cannot be read is refused below
            found = torch.load(file, "cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error).upper():
            raise ValueError(f"{file} is no file that torch.save wrote") from None
        if not trust:
            raise ValueError(
                f"{file} is a pickled object, which can run code when it is read: write its state_dict() as "
                "safetensors with safetensors.torch.save_file, or pass trust_pickle=True"
            ) from None
        found = torch.load(file, "cpu", weights_only=False)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # whatever the unpickler makes of bytes that no pickler wrote
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file} is not a whole file that torch.save wrote: {why}") from None
    if isinstance(found, nn.Module):
        found = found.state_dict()
    for key in _INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping | nn.Module):
            found = found[key] if isinstance(found[key], Mapping) else found[key].state_dict()
            break
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{file} holds no state dict")
    for name, value in found.items():
        if not isinstance(name, str) or value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise ValueError(f"{file}: {name!r} is no plain tensor of its own name: sparse, quantised or on meta")
    return found
