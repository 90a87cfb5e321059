"""`Task` and `Split`: what a suite is made of."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from saftnb.suites.stored import StoredSplit

Pictures = Union["Split", "StoredSplit"]  # of one split, in memory or on disk


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled pictures in memory: `images` uint8 (n, 3, h, w) and `labels` int64 (n,)."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = (_kind(value) for value in (self.images, self.labels))
        whole = isinstance(self.images, Tensor) and self.images.ndim == 4 and self.images.shape[1] == 3
        if not whole or self.images.dtype != torch.uint8 or not all(self.images.shape[2:]):
            raise ValueError(f"a split holds uint8 images (n, 3, h, w), not {images}")
        if not isinstance(self.labels, Tensor) or self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise ValueError(f"a split of pictures holds int64 labels (n,), not {labels}")
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> "Split":
        return Split(self.images[index], self.labels[index])

    def identities(self) -> set[bytes]:
        """What tells the pictures apart: their pixels."""
        return {image.tobytes() for image in self.images.numpy()}

    @property
    def inputs(self) -> Tensor:
        """What a classifier takes: the pictures."""
        return self.images

    def order(self, size: int, generator: torch.Generator) -> Tensor:
        """The order of an epoch's pictures, int64 (n,), of which batches of `size` are taken: a shuffle."""
        return torch.randperm(len(self), generator=generator)

    def prepare(self, crop: float, draws: int) -> int:
        """How many processes should draw training pictures ahead: none, they are in memory."""
        return 0

    def drawn(self, index: Tensor, crop: float, generator: torch.Generator) -> Tensor:
        """Training pictures in [0, 1], float (len(index), 3, h, w), each a random crop, see `random_resized_crop`; at
        `crop` 0 the pictures themselves, uint8."""
        if not crop:
            return self.images[index]
        return random_resized_crop(self.images[index], crop, generator)

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Task:
    """One classification task: its pictures, its class names, and the prompt templates that name a class.

    `origin` is "real" (photographs, scans, drawings made by others) or "rendered" (our own seeded renderer).
    Every template holds one `{}` for the class name. The three splits share no picture.

    Raises:
        ValueError: fewer than two classes (one alone is always right: its accuracy says nothing), a class name that is
            empty, no text, or there twice; no template, or one without `{}`; an empty split, pictures of two sizes,
            labels out of range, or a picture that stands in two splits.
    """

    name: str
    origin: str
    class_names: tuple[str, ...]
    prompts: tuple[str, ...]
    train: Pictures
    validation: Pictures
    test: Pictures

    def __post_init__(self) -> None:
        require_task_name(self.name)
        _require_class_names(self.name, self.class_names)
        if isinstance(self.prompts, str) or not self.prompts or not all(map(_is_template, self.prompts)):
            raise ValueError(f"{self.name}: needs prompt templates with one {{}} each, got {self.prompts!r}")
        sizes = {tuple(split.images.shape[2:]) for split in self.splits.values() if isinstance(split, Split)}
        if len(sizes) > 1:
            raise ValueError(f"{self.name}: the splits' pictures are of different sizes, {sorted(sizes)}")
        seen: set[bytes] = set()
        for kind, split in self.splits.items():
            require_examples(self.name, kind, len(split), "pictures")
            outside = (split.labels < 0) | (split.labels >= len(self.class_names))
            if outside.any():
                row = int(outside.nonzero()[0])
                raise ValueError(
                    f"{self.name}: the {kind} labels do not lie in 0 to {len(self.class_names) - 1}: "
                    f"picture {row} has {int(split.labels[row])}"
                )
            pictures = split.identities()
            if seen & pictures:
                raise ValueError(f"{self.name}: {len(seen & pictures)} pictures of {kind} stand in another split too")
            seen |= pictures

    @property
    def splits(self) -> dict[str, Pictures]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @cached_property
    def sha256(self) -> str:
        parts = [split.sha256 for split in self.splits.values()] + list(self.class_names) + list(self.prompts)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def require_task_name(name: object) -> None:
    """Raises ValueError unless a task's name can be part of a folder's."""
    if not isinstance(name, str) or not name or "/" in name or "\0" in name:
        raise ValueError(f"a task's name is text without '/', not {name!r}")


def require_examples(task: str, kind: str, count: int, what: str) -> None:
    """Raises ValueError for a split without any."""
    if not count:
        raise ValueError(f"{task}: the {kind} split is empty; each split needs {what}")


def _require_class_names(task: str, names: Sequence[str]) -> None:
    if isinstance(names, str) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"{task}: class names are a tuple of texts that are not empty, got {names!r}")
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise ValueError(f"{task}: two classes are called {twice[0]!r}: their zero-shot heads would be the same")
    if len(names) < 2:
        only = f"{names[0]!r} alone" if names else "no class"
        raise ValueError(f"{task}: {only}; a task tells two classes or more apart")


def _is_template(prompt: object) -> bool:
    try:
        return isinstance(prompt, str) and prompt.count("{}") == 1 and bool(prompt.format("x"))
    except (ValueError, LookupError):  # other braces
        return False


def _kind(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def random_resized_crop(images: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """Crop a random part of each picture and enlarge it bilinearly to the full size.

    uint8 (n, 3, h, w) → pixels in [0, 1]. The part keeps `smallest` to 1 of the area and an aspect ratio of 3/4
    to 4/3, as torchvision's transform of that name; drawn for the whole batch at once.
    """
    n = len(images)
    area = torch.rand(n, generator=generator) * (1 - smallest) + smallest
    ratio = (torch.rand(n, generator=generator) * 2 - 1) * math.log(4 / 3)
    wide, high = (area * ratio.exp()).sqrt().clamp(max=1), (area / ratio.exp()).sqrt().clamp(max=1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = wide, high
    theta[:, 0, 2] = (torch.rand(n, generator=generator) * 2 - 1) * (1 - wide)
    theta[:, 1, 2] = (torch.rand(n, generator=generator) * 2 - 1) * (1 - high)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float() / 255, grid, padding_mode="border", align_corners=False)


def divide(images: np.ndarray, labels: np.ndarray, sizes: dict[str, int], seed: int) -> dict[str, Split]:
    """Disjoint, label-balanced splits: repeated pictures are dropped, the rest is dealt class by class.

    Args:
        images: uint8 (n, 28, 28) or (n, 3, 28, 28); one channel is repeated three times.
        labels: integers (n,).
        sizes: pictures wanted per split, in the order in which the splits are filled.
        seed: decides the deal.

    Raises:
        ValueError: fewer distinct pictures than asked for, or labels that are no whole numbers, one a picture.
    """
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{len(images)} images need as many whole labels (n,), not {labels.dtype} {labels.shape}")
    seen: dict[bytes, int] = {}
    for number, image in enumerate(images):
        seen.setdefault(image.tobytes(), number)
    if len(seen) < sum(sizes.values()):
        raise ValueError(f"{sum(sizes.values())} pictures wanted, {len(seen)} distinct ones present")
    order = np.random.default_rng(seed).permutation(list(seen.values()))
    # Rank within the class first, class second: any prefix of this order is as balanced as the data allow.
    rank = np.zeros(len(order), dtype=int)
    for label in np.unique(labels):
        members = np.flatnonzero(labels[order] == label)
        rank[members] = np.arange(len(members))
    order = order[np.lexsort((labels[order], rank))]
    if images.ndim == 3:
        images = np.repeat(images[:, None], 3, axis=1)
    splits, start = {}, 0
    for kind, size in sizes.items():
        chosen = order[start : start + size]
        splits[kind] = Split(torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen].astype(np.int64)))
        start += size
    return splits


def resample(task: Task, seed: int) -> Task:
    """The task with its train and validation pictures dealt anew, label-balanced; test stays as it is.

    Seed 0 is the task's own deal.
    """
    if seed == 0:
        return task
    images = torch.cat([task.train.images, task.validation.images]).numpy()
    labels = torch.cat([task.train.labels, task.validation.labels]).numpy()
    sizes = {"validation": len(task.validation), "train": len(task.train)}
    return replace(task, **divide(images, labels, sizes, seed))
