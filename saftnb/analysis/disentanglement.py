"""Weight disentanglement: does adding one task's vector leave the other task's predictions alone?"""

from collections.abc import Mapping, Sequence
from typing import Literal

import pandas as pd
from torch import Tensor

from saftnb.evaluate import ModelFamily
from saftnb.progress import progress_bar
from saftnb.suites import Suite
from saftnb.task_vector import TaskVector


def disentanglement_map(
    suite: Suite, vectors: Mapping[str, TaskVector], alphas: Sequence[float], *, split: str = "test",
    pictures: int | None = None, convention: Literal["sum", "mean"] = "sum", tangent: bool = False,
    device: str = "auto", progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """The disentanglement error ξ(α1, α2) of two tasks on a grid (Ortiz-Jimenez et al. 2023, arXiv 2305.12827, eq. 5):

        ξ(α1, α2) = Σ_t E_{x∈D_t} [ f(x; θ0 + α_t τ_t) and f(x; θ0 + α1 τ1 + α2 τ2) predict different classes ].

    The predictions of a single task vector are made once for each α, not once for each cell; a tangent model needs the
    pictures twice in all.

    Args:
        vectors: two tasks with their task vectors; D_t is that task's `split` (its first `pictures`).
        alphas: values of both coefficients; 0 has to be one of them.
        convention: "sum" adds the two terms, ξ lies in 0 to 2; "mean" halves that. Published figures use either.

    Returns:
        one row a cell: alpha_1, alpha_2, xi, and the two terms xi_1, xi_2, each 0 to 1.

    Raises:
        ValueError: not two tasks, no 0 among the alphas, or an unknown convention.
    """
    if len(vectors) != 2:
        raise ValueError(f"a disentanglement map is of two tasks, not of {len(vectors)}")
    if 0 not in alphas:
        raise ValueError("the alphas must hold 0, where no vector is added")
    if convention not in ("sum", "mean"):
        raise ValueError(f"convention is sum or mean, not {convention!r}")
    family = ModelFamily(suite, list(vectors.values()), tangent=tangent, device=device)

    def predict(task: str, point: tuple[float, float]) -> Tensor:
        return family.logits(task, point, split=split, pictures=pictures).argmax(dim=1)

    one, two = vectors
    alone = [{a: predict(one, (a, 0.0)) for a in alphas}, {a: predict(two, (0.0, a)) for a in alphas}]
    share = 1.0 if convention == "sum" else 0.5
    rows = []
    cells = [(a, b) for a in alphas for b in alphas]
    for a, b in progress_bar(cells, desc=f"disentanglement {one}, {two}", disable=not progress, mininterval=1):
        # On an axis one of the two models is the single one itself.
        first = 0.0 if b == 0 else (predict(one, (a, b)) != alone[0][a]).double().mean().item()
        second = 0.0 if a == 0 else (predict(two, (a, b)) != alone[1][b]).double().mean().item()
        rows.append({"alpha_1": a, "alpha_2": b, "xi": share * (first + second), "xi_1": first, "xi_2": second})
    return pd.DataFrame(rows)


def mean_inside_box(frame: pd.DataFrame, side: float = 1.0) -> float:
    """Mean of ξ over the cells with |α1| and |α2| at most `side`: the map in one number, in its own convention."""
    inside = (frame["alpha_1"].abs() <= side + 1e-9) & (frame["alpha_2"].abs() <= side + 1e-9)
    return float(frame.loc[inside, "xi"].mean())
