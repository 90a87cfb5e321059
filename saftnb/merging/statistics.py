"""What `fisher` and `regmean` need to know of a task: measured on its own fine-tuned model and some of its pictures."""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from saftnb.backbones import ImageClassifier, resolve_device


def fisher_diagonal(
    model: ImageClassifier, images: Tensor, *, seed: int = 0, device: str = "auto", batch_size: int = 16
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information, E_x E_y∼p(y|x) (∂ log p(y|x) / ∂θ)², over the tower's parameters.

    Args:
        model: a fine-tuned classifier. images: uint8 (n, 3, h, w), a few hundred.
        seed: decides the labels, one a picture, drawn from the model itself.

    Returns:
        parameter name -> tensor of the parameter's shape, on the CPU.
    """
    where = resolve_device(device)
    twin = copy.deepcopy(model).to(where).eval().requires_grad_(False)
    weights = {name: p.detach() for name, p in twin.tower.named_parameters()}
    totals = {name: torch.zeros_like(p) for name, p in weights.items()}
    generator = torch.Generator().manual_seed(seed)

    def log_likelihood(weights: Mapping[str, Tensor], pixels: Tensor, drawn: Tensor) -> Tensor:
        embedding = functional_call(twin.tower, weights, (pixels[None],))
        return (F.log_softmax(twin.classify(embedding)[0], dim=0) * drawn).sum()

    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no rule for vmap
        for batch in images.split(batch_size):
            pixels = twin.pixels(batch.to(where))
            shares = twin.classify(twin.tower(pixels)).softmax(dim=1).cpu()
            drawn = F.one_hot(torch.multinomial(shares, 1, generator=generator)[:, 0], shares.shape[1]).to(where)
            each = vmap(grad(log_likelihood), in_dims=(None, 0, 0))(weights, pixels, drawn)
            for name, gradient in each.items():
                totals[name] += gradient.square().sum(dim=0)
    return {name: (total / len(images)).cpu() for name, total in totals.items()}


@torch.no_grad()
def gram_matrices(
    model: ImageClassifier, images: Tensor, *, device: str = "auto", batch_size: int = 100
) -> dict[str, Tensor]:
    """G = Σ x xᵀ over all tokens of all pictures, for the inputs x of every `nn.Linear` of the tower.

    Returns:
        name of the layer's weight -> (inputs, inputs), float64, on the CPU.
    """
    where = resolve_device(device)
    twin = copy.deepcopy(model).to(where).eval()
    found: dict[str, Tensor] = {}

    def note(name: str):
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].flatten(0, -2).double()
            found[name] = found.get(name, 0) + x.T @ x

        return hook

    for name, module in twin.tower.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note(f"{name}.weight"))
    for batch in images.split(batch_size):
        twin(batch.to(where))
    return {name: gram.cpu() for name, gram in found.items()}
