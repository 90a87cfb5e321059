"""Published models in the place of trainings, from stand-ins in their forms, saved by transformers and peft."""

import warnings

import pytest
import torch
from transformers import CLIPVisionModel, LlamaForSequenceClassification

import saftnb as sn
from saftnb.evaluate import suite_hits
from saftnb.finetune import TaskVectors, finetune, published, recipe
from saftnb.finetune.published import Published, linear_probe
from saftnb.formats.hub import hub_id
from saftnb.merging import LowRank, merge
from saftnb.suites import load_suite
from tests.tools.standins import write_all

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*(gradient|activation)_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_all(root)
    return root


@pytest.fixture(autouse=True)
def places(data, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_DATA", str(data))
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path / "store"))


def test_fusionbenchs_models_are_experts_like_trained_ones(data):
    suite = load_suite("vision8")
    experts = sn.task_vectors(suite, "published:fusionbench")
    assert list(experts) == list(suite.tasks)
    name = hub_id("fusionbench", "ViT-B-32", "cars")
    assert name == "tanganke/clip-vit-base-patch32_stanford-cars"
    theirs = CLIPVisionModel.from_pretrained(data / "published" / "fusionbench" / name.split("/")[1]).eval()
    tower = suite.tower(experts["cars"])
    pixels = torch.randn(2, 3, 32, 32)
    wanted = theirs(pixels).pooler_output @ tower.proj
    torch.testing.assert_close(tower(pixels), wanted, rtol=1e-4, atol=1e-5)
    assert "proj" not in experts["cars"]  # it did not train: no share of TIES' entries
    merged = merge(experts, "ties", keep=0.2, scale=0.3)
    assert set(suite_hits(suite, merged)) == set(suite.tasks)


def test_knots_adapters_of_clip_and_llama(data):
    suite = load_suite("vision8")
    experts = sn.task_vectors(suite, "published:knots", tasks=["svhn", "cars"])
    assert all(isinstance(delta, LowRank) and delta.B.shape[1] == 4 for delta in experts["svhn"].values())
    assert len(experts["cars"]) == 2 * 4
    merge(experts, "ties", space="knots")
    pairs = load_suite("nli6", backbone="tiny-llama")
    found = finetune(pairs, "rte", "published:knots")
    assert len(found.task_vector) == 2 * 4
    assert found.inputs["head"] == "linear probe"  # KnOTS keeps the heads elsewhere
    assert found.head.shape == (3, 32)
    assert found.head[[label for label in range(3) if label not in pairs.tasks["rte"].allowed]].eq(0).all()
    assert 0 <= found.validation_accuracy <= 1


def test_a_folder_of_ones_own_with_a_head_of_its_own(data, tmp_path):
    from peft import LoraConfig, get_peft_model

    pairs = load_suite("nli6", backbone="tiny-llama")
    model = LlamaForSequenceClassification.from_pretrained(data / "models" / "tiny-llama", num_labels=3)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    adapted.save_pretrained(tmp_path / "mine" / "snli")
    found = finetune(pairs, "snli", f"published:{tmp_path / 'mine'}")
    assert found.inputs["head"] == "its own"
    torch.testing.assert_close(found.head, adapted.base_model.model.score.modules_to_save.default.weight.detach())
    with pytest.raises(FileNotFoundError, match="rte: no such folder; models takes a folder with a subfolder for each"):
        finetune(pairs, "rte", f"published:{tmp_path / 'mine'}")


def test_an_entry_is_found_again_by_the_files_and_read_anew_when_they_change(data, tmp_path, monkeypatch):
    suite = load_suite("vision8")
    for task in ("mnist", "dtd"):
        source = data / "published" / "fusionbench" / f"clip-vit-base-patch32_{task}"
        CLIPVisionModel.from_pretrained(source).save_pretrained(tmp_path / "mine" / task)
    plan = recipe(f"published:{tmp_path / 'mine'}", suite)
    assert (plan.name, plan.scope, plan.tangent, plan.shortened(5)) == ("published:mine", "full", False, plan)
    first = finetune(suite, "mnist", plan)
    with monkeypatch.context() as broken:
        broken.setattr(published, "load_tower", None)
        assert finetune(suite, "mnist", plan, seed=3).fingerprint == first.fingerprint  # the store has it, for any seed
    CLIPVisionModel.from_pretrained(tmp_path / "mine" / "dtd").save_pretrained(tmp_path / "mine" / "mnist")
    assert finetune(suite, "mnist", plan).fingerprint != first.fingerprint
    vectors = TaskVectors(suite, {plan.name: plan}, [0], ["mnist", "dtd"])
    assert list(vectors["published:mine", 0]) == ["mnist", "dtd"]


def test_what_is_not_here_or_not_published_is_one_line(data, monkeypatch, tmp_path):
    suite = load_suite("vision8")
    monkeypatch.setenv("SAFTNB_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="`saftnb fetch vision8 --models fusionbench` brings it"):
        finetune(suite, "mnist", "published:fusionbench")
    with pytest.raises(ValueError, match="fusionbench has published no models of pocket-0 for digits"):
        finetune(load_suite("thimble"), "digits", "published:fusionbench")
    with pytest.raises(FileNotFoundError, match="nowhere/digits: no such folder"):
        finetune(load_suite("thimble"), "digits", Published("nowhere"))


def test_a_linear_probe_separates_what_can_be_separated():
    suite = load_suite("thimble-nli")
    task = next(iter(suite.tasks))
    head = linear_probe(suite, task, suite_zero(suite), CPU)
    scored = suite.with_heads({task: head})
    train = suite.tasks[task].train[:100]
    model = scored.classifier(task, scored.tower())
    right = (model(train.inputs).argmax(dim=1) == train.labels).double().mean()
    assert right > 0.9  # a head of 384 weights a class on 100 pairs
    assert torch.equal(head, linear_probe(suite, task, suite_zero(suite), CPU))


def suite_zero(suite):
    """An adapter that changes nothing."""
    from saftnb.task_vector import TaskVector

    name = suite.backbone.layers[0]
    shape = suite.backbone.model.get_parameter(name).shape
    return TaskVector({name: LowRank(torch.zeros(shape[0], 1), torch.zeros(1, shape[1]))})


def test_several_sets_of_models_are_several_recipes(tmp_path):
    suite = load_suite("vision8")
    found = sn.plans(suite, ["lora", "lora+saft"], models=f"{tmp_path}/plain, {tmp_path}/flat")
    assert list(found) == ["published:plain", "published:flat"]
    assert [plan.source for plan in found.values()] == [f"{tmp_path}/plain", f"{tmp_path}/flat"]
    with pytest.raises(ValueError, match="give the folders names of their own"):
        sn.plans(suite, [], models="a/models,b/models")
