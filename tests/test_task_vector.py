"""TaskVector is a vector space over parameter names, LowRank a matrix that is never formed."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

import saftnb.task_vector
from saftnb.backbones import load_adapter
from saftnb.task_vector import LowRank, TaskVector


def low_rank(rows: int, columns: int, rank: int, seed: int = 0) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rows, rank, generator=g), torch.randn(rank, columns, generator=g))


def vector(seed: int = 0, low: bool = True) -> TaskVector:
    g = torch.Generator().manual_seed(seed)
    deltas = {"bias": torch.randn(3, generator=g), "weight": torch.randn(3, 4, generator=g)}
    return TaskVector(deltas | ({"lora": low_rank(5, 6, 2, seed)} if low else {}))


def same(a: TaskVector, b: TaskVector, **tolerance: float) -> None:
    assert_close(dict(a.dense()), dict(b.dense()), **tolerance)


# LowRank


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_low_rank_arithmetic_is_that_of_the_product(r1: int, r2: int, seed: int) -> None:
    a, b = low_rank(4, 3, r1, seed), low_rank(4, 3, r2, seed + 1)
    x = torch.randn(4, 3)
    for low in (a + b, a - b, -a, 2.5 * a, a * np.float32(2.5), np.float64(2.5) * a, a / 2.5):
        assert isinstance(low, LowRank)
    assert (a + b).B.shape[1] == r1 + r2
    assert_close((a + b).dense(), a.B @ a.A + b.B @ b.A)
    assert_close((a - b).dense(), a.B @ a.A - b.B @ b.A)
    assert_close((-a).dense(), -(a.B @ a.A))
    assert_close((2.5 * a).dense(), 2.5 * (a.B @ a.A))
    assert_close((a / 2.5).dense(), (a.B @ a.A) / 2.5)
    dense = a.dense()
    for mixed, expected in ((a + x, dense + x), (x + a, x + dense), (a - x, dense - x), (x - a, x - dense)):
        assert isinstance(mixed, torch.Tensor)
        assert_close(mixed, expected)


def test_low_rank_knows_its_shape_and_dtype() -> None:
    a = low_rank(4, 3, 2).to(torch.bfloat16)
    assert (a.shape, a.numel(), a.dtype) == (torch.Size([4, 3]), 12, torch.bfloat16)
    assert a.to(torch.float64).dtype == torch.float64
    assert not LowRank(nn.Parameter(torch.ones(2, 1)), torch.ones(1, 2)).B.requires_grad


@pytest.mark.parametrize(
    ("B", "A", "message"),
    [
        (torch.ones(4, 2), torch.ones(3, 4), r"got \(4, 2\) and \(3, 4\)"),
        (torch.ones(4), torch.ones(4), r"LowRank takes B \(O, r\)"),
        (torch.ones(4, 2).double(), torch.ones(2, 3), "float64.*float32"),
        (torch.ones(4, 2).int(), torch.ones(2, 3).int(), "floating-point"),
    ],
)
def test_low_rank_refuses_factors_that_do_not_fit(B: torch.Tensor, A: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRank(B, A)
    with pytest.raises(ValueError, match="cannot add LowRanks"):
        low_rank(2, 3, 1) + low_rank(3, 2, 1)


# the vector space


def test_laws_of_a_vector_space() -> None:
    a, b, c = vector(1), vector(2, low=True), vector(3)
    b = TaskVector(dict(b) | {"lora": torch.randn(5, 6)})  # low-rank here, dense there
    zero = a - a
    same(a + b, b + a)
    same((a + b) + c, a + (b + c), rtol=1e-5, atol=1e-6)
    same(a + zero, a, rtol=1e-5, atol=1e-6)
    same(a - b, a + -b)
    same(2.0 * (a + b), 2.0 * a + b * 2)
    same((0.25 + 0.5) * a, 0.25 * a + 0.5 * a, rtol=1e-5, atol=1e-6)
    same(np.float64(0.5) * a, a / 2)
    same(sum([a, b, c]), a + b + c)


def test_low_rank_survives_arithmetic_among_its_kind() -> None:
    merged = 0.5 * (vector(1) - vector(2)) + vector(3)
    assert isinstance(merged["lora"], LowRank)
    assert merged["lora"].B.shape == (5, 6)  # the ranks 2 add up


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"bias": torch.ones(3)}, "the left task vector has 'weight', the right one has not"),
        ({"bias": torch.ones(3), "weight": torch.ones(3, 4), "z": torch.ones(1)}, "the right one has 'z'"),
        ({"bias": torch.ones(1), "weight": torch.ones(3, 4)}, r"'bias' is \(3,\) in the left .* and \(1,\)"),
    ],
)
def test_unequal_parameters_do_not_add_or_broadcast(other: dict, message: str) -> None:
    for operation in (lambda a, b: a + b, lambda a, b: a - b):
        with pytest.raises(ValueError, match=message):
            operation(vector(low=False), TaskVector(other))


def test_only_task_vectors_and_numbers_take_part() -> None:
    for wrong in (lambda v: v + 1, lambda v: v * v, lambda v: v * torch.ones(2), lambda v: 1 + v):
        with pytest.raises(TypeError):
            wrong(vector())


def test_a_task_vector_is_a_read_only_mapping_of_floating_tensors() -> None:
    source = {"w": nn.Parameter(torch.ones(2))}
    v = TaskVector(source)
    source["x"] = torch.ones(1)
    assert list(v) == ["w"]
    assert not v["w"].requires_grad
    with pytest.raises(TypeError):
        v["w"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"'w' must be .*int64"):
        TaskVector({"w": torch.arange(2)})
    with pytest.raises(ValueError, match=r"'w' must be .*list"):
        TaskVector({"w": [1.0]})
    with pytest.raises(ValueError, match="names are strings"):
        TaskVector({1: torch.ones(1)})
    assert v == v
    assert v != TaskVector(source)
    assert "1 parameters, 0 low-rank, 2 entries, float32" in repr(v)


def test_norm_and_numel_count_low_rank_deltas_as_their_products() -> None:
    v = vector()
    flat = torch.cat([delta.flatten() for delta in v.dense().values()])
    assert v.numel() == len(flat) == 3 + 12 + 30
    assert v.norm() == pytest.approx(float(flat.double().norm()), rel=1e-6)
    assert TaskVector({}).norm() == 0


def test_to_moves_every_tensor() -> None:
    assert {delta.dtype for delta in vector().to(torch.float64).values()} == {torch.float64}


# models


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)


def test_between_and_apply_to_are_inverse() -> None:
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    tuned = copy.deepcopy(base)
    for p in tuned.parameters():
        p.data += torch.randint(-8, 8, p.shape) / 8
    tuned[1].running_mean += 1
    with pytest.warns(UserWarning, match="statistics are no weights, the base's stay: '1.running_mean'$"):
        delta = TaskVector.between(base.state_dict(), tuned.state_dict())
    assert set(delta) == set(dict(base.named_parameters())) == set(TaskVector.between(base, tuned))
    assert delta.apply_to(base) is base
    assert_close(dict(base.named_parameters()), dict(tuned.named_parameters()))
    assert base[1].running_mean.eq(0).all()
    assert all(p.requires_grad for p in base.parameters())


def test_between_refuses_state_dicts_of_different_models() -> None:
    base = {"w": torch.ones(2), "count": torch.tensor(3)}
    for tuned, message in (
        ({"w": torch.ones(2)}, "base has 'count', tuned has not"),
        ({"w": torch.ones(1), "count": torch.tensor(3)}, r"'w' is \(2,\) in base"),
        ({"w": torch.ones(2), "count": torch.tensor(4)}, "'count' is not a floating tensor and differs"),
        ({"w": torch.ones(2), "count": torch.tensor(3.0)}, "'count' is not a floating tensor and differs"),
    ):
        with pytest.raises(ValueError, match=message):
            TaskVector.between(base, tuned)


def test_between_counts_tied_weights_once_and_names_what_is_not_finite() -> None:
    base = Tied()
    tuned = copy.deepcopy(base)
    tuned.embed.weight.data += 1
    delta = TaskVector.between(base.state_dict(), tuned.state_dict())
    assert [name for name in delta if "norm" not in name] == ["embed.weight"]
    same(delta, TaskVector.between(base, tuned), rtol=0, atol=0)
    assert_close(delta.apply_to(base).head.weight, tuned.head.weight)
    apart = {name: value.clone() for name, value in tuned.state_dict().items()}
    apart["head.weight"] += 1
    with pytest.raises(ValueError, match=r"'embed.weight' and 'head.weight' are one weight in base, and differ"):
        TaskVector.between(base.state_dict(), apart)
    views = torch.zeros(4, 3)  # parts of one tensor are no tied weights
    assert len(TaskVector.between({"a": views[:2], "b": views[2:]}, {"a": torch.ones(2, 3), "b": views[2:]})) == 2
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="'w' of tuned has NaN or infinite values"):
            TaskVector.between({"w": torch.ones(2)}, {"w": torch.tensor([1.0, value])})


def test_tied_weights_are_changed_once() -> None:
    model = Tied()
    before = model.embed.weight.detach().clone()
    delta = torch.randn(4, 3)
    TaskVector({"embed.weight": delta, "head.weight": delta.clone()}).apply_to(model)
    assert_close(model.embed.weight.detach(), before + delta)
    with pytest.raises(ValueError, match=r"'embed.weight' and 'head.weight' are one parameter"):
        TaskVector({"embed.weight": delta, "head.weight": 2 * delta}).apply_to(model)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nowhere": torch.ones(1)}, "Linear has no parameter 'nowhere'"),
        ({"bias": torch.ones(1)}, r"'bias' is \(3,\) torch.float32 in the model, \(1,\)"),
    ],
)
def test_apply_to_changes_nothing_unless_all_fits(wrong: dict, message: str) -> None:
    model = nn.Linear(4, 3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        TaskVector({"weight": torch.ones(3, 4)} | wrong).apply_to(model)
    assert_close(model.state_dict(), before)


def test_apply_to_rounds_once_into_a_half_precision_model() -> None:
    model = nn.Linear(2, 2, bias=False).half()
    model.weight.data.fill_(1.0)
    delta = torch.full((2, 2), 2**-11 + 2**-23)  # rounded to half before it is added, it would vanish
    TaskVector({"weight": delta}).apply_to(model)
    assert_close(model.weight.detach(), torch.full((2, 2), 1 + 2**-10).half(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_apply_to_refuses_a_sum_that_overflows_and_changes_nothing(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2).to(dtype)
    model.weight.data.fill_(torch.finfo(dtype).max)
    before = copy.deepcopy(model.state_dict())
    large = torch.full((2, 2), torch.finfo(dtype).max / 4)
    with pytest.raises(ValueError, match="'weight' plus its delta overflows the model's torch"):
        TaskVector({"bias": torch.ones(2), "weight": large}).apply_to(model)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    TaskVector({"weight": -large}).apply_to(model)
    assert model.weight.isfinite().all()
    factors = LowRank(torch.full((2, 1), 200.0, dtype=dtype), torch.full((1, 2), 1.01, dtype=dtype))
    small = nn.Linear(2, 2, bias=False).to(dtype)
    small.weight.data.zero_()
    TaskVector({"weight": factors}).apply_to(small)  # the product is formed in float32, too
    assert torch.equal(small.weight, (factors.B.float() @ factors.A.float()).to(dtype))


@pytest.mark.parametrize("scalar", [float("nan"), float("inf"), np.float64("nan"), 10**400])
def test_only_finite_numbers_multiply(scalar: float) -> None:
    for value in (vector(), low_rank(3, 4, 2)):
        with pytest.raises(ValueError, match="finite numbers alone, not by"):
            scalar * value
        with pytest.raises(ValueError, match="finite numbers alone, not by"):
            value * scalar
        with pytest.raises(ValueError, match="finite numbers alone, not by"):
            value / scalar


def test_float8_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="'w' is torch.float8_e4m3fn, which PyTorch cannot add: convert it"):
        TaskVector({"w": torch.ones(2).to(torch.float8_e4m3fn)})
    eighths = {"w": torch.ones(2).to(torch.float8_e4m3fn)}
    with pytest.raises(ValueError, match="'w' of base is torch.float8_e4m3fn, which PyTorch cannot add"):
        TaskVector.between(eighths, eighths)
    model = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(model.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="the model's 'weight' is torch.float8_e4m3fn"):
        TaskVector({"weight": torch.ones(2, 2)}).apply_to(model)


# files


def test_a_file_holds_every_delta_exactly(tmp_path) -> None:
    flat = torch.randn(12)
    v = TaskVector(
        {
            "view": flat[2:6],
            "twin": flat[2:6],
            "transposed": flat.view(3, 4).T,
            "half": torch.randn(2).to(torch.bfloat16),
            "double": torch.tensor(1 / 3, dtype=torch.float64),
            "lora": low_rank(3, 2, 1).to(torch.float16),
            "::B": torch.ones(1),
        }
    )
    path = tmp_path / "v.safetensors"
    with pytest.raises(ValueError, match="cannot save '::B'"):
        v.save(path)
    assert not list(tmp_path.iterdir())
    v = TaskVector({name: delta for name, delta in v.items() if name != "::B"})
    v.save(str(path))
    loaded = TaskVector.load(path)
    assert set(loaded) == set(v)
    assert isinstance(loaded["lora"], LowRank)
    assert torch.equal(loaded["lora"].B, v["lora"].B)
    same(loaded, v, rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == [path]


def _half_a_file(tensors, filename, metadata=None):
    save_file(tensors, filename, metadata)
    os.truncate(filename, os.path.getsize(filename) // 2)
    raise OSError("no space left on device")


@pytest.mark.parametrize("moment", ["writing", "syncing", "renaming"])
def test_an_interrupted_save_leaves_the_old_file_whole(tmp_path, monkeypatch, moment: str) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "v.safetensors"
    vector(1).save(path)
    if moment == "writing":
        monkeypatch.setattr(saftnb.task_vector, "save_file", _half_a_file)
    else:
        monkeypatch.setattr(os, {"syncing": "fsync", "renaming": "replace"}[moment], fail)
    with pytest.raises((OSError, KeyboardInterrupt)):
        vector(2).save(path)
    monkeypatch.undo()
    same(TaskVector.load(path), vector(1), rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_appears_whole_after_a_sync(tmp_path, monkeypatch) -> None:
    path, seen = tmp_path / "v.safetensors", []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append("sync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append("rename"), replace(a, b)))
    vector().save(path)
    assert seen == ["sync", "rename", "sync"]


def test_foreign_and_broken_files_are_refused_in_one_line(tmp_path) -> None:
    foreign, broken = tmp_path / "foreign.safetensors", tmp_path / "broken.safetensors"
    save_file({"w": torch.ones(2)}, foreign, metadata={"format": "pt"})
    vector().save(broken)
    os.truncate(broken, 40)
    expected = {foreign: "is not a task vector, version 1", broken: "is not a whole safetensors file"}
    for path, message in expected.items():
        with pytest.raises(ValueError, match=message) as caught:
            TaskVector.load(path)
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)
    with pytest.raises(FileNotFoundError):
        TaskVector.load(tmp_path / "absent")


def test_a_flipped_bit_is_found(tmp_path) -> None:
    path = tmp_path / "v.safetensors"
    vector().save(path)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in (start, (start + len(whole)) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="is damaged: its values do not match the checksum"):
            TaskVector.load(path)
    path.write_bytes(whole)
    same(TaskVector.load(path), vector(), rtol=0, atol=0)


def test_files_from_before_the_checksum_still_load(tmp_path) -> None:
    path, low = tmp_path / "v.safetensors", low_rank(3, 2, 1)
    tensors = {"w": torch.ones(2), "low::B": low.B, "low::A": low.A}
    save_file(tensors, path, metadata={"saftnb": "task vector, version 1"})
    same(TaskVector.load(path), TaskVector({"w": torch.ones(2), "low": low}), rtol=0, atol=0)


def test_entries_that_share_a_tensor_save_and_become_an_adapter(tmp_path) -> None:
    """Adapters of q and k with one A; and two names for one tensor."""
    one, two = low_rank(3, 4, 2, 0), low_rank(5, 4, 2, 1)
    shared = TaskVector({"q.weight": one, "k.weight": LowRank(two.B, one.A)})
    shared.save(tmp_path / "v.safetensors")
    loaded = TaskVector.load(tmp_path / "v.safetensors")
    same(loaded, shared, rtol=0, atol=0)
    same(load_adapter(shared.to_adapter(tmp_path / "adapter")), shared, rtol=0, atol=0)
    twins = TaskVector({"a": one.B, "b": one.B, "c": one.B[1:]})
    twins.save(tmp_path / "twins.safetensors")
    same(TaskVector.load(tmp_path / "twins.safetensors"), twins, rtol=0, atol=0)


def test_equal_task_vectors_give_equal_files(tmp_path) -> None:
    vector = TaskVector({name: torch.ones(3) for name in "cab"} | {"low": LowRank(torch.ones(4, 1), torch.ones(1, 2))})
    for i in range(8):
        TaskVector(dict(vector)).save(tmp_path / f"{i}.safetensors")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("value", [2e38, -2e38])
def test_apply_to_refuses_what_overflows_float32_however_it_is_kept(value: float) -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data.fill_(value)
    wide = torch.full((2, 2), 10 * value, dtype=torch.float64)
    column, row = torch.full((2, 1), 1e30), torch.full((1, 2), 1e30)
    twice = LowRank(torch.cat([column, column], dim=1), torch.cat([row, -row]))  # inf − inf
    for delta in (torch.full((2, 2), value), wide, LowRank(column, row), twice):
        with pytest.raises(ValueError, match="'weight' (plus its delta overflows|has NaN or infinite values)"):
            TaskVector({"weight": delta}).apply_to(model)
        assert (model.weight == value).all()
    kept = LowRank(column, torch.full((1, 2), 1e-30))  # large factors of a small product are none of it
    assert TaskVector({"weight": kept}).apply_to(nn.Linear(2, 2, bias=False)).weight.isfinite().all()


def test_parameters_of_one_memory_are_changed_once() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "ab"})
    model["b"].weight = nn.Parameter(model["a"].weight.data)
    before = model["a"].weight.detach().clone()
    TaskVector({"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)}).apply_to(model)
    assert_close(model["a"].weight.detach(), before + 1)


def test_what_has_no_values_is_refused() -> None:
    empty, ones = nn.Linear(2, 2, device="meta"), torch.ones(2, 2)
    for delta, model in ((ones, empty), (ones.to("meta"), nn.Linear(2, 2))):
        with pytest.raises(ValueError, match="^'weight' lies on meta"):
            TaskVector({"weight": delta}).apply_to(model)


def test_the_one_name_that_safetensors_cannot_hold_is_not_saved(tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot save '__metadata__'"):
        TaskVector({"__metadata__": torch.ones(2)}).save(tmp_path / "v.safetensors")
    assert not list(tmp_path.iterdir())
