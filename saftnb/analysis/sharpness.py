"""Sharpness of a solution: its Hessian's extreme eigenvalues, the loss nearby, the plane through two task models."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from saftnb.analysis.finite import finite_table
from saftnb.analysis.loss_slices import ascent, loss_slice
from saftnb.backbones import ImageClassifier, resolve_device
from saftnb.delta import dense, is_finite
from saftnb.evaluate import ModelFamily
from saftnb.suites import Split, Suite
from saftnb.task_vector import TaskVector

HESSIAN_BATCH = 16  # pictures a Hessian-vector product: at ViT-L/14 these take some 21 GB


def hessian_eigenvalues(
    parts: Sequence[tuple[ImageClassifier, Split]], *, iterations: int = 20, seed: int = 0, device: str = "auto"
) -> dict[str, float]:
    """Extreme eigenvalues of the Hessian of Σ mean cross-entropy over the tower's weights, by Lanczos.

    Args:
        parts: classifiers that share one tower (their heads may differ), each with the pictures of its term.
        iterations: Hessian-vector products, each with full reorthogonalisation. seed: of the start vector.

    Returns:
        top: the largest eigenvalue; bottom: the smallest one found; norm: ‖H‖₂, the larger of their magnitudes;
        residual: ‖H v − top · v‖₂ for the unit vector v found. `top` is never above the true one; a small residual says
            that it is near some eigenvalue.
    """
    where = resolve_device(device)
    tower = copy.deepcopy(parts[0][0].tower).to(where).eval().requires_grad_(True)
    terms = []
    for model, split in parts:
        twin = ImageClassifier(tower, model.head, (0.0,), (1.0,)).to(where)
        twin.mean, twin.std = model.mean.to(where), model.std.to(where)
        terms.append((twin, split.images.to(where), split.labels.to(where)))
    weights = list(tower.parameters())
    like = torch.nn.utils.parameters_to_vector(weights).detach()

    def product(vector: Tensor) -> Tensor:
        pieces, start = [], 0
        for p in weights:
            pieces.append(vector[start : start + p.numel()].view_as(p))
            start += p.numel()
        total = torch.zeros_like(like)
        for twin, images, labels in terms:
            for batch, wanted in zip(images.split(HESSIAN_BATCH), labels.split(HESSIAN_BATCH), strict=True):
                loss = F.cross_entropy(twin(batch), wanted, reduction="sum") / len(labels)
                gradient = torch.autograd.grad(loss, weights, create_graph=True)
                found = torch.autograd.grad(gradient, weights, pieces)
                total += torch.cat([part.flatten() for part in found])
        return total

    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        return lanczos(product, like, iterations=iterations, seed=seed)


def lanczos(product: Callable[[Tensor], Tensor], like: Tensor, *, iterations: int, seed: int) -> dict[str, float]:
    """Extreme eigenvalues of a symmetric operator from its products with vectors shaped like `like`, (d,).

    Returns top, bottom, norm and residual, as `hessian_eigenvalues`. With as many iterations as the operator has
    distinct eigenvalues they are exact. Raises FloatingPointError on a product that is not finite.
    """
    start = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = [(start / start.norm()).to(like)]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(iterations, like.numel())):
        w = product(basis[-1])
        if not is_finite(w):
            raise FloatingPointError(f"product {len(diagonal) + 1} of the Hessian with a vector is not finite")
        diagonal.append(float(w.double() @ basis[-1].double()))
        for _ in range(2):  # twice is enough (Parlett)
            for v in basis:
                w = w - (w.double() @ v.double()).to(w) * v
        length = float(w.double().norm())
        beside.append(length)
        if length < 1e-7 * max(1e-30, max(map(abs, diagonal))):
            break
        basis.append(w / length)
    size = len(diagonal)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if size > 1:
        off = torch.tensor(beside[: size - 1], dtype=torch.float64)
        tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    top, bottom = values[-1].item(), values[0].item()
    residual = beside[size - 1] * abs(vectors[-1, -1].item())
    return {"top": top, "bottom": bottom, "norm": max(abs(top), abs(bottom)), "residual": residual}


def sam_sharpness(
    model: ImageClassifier, split: Split, radii: Sequence[float], *, perturbation: str = "sam", device: str = "auto"
) -> pd.DataFrame:
    """L(θ + ε) − L(θ) for `SharpnessAware`'s ε at several ρ, the loss and its gradient over the same pictures.

    Returns columns rho, loss (at θ + ε, nats) and rise.
    """
    line = loss_slice(model, ascent(model, split, perturbation, device=device), [0.0, *radii], split, device=device)
    start = line["loss"].iloc[0]
    return pd.DataFrame({"rho": list(radii), "loss": line["loss"].iloc[1:].to_numpy()}).assign(
        rise=lambda frame: frame["loss"] - start
    )


def loss_plane(
    suite: Suite, vectors: Mapping[str, TaskVector], grid: int, *, margin: float = 0.4, scale: float = 0.5,
    split: str = "test", pictures: int | None = None, tangent: bool = False, device: str = "auto",
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """The joint loss of two tasks in the plane of θ0, θ1 and θ2.

    x runs along τ1, y across it towards τ2, both as Euclidean lengths, so that distances in the figure are those of the
    weights.

    Args:
        grid: points a side. margin: how far beyond the models the grid reaches, as a share of its extent.
        scale: the merged model is θ0 + scale · (τ1 + τ2).

    Returns:
        the grid: x, y, loss (nats, summed over both tasks); and the marks: name, x, y, loss.
    """
    one, two = vectors
    t1, t2 = vectors[one], vectors[two]
    length = t1.norm()
    along = sum(float((dense(t1[name]).double() * dense(t2[name]).double()).sum()) for name in t1) / length
    across = math.sqrt(max(t2.norm() ** 2 - along**2, 0.0))
    marks = pd.DataFrame(
        [
            ("θ0", 0.0, 0.0),
            (one, length, 0.0),
            (two, along, across),
            ("merged", scale * (length + along), scale * across),
        ],
        columns=["name", "x", "y"],
    )
    family = ModelFamily(suite, [t1, t2], tangent=tangent, device=device)
    spans = []
    for axis in ("x", "y"):
        places = marks[axis].tolist()
        low, high = min(places), max(places)
        spans.append(torch.linspace(low - margin * (high - low), high + margin * (high - low), grid).tolist())

    def joint(x: float, y: float) -> float:
        b = y / across
        point, loss = ((x - b * along) / length, b), 0.0
        for task in vectors:
            labels = suite.tasks[task].splits[split].labels[:pictures]
            loss += F.cross_entropy(family.logits(task, point, split=split, pictures=pictures), labels).item()
        return loss

    rows = [{"x": x, "y": y, "loss": joint(x, y)} for x in spans[0] for y in spans[1]]
    table = finite_table(pd.DataFrame(rows), f"{suite.name}, plane of {one} and {two}")
    return table, marks.assign(loss=[joint(*spot) for spot in marks[["x", "y"]].to_numpy().tolist()])
