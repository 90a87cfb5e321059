"""The shipped backbone, its zero-shot heads, and what it refuses."""

import hashlib
import json
import shutil

import pytest
import torch

from saftnb.backbones import ImageClassifier, load_pocket_backbone, resolve_device, threads
from saftnb.backbones.clip import POCKET_BACKBONES, POCKET_FOLDER, Vocabulary, build_clip
from saftnb.suites.pocket import prompts


@pytest.mark.parametrize("name", POCKET_BACKBONES)
def test_the_shipped_weights_are_small_and_known_by_hash(name):
    backbone = load_pocket_backbone(name)
    assert backbone.name == name
    weights = (POCKET_FOLDER / name / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == backbone.sha256
    assert len(weights) < 5e6
    card = (POCKET_FOLDER / "MODEL_CARD.md").read_text()
    assert backbone.sha256 in card
    assert "CC BY-SA 4.0" in card
    assert "OpenMoji" in card


def test_the_shipped_backbones_differ_in_the_pre_training_seed_alone():
    configs = [json.loads((POCKET_FOLDER / name / "config.json").read_text()) for name in POCKET_BACKBONES]
    assert len({config["sha256"] for config in configs}) == len(configs)
    for seed, config in enumerate(configs):
        assert config["pretraining"]["seed"] == seed
        same = {"pretraining": config["pretraining"] | {"seed": 0}, "name": "pocket-0", "sha256": configs[0]["sha256"]}
        assert config | same == configs[0]


def test_every_copy_of_the_tower_is_fresh_and_trainable():
    backbone = load_pocket_backbone()
    first, second = backbone.image_tower(), backbone.image_tower()
    with torch.no_grad():
        next(first.parameters()).add_(1)
    assert not torch.equal(next(first.parameters()), next(second.parameters()))
    names = {name for name, _ in first.named_parameters()}
    assert {f"transformer.resblocks.0.attn.{part}_proj.weight" for part in ("q", "k", "v", "out")} <= names
    assert not first.training


def test_the_head_follows_its_definition():
    backbone = load_pocket_backbone()
    templates = ("the digit {}", "{}", "a picture of the number {} in a pattern of white grid")
    lengths = backbone.clip.encode_text(backbone.tokenize([t.format("7") for t in templates])).norm(dim=1)
    assert lengths.max() > 1.01 * lengths.min()  # or the order of averaging and normalising would not show
    head = backbone.zero_shot_head(["0", "7"], templates)
    for row, name in zip(head, ["0", "7"], strict=True):
        total = torch.zeros_like(row)
        for template in templates:
            with torch.no_grad():
                embedding = backbone.clip.encode_text(backbone.tokenize([template.format(name)]))[0]
            total += embedding / embedding.norm()
        expected = total / total.norm() * backbone.clip.logit_scale.exp()
        torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-5)


def test_the_classifier_normalises_pixels_and_features():
    backbone = load_pocket_backbone()
    head = torch.randn(3, 128)
    model = ImageClassifier(backbone.image_tower(), head, backbone.mean, backbone.std).eval()
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        pixels = (images.float() / 255 - torch.tensor(backbone.mean).view(1, 3, 1, 1)) / backbone.std[0]
        features = backbone.clip.visual(pixels)
        expected = features / features.norm(dim=1, keepdim=True) @ head.T
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(images.float() / 255), expected, atol=1e-5, rtol=1e-4)


def test_the_vocabulary_holds_every_prompt_and_names_what_it_lacks():
    tokenize = load_pocket_backbone().tokenize
    rows = tokenize(prompts())
    assert rows.shape == (len(prompts()), 20)
    assert (rows.argmax(dim=1) > 0).all()  # the end-of-text token is the largest id: the text tower looks for it
    assert rows.max() == len(tokenize.tokens) - 1
    with pytest.raises(ValueError, match="'a quokka': the pocket backbone's vocabulary does not hold '.*k"):
        tokenize(["a quokka"])


def test_a_small_vocabulary_gives_the_same_text_as_the_full_one():
    texts = ["the digit 7", "a silhouette of a cat"]
    small = Vocabulary.of(texts, 20)
    full = small._full(texts)
    assert torch.equal(torch.tensor(small.tokens)[small(texts)], full)


def test_changed_weights_are_refused(tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(POCKET_FOLDER / "pocket-0", folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="hash"):
        load_pocket_backbone(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_pocket_backbone(folder)


def test_the_config_is_one_that_open_clip_builds():
    config = json.loads((POCKET_FOLDER / "pocket-0" / "config.json").read_text())
    model = build_clip(config)
    assert sum(p.numel() for p in model.visual.parameters()) < 1.5e6


def test_devices_and_threads():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="'gpu' is unknown"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match="not present"):
        resolve_device("cuda:99")
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before
