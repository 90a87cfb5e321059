"""Adapters of others: written by PEFT itself, read by us, and back under their own names."""

import json
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from saftnb.formats import load_adapter, load_adapters, read_adapter
from saftnb.formats.adapter import different_bases, fill_missing, lora_vector
from saftnb.merging import LowRank, TaskVector, merge
from tests.backbones.test_lora import HF, open_clip_twin, randomised

ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
LLAMA = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_labels=3, pad_token_id=0,
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.*(gradient|activation)_checkpointing:FutureWarning")


def adapted(model, folder, seed=0, **options):
    """A model with random LoRA factors, saved by PEFT."""
    options = {"r": 3, "lora_alpha": 5, "target_modules": ATTENTION} | options
    found = randomised(get_peft_model(model, LoraConfig(**options)), seed).eval()
    found.save_pretrained(folder)
    return found


def as_bin(folder):
    """The same adapter in the form of the published ones: a pickle of plain tensors alone."""
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()


def same(one, other):
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(one[name].dense(), other[name].dense())


def test_adapter_model_bin_reads_as_safetensors_do_and_runs_no_code(tmp_path):
    torch.manual_seed(0)
    adapted(CLIPVisionModel(HF), tmp_path)
    wanted = load_adapter(tmp_path)
    as_bin(tmp_path)
    same(load_adapter(tmp_path), wanted)
    same(load_adapter(tmp_path, open_clip_twin()), read_adapter(tmp_path, open_clip_twin()).vector)

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for protocol in (2, 4):
        (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"x": Evil()}, protocol=protocol))
        with pytest.raises(ValueError, match="adapter_model.bin is"):
            load_adapter(tmp_path)
    torch.save({"x": Evil()}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="is a pickled object, which can run code"):
        load_adapter(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_llama_classifiers_adapter_fits_its_tower_and_brings_its_head(tmp_path, form):
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(LLAMA).eval()
    tower = AutoModel.from_config(LLAMA).eval()
    tower.load_state_dict(classifier.model.state_dict())
    theirs = adapted(classifier, tmp_path, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    with torch.no_grad():
        theirs.base_model.model.score.modules_to_save.default.weight.add_(1)
    theirs.save_pretrained(tmp_path)
    if form == "bin":
        as_bin(tmp_path)
    adapter = read_adapter(tmp_path, tower)
    assert set(adapter.vector) == {f"layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qv"}
    assert list(adapter.head) == ["score.weight"]
    ids = torch.randint(1, 32, (2, 7))
    states = adapter.vector.apply_to(tower)(ids).last_hidden_state
    logits = states[:, -1] @ adapter.head["score.weight"].T
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    assert all(name.startswith("model.layers.") for name in load_adapter(tmp_path))  # its own names, by itself


def test_of_an_adapter_of_both_towers_an_image_tower_gets_its_part(tmp_path):
    torch.manual_seed(0)
    text = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32,
        "eos_token_id": 1,
    }  # fmt: skip
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=HF.to_dict(), projection_dim=20))
    adapted(whole, tmp_path)
    both = load_adapter(tmp_path)
    assert sum("text_model" in name for name in both) == 4
    image = load_adapter(tmp_path, open_clip_twin())
    assert len(image) == len(both) - 4
    name = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    torch.testing.assert_close(image["transformer.resblocks.1.attn.k_proj.weight"].dense(), both[name].dense())


def test_what_an_adapter_lacks_is_0_and_said_in_one_line(tmp_path):
    torch.manual_seed(0)
    adapted(CLIPVisionModel(HF), tmp_path / "one", target_modules=["q_proj"])
    adapted(CLIPVisionModel(HF), tmp_path / "two", target_modules=["q_proj", "v_proj"], r=2)
    with pytest.warns(
        UserWarning, match=r"^layers that others adapt, taken as 0: one has no '.*v_proj.weight' and 1 more$"
    ):
        vectors = load_adapters([tmp_path / "one", tmp_path / "two"])
    assert list(vectors) == ["one", "two"]
    name = next(name for name in vectors["one"] if "v_proj" in name)
    assert vectors["one"][name].dense().eq(0).all()
    for method, space in (("average", "weights"), ("ties", "knots"), ("tsv_m", "core")):
        merged = merge(vectors, method, space=space)
        assert merged[name].dense().abs().sum() > 0
    average = merge(vectors, "average")[name]
    torch.testing.assert_close(average.dense(), vectors["two"][name].dense() / 2)
    assert fill_missing({"a": vectors["one"]})[1] == ""


@pytest.mark.filterwarnings("ignore:.*orthogonal:UserWarning")
def test_orthogonal_starts_are_plain(tmp_path):
    torch.manual_seed(0)
    model = CLIPVisionModel(HF)
    before = {name: p.clone() for name, p in model.named_parameters()}
    theirs = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="orthogonal"))
    theirs.save_pretrained(tmp_path)
    vector = load_adapter(tmp_path)
    plain = CLIPVisionModel(HF)
    plain.load_state_dict(before)
    pixels = torch.randn(1, 3, 28, 28)
    wanted = theirs.eval()(pixels).pooler_output
    moved = load_adapter(tmp_path, plain).apply_to(plain).eval()
    torch.testing.assert_close(moved(pixels).pooler_output, wanted, rtol=1e-4, atol=1e-5)
    assert len(vector) == 2


def test_lora_of_convolutions_and_embeddings_is_refused_by_layer(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.embed = nn.Conv2d(3, 4, 2), nn.Embedding(5, 4)

    for layer, message in (("conv", "LoRA of a convolution, 'conv'"), ("embed", "LoRA of an embedding, .*embed")):
        adapted(Net(), tmp_path / layer, target_modules=[layer])
        with pytest.raises(ValueError, match=f"{layer}: {message}"):
            load_adapter(tmp_path / layer)


def test_adapters_of_different_bases_are_warned_of_with_both_names(tmp_path):
    vector = TaskVector({"a.weight": LowRank(torch.ones(2, 1), torch.ones(1, 2))})
    vector.to_adapter(tmp_path / "one", base="org/a", revision="v1")
    vector.to_adapter(tmp_path / "two", base="org/a", revision="v2")
    vector.to_adapter(tmp_path / "three")
    with pytest.warns(UserWarning, match=r"one of org/a at v1, .*two of org/a at v2$"):
        load_adapters([tmp_path / "one", tmp_path / "two"])
    assert different_bases([read_adapter(tmp_path / name) for name in ("three", "two")]) == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapters([tmp_path / "one", tmp_path / "three"])


@pytest.mark.parametrize("kind", ["clip", "siglip", "llama"])
def test_what_came_under_hugging_faces_names_goes_back_under_them(tmp_path, kind):
    """Two adapters of PEFT's, merged, loaded by PEFT on the model that they came from."""
    torch.manual_seed(0)
    siglip = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
    )
    make = {
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**HF.to_dict())),
        "siglip": lambda: SiglipVisionModel(siglip),
        "llama": lambda: AutoModel.from_config(LLAMA),
    }[kind]
    base = make().eval()
    state = {name: value.clone() for name, value in base.state_dict().items()}

    def fresh():
        model = make().eval()
        model.load_state_dict(state)
        return model

    targets = ["q_proj", "v_proj"]
    for seed in (1, 2):
        adapted(fresh(), tmp_path / str(seed), seed, target_modules=targets)
    vectors = load_adapters([tmp_path / "1", tmp_path / "2"], fresh())
    assert set(vectors["1"]) <= set(dict(base.named_parameters()))
    merged = merge(vectors, "ties", space="knots", keep=0.5, scale=0.8)
    merged.to_adapter(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(fresh(), tmp_path / "merged").eval()
    given = torch.randint(1, 32, (2, 6)) if kind == "llama" else torch.randn(2, 3, 28, 28)
    wanted = merged.apply_to(fresh())(given)[0]
    torch.testing.assert_close(loaded(given)[0], wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, base(given)[0], atol=1e-3)


def test_what_peft_writes_itself_has_the_fields_that_we_write(tmp_path):
    """Our config has no field that PEFT does not know, and PEFT reads ours into an equal one."""
    adapted(CLIPVisionModel(HF), tmp_path / "theirs")
    load_adapter(tmp_path / "theirs").to_adapter(tmp_path / "ours", base="some/base", revision="main")
    theirs, ours = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("theirs", "ours"))
    assert set(ours) <= set(theirs)
    read = LoraConfig.from_pretrained(tmp_path / "ours")
    assert (read.r, read.lora_alpha, read.base_model_name_or_path, read.revision) == (3, 3, "some/base", "main")


@pytest.mark.parametrize("key", ["a.lora_A.weight", "base_model.model.a.lora_A.other.weight"])
def test_two_adapters_in_one_file_are_not_taken_for_one(key: str) -> None:
    state = {"base_model.model.a.lora_A.weight": torch.ones(1, 3), "base_model.model.a.lora_B.weight": torch.ones(2, 1)}
    with pytest.raises(ValueError, match="^the layer 'a' has lora_A twice"):
        lora_vector(state | {key: torch.zeros(1, 3)}, 1.0)
