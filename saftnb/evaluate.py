"""How good a model is: hits and accuracies per task, absolute and normalised."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import pandas as pd
import torch
from scipy import special  # its `stats` takes seconds to import
from torch import Tensor, nn

from saftnb.backbones import ImageClassifier, Tokens, resolve_device, tangent_embeddings, tensor_cores
from saftnb.delta import dense
from saftnb.suites import AnySplit, AnySuite, JointLabels, PairSuite, Suite
from saftnb.task_vector import TaskVector


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say of what a number is that is not finite: a FloatingPointError of the block starts with `what`."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{what}: {error}") from None


def finite_logits(found: Tensor) -> Tensor:
    """Logits (n, classes) as they are; a class that is −∞ for all is one that the task does not have.

    Raises:
        FloatingPointError: others that are not finite, of which argmax would make class 0 and a plausible accuracy.
    """
    bad = ~(found.isfinite() | found.isneginf().all(dim=0)).all(dim=1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise FloatingPointError(f"logits of {int(bad.sum())} of {len(bad)} examples are not finite, first of {first}")
    return found


@torch.no_grad()
def logits(model: nn.Module, inputs: Tensor | Tokens, *, device: str = "auto", batch_size: int = 100) -> Tensor:
    """Logits (n, classes), on the CPU, of uint8 images (n, 3, h, w), or of tokens, which are run in the order of their
    lengths so that little is padding. The model stays on the device. Raises FloatingPointError as `finite_logits`."""
    where = resolve_device(device)
    model = model.to(where)
    with tensor_cores(where, getattr(model, "bf16", False)):
        if isinstance(inputs, Tokens):
            order = inputs.lengths.argsort(stable=True)
            found = [model(inputs[some].to(where)).cpu() for some in order.split(batch_size)]
            return finite_logits(torch.cat(found)[order.argsort()])
        return finite_logits(torch.cat([model(batch.to(where)).cpu() for batch in inputs.split(batch_size)]))


def hits(model: nn.Module, split: AnySplit, *, device: str = "auto", batch_size: int = 100) -> Tensor:
    """For every picture or pair, whether its largest logit is the label's: bool (n,)."""
    return logits(model, split.inputs, device=device, batch_size=batch_size).argmax(dim=1) == split.labels


def accuracy(model: nn.Module, split: AnySplit, *, device: str = "auto") -> float:
    """Share of hits, 0 to 1."""
    return hits(model, split, device=device).double().mean().item()


def suite_hits(
    suite: AnySuite, vector: TaskVector | None = None, *, split: str = "test", tasks: Sequence[str] = (),
    examples: int | None = None, tangent: bool = False, device: str = "auto",
) -> dict[str, Tensor]:  # fmt: skip
    """`hits` on every task of one model: θ0 plus `vector`, or the pre-trained θ0 where there is none.

    Args:
        tasks: those to measure, in place of all.
        examples: the first so many pictures or pairs of each split (no split goes class by class), in place of all.
        tangent: whether `vector` is one of the tangent model (see `Recipe.tangent`).

    Raises:
        FloatingPointError: logits that are not finite; the line names suite, task, split and how many. So do the other
            functions of this module.
    """
    tower = suite.tower(vector, tangent=tangent)
    return _hits_of(suite, tower, split=split, tasks=tasks, examples=examples, device=device)


def _hits_of(
    suite: AnySuite, tower: nn.Module, *, split: str, tasks: Sequence[str], examples: int | None, device: str
) -> dict[str, Tensor]:  # fmt: skip
    found = {}
    for name in tasks or suite.tasks:
        with naming(f"{suite.name}, {name}, {split}"):
            found[name] = hits(suite.classifier(name, tower), suite.tasks[name].splits[split][:examples], device=device)
    return found


def accuracies(hits_by_task: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of hits per task, 0 to 1. Raises ValueError where nothing of a task was tested."""
    if none := [task for task, found in hits_by_task.items() if not len(found)]:
        raise ValueError(f"{none[0]}: nothing was tested, so there is no accuracy")
    return {task: found.double().mean().item() for task, found in hits_by_task.items()}


def suite_accuracy(
    suite: AnySuite, vector: TaskVector | None = None, *, split: str = "test", tasks: Sequence[str] = (),
    examples: int | None = None, tangent: bool = False, device: str = "auto",
) -> pd.Series:  # fmt: skip
    """Accuracy in 0 to 1 of one model, θ0 plus `vector`, on every task, and their mean as the last entry.

    Args:
        see `suite_hits`.
    """
    measured = suite_hits(suite, vector, split=split, tasks=tasks, examples=examples, tangent=tangent, device=device)
    found = pd.Series(accuracies(measured), name="accuracy").rename_axis("task")
    return pd.concat([found, pd.Series({"mean": found.mean()})]).rename("accuracy").rename_axis("task")


def individual_hits(
    suite: AnySuite, vectors: Mapping[str, TaskVector], *, split: str = "test", examples: int | None = None,
    tangent: bool = False, device: str = "auto",
) -> dict[str, Tensor]:  # fmt: skip
    """`hits` of every task's own fine-tuned model on (the first so many examples of) that task."""
    found = {}
    for name, vector in vectors.items():
        model = suite.classifier(name, suite.tower(vector, tangent=tangent))
        with naming(f"{suite.name}, {name}'s own model, {split}"):
            found[name] = hits(model, suite.tasks[name].splits[split][:examples], device=device)
    return found


def ensemble_hits(
    suite: AnySuite, vectors: Mapping[str, TaskVector], *, split: str = "test", examples: int | None = None,
    tangent: bool = False, device: str = "auto",
) -> dict[str, Tensor]:  # fmt: skip
    """`hits` on every task (on the first so many pictures or pairs) of the ensemble of all tasks' own models: the mean
    of their class probabilities there."""
    parts = {task: suite.tasks[task].splits[split][:examples] for task in vectors}
    shares = dict.fromkeys(parts, torch.zeros(()))
    for vector in vectors.values():
        tower = suite.tower(vector, tangent=tangent)
        for task, part in parts.items():
            with naming(f"{suite.name}, {task}, {split}, one of the ensemble"):
                found = logits(suite.classifier(task, tower), part.inputs, device=device)
            shares[task] = shares[task] + found.softmax(dim=1)
    return {task: shares[task].argmax(dim=1) == part.labels for task, part in parts.items()}


def joint_ranks(
    suite: Suite, labels: JointLabels, head: Tensor, vectors: Sequence[TaskVector | None], *, split: str = "test",
    pictures: int | None = None, tangent: bool = False, device: str = "auto",
) -> dict[str, Tensor]:  # fmt: skip
    """The joint task: for every picture of every task, how many labels rank above the right one, int64 (n,).

    Hits@k is the share of ranks below k; a label as likely as the right one ranks above it only if it comes first.

    Args:
        labels: see `joint_labels`; its tasks are measured. head: their `joint_head`.
        vectors: of one model (None: the pre-trained one), or of several, whose mean of probabilities is taken.
    """
    shares = dict.fromkeys(labels.index, torch.zeros(()))
    for vector in vectors:
        tower = suite.tower(vector, tangent=tangent)
        model = suite.with_head(tower, head)
        for task in labels.index:
            images = suite.tasks[task].splits[split].images[:pictures]
            with naming(f"{suite.name}, {task}, {split}, joint task"):
                shares[task] = shares[task] + logits(model, images, device=device).softmax(dim=1)
    ranks = {}
    for task, index in labels.index.items():
        right = index[suite.tasks[task].splits[split].labels[:pictures]]
        order = shares[task].argsort(dim=1, descending=True, stable=True)
        ranks[task] = (order == right[:, None]).int().argmax(dim=1)
    return ranks


def hits_at(ranks: Mapping[str, Tensor], ks: Sequence[int] = (1, 3, 5)) -> pd.DataFrame:
    """Hits@k in 0 to 1: a row a task and "all", which counts every picture alike (micro-average); a column a k."""
    rows = {task: {k: (found < k).double().mean().item() for k in ks} for task, found in ranks.items()}
    every = torch.cat(list(ranks.values()))
    rows["all"] = {k: (every < k).double().mean().item() for k in ks}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index="task", columns="k")


class ModelFamily:
    """The models θ0 + Σ αi τi of some task vectors, for measurements at many coefficients α.

    A plain model is set to its weights and run on the pictures each time. The embeddings of a tangent model are linear
    in α: f(x; θ0) and the products J τi are computed once for a task's split, and an α then costs a weighted sum.

    Args:
        vectors: τ1, …, τk; `coefficients` below has a number for each.
        tangent: whether they are task vectors of the tangent model (see `Recipe.tangent`).
    """

    def __init__(self, suite: Suite, vectors: Sequence[TaskVector], *, tangent: bool = False, device: str = "auto"):
        self.suite, self.tangent, self._where = suite, tangent, resolve_device(device)
        self._tower = suite.backbone.image_tower().to(self._where)
        self._vectors = [vector.dense().to(self._where) for vector in vectors]
        self._start = {name: p.detach().clone() for name, p in self._tower.named_parameters()}
        self._known: dict[tuple[str, str, int | None], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def logits(
        self, task: str, coefficients: Sequence[float], *, split: str = "test", pictures: int | None = None
    ) -> Tensor:
        """Logits (n, classes), on the CPU, on the (first so many) pictures of a task's split.

        Raises:
            ValueError: not one coefficient for each task vector. FloatingPointError: see `suite_hits`.
        """
        if len(coefficients) != len(self._vectors):
            raise ValueError(f"{len(self._vectors)} task vectors, but {len(coefficients)} coefficients")
        with naming(f"{self.suite.name}, {task}, {split}, coefficients {list(coefficients)}"):
            return self._logits(task, coefficients, split, pictures)

    def _logits(self, task: str, coefficients: Sequence[float], split: str, pictures: int | None) -> Tensor:
        model = self.suite.classifier(task, self._tower).to(self._where)
        if self.tangent:
            value, slopes = self._linear(model, task, split, pictures)
            moved = value + torch.einsum("k,knd->nd", slopes.new_tensor(coefficients), slopes)
            return finite_logits(model.classify(moved).cpu())
        for name, p in self._tower.named_parameters():
            moves = [
                alpha * dense(vector[name])
                for alpha, vector in zip(coefficients, self._vectors, strict=True)
                if name in vector
            ]
            p.copy_(sum(moves, self._start[name]))
        images = self.suite.tasks[task].splits[split].images[:pictures]
        return logits(model, images, device=str(self._where))

    def hits(
        self, task: str, coefficients: Sequence[float], *, split: str = "test", pictures: int | None = None
    ) -> Tensor:
        """For every picture, whether its largest logit is the label's: bool (n,)."""
        found = self.logits(task, coefficients, split=split, pictures=pictures).argmax(dim=1)
        return found == self.suite.tasks[task].splits[split].labels[:pictures]

    def _linear(self, model: ImageClassifier, task: str, split: str, pictures: int | None) -> tuple[Tensor, Tensor]:
        key = (task, split, pictures)
        if key not in self._known:
            images = self.suite.tasks[task].splits[split].images[:pictures]
            parts = [
                tangent_embeddings(self._tower, self._vectors, model.pixels(batch.to(self._where)))
                for batch in images.split(100)
            ]
            self._known[key] = torch.cat([value for value, _ in parts]), torch.cat([s for _, s in parts], dim=1)
        return self._known[key]


class SuiteAccuracy:
    """Accuracy per task of θ0 plus a merged vector: the score of a coefficient search.

    Called with a vector, or, for a search over λ, with `along(vector, scales)`: a tangent model then needs one product
    J τ for all scales.

    Args:
        split, tasks, examples, tangent: as for `suite_hits`.
        individual: accuracy of every task's own model on that split; the score is then the normalised accuracy, of the
            tasks whose own model has a hit (the plain accuracy where none has).
    """

    def __init__(
        self, suite: AnySuite, *, split: str = "validation", tasks: Sequence[str] = (),
        examples: int | None = None, individual: Mapping[str, float] | None = None, tangent: bool = False,
        device: str = "auto",
    ):  # fmt: skip
        self.suite, self.tangent, self.device, self.individual = suite, tangent, device, individual
        self.split, self.tasks, self.examples = split, tuple(tasks or suite.tasks), examples

    def __call__(self, vector: TaskVector) -> dict[str, float]:
        return self.along(vector, [1.0])[0]

    def along(self, vector: TaskVector, scales: Sequence[float]) -> list[dict[str, float]]:
        """Accuracy per task, 0 to 1, at θ0 + scale · vector, for every scale."""
        if isinstance(self.suite, PairSuite):
            tower, found = self.suite.tower(vector), []
            measure = partial(
                _hits_of, self.suite, tower, split=self.split, tasks=self.tasks, examples=self.examples,
                device=self.device,
            )  # fmt: skip
            for scale in scales:
                tower.scale = scale  # the vector lies on the device once, and is scaled there
                found.append(accuracies(measure()))
        else:
            family = ModelFamily(self.suite, [vector], tangent=self.tangent, device=self.device)
            hit = partial(family.hits, split=self.split, pictures=self.examples)
            found = [accuracies({task: hit(task, [scale]) for task in self.tasks}) for scale in scales]
        own = self.individual or {}
        known = [task for task in self.tasks if own and own[task]]
        return [normalised({task: one[task] for task in known}, own) for one in found] if known else found


def normalised(absolute: Mapping[str, float], individual: Mapping[str, float]) -> dict[str, float]:
    """Absolute accuracy divided by that of the task's own fine-tuned model.

    It rises when the individual accuracy falls: never read it without the absolute one beside. NaN where that is 0.
    """
    return {task: absolute[task] / individual[task] if individual[task] else math.nan for task in absolute}


def hierarchical_bootstrap(
    table: pd.DataFrame, *, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of a table, with a percentile interval that resamples its rows and its columns.

    Rows and columns are crossed: backbones and seeds, say, where a seed deals the same data on every backbone. A draw
    picks as many rows and as many columns as there are, with replacement; its statistic is the mean of the cells where
    they meet. With few rows the interval is too narrow.

    Args:
        table: a number in each cell.
        level: nominal coverage, 0 to 1. draws: how often to resample. seed: decides the draws.

    Returns:
        (mean, low, high), in the table's units.

    Raises:
        ValueError: an empty table, or a cell that is not finite.
    """
    values = table.sort_index().sort_index(axis=1).to_numpy(dtype=float)
    if not values.size or not np.isfinite(values).all():
        raise ValueError("needs a finite number in each cell of a table that is not empty")
    generator = np.random.default_rng(seed)
    rows, columns = (generator.integers(size, size=(draws, size)) for size in values.shape)
    samples = values[rows[:, :, None], columns[:, None, :]].mean(axis=(1, 2))
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def seed_interval(differences: Sequence[float], *, level: float = 0.95) -> tuple[float, float, float]:
    """The mean of paired differences, one a training seed, with Student's t interval (n − 1 degrees of freedom).

    It takes the differences for independent and normal, and covers training seeds alone: the same backbone, the same
    pictures. With two or three seeds it is wide, as it should be. With one seed its ends are NaN.

    Returns:
        (mean, low, high), in the differences' units.

    Raises:
        ValueError: no difference, or one that is not finite.
    """
    values = np.asarray(differences, dtype=float)
    if not values.size or not np.isfinite(values).all():
        raise ValueError("needs at least one difference, all of them finite")
    if values.size == 1:
        return float(values[0]), math.nan, math.nan
    half = special.stdtrit(values.size - 1, (1 + level) / 2) * values.std(ddof=1) / math.sqrt(values.size)
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def interval_text(interval: tuple[float, float, float], digits: int = 1) -> str:
    """ "+0.4 (−0.2 to +1.0)", or the mean alone where the interval's ends are NaN."""
    mean, low, high = (f"{value:+.{digits}f}".replace("-", "−") for value in interval)
    return mean if math.isnan(interval[1]) else f"{mean} ({low} to {high})"


def with_mean(table: pd.DataFrame) -> pd.DataFrame:
    """Append the column "mean" over tasks; rows are models, columns tasks."""
    return table.assign(mean=table.mean(axis="columns"))
