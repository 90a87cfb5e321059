"""`compare`: the same merge methods on the same experts, coefficients chosen on validation, everything tested."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from saftnb.evaluate import SuiteAccuracy, accuracies, ensemble_hits, individual_hits, suite_hits
from saftnb.finetune import TaskVectors
from saftnb.merging import Representation, methods, represent
from saftnb.merging import spaces as known_spaces
from saftnb.merging.search import Search, check_grid, coordinate_search, per_target, search
from saftnb.merging.spaces import EVERY_SPACE, SAME_IN_EVERY_SPACE
from saftnb.merging.statistics import suite_statistics
from saftnb.scores import score_table
from saftnb.suites import PairSuite, Suite
from saftnb.task_vector import TaskVector

_NAMES = ["model", "space", "recipe", "seed"]
Key = tuple[str, str, str, int]


@dataclass(eq=False)
class Comparison:
    """What `compare` found, by (model, space, recipe, seed).

    The space is "" for what is no merge, and `EVERY_SPACE` for a method that gives the same in all of several.

    Attributes:
        tested: what the test says of each model: hits by task, or what the caller's own `test` returns.
        found: the search of each merge, without its vector (at full size there is no room for them all).
        targeted: the same methods with coefficients chosen for each task alone: hits by task.
    """

    tested: dict[Key, dict] = field(default_factory=dict)
    found: dict[Key, Search] = field(default_factory=dict)
    targeted: dict[Key, dict] = field(default_factory=dict)

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
        return texts.droplevel("space") if self._weights_alone(texts) else texts

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
    suite: Suite | PairSuite,
    vectors: TaskVectors,
    grids: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    spaces: Mapping[str, Mapping[str, object]] | Sequence[str] = ("weights",),
    protocol: str = "saft",
    pictures: int = 0,
    test_pictures: int = 0,
    statistics_pictures: int = 100,
    targets: bool = False,
    measure: Callable[[TaskVector], Mapping[str, float]] | None = None,
    test: Callable[[TaskVector], dict] | None = None,
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
        pictures: validation pictures or pairs a task for that choice; test_pictures: for the test; 0 is all.
        statistics_pictures: training pictures a task for `fisher` and `regmean`.
        targets: also choose coefficients for each task alone, as SAFT's released code does.
        measure, test: in place of the accuracies on the suite's tasks: the score of a merged vector on validation, and
            what to note of it on test. The models that are no merge are then left to the caller.

    Raises:
        ValueError: no such protocol, method, space or hyperparameter; before anything is merged.
    """
    if protocol not in ("saft", "knots"):
        raise ValueError(f"protocol is saft or knots, not {protocol!r}")
    spaces = dict(spaces) if isinstance(spaces, Mapping) else {space: {} for space in spaces}
    _check(grids, spaces)
    found = Comparison()
    for recipe, seed in vectors:
        experts = vectors[recipe, seed]
        own = suite.with_heads(vectors.heads(recipe, seed)) if isinstance(suite, PairSuite) else suite
        how = {"tangent": vectors.plans[recipe].tangent, "device": device}
        on_test = how | {"pictures": test_pictures or None}
        if test is None:
            for model, hits in _unmerged(own, experts, on_test).items():
                found.tested[model, "", recipe, seed] = hits
        score = measure or _score(own, experts, protocol, pictures or None, how)
        for method, space, there in _merges(experts, grids, spaces):
            statistics = None
            if methods()[method].needs_statistics:
                if how["tangent"]:
                    continue  # these statistics are of the plain model
                statistics = suite_statistics(own, experts, method, pictures=statistics_pictures, device=device)
            if protocol == "knots" and grids[method]:
                result = coordinate_search(there, method, grids[method], score, progress=progress)
            else:
                result = search(there, method, grids[method], score, statistics=statistics, progress=progress)
            key = (method, space, recipe, seed)
            found.tested[key] = test(result.vector) if test else suite_hits(own, result.vector, **on_test)
            if targets and grids[method]:
                best = per_target(there, method, result, statistics=statistics)
                found.targeted[key] = {
                    task: suite_hits(own, vector, tasks=[task], **on_test)[task] for task, (_, vector) in best.items()
                }
            found.found[key] = replace(result, vector=None)
    return found


def _check(grids: Mapping[str, Mapping], spaces: Mapping[str, Mapping]) -> None:
    for method, grid in grids.items():
        check_grid(method, grid)
    for space, options in spaces.items():
        if space not in known_spaces():
            raise ValueError(f"there is no merge space {space!r}; allowed are {', '.join(sorted(known_spaces()))}")
        known_spaces()[space].check(dict(options))


def _unmerged(suite, experts: Mapping[str, TaskVector], on_test: dict) -> dict[str, dict]:
    """The hits of what is no merge: the model before any training, all experts together, each on its own task."""
    start = "no adapter" if isinstance(suite, PairSuite) else "zero-shot"
    return {
        start: suite_hits(suite, **on_test),
        "ensemble": ensemble_hits(suite, experts, **on_test),
        "individual": individual_hits(suite, experts, **on_test),
    }


def _score(suite, experts: Mapping[str, TaskVector], protocol: str, pictures: int | None, how: dict) -> SuiteAccuracy:
    own = None
    if protocol == "knots":
        own = accuracies(individual_hits(suite, experts, split="validation", pictures=pictures, **how))
    return SuiteAccuracy(suite, pictures=pictures, individual=own, **how)


def _merges(
    experts: Mapping[str, TaskVector], grids: Mapping[str, Mapping], spaces: Mapping[str, Mapping]
) -> Iterator[tuple[str, str, Representation]]:
    """Every method in every space where it is to be merged, with the experts as they are there."""
    first = next(iter(spaces))
    for space, options in spaces.items():
        there = represent(experts, space, **options)
        for method in grids:
            if methods()[method].needs_statistics:
                if space == first:  # in the weights, whatever the spaces are
                    yield method, "weights", represent({task: vector.dense() for task, vector in experts.items()})
            elif method not in SAME_IN_EVERY_SPACE or len(spaces) == 1:
                yield method, space, there
            elif space == first:
                yield method, EVERY_SPACE, there
