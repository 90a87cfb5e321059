"""LoRA through PEFT: adapters as task vectors, PEFT's files in and out, Hugging Face's names."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from saftnb.backbones import (
    add_lora,
    build_clip,
    fuse_state,
    load_adapter,
    load_pocket_backbone,
    load_tower,
    lora_vector,
    peft_weighted,
    unfuse_attention,
)
from saftnb.formats import tower_state
from saftnb.merging import LowRank, TaskVector, merge

HF = CLIPVisionConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7,
    projection_dim=20, hidden_act="quick_gelu",
)  # fmt: skip
TWIN = {
    "embed_dim": 20, "quick_gelu": True,
    "vision_cfg": {
        "image_size": 28, "layers": 2, "width": 32, "head_width": 8, "patch_size": 7, "mlp_ratio": 1.5
    },
    "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 8, "heads": 2, "layers": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def open_clip_twin():
    """A tower of open_clip with the shapes of `HF`."""
    return unfuse_attention(build_clip(TWIN).visual).eval()


def randomised(model, seed=0):
    """Every trained factor at random values, so that B is not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def factors(model):
    return {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}


def test_lora_starts_as_the_plain_tower_and_only_its_factors_train(pixels):
    plain = load_pocket_backbone().image_tower()
    tower = add_lora(load_pocket_backbone().image_tower(), rank=4, alpha=8)
    assert torch.equal(tower.eval()(pixels), plain(pixels))
    trained = [name for name, p in tower.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 4 * len(tower.transformer.resblocks)
    assert all(".lora_" in name for name in trained)
    state = torch.get_rng_state()
    one, two, other = (factors(add_lora(load_pocket_backbone().image_tower(), seed=s)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("rank", "alpha"), [(1, 16), (4, 8), (16, 16)])
def test_an_adapter_is_a_task_vector(pixels, rank, alpha):
    tower = randomised(add_lora(load_pocket_backbone().image_tower(), rank=rank, alpha=alpha)).eval()
    vector = lora_vector(factors(tower), alpha / rank)
    assert all(isinstance(delta, LowRank) and delta.B.shape[1] == rank for delta in vector.values())
    merged = vector.apply_to(load_pocket_backbone().image_tower())
    torch.testing.assert_close(merged(pixels), tower(pixels), rtol=1e-4, atol=1e-5)


def test_dropout_draws_while_training_alone(pixels):
    tower = randomised(add_lora(load_pocket_backbone().image_tower(), dropout=0.5))
    assert torch.equal(tower.eval()(pixels), tower(pixels))
    tower.train()
    assert not torch.equal(tower(pixels), tower(pixels))


@given(ranks=st.lists(st.integers(0, 6), min_size=2, max_size=2))
def test_what_we_write_loads_in_plain_peft(tmp_path_factory, ranks):
    folder, generator = tmp_path_factory.mktemp("adapter"), torch.Generator().manual_seed(sum(ranks))
    shapes = {
        "transformer.resblocks.0.attn.q_proj.weight": (32, 32),
        "transformer.resblocks.1.mlp.c_fc.weight": (48, 32),
    }
    vector = TaskVector(
        {
            name: LowRank(torch.randn(o, rank, generator=generator), torch.randn(rank, i, generator=generator))
            for rank, (name, (o, i)) in zip(ranks, shapes.items(), strict=True)
        }
    )
    vector.to_adapter(folder, base="twin")
    tower, pictures = open_clip_twin(), torch.randn(2, 3, 28, 28, generator=generator)
    wanted = vector.apply_to(open_clip_twin_like(tower))(pictures)
    loaded = PeftModel.from_pretrained(open_clip_twin_like(tower), folder).eval()
    torch.testing.assert_close(loaded(pictures), wanted, rtol=1e-4, atol=1e-4)
    again = load_adapter(folder, tower)
    for name, delta in vector.items():
        torch.testing.assert_close(again[name].dense(), delta.dense(), rtol=1e-5, atol=1e-5)


def open_clip_twin_like(tower):
    twin = open_clip_twin()
    twin.load_state_dict(tower.state_dict())
    return twin


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    ],
)
@pytest.mark.parametrize("kind", ["bare tower", "with vision_model", "old keys"])
@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT asks transformers by its old name
def test_hugging_face_adapters_load_into_our_towers(tmp_path, pixels, kind, options):
    torch.manual_seed(0)
    theirs = (CLIPVisionModel if kind == "bare tower" else CLIPVisionModelWithProjection)(HF).eval()
    tower = open_clip_twin()
    projected = CLIPVisionModelWithProjection(HF).eval() if kind == "bare tower" else theirs
    if kind == "bare tower":
        projected.vision_model.load_state_dict(theirs.state_dict())
    tower.load_state_dict(tower_state(projected.state_dict()))
    torch.testing.assert_close(tower(pixels), projected(pixels).image_embeds, rtol=1e-4, atol=1e-5)

    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], **options)
    adapted = randomised(get_peft_model(theirs, config)).eval()
    adapted.save_pretrained(tmp_path)
    if kind == "old keys":  # early PEFT kept the adapter's name in the keys
        state = load_file(tmp_path / "adapter_model.safetensors")
        renamed = {name.replace(".weight", ".default.weight"): value for name, value in state.items()}
        save_file(renamed, tmp_path / "adapter_model.safetensors")
    load_adapter(tmp_path, tower).apply_to(tower)
    if kind == "bare tower":
        projected.vision_model.load_state_dict(adapted.merge_and_unload().state_dict())
    torch.testing.assert_close(tower(pixels), projected(pixels).image_embeds, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True; only plain LoRA"),
        ({"bias": "all"}, "bias is 'all'; only plain LoRA"),
        ({"modules_to_save": ["norm", "score"]}, r"modules_to_save is \['norm'\]; only plain LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; only plain LoRA"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"r": 8, "lora_alpha": 8}, "'a.weight' is of rank 1 in the weights and 8 in the config"),
        ({"peft_type": "LOHA"}, "the adapter is LOHA, not LORA"),
    ],
)
def test_other_adapters_are_refused(tmp_path, change, message):
    TaskVector({"a.weight": LowRank(torch.ones(2, 1), torch.ones(1, 2))}).to_adapter(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path)


def test_adapters_for_another_model_and_broken_ones_are_one_line(tmp_path):
    TaskVector({"conv9.weight": LowRank(torch.ones(2, 1), torch.ones(1, 2))}).to_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match=r"an adapter for another model: there is no 'conv9.weight' in this one"):
        load_adapter(tmp_path / "a", open_clip_twin())
    name = "transformer.resblocks.0.attn.q_proj.weight"
    TaskVector({name: LowRank(torch.ones(2, 1), torch.ones(1, 2))}).to_adapter(tmp_path / "b")
    with pytest.raises(ValueError, match=r"is \(2, 2\) there and \(32, 32\) here"):
        load_adapter(tmp_path / "b", open_clip_twin())
    weights = tmp_path / "b" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_adapter(tmp_path / "b")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors"):
        load_adapter(tmp_path / "b")
    with pytest.raises(ValueError, match="has lora_A alone"):
        lora_vector({"x.lora_A.weight": torch.ones(1, 2)}, 1.0)
    with pytest.raises(ValueError, match="is no factor of a LoRA adapter"):
        lora_vector({"x.bias": torch.ones(1, 2)}, 1.0)
    with pytest.raises(ValueError, match="is not a low-rank delta of a weight"):
        TaskVector({"w.weight": torch.ones(2, 2)}).to_adapter(tmp_path / "c")


def whole_clip(tower):
    """A whole open_clip model's state dict around a tower, attention fused, as training scripts save it."""
    clip = build_clip(TWIN)
    clip.visual.load_state_dict(fuse_state(tower.state_dict()))
    return clip.state_dict()


@pytest.mark.parametrize("kind", ["safetensors", "pt", "pt nested", "hugging face", "module"])
def test_towers_of_others_load(tmp_path, pixels, kind):
    torch.manual_seed(1)
    source = open_clip_twin()
    file = tmp_path / ("w.safetensors" if kind in ("safetensors", "hugging face") else "w.pt")
    wanted = source(pixels)
    if kind == "safetensors":
        save_file(whole_clip(source), file)
    elif kind == "pt":
        torch.save(fuse_state(source.state_dict()), file)
    elif kind == "pt nested":
        state = {f"module.model.{name}": value for name, value in whole_clip(source).items()}
        torch.save({"state_dict": state, "epoch": 3}, file)
    elif kind == "hugging face":
        theirs = CLIPVisionModelWithProjection(HF).eval()
        save_file({n: v.contiguous() for n, v in theirs.state_dict().items()}, file)
        wanted = theirs(pixels).image_embeds
    else:
        torch.save(source, file)
        with pytest.raises(ValueError, match="is a pickled object, which can run code") as caught:
            load_tower(file, open_clip_twin())
        assert "trust_pickle=True" in str(caught.value)
        assert "\n" not in str(caught.value)
    tower = load_tower(file, open_clip_twin(), trust_pickle=kind == "module")
    torch.testing.assert_close(tower(pixels), wanted, rtol=1e-4, atol=1e-5)


def test_towers_of_another_model_are_refused(tmp_path):
    state = open_clip_twin().state_dict()
    before = {name: value.clone() for name, value in state.items()}
    tower = open_clip_twin()
    tower.load_state_dict(before)
    for change, message in (
        (lambda s: s.pop("ln_pre.bias"), "the file lacks 'ln_pre.bias'"),
        (lambda s: s.update(extra=torch.ones(1)), "this tower has no 'extra'"),
        (lambda s: s.update(proj=torch.ones(3, 3)), r"'proj' is \(3, 3\) there and \(32, 20\) here"),
    ):
        bad = {name: value + 1 for name, value in state.items()}
        change(bad)
        save_file(bad, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=message):
            load_tower(tmp_path / "w.safetensors", tower)
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_tower(tmp_path / "w.pt", tower)
    assert all(torch.equal(p, before[name]) for name, p in tower.state_dict().items())


def test_a_linear_layer_elsewhere_keeps_its_name(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

    adapted = randomised(get_peft_model(Net(), LoraConfig(r=1, lora_alpha=3, target_modules=["head"])))
    adapted.save_pretrained(tmp_path)
    assert list(load_adapter(tmp_path, Net())) == ["head.weight"]


@pytest.mark.parametrize("space", ["knots", "core"])
def test_a_merged_model_is_one_adapter_of_rank_at_most_the_sum(tmp_path, pixels, space):
    """Adapters of unequal ranks, merged by TIES in a space, written, loaded in plain PEFT: the same embeddings."""
    vectors = [
        lora_vector(factors(randomised(add_lora(load_pocket_backbone().image_tower(), rank=r), seed=r)), 16 / r)
        for r in (2, 3, 5)
    ]
    merged = merge(vectors, "ties", space=space, keep=0.3, scale=0.7)
    merged.to_adapter(tmp_path)
    assert max(delta.B.shape[1] for delta in merged.values()) <= 10
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] <= 10
    wanted = merged.apply_to(load_pocket_backbone().image_tower())(pixels)
    loaded = PeftModel.from_pretrained(load_pocket_backbone().image_tower(), tmp_path).eval()
    torch.testing.assert_close(loaded(pixels), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, load_pocket_backbone().image_tower()(pixels), atol=1e-2)


def test_peft_s_own_merges_are_not_ours_but_for_the_plain_sum():
    vectors = [
        lora_vector(factors(randomised(add_lora(load_pocket_backbone().image_tower(), rank=2), seed=i)), 8.0)
        for i in range(3)
    ]
    tower = load_pocket_backbone().image_tower()
    before = {name: p.clone() for name, p in tower.state_dict().items()}
    total = merge(vectors, "task_arithmetic", scale=1.0).dense()

    def gap(ours, theirs):
        return (ours.dense() - theirs).norm() / theirs.norm()

    assert gap(peft_weighted(tower, vectors, "cat"), total) < 1e-5
    assert gap(peft_weighted(tower, vectors, "svd", svd_rank=6), total) < 1e-4
    assert gap(peft_weighted(tower, vectors, "svd"), total) > 0.1  # cut to rank 2
    assert gap(peft_weighted(tower, vectors, "linear"), total) > 0.1
    ties = merge(vectors, "ties", keep=0.5, scale=1.0)
    assert gap(peft_weighted(tower, vectors, "ties", density=0.5), ties) > 0.1
    assert all(torch.equal(p, before[name]) for name, p in tower.state_dict().items())


def test_layers_whose_names_end_alike_keep_their_own_ranks(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.attn = nn.Linear(4, 4), nn.ModuleDict({"proj": nn.Linear(4, 4)})

        def forward(self, x):
            return self.attn["proj"](self.proj(x))

    torch.manual_seed(0)
    vector = TaskVector(
        {
            "proj.weight": LowRank(torch.randn(4, 2), torch.randn(2, 4)),
            "attn.proj.weight": LowRank(torch.randn(4, 3), torch.randn(3, 4)),
        }
    )
    net, x = Net(), torch.randn(2, 4)
    vector.to_adapter(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)
    torch.testing.assert_close(loaded(x), vector.apply_to(copy.deepcopy(net))(x))
    assert {n: d.B.shape[1] for n, d in load_adapter(tmp_path, net).items()} == {
        "proj.weight": 2,
        "attn.proj.weight": 3,
    }
