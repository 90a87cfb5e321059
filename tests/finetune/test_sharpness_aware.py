"""SharpnessAware against loops over scalars, and the properties that its formulas promise."""

import copy
import io
import math
import weakref

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saftnb.finetune.sharpness_aware import SharpnessAware, ascent_step

pytestmark = pytest.mark.filterwarnings("error")
KINDS = ("sam", "asam", "asam-kwon")
kinds = pytest.mark.parametrize("kind", KINDS)
prop = settings(deadline=None, max_examples=60, derandomize=True)

BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def net(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    width = 3 + seed % 3
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.LayerNorm(width), nn.Linear(width, 2)).to(dtype)


def batch(seed=0, n=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=g, dtype=dtype), torch.randn(n, 2, generator=g, dtype=dtype)


def closure_of(model, optimizer, data, seen=None, **zero):
    """The usual closure; `seen` collects copies of the weights at every call."""

    def closure():
        if seen is not None:
            seen.append(clones(model))
        optimizer.zero_grad(**zero)
        loss = (model(data[0]) - data[1]).square().mean()
        loss.backward()
        return loss

    return closure


def clones(model):
    return [p.detach().clone() for p in model.parameters()]


def same_bits(left, right):
    """Equal to the bit, the sign of zero included; torch.equal has 0.0 == -0.0."""
    return len(left) == len(right) and all(
        a.dtype == b.dtype and a.detach().numpy().tobytes() == b.detach().numpy().tobytes()
        for a, b in zip(left, right, strict=True)
    )


def assert_close(left, right, **tolerance):
    torch.testing.assert_close(list(left), list(right), **tolerance)


def slow_eps(rows, kind, rho):
    """The three papers' formulas, one scalar at a time: [(name, [(w, g), ...]), ...] to [[ε, ...], ...]."""
    total = 0.0
    for name, entries in rows:
        for w, g in entries:
            if kind == "sam":
                total += g**2
            elif kind == "asam":
                total += (abs(w) * g) ** 2
            elif "weight" in name:
                total += ((abs(w) + 0.01) * g) ** 2
            else:
                total += g**2
    norm, eps = math.sqrt(total), []
    for name, entries in rows:
        if kind == "sam":
            eps.append([rho * g / (norm + 1e-12) for _, g in entries])
        elif kind == "asam":
            eps.append([rho * w**2 * g / (norm + 1e-12) for w, g in entries])
        elif "weight" in name:
            eps.append([rho * (abs(w) + 0.01) ** 2 * g / (norm + 1e-16) for w, g in entries])
        else:
            eps.append([rho * g / (norm + 1e-16) for _, g in entries])
    return eps


def rows_of(named):
    """What `slow_eps` reads, from named parameters with gradients."""
    return [(n, list(zip(p.flatten().tolist(), p.grad.flatten().tolist(), strict=True))) for n, p in named]


def slow_step(model, base, data, kind, rho, clip_second=None):
    """One step by hand: gradient, ε, gradient at w + ε, weights back, base optimizer. Returns both losses."""
    params, closure = list(model.parameters()), closure_of(model, base, data)
    first, old = closure().item(), clones(model)
    eps = slow_eps(rows_of(model.named_parameters()), kind, rho)
    with torch.no_grad():
        for p, e in zip(params, eps, strict=True):
            p.copy_(p + torch.tensor(e, dtype=p.dtype).view_as(p))
    second = closure().item()
    with torch.no_grad():
        for p, w in zip(params, old, strict=True):
            p.copy_(w)
    if clip_second is not None:
        norm = math.sqrt(sum(g**2 for p in params for g in p.grad.flatten().tolist()))
        for p in params:
            p.grad.mul_(min(1.0, clip_second / norm))
    base.step()
    return first, second


# --- against the slow reference ---


@kinds
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_trajectory_is_that_of_the_slow_reference(kind, base, seed):
    ours, slow = net(seed), net(seed)

    def grouped(model):
        named = list(model.named_parameters())
        return BASES[base]([{"params": named[:3]}, {"params": named[3:], "lr": 0.03}])

    optimizer, reference = SharpnessAware(grouped(ours), 0.3, kind), grouped(slow)
    for step in range(4):
        loss = optimizer.step(closure_of(ours, optimizer, batch(step)))
        first, second = slow_step(slow, reference, batch(step), kind, 0.3)
        assert loss.item() == pytest.approx(first, rel=1e-9)
        assert abs(first - second) > 1e-4
        assert not loss.requires_grad
        assert_close(ours.parameters(), slow.parameters(), rtol=1e-9, atol=1e-11)


def test_kinds_differ_and_have_their_published_rho():
    eps = {}
    for kind, rho in {"sam": 0.05, "asam": 0.5, "asam-kwon": 0.5}.items():
        model = net()
        optimizer = SharpnessAware(torch.optim.SGD(model.named_parameters(), lr=0.1), perturbation=kind)
        closure_of(model, optimizer, batch())()
        assert optimizer.rho == rho
        eps[kind] = torch.cat([e.flatten() for e in ascent_step(model.named_parameters(), kind)])
        explicit = torch.cat([e.flatten() for e in ascent_step(model.named_parameters(), kind, rho)])
        assert torch.equal(eps[kind], explicit)
    assert SharpnessAware(torch.optim.SGD(net().parameters(), lr=0.1)).perturbation == "asam"
    for one, other in (("sam", "asam"), ("asam", "asam-kwon")):
        assert torch.nn.functional.cosine_similarity(eps[one], eps[other], dim=0) < 0.999


magnitudes = st.floats(2**-10, 2**10, width=32)
scalars = st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda x: -x))
pairs = st.lists(st.tuples(scalars, scalars), min_size=1, max_size=6)
param_names = st.sampled_from(["a.weight", "a.bias", "in_proj_weight"])
layers = st.lists(st.tuples(param_names, pairs), min_size=1, max_size=4)


def parameters(drawn):
    """Named float32 parameters that hold the drawn (weight, gradient) pairs."""
    named = []
    for name, entries in drawn:
        p = nn.Parameter(torch.tensor([w for w, _ in entries]))
        p.grad = torch.tensor([g for _, g in entries])
        named.append((name, p))
    return named


@prop
@given(layers, st.sampled_from(KINDS), st.floats(0, 10))
def test_ascent_step_is_the_slow_formula_and_changes_nothing(drawn, kind, rho):
    named = parameters(drawn)
    before = [p.detach().clone() for _, p in named], [p.grad.clone() for _, p in named]
    eps = ascent_step(named, kind, rho)
    slow = slow_eps(drawn, kind, rho)
    assert_close(eps, [torch.tensor(e) for e in slow], rtol=1e-5, atol=1e-30)
    assert same_bits([p for _, p in named], before[0])
    assert same_bits([p.grad for _, p in named], before[1])


@prop
@given(layers, st.sampled_from(KINDS), st.floats(1e-3, 10))
def test_eps_has_norm_rho_in_the_geometry_of_its_kind(drawn, kind, rho):
    named = parameters(drawn)

    def scale(name, w):
        return {"sam": 1.0, "asam": abs(w), "asam-kwon": abs(w) + 0.01 if "weight" in name else 1.0}[kind]

    assume(any(scale(name, w) * g != 0 for name, entries in drawn for w, g in entries))
    squares = 0.0
    for (name, entries), eps in zip(drawn, ascent_step(named, kind, rho), strict=True):
        for (w, _), e in zip(entries, eps.tolist(), strict=True):
            t = scale(name, w)
            assert e == 0 or t != 0
            squares += (e / t) ** 2 if t else 0.0
    assert math.sqrt(squares) == pytest.approx(rho, rel=1e-5)


@prop
@given(layers, st.sampled_from(KINDS), st.sampled_from(["weights", "gradients"]))
def test_eps_is_exactly_zero_where_it_is_undefined(drawn, kind, zeroed):
    named = parameters(drawn)
    for _, p in named:
        (p.data if zeroed == "weights" else p.grad).zero_()
    eps = ascent_step(named, kind)
    if zeroed == "gradients" or kind == "asam":
        assert all(e.eq(0).all() for e in eps)
    assert all(e.isfinite().all() for e in eps)


@prop
@given(layers, st.sampled_from(KINDS), st.randoms(use_true_random=False))
def test_order_of_parameters_does_not_matter(drawn, kind, random):
    named = parameters(drawn)
    order = random.sample(range(len(named)), len(named))
    straight = ascent_step(named, kind)
    shuffled = ascent_step([named[i] for i in order], kind)
    assert_close([straight[i] for i in order], shuffled, rtol=1e-6, atol=0)


# --- properties of the step ---


@kinds
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rho", [0.0, 1e-30])
def test_rho_zero_is_the_base_optimizer(kind, base, rho):
    """1e-30 goes through the whole machinery, with a perturbation below the resolution of the weights."""
    plain, ours = net(dtype=torch.float32), net(dtype=torch.float32)
    reference = BASES[base](plain.parameters())
    optimizer = SharpnessAware(BASES[base](ours.named_parameters()), rho, kind)
    for step in range(4):
        data, seen = batch(step, dtype=torch.float32), []
        reference.step(closure_of(plain, reference, data))
        optimizer.step(closure_of(ours, optimizer, data, seen))
        assert same_bits(clones(plain), clones(ours))
        assert len(seen) == (1 if rho == 0 else 2)  # one call, so that dropout too draws what it does there


@prop
@given(st.integers(0, 2**31), st.sampled_from(KINDS), st.floats(1e-3, 100), st.booleans())
def test_with_lr_zero_the_weights_come_back_bit_identical(seed, kind, rho, is_bf16):
    torch.manual_seed(seed)
    weight = torch.randn(40) * 10 ** torch.empty(40).uniform_(-9, 3)
    weight[:2] = torch.tensor([0.0, -0.0])
    p = nn.Parameter(weight.bfloat16() if is_bf16 else weight)
    before, direction, seen = p.detach().clone(), torch.randn(40).to(p.dtype), []
    base = torch.optim.SGD([("weight", p)], lr=0.0)
    base.register_step_pre_hook(lambda *_: seen.append(p.detach().clone()))
    optimizer = SharpnessAware(base, rho, kind)

    def closure():
        seen.append(p.detach().clone())
        optimizer.zero_grad()
        (p * direction).sum().backward()

    optimizer.step(closure)
    bits = [t.view(torch.int16 if is_bf16 else torch.int32) for t in (before, *seen)]
    assert torch.equal(bits[0], bits[1])
    assert not torch.equal(bits[0], bits[2])
    assert torch.equal(bits[0], bits[3])
    assert torch.equal(before, p)  # SGD's own w - 0 * g loses the sign of -0.0: here equal values are enough


@kinds
def test_second_gradient_is_taken_at_w_plus_eps(kind):
    model, seen = net(), []
    optimizer = SharpnessAware(torch.optim.SGD(model.named_parameters(), lr=0.1), 0.2, kind)
    closure = closure_of(model, optimizer, batch(), seen)
    closure()
    eps = ascent_step(model.named_parameters(), kind, 0.2)
    optimizer.step(closure)
    assert_close([b - a for a, b in zip(seen[1], seen[2], strict=True)], eps, rtol=1e-9, atol=1e-12)


@kinds
@pytest.mark.parametrize("zeroing", ["none", "zero", "outside"])
def test_every_way_of_zeroing_gives_the_same_step(kind, zeroing):
    ours, slow = net(), net()
    reference = BASES["sgd"](slow.parameters())
    optimizer = SharpnessAware(BASES["sgd"](ours.named_parameters()), 0.3, kind)
    for step in range(2):
        inner = closure_of(ours, optimizer, batch(step), set_to_none=zeroing == "none")
        if zeroing == "outside":
            optimizer.zero_grad()

            def inner(step=step):
                loss = (ours(batch(step)[0]) - batch(step)[1]).square().mean()
                loss.backward()
                return loss

        optimizer.step(inner)
        slow_step(slow, reference, batch(step), kind, 0.3)
    assert_close(ours.parameters(), slow.parameters(), rtol=1e-9, atol=1e-11)


@kinds
def test_four_accumulated_micro_batches_are_the_full_batch(kind):
    whole, parts = net(), net()
    x, y = batch(n=12)
    full = SharpnessAware(BASES["adamw"](whole.named_parameters()), 0.2, kind)
    full.step(closure_of(whole, full, (x, y)))
    split = SharpnessAware(BASES["adamw"](parts.named_parameters()), 0.2, kind)

    def closure():
        split.zero_grad()
        total = 0.0
        for xs, ys in zip(x.chunk(4), y.chunk(4), strict=True):
            loss = (parts(xs) - ys).square().mean() / 4
            loss.backward()
            total += loss.item()
        return total

    assert isinstance(split.step(closure), float)
    assert_close(whole.parameters(), parts.parameters(), rtol=1e-9, atol=1e-11)


@kinds
def test_clipping_the_first_gradient_changes_nothing(kind):
    free, clipped = net(), net()
    one = SharpnessAware(BASES["sgd"](free.named_parameters()), 0.3, kind)
    two = SharpnessAware(BASES["sgd"](clipped.named_parameters()), 0.3, kind, clip_first=1e-3)
    for step in range(3):
        one.step(closure_of(free, one, batch(step)))
        two.step(closure_of(clipped, two, batch(step)))
    assert not same_bits(clones(free), clones(clipped))  # it was clipped: the last bits tell
    assert_close(free.parameters(), clipped.parameters(), rtol=1e-7, atol=1e-9)


@kinds
@pytest.mark.parametrize("limit", [0.05, 1e3])
def test_clipping_the_second_gradient_is_that_of_the_reference(kind, limit):
    ours, slow = net(), net()
    optimizer = SharpnessAware(BASES["sgd"](ours.named_parameters()), 0.3, kind, clip_second=limit)
    reference = BASES["sgd"](slow.parameters())
    for step in range(3):
        optimizer.step(closure_of(ours, optimizer, batch(step)))
        slow_step(slow, reference, batch(step), kind, 0.3, clip_second=limit)
    assert_close(ours.parameters(), slow.parameters(), rtol=1e-5, atol=1e-7)  # torch divides by norm + 1e-6


@kinds
def test_frozen_and_unused_parameters_are_left_alone(kind):
    shapes = {"used": (3, 2), "frozen": (2, 2), "unused": (4, 4)}
    model = nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()}).double()
    model["frozen"].requires_grad_(False)
    optimizer = SharpnessAware(BASES["adamw"](model.named_parameters()), 0.3, kind)
    x, y = batch()
    seen = []

    def closure():
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        optimizer.zero_grad()
        (model["frozen"](model["used"](x)) - y).square().mean().backward()

    optimizer.step(closure)
    seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
    for name, start in seen[0].items():
        for later in seen[1:]:
            assert torch.equal(start, later[name]) != name.startswith("used")
    # A frozen parameter may still hold an old gradient: it must not enter the norm.
    alone = ascent_step(model["used"].named_parameters(), kind)
    model["frozen"].weight.grad = torch.full((2, 2), 7.0, dtype=torch.float64)
    together = dict(zip(seen[0], ascent_step(model.named_parameters(), kind), strict=True))
    assert_close([together["used.weight"], together["used.bias"]], alone, rtol=1e-12, atol=0)
    assert all(e.eq(0).all() for n, e in together.items() if not n.startswith("used"))


@kinds
def test_groups_of_different_dtypes_share_one_norm(kind):
    torch.manual_seed(0)
    dtypes = [torch.float64, torch.bfloat16, torch.float32, torch.float64]
    names = ["0.bias", "1.weight", "2.bias", "3.weight"]
    named = [(n, nn.Parameter(torch.randn(5).to(dtype))) for n, dtype in zip(names, dtypes, strict=True)]
    target = [p.detach() + torch.randn(5).to(p.dtype) for _, p in named]
    optimizer = SharpnessAware(torch.optim.SGD([{"params": [entry]} for entry in named], lr=0.1), 0.4, kind)
    seen = []

    def closure():
        seen.append([p.detach().clone() for _, p in named])
        optimizer.zero_grad()
        sum((p - t).square().sum().double() for (_, p), t in zip(named, target, strict=True)).backward()

    closure()
    slow = slow_eps(rows_of(named), kind, 0.4)
    optimizer.step(closure)
    for before, after, e in zip(seen[1], seen[2], slow, strict=True):
        loose = 0.02 if before.dtype == torch.bfloat16 else 2e-3  # bfloat16 products enter the shared norm
        assert_close([after - before], [torch.tensor(e, dtype=before.dtype)], rtol=loose, atol=loose)


@kinds
def test_norms_of_bfloat16_gradients_are_taken_in_float32(kind):
    """√258 is 16.06, in bfloat16 16.0: the exact ε of the float32 neighbour tells which was used."""
    coarse, fine = nn.Parameter(torch.ones(258, dtype=torch.bfloat16)), nn.Parameter(torch.ones(1))
    coarse.grad, fine.grad = torch.ones_like(coarse), torch.ones_like(fine)
    eps = ascent_step([("coarse.bias", coarse), ("fine.bias", fine)], kind, 1.0)
    assert eps[1].item() == pytest.approx(1 / math.sqrt(259), rel=1e-6)


def test_without_any_gradient_nothing_moves():
    model = net()
    optimizer = SharpnessAware(BASES["adamw"](model.parameters()))
    before = clones(model)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert same_bits(before, clones(model))


# --- when things go wrong ---


@kinds
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_second_call_restores_the_weights(kind, error):
    model, fresh = net(), net()
    optimizer = SharpnessAware(BASES["adamw"](model.named_parameters()), 0.3, kind)
    reference = SharpnessAware(BASES["adamw"](fresh.named_parameters()), 0.3, kind)
    before, seen = clones(model), []
    usual = closure_of(model, optimizer, batch(), seen)

    def failing():
        loss = usual()
        if len(seen) == 2:
            raise error("stop")
        return loss

    with pytest.raises(error, match="stop"):
        optimizer.step(failing)
    assert same_bits(before, clones(model))
    assert not same_bits(before, seen[1])
    assert not optimizer.state
    optimizer.step(usual)
    reference.step(closure_of(fresh, reference, batch()))
    assert same_bits(clones(model), clones(fresh))


@kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_first_gradient_that_is_not_finite_stops_the_step(kind, bad, clip):
    model, seen = net(), []
    optimizer = SharpnessAware(BASES["adamw"](model.named_parameters()), None, kind, clip_first=clip)
    before, usual = clones(model), closure_of(model, optimizer, batch(), seen)

    def closure():
        usual()
        model[0].bias.grad[1] = bad

    with pytest.raises(FloatingPointError, match="gradient at w: the weights are left as they were"):
        optimizer.step(closure)
    assert len(seen) == 1
    assert same_bits(before, clones(model))
    assert not optimizer.state
    with pytest.raises(FloatingPointError):
        ascent_step(model.named_parameters(), kind)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_second_gradient_must_be_finite(clip, bad):
    model, seen = net(), []
    optimizer = SharpnessAware(BASES["adamw"](model.parameters()), clip_second=clip)
    before, usual = clones(model), closure_of(model, optimizer, batch(), seen)

    def closure():
        usual()
        model[0].bias.grad[1] = bad if len(seen) == 2 else 1.0

    with pytest.raises(FloatingPointError, match=r"gradient at w \+ eps"):
        optimizer.step(closure)
    assert same_bits(before, clones(model))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda b: SharpnessAware(b, rho=-0.1), ValueError, "rho must be a finite number and not negative, got -0.1"),
        (lambda b: SharpnessAware(b, rho="0.5"), ValueError, "rho must be a finite number .*, got '0.5'"),
        (lambda b: SharpnessAware(b, rho=True), ValueError, "rho must be"),
        (lambda b: SharpnessAware(b, rho=math.nan), ValueError, "rho must be"),
        (lambda b: SharpnessAware(b, rho=math.inf), ValueError, "rho must be"),
        (lambda b: setattr(SharpnessAware(b), "rho", math.nan), ValueError, "rho must be"),
        (lambda b: SharpnessAware(b, 0.1, "gsam"), ValueError, "one of sam, asam, asam-kwon, got 'gsam'"),
        (lambda b: SharpnessAware(b, perturbation="asam-kwon"), ValueError, "named_parameters"),
        (lambda b: SharpnessAware(b, clip_first=0.0), ValueError, "clip_first"),
        (lambda b: SharpnessAware(b, clip_second=math.nan), ValueError, "clip_second"),
        (lambda b: SharpnessAware(SharpnessAware(b)), TypeError, "other than SharpnessAware"),
        (lambda b: SharpnessAware(net().parameters()), TypeError, "a torch optimizer .* got generator"),
        (lambda b: SharpnessAware(b).step(), ValueError, "closure"),
        (lambda b: SharpnessAware(b).load_state_dict(b.state_dict()), ValueError, "base_optimizer"),
        (lambda b: ascent_step(net().parameters(), "asam-kwon"), ValueError, "named_parameters"),
        (lambda b: ascent_step(net().parameters(), "nope"), ValueError, "one of sam"),
        (lambda b: ascent_step(net().parameters(), rho=-1), ValueError, "rho must be"),
    ],
)
def test_misuse_is_one_clear_line(make, error, words):
    with pytest.raises(error, match=words) as caught:
        make(BASES["sgd"](net().parameters()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["sparse", "float16"])
def test_gradients_that_the_formulas_cannot_take_are_refused(case):
    layer = nn.Embedding(5, 2, sparse=case == "sparse")
    layer = layer.half() if case == "float16" else layer
    optimizer = SharpnessAware(torch.optim.SGD(layer.parameters(), lr=0.1))
    before = clones(layer)
    with pytest.raises(TypeError, match="dense float32, float64 or bfloat16"):
        optimizer.step(lambda: layer(torch.tensor([1, 2])).float().sum().backward())
    assert same_bits(before, clones(layer))


# --- it is a torch optimizer ---


def test_groups_state_and_defaults_are_those_of_the_base_also_after_a_load():
    model = net()
    base = BASES["adamw"](model.parameters())
    optimizer = SharpnessAware(base)
    optimizer.step(closure_of(model, optimizer, batch()))
    optimizer.load_state_dict(optimizer.state_dict())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert base.state
    assert optimizer.defaults is base.defaults
    added = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [added], "lr": 7.0})
    assert base.param_groups[1]["params"][0] is added
    assert base.param_groups[1]["weight_decay"] == 0.1
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert "lr: 7.0" in repr(optimizer)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 0.5**i),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=9),  # the momentum too
    ],
)
def test_schedulers_drive_the_base_optimizer(schedule):
    ours, slow = net(), net()
    reference = BASES["sgd"](slow.parameters())
    optimizer = SharpnessAware(BASES["sgd"](ours.parameters()), 0.3)
    schedules = schedule(optimizer), schedule(reference)
    rates = set()
    for step in range(4):
        optimizer.step(closure_of(ours, optimizer, batch(step)))
        slow_step(slow, reference, batch(step), "asam", 0.3)
        for scheduler in schedules:
            scheduler.step()
        rates.add(optimizer.base_optimizer.param_groups[0]["lr"])
    assert len(rates) == 4
    assert_close(ours.parameters(), slow.parameters(), rtol=1e-9, atol=1e-11)


@kinds
@pytest.mark.parametrize("base", BASES)
def test_a_saved_state_goes_on_bit_identically(kind, base):
    model = net()
    optimizer = SharpnessAware(BASES[base](model.named_parameters()), 0.3, kind)
    for step in range(3):
        optimizer.step(closure_of(model, optimizer, batch(step)))
    optimizer.rho = 0.2
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["optimizer"]["sharpness"] == {"rho": 0.2, "perturbation": kind}
    resumed = net(seed=3)
    resumed.load_state_dict(saved["model"])
    again = SharpnessAware(BASES[base](resumed.named_parameters()), 0.9, kind)
    again.load_state_dict(saved["optimizer"])
    twin = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (resumed, again), twin):
        for step in range(3, 6):
            o.step(closure_of(m, o, batch(step)))
    assert same_bits(clones(model), clones(resumed))
    assert same_bits(clones(model), clones(twin[0]))
    other_kind = "asam" if kind == "sam" else "sam"
    other = SharpnessAware(BASES[base](resumed.named_parameters()), perturbation=other_kind)
    with pytest.raises(ValueError, match=kind):
        other.load_state_dict(saved["optimizer"])


def test_step_hooks_see_the_step():
    model, calls = net(), []
    optimizer = SharpnessAware(BASES["sgd"](model.parameters()))
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    with torch.no_grad():  # the closure has gradients all the same
        optimizer.step(closure_of(model, optimizer, batch()))
    assert calls == ["before", "after"]


# --- mixed precision and memory ---


def two_autocast_steps(kind, where):
    """Weights after two steps with autocast in the closure, around the step, or nowhere."""
    data, model, losses = batch(dtype=torch.float32), net(dtype=torch.float32), []
    optimizer = SharpnessAware(torch.optim.SGD(model.named_parameters(), lr=0.5), 0.5, kind)
    before = clones(model)

    def closure():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=where != "nowhere"):
            out = model(data[0])
        assert out.dtype == (torch.float32 if where == "nowhere" else torch.bfloat16)
        losses.append((out.float() - data[1]).square().mean())
        losses[-1].backward()
        return losses[-1]

    with torch.autocast("cpu", torch.bfloat16, enabled=where == "step"):
        optimizer.step(closure)
        optimizer.step(closure)
    assert losses[1] > losses[0]
    assert not same_bits(before, clones(model))
    return clones(model)


@kinds
def test_bf16_autocast_inside_the_closure_or_around_the_step_is_one(kind):
    """Around the step, autocast would hand the second pass the weights that it cast in the first."""
    inside, around, without = (two_autocast_steps(kind, where) for where in ("closure", "step", "nowhere"))
    assert same_bits(inside, around)
    assert_close(inside, without, rtol=0.1, atol=0.1)


class Allocations(TorchDispatchMode):
    """Counts the elements of every tensor made, except inside the closure."""

    counting, elements = True, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given_in = {id(t) for t in tree_leaves((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and id(t) not in given_in]
        self.elements += self.counting * sum(t.numel() for t in made if t._base is None)
        return out


@kinds
def test_one_extra_copy_of_the_weights_and_no_second_gradient(kind):
    model = nn.Linear(30, 40)
    optimizer = SharpnessAware(torch.optim.SGD(model.named_parameters(), lr=0.1), perturbation=kind)
    homes, olds, x = [(id(p), p.data_ptr()) for p in model.parameters()], [], torch.ones(2, 30)
    with Allocations() as mode:

        def closure():
            mode.counting = False
            optimizer.zero_grad()
            assert all(old() is None for old in olds)  # the first gradients are freed before the second pass
            loss = model(x).square().sum()
            loss.backward()
            olds.extend(weakref.ref(p.grad) for p in model.parameters())
            mode.counting = True
            return loss

        optimizer.step(closure)
    assert homes == [(id(p), p.data_ptr()) for p in model.parameters()]
    size, norms = sum(p.numel() for p in model.parameters()), 10
    assert size <= mode.elements <= size + norms
