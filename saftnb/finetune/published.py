"""Models that others fine-tuned, in the place of our own trainings: read once, then in the store like these.

`recipe("published:fusionbench", suite)` stands for FusionBench's models of the suite's tasks, "published:knots" for
KnOTS's adapters, and "published:FOLDER" for a folder with a subfolder a task. Nothing is trained.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from saftnb.backbones import load_tower
from saftnb.evaluate import hits
from saftnb.finetune import store
from saftnb.formats.adapter import is_adapter, read_adapter
from saftnb.formats.checkpoint import find, open_checkpoint
from saftnb.formats.hub import SOURCES, hub_id, is_here, published_folder
from saftnb.formats.names import tower_state
from saftnb.suites import AnySuite, PairSuite, conditions
from saftnb.task_vector import TaskVector

PREFIX = "published:"
PROBE_PAIRS = 2000  # training pairs, at most, from which a missing head is fitted
READING_VERSION = 1  # raise it whenever a change of this code changes what is read


@dataclass(frozen=True)
class Published:
    """What takes a recipe's place for models that are read from files. `source`: "fusionbench", "knots" or a folder."""

    source: str
    tangent = False
    precision = "float32"
    rho = None
    steps = gradients = 0

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{PREFIX}{self.source}" if self.source in SOURCES else f"{PREFIX}{Path(self.source).name}"

    @property
    def scope(self) -> str:
        """ "lora" for adapters, "full" for models; of a folder, by what lies in it."""
        if self.source in SOURCES:
            return "lora" if self.source == "knots" else "full"
        folders = [path for path in find(self.source).iterdir() if path.is_dir()]
        return "lora" if any(map(is_adapter, folders)) else "full"

    def shortened(self, steps: int) -> "Published":
        """The same: there are no steps to leave out."""
        return self

    def inputs(self) -> dict[str, object]:
        """What a manifest says in a recipe's place."""
        return {"name": self.name.replace(":", "-"), "rho": None, "scope": self.scope}


def where(suite: AnySuite, task: str, source: str) -> Path:
    """The folder of a task's model.

    Raises:
        FileNotFoundError: it is not here. ValueError: nobody published it for this backbone.
    """
    if source not in SOURCES:
        folder = Path(source).expanduser() / task
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: no such folder; models takes a folder with a subfolder for each task")
        return folder
    repository = hub_id(source, suite.backbone.name, task)
    here = published_folder(source, repository)
    try:
        return here if is_here(here) else find(repository)
    except FileNotFoundError:
        command = f"saftnb fetch {suite.name} --models {source}"
        raise FileNotFoundError(f"{repository} is not here; `{command}` brings it") from None


def read_published(suite: AnySuite, task: str, plan: Published, *, device: torch.device) -> store.FineTuned:
    """A task's model of others as a store entry, by the hash of its files.

    The task vector has the weights that the files have: a CLIPVisionModel has no projection, so none is merged. Of
    sentence pairs the adapter's own head is taken; where it has none, a linear probe is fitted on the tower, which the
    entry's `inputs` say.

    Raises:
        FileNotFoundError, ValueError: as `where`, `read_adapter` and `load_tower`.
    """
    folder = where(suite, task, plan.source)
    adapter = read_adapter(folder, _shapes(suite)) if is_adapter(folder) else None
    own = next((value for name, value in adapter.head.items() if name.endswith("weight")), None) if adapter else None
    kind = "zero-shot" if not isinstance(suite, PairSuite) else "linear probe" if own is None else "its own"
    inputs = {
        "suite": suite.name, "task": task, "data": suite.tasks[task].sha256, "backbone": suite.backbone.sha256,
        "recipe": plan.inputs(), "seed": 0, "files": adapter.sha256 if adapter else open_checkpoint(folder).sha256,
        "head": kind, "version": READING_VERSION, **conditions(suite),
    }  # fmt: skip
    if (found := store.load(inputs)) is not None:
        return found
    with store.locked(inputs):
        if (found := store.load(inputs)) is not None:
            return found
        start = time.monotonic()
        vector = adapter.vector if adapter else _full(suite, folder)
        head, scored = None, suite
        if isinstance(suite, PairSuite):
            head = own.float() if own is not None else linear_probe(suite, task, vector, device)
            scored = suite.with_heads({task: head})
        model = scored.classifier(task, scored.tower(vector)).to(device)
        accuracy = float(hits(model, suite.tasks[task].validation, device=device.type).double().mean())
        history = pd.DataFrame([(0, float("nan"), accuracy)], columns=["step", "loss", "validation_accuracy"])
        return store.save(
            store.FineTuned(
                vector, history, accuracy, time.monotonic() - start, store.fingerprint(inputs), inputs, head=head
            )
        )


def _full(suite: AnySuite, folder: Path) -> TaskVector:
    if isinstance(suite, PairSuite):
        raise ValueError(f"{folder}: of language models only adapters are read")
    before, named = suite.tower(), tower_state(open_checkpoint(folder))
    after = load_tower(folder, suite.tower())
    start, end = (dict(tower.named_parameters()) for tower in (before, after))
    kept = [name for name in start if name in named]
    return TaskVector.between({n: start[n].detach() for n in kept}, {n: end[n].detach() for n in kept})


def _shapes(suite: AnySuite) -> dict[str, torch.Size]:
    trunk = suite.backbone.model if isinstance(suite, PairSuite) else suite.tower()
    return {name: p.shape for name, p in trunk.named_parameters()}


def linear_probe(suite: PairSuite, task: str, vector: TaskVector, device: torch.device) -> Tensor:
    """A head (3, width) for a tower that has none: logistic regression on its embeddings of training pairs, no bias.

    The first `PROBE_PAIRS` of the training split; rows of classes that the task does not have are 0.
    """
    from sklearn.linear_model import LogisticRegression  # takes seconds

    split = suite.tasks[task].train[:PROBE_PAIRS]
    tower = suite.tower(vector).to(device)
    with torch.no_grad():
        parts = [tower(split.inputs[slice(i, i + 100)].to(device)).cpu() for i in range(0, len(split), 100)]
    features = torch.cat(parts)
    spread = features.std(dim=0).mean().clamp(min=1e-6)
    fitted = LogisticRegression(fit_intercept=False, max_iter=2000).fit(
        (features / spread).numpy(), split.labels.numpy()
    )
    head = torch.zeros(len(suite.tasks[task].class_names), features.shape[1])
    rows = torch.from_numpy(fitted.coef_).float() / spread
    if len(rows) == 1:  # two classes: one row tells them apart
        head[int(fitted.classes_[1])] = rows[0]
    else:
        for label, row in zip(fitted.classes_, rows, strict=True):
            head[int(label)] = row
    return head
