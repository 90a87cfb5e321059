"""The loss along straight lines through a model's weights."""

import copy
import math
from collections.abc import Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from saftnb.analysis.finite import finite_table
from saftnb.backbones import ImageClassifier, resolve_device
from saftnb.delta import is_finite
from saftnb.evaluate import finite_logits, naming
from saftnb.finetune import ascent_step
from saftnb.suites import Split

Direction = dict[str, Tensor]
BATCH = 50  # pictures a pass: sums over batches are exact, and ViT-L/14's gradients at 50 take some 26 GB


def _unit(direction: Direction) -> Direction:
    norm = math.sqrt(sum(float(d.double().square().sum()) for d in direction.values()))
    if not math.isfinite(norm):
        bad = next((name for name, d in direction.items() if not is_finite(d)), "a sum of squares")
        raise FloatingPointError(f"the direction is not finite, first in {bad!r}")
    if norm == 0:
        raise ValueError("the direction is zero: the loss has no gradient here")
    return {name: d / norm for name, d in direction.items()}


def random_direction(model: ImageClassifier, seed: int) -> Direction:
    """A Gaussian direction over all weights of the tower, of norm 1."""
    generator = torch.Generator().manual_seed(seed)
    return _unit({name: torch.randn(p.shape, generator=generator) for name, p in model.tower.named_parameters()})


def ascent_direction(
    model: ImageClassifier, split: Split, perturbation: str = "sam", *, device: str = "auto"
) -> Direction:
    """The direction of `SharpnessAware`'s perturbation ε for the mean loss over a split, scaled to norm 1."""
    return _unit(ascent(model, split, perturbation, device=device))


def ascent(model: ImageClassifier, split: Split, perturbation: str = "sam", *, device: str = "auto") -> Direction:
    """`SharpnessAware`'s perturbation ε at ρ = 1 for the mean loss over a split."""
    where = resolve_device(device)
    twin = copy.deepcopy(model).to(where).eval()
    twin.tower.requires_grad_(True)
    for images, labels in zip(split.images.split(BATCH), split.labels.split(BATCH), strict=True):
        loss = F.cross_entropy(twin(images.to(where)), labels.to(where), reduction="sum") / len(split)
        loss.backward()
    named = list(twin.tower.named_parameters())
    steps = ascent_step(named, perturbation, 1.0)
    return {name: step.detach().cpu() for (name, _), step in zip(named, steps, strict=True)}


@torch.no_grad()
def loss_slice(
    model: ImageClassifier, direction: Direction, distances: Sequence[float], split: Split, *, device: str = "auto"
) -> pd.DataFrame:
    """Mean cross-entropy and accuracy over a split at θ + t·direction, for every distance t.

    Returns columns distance (in units of ‖direction‖₂, 1 for the directions above), loss (nats), accuracy (0 to 1).
    The model is left as it was. Raises FloatingPointError where a logit or loss is not finite.
    """
    where = resolve_device(device)
    twin = copy.deepcopy(model).to(where).eval()
    parameters = dict(twin.tower.named_parameters())
    origin = {name: p.clone() for name, p in parameters.items()}
    labels = split.labels.to(where)
    rows = []
    for distance in distances:
        for name, p in parameters.items():
            p.copy_(origin[name] + distance * direction[name].to(where))
        with naming(f"the loss at distance {distance}"):
            out = finite_logits(torch.cat([twin(batch.to(where)) for batch in split.images.split(100)]))
        accuracy = (out.argmax(dim=1) == labels).float().mean().item()
        rows.append({"distance": float(distance), "loss": F.cross_entropy(out, labels).item(), "accuracy": accuracy})
    return finite_table(pd.DataFrame(rows), "loss along a line")
