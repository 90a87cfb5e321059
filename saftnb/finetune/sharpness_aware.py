"""Sharpness-aware minimisation as a wrapper around any torch optimizer.

The loss is minimised not at w but at the worst point of a ball around it: min_w max_{‖T⁻¹ε‖₂ ≤ ρ} L(w + ε).
To first order the maximum lies at

    ε = ρ T² g / (‖T g‖₂ + tiny),   g = ∇L(w),

one norm over all trainable parameters, T diagonal and all products elementwise. The kinds differ in T:

    sam        T = 1, tiny = 1e-12: Foret et al. 2021 (arXiv 2010.01412), eq. 2
    asam       T = |w|, biases and norms included, tiny = 1e-12: SAFT's (arXiv 2504.14662, as released)
    asam-kwon  T = |w| + 0.01 where the parameter's name contains "weight", 1 elsewhere, tiny = 1e-16:
               Kwon et al. 2021 (arXiv 2102.11600)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

DEFAULT_RHO = {"sam": 0.05, "asam": 0.5, "asam-kwon": 0.5}
TINY = {"sam": 1e-12, "asam": 1e-12, "asam-kwon": 1e-16}
ETA = 0.01  # Kwon's η: with T = |w| alone a weight of 0 is never perturbed
DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # in float16, w² g underflows


@torch.no_grad()
def ascent_step(
    params: Iterable[Tensor | tuple[str, Tensor]], perturbation: str = "asam", rho: float | None = None
) -> list[Tensor]:
    """ε at the gradients that `params` hold now, for walking along the ascent direction; changes nothing.

    `params` is `model.parameters()` or `model.named_parameters()` (`asam-kwon` needs the names). Returns one
    tensor per parameter, in their order and shapes: zeros where a parameter is frozen or has no gradient.
    Raises as `SharpnessAware` does.
    """
    named = [entry if isinstance(entry, tuple) else (None, entry) for entry in params]
    names = [name for name, _ in named]
    rho = _checked_rho(perturbation, rho, names)
    steps = [p.grad.clone() if p.grad is not None and _takes_part(p) else torch.zeros_like(p) for _, p in named]
    _ascend_(steps, [p.clone() for _, p in named], names, perturbation, rho)
    return steps


class SharpnessAware(Optimizer):
    """Step `base_optimizer` with the gradient at w + ε in place of the one at w (the module gives ε).

    `step(closure)` calls the closure twice. It zeroes the gradients, computes the loss (over micro-batches if
    need be), backpropagates and returns the loss; `step` returns that of the first call, L(w). What the
    closure draws anew, such as dropout masks, differs between the calls. The weights are back, bit-identical,
    before the base optimizer steps, and also when the second call raises. With rho = 0 the closure is called
    once, and this is the base optimizer exactly.

    `rho` (None: 0.05 for `sam`, 0.5 for the others) may be set at any time and is part of `state_dict()`.
    `param_groups`, `state` and `defaults` are the base optimizer's own.

    `clip_first` and `clip_second` bound the L2 norm of the gradient at w and at w + ε. Since ε is normalised,
    clipping the first changes nothing (but for `tiny`); clipping inside the closure clips both.

    A parameter group with `perturb=False` is stepped with the gradient at w + ε, and has no ε of its own.

    Layers that keep running statistics (BatchNorm) would update them in both calls, at w and at w + ε. With
    `hold_statistics_of=model` those of this model are updated by the first call alone.

    A `GradScaler` is of no use here: it is for float16, where w² g underflows, and torch refuses it a closure.
    Use bfloat16 autocast, which needs no scaling. Under DistributedDataParallel the gradients of both calls are
    averaged over the processes, so that all take the same ε.

    Weights are float32, float64 or bfloat16. In bfloat16 most of a small ε is lost in the rounding of w + ε:
    prefer float32 weights under autocast.

    Raises TypeError where `base_optimizer` is not a plain torch optimizer or a gradient is sparse or of
    another dtype; ValueError for a bad `rho`, `perturbation` or clip, for `asam-kwon` without names (build
    the base optimizer from `named_parameters()`) and for a step without closure; FloatingPointError, the
    weights as before, where the norm of a gradient is not finite (with rho = 0: of one to be clipped).
    """

    base_optimizer: Optimizer
    perturbation: str
    clip_first: float | None
    clip_second: float | None

    def __init__(
        self, base_optimizer: Optimizer, rho: float | None = None, perturbation: str = "asam", *,
        clip_first: float | None = None, clip_second: float | None = None, hold_statistics_of: nn.Module | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(base_optimizer, Optimizer) or isinstance(base_optimizer, SharpnessAware):
            kind = type(base_optimizer).__name__
            raise TypeError(f"base_optimizer must be a torch optimizer other than SharpnessAware, got {kind}")
        for limit in (clip_first, clip_second):
            if limit is not None and not limit > 0:
                raise ValueError(f"clip_first and clip_second must be None or positive, got {limit}")
        # Torch's way to make an optimizer of its attributes: it sets up the hooks that schedulers and
        # profilers expect, but no second `param_groups` and `state` beside the base optimizer's.
        attributes = {"base_optimizer": base_optimizer, "perturbation": perturbation}
        self.__setstate__(attributes | {"clip_first": clip_first, "clip_second": clip_second})
        self.hold_statistics_of, self.rho = hold_statistics_of, rho

    # Looked up on every access, since the base optimizer replaces these objects when it loads a state.
    param_groups = property(lambda self: self.base_optimizer.param_groups)  # pyright: ignore[reportAssignmentType]
    state = property(lambda self: self.base_optimizer.state)  # pyright: ignore[reportAssignmentType]
    defaults = property(lambda self: self.base_optimizer.defaults)

    @property
    def rho(self) -> float:
        return self._rho

    @rho.setter
    def rho(self, rho: float | None) -> None:
        self._rho = _checked_rho(self.perturbation, rho, [name for name, _ in self._named_params()])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer with ∇L(w + ε). Returns the closure's L(w), detached."""
        if closure is None:
            raise ValueError("step needs a closure: it takes the gradient twice, at w and at w + eps")
        evaluate = torch.enable_grad()(closure)
        loss = evaluate()
        if isinstance(loss, Tensor):
            loss = loss.detach()  # or the first graph would live on beside the second
        if self.rho > 0:
            self._clip_(self.clip_first, "w")
            self._evaluate_at_ascent(evaluate)
            if self.clip_second is None:  # clipping looks at the norm, too
                grads = [p.grad for _, p in self._named_params() if p.grad is not None and _takes_part(p)]
                _check_finite(_global_norm(grads), "w + eps")
        self._clip_(self.clip_second, "w + eps")
        self.base_optimizer.step()
        return loss

    def _evaluate_at_ascent(self, evaluate: Callable[[], Any]) -> None:
        """Replace the gradients at w by those at w + ε. Afterwards the weights are w again, come what may."""
        groups = [group for group in self.param_groups if group.get("perturb", True)]
        names = {p: name for name, p in self._named_params(groups) if _takes_part(p)}
        weights, grads = list(names), [p.grad for p in names if p.grad is not None]
        saved = [torch.empty_like(p) for p in weights]  # the one extra copy of the weights
        _copy_(saved, weights)
        try:
            # Neither T nor ε takes memory: T is made in the weights, which are saved, and ε in the gradients,
            # which are spent: the closure zeroes them. They are zeroed here too, so that one that does not
            # accumulates onto nothing, and let go of, so that zero_grad(set_to_none=True) does free them.
            _ascend_(grads, weights, list(names.values()), self.perturbation, self.rho)
            _copy_(weights, saved)
            for w, eps in _buckets(weights, grads):
                torch._foreach_add_(w, eps)
                torch._foreach_zero_(eps)
                del eps
            del grads
            for _, p in self._named_params():
                if p not in names and p.grad is not None:
                    p.grad.zero_()
            # An autocast region around `step` keeps low-precision copies of the weights it has seen: with
            # them the second gradient would silently be taken at w.
            torch.clear_autocast_cache()
            with _held_statistics(self.hold_statistics_of):
                evaluate()
        finally:
            _copy_(weights, saved)
            torch.clear_autocast_cache()

    def _clip_(self, limit: float | None, where: str) -> None:
        if limit is not None:
            _check_finite(float(clip_grad_norm_([p for _, p in self._named_params()], limit)), where)

    def _named_params(self, groups: list[dict[str, Any]] | None = None) -> Iterator[tuple[str | None, Tensor]]:
        for group in self.param_groups if groups is None else groups:
            params = group["params"]
            yield from zip(group.get("param_names") or [None] * len(params), params, strict=True)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and {"sharpness": {"rho", "perturbation"}}."""
        sharpness = {"rho": self.rho, "perturbation": self.perturbation}
        return self.base_optimizer.state_dict() | {"sharpness": sharpness}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave, rho included. Raises ValueError where the perturbation differs."""
        state = dict(state_dict)
        sharpness = state.pop("sharpness", None)
        if sharpness is None:
            raise ValueError("no 'sharpness' in the state: a plain optimizer's loads into .base_optimizer")
        if sharpness["perturbation"] != self.perturbation:
            raise ValueError(f"state is of {sharpness['perturbation']!r}, this is {self.perturbation!r}")
        self.base_optimizer.load_state_dict(state)
        self.rho = sharpness["rho"]

    def __getstate__(self) -> dict[str, Any]:
        # For pickle and deepcopy: torch's own would lose the base optimizer.
        kept = ("base_optimizer", "perturbation", "clip_first", "clip_second", "hold_statistics_of", "_rho")
        return {name: self.__dict__[name] for name in kept}


@contextmanager
def _held_statistics(model: nn.Module | None) -> Iterator[None]:
    """The buffers of a model's normalisation layers that track statistics are afterwards what they were."""
    layers = [m for m in model.modules() if getattr(m, "track_running_stats", False)] if model is not None else []
    saved = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]
    try:
        yield
    finally:
        for buffer, before in saved:
            buffer.copy_(before)


def _ascend_(
    grads: list[Tensor], weights: list[Tensor], names: list[str | None], perturbation: str, rho: float
) -> None:
    """Turn each g into ε = ρ T² g / (‖T g‖₂ + tiny), in place. `weights` are scratch and may end up as T."""
    kwon = perturbation == "asam-kwon"
    scaled = [i for i, name in enumerate(names) if perturbation == "asam" or (kwon and "weight" in (name or ""))]
    T, Tg = [weights[i] for i in scaled], [grads[i] for i in scaled]
    if kwon:  # T = |w| + η; for T = |w|, w itself will do: ‖T g‖ and T² do not see its sign
        for (t,) in _buckets(T):
            torch._foreach_abs_(t)
            torch._foreach_add_(t, ETA)
    for g, t in _buckets(Tg, T):
        torch._foreach_mul_(g, t)
    norm = _global_norm(grads)
    _check_finite(norm, "w")
    for g, t in _buckets(Tg, T):
        torch._foreach_mul_(g, t)
    for (g,) in _buckets(grads):
        torch._foreach_mul_(g, rho / (norm + TINY[perturbation]))


def _buckets(*lists: list[Tensor]) -> Iterator[list[list[Tensor]]]:
    """Split parallel lists by device and dtype: only within one do the foreach kernels fuse."""
    buckets: defaultdict[tuple[object, ...], list[tuple[Tensor, ...]]] = defaultdict(list)
    for row in zip(*lists, strict=True):
        buckets[tuple((t.device, t.dtype) for t in row)].append(row)
    for rows in buckets.values():
        yield [list(column) for column in zip(*rows, strict=True)]


def _copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    for to, source in _buckets(targets, sources):
        torch._foreach_copy_(to, source)


def _global_norm(tensors: list[Tensor]) -> float:
    """‖·‖₂ over all tensors, accumulated in float32 or wider."""
    norms: list[float] = []
    for (bucket,) in _buckets(tensors):
        wide = torch.promote_types(bucket[0].dtype, torch.float32)
        norms += torch.stack(list(torch._foreach_norm(bucket, 2, dtype=wide))).tolist()
    return math.hypot(*norms)


def _takes_part(p: Tensor) -> bool:
    if p.grad is None or not p.requires_grad:
        return False
    layout, dtype = p.grad.layout, p.grad.dtype
    if layout != torch.strided or dtype not in DTYPES:
        raise TypeError(f"gradients must be dense float32, float64 or bfloat16, got {layout}, {dtype}")
    return True


def _check_finite(norm: float, where: str) -> None:
    if not math.isfinite(norm):
        raise FloatingPointError(f"norm {norm} of the gradient at {where}: the weights are left as they were")


def _checked_rho(perturbation: str, rho: float | None, names: list[str | None]) -> float:
    if perturbation not in DEFAULT_RHO:
        raise ValueError(f"perturbation must be one of {', '.join(DEFAULT_RHO)}, got {perturbation!r}")
    if perturbation == "asam-kwon" and None in names:
        raise ValueError("'asam-kwon' needs parameter names: pass named_parameters(), not parameters()")
    rho = DEFAULT_RHO[perturbation] if rho is None else rho
    if not isinstance(rho, Real) or isinstance(rho, bool) or not 0 <= rho < math.inf:
        raise ValueError(f"rho must be a finite number and not negative, got {rho!r}")
    return float(rho)
