"""What `fisher` and `regmean` need to know of a task: measured on its own fine-tuned model and some of its pictures."""

import copy
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from saftnb.backbones import ImageClassifier, resolve_device
from saftnb.delta import is_finite
from saftnb.evaluate import naming
from saftnb.suites import AnySuite, PairSuite
from saftnb.task_vector import TaskVector

METHODS = ("fisher", "regmean")
EXACT_CLASSES = 64  # up to so many labels the Fisher information sums over all of them


def suite_statistics(
    suite: AnySuite, experts: Mapping[str, TaskVector], method: str, *, pictures: int = 100, device: str = "auto"
) -> dict[str, dict[str, Tensor]]:
    """What `fisher` or `regmean` needs of every task, measured on its own model: `merge(..., statistics=...)`.

    Args:
        experts: task -> task vector, full or low-rank; what it does not change is left out.
        method: "fisher" (`fisher_diagonal`) or "regmean" (`gram_matrices`).
        pictures: the first so many training pictures of each task; no labels are used.

    Returns:
        task -> parameter name -> tensor.

    Raises:
        ValueError: another method, or a suite of sentence pairs. FloatingPointError: what was measured is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"method is fisher or regmean, not {method!r}: no other needs statistics")
    if isinstance(suite, PairSuite):
        raise ValueError(f"the statistics of {method} are of pictures, and {suite.name} has sentence pairs")
    measure = fisher_diagonal if method == "fisher" else gram_matrices
    found: dict[str, dict[str, Tensor]] = {}
    for task, vector in experts.items():
        model = suite.classifier(task, suite.tower(vector))
        with naming(f"{suite.name}, {task}"):
            every = measure(model, suite.tasks[task].train[:pictures].images, device=device)
        found[task] = {name: every[name] for name in vector if name in every}
    return found


def fisher_diagonal(
    model: ImageClassifier, images: Tensor, *, seed: int = 0, device: str = "auto", batch_size: int = 16
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information, E_x E_y∼p(y|x) (∂ log p(y|x) / ∂θ)², over the tower's parameters.

    The expectation over labels is exact for up to `EXACT_CLASSES` classes, one gradient for each, as in the authors'
    code (Matena & Raffel 2022); with more it is one label a picture, drawn from the model itself.

    Args:
        model: a fine-tuned classifier. images: uint8 (n, 3, h, w), a few hundred.
        seed: decides the labels that are drawn.

    Returns:
        parameter name -> tensor of the parameter's shape, on the CPU.
    """
    where = resolve_device(device)
    twin = copy.deepcopy(model).to(where).eval().requires_grad_(False)
    weights = {name: p.detach() for name, p in twin.tower.named_parameters()}
    totals = {name: torch.zeros_like(p) for name, p in weights.items()}
    generator = torch.Generator().manual_seed(seed)

    def log_likelihood(weights: dict[str, Tensor], pixels: Tensor, drawn: Tensor) -> Tensor:
        embedding = functional_call(twin.tower, weights, (pixels[None],))
        return (F.log_softmax(twin.classify(embedding)[0], dim=0) * drawn).sum()

    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no rule for vmap
        for batch in images.split(batch_size):
            pixels = twin.pixels(batch.to(where))
            shares = twin.classify(twin.tower(pixels)).softmax(dim=1)
            for labels, share in _labels(shares, generator):
                each = vmap(grad(log_likelihood), in_dims=(None, 0, 0))(weights, pixels, labels)
                for name, gradient in each.items():
                    totals[name] += torch.einsum("b,b...->...", share, gradient.square_())
    return _finite({name: (total / len(images)).cpu() for name, total in totals.items()}, "the Fisher information")


def _labels(shares: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels (b, classes), one-hot, and what each counts (b,): every label by its share, or one that is drawn."""
    classes = shares.shape[1]
    if classes <= EXACT_CLASSES:
        for label, own in enumerate(torch.eye(classes, dtype=shares.dtype, device=shares.device)):
            yield own.expand_as(shares), shares[:, label]
    else:
        drawn = torch.multinomial(shares.cpu(), 1, generator=generator)[:, 0].to(shares.device)
        yield F.one_hot(drawn, classes).to(shares.dtype), torch.ones_like(shares[:, 0])


@torch.no_grad()
def gram_matrices(
    model: ImageClassifier, images: Tensor, *, device: str = "auto", batch_size: int = 100
) -> dict[str, Tensor]:
    """G, the mean of x xᵀ over all tokens of all pictures, for the inputs x of every `nn.Linear` of the tower.

    A mean, as in public implementations of RegMean: else a task with more pictures would weigh more.

    Returns:
        name of the layer's weight -> (inputs, inputs), float64, on the CPU.
    """
    where = resolve_device(device)
    twin = copy.deepcopy(model).to(where).eval()
    found: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].flatten(0, -2).double()
            found[name] = found.get(name, 0) + x.T @ x
            tokens[name] = tokens.get(name, 0) + len(x)

        return hook

    for name, module in twin.tower.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note(f"{name}.weight"))
    for batch in images.split(batch_size):
        twin(batch.to(where))
    return _finite({name: (gram / tokens[name]).cpu() for name, gram in found.items()}, "the mean of x xᵀ")


def _finite(found: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """What was measured, unless a number of it is not finite: the FloatingPointError names the first parameter."""
    for name, values in found.items():
        if not is_finite(values):
            raise FloatingPointError(f"{what} of {name!r} is not finite")
    return found
