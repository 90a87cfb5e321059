"""Two linearities between task models: of their features, block by block, and of their joint loss."""

import itertools
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from saftnb.analysis.finite import finite_table
from saftnb.analysis.sharpness import hessian_eigenvalues
from saftnb.backbones import resolve_device
from saftnb.evaluate import ModelFamily
from saftnb.suites import Suite
from saftnb.task_vector import TaskVector


def cross_task_linearity(
    suite: Suite, vectors: Mapping[str, TaskVector], *, pairs: Sequence[tuple[str, str]] = (), alpha: float = 0.5,
    split: str = "test", pictures: int = 100, device: str = "auto",
) -> pd.DataFrame:  # fmt: skip
    """How far f^(ℓ)(αθi + (1−α)θj) is from αf^(ℓ)(θi) + (1−α)f^(ℓ)(θj) after every block ℓ (Zhou et al. 2024).

    With A and B the two sides for one picture, all tokens flattened: the distance is 1 − cos(A, B) and the coefficient
    ⟨A, B⟩ / ‖B‖². Both are means over the first `pictures` of both tasks' splits.

    Args:
        vectors: task -> task vector of plain models (a tangent model is linear by construction).
        pairs: pairs of tasks; () is every pair.

    Returns:
        one row a pair and block: task_1, task_2, block (from 1), distance, coefficient and their standard deviations
        over pictures distance_sd, coefficient_sd.

    Raises:
        FloatingPointError: features that are not finite, or 0 in all of a block.
    """
    where = resolve_device(device)
    rows = []
    for one, two in pairs or itertools.combinations(vectors, 2):
        mixed = alpha * vectors[one] + (1 - alpha) * vectors[two]
        towers = [suite.tower(vector).to(where) for vector in (mixed, vectors[one], vectors[two])]
        images = torch.cat([suite.tasks[task].splits[split][:pictures].images for task in (one, two)])
        prepare = suite.classifier(one).to(where).pixels
        found: list[list[tuple[Tensor, Tensor]]] = []
        for batch in images.split(50):
            features = [block_features(tower, prepare(batch.to(where))) for tower in towers]
            found.append([_compare(a, alpha * b + (1 - alpha) * c) for a, b, c in zip(*features, strict=True)])
        for block, parts in enumerate(zip(*found, strict=True), start=1):
            distance, coefficient = (torch.cat(values).double().cpu() for values in zip(*parts, strict=True))
            rows.append({
                "task_1": one, "task_2": two, "block": block, "distance": distance.mean().item(),
                "coefficient": coefficient.mean().item(), "distance_sd": distance.std().item(),
                "coefficient_sd": coefficient.std().item(),
            })  # fmt: skip
    return finite_table(pd.DataFrame(rows), f"{suite.name}, cross-task linearity")


@torch.no_grad()
def block_features(tower: torch.nn.Module, pixels: Tensor) -> list[Tensor]:
    """The output of every transformer block, (n, tokens, width) each."""
    found: list[Tensor] = []
    blocks = tower.get_submodule("transformer.resblocks").children()

    def note(block: torch.nn.Module, given: object, out: Tensor) -> None:
        found.append(out)

    hooks = [block.register_forward_hook(note) for block in blocks]
    try:
        tower(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _compare(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = a.flatten(1).double(), b.flatten(1).double()
    product = (a * b).sum(dim=1)
    return 1 - F.cosine_similarity(a, b), product / b.square().sum(dim=1)


def joint_loss(
    suite: Suite, vectors: Mapping[str, TaskVector], *, weights: Sequence[Sequence[float]] = (), steps: int = 11,
    split: str = "test", pictures: int | None = None, tangent: bool = False, device: str = "auto",
) -> pd.DataFrame:  # fmt: skip
    """The joint loss L = Σ_t L_t of Σ αt θt, and its gap δ(α) = L(Σ αt θt) − Σ αt L(θt) (SAFT, arXiv 2504.14662).

    δ > 0 is a barrier. Where the task models are poor on each other's tasks the mixture is large, and δ small or
    negative whatever their flatness: read it beside L.

    Args:
        vectors: task -> task vector; L sums over these tasks' splits.
        weights: points α on the simplex, one number a task; () is `steps` points along the segment of two tasks, from
            the first task's model (α = 1) to the second's, or the centre for more tasks.

    Returns:
        one row a point: alpha (the first weight), loss (nats, summed over tasks), mixed (Σ αt L(θt)) and gap.

    Raises:
        ValueError: a point that is not on the simplex.
    """
    count = len(vectors)
    if not weights and count == 2:
        weights = [(1 - i / (steps - 1), i / (steps - 1)) for i in range(steps)]
    weights = weights or [(1 / count,) * count]
    for point in weights:
        if len(point) != count or min(point) < 0 or abs(sum(point) - 1) > 1e-9:
            raise ValueError(f"weights are {count} numbers from 0 that sum to 1, not {tuple(point)}")
    family = ModelFamily(suite, list(vectors.values()), tangent=tangent, device=device)

    def loss(point: Sequence[float]) -> float:
        total = 0.0
        for task in vectors:
            labels = suite.tasks[task].splits[split].labels[:pictures]
            total += F.cross_entropy(family.logits(task, point, split=split, pictures=pictures), labels).item()
        return total

    ends = [loss([float(i == j) for j in range(count)]) for i in range(count)]
    rows = []
    for point in weights:
        mixed = sum(a * end for a, end in zip(point, ends, strict=True))
        here = loss(point)
        rows.append({"alpha": point[0], "loss": here, "mixed": mixed, "gap": here - mixed})
    return finite_table(pd.DataFrame(rows), f"{suite.name}, joint loss of {', '.join(vectors)}")


def segment_curvature(
    suite: Suite, vectors: Mapping[str, TaskVector], *, points: int = 3, split: str = "test",
    pictures: int | None = None, iterations: int = 12, device: str = "auto",
) -> pd.DataFrame:  # fmt: skip
    """The joint loss's extreme curvatures at points of the segment between two task models (plain ones, not tangent).

    They bound the gap of `joint_loss`: |δ(α)| ≤ ½ α(1−α) ‖θs − θt‖² max ‖H‖₂, with the maximum along the whole segment
    (SAFT, arXiv 2504.14662). A few points, and Lanczos's values, which come from below, make that an estimate.

    Args:
        vectors: two tasks with their task vectors. points: evenly spaced, from the second task's model to the first's.
        iterations: Hessian-vector products at each point, see `hessian_eigenvalues`.

    Returns:
        one row a point: alpha (the weight of the first), top, bottom, norm and residual, as `hessian_eigenvalues`.

    Raises:
        ValueError: not two tasks.
    """
    if len(vectors) != 2:
        raise ValueError(f"a segment is between two tasks, not {len(vectors)}")
    first, second = vectors.values()
    rows = []
    for i in range(points):
        alpha = i / max(1, points - 1)
        tower = suite.tower(alpha * first + (1 - alpha) * second)
        parts = [(suite.classifier(task, tower), suite.tasks[task].splits[split][:pictures]) for task in vectors]
        rows.append({"alpha": alpha, **hessian_eigenvalues(parts, iterations=iterations, device=device)})
    return pd.DataFrame(rows)
