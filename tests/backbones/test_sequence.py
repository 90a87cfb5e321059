"""Language models as sequence classifiers, against `transformers`' own."""

import copy

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, GPT2Config, GPT2Model

from saftnb.backbones import (
    SequenceClassifier,
    SequenceTower,
    add_lora,
    initial_head,
    load_sequence_backbone,
    lora_vector,
    remove_lora,
    sequence,
)
from saftnb.evaluate import logits
from saftnb.merging import LowRank, TaskVector, merge
from tests.tools.standins import write_language_model

PREMISES = ["train number 1 of snli is a long story", "it is a story", "validation number 9 of rte"]
HYPOTHESES = ["it is", "test number 2 of qnli is a long long story", "a story"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_sequence_backbone(str(write_language_model(tmp_path_factory.mktemp("lm"))))


@pytest.fixture(scope="module")
def minilm():
    return load_sequence_backbone("minilm")


def adapter(backbone, seed=0, rank=2, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(backbone.model.named_parameters())
    return TaskVector({
        name: LowRank(*(scale * torch.randn(shape, generator=generator) for shape in ((o, rank), (rank, i))))
        for name in backbone.layers for o, i in [parameters[name].shape]
    })  # fmt: skip


def test_names_and_pooling(llama, minilm):
    assert (llama.pooling, minilm.pooling) == ("last", "first")
    assert len(llama.layers) == 2 * 4
    assert len(minilm.layers) == 6 * 4
    assert {name.split(".")[-2] for name in llama.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert minilm.width == 384


def test_padding_is_on_the_right_and_told_by_lengths(llama):
    tokens = llama.tokenize(PREMISES, HYPOTHESES)
    given = tokens.padded()
    theirs = llama.tokenizer(PREMISES, HYPOTHESES, padding=True, return_tensors="pt")
    assert torch.equal(given["input_ids"], theirs["input_ids"])
    assert torch.equal(given["attention_mask"], theirs["attention_mask"])
    some = tokens[torch.tensor([2, 0])]
    assert torch.equal(some.lengths, tokens.lengths[[2, 0]])
    assert torch.equal(some.padded()["input_ids"][1, : some.lengths[1]], given["input_ids"][0, : tokens.lengths[0]])
    assert [len(part) for part in tokens.tensor_split(2)] == [2, 1]


def test_two_sentences_never_run_into_each_other(tmp_path):
    plain = load_sequence_backbone(str(write_language_model(tmp_path, "plain", template=False)))
    tokens = plain.tokenize(["it is a story"], ["it is"])
    assert plain.tokenizer.convert_ids_to_tokens(tokens.ids) == ["it", "is", "a", "story", "</s>", "it", "is"]


def test_the_classifier_is_transformers_own(llama, tmp_path):
    """LlamaForSequenceClassification, one pair at a time, so that nothing is padding."""
    head = torch.randn(3, llama.width, generator=torch.Generator().manual_seed(1))
    llama.model.save_pretrained(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    theirs.score.weight.data.copy_(head)
    ours = SequenceClassifier(SequenceTower(llama), head, (0, 1, 2)).eval()
    tokens = llama.tokenize(PREMISES, HYPOTHESES)
    for i in range(3):
        given = llama.tokenizer(PREMISES[i], HYPOTHESES[i], return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(ours(tokens)[i], theirs(**given).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", ["llama", "minilm"])
def test_logits_do_not_depend_on_the_batch(which, request):
    backbone = request.getfixturevalue(which)
    model = SequenceClassifier(
        SequenceTower(backbone, adapter(backbone)), initial_head(backbone.width), (0, 1, 2)
    ).eval()
    tokens = backbone.tokenize(PREMISES * 3, HYPOTHESES * 3)
    whole = logits(model, tokens)
    torch.testing.assert_close(logits(model, tokens, batch_size=2), whole, atol=1e-5, rtol=1e-4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(model, tokens[order], batch_size=4), whole[order], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dense", [False, True])
def test_a_moved_tower_is_the_model_with_the_delta_added(llama, dense):
    before = {name: value.clone() for name, value in llama.model.state_dict().items()}
    vector = adapter(llama).dense() if dense else adapter(llama)
    tokens = llama.tokenize(PREMISES, HYPOTHESES)
    added = copy.deepcopy(llama.model)
    vector.apply_to(added)
    slow = SequenceTower(llama)
    slow.model = added
    with torch.no_grad():
        moved, plain = SequenceTower(llama, vector)(tokens), SequenceTower(llama)(tokens)
        torch.testing.assert_close(moved, slow(tokens), atol=1e-4, rtol=1e-4)
    assert (moved - plain).abs().max() > 1e-2
    assert all(torch.equal(value, before[name]) for name, value in llama.model.state_dict().items())
    assert not any(module._forward_hooks for module in llama.model.modules())


def test_measuring_merged_models_copies_no_base(llama, monkeypatch):
    monkeypatch.setattr(copy, "deepcopy", lambda *a, **k: pytest.fail("the base was copied"))
    towers = [SequenceTower(llama, scale * adapter(llama)) for scale in (0.1, 0.5)]
    assert all(tower.model is llama.model for tower in towers)


def test_a_merged_adapter_gives_the_same_logits_in_peft(llama, tmp_path):
    merged = merge([adapter(llama, seed) for seed in range(3)], "ties", space="knots", keep=0.5, scale=0.7)
    merged.to_adapter(tmp_path)
    head, tokens = initial_head(llama.width), llama.tokenize(PREMISES, HYPOTHESES)
    theirs = SequenceTower(llama)
    theirs.model = PeftModel.from_pretrained(copy.deepcopy(llama.model), tmp_path).eval()
    ours = SequenceClassifier(SequenceTower(llama, merged), head, (0, 1, 2)).eval()
    torch.testing.assert_close(
        logits(ours, tokens), logits(SequenceClassifier(theirs, head, (0, 1, 2)).eval(), tokens), atol=1e-5, rtol=1e-4
    )


def test_masked_classes(llama):
    head, tokens = initial_head(llama.width), llama.tokenize(PREMISES, HYPOTHESES)
    model = SequenceClassifier(SequenceTower(llama), head, (0, 2))
    assert torch.isinf(model.eval()(tokens)[:, 1]).all()
    assert (model.train()(tokens)[:, 1] == -1e10).all()
    model.eval()


def test_adapters_come_off_again(minilm):
    names = [name for name, _ in minilm.model.named_modules()]
    before = {name: value.clone() for name, value in minilm.model.state_dict().items()}
    add_lora(minilm.model, rank=2, targets=minilm.targets)
    state = {name: p for name, p in minilm.model.named_parameters() if p.requires_grad}
    assert sorted(lora_vector(state, 1.0)) == sorted(minilm.layers)
    remove_lora(minilm.model)
    assert [name for name, _ in minilm.model.named_modules()] == names
    assert all(torch.equal(value, before[name]) for name, value in minilm.model.state_dict().items())


def test_adapters_of_a_base_in_bfloat16_train_in_float32(tmp_path):
    backbone = load_sequence_backbone(str(write_language_model(tmp_path, "half")))
    backbone.model.to(torch.bfloat16)
    add_lora(backbone.model, rank=2, targets=backbone.targets)
    factors = [p for p in backbone.model.parameters() if p.requires_grad]
    assert {p.dtype for p in factors} == {torch.float32}
    SequenceTower(backbone)(backbone.tokenize(PREMISES, HYPOTHESES)).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in factors)
    remove_lora(backbone.model)
    moved = SequenceTower(backbone, adapter(backbone))(backbone.tokenize(PREMISES, HYPOTHESES))
    assert moved.dtype == torch.float32


def test_the_base_has_no_dropout_of_its_own(minilm):
    assert {m.p for m in minilm.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: {"layers.7.self_attn.q_proj.weight": v["layers.0.self_attn.q_proj.weight"]}, "no linear layer of"),
        (lambda v: {"layers.0.self_attn.q_proj.weight": torch.zeros(3, 3)}, r"is \(3, 3\), in .* \(32, 32\)"),
        (lambda v: {"norm.weight": torch.zeros(32)}, "no linear layer of 'norm.weight'"),
    ],
)
def test_a_vector_of_another_base_is_refused(llama, change, said):
    with pytest.raises(ValueError, match=f"another base.*{said}"):
        SequenceTower(llama, TaskVector(change(adapter(llama))))


def test_a_model_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    folder = write_language_model(tmp_path, "endless", end=False)
    with pytest.raises(ValueError, match="neither a padding nor an end token"):
        load_sequence_backbone(str(folder))
    fused = write_language_model(tmp_path, "fused")
    GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=99)).save_pretrained(fused)
    with pytest.raises(ValueError, match="without separate q, k, v and out projections"):
        load_sequence_backbone(str(fused))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment at import
    with pytest.raises(FileNotFoundError, match="no model 'nobody/nothing' here"):
        load_sequence_backbone("nobody/nothing")
    assert "needs access" in sequence._why_not("meta/x", OSError("You are trying to access a gated repo."))


def test_a_model_is_found_under_the_data_folder(tmp_path, monkeypatch):
    write_language_model(tmp_path, "mine", pad=True)
    monkeypatch.setenv("SAFTNB_DATA", str(tmp_path))
    found = load_sequence_backbone("mine")
    assert (found.name, found.tokenizer.pad_token) == ("mine", "<pad>")
    assert found is load_sequence_backbone("mine")


def test_an_encoder_by_its_layers(tmp_path):
    folder = write_language_model(tmp_path, "bert")
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=99)
    BertModel(config).save_pretrained(folder)
    found = load_sequence_backbone(str(folder))
    assert found.pooling == "first"
    assert [name.split(".")[-2] for name in found.layers] == ["query", "key", "value", "dense"]
