"""Bad input to the library, as a table: what is done, and the line that says what is wrong, where, and what is right.

"…" in a line stands for anything; what is right is often a list of names. Nothing is written, no training begins.
"""

import json
import math
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saftnb.finetune import Recipe, finetune, plans, recipe
from saftnb.formats import load_adapter
from saftnb.merging import LowRank, TaskVector, learn, merge
from saftnb.suites import PairSplit, PairTask, Split, Suite, Task, load_suite
from saftnb.suites.task import divide

THIMBLE = load_suite("thimble")


def refused(do, line: str, folder: Path | str = "FOLDER") -> None:
    """`do` raises an error whose text is this one line."""
    with pytest.raises((ValueError, OSError)) as caught:
        do()
    said = str(caught.value).replace(str(folder), "FOLDER")
    assert re.fullmatch(".*".join(map(re.escape, line.split("…"))), said), said


def rows(table: list[tuple]):
    return pytest.mark.parametrize(("do", "line"), [pytest.param(*row[1:], id=row[0]) for row in table])


# Task vectors


def vector(*values: float, **more) -> TaskVector:
    return TaskVector({"w": torch.tensor(values or (1.0, -2.0))} | more)


def half(*values: float) -> TaskVector:
    return TaskVector({"w": torch.tensor(values, dtype=torch.float16)})


def layer(rows: int = 2) -> torch.nn.Module:
    return torch.nn.Linear(2, rows, bias=False)


META = TaskVector({"w": torch.ones(2, device="meta")})
ONES = torch.ones(2)
FLOATING = "must be a floating-point Tensor or a LowRank, got"

VECTORS = [
    ("a list", lambda: TaskVector([ONES]), "a task vector is made of a mapping from names to deltas, not of a list"),
    ("a name that is none", lambda: TaskVector({1: ONES}), "a task vector's names are strings, got 1"),
    ("whole numbers", lambda: TaskVector({"w": torch.arange(2)}), f"the delta of 'w' {FLOATING} torch.int64"),
    ("complex", lambda: TaskVector({"w": ONES + 1j}), f"the delta of 'w' {FLOATING} torch.complex64"),
    ("NumPy", lambda: TaskVector({"w": ONES.numpy()}), f"the delta of 'w' {FLOATING} ndarray"),
    ("sparse", lambda: TaskVector({"w": torch.eye(2).to_sparse()}),
     "the delta of 'w' is torch.sparse_coo: it must be a dense Tensor, see Tensor.to_dense, or a LowRank"),
    ("float8", lambda: TaskVector({"w": ONES.to(torch.float8_e5m2)}),
     "the delta of 'w' is torch.float8_e5m2, which PyTorch cannot add: convert it to bfloat16 or float32 first"),
    ("factors of two ranks", lambda: LowRank(torch.ones(2, 3), torch.ones(2, 4)),
     "LowRank takes B (O, r), A (r, I), got (2, 3) and (2, 4)"),
    ("factors of two dtypes", lambda: LowRank(torch.ones(2, 1), torch.ones(1, 2).half()),
     "LowRank's B is torch.float32 on cpu, its A is torch.float16 on cpu"),
    ("times NaN", lambda: vector() * math.nan, "a task vector can be multiplied by finite numbers alone, not by nan"),
    ("other keys", lambda: vector() + TaskVector({"v": ONES}), "the left task vector has 'w', the right one has not"),
    ("other shapes", lambda: vector() - vector(1.0), "'w' is (2,) in the left task vector and (1,) in the right one"),
    ("another model", lambda: vector().apply_to(layer()), "Linear has no parameter 'w' to apply a delta to"),
    ("another width", lambda: TaskVector({"weight": torch.ones(2, 2)}).apply_to(layer(3)),
     "'weight' is (3, 2) torch.float32 in the model, (2, 2) in the task vector"),
    ("nothing to merge", lambda: merge({}, "average"), "merge needs at least one task vector, got none"),
    ("one vector alone", lambda: merge(vector(), "average"),
     "merge takes several task vectors, in a list or by task, and got one TaskVector"),
    ("None to merge", lambda: merge(None, "average"),
     "merge takes task vectors, in a list or by task, not a NoneType"),
    ("a text to merge", lambda: merge(["x"], "average"), "merge takes a list of TaskVectors; its item 0 is a str"),
    ("two devices", lambda: merge([vector(), META], "ties"),
     "the task vectors lie on cpu and meta: move them to one device"),
    ("no values", lambda: merge([META, META], "ties"),
     "the task vectors lie on meta, which has no values: load them on a device"),
    ("NaN to merge", lambda: merge([vector(), vector(1.0, math.nan)], "ties"),
     "vector 1 has NaN or infinite values in 'w'"),
    ("an unknown method", lambda: merge([vector()], "tie"), "there is no merge method 'tie'; allowed are …, ties, …"),
    ("a list for a method", lambda: merge([vector()], ["ties"]), "there is no merge method ['ties']; allowed are …"),
    ("an unknown space", lambda: merge([vector()], "ties", space="knot"),
     "there is no merge space 'knot'; allowed are core, knots, weights"),
    ("a list for a space", lambda: merge([vector()], "ties", space=["knots"]),
     "there is no merge space ['knots']; allowed are core, knots, weights"),
    ("an unknown hyperparameter", lambda: merge([vector()], "ties", kep=0.2),
     "ties has no hyperparameter 'kep'; allowed are keep: number in (0, 1], default 0.2; …"),
    ("keep 0", lambda: merge([vector()], "ties", keep=0),
     "ties: keep = 0 is not allowed (keep: number in (0, 1], default 0.2)"),
    ("keep NaN", lambda: merge([vector()], "ties", keep=math.nan),
     "ties: keep = nan is not allowed (keep: number in (0, 1], default 0.2)"),
    ("statistics that are missing", lambda: merge([vector()], "fisher"), "fisher needs statistics"),
    ("no suite's vectors to learn from", lambda: learn(THIMBLE, {"digits": vector()}),
     "learn: the task vectors do not belong to suite 'thimble': its backbone pocket-0 has no parameter 'w' (2,)"),
]  # fmt: skip


@rows(VECTORS)
def test_task_vectors(do, line):
    refused(do, line)


class Sub(torch.Tensor):
    pass


def test_parameters_subclasses_and_one_vector_twice_are_fine():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    for given in (p, p.detach().as_subclass(Sub)):
        one = TaskVector({"w": given})
        assert not one["w"].requires_grad
        assert merge([one, one], "task_arithmetic", scale=0.5)["w"].tolist() == [1.0, -2.0]
    assert p.tolist() == [1.0, -2.0]


# Adapters

A, B = "base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight"


def adapter(folder: Path, state: dict | None = None, **config) -> Path:
    """An adapter of rank 2; of `state` and `config` what is None goes."""
    TaskVector({"a.weight": LowRank(torch.ones(3, 2), torch.ones(2, 4))}).to_adapter(folder)
    file = folder / "adapter_config.json"
    changed = json.loads(file.read_text()) | config
    file.write_text(json.dumps({name: value for name, value in changed.items() if value != "gone"}))
    weights = load_file(folder / "adapter_model.safetensors") | (state or {})
    save_file({n: v for n, v in weights.items() if v is not None}, folder / "adapter_model.safetensors")
    return folder


def _cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def _written(text: bytes):
    return lambda folder: (folder / "adapter_config.json").write_bytes(text)


class Runs:
    """What a pickle may do when it is read."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def _pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({A: Runs()}))


def _dangling(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(folder / "nowhere")


PLAIN = "only plain LoRA, (α/r) B A, is a task vector"
ADAPTERS = [  # name, what is other than usual in its weights and config, what then happens to its files, the line
    ("no config", {}, lambda folder: (folder / "adapter_config.json").unlink(), "FOLDER: no adapter_config.json"),
    ("no weights", {}, lambda folder: (folder / "adapter_model.safetensors").unlink(),
     "FOLDER: no adapter_model.safetensors"),
    ("a link to nothing", {}, _dangling, "FOLDER: no adapter_model.safetensors"),
    ("cut off", {}, _cut, "FOLDER/adapter_model.safetensors is not a whole safetensors file: …"),
    ("a pickle that runs code", {}, _pickled, "FOLDER/adapter_model.bin is …"),
    ("half a config", {}, _written(b"{"), "FOLDER/adapter_config.json is no JSON: …"),
    ("a list for a config", {}, _written(b"[]"), "FOLDER/adapter_config.json holds no JSON object"),
    ("a config of bytes", {}, _written(b"\xff"), "FOLDER/adapter_config.json is no JSON: …"),
    ("another kind", {"peft_type": "IA3"}, None, "FOLDER: the adapter is IA3, not LORA"),
    ("DoRA", {"use_dora": True}, None, f"FOLDER: use_dora is True; {PLAIN}"),
    ("biases", {"bias": "all"}, None, f"FOLDER: bias is 'all'; {PLAIN}"),
    ("a start that moves the base", {"init_lora_weights": "pissa"}, None,
     f"FOLDER: init_lora_weights is 'pissa'; {PLAIN}"),
    ("saved modules", {"modules_to_save": ["conv1"]}, None, f"FOLDER: modules_to_save is ['conv1']; {PLAIN}, and …"),
    ("a text for modules", {"modules_to_save": "score"}, None,
     "FOLDER: modules_to_save is 'score', not a list of names"),
    ("rank 0", {"r": 0}, None, "FOLDER: r is 0, not a whole number of at least 1"),
    ("a text for a rank", {"r": "2"}, None, "FOLDER: r is '2', not a whole number of at least 1"),
    ("no rank", {"r": "gone"}, None, "FOLDER: adapter_config.json has no 'r', which is a whole number of at least 1"),
    ("another rank", {"r": 3}, None, "FOLDER: 'a.weight' is of rank 2 in the weights and 3 in the config"),
    ("no alpha", {"lora_alpha": "gone"}, None,
     "FOLDER: adapter_config.json has no 'lora_alpha', which is a finite number"),
    ("alpha NaN", {"lora_alpha": math.nan}, None, "FOLDER: lora_alpha is nan, not a finite number"),
    ("another rank in a layer", {"rank_pattern": {"a": 5}}, None,
     "FOLDER: 'a.weight' is of rank 2 in the weights and 5 in the config"),
    ("a list for a pattern", {"rank_pattern": [2]}, None,
     "FOLDER: rank_pattern is [2], not an object of layers and numbers"),
    ("a text in a pattern", {"alpha_pattern": {"a": "x"}}, None,
     "FOLDER: alpha_pattern of 'a' is 'x', not a finite number"),
    ("no pattern", {"rank_pattern": {"(": 2}}, None, "FOLDER: rank_pattern has '(', which is no pattern of names: …"),
    ("a number for a base", {"base_model_name_or_path": 5}, None,
     "FOLDER: base_model_name_or_path is 5, which is no name"),
    ("B without A", {"state": {A: None}}, None, "FOLDER: the layer 'a' has lora_B alone"),
    ("no layer", {"state": {A: None, B: None}}, None, "FOLDER: there is no factor of a LoRA adapter in its weights"),
    ("factors that do not fit", {"state": {A: torch.ones(3, 4)}}, None,
     "FOLDER: the layer 'a': LowRank takes B (O, r), A (r, I), got (3, 2) and (3, 4)"),
    ("infinity", {"state": {A: torch.full((2, 4), math.inf)}}, None, "FOLDER: 'a.weight' has NaN or infinite values"),
    ("whole numbers", {"state": {A: torch.ones(2, 4).int()}}, None,
     f"FOLDER: the layer 'a': LowRank's A {FLOATING} torch.int32"),
    ("a key of something else", {"state": {"base_model.model.a.lora_magnitude_vector": torch.ones(3)}}, None,
     "FOLDER: 'base_model.model.a.lora_magnitude_vector' is no factor of a LoRA adapter, nor a classification head"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "then", "line"), [pytest.param(*row[1:], id=row[0]) for row in ADAPTERS])
def test_adapters(tmp_path, monkeypatch, changes, then, line):
    monkeypatch.chdir(tmp_path)
    folder = adapter(tmp_path / "one", **changes)
    if then:
        then(folder)
    refused(lambda: load_adapter(folder), line, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["one"], "no code of a pickle ran"


def test_rslora_no_effect_and_links_are_fine(tmp_path):
    plain = load_adapter(adapter(tmp_path / "plain", lora_alpha=4))["a.weight"].dense()
    rooted = load_adapter(adapter(tmp_path / "rooted", lora_alpha=4, use_rslora=True))["a.weight"].dense()
    torch.testing.assert_close(rooted, plain * 2**0.5)  # α/√r in the place of α/r
    assert load_adapter(adapter(tmp_path / "off", lora_alpha=0))["a.weight"].dense().eq(0).all()
    (tmp_path / "linked").mkdir()  # as the hub's cache has its files
    for file in (tmp_path / "plain").iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    assert torch.equal(load_adapter(tmp_path / "linked")["a.weight"].dense(), plain)


# Suites, tasks and splits


def pictures(count: int, labels: list | None = None, *, seed: int = 0, side: int = 28) -> Split:
    images = torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed)).byte()
    return Split(images, torch.tensor([i % 2 for i in range(count)] if labels is None else labels))


SPLITS = {"train": pictures(8, seed=1), "validation": pictures(4, seed=2), "test": pictures(4, seed=3)}
EMPTY = Split(SPLITS["train"].images[:0], SPLITS["train"].labels[:0])


def task(classes=("zero", "one"), prompts=("the number {}",), name="toy", **splits) -> Task:
    return Task(name, "real", classes, prompts, **SPLITS | splits)


def trained(made: Task | None = None, plan: object = "sgd", seed: object = 0, **options):
    suite = THIMBLE if made is None else Suite("thimble", THIMBLE.backbone, {"digits": made})
    return finetune(suite, "digits", plan, seed, progress=False, **options)


SMALL = {kind: pictures(4, seed=seed, side=14) for seed, kind in enumerate(SPLITS)}
IMAGES, LABELS = SPLITS["test"].images, SPLITS["test"].labels
SUITES = [
    ("an unknown suite", lambda: load_suite("pockets"), "unknown suite 'pockets'; suites: pocket, thimble, …"),
    ("an unknown backbone", lambda: load_suite("thimble", backbone="pocket-9"),
     "unknown backbone 'pocket-9'; the pocket backbones: pocket-0, pocket-1, …"),
    ("a split below 0", lambda: load_suite("thimble", split=-1), "split is 0 or more, not -1"),
    ("half a split", lambda: load_suite("thimble", split=1.5), "split is 0 or more, not 1.5"),
    ("no such precision", lambda: load_suite("thimble", precision="fp8"),
     "precision is one of float32, bf16, not 'fp8'"),
    ("pairs of 2 tokens", lambda: load_suite("pocket-nli", max_length=2), "max_length is 8 tokens or more, not 2"),
    ("a text for a length", lambda: load_suite("pocket-nli", max_length="64"),
     "max_length is 8 tokens or more, not '64'"),
    ("more tokens than positions", lambda: load_suite("pocket-nli", max_length=10_000),
     "max_length is at most 512, the positions that minilm has, not 10000"),
    ("one class", lambda: task(("zero",), train=pictures(8, [0] * 8)),
     "toy: 'zero' alone; a task tells two classes or more apart"),
    ("no class", lambda: task(()), "toy: no class; a task tells two classes or more apart"),
    ("two classes of one name", lambda: task(("zero", "zero")),
     "toy: two classes are called 'zero': their zero-shot heads would be the same"),
    ("a class without a name", lambda: task(("zero", " ")),
     "toy: class names are a tuple of texts that are not empty, got ('zero', ' ')"),
    ("None for a class", lambda: task(("zero", None)),
     "toy: class names are a tuple of texts that are not empty, got ('zero', None)"),
    ("a text for classes", lambda: task("ab"), "toy: class names are a tuple of texts that are not empty, got 'ab'"),
    ("no prompts", lambda: task(prompts=()), "toy: needs prompt templates with one {} each, got ()"),
    ("a prompt without {}", lambda: task(prompts=("a {}", "the")),
     "toy: needs prompt templates with one {} each, got ('a {}', 'the')"),
    ("a prompt with other braces", lambda: task(prompts=("a {} {x",)),
     "toy: needs prompt templates with one {} each, got ('a {} {x',)"),
    ("None for a prompt", lambda: task(prompts=(None,)), "toy: needs prompt templates with one {} each, got (None,)"),
    ("a name with a slash", lambda: task(name="a/b"), "a task's name is text without '/', not 'a/b'"),
    ("an empty test split", lambda: task(test=EMPTY), "toy: the test split is empty; each split needs pictures"),
    ("an empty training split", lambda: task(train=EMPTY), "toy: the train split is empty; each split needs pictures"),
    ("label −1", lambda: task(train=pictures(8, [0, -1] * 4, seed=1)),
     "toy: the train labels do not lie in 0 to 1: picture 1 has -1"),
    ("a label above", lambda: task(test=pictures(4, [0, 1, 0, 2], seed=3)),
     "toy: the test labels do not lie in 0 to 1: picture 3 has 2"),
    ("pictures of two sizes", lambda: task(test=pictures(4, seed=3, side=14)),
     "toy: the splits' pictures are of different sizes, [(14, 14), (28, 28)]"),
    ("labels as numbers with a point", lambda: Split(IMAGES, LABELS.float()),
     "a split of pictures holds int64 labels (n,), not torch.float32 (4,)"),
    ("labels in a list", lambda: Split(IMAGES, [0, 1, 0, 1]), "a split of pictures holds int64 labels (n,), not list"),
    ("labels in a table", lambda: Split(IMAGES, LABELS[:, None]),
     "a split of pictures holds int64 labels (n,), not torch.int64 (4, 1)"),
    ("too few labels", lambda: Split(IMAGES, LABELS[:3]), "4 images but 3 labels"),
    ("pictures of floats", lambda: Split(IMAGES.float(), LABELS),
     "a split holds uint8 images (n, 3, h, w), not torch.float32 (4, 3, 28, 28)"),
    ("grey pictures", lambda: Split(IMAGES[:, :1], LABELS),
     "a split holds uint8 images (n, 3, h, w), not torch.uint8 (4, 1, 28, 28)"),
    ("colours last", lambda: Split(IMAGES.permute(0, 2, 3, 1), LABELS),
     "a split holds uint8 images (n, 3, h, w), not torch.uint8 (4, 28, 28, 3)"),
    ("no pixels", lambda: Split(IMAGES[:, :, :0], LABELS),
     "a split holds uint8 images (n, 3, h, w), not torch.uint8 (4, 3, 0, 28)"),
    ("halves of labels", lambda: divide(IMAGES.numpy(), LABELS.numpy() / 2, {"test": 2}, 0),
     "4 images need as many whole labels (n,), not float64 (4,)"),
    ("labels of other pictures", lambda: divide(IMAGES.numpy(), LABELS.numpy()[:3], {"test": 2}, 0),
     "4 images need as many whole labels (n,), not int64 (3,)"),
    ("words that the backbone never saw", lambda: trained(task(("quokka", "one"))),
     "'the number quokka': the pocket backbone's vocabulary does not hold 'quokka'"),

        ("pictures of another size", lambda: trained(task(**SMALL)),
     "digits: pictures of (14, 14) pixels; pocket-0 takes (28, 28)"),
]  # fmt: skip


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@rows(SUITES)
def test_suites(store, do, line):
    refused(do, line)
    assert not store.exists()


# Sentence pairs


def texts(*premises: object, labels: list | None = None) -> PairSplit:
    given = torch.tensor([0] * len(premises) if labels is None else labels, dtype=torch.int64)
    return PairSplit(premises, premises, given, None)


def pair_task(allowed=(0, 2), **splits) -> PairTask:
    parts = {"train": texts("a"), "validation": texts("b"), "test": texts("c")} | splits
    return PairTask("x", "real", allowed, **parts)


PAIRS = [
    ("None for a text", lambda: texts("a", None), "pair 1 of a split of pairs holds None, which is no text"),
    ("NaN for a text", lambda: texts(math.nan), "pair 0 of a split of pairs holds nan, which is no text"),
    ("too few labels", lambda: texts("a", "b", labels=[0]),
     "a split of pairs holds as many premises, hypotheses and int64 labels"),
    ("one class", lambda: pair_task((0,)), "x: allowed are two or more of 0 to 2, not (0,)"),
    ("a class that is none", lambda: pair_task((0, 3)), "x: allowed are two or more of 0 to 2, not (0, 3)"),
    ("no pairs", lambda: pair_task(validation=texts()), "x: the validation split is empty; each split needs pairs"),
    ("a label of another class", lambda: pair_task(validation=texts("b", labels=[1])),
     "x: the validation pairs have the label 1; its classes: entailment, contradiction"),
    ("label −1", lambda: pair_task(train=texts("a", labels=[-1])),
     "x: the train pairs have the label -1; its classes: entailment, contradiction"),
    ("a pair in two splits", lambda: pair_task(test=texts("a")), "x: 1 pairs of test stand in another split too"),
]  # fmt: skip


@rows(PAIRS)
def test_pairs(do, line):
    refused(do, line)


# Recipes

RULES = [
    ({"optimizer": "adam"}, "optimizer is one of adamw, sam, asam, asam-kwon, not 'adam'"),
    ({"scope": "half"}, "scope is one of full, attention, tangent, lora, not 'half'"),
    ({"steps": 0}, "steps and batch_size are at least 1, not 0, 64"),
    ({"steps": "200"}, "steps is a whole number, not '200'"),
    ({"steps": 50.5}, "steps is a whole number, not 50.5"),
    ({"steps": True}, "steps is a whole number, not True"),
    ({"batch_size": 0}, "steps and batch_size are at least 1, not 200, 0"),
    ({"batch_size": None}, "batch_size is a whole number, not None"),
    ({"warmup": 200}, "warmup lies in 0 to steps - 1, not 200"),
    ({"lr": -1e-3}, "lr is 0 or more, not -0.001"),
    ({"lr": math.nan}, "lr is 0 or more, not nan"),
    ({"lr": "1e-3"}, "lr is a number, not '1e-3'"),
    ({"rho": 0.5}, "adamw takes no rho"),
    ({"optimizer": "sam"}, "sam needs rho, 0 or more, not None"),
    ({"optimizer": "sam", "rho": math.nan}, "sam needs rho, 0 or more, not nan"),
    ({"optimizer": "sam", "rho": math.inf}, "sam needs rho, 0 or more, not inf"),
    ({"optimizer": "sam", "rho": "0.1"}, "rho is a number or None, not '0.1'"),
    ({"crop": -0.1}, "crop lies in 0 to 1, not -0.1"),
    ({"label_smoothing": 1.0}, "label_smoothing lies in 0 to 1, not 1.0"),
    ({"clip_norm": 0.0}, "clip_norm is above 0, not 0.0"),
    ({"weight_decay": -1.0}, "weight_decay is 0 or more, not -1.0"),
    ({"weight_decay": math.inf}, "weight_decay is 0 or more, not inf"),
    ({"stop_at": 1.5}, "stop_at is an accuracy from 0 to 1, not 1.5"),
    ({"accumulate": 65}, "accumulate lies in 1 to batch_size, 64, not 65"),
    ({"alpha": math.inf}, "rank is at least 1 and alpha above 0, not 16, inf"),
    ({"rank": 0}, "rank is at least 1 and alpha above 0, not 0, 16"),
    ({"compile": 1}, "compile is True or False, not 1"),
    ({"name": "a/b"}, "a recipe's name is text without '/', 120 bytes at most: it is part of a folder's name"),
    ({"name": "a" * 121}, "a recipe's name is text without '/', 120 bytes at most: it is part of a folder's name"),
]


@pytest.mark.parametrize(("changes", "rule"), RULES)
def test_fields_of_recipes(changes, rule):
    given = {"name": "x", "optimizer": "adamw"} | changes
    refused(lambda: Recipe(**given), f"recipe {given['name']!r}: {rule}")


RECIPES = [
    ("an unknown recipe", lambda: recipe("sdg", "pocket"),
     "suite 'pocket' has no recipe 'sdg'; its recipes: sgd, saft, …"),
    ("an unknown field", lambda: recipe("sgd", "pocket", speed=2), "a recipe has no speed"),
    ("an unknown suite", lambda: recipe("sgd", "x"), "no recipes for suite 'x'; suites: pocket, …"),
    ("None for a recipe", lambda: recipe(None, "pocket"), "a recipe's name is text, not None"),
    ("None for a suite", lambda: recipe("sgd", None), "no recipes for suite None; suites: pocket, …"),
    ("a text for a list", lambda: plans("pocket", "sgd"), "recipes is a list of names, such as ['sgd'], not a text"),
    ("no change at all", lambda: recipe("saft@rho", "pocket"),
     "recipe 'saft@rho': 'rho' is not rho= and a number or none"),
    ("a change twice", lambda: recipe("sgd@lr=1,lr=2", "pocket"), "recipe 'sgd@lr=1,lr=2': lr is given twice"),
    ("a change to NaN", lambda: recipe("sgd@lr=nan", "pocket"), "recipe 'sgd@lr=nan': lr is 0 or more, not nan"),
    ("fewer steps than none", lambda: recipe("sgd", "pocket").shortened(-1),
     "recipe 'sgd': steps is a whole number from 0 (its own), not -1"),
    ("None to train by", lambda: trained(plan=None), "recipe is a Recipe or the name of one, not None"),
    ("a text for a seed", lambda: trained(seed="1"), "seed is a whole number from 0, not '1'"),
    ("NaN for a seed", lambda: trained(seed=math.nan), "seed is a whole number from 0, not nan"),
    ("a seed below 0", lambda: trained(seed=-1), "seed is a whole number from 0, not -1"),
    ("an unknown device", lambda: trained(device="gpu"), "device 'gpu' is unknown; use auto, cpu, cuda or cuda:N"),
    ("models that are not there", lambda: trained(plan="published:nowhere"),
     "nowhere/digits: no such folder; models …"),
]  # fmt: skip


@rows(RECIPES)
def test_recipes(store, do, line):
    refused(do, line)
    assert not store.exists()


def test_a_batch_above_the_data_is_all_of_the_data(store):
    plan = Recipe("x", "adamw", steps=1, warmup=0, batch_size=1000, accumulate=900, evaluate_every=1)
    result = trained(task(), plan)
    assert result.history["step"].tolist() == [1]
