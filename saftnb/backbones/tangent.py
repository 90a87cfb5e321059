"""The first-order Taylor model of a tower, by forward-mode differentiation: f(x; θ0) + J(x; θ0)(θ − θ0).

Fine-tuning in the tangent space (FTTS; Ortiz-Jimenez et al. 2023, arXiv 2305.12827) trains this model. Its output is
linear in θ: what it gives at θ0 + Σ αt τt follows from f(x; θ0) and one product J τt for each task vector.
"""

import copy
import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from saftnb.delta import dense
from saftnb.task_vector import TaskVector


class TangentTower(nn.Module):
    """f(x; θ0) + J(x; θ0)(θ − θ0) of a tower: pixels (n, 3, h, w) → embeddings (n, embedding).

    Its parameters are θ, under the tower's own names and at first equal to θ0, so that optimizers (weight decay and
    ASAM's |w| are taken at θ, not at θ − θ0), task vectors and checkpoints work as for the tower. θ0 is frozen.

    Raises:
        ValueError: the tower has a layer that draws at random or keeps statistics of its batches.
    """

    origin: nn.Module

    def __init__(self, tower: nn.Module):
        super().__init__()
        for name, module in tower.named_modules():
            if (isinstance(module, nn.modules.dropout._DropoutNd) and module.p) or hasattr(module, "running_mean"):
                raise ValueError(f"{name}: a tangent model needs a tower without dropout and batch statistics")
        for name, child in tower.named_children():
            self.add_module(name, copy.deepcopy(child))
        for name, p in tower.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
        # Not a submodule: θ0 has no part in parameters(), state_dict() and train().
        self.__dict__["origin"] = copy.deepcopy(tower).requires_grad_(False).eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TangentTower":
        self.origin._apply(fn, recurse)  # .to(device), .double(), …
        return super()._apply(fn, recurse)

    def forward(self, pixels: Tensor) -> Tensor:
        start = dict(self.origin.named_parameters())
        value, slope = _jvp(self.origin, pixels, {name: p - start[name] for name, p in self.named_parameters()})
        return value + slope


def tangent_embeddings(tower: nn.Module, vectors: Sequence[TaskVector], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """f(x; θ0), (n, embedding), and J(x; θ0) τt of every task vector, (vectors, n, embedding).

    `tower` is the plain tower at θ0, on the pixels' device. The tangent model at θ0 + Σ αt τt gives the first plus
    Σ αt times the others. A parameter that a task vector lacks does not move.
    """
    place, dtype = pixels.device, next(tower.parameters()).dtype
    slopes: list[Tensor] = []
    value = torch.empty(0)
    for vector in vectors:
        moves = {
            name: dense(vector[name]).to(place, dtype) if name in vector else torch.zeros_like(p)
            for name, p in tower.named_parameters()
        }
        value, slope = _jvp(tower, pixels, moves)
        slopes.append(slope)
    return value, torch.stack(slopes)


def _jvp(tower: nn.Module, pixels: Tensor, moves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The tower's output at its own weights, and its derivative along `moves`."""
    _load_derivatives()
    start = {name: p.detach() for name, p in tower.named_parameters()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward-mode derivative
        value, slope, *_ = jvp(lambda weights: functional_call(tower, weights, (pixels,)), (start,), (moves,))
    return value, slope


@cache
def _load_derivatives() -> None:
    """Have torch load its forward-mode rules, which it does with a warning of its own at the first `jvp`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")
