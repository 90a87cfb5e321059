"""The unfused attention equals open_clip's fused one, and weights convert both ways without loss."""

import copy

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from saftnb.backbones import Attention, fuse_attention, fuse_state, load_pocket_backbone, unfuse_attention, unfuse_state


def slow_attention(module: Attention, x: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q kᵀ / √d) v, one head and one query at a time."""
    batch, tokens, width = x.shape
    size = width // module.num_heads
    q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    out = torch.zeros_like(x)
    for b in range(batch):
        for head in range(module.num_heads):
            part = slice(head * size, (head + 1) * size)
            for i in range(tokens):
                scores = torch.stack([q[b, i, part] @ k[b, j, part] / size**0.5 for j in range(tokens)])
                if hidden is not None:
                    scores = scores.masked_fill(hidden[i], float("-inf"))
                out[b, i, part] = sum(w * v[b, j, part] for j, w in enumerate(scores.softmax(dim=0)))
    return module.out_proj(out)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 3), st.integers(1, 6), st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 99))
def test_equals_the_definition_and_the_fused_module(batch, tokens, heads, causal, seed):
    torch.manual_seed(seed)
    fused = nn.MultiheadAttention(8, heads, batch_first=True)
    nn.init.normal_(fused.in_proj_bias)
    unfused = unfuse_attention(nn.Sequential(fused))[0]
    x = torch.randn(batch, tokens, 8)
    mask = torch.triu(torch.ones(tokens, tokens, dtype=torch.bool), 1) if causal else None
    ours = unfused(x, x, x, attn_mask=mask)[0]
    torch.testing.assert_close(ours, fused(x, x, x, need_weights=False, attn_mask=mask)[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours, slow_attention(unfused, x, mask), atol=1e-5, rtol=0)
    if causal:
        additive = torch.zeros(tokens, tokens).masked_fill(mask, float("-inf"))
        torch.testing.assert_close(unfused(x, x, x, attn_mask=additive)[0], ours, atol=1e-6, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_an_open_clip_tower_gives_the_same_embeddings(training):
    vision = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    torch.manual_seed(0)
    fused = open_clip.CLIP(48, vision, text).train(training)
    unfused = unfuse_attention(copy.deepcopy(fused))
    assert not any(isinstance(m, nn.MultiheadAttention) for m in unfused.modules())
    assert sum(isinstance(m, Attention) for m in unfused.modules()) == 5
    images, tokens = torch.randn(4, 3, 32, 32), torch.randint(1, 50, (4, 8))
    torch.testing.assert_close(unfused.encode_image(images), fused.encode_image(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(unfused.encode_text(tokens), fused.encode_text(tokens), atol=1e-5, rtol=0)
    again = fuse_attention(copy.deepcopy(unfused))
    for name, value in fused.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_state_dicts_convert_both_ways_without_the_model():
    tower = load_pocket_backbone().image_tower()
    state = tower.state_dict()
    fused = fuse_state(state)
    assert not any("q_proj" in name for name in fused)
    assert any(name.endswith("in_proj_weight") for name in fused)
    back = unfuse_state(fused)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_attention_that_has_no_equal_here_is_refused():
    for options in ({"bias": False}, {"dropout": 0.1}, {"batch_first": False}, {"add_bias_kv": True}, {"kdim": 4}):
        model = nn.Sequential(nn.MultiheadAttention(8, 2, **({"batch_first": True} | options)))
        with pytest.raises(ValueError, match="0: only batch-first"):
            unfuse_attention(model)
    with pytest.raises(ValueError, match="need_weights=False"):
        Attention(8, 2)(torch.randn(1, 2, 8), None, None, need_weights=True)
