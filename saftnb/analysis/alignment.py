"""How far the updates of different tasks point the same way: linear CKA, singular spectra, shared directions."""

import copy
import itertools
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from saftnb.analysis.finite import require_finite
from saftnb.backbones import resolve_device
from saftnb.delta import dense, is_finite
from saftnb.merging import represent
from saftnb.merging.bases import joint_svd
from saftnb.suites import Suite
from saftnb.task_vector import Delta, LowRank, TaskVector


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two views of the same n rows, (n, a) and (n, b), in 0 to 1; NaN where one of them is constant.

    ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) in Frobenius norms, columns centred (Kornblith et al. 2019, arXiv 1905.00414, eq. 3).
    Raises FloatingPointError on views that are not finite.
    """
    if not (is_finite(x) and is_finite(y)):
        raise FloatingPointError("linear CKA of views that are not finite")
    x, y = (v.double() - v.double().mean(dim=0) for v in (x, y))
    if min(x.shape) * min(y.shape) == 0:
        return float("nan")
    left, right = (torch.linalg.matrix_norm(v.T @ v if v.shape[1] < v.shape[0] else v @ v.T) for v in (x, y))
    return float(torch.linalg.matrix_norm(y.T @ x) ** 2 / (left * right))


@torch.no_grad()
def layer_inputs(
    suite: Suite, layers: Sequence[str], *, pictures: int = 20, rows: int = 2000, seed: int = 0, device: str = "auto"
) -> dict[str, Tensor]:
    """What the pre-trained tower gives to some of its linear layers, for test pictures of all tasks.

    Args:
        layers: names of their weights. pictures: of each task. rows: tokens, at most, drawn at random for `seed`.

    Returns:
        weight's name -> (rows, inputs), on the CPU, of the same tokens for all layers.
    """
    where = resolve_device(device)
    tower = copy.deepcopy(suite.tower()).to(where)
    parts = {task: suite.tasks[task].test[:pictures].images for task in suite.tasks}
    images = sum(map(len, parts.values()))
    wanted: list[Tensor] = []  # the chosen tokens, as numbers in the order in which they come
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    seen = dict.fromkeys(layers, 0)

    def note(name: str):
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            flat = given[0].flatten(0, -2)
            if not wanted:
                total = images * len(flat) // len(given[0])
                wanted.append(torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:rows])
            here = wanted[0].sort().values - seen[name]
            found[name].append(flat[here[(here >= 0) & (here < len(flat))].to(where)].cpu())
            seen[name] += len(flat)

        return hook

    for name in layers:
        tower.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(note(name))
    for task, part in parts.items():
        prepare = suite.classifier(task, tower).to(where).pixels
        for batch in part.split(50):
            tower(prepare(batch.to(where)))
    order = wanted[0].argsort().argsort()
    given = {name: torch.cat(pieces)[order] for name, pieces in found.items()}
    for name, values in given.items():
        if not is_finite(values):
            raise FloatingPointError(f"{suite.name}: what the tower gives to {name!r} is not finite")
    return given


def update_cka(
    vectors: Mapping[str, TaskVector], *, inputs: Mapping[str, Tensor] | None = None, space: str = "weights"
) -> pd.DataFrame:
    """Linear CKA between the updates of every two tasks, layer by layer (KnOTS, arXiv 2410.19735, Figure 2).

    With `inputs`, on what the updates do: X Δ_iᵀ against X Δ_jᵀ, the rows being tokens. Without, on the updates
    themselves, Δ_i against Δ_j, the rows being outputs. Linear CKA does not see rotations: on inputs it is the same in
    the weights and in KnOTS's basis, since U is orthonormal, and on rows R_jᵀ R_i = Δ_jᵀ Δ_i, so that only the centring
    differs. What the basis does change is in `kept_entries`.

    Args:
        vectors: task -> task vector. Layers are their 2-D deltas, or those of `inputs`.

    Returns:
        one row a layer and pair: layer, task_1, task_2, cka.
    """
    tasks = list(vectors)
    there = represent(list(vectors.values()), space).vectors
    rows = []
    for name in inputs if inputs is not None else _matrices(there[0]):
        deltas = [dense(vector[name]) for vector in there]
        views = [inputs[name].to(delta) @ delta.T for delta in deltas] if inputs is not None else deltas
        for i, j in itertools.combinations(range(len(tasks)), 2):
            cka = linear_cka(views[i], views[j])
            rows.append({"layer": name, "task_1": tasks[i], "task_2": tasks[j], "cka": cka})
    return pd.DataFrame(rows)


def kept_entries(vectors: Mapping[str, TaskVector], keep: float = 0.2, *, space: str = "weights") -> pd.DataFrame:
    """What TIES meets in a space: of the entries that it keeps of two tasks, how many coincide, and with equal signs.

    Every task keeps its largest `keep` by magnitude over all matrices, as TIES trims.

    Returns:
        one row a pair: task_1, task_2; overlap: the share of the first's kept entries that the second keeps as well
        (by chance `keep`); agreement: the share of those with equal signs (by chance ½).
    """
    tasks = list(vectors)
    flat = []
    for vector in represent(list(vectors.values()), space).vectors:
        values = torch.cat([dense(vector[name]).flatten() for name in _matrices(vector)])
        count = len(values) - int(len(values) * keep)
        cut = values.abs().kthvalue(max(1, count)).values if keep < 1 else 0.0
        flat.append(torch.where(values.abs() >= cut, values, 0.0))
    rows = []
    for i, j in itertools.combinations(range(len(tasks)), 2):
        both = (flat[i] != 0) & (flat[j] != 0)
        rows.append({
            "task_1": tasks[i], "task_2": tasks[j], "overlap": float(both.sum() / (flat[i] != 0).sum()),
            "agreement": float((flat[i][both].sign() == flat[j][both].sign()).double().mean()),
        })  # fmt: skip
    return pd.DataFrame(rows)


def update_spectra(vectors: Mapping[str, TaskVector], count: int = 32) -> pd.DataFrame:
    """The largest singular values of every task's updates, and of all side by side, [Δ_1 … Δ_n].

    Returns:
        one row a layer, task ("joint" for all) and index (from 1): layer, task, index, value.

    Raises:
        FloatingPointError: a task vector that is not finite.
    """
    require_finite(vectors)
    rows = []
    for name in _matrices(next(iter(vectors.values()))):
        deltas = {task: [vector[name]] for task, vector in vectors.items()}
        deltas["joint"] = [vector[name] for vector in vectors.values()]
        for task, parts in deltas.items():
            for index, value in enumerate(_singular_values(parts)[:count], start=1):
                rows.append({"layer": name, "task": task, "index": index, "value": value})
    return pd.DataFrame(rows)


def shared_directions(vectors: Mapping[str, TaskVector], rank: int = 16) -> pd.DataFrame:
    """How much of two tasks' leading directions coincides: the mean squared cosine of the principal angles between
    their first `rank` left (right) singular vectors, 0: orthogonal, 1: the same space, or one within the other where an
    adapter has a lower rank. Chance is the (larger) rank / dimension. Dense updates need that rank at least: where one
    has less, arbitrary vectors fill up. NaN beside an adapter that is zero.

    Returns:
        one row a layer and pair: layer, task_1, task_2, left, right, chance_left, chance_right.

    Raises:
        FloatingPointError: a task vector that is not finite.
    """
    require_finite(vectors)
    rows = []
    shapes = {name: delta.shape for name, delta in next(iter(vectors.values())).items()}
    for name in _matrices(next(iter(vectors.values()))):
        bases = {}
        for task, vector in vectors.items():
            bases[task] = [basis[:, :rank] for basis in _singular_vectors(vector[name])]
        out, into = shapes[name]
        for one, two in itertools.combinations(vectors, 2):
            few, many = sorted(sides[0].shape[1] for sides in (bases[one], bases[two]))
            left, right = (
                float((a.T @ b).square().sum()) / few if few else float("nan")
                for a, b in zip(bases[one], bases[two], strict=True)
            )
            rows.append({
                "layer": name, "task_1": one, "task_2": two, "left": left, "right": right,
                "chance_left": many / out, "chance_right": many / into,
            })  # fmt: skip
    return pd.DataFrame(rows)


def _matrices(vector: TaskVector) -> list[str]:
    return [name for name, delta in vector.items() if len(delta.shape) == 2]


def _singular_values(deltas: Sequence[Delta]) -> list[float]:
    """All min(O, ΣI) of them, largest first, of [Δ_1 … Δ_n]; from the factors where all are of low rank."""
    if not all(isinstance(delta, LowRank) for delta in deltas):
        return torch.linalg.svdvals(torch.cat([dense(delta).double() for delta in deltas], dim=1)).tolist()
    _, parts = joint_svd([delta.to(torch.float64) for delta in deltas], cutoff=0.0)
    found = torch.cat(parts, dim=1).norm(dim=1).tolist()
    return found + [0.0] * (min(deltas[0].shape[0], sum(delta.shape[1] for delta in deltas)) - len(found))


def _singular_vectors(delta: Delta) -> tuple[Tensor, Tensor]:
    """Left (O, k) and right (I, k), of the largest singular values first; from the factors where there are some."""
    if not isinstance(delta, LowRank):
        u, _, vt = torch.linalg.svd(delta.double(), full_matrices=False)
        return u, vt.T
    u, (scaled,) = joint_svd([delta.to(torch.float64)], cutoff=0.0)
    return u, (scaled / scaled.norm(dim=1, keepdim=True)).T
