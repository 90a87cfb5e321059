"""Full models of others: every form that transformers, torch.save and training scripts give them."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, GPT2Config, GPT2LMHeadModel

import saftnb as sn
from saftnb.backbones import build_clip, fuse_state, load_tower
from saftnb.formats import open_checkpoint
from saftnb.formats.models import activation
from saftnb.merging import TaskVector, merge
from tests.backbones.test_lora import HF, TWIN, open_clip_twin

TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32,
    "eos_token_id": 1,
}  # fmt: skip


def whole():
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=HF.to_dict(), projection_dim=20))


@pytest.fixture
def clip(tmp_path):
    """A whole CLIP and a fine-tuned vision tower of it, as FusionBench publishes them; and the true difference."""
    torch.manual_seed(0)
    base, tuned = whole(), CLIPVisionModel(HF)
    tuned.load_state_dict(base.vision_model.state_dict(), strict=False) if not hasattr(tuned, "vision_model") else (
        tuned.vision_model.load_state_dict(base.vision_model.state_dict())
    )
    moved = {}
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            moved[name.removeprefix("vision_model.")] = delta = torch.randn(p.shape) / 10
            p += delta
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    return tmp_path, moved


@pytest.mark.parametrize("form", ["folder", "file", "bare names", "old names", "sharded", "pt", "model", "compiled"])
def test_a_vision_towers_task_vector_is_what_was_added(clip, form):
    folder, moved = clip
    source = folder / "tuned"
    state = load_file(source / "model.safetensors")
    bare = {name.removeprefix("vision_model."): value for name, value in state.items()}
    if form == "file":
        source = source / "model.safetensors"
    elif form in ("bare names", "old names"):
        prefix = "" if form == "bare names" else "vision_model."
        save_file({prefix + name: value for name, value in bare.items()}, source / "model.safetensors")
    elif form == "sharded":
        tower = CLIPVisionModel.from_pretrained(source)
        source = folder / "shards"
        tower.save_pretrained(source, max_shard_size="20KB")
        assert len(list(source.glob("*.safetensors"))) > 2
    elif form != "folder":
        (source / "config.json").unlink()
        source = folder / "w.pt"
        kept = {"pt": state, "model": {"model": state, "epoch": 3}}
        compiled = {"model_state_dict": {f"module._orig_mod.{name}": value for name, value in state.items()}}
        torch.save(kept.get(form, compiled), source)
    vector = sn.task_vector(source, base=folder / "base")
    assert {name.removeprefix("vision_model.") for name in vector} == set(moved)
    for name, delta in vector.items():
        torch.testing.assert_close(delta, moved[name.removeprefix("vision_model.")], rtol=1e-4, atol=1e-6)
    tower = load_tower(source, open_clip_twin())  # its projection stays
    theirs = CLIPVisionModel.from_pretrained(folder / "tuned") if form == "folder" else None
    if theirs is not None:
        pixels = torch.randn(2, 3, 28, 28)
        wanted = theirs.eval()(pixels).pooler_output @ tower.proj
        torch.testing.assert_close(tower(pixels), wanted, rtol=1e-4, atol=1e-5)


def test_a_vision_tower_against_open_clips_base_in_either_form(clip, tmp_path):
    folder, moved = clip
    tower = load_tower(folder / "base", open_clip_twin())
    whole_clip = build_clip(TWIN)
    whole_clip.visual.load_state_dict(fuse_state(tower.state_dict()))
    for base in (tower, whole_clip.state_dict()):
        vector = sn.task_vector(folder / "tuned", base=base)
        total = sum(delta.double().square().sum() for delta in vector.values()) ** 0.5
        wanted = sum(delta.double().square().sum() for delta in moved.values()) ** 0.5
        assert total == pytest.approx(float(wanted), rel=1e-4)
    assert any(name.endswith("visual.transformer.resblocks.0.attn.in_proj_weight") for name in vector)


def test_files_that_are_no_checkpoint_are_one_line_each(tmp_path):
    good = {"w": torch.ones(3, 3)}
    save_file(good, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-5])
    torch.save(good, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-300])
    for name in ("empty.safetensors", "empty.pt"):
        (tmp_path / name).touch()
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-1.safetensors"}}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors.index.json").write_text("{")
    for name, message in (
        ("cut.safetensors", "is not a whole safetensors file"),
        ("page.safetensors", "is not a whole safetensors file"),
        ("empty.safetensors", "is empty"),
        ("empty.pt", "is empty"),
        ("cut.pt", "torch.save wrote"),
        ("page.pt", "torch.save wrote"),
        ("lfs.safetensors", "is a pointer of Git LFS, not the weights"),
        ("list.pt", "holds no state dict"),
        ("epoch.pt", "holds no state dict"),
        ("nothing", "no weights in this folder; looked for"),
        ("index", "it names model-1.safetensors, which is not there"),
        ("broken", "is no JSON"),
        ("absent", "no such file or folder"),
        ("some/model", "the hub's local cache has no such model"),
    ):
        source = name if "/" in name else tmp_path / name
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            sn.task_vector(source, base=good)
        assert name.split("/")[-1] in str(caught.value)
        assert "\n" not in str(caught.value)


@settings(max_examples=300)
@given(st.binary(min_size=1, max_size=40), st.sampled_from(["pt", "safetensors"]))
def test_bytes_that_nobody_saved_are_one_line(tmp_path_factory, content, form):
    file = tmp_path_factory.getbasetemp() / f"any.{form}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="any.") as caught:
        open_checkpoint(file)
    assert "\n" not in str(caught.value)


def test_a_model_of_another_architecture_or_activation_is_refused(clip):
    folder, _ = clip
    with pytest.raises(ValueError, match="a full model needs the model it was fine-tuned from"):
        sn.task_vector(folder / "tuned")
    with pytest.raises(ValueError, match="weights of another model: its base has no"):
        sn.task_vector(folder / "tuned", base={"w": torch.ones(2)})
    state = load_file(folder / "tuned" / "model.safetensors")
    name = next(name for name in state if name.endswith("pre_layrnorm.weight"))
    for change, message in (
        (lambda s: s.pop(name), "the file lacks '.*pre_layrnorm.weight'"),
        (lambda s: s.update({name: torch.ones(3)}), r"is \(3,\) there and \(32,\) in the base"),
        (lambda s: s[name].fill_(torch.nan), "pre_layrnorm.weight' of tuned has NaN or infinite values"),
    ):
        bad = {n: v.clone() for n, v in state.items()}
        change(bad)
        save_file(bad, folder / "bad.safetensors")
        with pytest.raises(ValueError, match=message):
            sn.task_vector(folder / "bad.safetensors", base=folder / "base")
    config = folder / "tuned" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "gelu"}))
    with pytest.raises(ValueError, match="its activation is gelu, its base's is quick_gelu"):
        sn.task_vector(folder / "tuned", base=folder / "base")
    with pytest.raises(ValueError, match="its activation is gelu, this model's is quick_gelu"):
        load_tower(folder / "tuned", open_clip_twin())


def test_tied_weights_of_gpt2_count_once_in_a_merge():
    """TIES on state dicts equals TIES on named parameters, and DARE's result can be applied."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    base = GPT2LMHeadModel(config)
    tuned = []
    for _ in range(2):
        model = GPT2LMHeadModel(config)
        model.load_state_dict(base.state_dict())
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn(p.shape) / 10
        tuned.append(model)
    states = [TaskVector.between(base.state_dict(), model.state_dict()) for model in tuned]
    named = [TaskVector.between(base, model) for model in tuned]
    one, other = (merge(vectors, "ties", keep=0.3) for vectors in (states, named))
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    merge(states, "dare_ties", drop=0.5).apply_to(base)
    assert base.lm_head.weight is base.transformer.wte.weight


def test_a_task_vectors_file_and_what_the_hubs_cache_has(clip, monkeypatch):
    folder, _moved = clip
    vector = sn.task_vector(folder / "tuned", base=folder / "base")
    vector.save(folder / "v.safetensors")
    again = sn.task_vector(folder / "v.safetensors")
    assert all(torch.equal(again[name], vector[name]) for name in vector)
    cache = folder / "hub" / "models--some--tower"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    (cache / "snapshots").mkdir()
    (folder / "tuned").rename(cache / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    from_hub = sn.task_vector("some/tower", base=folder / "base")
    assert set(from_hub) == set(vector)


def test_an_adapter_by_the_names_of_its_base(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

    from saftnb.merging import LowRank

    vector = TaskVector({"model.head.weight": LowRank(torch.ones(2, 1), torch.ones(1, 3))})
    vector.to_adapter(tmp_path)
    assert list(sn.task_vector(tmp_path)) == ["model.head.weight"]
    assert list(sn.task_vector(tmp_path, base=Net())) == ["head.weight"]
    with pytest.raises(ValueError, match="an adapter for another model: there is no"):
        sn.task_vector(tmp_path, base={"other.weight": torch.ones(2, 3)})


def test_reading_one_tensor_does_not_read_the_others(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.zeros(3, dtype=torch.float16)}, tmp_path / "w.safetensors")
    found = open_checkpoint(tmp_path / "w.safetensors")
    assert (found.shape("b"), found.dtype("b")) == (torch.Size([3]), torch.float16)
    assert found["a"].tolist() == [1, 1]
    assert found.shards() == {"w.safetensors": ["a", "b"]}
    assert len(found.sha256) == 64


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda f: torch.save({"w": torch.eye(2).to_sparse()}, f / "x.bin"), "'w' is no plain tensor"),
        (lambda f: torch.save({"w": torch.ones(2, device="meta")}, f / "x.bin"), "'w' is no plain tensor"),
        (lambda f: torch.save({1: torch.ones(2)}, f / "x.bin"), "1 is no plain tensor"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"w": {"a": 1}}}'), "no weight_map"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[" * 200_000), "is no JSON"),
    ],
)
def test_what_is_no_state_dict_of_plain_tensors_is_one_line(tmp_path, spoil, line):
    spoil(tmp_path)
    source = tmp_path / "x.bin"
    with pytest.raises(ValueError, match=line):
        open_checkpoint(source if source.exists() else tmp_path)


def test_a_config_of_other_kinds_than_expected_names_no_activation():
    for config in ({"model_cfg": None}, {"vision_config": "x"}, {"vision_config": None}):
        assert activation(config) == ""
