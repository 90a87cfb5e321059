"""`StoredSplit`: labelled pictures that stay on disk, decoded once for training and once for evaluation."""

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as pictures

from saftnb import disk
from saftnb.progress import progress_bar
from saftnb.run_folder import run_folder
from saftnb.suites.task import Split

BICUBIC = InterpolationMode.BICUBIC
DECODING = 2  # raise it whenever `whole`, `reduced` or `cropped` change
SHORTER = 288  # pixels of the shorter side of a picture that is kept for training, at most


def of_8_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of 16 bits as one of 8, v / 257 rounded: Pillow itself would cut all above 255 to white. Any other
    picture as it is.

    Raises:
        ValueError: a picture of floating-point numbers, of which nobody says what is white.
    """
    if picture.mode == "F":
        raise ValueError("it holds floating-point numbers; pictures have 8 or 16 bits")
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.float64) / 257
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


# torchvision's functions take pictures of PIL as well as tensors; their types name tensors alone.
def _resized(picture: Image.Image, shorter: int) -> Image.Image:
    return cast(Any, pictures.resize)(picture, [shorter], interpolation=BICUBIC)


def _centre(picture: Image.Image, size: int) -> Image.Image:
    return cast(Any, pictures.center_crop)(picture, [size, size])


def whole(picture: Image.Image, size: int) -> Tensor:
    """A picture for evaluation, uint8 (3, size, size): shorter side to `size` (bicubic), centre crop, RGB.

    The same pixels as open_clip's evaluation transform has before it divides by 255 (of 16 bits: see `of_8_bits`). So
    grey becomes three equal channels, transparency is left out, and CMYK becomes RGB as Pillow has it.
    """
    resized = _resized(of_8_bits(picture), size)
    return pictures.pil_to_tensor(_centre(resized, size).convert("RGB"))


def reduced(picture: Image.Image) -> np.ndarray:
    """A picture for training, uint8 (h, w, 3), RGB: the shorter side at most `SHORTER` (bicubic), the other in
    proportion."""
    picture = of_8_bits(picture).convert("RGB")
    if min(picture.size) > SHORTER:
        picture = _resized(picture, SHORTER)
    return np.array(picture)


def cropped(picture: np.ndarray, size: int, smallest: float, generator: torch.Generator) -> Tensor:
    """A random part of a picture (h, w, 3), uint8 (3, size, size), bicubic with antialiasing, as torchvision's
    `RandomResizedCrop(size, scale=(smallest, 1))`: ten tries for a box that fits, else the largest centred one."""
    high, wide, _ = picture.shape
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
    part = torch.from_numpy(picture[top : top + h, left : left + w]).permute(2, 0, 1)  # colours innermost: faster
    return pictures.resize(part, [size, size], interpolation=BICUBIC, antialias=True)


def processes() -> int:
    """How many may prepare training pictures: a grid's run has the cores that it was given, other processes those of
    the machine; sixteen at most."""
    given = os.environ.get("OMP_NUM_THREADS", "") if run_folder() else ""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, int(given) if given.isdigit() else there)


def read_places(file: Path, count: int) -> np.ndarray | None:
    """Of each of `count` training pictures where its pixels start in the file, height and width, int64 (n, 3); None
    where the file is not there or not whole."""
    start = (file.stat().st_size if file.is_file() else 0) - 24 * count
    if start <= 0:
        return None
    with file.open("rb") as opened:
        opened.seek(start)
        places = np.frombuffer(opened.read(), np.int64).reshape(count, 3)
    first, high, wide = places[-1].tolist()
    return places if first + 3 * high * wide == start else None


class StoredSplit:
    """Some rows of a table with columns `image` and `label`, standing in for a `Split`.

    `labels` is int64 (n,). `images`, uint8 (n, 3, size, size), are the pictures for evaluation: at first use they are
    decoded into a file under `cache`, which is memory-mapped from then on. Those that `drawn` crops for training are
    kept in another such file, see `prepare`, with a shorter side of `SHORTER` pixels at most. So a crop of a large
    picture is cut from a reduced one, unlike in the papers, which decode the original at each step.

    Args:
        table: a Hugging Face `Dataset`.
        rows: which of its rows, int64 (n,).
        size: pixels a side.
        identity: says which table this is, by content.
        name: what the file is called and progress shows, such as "cars-test".
    """

    def __init__(self, table: Any, rows: Tensor, size: int, cache: Path, *, identity: str, name: str):
        self.table, self.rows, self.size, self.cache, self.identity, self.name = (
            table, rows, size, cache, identity, name,
        )  # fmt: skip
        labels = np.asarray(table.data.column("label"))
        if not np.issubdtype(labels.dtype, np.integer):  # of a missing one NumPy makes NaN, and of that torch a number
            raise ValueError(f"vision8: {name}: labels are whole numbers, one a picture, not {labels.dtype}")
        self.labels = torch.tensor(labels, dtype=torch.int64)[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | Tensor) -> Split:
        """Some pictures as for evaluation. Those of a split that is not decoded yet are decoded for this once."""
        rows = self.rows[index]
        if len(rows) == len(self) or self._decoded:
            return Split(self.images[index], self.labels[index])
        found = [torch.from_numpy(picture) for picture in self._made(rows, self._whole)]
        return Split(torch.stack(found), self.labels[index])

    def __getstate__(self) -> dict[str, object]:
        """Files are mapped anew in another process."""
        mapped = ("images", "_places", "_pixels")
        return {name: value for name, value in self.__dict__.items() if name not in mapped}

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
            self._decode(self.file, self._write_whole, self.bytes)
        disk.remove_lock(self.file.with_suffix(".lock"))
        shape = (len(self), 3, self.size, self.size)
        return torch.from_numpy(np.memmap(self.file, np.uint8, "c", shape=shape))  # "c": writes stay in memory

    @property
    def inputs(self) -> Tensor:
        """What a classifier takes: the pictures for evaluation."""
        return self.images

    def order(self, size: int, generator: torch.Generator) -> Tensor:
        """The order of an epoch's pictures, int64 (n,), of which batches of `size` are taken: a shuffle."""
        return torch.randperm(len(self), generator=generator)

    def prepare(self, crop: float, draws: int) -> int:
        """Make ready for a training that draws so many pictures: decode them all, once, where that is less work than
        decoding each as it is drawn. Returns how many processes should draw."""
        if draws > len(self):
            try:
                _ = self._places if crop else self.images
            except OSError as error:  # no room, or a data folder that cannot be written
                print(f"{self.name}: pictures are decoded at each step ({error})", flush=True)
        return processes()

    def drawn(self, index: Tensor, crop: float, generator: torch.Generator) -> Tensor:
        """Training pictures, uint8 (len(index), 3, size, size), each a random crop of so much of its area at least;
        at `crop` 0 as for evaluation. They are the same whether the pictures are decoded already or not."""
        if not crop:
            return self[index].images
        found = self._reduced(index.tolist())
        return torch.stack([cropped(picture, self.size, crop, generator) for picture in found])

    def _reduced(self, numbers: list[int]) -> Iterator[np.ndarray]:
        if "_places" not in self.__dict__ and read_places(self.training_file, len(self)) is None:
            return (self._picture(row, reduced) for row in self.rows[numbers].tolist())
        starts, highs, wides = self._places[numbers].T.tolist()
        return (
            self._pixels[start : start + 3 * h * w].reshape(h, w, 3)
            for start, h, w in zip(starts, highs, wides, strict=True)
        )

    @cached_property
    def _places(self) -> np.ndarray:
        """See `read_places`."""
        found = read_places(self.training_file, len(self))
        if found is None:
            self._decode(self.training_file, self._write_reduced)
            found = read_places(self.training_file, len(self))
            assert found is not None  # it has just been written
        disk.remove_lock(self.training_file.with_suffix(".lock"))
        return found

    @cached_property
    def _pixels(self) -> np.ndarray:
        return np.memmap(self.training_file, np.uint8, "c")  # "c": writes stay in memory

    @property
    def training_file(self) -> Path:
        """Where the pictures for training are, or would be: all pixels one after the other, then their places."""
        return self.cache / f"{self.name}-{SHORTER}short-v{DECODING}-{self.sha256[:12]}.u8"

    def _write_reduced(self, file: Path) -> None:
        places, start = np.empty((len(self), 3), np.int64), 0
        with file.open("wb") as out:
            for number, picture in enumerate(self._each(reduced)):
                out.write(np.ascontiguousarray(picture).data)
                places[number] = start, *picture.shape[:2]
                start += picture.size
            out.write(places.tobytes())

    @property
    def _decoded(self) -> bool:
        return self.file.is_file() and self.file.stat().st_size == self.bytes

    def _write_whole(self, file: Path) -> None:
        with file.open("wb") as out:
            for picture in self._each(self._whole):
                out.write(picture.data)

    def _whole(self, picture: Image.Image) -> np.ndarray:
        return whole(picture, self.size).contiguous().numpy()

    def _decode(self, file: Path, write: Callable[[Path], None], size: int = 0) -> None:
        """Have `write` make a file, of so many bytes where that is known. Of several processes one does, the others
        wait for it; where their file system has no locks each makes its own, and the last one stays."""
        with disk.locked(file.with_suffix(".lock"), f"decodes {self.name}"):
            if self._decoded if file == self.file else read_places(file, len(self)) is not None:
                return  # by the process that was waited for
            disk.sweep(file)
            free = shutil.disk_usage(self.cache).free
            if free < size:
                need, have = size / 2**30, free / 2**30
                raise OSError(f"{self.name}: its decoded pictures take {need:.1f} GiB, and {have:.1f} GiB are free")
            with disk.whole_file(file) as part:
                write(part)

    def _each(self, make: Callable[[Image.Image], np.ndarray]) -> Iterator[np.ndarray]:
        """What `make` makes of each picture, in order, with a progress bar."""
        made = self._made(self.rows, make)
        return iter(progress_bar(made, total=len(self), desc=f"decode {self.name}", mininterval=1))

    def _made(self, rows: Tensor, make: Callable[[Image.Image], np.ndarray]) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(rows), 256):
                yield from pool.map(lambda row: self._picture(row, make), rows[start : start + 256].tolist())

    def _picture(self, row: int, make: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
        """What `make` makes of the picture in a row of the table; ValueError, which names it, where there is none."""
        try:
            picture = self.table[row]["image"]
            if picture is None:
                raise ValueError("there is none")
            return make(picture)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"vision8: {self.name}: row {row} is no picture that can be decoded: {error}") from None
