"""`StoredSplit`: labelled pictures that stay on disk, decoded anew for training and once for evaluation."""

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as pictures

from saftnb.progress import progress_bar
from saftnb.suites.task import Split

BICUBIC = InterpolationMode.BICUBIC
DECODING = 1  # raise it whenever `whole` changes


def whole(picture: Image.Image, size: int) -> Tensor:
    """A picture for evaluation, uint8 (3, size, size): shorter side to `size` (bicubic), centre crop, RGB.

    The same pixels as open_clip's evaluation transform has before it divides by 255.
    """
    resized = pictures.resize(picture, [size], interpolation=BICUBIC)
    return pictures.pil_to_tensor(pictures.center_crop(resized, [size, size]).convert("RGB"))


def cropped(picture: Image.Image, size: int, smallest: float, generator: torch.Generator) -> Tensor:
    """A random part of a picture for training, uint8 (3, size, size), bicubic, as torchvision's
    `RandomResizedCrop(size, scale=(smallest, 1))`: ten tries for a box that fits, else the largest centred one."""
    wide, high = picture.size
    for _ in range(10):
        draws = torch.rand(4, generator=generator).tolist()
        area = wide * high * (smallest + draws[0] * (1 - smallest))
        ratio = math.exp((2 * draws[1] - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= wide and 0 < h <= high:
            top, left = int(draws[2] * (high - h + 1)), int(draws[3] * (wide - w + 1))
            break
    else:
        w, h = min(wide, round(high * 4 / 3)), min(high, round(wide * 4 / 3))
        top, left = (high - h) // 2, (wide - w) // 2
    part = pictures.resized_crop(picture, top, left, h, w, [size, size], interpolation=BICUBIC)
    return pictures.pil_to_tensor(part.convert("RGB"))


class StoredSplit:
    """Some rows of a table with columns `image` and `label`, standing in for a `Split`.

    `labels` is int64 (n,). `images`, uint8 (n, 3, size, size), are the pictures for evaluation: at first use they are
    decoded into a file under `cache`, which is memory-mapped from then on. `drawn` decodes pictures for training.

    Args:
        table: a Hugging Face `Dataset`.
        rows: which of its rows, int64 (n,).
        size: pixels a side.
        identity: says which table this is, by content.
        name: what the file is called and progress shows, such as "cars-test".
    """

    workers = min(
        8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )  # processes that decode training batches ahead

    def __init__(self, table, rows: Tensor, size: int, cache: Path, *, identity: str, name: str):
        self.table, self.rows, self.size, self.cache, self.identity, self.name = (
            table, rows, size, cache, identity, name,
        )  # fmt: skip
        self.labels = torch.tensor(np.asarray(table.data.column("label")), dtype=torch.int64)[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> Split:
        """Some pictures as for evaluation. Those of a split that is not decoded yet are decoded for this once."""
        rows = self.rows[index]
        if len(rows) == len(self) or self._decoded:
            return Split(self.images[index], self.labels[index])
        return Split(torch.stack([torch.from_numpy(picture) for picture in self._whole(rows)]), self.labels[index])

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.identity.encode() + self.rows.numpy().tobytes()).hexdigest()

    def identities(self) -> set[bytes]:
        """What tells the pictures apart: table and row."""
        return {f"{self.identity} {row}".encode() for row in self.rows.tolist()}

    @property
    def bytes(self) -> int:
        """Size of the decoded file."""
        return len(self) * 3 * self.size**2

    @property
    def file(self) -> Path:
        """Where the decoded pictures are, or would be."""
        return self.cache / f"{self.name}-{self.size}px-v{DECODING}-{self.sha256[:12]}.u8"

    @cached_property
    def images(self) -> Tensor:
        if not self._decoded:
            self._decode()
        shape = (len(self), 3, self.size, self.size)
        return torch.from_numpy(np.memmap(self.file, np.uint8, "c", shape=shape))  # "c": writes stay in memory

    @property
    def inputs(self) -> Tensor:
        """What a classifier takes: the pictures for evaluation."""
        return self.images

    def order(self, size: int, generator: torch.Generator) -> Tensor:
        """The order of an epoch's pictures, int64 (n,), of which batches of `size` are taken: a shuffle."""
        return torch.randperm(len(self), generator=generator)

    def drawn(self, index: Tensor, crop: float, generator: torch.Generator) -> Tensor:
        """Training pictures, uint8 (len(index), 3, size, size), each a random crop."""
        chosen = [self.table[row]["image"] for row in self.rows[index].tolist()]
        return torch.stack([cropped(picture, self.size, crop, generator) for picture in chosen])

    @property
    def _decoded(self) -> bool:
        return self.file.is_file() and self.file.stat().st_size == self.bytes

    def _decode(self) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.cache).free
        if free < self.bytes:
            need, have = self.bytes / 2**30, free / 2**30
            raise OSError(f"{self.name}: its decoded pictures take {need:.1f} GiB, and {have:.1f} GiB are free on disk")
        part = self.file.with_suffix(f".{os.getpid()}.part")
        for left in self.cache.glob(f"{self.file.stem}.*.part"):  # of a process that was killed
            if not Path("/proc", left.suffixes[-2][1:]).exists():
                left.unlink(missing_ok=True)
        try:
            with part.open("wb") as out:
                for picture in progress_bar(
                    self._whole(self.rows), total=len(self), desc=f"decode {self.name}", mininterval=1
                ):
                    out.write(picture)
                out.flush()
                os.fsync(out.fileno())
            os.replace(part, self.file)
        finally:
            part.unlink(missing_ok=True)

    def _whole(self, rows: Tensor) -> Iterator[np.ndarray]:
        def one(row: int) -> np.ndarray:
            return whole(self.table[row]["image"], self.size).contiguous().numpy()

        with ThreadPoolExecutor() as pool:
            for start in range(0, len(rows), 256):
                yield from pool.map(one, rows[start : start + 256].tolist())
