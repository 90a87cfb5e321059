"""`vision8` on local stand-ins with the hub's columns and features: loading, splits, decoding, doctor and fetch."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from saftnb import cli, disk, prepare
from saftnb.backbones import Attention, Backbone, ImageClassifier, load_openai_backbone, openai, unfuse_attention
from saftnb.evaluate import suite_hits
from saftnb.finetune import finetune, recipe
from saftnb.finetune.train import Training, _Batches, draw_batch
from saftnb.suites import Split, Task, load_suite, stored, vision8
from saftnb.suites.nli6 import PAIR_SOURCES
from saftnb.suites.stored import cropped, whole
from tests.tools import standins

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The stand-ins, made once."""
    folder = tmp_path_factory.mktemp("standins")
    standins.write_all(folder)
    return folder


@pytest.fixture
def data(original, tmp_path, monkeypatch):
    """A copy of the stand-ins that a test may break."""
    shutil.copytree(original, tmp_path / "data")
    monkeypatch.setenv("SAFTNB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    openai._load.cache_clear()
    prepare._hub_size.cache_clear()
    prepare._answered.cache_clear()
    return tmp_path / "data"


def test_every_task_loads_with_its_class_names_and_sizes(data):
    suite = load_suite("vision8")
    assert list(suite.tasks) == ["cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn"]
    table = suite.overview()
    assert table["classes"].tolist() == [196, 47, 10, 43, 10, 45, 397, 10]
    assert set(table["splits"]) == {"saft"}
    for task in suite.tasks.values():
        assert (len(task.train), len(task.validation), len(task.test)) == (54, 6, 25)
        assert task.test.images.shape == (25, 3, 32, 32)
        assert task.test[:4].images.dtype == torch.uint8
        assert suite.head(task.name).shape == (len(task.class_names), 24)
    assert len({task.sha256 for task in suite.tasks.values()}) == 8
    found = suite_hits(suite)
    assert {len(hits) for hits in found.values()} == {25}


def test_it_trains_and_evaluates_as_any_suite(data):
    suite = load_suite("vision8")
    plan = recipe("saft", suite).shortened(4)
    assert (plan.steps, plan.warmup, plan.batch_size, plan.rho, plan.evaluate_every) == (4, 0, 128, 0.5, 2)
    result = finetune(suite, "dtd", plan, progress=False)
    assert result.history["step"].tolist() == [2, 4]
    assert suite_hits(suite, result.task_vector, tasks=["dtd"])["dtd"].shape == (25,)


def test_labels_and_pictures_belong_together(data):
    """Slow reference: the parquet rows one by one."""
    import datasets

    task = load_suite("vision8").tasks["dtd"]
    rows = {}
    for part in ("train", "test"):
        table = datasets.Dataset.from_parquet([str(f) for f in vision8.files("dtd", part)], cache_dir=data / "again")
        rows[part] = [(whole(row["image"], 32), row["label"]) for row in table]
    known = {picture.numpy().tobytes(): label for part in rows.values() for picture, label in part}
    for split in task.splits.values():
        for image, label in zip(split.images, split.labels, strict=True):
            assert known[image.numpy().tobytes()] == label


def test_decoding_is_open_clips_evaluation_transform(data):
    reference = open_clip.image_transform(48, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    generator = np.random.default_rng(0)
    for shape, mode in (((40, 90, 3), "RGB"), ((120, 50, 3), "RGB"), ((28, 28, 3), "L"), ((60, 60, 3), "P")):
        picture = Image.fromarray(generator.integers(0, 256, size=shape, dtype=np.uint8)).convert(mode)
        assert torch.equal(whole(picture, 48).float() / 255, reference(picture))


def test_pictures_are_decoded_once_and_a_cut_file_again(data, monkeypatch):
    decoded = []
    real = stored.whole
    monkeypatch.setattr(stored, "whole", lambda *a: decoded.append(1) or real(*a))
    first = load_suite("vision8").tasks["eurosat"].test
    images = first.images.clone()
    assert len(decoded) == 25
    again = load_suite("vision8").tasks["eurosat"].test
    assert torch.equal(again.images, images)
    assert len(decoded) == 25
    assert first.bytes == first.file.stat().st_size == 25 * 3 * 32 * 32
    first.file.write_bytes(first.file.read_bytes()[:-10])
    assert torch.equal(load_suite("vision8").tasks["eurosat"].test.images, images)
    assert len(decoded) == 50


def test_a_few_pictures_are_decoded_without_the_rest(data, monkeypatch):
    decoded = []
    real = stored.whole
    monkeypatch.setattr(stored, "whole", lambda *a: decoded.append(1) or real(*a))
    split = load_suite("vision8").tasks["eurosat"].train
    few = split[torch.tensor([5, 2])]
    assert len(decoded) == 2
    assert not split.file.exists()
    assert torch.equal(few.images, split.images[torch.tensor([5, 2])])
    assert few.labels.tolist() == split.labels[torch.tensor([5, 2])].tolist()
    assert len(decoded) == 2 + len(split)
    assert torch.equal(split[:3].images, split.images[:3])
    assert len(decoded) == 2 + len(split)


def test_a_decoding_that_breaks_off_leaves_no_file(data, monkeypatch):
    split = load_suite("vision8").tasks["eurosat"].test
    done = []
    real = stored.whole
    monkeypatch.setattr(stored, "whole", lambda *a: done.append(1) or real(*a) if len(done) < 9 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        split.images  # noqa: B018
    assert list(split.cache.iterdir()) == []


def test_a_full_disk_stops_before_decoding(data, monkeypatch):
    split = load_suite("vision8").tasks["eurosat"].test
    monkeypatch.setattr(stored.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 100))
    with pytest.raises(OSError, match=r"eurosat-test: its decoded pictures take 0.0 GiB, and 0.0 GiB are free"):
        split.images  # noqa: B018


@given(
    name=st.sampled_from(list(vision8.SOURCES)),
    train=st.integers(10, 300),
    test=st.integers(10, 300),
    deal=st.integers(0, 5),
)
def test_both_protocols_divide_the_rows(name, train, test, deal):
    for splits in vision8.SPLITS:
        rows = vision8.divide_rows(name, train, test, splits, deal)
        used = [(part, row) for part, chosen in rows.values() for row in chosen.tolist()]
        assert sorted(used) == sorted([("train", i) for i in range(train)] + [("test", i) for i in range(test)])
        if splits == "knots" and name in vision8.KNOTS_FROM_TEST:
            assert rows["validation"][0] == "test"
            assert len(rows["validation"][1]) == test // 5
        else:
            assert rows["validation"][0] == "train"
            assert len(rows["validation"][1]) == train // 10
    orders = vision8.divide_rows("sun397", 500, 400, "saft", 0)
    assert sorted(orders["test"][1].tolist()) == list(range(400))
    assert orders["test"][1][:100].max() > 300  # not the hub's order, which may go class by class
    assert torch.equal(orders["test"][1], vision8.divide_rows("sun397", 500, 400, "saft", 7)["test"][1])
    assert len(vision8.divide_rows("sun397", 90_000, 10, "saft", 0)["validation"][1]) == 5000


def test_the_protocol_and_the_deal_are_in_the_data_hash(data):
    suites = [load_suite("vision8"), load_suite("vision8", splits="knots"), load_suite("vision8", split=1)]
    assert [suite.splits for suite in suites] == ["saft", "knots", "saft"]
    assert len({suite.tasks["cars"].sha256 for suite in suites}) == 3
    assert load_suite("vision8", splits="saft").tasks["cars"].sha256 == suites[0].tasks["cars"].sha256
    assert len(suites[1].tasks["cars"].validation) == 5
    with pytest.raises(ValueError, match="splits is one of saft, knots, not 'paper'"):
        load_suite("vision8", splits="paper")
    with pytest.raises(ValueError, match="only vision8 takes 'knots'"):
        load_suite("thimble", splits="knots")


@pytest.mark.parametrize("damage", ["shard missing", "cut off", "fewer rows", "no folder"])
def test_a_partial_download_is_found_by_its_counts_and_mended(data, original, monkeypatch, capsys, damage):
    folder = data / "vision8" / "gtsrb" / "data"
    shard = folder / "train-00001-of-00002.parquet"
    if damage == "shard missing":
        shard.unlink()
        why = "train has 30 pictures, not 60"
    elif damage == "cut off":
        shard.write_bytes(shard.read_bytes()[:-100])
        why = "train-00001-of-00002.parquet is not a whole parquet file"
    elif damage == "fewer rows":
        standins.write_part(data, "gtsrb", "test", 24, shards=1)
        why = "test has 24 pictures, not 25"
    else:
        shutil.rmtree(data / "vision8" / "gtsrb")
        why = "no train-*.parquet in vision8/gtsrb/data"
    with pytest.raises(FileNotFoundError) as caught:
        load_suite("vision8")
    assert str(caught.value) == f"vision8: gtsrb: {why}; `saftnb fetch vision8` brings what is missing"
    state = prepare.doctor().loc["gtsrb"]
    assert (state["state"], state["command"]) == ("missing", "saftnb fetch vision8")
    assert state["why"] == f"{why}; the hub does not answer"

    asked = []

    def snapshot_download(repository, *, repo_type, local_dir, allow_patterns):
        """Like the hub's client: brings what is not there, and takes what is there for whole."""
        asked.append((repository, repo_type, allow_patterns))
        for file in (original / "vision8" / "gtsrb" / "data").iterdir():
            target = Path(local_dir) / "data" / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".parquet" and not target.exists():
                shutil.copy(file, target)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(prepare, "_hub_size", lambda *a: 1000)
    code = cli.main(["fetch", "vision8"])
    assert asked == [("tanganke/gtsrb", "dataset", ["data/train-*.parquet", "data/test-*.parquet"])]
    said = capsys.readouterr()
    if damage == "fewer rows":  # a file of ours in the way: the download cannot mend it, and says so
        assert code == 2
        assert "the download from tanganke/gtsrb is complete, but test has 24 pictures, not 25" in said.err
    else:
        assert code == 0
        assert "gtsrb: ready, 60 train and 25 test pictures" in said.out
        assert len(load_suite("vision8").tasks["gtsrb"].train) == 54
        asked.clear()
        assert cli.main(["fetch", "vision8"]) == 0
        assert asked == []


def test_a_failed_download_says_that_it_can_go_on(data, monkeypatch, capsys):
    shutil.rmtree(data / "vision8" / "svhn")
    monkeypatch.setattr(prepare, "_hub_size", lambda *a: 1000)

    def snapshot_download(*a, **k):
        raise ConnectionError("reset")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert cli.main(["fetch", "vision8"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "saftnb: ufldl-stanford/svhn: the download failed (ConnectionError); run this again, it goes on from there\n"
    )
    monkeypatch.setattr(prepare, "_hub_size", lambda *a: 10**18)
    assert cli.main(["fetch", "vision8"]) == 2
    assert "ufldl-stanford/svhn takes 2000000000.0 GB more, and" in capsys.readouterr().err
    assert cli.main(["fetch", "vision8", "--backbone", "ViT-H"]) == 2
    assert "unknown backbone 'ViT-H'; those with OpenAI's weights: ViT-B-32" in capsys.readouterr().err


def test_doctor_names_shared_memory_that_is_too_small(data, monkeypatch):
    monkeypatch.setattr(prepare, "SHARED_MEMORY", 10**9)
    row = prepare.doctor().loc["shared memory"]
    assert (row["state"], row["command"]) == ("small", "docker run --shm-size=1000000000g …")


def test_doctor_prints_one_table(data, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "SHARED_MEMORY", 0)
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["what", "state", "size", "command", "why"]
    pairs = [f"nli6/{name}" for name in PAIR_SOURCES]
    assert [line.split()[0] for line in lines[1:]] == [
        "device", "memory", "disk", "locks", "locks", "pocket", "pocket-nli's", "ViT-B-32", "ViT-B-16", "ViT-L-14",
        *vision8.SOURCES, *["decoded"] * 3, *pairs, *["models"] * 6,
    ]  # fmt: skip
    ready = {line.split()[0] for line in lines if " ready " in f"{line} "}
    assert ready == {"locks", "pocket", "pocket-nli's", "ViT-B-32", *vision8.SOURCES, *pairs, "models"}
    models = [line for line in lines if line.startswith("models of")]
    assert [" ready " in line for line in models] == [True, True, False, False, False, True]
    assert "saftnb fetch vision8 --models fusionbench --backbone ViT-B-16" in models[2]
    assert "saftnb fetch vision8 --backbone ViT-L-14" in lines[10]
    published = sum(source.test for source in vision8.SOURCES.values())
    assert published == 8041 + 1880 + 2700 + 12630 + 10000 + 6300 + 19850 + 26032


def test_the_label_order_is_the_data_sets_own(data):
    names = list(vision8.prompts("eurosat")[0])
    vision8.check_label_order("eurosat", tuple(names), names)
    camel = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
             "Residential", "River", "SeaLake"]  # fmt: skip
    vision8.check_label_order("eurosat", tuple(names), camel)
    vision8.check_label_order("eurosat", tuple(names), [str(i) for i in range(10)])
    vision8.check_label_order("eurosat", tuple(names), None)
    swapped = [names[1], names[0], *names[2:]]
    with pytest.raises(ValueError, match="eurosat: class 0 is 'forest' in the data set and 'annual crop land' here"):
        vision8.check_label_order("eurosat", tuple(names), swapped)
    with pytest.raises(ValueError, match="the data set has 9 classes, our prompts 10"):
        vision8.check_label_order("eurosat", tuple(names), names[:9])
    standins.write_part(data, "eurosat", "test", 25, names=swapped, shards=1)
    with pytest.raises(ValueError, match="class 0 is 'forest'"):
        load_suite("vision8").tasks["eurosat"]


@pytest.mark.parametrize("task", list(vision8.SOURCES))
def test_the_prompts_are_whole_and_their_names_tell_each_order_apart(task):
    names, templates = vision8.prompts(task)
    assert all(template.count("{}") == 1 for template in templates)
    assert all(names)
    vision8.check_label_order(task, names, [name.replace(" ", "_").title() for name in names])
    assert len(set(names)) >= len(names) - 1  # one pair of names is published twice in some lists


def test_changed_contents_are_another_identity(data):
    files = vision8.files("dtd", "test")
    before = vision8.identify(files)
    assert vision8.identify(files) == before
    known = json.loads((files[0].parent / ".sha256.json").read_text())
    assert len(known) == 1
    standins.write_part(data, "dtd", "test", 25, names=list(vision8.prompts("dtd")[0]), shards=1)
    same = vision8.identify(files)
    assert same == before  # written anew, but the same bytes
    files[0].write_bytes(files[0].read_bytes() + b"x")
    assert vision8.identify(files) != before


def test_crops_are_what_their_generator_draws():
    ramp = np.linspace(0, 255, 200).astype(np.uint8)
    picture = np.stack([np.broadcast_to(ramp, (100, 200))] * 3, axis=2)
    draw = lambda seed: cropped(picture, 32, 0.9, torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(0), draw(0))
    spans = []
    for seed in range(40):
        crop = draw(seed)
        assert crop.shape == (3, 32, 32)
        assert crop.dtype == torch.uint8
        spans.append((float(crop[0, 0, -1]) - float(crop[0, 0, 0])) / 255)
    # A box of 0.9 of the area at a ratio of 4/3 does not fit into 2:1: all are the largest centred one, 133 wide.
    assert max(spans) - min(spans) < 0.01
    assert np.mean(spans) == pytest.approx(133 / 200, abs=0.03)
    square = np.array(Image.fromarray(picture).resize((100, 100)))
    draw = lambda seed: cropped(square, 32, 0.5, torch.Generator().manual_seed(seed))  # noqa: E731
    spans = [(float(draw(seed)[0, 0, -1]) - float(draw(seed)[0, 0, 0])) / 255 for seed in range(60)]
    assert 0.5 < min(spans) < 0.75 < max(spans) <= 1.0


def test_batches_from_processes_are_those_of_the_loop(data, monkeypatch):
    suite = load_suite("vision8")
    plan = recipe("sgd", suite, steps=5, batch_size=16, warmup=0)
    task = suite.tasks["resisc45"]
    training = Training(suite.classifier("resisc45"), task, plan, 3, CPU)
    training.next_step = 2
    for step, (pixels, labels) in zip((2, 3, 4), training.batches, strict=True):
        expected = draw_batch(task.train, plan, 3, step)
        assert torch.equal(pixels, expected[0])
        assert torch.equal(labels, expected[1])
    assert len(_Batches(task.train, plan, 3, 2)) == 3


def test_training_pictures_are_decoded_once_and_are_the_same_before_and_after(data, monkeypatch):
    decoded = []
    real = stored.reduced
    monkeypatch.setattr(stored, "reduced", lambda *a: decoded.append(1) or real(*a))
    split = load_suite("vision8").tasks["sun397"].train
    some = torch.tensor([3, 0, 7])
    draw = lambda of, crop: of.drawn(some, crop, torch.Generator().manual_seed(5))  # noqa: E731
    before = {crop: draw(split, crop) for crop in (0.5, 0.0)}
    assert len(decoded) == 3
    assert split.prepare(0.9, len(split)) >= 1  # one draw of each: not worth a file
    assert not split.training_file.exists()
    split.prepare(0.9, len(split) + 1)
    assert len(decoded) == 3 + len(split)
    assert torch.equal(draw(split, 0.5), before[0.5])
    again = load_suite("vision8").tasks["sun397"].train
    again.prepare(0.9, 10**6)
    assert torch.equal(draw(again, 0.5), before[0.5])
    assert len(decoded) == 3 + len(split)
    split.prepare(0.0, 10**6)
    assert split.file.exists()
    assert torch.equal(before[0.0], split.images[some])  # no crop: the pictures of an evaluation
    assert torch.equal(draw(split, 0.0), before[0.0])
    split.training_file.write_bytes(split.training_file.read_bytes()[:-10])
    mended = load_suite("vision8").tasks["sun397"].train
    mended.prepare(0.9, 10**6)
    assert len(decoded) == 3 + 2 * len(split)
    assert torch.equal(draw(mended, 0.5), before[0.5])
    assert torch.equal(draw(pickle.loads(pickle.dumps(mended)), 0.5), before[0.5])
    assert sorted(file.suffix for file in split.cache.iterdir()) == [".u8", ".u8"]


def test_a_data_folder_that_cannot_be_written_will_do(data, monkeypatch, capsys):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", "cache")

    suite = load_suite("vision8")
    split, some = suite.tasks["dtd"].train, torch.tensor([1, 2])
    wanted = split.drawn(some, 0.9, torch.Generator().manual_seed(0))
    monkeypatch.setattr(disk, "whole_file", refused)
    monkeypatch.setattr(disk, "locked", refused)
    split.prepare(0.9, 10**6)
    assert "dtd-train: pictures are decoded at each step ([Errno 13] Permission denied" in capsys.readouterr().out
    assert torch.equal(split.drawn(some, 0.9, torch.Generator().manual_seed(0)), wanted)
    assert suite.head("dtd").shape[0] == 47


def test_large_pictures_are_reduced_before_they_are_cropped():
    generator = np.random.default_rng(0)
    smooth = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((1024, 768), Image.BICUBIC)
    small = stored.reduced(smooth)
    assert small.shape == (288, 384, 3)
    seeded = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    close = cropped(small, 224, 0.9, seeded()).float() - cropped(np.array(smooth), 224, 0.9, seeded()).float()
    assert close.abs().mean() < 1  # of 255
    for mode, shape in (("L", (28, 28)), ("P", (40, 30)), ("RGBA", (30, 40, 4))):
        picture = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        picture = picture.convert(mode)
        assert np.array_equal(stored.reduced(picture), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("locks", [True, False])
def test_two_nodes_decode_one_split(data, monkeypatch, locks):
    """Two processes on machines of different names, with locks and without: both get the pictures, and what a third
    machine is writing stays."""
    split = load_suite("vision8").tasks["gtsrb"].test
    wanted = [split[i : i + 1].images for i in range(len(split))]
    shutil.rmtree(split.cache, ignore_errors=True)
    split.cache.mkdir()
    theirs = split.cache / f".{split.file.name}.node3-{os.getpid()}.aaaaaaaa.part"
    left = split.cache / f".{split.file.name}.node4-1.bbbbbbbb.part"
    for file in (theirs, left):
        file.write_bytes(b"half")
    os.utime(left, (0, time.time() - 2 * disk.ELSEWHERE))
    if not locks:
        monkeypatch.setattr(disk.fcntl, "flock", _without_locks)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    nodes = [context.Process(target=_decode_as, args=(name, split, answers)) for name in ("node1", "node2")]
    for node in nodes:
        node.start()
    sums = [answers.get(timeout=60) for _ in nodes]
    for node in nodes:
        node.join()
    assert sums == [int(torch.cat(wanted).sum())] * 2
    assert theirs.exists()
    assert not left.exists()
    assert {file for file in split.cache.iterdir() if file.suffix != ".lock"} == {theirs, split.file}


def _decode_as(host, split, answers):
    disk.socket.gethostname = lambda: host
    answers.put(int(split.images.sum()))


def _without_locks(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")


def test_a_zero_shot_head_is_made_once_and_a_broken_one_again(data, monkeypatch):
    made = []
    real = Backbone.zero_shot_head
    monkeypatch.setattr(Backbone, "zero_shot_head", lambda self, *words: made.append(words) or real(self, *words))
    head = load_suite("vision8").head("gtsrb")
    assert torch.equal(load_suite("vision8").head("gtsrb"), head)
    assert len(made) == 1
    (file,) = (vision8.folder() / ".heads").iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    assert torch.equal(load_suite("vision8").head("gtsrb"), head)
    assert len(made) == 2
    load_suite("vision8").head("dtd")
    assert len(made) == 3


def test_a_variant_without_quickgelu_is_an_error(data):
    standins.write_backbone(data, quick_gelu=False)
    with pytest.raises(ValueError, match="ViT-B-32: OpenAI's weights need QuickGELU; this is a variant without it"):
        load_suite("vision8")
    with pytest.raises(ValueError, match="unknown backbone 'ViT-B-32-quickgelu'"):
        load_openai_backbone("ViT-B-32-quickgelu")


def test_missing_weights_are_one_line(data):
    with pytest.raises(
        FileNotFoundError, match=r"weights of ViT-B-16 are not here; `saftnb fetch vision8 --backbone ViT-B-16`"
    ):
        load_suite("vision8", backbone="ViT-B-16")


@pytest.mark.parametrize("name", ["sgd", "saft", "ftlo+saft"])
def test_one_training_step_at_the_real_shapes_of_vit_b_32(name):
    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    small = config["text_cfg"] | {"layers": 1, "vocab_size": 100}  # the text tower takes no part
    torch.manual_seed(0)
    clip = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], small, quick_gelu=config["quick_gelu"])
    tower = unfuse_attention(clip.visual)
    assert sum(p.numel() for p in tower.parameters()) == 87_849_216
    assert sum(isinstance(module, Attention) for module in tower.modules()) == 12
    model = ImageClassifier(tower, torch.randn(47, 512), (0.5,) * 3, (0.25,) * 3)
    images = torch.randint(0, 256, (6, 3, 224, 224), dtype=torch.uint8)
    parts = {
        kind: Split(images[i : i + 2], torch.tensor([i, i + 1]))
        for i, kind in ((0, "train"), (2, "validation"), (4, "test"))
    }
    task = Task("toy", "rendered", tuple(map(str, range(47))), ("a {}",), **parts)
    before = {key: p.detach().clone() for key, p in tower.named_parameters()}
    training = Training(model, task, recipe(name, "vision8").shortened(1), 0, CPU)
    assert 0 < training.step() < 100
    moved = {key for key, p in tower.named_parameters() if not torch.equal(before[key], p)}
    assert len(moved) == (48 if name.startswith("ftlo") else len(before))


def test_fetch_brings_published_models_and_checks_them(data, monkeypatch, capsys):
    """A hub that has one model: what is here is not asked for, what comes is looked into, failures are one line."""
    folder = data / "published" / "knots"
    whole = folder / "KnOTS-ViT-B-32_lora_R16_svhn"
    kept = data / "hub"
    whole.rename(kept)
    asked = []

    def snapshot_download(repository, *, repo_type, local_dir, allow_patterns):
        asked.append(repository)
        for file in kept.iterdir():
            shutil.copy(file, Path(local_dir) / file.name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(prepare, "_hub_size", lambda *_: 10)
    assert cli.main(["fetch", "vision8", "--models", "knots"]) == 0
    assert asked == ["hoffman-lab/KnOTS-ViT-B-32_lora_R16_svhn"]
    assert capsys.readouterr().out.count(": ready") == len(vision8.SOURCES)
    (whole / "adapter_model.bin").write_bytes(b"torn")
    (whole / ".cache").mkdir()  # the hub's client leaves one
    assert cli.main(["fetch", "vision8", "--models", "knots"]) == 0  # what is broken here is brought anew
    said = capsys.readouterr().out
    assert len(asked) == 2
    assert "adapter_model.bin is not a whole file that torch.save wrote" in said
    assert said.count(": ready") == len(vision8.SOURCES)
    (whole / "adapter_model.bin").unlink()
    (kept / "adapter_model.bin").write_bytes(b"no adapter")
    assert cli.main(["fetch", "vision8", "--models", "knots"]) == 2
    assert "adapter_model.bin is no" in capsys.readouterr().err
    for words, message in (
        (["vision8", "--models", "other"], "no published models 'other' for 'vision8'; there are: nli6 --models knots"),
        (["vision8", "--models", "knots", "--backbone", "ViT-B-16"], "knots has no models of ViT-B-16; of ViT-B-32"),
    ):
        assert cli.main(["fetch", *words]) == 2
        assert message in capsys.readouterr().err
