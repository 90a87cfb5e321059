"""`Suite` and `load_suite`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import pandas as pd
from torch import Tensor, nn

from saftnb.backbones import (
    OPENAI_BACKBONES,
    POCKET_BACKBONES,
    Backbone,
    ImageClassifier,
    TangentTower,
    load_openai_backbone,
    load_pocket_backbone,
    load_sequence_backbone,
)
from saftnb.suites.nli6 import NLI6_BACKBONE, PAIR_SOURCES, nli6_task, require_nli
from saftnb.suites.pairs import PairSplit, PairSuite, PairTask
from saftnb.suites.pocket import POCKET_TASKS, pocket_task, thimble_task
from saftnb.suites.pocket_nli import POCKET_NLI_TASKS, THIMBLE_NLI_TASKS, THIMBLE_SIZES, pocket_nli_task
from saftnb.suites.stored import DECODING, StoredSplit
from saftnb.suites.task import Split, Task, resample
from saftnb.suites.vision8 import SOURCES, SPLITS, kept_head, require_whole, vision8_task
from saftnb.task_vector import TaskVector

PRECISIONS = ("float32", "bf16")
TaskKind = TypeVar("TaskKind", Task, PairTask, covariant=True)


def conditions(suite: "AnySuite") -> dict[str, object]:
    """What decides a suite's results beside its data, its weights and its heads. Fields that came later are left out at
    their defaults, so that what was kept before is still found."""
    found: dict[str, object] = {}
    if suite.precision != "float32":
        found["precision"] = suite.precision
    if isinstance(suite, PairSuite) and suite.backbone.max_length != 256:
        found["max_length"] = suite.backbone.max_length
    if suite.name == "vision8":
        found["decoding"] = DECODING
    return found


class Tasks(Mapping[str, TaskKind]):
    """Tasks by name, each loaded when first asked for."""

    def __init__(self, suite: str, loaders: Mapping[str, Callable[[], TaskKind]]):
        self._suite, self._loaders = suite, dict(loaders)
        self._loaded: dict[str, TaskKind] = {}

    def __getitem__(self, name: str) -> TaskKind:
        if name not in self._loaders:
            raise KeyError(f"suite {self._suite!r} has no task {name!r}; its tasks: {', '.join(self)}")
        if name not in self._loaded:
            self._loaded[name] = self._loaders[name]()
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._loaders

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)


@dataclass(frozen=True, eq=False)
class Suite:
    """A backbone and the tasks that it is fine-tuned on.

    Attributes:
        splits: names the protocol of train, validation and test.
        precision: of the tower when it is fine-tuned (unless a recipe says otherwise) and evaluated: "float32", or
            "bf16", autocast to bfloat16 with TF32 for what stays float32. Weights and task vectors are float32 always.
    """

    name: str
    backbone: Backbone
    tasks: Mapping[str, Task]
    splits: str = "own"
    precision: str = "float32"
    _heads: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def head(self, task: str) -> Tensor:
        """The task's frozen zero-shot head (classes, embedding)."""
        if task not in self._heads:
            chosen = self.tasks[task]
            make = partial(self.backbone.zero_shot_head, chosen.class_names, chosen.prompts)
            asked = f"{self.backbone.sha256} {chosen.class_names} {chosen.prompts}"
            self._heads[task] = make() if self.name != "vision8" else kept_head(task, asked, make)
        return self._heads[task]

    def tower(self, vector: TaskVector | None = None, *, tangent: bool = False) -> nn.Module:
        """A fresh image tower at θ0, or at θ0 + `vector`, in evaluation mode; its tangent model at θ0 if `tangent`."""
        tower = self.backbone.image_tower()
        tower = TangentTower(tower).eval() if tangent else tower
        return tower if vector is None else vector.apply_to(tower)

    def classifier(self, task: str, tower: nn.Module | None = None) -> ImageClassifier:
        """`tower` (by default a fresh copy of the pre-trained one) with the task's head, in evaluation mode.

        Raises:
            ValueError: the task's pictures are not of the size that the backbone takes.
        """
        test, size = self.tasks[task].test, self.backbone.image_size
        there = tuple(test.images.shape[2:]) if isinstance(test, Split) else (test.size,) * 2
        if there != (size, size):
            raise ValueError(f"{task}: pictures of {there} pixels; {self.backbone.name} takes {(size, size)}")
        return self.with_head(self.tower() if tower is None else tower, self.head(task))

    def with_head(self, tower: nn.Module, head: Tensor) -> ImageClassifier:
        """`tower` with any frozen head (classes, embedding), in evaluation mode and the suite's precision."""
        made = ImageClassifier(tower, head, self.backbone.mean, self.backbone.std).eval()
        made.bf16 = self.precision == "bf16"
        return made

    def overview(self) -> pd.DataFrame:
        """One row a task: real or rendered, classes, pictures a split."""
        rows = [
            {"task": name, "pictures": task.origin, "classes": len(task.class_names)}
            | {kind: len(split) for kind, split in task.splits.items()}
            for name, task in self.tasks.items()
        ]
        table = pd.DataFrame(rows).set_index("task")
        return table if self.splits == "own" else table.assign(splits=self.splits)


AnySplit = Split | StoredSplit | PairSplit
AnySuite = Suite | PairSuite  # what fine-tuning, merging and evaluation take; they ask which only where it matters


def load_suite(
    name: str = "pocket",
    *,
    backbone: str = "",
    split: int = 0,
    splits: str = "",
    precision: str = "float32",
    max_length: int = 256,
) -> AnySuite:
    """A suite by name.

    "pocket": six offline tasks on a pocket backbone. "thimble": two of them with a few hundred pictures, for tests.
    "vision8": the papers' eight tasks on a CLIP with OpenAI's weights; `saftnb doctor` says what of it is here.
    "pocket-nli", "thimble-nli": six and two generated tasks of sentence pairs, offline. "nli6": KnOTS's six real ones.

    Args:
        backbone: one of `POCKET_BACKBONES`, which differ in their pre-training seed, or for "vision8" one of
            `OPENAI_BACKBONES`; "" is the first. For the suites of pairs what `load_sequence_backbone` takes; "" is
            "minilm", and for "nli6" Llama-3-8B.
        split: 0 is the standard deal of train and validation pictures, another number deals them anew (`resample`).
            The test pictures are always the same, but for those that "knots" takes for validation.
        splits: for "vision8" the published protocol, "saft" (also "") or "knots", see `vision8_task`.
        precision: see `Suite`. A language model has the precision of its weights' file.
        max_length: tokens, at most, to which sentence pairs are cut.

    Raises:
        ValueError: unknown suite, backbone, splits or precision, or a split below 0 (or above, for pairs).
        FileNotFoundError: data or weights of "vision8" are missing, or not whole.
    """
    if type(split) is not int or split < 0:
        raise ValueError(f"split is 0 or more, not {split!r}")
    if precision not in PRECISIONS or (name in _PAIR_SUITES and precision != "float32"):
        known = "float32 alone for language models" if name in _PAIR_SUITES else f"one of {', '.join(PRECISIONS)}"
        raise ValueError(f"precision is {known}, not {precision!r}")
    if name == "vision8":
        return _vision8(backbone or next(iter(OPENAI_BACKBONES)), split, splits or "saft", precision)
    if splits:
        raise ValueError(f"suite {name!r} has splits of its own; only vision8 takes {splits!r}")
    if name in _PAIR_SUITES:
        if split:
            raise ValueError(f"suite {name!r} has one deal of its pairs, split 0")
        if type(max_length) is not int or max_length < 8:
            raise ValueError(f"max_length is 8 tokens or more, not {max_length!r}")
        return _pairs(name, backbone, max_length)
    if name == "pocket":
        loaders = {task: partial(pocket_task, task) for task in POCKET_TASKS}
    elif name == "thimble":
        loaders = {task: partial(thimble_task, task) for task in ("digits", "patterns")}
    else:
        raise ValueError(f"unknown suite {name!r}; suites: pocket, thimble, vision8, {', '.join(_PAIR_SUITES)}")
    dealt = {task: lambda load=load: resample(load(), split) for task, load in loaders.items()}
    return Suite(name, load_pocket_backbone(backbone or POCKET_BACKBONES[0]), Tasks(name, dealt), precision=precision)


_PAIR_SUITES = ("pocket-nli", "thimble-nli", "nli6")


def _pairs(name: str, backbone: str, max_length: int) -> PairSuite:
    if name == "nli6":
        require_nli()
    model = load_sequence_backbone(backbone or (NLI6_BACKBONE if name == "nli6" else "minilm"))
    tables = [
        m.num_embeddings for n, m in model.model.named_modules() if "position" in n and isinstance(m, nn.Embedding)
    ]
    if tables and max_length > min(tables):  # without such a table, as Llama, any length will do
        raise ValueError(f"max_length is at most {min(tables)}, the positions that {model.name} has, not {max_length}")
    model = replace(model, max_length=max_length)
    if name == "nli6":
        loaders = {task: partial(nli6_task, task, model) for task in PAIR_SOURCES}
    elif name == "pocket-nli":
        loaders = {task: partial(pocket_nli_task, task, model) for task in POCKET_NLI_TASKS}
    else:
        loaders = {task: partial(pocket_nli_task, task, model, THIMBLE_SIZES) for task in THIMBLE_NLI_TASKS}
    return PairSuite(name, model, Tasks(name, loaders))


def _vision8(backbone: str, split: int, splits: str, precision: str) -> Suite:
    if splits not in SPLITS:
        raise ValueError(f"splits is one of {', '.join(SPLITS)}, not {splits!r}")
    require_whole()
    clip = load_openai_backbone(backbone)
    loaders = {task: partial(vision8_task, task, clip.image_size, splits, split) for task in SOURCES}
    return Suite("vision8", clip, Tasks("vision8", loaders), splits, precision)
