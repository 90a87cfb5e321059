"""Multi-head attention with one Linear layer each for q, k, v and out.

open_clip's `nn.MultiheadAttention` keeps q, k and v in one fused matrix that PEFT cannot adapt and that a
per-matrix merge would treat as one. Every tower that `saftnb` trains uses the unfused module below; its outputs equal
the fused ones, and weights convert both ways without loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saftnb.formats import fuse_state, unfuse_state

_PARTS = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Scaled dot-product attention, softmax(q kᵀ / √d) v (Vaswani et al. 2017), a drop-in for `nn.MultiheadAttention`.

    Inputs are (batch, tokens, width); `attn_mask` is boolean (True: not attended) or additive, (tokens, tokens).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.num_heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        if need_weights:
            raise ValueError("Attention returns no attention weights: call it with need_weights=False")
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # nn.MultiheadAttention marks what to hide, SDPA what to see
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(-2)), None


def unfuse_attention(model: nn.Module) -> nn.Module:
    """Replace, in place, every `nn.MultiheadAttention` of `model` by an equal `Attention`; returns `model`.

    Raises:
        ValueError: an attention layer has no unfused equal here (other key width, no bias, sequence first, dropout).
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            plain = module.in_proj_bias is not None and module.bias_k is None and module.in_proj_weight is not None
            if not plain or module.dropout or not module.batch_first:
                raise ValueError(f"{name}: only batch-first attention with one fused, biased projection can be unfused")
            new = Attention(module.embed_dim, module.num_heads).to(module.in_proj_weight)
            new.load_state_dict(unfuse_state(module.state_dict()))
            model.set_submodule(name, new.train(module.training))
    return model


def fuse_attention(model: nn.Module) -> nn.Module:
    """The inverse of `unfuse_attention`: back to open_clip's own module, in place; returns `model`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Attention):
            weight = module.q_proj.weight
            new = nn.MultiheadAttention(weight.shape[0], module.num_heads, batch_first=True).to(weight)
            new.load_state_dict(fuse_state(module.state_dict()))
            model.set_submodule(name, new.train(module.training))
    return model


def attention_weights(model: nn.Module) -> list[str]:
    """Names of the weights of every `Attention`'s four projections, without the biases: what FTLO trains."""
    return [
        f"{name}.{part}.weight"
        for name, module in model.named_modules()
        if isinstance(module, Attention)
        for part in (*_PARTS, "out_proj")
    ]
