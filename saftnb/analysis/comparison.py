"""`compare`: the same merge methods on the same experts, coefficients chosen on validation, everything tested."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import pandas as pd
import torch

from saftnb.analysis.kept_merges import Hits, Merged, kept
from saftnb.backbones import resolve_device
from saftnb.evaluate import SuiteAccuracy, accuracies, ensemble_hits, individual_hits, suite_hits
from saftnb.finetune import TaskVectors, store
from saftnb.merging import Representation, methods, represent
from saftnb.merging import spaces as known_spaces
from saftnb.merging.bases import EVERY_SPACE, SAME_IN_EVERY_SPACE
from saftnb.merging.grid_search import Search, check_grid, coordinate_search, per_target, search
from saftnb.merging.statistics import suite_statistics
from saftnb.scores import score_table
from saftnb.suites import AnySuite, PairSuite, conditions
from saftnb.task_vector import TaskVector

_NAMES = ["model", "space", "recipe", "seed"]
Key = tuple[str, str, str, int]
Grid = Mapping[str, Sequence[float]]  # of a method: the values to try of each coefficient
Options = Mapping[str, object]  # of a space


@dataclass(eq=False)
class Comparison:
    """What `compare` found, by (model, space, recipe, seed).

    The space is "" for what is no merge, and `EVERY_SPACE` for a method that gives the same in all of several.

    Attributes:
        tested: what the test says of each model: hits by task, or what the caller's own `test` returns.
        found: the search of each merge, without its vector (at full size there is no room for them all).
        targeted: the same methods with coefficients chosen for each task alone: hits by task.
    """

    tested: dict[Key, Any] = field(default_factory=dict)
    found: dict[Key, Search] = field(default_factory=dict)
    targeted: dict[Key, Hits] = field(default_factory=dict)

    def scores(self, measure: str = "absolute") -> pd.DataFrame:
        """`score_table` of one measure, index (model, space, recipe, seed), without the level "space" where all merges
        are of weights."""
        table = score_table(self.tested, _NAMES).xs(measure, level="measure")
        return table.droplevel("space") if self._weights_alone(table) else table

    def chosen(self) -> pd.DataFrame:
        """The chosen coefficients: a row a method and space, a column a recipe, seed by seed ("λ 0.3 | λ 0.2*"); a
        star where a value is an end of its grid."""
        texts = pd.Series({key: str(result) for key, result in self._searched().items()})
        texts = texts.rename_axis(_NAMES).groupby(_NAMES[:-1], sort=False).agg(" | ".join).unstack("recipe", sort=False)
        table = pd.DataFrame(texts)
        return table.droplevel("space") if self._weights_alone(table) else table

    def curves(self, keep: Sequence[str] = ()) -> pd.DataFrame:
        """Every point that the searches tried: columns method, space, recipe, seed, those of `Search.curve`, chosen."""
        parts = []
        for (method, space, recipe, seed), result in self._searched(keep).items():
            chosen = (result.curve[list(result.best)] == pd.Series(result.best)).all(axis=1)
            named = {"method": method, "space": space, "recipe": recipe, "seed_": seed, "chosen": chosen}
            parts.append(result.curve.assign(**named))
        return pd.concat(parts).rename(columns={"seed": "draw"}).rename(columns={"seed_": "seed"})

    def _searched(self, keep: Sequence[str] = ()) -> dict[Key, Search]:
        found = {key: one for key, one in self.found.items() if one.best and key[0] in (keep or methods())}
        if not found:
            raise ValueError(f"no coefficient was searched for {', '.join(keep) or 'any of these methods'}")
        return found

    @staticmethod
    def _weights_alone(table: pd.DataFrame) -> bool:
        return set(table.index.get_level_values("space")) <= {"", "weights"}


def compare(
    suite: AnySuite,
    vectors: TaskVectors,
    grids: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    spaces: Mapping[str, Mapping[str, object]] | Sequence[str] = ("weights",),
    protocol: str = "saft",
    examples: int = 0,
    test_examples: int = 0,
    statistics_pictures: int = 100,
    targets: bool = False,
    measure: Callable[[TaskVector], Mapping[str, float]] | None = None,
    test: Callable[[TaskVector], Any] | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Comparison:
    """Merge all experts by every method in every space, for each recipe and seed, and test the merged models.

    Args:
        vectors: the experts; see `TaskVectors`.
        grids: merge method -> its grid of coefficients; {} for a method without any.
        spaces: merge spaces, or space -> its options. A method that is the same in all of them is merged once; one that
            needs statistics, in the weights alone.
        protocol: how coefficients are chosen, one shared set for all tasks: "saft" tries every combination and takes
            the best mean validation accuracy; "knots" goes one coordinate after the other, by the mean *normalised*
            validation accuracy (KnOTS, arXiv 2410.19735).
        examples: validation pictures or pairs a task for that choice; test_examples: for the test; 0 is all.
        statistics_pictures: training pictures a task for `fisher` and `regmean`.
        targets: also choose coefficients for each task alone, as SAFT's released code does.
        measure, test: in place of the accuracies on the suite's tasks: the score of a merged vector on validation, and
            what to note of it on test. The models that are no merge are then left to the caller.

    Every merge that was searched and tested is kept in the checkpoint store (unless by the caller's own functions), and
    is found there again by the same code: a comparison that broke off goes on, and one that is split over several
    processes, by recipe and seed, is put together by one that asks for all.

    Raises:
        ValueError: no such protocol, method, space or hyperparameter; before anything is merged.
    """
    if protocol not in ("saft", "knots"):
        raise ValueError(f"protocol is saft or knots, not {protocol!r}")
    spaces = dict(spaces) if isinstance(spaces, Mapping) else {space: {} for space in spaces}
    _check(grids, spaces)
    grids = {method: {name: _plain(values) for name, values in grid.items()} for method, grid in grids.items()}
    how = _How(protocol, examples, test_examples, statistics_pictures, targets, resolve_device(device).type)
    found = Comparison()
    for recipe, seed in vectors:
        job = _Job(suite, vectors, recipe, seed, how, device, progress, measure, test)
        if test is None:
            unmerged = kept(job.inputs("unmerged", "", {}, {}), job.unmerged)
            found.tested |= {(model, "", recipe, seed): hits for model, hits in unmerged.tested.items()}
        for method, space, where in _merges(grids, spaces):
            if methods()[method].needs_statistics and job.tangent:
                continue  # these statistics are of the plain model
            key, options = (method, space, recipe, seed), spaces.get(where, {})
            inputs = job.inputs(method, where, options, grids[method])
            one = kept(inputs, partial(job.merged, method, where, options, grids[method]))
            found.tested[key] = one.tested[method]
            if one.search is not None:
                found.found[key] = one.search
            if one.targeted:
                found.targeted[key] = one.targeted
    return found


@dataclass(frozen=True)
class _How:
    """How merges are chosen and tested: what decides them beside experts, method, space and grid."""

    protocol: str
    examples: int
    test_examples: int
    statistics_pictures: int
    targets: bool
    device: str


@dataclass(eq=False)
class _Job:
    """The merges of one recipe and seed. What they share is made when one of them is not kept yet."""

    whole_suite: AnySuite
    vectors: TaskVectors
    recipe: str
    seed: int
    how: _How
    device: str
    progress: bool
    measure: Callable[[TaskVector], Mapping[str, float]] | None
    test: Callable[[TaskVector], Any] | None
    _there: tuple[str, Representation] | None = None

    @property
    def tangent(self) -> bool:
        return self.vectors.plans[self.recipe].tangent

    @cached_property
    def experts(self) -> dict[str, TaskVector]:
        """On the GPU where there is room for what a merge needs, so that it is merged there."""
        return _where_they_merge(self.vectors[self.recipe, self.seed], resolve_device(self.device))

    @cached_property
    def suite(self) -> AnySuite:
        """With every task's own head, where the suite has such."""
        if not isinstance(self.whole_suite, PairSuite):
            return self.whole_suite
        return self.whole_suite.with_heads(self.vectors.heads(self.recipe, self.seed))

    @property
    def on_test(self) -> dict[str, Any]:
        return {"tangent": self.tangent, "device": self.device, "examples": self.how.test_examples or None}

    def inputs(self, method: str, space: str, options: Options, grid: Grid) -> store.Inputs | None:
        """What decides an entry, lists where the order does, too; None where the caller's own functions do."""
        given = [methods().get(method), known_spaces().get(space)]  # one registered elsewhere is not in the code's hash
        foreign = any(one and not one.function.__module__.startswith("saftnb.") for one in given)
        if self.measure or self.test or foreign:
            return None
        name = f"{self.whole_suite.name}-{method}{'-' * bool(space)}{space}-{self.recipe}-s{self.seed}"
        experts = self.vectors.fingerprints(self.recipe, self.seed)
        return {
            "name": re.sub(r"[^\w.=+-]+", "-", name), "experts": list(experts.items()), "method": method,
            "space": space, "options": dict(options), "grid": list(grid.items()), "how": asdict(self.how),
            "data": {task: one.sha256 for task, one in self.whole_suite.tasks.items()},
            "backbone": self.whole_suite.backbone.sha256, **conditions(self.whole_suite), "torch": torch.__version__,
        }  # fmt: skip

    def unmerged(self) -> Merged:
        """What is no merge: the model before any training, all experts together, each on its own task."""
        start = "no adapter" if isinstance(self.suite, PairSuite) else "zero-shot"
        hits = {
            start: suite_hits(self.suite, **self.on_test),
            "ensemble": ensemble_hits(self.suite, self.experts, **self.on_test),
            "individual": individual_hits(self.suite, self.experts, **self.on_test),
        }
        return Merged(None, hits, {})

    def merged(self, method: str, space: str, options: Options, grid: Grid) -> Merged:
        """One method in one space: its coefficients chosen, and tested."""
        statistics = None
        if methods()[method].needs_statistics:
            experts, count = self.experts, self.how.statistics_pictures
            there = represent({task: vector.dense() for task, vector in experts.items()})
            statistics = suite_statistics(self.suite, experts, method, pictures=count, device=self.device)
        else:
            there = self._represented(space, options)
        if self.how.protocol == "knots" and grid:
            result = coordinate_search(there, method, grid, self.score, progress=self.progress)
        else:
            result = search(there, method, grid, self.score, statistics=statistics, progress=self.progress)
        tested = self.test(result.vector) if self.test else suite_hits(self.suite, result.vector, **self.on_test)
        targeted = {}
        if self.how.targets and grid:
            for task, (_, vector) in per_target(there, method, result, statistics=statistics).items():
                targeted[task] = suite_hits(self.suite, vector, tasks=[task], **self.on_test)[task]
        return Merged(replace(result, vector=None), {method: tested}, targeted)

    def _represented(self, space: str, options: Options) -> Representation:
        if self._there is None or self._there[0] != space:
            self._there = None  # free the old one first
            self._there = space, represent(self.experts, space, **options)
        return self._there[1]

    @cached_property
    def score(self) -> Callable[[TaskVector], Mapping[str, float]]:
        """The score of a merged vector on validation."""
        if self.measure:
            return self.measure
        how: dict[str, Any] = {"tangent": self.tangent, "device": self.device, "examples": self.how.examples or None}
        own = None
        if self.how.protocol == "knots":
            own = accuracies(individual_hits(self.suite, self.experts, split="validation", **how))
        return SuiteAccuracy(self.suite, individual=own, **how)


def _plain(values: Sequence[Any]) -> list[float]:
    """As Python's own numbers, also where NumPy's were given."""
    return [value.item() if hasattr(value, "item") else value for value in values]


def _where_they_merge(experts: dict[str, TaskVector], device: torch.device) -> dict[str, TaskVector]:
    if device.type != "cuda":
        return experts
    dense = sum(delta.numel() for delta in next(iter(experts.values())).values())  # of a merged one
    held = sum(part.nbytes for vector in experts.values() for part in vector.tensors().values())
    free, _ = torch.cuda.mem_get_info(device)
    if 2 * held + 16 * dense > free:
        return experts
    return {task: vector.to(device) for task, vector in experts.items()}


def _check(grids: Mapping[str, Grid], spaces: Mapping[str, Options]) -> None:
    for method, grid in grids.items():
        check_grid(method, grid)
    for space, options in spaces.items():
        if space not in known_spaces():
            raise ValueError(f"there is no merge space {space!r}; allowed are {', '.join(sorted(known_spaces()))}")
        known_spaces()[space].check(dict(options))


def _merges(grids: Mapping[str, Grid], spaces: Mapping[str, Options]) -> Iterator[tuple[str, str, str]]:
    """Every method in every space where it is to be merged: the method, the space in tables, and where it is done."""
    first = next(iter(spaces))
    for space in spaces:
        for method in grids:
            if methods()[method].needs_statistics:
                if space == first:  # in the weights, whatever the spaces are
                    yield method, "weights", "weights"
            elif method not in SAME_IN_EVERY_SPACE or len(spaces) == 1:
                yield method, space, space
            elif space == first:
                yield method, EVERY_SPACE, space
