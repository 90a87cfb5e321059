"""Sentence pairs: the grammar, `nli6` on stand-ins, splits and suites."""

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saftnb.suites import LABELS, load_suite
from saftnb.suites.grammar import _ADJECTIVES, _KINDS, PARTS, PHENOMENA, Sentence, pairs, relation
from saftnb.suites.nli6 import PAIR_SOURCES, nli6_task, nli_fault
from saftnb.suites.pocket_nli import SIZES
from tests.tools.standins import state_pairs, write_language_model, write_nli, write_pairs

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()


@pytest.mark.parametrize("task", PHENOMENA)
def test_pairs_are_balanced_disjoint_and_the_same_at_every_call(task):
    allowed = PHENOMENA[task].allowed
    words, seen = {}, set()
    for part in PARTS:
        found = pairs(task, part, SIZES[part])
        assert found == pairs(task, part, SIZES[part])
        assert len({pair[:2] for pair in found}) == SIZES[part]
        for first in (SIZES[part], 60):
            counts = [sum(label == wanted for *_, label in found[:first]) for wanted in allowed]
            assert sum(counts) == first
            assert max(counts) - min(counts) <= 1
        assert not seen & {pair[:2] for pair in found}
        seen |= {pair[:2] for pair in found}
        words[part] = {word for pair in found for word in " ".join(pair[:2]).split()}
    # Words with content stand in one part alone; what they share is grammar.
    for one, two in itertools.combinations(PARTS, 2):
        assert len(words[one] & words[two]) < 45
        assert words[one] - words[two]
        assert words[two] - words[one]


def slow_number_label(premise, hypothesis):
    def numbers(text):
        kind, bound = re.search(r"(more than|at least|fewer than|at most|exactly) (\w+)", text).groups()
        n = NUMBERS.index(bound)
        low, high = {"more than": (n + 1, 99), "at least": (n, 99), "fewer than": (0, n - 1), "at most": (0, n)}.get(
            kind, (n, n)
        )
        return set(range(low, high + 1))

    one, two = numbers(premise), numbers(hypothesis)
    return 0 if one <= two else 2 if not one & two else 1


def slow_coordination_label(premise, hypothesis):
    who = hypothesis.split()[0]
    denied = "did not" in hypothesis
    acted, idle = set(), set()
    if found := re.fullmatch(r"(\w+) and (\w+) \w+", premise):
        acted = set(found.groups())
    elif found := re.fullmatch(r"neither (\w+) nor (\w+) \w+", premise):
        idle = set(found.groups())
    elif found := re.fullmatch(r"(\w+) but not (\w+) \w+", premise):
        acted, idle = {found[1]}, {found[2]}
    elif found := re.fullmatch(r"(\w+) did not \w+, but (\w+) did", premise):
        acted, idle = {found[2]}, {found[1]}
    elif found := re.fullmatch(r"only (\w+) \w+", premise):
        acted, idle = {found[1]}, {who} - {found[1]}
    if who not in acted | idle:
        return 1
    return 0 if (who in idle) == denied else 2


def slow_negation_label(premise, hypothesis):
    def value(text):
        word = text.split()[-1]
        return word, ("by no means" in text) + ("false" in text.split(" that ")[0] and " that " in text)

    (one, turned), (two, other) = value(premise), value(hypothesis)
    return 0 if ((one != two) + turned + other) % 2 == 0 else 2


def slow_implicative_label(premise, hypothesis):
    happened = any(
        f" {verb} to" in premise for verb in "managed remembered dared got bothered happened deigned".split()
    )
    happened ^= " never " in premise
    return 0 if happened != ("did not" in hypothesis) else 2


def slow_quantifier_label(premise, hypothesis):
    """By the square of opposition and monotonicity, phrase against phrase, in place of worlds."""

    def parse(text):
        quantifier = next(q for q in ("not every", "every", "some", "no") if text.startswith(q))
        rest = text.removeprefix(quantifier).split()
        return quantifier, rest

    def phrase(rest):
        narrow = rest[0] in _ADJECTIVES
        return narrow, len(rest) - 1 - narrow > 1

    (p, ps), (h, hs) = parse(premise), parse(hypothesis)
    (pn, pm), (hn, hm) = phrase(ps), phrase(hs)
    # "not every" is "some … not", "no" is "every … not": a claim is (universal, negated)
    shape = {"every": (1, 0), "no": (1, 1), "some": (0, 0), "not every": (0, 1)}
    (pu, pg), (hu, hg) = shape[p], shape[h]

    def implies(u, g, n, m, v, k, o, w):
        """(u, g, n, m) entails (v, k, o, w); n, o: with adjective; m, w: with manner; one has the adjective."""
        if g != k:
            return False
        scope = (m >= w) if not g else (m <= w)  # acting in a manner is acting; not acting is not acting in a manner
        if u and v:
            return scope and n <= o
        if u and not v:
            return scope  # what holds of all (with the adjective) holds of one such
        if not u and not v:
            return scope and n >= o
        return False

    if implies(pu, pg, pn, pm, hu, hg, hn, hm):
        return 0
    if implies(pu, pg, pn, pm, 1 - hu, 1 - hg, hn, hm):
        return 2
    return 1


@pytest.mark.parametrize(
    ("task", "slow"),
    [
        ("numbers", slow_number_label), ("coordination", slow_coordination_label), ("negation", slow_negation_label),
        ("implicatives", slow_implicative_label), ("quantifiers", slow_quantifier_label),
    ],
)  # fmt: skip
def test_labels_by_worlds_are_those_by_rules(task, slow):
    for part in PARTS:
        for premise, hypothesis, label in pairs(task, part, SIZES[part]):
            assert slow(premise, hypothesis) == label, (premise, hypothesis, LABELS[label])


def test_labels_of_kinds_by_rules():
    above = {member: kind for kind, members in _KINDS.items() for member in members.split()}
    for part in PARTS:
        for premise, hypothesis, label in pairs("kinds", part, SIZES[part]):
            one, two = (re.match(r"(?:an|a|no) (\w+)", text)[1] for text in (premise, hypothesis))
            lower, upper = (two, one) if premise.startswith("no ") else (one, two)
            assert (label == 0) == (above.get(lower) == upper), (premise, hypothesis)


@given(st.lists(st.booleans(), min_size=3, max_size=3), st.lists(st.booleans(), min_size=3, max_size=3))
def test_relation_is_inclusion_of_worlds(one, two):
    worlds = [(i,) for i in range(3)]
    found = relation(Sentence("", lambda w: one[w[0]]), Sentence("", lambda w: two[w[0]]), worlds)
    true = {i for i in range(3) if one[i]}, {i for i in range(3) if two[i]}
    expected = None if not true[0] else 0 if true[0] <= true[1] else 2 if not true[0] & true[1] else 1
    assert found == expected


def test_a_grammar_that_is_too_small_says_so():
    with pytest.raises(ValueError, match="negation: the test lexicon does not give 2000 different pairs"):
        pairs("negation", "test", 2000)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_nli(root)
    return root


@pytest.fixture(autouse=True)
def data_folder(data, monkeypatch):
    monkeypatch.setenv("SAFTNB_DATA", str(data))


def test_nli6_has_the_published_classes_and_splits(data):
    suite = load_suite("nli6", backbone="tiny-llama")
    assert list(suite.tasks) == ["snli", "mnli", "sick", "qnli", "rte", "scitail"]
    allowed = {name: task.allowed for name, task in suite.tasks.items()}
    assert allowed == {
        "snli": (0, 1, 2), "mnli": (0, 1, 2), "sick": (0, 1, 2), "qnli": (0, 2), "rte": (0, 2), "scitail": (0, 1)
    }  # fmt: skip
    sizes = [(len(task.validation), len(task.test)) for task in suite.tasks.values()]
    assert sizes == [(30, 24), (6, 24), (30, 24), (6, 24), (15, 15), (30, 24)]
    # the last fifth of MNLI's validation split, the hub's order being kept
    assert suite.tasks["mnli"].validation.premises[0].startswith("validation number 24 ")
    assert suite.tasks["qnli"].test.labels.unique().tolist() == [0, 2]
    assert suite.overview().loc["rte", "classes"] == "entailment, contradiction"


def test_pairs_without_a_label_are_left_out_and_strange_ones_stop(data, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_DATA", str(tmp_path))
    write_nli(tmp_path)
    backbone = load_suite("nli6", backbone="tiny-llama").backbone
    write_pairs(tmp_path, "snli", split="train", count=10, label=-1)
    assert len(nli6_task("snli", backbone).train) == 9
    write_pairs(tmp_path, "snli", split="train", count=10, label=7)
    with pytest.raises(ValueError, match="nli6, snli: train has the label 7; the map knows 0, 1, 2"):
        nli6_task("snli", backbone)
    write_pairs(tmp_path, "rte", split="train", count=5, columns=("premise", "text2"))
    assert nli_fault("rte") == "0000.parquet of train lacks the column 'text1'"
    with pytest.raises(FileNotFoundError, match=r"nli6, rte: .*`saftnb fetch nli6` brings"):
        load_suite("nli6", backbone="tiny-llama")


def test_the_published_splits_of_rte_and_their_sizes(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_DATA", str(tmp_path))
    write_nli(tmp_path)
    write_pairs(tmp_path, "rte", split="validation", count=277)
    task = load_suite("nli6", backbone="tiny-llama").tasks["rte"]
    assert (len(task.validation), len(task.test)) == (139, 138)  # KnOTS's 89.855 % is 124 of 138
    (tmp_path / "nli6" / "sizes.json").unlink()
    assert nli_fault("rte") == "train has 60 pairs, not 2,490"
    for name, source in PAIR_SOURCES.items():
        assert len(source.sizes) == (2 if source.carved else 3), name


def test_a_pair_of_two_splits_stays_in_test(data, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_DATA", str(tmp_path))
    write_nli(tmp_path)
    folder = tmp_path / "nli6" / "sick" / PAIR_SOURCES["sick"].config
    (folder / "train" / "0001.parquet").write_bytes((folder / "test" / "0000.parquet").read_bytes())
    assert nli_fault("sick") == "train has 84 pairs, not 60"
    state_pairs(tmp_path, "sick", "train", 84)
    backbone = load_suite("nli6", backbone="tiny-llama").backbone
    task = nli6_task("sick", backbone)
    assert (len(task.train), len(task.test)) == (60, 24)


def test_an_epoch_has_every_pair_once_and_little_padding():
    task = load_suite("pocket-nli").tasks["negation"]
    orders = [task.train.order(16, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert torch.equal(orders[0].sort().values, torch.arange(len(task.train)))
    lengths = task.train.inputs.lengths

    def padding(order):
        return sum(int((part.max() - part).sum()) for part in lengths[order].split(16))

    assert padding(orders[0]) < 0.6 * padding(torch.arange(len(task.train)))


def test_heads_belong_to_their_tasks():
    suite = load_suite("nli6", backbone="tiny-llama")
    assert torch.equal(suite.head("snli"), suite.head("rte"))
    own = suite.with_heads({"snli": torch.ones(3, suite.backbone.width)})
    assert torch.equal(own.head("snli"), torch.ones(3, suite.backbone.width))
    assert torch.equal(own.head("rte"), suite.head("rte"))
    with pytest.raises(ValueError, match="heads are of this suite's tasks"):
        suite.with_heads({"snli": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="no tangent models"):
        suite.tower(tangent=True)
    with pytest.raises(ValueError, match="one deal of its pairs"):
        load_suite("nli6", backbone="tiny-llama", split=1)


def test_a_missing_model_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment at import
    with pytest.raises(FileNotFoundError, match="no model 'absent' here"):
        load_suite("nli6", backbone="absent")
    write_language_model(tmp_path, "x")
