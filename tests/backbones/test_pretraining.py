"""Pre-training: the corpus, the augmentation, the loss, and going on after a cut."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from saftnb.backbones import load_pocket_backbone
from saftnb.backbones.clip import Vocabulary
from saftnb.backbones.corpus import Captioned, emoji_name, rendered, silhouettes
from saftnb.backbones.pretraining import Pretraining, augment, contrastive_loss, pretrain, save_backbone

PLAN = Pretraining(steps=4, batch=12, warmup=1, width=32, layers=1)


@pytest.fixture(scope="module")
def corpus():
    return [(rendered("glyphs", 40, 0), 0.5), (rendered("textures", 40, 0), 0.5)]


@pytest.fixture(scope="module")
def vocabulary(corpus):
    return Vocabulary.of([caption for source, _ in corpus for caption in source.captions] + ["the digit 7"], 20)


def test_emoji_are_named_by_their_code_points():
    assert emoji_name("1F418") == "elephant"
    assert emoji_name("1F9D1-200D-1F527") == "adult wrench"
    assert emoji_name("1F44D-1F3FE") is None  # a skin tone
    assert emoji_name("1F1E9-1F1EA") is None  # a flag
    assert emoji_name("E000") is None  # no Unicode name


@pytest.mark.parametrize("source", ["glyphs", "shapes", "textures"])
def test_renders_are_seeded_pictures_with_captions(source):
    first, again, other = (rendered(source, 12, seed) for seed in (0, 0, 1))
    assert first.images.shape == (12, 4, 28, 28)
    assert first.captions == again.captions
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


def test_a_caption_counts_what_it_shows():
    drawn = rendered("shapes", 60, 0)
    words = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
    ink = {n: [] for n in words.values()}
    for image, caption in zip(drawn.images, drawn.captions, strict=True):
        ground = image[:3, 0, 0].int()[:, None, None]
        covered = ((image[:3].int() - ground).abs().sum(0) > 30).float().mean().item()
        ink[next(words[w] for w in caption.split() if w in words)].append(covered)
    assert np.mean(ink[6]) > 2.5 * np.mean(ink[1])


def test_silhouettes_keep_only_the_outline():
    art = Captioned("x", torch.randint(0, 256, (2, 4, 8, 8), dtype=torch.uint8), ["cat", "dog"])
    plain = silhouettes(art)
    assert plain.captions == ["a silhouette of a cat", "a silhouette of a dog"]
    assert plain.images[:, :3].max() == 0
    assert torch.equal(plain.images[:, 3], art.images[:, 3])


def test_augmented_pictures_are_pixels_and_repeatable():
    images = rendered("glyphs", 16, 0).images
    first, again = (augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.shape == (16, 3, 28, 28)
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, augment(images, torch.Generator().manual_seed(4)))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=8), st.integers(0, 99))
def test_the_loss_is_its_formula_written_out(captions, seed):
    generator = torch.Generator().manual_seed(seed)
    n, scale = len(captions), torch.tensor(7.0)
    image, text = torch.randn(n, 5, generator=generator), torch.randn(n, 5, generator=generator)
    total = 0.0
    for a, b in ((image, text), (text, image)):
        for i in range(n):
            logits = [float(scale * F.cosine_similarity(a[i], b[j], dim=0)) for j in range(n)]
            log_sum = np.log(np.sum(np.exp(logits)))
            matches = [j for j in range(n) if captions[j] == captions[i]]
            total -= sum(logits[j] - log_sum for j in matches) / len(matches) / n / 2
    found = contrastive_loss(image, text, scale, torch.tensor(captions))
    assert found.item() == pytest.approx(total, rel=1e-4, abs=1e-5)


def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(corpus, vocabulary, tmp_path):
    whole = pretrain(corpus, vocabulary, PLAN, tmp_path / "whole", save_every=2)

    def cut(model, step):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(corpus, vocabulary, PLAN, tmp_path / "cut", save_every=2, watch=cut)
    resumed = pretrain(corpus, vocabulary, PLAN, tmp_path / "cut", save_every=2)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    with pytest.raises(ValueError, match="another plan's training state"):
        pretrain(corpus, vocabulary, Pretraining(steps=5, batch=12, width=32, layers=1), tmp_path / "cut")


def test_saved_weights_load_as_a_backbone(corpus, vocabulary, tmp_path):
    model = pretrain(corpus, vocabulary, PLAN, tmp_path / "run")
    sha256 = save_backbone(model, "tiny", vocabulary, PLAN, tmp_path / "out")
    backbone = load_pocket_backbone(tmp_path / "out")
    assert (backbone.name, backbone.sha256) == ("tiny", sha256)
    pixels = torch.rand(3, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(backbone.clip.encode_image(pixels), model.encode_image(pixels), atol=0.02, rtol=0.02)
