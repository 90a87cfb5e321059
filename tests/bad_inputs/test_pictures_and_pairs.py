"""Pictures of unusual kinds decode to the right colours; what cannot be decoded, or is no text, is named by its row."""

import io
from types import SimpleNamespace

import datasets
import numpy as np
import open_clip
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from saftnb.backbones import load_sequence_backbone
from saftnb.suites.nli6 import PAIR_SOURCES, nli6_task
from saftnb.suites.stored import StoredSplit, reduced, whole

RAMP = np.linspace(0, 65535, 60 * 60).reshape(60, 60).round().astype(np.uint16)


def noise(channels: int) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, 256, (60, 60, channels), dtype=np.uint8)


def coded(picture: Image.Image, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    picture.save(out, form)
    return out.getvalue()


def one_picture(content: bytes | None) -> datasets.Dataset:
    good = coded(Image.fromarray(noise(3)))
    rows = {"image": [{"bytes": good, "path": None}, {"bytes": content, "path": None} if content else None]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict(rows | {"label": [0, 1]}, features=features)


def split(table, tmp_path, name="cars-test"):
    return StoredSplit(table, torch.tensor([1, 0]), 28, tmp_path / "cache", identity="x", name=name)


GREY, WITH_ALPHA = Image.fromarray(noise(1)[:, :, 0]), Image.fromarray(noise(4))


@pytest.mark.parametrize(
    ("picture", "form"),
    [(GREY, "PNG"), (WITH_ALPHA, "PNG"), (GREY.convert("LA"), "PNG"), (WITH_ALPHA.convert("CMYK"), "JPEG"),
     (WITH_ALPHA.convert("CMYK"), "TIFF"), (GREY.convert("1"), "PNG"), (WITH_ALPHA.convert("P"), "GIF")],
    ids=["grey", "alpha", "grey and alpha", "CMYK JPEG", "CMYK TIFF", "1 bit", "palette"],
)  # fmt: skip
def test_grey_alpha_and_cmyk_are_as_open_clip_has_them(tmp_path, picture, form):
    """The reference is open_clip's own transform: transparency is left out, colours as Pillow converts them."""
    content = coded(picture, form)
    reference = open_clip.image_transform(28, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    found = split(one_picture(content), tmp_path).images[0]
    assert torch.equal(found.float() / 255, reference(Image.open(io.BytesIO(content))))
    assert 30 < found.float().mean() < 225


def test_the_colours_of_alpha_and_cmyk_by_their_formulas():
    rgba, cmyk = noise(4), noise(4) // 2
    assert np.array_equal(reduced(Image.fromarray(rgba)), rgba[:, :, :3])
    c = cmyk.astype(float)
    wanted = (255 - c[:, :, :3]) * (255 - c[:, :, 3:]) / 255
    found = reduced(Image.fromarray(cmyk, "CMYK")).astype(float)
    assert np.abs(found - wanted).max() <= 1


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_become_eight_and_not_white(form):
    """The reference is the upper byte of 257 · v, v / 257 rounded, worked out in whole numbers."""
    picture = Image.open(io.BytesIO(coded(Image.fromarray(RAMP), form)))
    found = reduced(picture)
    wanted = (RAMP.astype(int) * 2 + 257) // 514
    assert np.array_equal(found, np.repeat(wanted[:, :, None], 3, axis=2))
    shown = whole(picture, 60)
    assert torch.equal(shown, torch.from_numpy(found.copy()).permute(2, 0, 1))
    assert (int(shown.min()), int(shown.max())) == (0, 255)
    assert shown.float().mean().sub(127.5).abs() < 1


BROKEN = {
    "no picture": b"<html>not found</html>", "cut off": coded(Image.fromarray(noise(3)), "JPEG")[:900],
    "a cut PNG": coded(Image.fromarray(noise(3)))[:900], "nothing": b"", "none": None,
    "floats": coded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
}  # fmt: skip


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_picture_that_does_not_decode_is_named_by_data_set_split_and_row(tmp_path, content):
    given = split(one_picture(content), tmp_path)
    line = r"^vision8: cars-test: row 1 is no picture that can be decoded: [^\n]+$"
    for read in (lambda: given.images, lambda: given.prepare(0.9, 100), lambda: given[:1], lambda: next(drawn(given))):
        with pytest.raises(ValueError, match=line) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*.u8"))


def drawn(given):
    yield given.drawn(torch.tensor([0]), 0.9, torch.Generator())


@pytest.mark.parametrize("labels", [[0, None], [0.0, 0.5]])
def test_labels_that_are_no_whole_numbers_stop(tmp_path, labels):
    table = one_picture(coded(GREY)).remove_columns("label").add_column("label", labels)
    with pytest.raises(ValueError, match=r"^vision8: cars-test: labels are whole numbers, one a picture, not \w+$"):
        split(table, tmp_path)


def write_snli(root, **changes) -> None:
    source = PAIR_SOURCES["snli"]
    for part in ("train", "validation", "test"):
        rows = {"premise": [f"{part} {i}" for i in range(4)], "hypothesis": ["so"] * 4, "label": [0, 1, 2, -1]}
        folder = root / "nli6" / "snli" / source.config / part
        folder.mkdir(parents=True, exist_ok=True)
        columns = rows | (changes if part == "train" else {})
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "0000.parquet")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"premise": ["a", None, "b", "c"]}, "None for premise, which is no text (row 1 of 0000.parquet)"),
        ({"hypothesis": [1.5, float("nan"), 2.0, 1.0]}, "1.5 for hypothesis, which is no text (row 0 of 0000.parquet)"),
        ({"label": [0, 1, 7, 0]}, "the label 7; the map knows 0, 1, 2 (row 2 of 0000.parquet)"),
        ({"label": [0, 1, 0.5, 0]}, "the label 0.5; the map knows 0, 1, 2 (row 2 of 0000.parquet)"),
        ({"label": [0, 1, 2, None]}, "the label None; the map knows 0, 1, 2 (row 3 of 0000.parquet)"),
    ],
)
def test_pairs_that_are_none_are_named_by_split_and_row(tmp_path, monkeypatch, changes, line):
    monkeypatch.setenv("SAFTNB_DATA", str(tmp_path))
    write_snli(tmp_path, **changes)
    with pytest.raises(ValueError) as caught:
        nli6_task("snli", SimpleNamespace(tokenize=None))
    assert str(caught.value) == f"nli6, snli: train has {line}"


def test_pairs_without_agreement_and_empty_sentences(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_DATA", str(tmp_path))
    write_snli(tmp_path, hypothesis=["", " ", "so", "so"])
    found = nli6_task("snli", SimpleNamespace(tokenize=None))
    assert found.train.labels.tolist() == [0, 1, 2], "the one of label −1 is left out"
    assert found.train.hypotheses == ("", "", "so")


def test_a_pair_of_a_hundred_thousand_characters_is_cut_and_short_ones_stay():
    """The reference is the tokenizer on texts that were cut by hand, well beyond what counts."""
    backbone = load_sequence_backbone("minilm")
    for text in ("the dog runs. " * 7200, "a" * 100_000, "犬 " * 50_000, " " * 100_000):
        found = backbone.tokenize([text, text, "short"], [text, "it is a dog", text])
        few = text[:3500]
        byhand = backbone.tokenizer([few, few, "short"], [few, "it is a dog", few], truncation=True, max_length=256)
        assert int(found.lengths.max()) <= 256
        if "a" * 99 not in text:  # of a word too long for the vocabulary one token is left, whatever its length
            assert found.ids.tolist() == [token for row in byhand["input_ids"] for token in row]
    both = backbone.tokenize([""], [""])
    assert both.lengths.tolist() == [3], "three tokens of the model's own"


def test_a_pair_without_any_token_is_refused():
    class Silent:
        is_fast, pad_token_id = True, 0

        def __call__(self, premises, hypotheses, **_):
            return {"input_ids": [[5] * len(p + h) for p, h in zip(premises, hypotheses, strict=True)]}

        def num_special_tokens_to_add(self, pair):
            return 1

    backbone = load_sequence_backbone("minilm")
    made = type(backbone)("x", backbone.model, Silent(), "last", backbone.targets, "", 256)
    with pytest.raises(ValueError, match="x: pair 1 has no token: both of its sentences are empty"):
        made.tokenize(["a", ""], ["b", ""])
