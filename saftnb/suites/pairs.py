"""Sentence pairs: their splits and tasks, and the suite whose tasks share one language model."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import pandas as pd
import torch
from torch import Tensor, nn

from saftnb.backbones import SequenceBackbone, SequenceClassifier, SequenceTower, Tokens, initial_head
from saftnb.suites.grammar import LABELS
from saftnb.suites.task import require_examples, require_task_name
from saftnb.task_vector import TaskVector

WINDOW = 4  # batches within which training pairs are sorted by length; more would make batches of one template each


@dataclass(frozen=True, eq=False)
class PairSplit:
    """Labelled sentence pairs: `premises`, `hypotheses` and `labels` int64 (n,), indices of `LABELS`.

    `tokenize` makes `Tokens` of lists of both, see `SequenceBackbone.tokenize`.
    """

    premises: tuple[str, ...]
    hypotheses: tuple[str, ...]
    labels: Tensor
    tokenize: Callable[[Sequence[str], Sequence[str]], Tokens]

    def __post_init__(self) -> None:
        whole = isinstance(self.labels, Tensor) and self.labels.dtype == torch.int64 and self.labels.ndim == 1
        if not whole or not len(self.premises) == len(self.hypotheses) == len(self.labels):
            raise ValueError("a split of pairs holds as many premises, hypotheses and int64 labels")
        for number, pair in enumerate(zip(self.premises, self.hypotheses, strict=True)):
            if strange := [text for text in pair if not isinstance(text, str)]:
                raise ValueError(f"pair {number} of a split of pairs holds {strange[0]!r}, which is no text")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice) -> "PairSplit":
        if range(len(self))[index] == range(len(self)):
            return self  # with its tokens
        return PairSplit(self.premises[index], self.hypotheses[index], self.labels[index], self.tokenize)

    @cached_property
    def inputs(self) -> Tokens:
        """What a classifier takes."""
        return self.tokenize(self.premises, self.hypotheses)

    def identities(self) -> set[tuple[str, str]]:
        """What tells the pairs apart."""
        return set(zip(self.premises, self.hypotheses, strict=True))

    def order(self, size: int, generator: torch.Generator) -> Tensor:
        """The order of an epoch's pairs, int64 (n,): batches of `size` hold pairs of like length, so that little is
        padding. Shuffled, then sorted within windows of `WINDOW` batches, then the whole batches shuffled."""
        order = torch.randperm(len(self), generator=generator)
        lengths = self.inputs.lengths
        order = torch.cat([part[lengths[part].argsort(stable=True)] for part in order.split(size * WINDOW)])
        whole = len(order) // size
        batches = order[: whole * size].view(whole, size)[torch.randperm(whole, generator=generator)]
        return torch.cat([batches.flatten(), order[whole * size :]])

    def prepare(self, crop: float, draws: int) -> int:
        """How many processes should draw training pairs ahead: none, they are in memory."""
        return 0

    def drawn(self, index: Tensor, crop: float, generator: torch.Generator) -> Tokens:
        """Training inputs: the pairs themselves (`crop` is of pictures)."""
        return self.inputs[index]

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for row in zip(self.premises, self.hypotheses, self.labels.tolist(), strict=True):
            digest.update(repr(row).encode())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class PairTask:
    """One task of sentence pairs. `allowed`: the classes that it has, of `LABELS`; the others are masked.

    `origin` is "real" (written by people) or "generated" (by our own grammar). The three splits share no pair.

    Raises:
        ValueError: fewer than two classes, an empty split, a label outside the task's classes, or a pair that stands in
            two splits.
    """

    name: str
    origin: str
    allowed: tuple[int, ...]
    train: PairSplit
    validation: PairSplit
    test: PairSplit

    def __post_init__(self) -> None:
        require_task_name(self.name)
        if len(set(self.allowed)) < 2 or not set(self.allowed) <= set(range(len(LABELS))):
            raise ValueError(f"{self.name}: allowed are two or more of 0 to {len(LABELS) - 1}, not {self.allowed}")
        seen: set[tuple[str, str]] = set()
        for kind, split in self.splits.items():
            require_examples(self.name, kind, len(split), "pairs")
            strange = set(split.labels.tolist()) - set(self.allowed)
            if strange:
                names = ", ".join(LABELS[label] for label in self.allowed)
                raise ValueError(f"{self.name}: the {kind} pairs have the label {min(strange)}; its classes: {names}")
            both = seen & split.identities()
            if both:
                raise ValueError(f"{self.name}: {len(both)} pairs of {kind} stand in another split too")
            seen |= split.identities()

    @property
    def class_names(self) -> tuple[str, ...]:
        """All three; the heads have a row for each."""
        return LABELS

    @property
    def splits(self) -> dict[str, PairSplit]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @cached_property
    def sha256(self) -> str:
        parts = [split.sha256 for split in self.splits.values()] + [str(self.allowed)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class PairSuite:
    """One language model and the tasks of sentence pairs that adapters are trained for. It takes a `Suite`'s place in
    `finetune` and in `saftnb.evaluate`.

    Every task has a head of its own, which is trained with its adapter and never merged: `with_heads` puts them in. All
    tasks start from one head.
    """

    name: str
    backbone: SequenceBackbone
    tasks: Mapping[str, PairTask]
    splits: str = "own"
    precision: str = "float32"  # of the heads and adapters; the model has that of its weights' file
    heads: Mapping[str, Tensor] = field(default_factory=dict)

    def with_heads(self, heads: Mapping[str, Tensor]) -> "PairSuite":
        """The same suite with these tasks' heads, (3, width) each.

        Raises:
            ValueError: a head of another shape, or of no task here.
        """
        for task, head in heads.items():
            wanted = (len(LABELS), self.backbone.width)
            if task not in self.tasks or tuple(head.shape) != wanted:
                raise ValueError(f"heads are of this suite's tasks and {wanted}, not {task!r}, {tuple(head.shape)}")
        return replace(self, heads=dict(heads))

    def head(self, task: str) -> Tensor:
        """The task's head (3, width): its own, or the one that all start from."""
        self.tasks[task]  # a KeyError that names the tasks
        return self.heads[task] if task in self.heads else initial_head(self.backbone.width)

    def tower(self, vector: TaskVector | None = None, *, tangent: bool = False) -> SequenceTower:
        """The pooled model at θ0, or at θ0 + `vector`, in evaluation mode. The model itself is shared, not copied.

        Raises:
            ValueError: a tangent model of a language model, or a vector of another base.
        """
        if tangent:
            raise ValueError("there are no tangent models of language models here")
        return SequenceTower(self.backbone, vector).eval()

    def classifier(self, task: str, tower: nn.Module | None = None) -> SequenceClassifier:
        """`tower` (by default the pre-trained one) with the task's head and mask, in evaluation mode."""
        tower = self.tower() if tower is None else cast(SequenceTower, tower)
        return SequenceClassifier(tower, self.head(task), self.tasks[task].allowed).eval()

    def overview(self) -> pd.DataFrame:
        """One row a task: real or generated, its classes, pairs a split."""
        rows = [
            {"task": name, "pairs": task.origin, "classes": ", ".join(LABELS[label] for label in task.allowed)}
            | {kind: len(split) for kind, split in task.splits.items()}
            for name, task in self.tasks.items()
        ]
        return pd.DataFrame(rows).set_index("task")
