"""`compare` against the loops that it stands for, on the thimble suites."""

import dataclasses

import numpy as np
import pytest
import torch

import saftnb as sn
from saftnb.analysis import comparison, kept_merges
from saftnb.evaluate import SuiteAccuracy, accuracies, individual_hits, suite_hits
from saftnb.finetune import store
from saftnb.merging import merge, registry, represent
from saftnb.merging.bases import EVERY_SPACE, SAME_IN_EVERY_SPACE
from saftnb.merging.grid_search import coordinate_search, per_target, search
from saftnb.merging.statistics import fisher_diagonal, gram_matrices, suite_statistics

GRIDS = {
    "average": {},
    "task_arithmetic": {"scale": [0.2, 0.6]},
    "ties": {"scale": [0.5, 1.0], "keep": [0.2, 1.0]},
    "regmean": {},
}


@pytest.fixture(scope="module")
def bench():
    return sn.load_suite("thimble")


@pytest.fixture(scope="module")
def lora(bench, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFTNB_STORE", str(tmp_path_factory.mktemp("store")))
        plans = {"lora": sn.recipe("lora", bench).shortened(4)}
        yield sn.TaskVectors(bench, plans, [0], device="cpu", progress=False)


def equal(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[task], theirs[task]) for task in ours)


def test_it_does_what_the_loops_do(bench, lora):
    found = sn.compare(
        bench, lora, GRIDS, spaces=("weights", "knots"), protocol="knots", examples=20, statistics_pictures=10,
        targets=True, device="cpu", progress=False,
    )  # fmt: skip
    alone = [("zero-shot", ""), ("ensemble", ""), ("individual", "")]
    in_all = [("average", EVERY_SPACE), ("task_arithmetic", EVERY_SPACE)]
    expected = [*alone, *in_all, ("ties", "weights"), ("regmean", "weights"), ("ties", "knots")]
    assert [key[:2] for key in found.tested] == expected
    experts = lora["lora", 0]
    own = accuracies(individual_hits(bench, experts, split="validation", examples=20, device="cpu"))
    score = SuiteAccuracy(bench, examples=20, individual=own, device="cpu")
    slow = coordinate_search(represent(experts, "knots"), "ties", GRIDS["ties"], score, progress=False)
    key = ("ties", "knots", "lora", 0)
    assert found.found[key].best == slow.best
    assert found.found[key].vector is None
    assert equal(found.tested[key], suite_hits(bench, slow.vector, device="cpu"))
    assert found.found[key].curve.equals(slow.curve)  # normalised scores, coordinate by coordinate
    there = represent(experts, "knots")
    for task, (_, vector) in per_target(there, "ties", slow).items():
        assert torch.equal(found.targeted[key][task], suite_hits(bench, vector, tasks=[task], device="cpu")[task])
    grams = [
        gram_matrices(bench.classifier(task, bench.tower(vector)), bench.tasks[task].train[:10].images, device="cpu")
        for task, vector in experts.items()
    ]
    merged = merge([v.dense() for v in experts.values()], "regmean",
                   statistics=[{n: g for n, g in one.items() if n in experts["digits"]} for one in grams])  # fmt: skip
    assert equal(found.tested["regmean", "weights", "lora", 0], suite_hits(bench, merged, device="cpu"))
    assert {key[0] for key in found.targeted} == {"task_arithmetic", "ties"}
    table = found.scores()
    assert table.index.names == ["model", "space", "recipe", "seed"]
    assert found.scores("normalised").xs("individual")["mean"].unique() == pytest.approx([100])
    assert found.chosen().loc[("ties", "knots"), "lora"] == str(slow)
    curves = found.curves(["ties"])
    assert set(curves["method"]) == {"ties"}
    assert curves["chosen"].sum() == 2  # one a space


def test_a_comparison_that_breaks_off_goes_on_where_it_was(bench, lora, tmp_path, monkeypatch):
    """Stopped in the third merge; the rest is all that the second run does, and the third does nothing."""
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path))
    how = {"spaces": ("weights", "knots"), "targets": True, "statistics_pictures": 10, "examples": 20, "device": "cpu"}
    done, real = [], comparison._Job.merged

    def merged(self, method, *rest):
        if len(done) == 2 and method == "ties" and stop:
            raise KeyboardInterrupt
        done.append(method)
        return real(self, method, *rest)

    monkeypatch.setattr(comparison._Job, "merged", merged)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        sn.compare(bench, lora, GRIDS, progress=False, **how)
    assert done == ["average", "task_arithmetic"]
    stop = False
    first = sn.compare(bench, lora, GRIDS, progress=False, **how)
    assert done == ["average", "task_arithmetic", "ties", "regmean", "ties"]
    monkeypatch.setattr(comparison, "suite_hits", None)  # nothing is merged or evaluated any more
    monkeypatch.setattr(comparison, "represent", None)
    again = sn.compare(bench, lora, GRIDS, progress=False, **how)
    assert again.scores().equals(first.scores())
    assert again.curves().equals(first.curves())
    assert again.chosen().equals(first.chosen())
    assert all(equal(again.targeted[key], first.targeted[key]) for key in first.targeted)
    part = sn.compare(bench, lora, {"ties": GRIDS["ties"]}, progress=False, **how)  # a part of it, by method
    assert part.found["ties", "knots", "lora", 0].best == first.found["ties", "knots", "lora", 0].best
    with pytest.raises(TypeError):  # other pictures are another question
        sn.compare(bench, lora, GRIDS, progress=False, **how | {"examples": 19})


def test_what_decides_a_merge_is_in_its_key(bench, lora):
    """Order of the grid, the data that are measured, precision, numbers of NumPy's, and methods of the caller's own."""

    def inputs(suite=bench, method="ties", grid=GRIDS["ties"]):
        how = comparison._How("knots", 0, 0, 0, False, "cpu")
        return comparison._Job(suite, lora, "lora", 0, how, "cpu", False, None, None).inputs(
            method, "weights", {}, grid
        )

    key = store.fingerprint(inputs())
    turned = dict(reversed(GRIDS["ties"].items()))
    dealt, half = sn.load_suite("thimble", split=1), sn.load_suite("thimble", precision="bf16")
    others = [inputs(grid=turned), inputs(suite=dealt), inputs(suite=half), inputs(method="average", grid={})]
    assert len({key, *(store.fingerprint(one) for one in others)}) == 5
    assert store.fingerprint(inputs()) == key
    registry._METHODS["mine"] = dataclasses.replace(registry.methods()["average"], function=lambda vectors: vectors[0])
    try:
        assert inputs(method="mine", grid={}) is None
    finally:
        del registry._METHODS["mine"]


def test_grids_may_be_of_numpy(bench, lora, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path))
    how = {"device": "cpu", "examples": 10, "progress": False}
    ours = sn.compare(bench, lora, {"task_arithmetic": {"scale": np.array([0.2, 0.5])}}, **how)
    theirs = sn.compare(bench, lora, {"task_arithmetic": {"scale": [0.2, 0.5]}}, **how)
    assert ours.scores().equals(theirs.scores())


def test_another_code_of_the_library_is_another_entry(bench, lora, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path))
    how = {"device": "cpu", "examples": 10, "progress": False}
    sn.compare(bench, lora, {"average": {}}, **how)
    known = set(tmp_path.iterdir())
    sn.compare(bench, lora, {"average": {}}, **how)
    assert set(tmp_path.iterdir()) == known
    monkeypatch.setattr(kept_merges, "CODE", "other")
    sn.compare(bench, lora, {"average": {}}, **how)
    assert len(set(tmp_path.iterdir()) - known) == 2  # the merge, and what is no merge


def test_the_plain_protocol_tries_every_combination(bench, lora):
    grids = {"ties": GRIDS["ties"]}
    found = sn.compare(bench, lora, grids, examples=20, test_examples=15, device="cpu", progress=False)
    slow = search(
        lora["lora", 0], "ties", grids["ties"], SuiteAccuracy(bench, examples=20, device="cpu"), progress=False
    )
    ((key, result),) = found.found.items()
    assert key == ("ties", "weights", "lora", 0)
    assert result.curve.equals(slow.curve)
    assert len(result.curve) == 4
    assert len(found.tested[key]["digits"]) == 15
    assert found.scores().index.names == ["model", "recipe", "seed"]  # no space where there is one


def test_another_measure_takes_the_place_of_the_accuracies(bench, lora):
    seen = []
    found = sn.compare(
        bench, lora, {"task_arithmetic": {"scale": [0.5, 1.0]}}, measure=lambda v: {"size": -float(v.norm())},
        test=lambda v: seen.append(v) or {"norm": float(v.norm())}, device="cpu", progress=False,
    )  # fmt: skip
    assert list(found.tested) == [("task_arithmetic", "weights", "lora", 0)]
    assert found.found["task_arithmetic", "weights", "lora", 0].best == {"scale": 0.5}
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"protocol": "best"}, "protocol is saft or knots, not 'best'"),
        ({"spaces": ("weights", "svd")}, "there is no merge space 'svd'"),
        ({"spaces": {"knots": {"cut": 1}}}, "knots has no hyperparameter 'cut'"),
        ({"grids": {"tie": {}}}, "there is no merge method 'tie'"),
        ({"grids": {"ties": {"scales": [1.0]}}}, "ties has no hyperparameter 'scales'"),
    ],
)
def test_mistakes_are_named_before_any_work(bench, change, words):
    class Untouched(dict):
        def __iter__(self):
            raise AssertionError("work has begun")

    given = {"grids": {"average": {}}} | change
    with pytest.raises(ValueError, match=words):
        sn.compare(bench, Untouched(), given.pop("grids"), **given)


@pytest.mark.parametrize("method", sorted(SAME_IN_EVERY_SPACE))
@pytest.mark.parametrize("space", ["knots", "core"])
def test_to_these_methods_a_space_makes_no_difference(lora, method, space):
    options = {} if method == "average" else {"scale": 0.5}
    plain = merge(lora["lora", 0], method, **options).dense()
    there = merge(lora["lora", 0], method, space=space, **options).dense()
    assert (there - plain).norm() < 1e-4 * plain.norm()


def test_statistics_by_task_are_those_of_its_own_model(bench, lora):
    experts = lora["lora", 0]
    found = suite_statistics(bench, experts, "fisher", pictures=5, device="cpu")
    assert list(found) == list(experts)
    model = bench.classifier("digits", bench.tower(experts["digits"]))
    slow = fisher_diagonal(model, bench.tasks["digits"].train[:5].images, device="cpu")
    assert found["digits"].keys() == experts["digits"].keys()
    assert all(torch.equal(found["digits"][name], slow[name]) for name in found["digits"])
    with pytest.raises(ValueError, match="method is fisher or regmean, not 'ties'"):
        sn.statistics(bench, experts, "ties")


def test_where_nothing_was_searched_it_says_so(bench, lora):
    found = sn.compare(bench, lora, {"average": {}}, examples=5, test_examples=5, device="cpu", progress=False)
    assert len(found.scores()) == 4
    with pytest.raises(ValueError, match="no coefficient was searched for any of these methods"):
        found.chosen()
    with pytest.raises(ValueError, match="no coefficient was searched for ties"):
        found.curves(["ties"])
