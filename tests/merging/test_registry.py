"""A method's signature is its schema; every error is one line that names what is allowed."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated

import numpy as np
import pytest
import torch

from saftnb.delta import is_finite
from saftnb.merging import LowRank, TaskVector, merge, methods, registry
from saftnb.merging.registry import Hyperparameter, Range


def vector(*values: float, **more: torch.Tensor) -> TaskVector:
    return TaskVector({"w": torch.tensor(values or (1.0, -2.0))} | more)


def refused(message: str, *arguments, **keywords) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        merge(*arguments, **keywords)
    assert "\n" not in str(caught.value)


def statistics_for(method: str, vectors: list[TaskVector]) -> dict:
    """What a method needs beside the vectors, if anything."""
    if not methods()[method].needs_statistics:
        return {}
    if method == "regmean":
        return {"statistics": [{n: torch.eye(d.shape[1]) for n, d in v.items() if d.ndim == 2} for v in vectors]}
    return {"statistics": [{n: torch.ones(d.shape) for n, d in v.items()} for v in vectors]}


def test_the_methods_and_their_schemas() -> None:
    assert {name: list(m.hyperparameters) for name, m in methods().items()} == {
        "average": [],
        "task_arithmetic": ["scale"],
        "ties": ["keep", "scale", "aggregate"],
        "dare_task_arithmetic": ["drop", "seed", "scale"],
        "dare_ties": ["drop", "seed", "keep", "scale", "aggregate"],
        "fisher": ["normalize"],
        "regmean": ["off_diagonal"],
        "iso_c": ["scale"],
        "iso_cts": ["common", "scale"],
        "tsv_m": ["scale"],
    }
    assert str(methods()["ties"]) == (
        "ties(keep: number in (0, 1], default 0.2; scale: number, default 1.0; "
        "aggregate: 'mean' or 'sum', default 'mean')"
    )
    methods().clear()
    assert "ties" in methods()


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    refused("no merge method 'tie'; allowed are average, dare_task_arithmetic, dare_ties, fisher, ", [vector()], "tie")
    refused("no merge space 'knot'; allowed are core, knots, weights", [vector()], "ties", space="knot")
    unknown = r"ties has no hyperparameter 'lambda_'; allowed are keep: number in \(0, 1\]"
    refused(unknown, [vector()], "ties", lambda_=1)
    refused("average has no hyperparameter 'scale'; allowed are none", [vector()], "average", scale=1.0)


@pytest.mark.parametrize("keep", [0, 0.0, -0.1, 1.0001, np.nan, np.inf, True, "0.2", None, 20, 0.2j, [0.2]])
def test_keep_is_a_number_above_0_up_to_1(keep: object) -> None:
    message = r"ties: keep = .* is not allowed \(keep: number in \(0, 1\], default 0.2\)"
    refused(message, [vector()], "ties", keep=keep)


beyond_floats = pytest.param(10**400, id="10**400")


@pytest.mark.parametrize("scale", [np.float32("nan"), np.inf, -np.inf, False, np.True_, "1", beyond_floats])
def test_scale_is_a_finite_number(scale: object) -> None:
    refused("task_arithmetic: scale = .* is not allowed", [vector()], "task_arithmetic", scale=scale)


@pytest.mark.parametrize("aggregate", ["max", "", None, 0, True])
def test_aggregate_is_one_of_two_words(aggregate: object) -> None:
    refused("aggregate: 'mean' or 'sum', default 'mean'", [vector()], "ties", aggregate=aggregate)


@pytest.mark.parametrize("scale", [2, np.float32(2), np.float64(2), np.int64(2), Fraction(2), -2.0, 0])
def test_every_kind_of_real_number_is_a_number(scale: object) -> None:
    merged = merge([vector(1.0, -2.0)], "task_arithmetic", scale=scale)
    assert merged["w"].tolist() == [float(scale), -2 * float(scale)]
    assert merged["w"].dtype == torch.float32


def test_vectors_must_fit_together() -> None:
    refused("needs at least one task vector", [], "average")
    refused("got one TaskVector", vector(), "average")
    refused("item 1 is a dict", [vector(), {"w": torch.ones(2)}], "average")
    refused("vector 2 has 'x', vector 0 has not", [vector(), vector(), vector(x=torch.ones(1))], "ties")
    refused("vector 0 has 'x', vector 1 has not", [vector(x=torch.ones(1)), vector()], "ties")
    refused(r"'w' is \(2,\) in vector 0 and \(1,\) in vector 1", [vector(), vector(1.0)], "average")
    meta = TaskVector({"w": torch.ones(2, device="meta")})
    with pytest.raises(ValueError, match="lie on cpu and meta: move them to one device"):
        merge([vector(), meta], "average")


@pytest.mark.parametrize("method", sorted(methods()))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_values_never_vanish(method: str, bad: float) -> None:
    rest = {"x": torch.tensor([0.0, bad]), "y": LowRank(torch.ones(2, 1), torch.ones(1, 2))}
    fine = vector(x=torch.zeros(2), y=rest["y"])
    refused("vector 1 has NaN or infinite values in 'x'", [fine, vector(**rest)], method)
    lora = LowRank(torch.ones(2, 1), torch.tensor([[bad, 0.0]]))
    refused("vector 1 has NaN or infinite values in 'y'", [fine, vector(x=torch.zeros(2), y=lora)], method)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_large_values_are_finite_and_no_others_pass_for_it(bad: float) -> None:
    row, ones = torch.tensor([[0.0, bad]]), torch.ones(1, 2)
    assert not any(map(is_finite, (row, LowRank(ones.T, row), LowRank(row.T, ones))))
    big = torch.full((3,), 60000.0, dtype=torch.float16)
    assert all(map(is_finite, (big, -big, torch.empty(0), LowRank(ones.T, ones))))


def test_an_overflow_is_an_error() -> None:
    half = TaskVector({"w": torch.tensor([40000.0, 1.0], dtype=torch.float16)})
    refused("the merged 'w' overflows torch.float16; use a smaller scale", [half, half], "task_arithmetic")
    assert merge([half, half], "average")["w"].tolist() == [40000.0, 1.0]  # though their sum overflows


def test_inputs_are_left_as_they_are() -> None:
    vectors = [vector(1.0, -2.0, 3.0), vector(0.5, 2.0, -1.0)]
    for name in methods():
        merged = merge(vectors, name, **statistics_for(name, vectors))
        merged["w"].fill_(7.0)
    merge(vectors[:1], "average")["w"].fill_(7.0)
    assert vectors[0]["w"].tolist() == [1.0, -2.0, 3.0]
    assert vectors[1]["w"].tolist() == [0.5, 2.0, -1.0]


def test_no_parameters_merge_to_none() -> None:
    for name in methods():
        for vectors in ([TaskVector({})], [TaskVector({"w": torch.empty(0, 3)})] * 2):
            merged = merge(vectors, name, **statistics_for(name, vectors))
            assert {n: d.shape for n, d in merged.items()} == {n: d.shape for n, d in vectors[0].items()}


@pytest.fixture
def empty_registry(monkeypatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", {})


@pytest.mark.usefixtures("empty_registry")
def test_any_function_can_be_a_method() -> None:
    @registry.method
    def pick(
        vectors,
        *,
        index: Annotated[int, Range(0)],
        flip: bool = False,
        rate: Annotated[float, Range(0, 1, open_high=True)] = 0.0,
    ) -> TaskVector:
        assert (type(index), type(flip), type(rate)) == (int, bool, float)
        return -vectors[index] if flip else vectors[index]

    vectors = [vector(1.0), vector(2.0)]
    assert merge(vectors, "pick", index=np.int64(1), flip=True, rate=0)["w"].tolist() == [-2.0]
    refused(r"pick needs the hyperparameter index: integer in \[0, inf\)", vectors, "pick")
    refused("flip = 1 is not allowed", vectors, "pick", index=0, flip=1)
    refused("index = 0.0 is not allowed", vectors, "pick", index=0.0)
    refused("index = -1 is not allowed", vectors, "pick", index=-1)
    refused(r"rate = 1 is not allowed \(rate: number in \[0, 1\), default", vectors, "pick", index=0, rate=1)


@pytest.mark.usefixtures("empty_registry")
@pytest.mark.parametrize("annotation", [str, list, Annotated[str, Range()], dict[str, int]])
def test_a_signature_that_says_nothing_is_refused_at_once(annotation: object) -> None:
    def vague(vectors, *, how): ...

    vague.__annotations__["how"] = annotation
    with pytest.raises(TypeError, match="hyperparameter how"):
        registry.method(vague)


def test_a_default_is_checked_like_any_other_value() -> None:
    for name, method in methods().items():
        assert method.check({}).keys() == method.hyperparameters.keys(), name
    words = Hyperparameter("words", str, ("a", "b"), "c")
    with pytest.raises(ValueError, match="words = 'c' is not allowed"):
        words.check(words.default)
