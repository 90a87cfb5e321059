"""Files written whole or not at all: a folder that appears at once, a safetensors file tensor by tensor."""

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from saftnb.disk import restore, whole_folder

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@contextmanager
def new_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out`, which becomes `out` when the block ends without an error, and else goes away.

    With `force` an `out` that is there is replaced, in the last moment.

    Raises:
        FileExistsError: `out` is there, and no `force`.
    """
    restore(out)
    if out.exists() and not force:
        raise FileExistsError(f"{out} is there already; --force replaces it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as temporary:
        yield temporary


class TensorFile:
    """A safetensors file that is written one tensor after the other in a `with` block, in the order given at first.

    Args:
        tensors: name -> (dtype, shape), of what is to come.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, torch.Size]]):
        header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, (dtype, shape) in tensors.items():
            end = start + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._due = list(tensors.items())
        self._file = open(path, "wb")  # noqa: SIM115
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, value: Tensor) -> None:
        """The next tensor. Raises ValueError where it is not the one that was announced."""
        due, (dtype, shape) = self._due.pop(0)
        if due != name or value.dtype != dtype or value.shape != shape:
            raise ValueError(
                f"{due!r} is due, {dtype} {tuple(shape)}; got {name!r}, {value.dtype} {tuple(value.shape)}"
            )
        self._file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Raises ValueError where tensors are missing."""
        self._file.close()
        if self._due and kind is None:
            raise ValueError(f"{self._due[0][0]!r} was never written")
