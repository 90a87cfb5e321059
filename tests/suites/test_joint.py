"""The joint task: the union of labels, its head, and Hits@k."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from saftnb.evaluate import hits_at, joint_ranks
from saftnb.finetune import finetune, recipe
from saftnb.suites import Split, Suite, Task, joint_head, joint_labels, load_suite
from saftnb.suites.vision8 import SOURCES, prompts


def named(name, classes, templates):
    """A task of no pictures that matter."""
    parts = [Split(torch.full((1, 3, 2, 2), i, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)) for i in range(3)]
    return Task(name, "rendered", tuple(classes), tuple(templates), *parts)


@pytest.fixture(scope="module")
def suite():
    return load_suite("thimble")


def test_the_published_counts_of_labels():
    tasks = {name: named(name, *prompts(name)) for name in SOURCES}
    suite = Suite("vision8", None, tasks)
    assert sum(len(task.class_names) for task in tasks.values()) == 758
    released, unique = joint_labels(suite, "released"), joint_labels(suite, "unique")
    assert (len(released), len(unique)) == (748, 736)
    assert torch.equal(released.index["mnist"], released.index["svhn"])
    assert sum(name == "river" for name in released.names) == 3
    assert set(released.names) == set(unique.names)


def test_equal_names_share_a_label_and_all_of_its_templates():
    tasks = {
        "a": named("a", ["cat", "river"], ["a {}"]),
        "b": named("b", ["river", "sea"], ["the {}", "a {}"]),
        "c": named("c", ["cat", "river"], ["one {}"]),
    }
    suite = Suite("s", None, tasks)
    unique = joint_labels(suite)
    assert unique.names == ("cat", "river", "sea")
    assert unique.templates == (("a {}", "one {}"), ("a {}", "the {}", "one {}"), ("the {}", "a {}"))
    assert [unique.index[t].tolist() for t in tasks] == [[0, 1], [1, 2], [0, 1]]
    released = joint_labels(suite, "released")
    assert released.names == ("cat", "river", "river", "sea")
    assert released.templates == (("a {}", "one {}"), ("a {}", "one {}"), ("the {}", "a {}"), ("the {}", "a {}"))
    assert [released.index[t].tolist() for t in tasks] == [[0, 1], [2, 3], [0, 1]]
    assert joint_labels(suite, tasks=["b"]).names == ("river", "sea")
    with pytest.raises(ValueError, match="protocol is released or unique, not 'both'"):
        joint_labels(suite, "both")


def test_the_head_is_that_of_each_task_where_nothing_is_shared(suite):
    labels = joint_labels(suite)
    head = joint_head(suite, labels)
    assert len(labels) == 20
    torch.testing.assert_close(head, torch.cat([suite.head("digits"), suite.head("patterns")]))


@torch.no_grad()
def test_ranks_and_hits_by_the_definition(suite, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path))
    plan = recipe("sgd", suite, steps=6, warmup=2, evaluate_every=3)
    vectors = [finetune(suite, task, plan, progress=False).task_vector for task in suite.tasks]
    labels = joint_labels(suite)
    head = joint_head(suite, labels)
    for models in ([None], vectors[:1], vectors):
        ranks = joint_ranks(suite, labels, head, models, pictures=30)
        right = {1: [], 3: [], 5: []}
        for task in suite.tasks:
            part = suite.tasks[task].test[:30]
            mean = torch.zeros(30, 20)
            for vector in models:
                tower, pixels = suite.tower(vector), suite.classifier(task).pixels(part.images)
                mean += torch.stack([F.softmax(F.normalize(tower(x[None])[0], dim=0) @ head.T, dim=0) for x in pixels])
            for i, label in enumerate(part.labels.tolist()):
                wanted = mean[i, labels.index[task][label]]
                above = int((mean[i] > wanted).sum())
                assert abs(int(ranks[task][i]) - above) <= int(((mean[i] - wanted).abs() < 1e-5).sum() - 1)
                for k in right:
                    right[k].append(int(ranks[task][i]) < k)
        table = hits_at(ranks)
        assert table.loc["all"].to_dict() == pytest.approx({k: sum(v) / len(v) for k, v in right.items()})
        assert (table[1] <= table[3]).all()
        assert (table[3] <= table[5]).all()
        assert table[1].max() > 0.2


def test_all_counts_every_picture_alike():
    ranks = {"small": torch.tensor([0]), "large": torch.tensor([4, 9, 2])}
    table = hits_at(ranks, [1, 5])
    assert table.loc["all"].tolist() == [0.25, 0.75]
    assert table.loc["large"].tolist() == [0.0, pytest.approx(2 / 3)]


def test_a_copy_of_the_right_label_counts_as_wrong_in_the_released_protocol(suite):
    """Two tasks with the same pictures and one name in common: the copy that comes first wins."""
    first = suite.tasks["digits"]
    other = dataclasses.replace(first, name="other", class_names=("0", *(f"digit {i}" for i in range(1, 10))))
    both = Suite("both", suite.backbone, {"digits": first, "other": other})
    zero = first.test.labels == 0
    both_labels = [joint_labels(both, protocol) for protocol in ("released", "unique")]
    released, unique = (joint_ranks(both, labels, joint_head(both, labels), [None]) for labels in both_labels)
    assert (released["other"][zero] >= 1).all()
    assert torch.equal(unique["digits"][zero], unique["other"][zero])
