"""`saftnb merge`: the same as the library's merge, from files that transformers and PEFT wrote to files they read."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPVisionModel, GPT2Config, GPT2LMHeadModel

from saftnb import disk
from saftnb.cli import main
from saftnb.formats import load_adapter, open_checkpoint
from saftnb.formats.adapter import CONFIG
from saftnb.formats.writing import TensorFile, new_folder
from saftnb.merging import LowRank, TaskVector, merge
from saftnb.merging.deltas import lowest_rank
from saftnb.merging.files import execute, plan
from tests.backbones.test_lora import HF
from tests.formats.test_adapters import LLAMA, adapted

pytestmark = pytest.mark.filterwarnings("ignore:.*(gradient|activation)_checkpointing:FutureWarning")


@pytest.fixture
def adapters(tmp_path):
    """Three adapters of one CLIP, by PEFT, and the folder that holds them."""
    torch.manual_seed(0)
    CLIPVisionModel(HF).save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("mnist", "dtd", "cars")):
        base = CLIPVisionModel.from_pretrained(tmp_path / "base")
        adapted(base, tmp_path / name, seed, target_modules=["q_proj", "v_proj"])
    return tmp_path


@pytest.fixture
def models(tmp_path):
    """Two fine-tunings of one CLIP vision tower, by transformers, and their base."""
    torch.manual_seed(0)
    base = CLIPVisionModel(HF)
    base.save_pretrained(tmp_path / "base")
    for name in ("one", "two"):
        model = CLIPVisionModel.from_pretrained(tmp_path / "base")
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn(p.shape) / 10
        model.save_pretrained(tmp_path / name)
    return tmp_path


def run(folder, *arguments):
    """The command's exit code; words that name something in the folder become its path."""
    here = {path.name for path in folder.iterdir()}
    words = [str(folder / word) if word.split("/")[0] in here else word for word in arguments]
    return main(["merge", *words, "-o", str(folder / "out")])


@pytest.mark.parametrize(
    ("method", "space", "options"),
    [
        ("ties", "knots", {"keep": 0.2, "scale": 0.6}),
        ("ties", "weights", {"keep": 0.5}),
        ("task_arithmetic", "weights", {"scale": 0.3}),
        ("tsv_m", "core", {}),
        ("dare_ties", "knots", {"drop": 0.5, "seed": 3}),
        ("average", "weights", {}),
    ],
)
def test_merged_adapters_are_those_of_the_library_and_load_in_plain_peft(adapters, method, space, options, capsys):
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert run(adapters, "mnist", "dtd", "cars", "--method", method, "--space", space, *words) == 0
    vectors = [load_adapter(adapters / name) for name in ("mnist", "dtd", "cars")]
    wanted = merge(vectors, method, space=space, **options)
    found = load_adapter(adapters / "out")
    assert set(found) == set(wanted)
    for name, delta in found.items():
        dense = wanted[name].dense() if isinstance(wanted[name], LowRank) else wanted[name]
        torch.testing.assert_close(delta.dense(), dense, rtol=1e-4, atol=1e-5)
    ranks = {delta.B.shape[1] for delta in found.values()}
    assert max(ranks) <= (32 if method == "ties" and space == "weights" else 9)
    fresh = CLIPVisionModel.from_pretrained(adapters / "base").eval()
    loaded = PeftModel.from_pretrained(CLIPVisionModel.from_pretrained(adapters / "base"), adapters / "out").eval()
    pixels = torch.randn(2, 3, 28, 28)
    moved = wanted.apply_to(fresh)(pixels).pooler_output
    torch.testing.assert_close(loaded(pixels).pooler_output, moved, rtol=1e-3, atol=1e-4)
    page = (adapters / "out" / "README.md").read_text()
    assert f"{method} in {space}" in page
    assert all(f"`{name}/adapter_model.safetensors`, sha256 " in page for name in ("mnist", "dtd", "cars"))
    assert "wrote" in capsys.readouterr().out


def test_peft_merges_the_same_where_it_adds_products(adapters):
    """PEFT's "cat" is Σ B A: the one of its ways that is a task arithmetic of the products."""
    assert run(adapters, "mnist", "dtd", "cars", "--method", "task_arithmetic", "--scale", "0.4") == 0
    base = CLIPVisionModel.from_pretrained(adapters / "base")
    theirs = PeftModel.from_pretrained(base, adapters / "mnist", adapter_name="mnist")
    for name in ("dtd", "cars"):
        theirs.load_adapter(adapters / name, adapter_name=name)
    theirs.add_weighted_adapter(["mnist", "dtd", "cars"], [0.4] * 3, "sum", combination_type="cat")
    theirs.set_adapter("sum")
    ours = PeftModel.from_pretrained(CLIPVisionModel.from_pretrained(adapters / "base"), adapters / "out").eval()
    pixels = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(ours(pixels).pooler_output, theirs.eval()(pixels).pooler_output, rtol=1e-4, atol=1e-5)


def test_a_rank_cuts_and_says_what_is_lost(adapters, capsys):
    assert run(adapters, "mnist", "dtd", "--method", "average", "--rank", "2") == 0
    said = capsys.readouterr().out
    share = float(said.split("cut to rank 2: ")[1].split("%")[0])
    vectors = [load_adapter(adapters / name) for name in ("mnist", "dtd")]
    whole, cut = merge(vectors, "average").dense(), load_adapter(adapters / "out").dense()
    assert all(delta.B.shape[1] == 2 for delta in load_adapter(adapters / "out").values())
    assert share == pytest.approx(100 * (whole - cut).norm() / whole.norm(), abs=0.01)
    assert f"cut to rank 2: {share:.2f}%" in (adapters / "out" / "README.md").read_text()


def test_the_lowest_rank_is_exact_and_no_larger_than_need_be():
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(9, 3, generator=generator), torch.randn(3, 7, generator=generator)
    twice = LowRank(torch.cat([B, B], dim=1), torch.cat([A, 2 * A]))
    for delta in (twice, twice.dense()):
        found = lowest_rank(delta)
        assert found.B.shape[1] == 3
        torch.testing.assert_close(found.dense(), twice.dense(), rtol=1e-5, atol=1e-5)
    assert lowest_rank(LowRank(torch.zeros(4, 2), torch.zeros(2, 4))).dense().eq(0).all()
    best = lowest_rank(twice, rank=1).dense()
    u, s, vt = torch.linalg.svd(twice.dense())
    torch.testing.assert_close(best, s[0] * u[:, :1] @ vt[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "iso_c", "iso_cts", "tsv_m"])
@pytest.mark.parametrize("sharded", [False, True])
def test_merged_models_are_those_of_the_library_in_the_files_of_their_base(models, method, sharded, monkeypatch):
    monkeypatch.setattr("saftnb.merging.whole_models.SPAN", 500)  # so that tensors are merged in several pieces
    if sharded:
        CLIPVisionModel.from_pretrained(models / "base").save_pretrained(models / "base", max_shard_size="20KB")
        (models / "base" / "model.safetensors").unlink(missing_ok=True)
    options = {"ties": ["--keep", "0.3", "--scale", "0.8"], "task_arithmetic": ["--scale", "0.4"]}.get(method, [])
    assert run(models, "--base", "base", "one", "two", "--method", method, *options) == 0
    base = CLIPVisionModel.from_pretrained(models / "base")
    vectors = [TaskVector.between(base, CLIPVisionModel.from_pretrained(models / name)) for name in ("one", "two")]
    values = {name.strip("-"): float(value) for name, value in zip(options[::2], options[1::2], strict=True)}
    wanted = merge(vectors, method, **values).apply_to(base)
    found = CLIPVisionModel.from_pretrained(models / "out")
    for name, p in wanted.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), p, rtol=1e-5, atol=1e-6, msg=name)
    ours, theirs = open_checkpoint(models / "out"), open_checkpoint(models / "base")
    assert ours.shards() == theirs.shards()
    assert ours.config == theirs.config


def test_ties_from_the_disk_decides_zero_sums_by_the_majority_of_all_entries(tmp_path, monkeypatch):
    monkeypatch.setattr("saftnb.merging.whole_models.SPAN", 4)
    base = {"a": torch.zeros(3, 3), "b": torch.zeros(5)}
    for sign in (1.0, -1.0):
        one = {"a": torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]), "b": torch.full((5,), sign * 20)}
        two = {"a": -one["a"], "b": torch.full((5,), sign * 20)}
        for name, state in (("base", base), ("one", one), ("two", two)):
            save_file(state, tmp_path / f"{name}.safetensors")
        sources = [str(tmp_path / f"{name}.safetensors") for name in ("one", "two")]
        given = ["--base", str(tmp_path / "base.safetensors"), "--method", "ties", "--keep", "1", "--force"]
        assert main(["merge", *sources, *given, "-o", str(tmp_path / "out")]) == 0
        found = load_file(tmp_path / "out" / "base.safetensors")
        assert torch.equal(found["a"], sign * one["a"])
        wanted = merge([TaskVector(one), TaskVector(two)], "ties", keep=1.0)
        assert torch.equal(found["a"], wanted["a"])


def test_tied_weights_in_a_pickle_are_merged_once_and_written_under_both_names(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    base = GPT2LMHeadModel(config)
    torch.save(base.state_dict(), tmp_path / "base.bin")
    vectors = []
    for name in ("one", "two"):
        model = GPT2LMHeadModel(config)
        model.load_state_dict(base.state_dict())
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn(p.shape) / 10
        torch.save({"model_state_dict": model.state_dict(), "epoch": 1}, tmp_path / f"{name}.bin")
        vectors.append(TaskVector.between(base, model))
    assert run(tmp_path, "--base", "base.bin", "one.bin", "two.bin", "--method", "ties", "--keep", "0.3") == 0
    found = load_file(tmp_path / "out" / "base.safetensors")
    wanted = merge(vectors, "ties", keep=0.3).apply_to(base).state_dict()
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_half_precision_models_are_merged_in_float32_and_rounded_once(tmp_path):
    torch.manual_seed(0)
    base = {"w": torch.randn(20, 20).bfloat16()}
    tuned = [{"w": (base["w"].float() + torch.randn(20, 20) / 50).bfloat16()} for _ in range(3)]
    save_file(base, tmp_path / "base.safetensors")
    for number, state in enumerate(tuned):
        save_file(state, tmp_path / f"{number}.safetensors")
    names = [f"{number}.safetensors" for number in range(3)]
    assert run(tmp_path, "--base", "base.safetensors", *names, "--method", "task_arithmetic", "--scale", "0.7") == 0
    exact = base["w"].double() + 0.7 * sum(state["w"].double() - base["w"].double() for state in tuned)
    found = load_file(tmp_path / "out" / "base.safetensors")["w"]
    assert (found != exact.bfloat16()).sum() <= 1  # where float32 itself rounds to the other side


def test_task_vectors_own_files_are_merged_too(tmp_path):
    for number in range(2):
        TaskVector({"w": torch.full((2, 2), float(number))}).save(tmp_path / f"{number}.safetensors")
    assert run(tmp_path, "0.safetensors", "1.safetensors", "--method", "average") == 0
    assert TaskVector.load(tmp_path / "out" / "task_vector.safetensors")["w"].eq(0.5).all()


def test_a_dry_run_writes_nothing_and_says_shapes_memory_and_time(adapters, models, capsys):
    assert run(adapters, "mnist", "dtd", "--method", "ties", "--space", "knots", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "2 adapters: 4 tensors (32×32), 4,096 entries each" in said
    assert "ties in knots: cutoff 1e-05, axis columns, keep 0.2" in said
    assert "memory: about" in said
    assert run(models, "--base", "base", "one", "two", "--method", "tsv_m", "--dry-run") == 0
    assert "2 models" in capsys.readouterr().out
    assert not (adapters / "out").exists()


def test_bad_input_is_one_line_and_exit_code_2_before_any_work(adapters, capsys, monkeypatch):
    TaskVector({"w.weight": LowRank(torch.ones(2, 1), torch.ones(1, 2))}).to_adapter(adapters / "other", base="x/y")
    save_file({"w": torch.ones(2)}, adapters / "w.safetensors")
    TaskVector({"w": torch.ones(2)}).save(adapters / "tv.safetensors")
    TaskVector({"far.weight": LowRank(torch.ones(2, 1), torch.ones(1, 2))}).to_adapter(adapters / "alone")
    for name in ("empty", "half"):
        (adapters / name).mkdir()
    shutil.copy(adapters / "mnist" / "adapter_model.safetensors", adapters / "half")
    monkeypatch.setattr("saftnb.merging.files.execute", None)
    ties = ("--method", "ties")
    for arguments, message in (
        (("mnist", "dtd"), "--method is missing"),
        (("mnist", *ties), "takes two models or more, got 1"),
        (("mnist", "nowhere", *ties), "nowhere: no such file or folder"),
        (("mnist", "dtd", "--method", "tiez"), "there is no merge method 'tiez'; allowed are average"),
        (("mnist", "dtd", *ties, "--space", "knot"), "there is no merge space 'knot'; allowed are core"),
        (("mnist", "dtd", *ties, "--keep", "2"), "ties: keep = 2.0 is not allowed (keep: number in (0, 1]"),
        (("mnist", "dtd", *ties, "--keep", "x"), "--keep x: not a number"),
        (("mnist", "dtd", *ties, "--kep", "1"), "ties has no hyperparameter 'kep'; allowed are keep"),
        (("mnist", "dtd", *ties, "--keep"), "--keep: not an option with a value"),
        (("mnist", "dtd", *ties, "--rank", "0"), "--rank is 0"),
        (("mnist", "dtd", *ties, "--cutoff", "0.1"), "cutoff is of the space 'knots': --space knots is needed for it"),
        (("mnist/adapter_model.safetensors", "dtd", *ties), "is a file of an adapter: name its folder, "),
        (("mnist", "empty", *ties), "empty: no weights in this folder; looked for"),
        (("mnist", "half", *ties), "half: an adapter's weights without its adapter_config.json"),
        (("mnist", "dtd/none", *ties), "dtd/none: no such file or folder\n"),
        (("tv.safetensors", "tv.safetensors", *ties, "--base", "base"), "--base is of models and adapters"),
        (("tv.safetensors", "tv.safetensors", *ties, "--rank", "2"), "--rank is of a merged adapter"),
        (("--base", "base", "base", "base", *ties, "--rank", "2"), "--rank is of a merged adapter"),
        (("mnist", "alone", *ties, "--any-base"), "no two of the adapters adapt the same layer"),
        (("mnist", "dtd", "--method", "fisher"), "fisher needs statistics"),
        (("mnist", "other", *ties), "adapters of different base models"),
        (("mnist", "w.safetensors", *ties), "of adapters, "),
        (("w.safetensors", "w.safetensors", *ties), "is a full model: --base names the model"),
        (("--base", "w.safetensors", "base", "base", *ties), "weights of another model"),
        (("--base", "base", "other", "other", *ties), "an adapter for another model"),
    ):
        assert run(adapters, *arguments) == 2, arguments
        said = capsys.readouterr().err
        assert message in said, (arguments, said)
        assert said.count("\n") == 1
    assert not (adapters / "out").exists()


def test_any_base_merges_what_names_different_bases_and_says_so(adapters, capsys):
    config = adapters / "dtd" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "some/other"}))
    assert run(adapters, "mnist", "dtd", "--method", "average") == 2
    said = capsys.readouterr().err
    assert "of some/other" in said
    assert "--any-base merges them all the same" in said
    assert run(adapters, "mnist", "dtd", "--method", "average", "--any-base") == 0
    assert "of some/other" in (adapters / "out" / "README.md").read_text()


def test_the_folder_appears_whole_or_not_at_all(adapters, monkeypatch, capsys):
    (adapters / "out").mkdir()
    (adapters / "out" / "mine.txt").write_text("keep me")
    (adapters / "out" / "README.md").write_text("# A merged model\n\nFiles: `mine.txt`.\n")
    assert run(adapters, "mnist", "dtd", "--method", "average") == 2
    assert "out is there already; --force replaces it" in capsys.readouterr().err

    def fail(*_):
        raise OSError(28, "No space left on device", "README.md")

    monkeypatch.setattr("saftnb.merging.files._readme", fail)
    assert run(adapters, "mnist", "dtd", "--method", "average", "--force") == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(path.name for path in (adapters / "out").iterdir()) == ["README.md", "mine.txt"]
    assert not [path for path in adapters.iterdir() if path.name.startswith(".out")]
    monkeypatch.undo()
    assert run(adapters, "mnist", "dtd", "--method", "average", "--force") == 0
    assert not (adapters / "out" / "mine.txt").exists()


def test_force_replaces_the_result_of_a_merge_and_nothing_else(adapters, capsys):
    average = ("mnist", "dtd", "--method", "average", "--force")
    assert run(adapters, *average) == 0
    assert run(adapters, *average) == 0
    (adapters / "notes").mkdir()
    (adapters / "notes" / "mine.txt").write_text("keep me")
    (adapters / "link").symlink_to(adapters / "notes")
    (adapters / "file").write_text("keep me")
    (adapters / "out" / "eval.json").write_text("{}")
    before = {path: path.read_bytes() for path in adapters.rglob("*") if path.is_file()}
    capsys.readouterr()
    given = [str(adapters / name) for name in average[:2]]
    for out, message in (
        ("notes", "notes is no result of a merge (it has no README.md of one): --force does not replace it"),
        ("link", "link is no result of a merge"), ("file", "file is no result of a merge"),
        ("out", "out is no result of a merge (it has 'eval.json', which no merge wrote)"),
        ("mnist", "mnist is, or holds, what is to be merged"), (".", "is, or holds, what is to be merged"),
        ("file/x", "file/x: "),
    ):  # fmt: skip
        assert main(["merge", *given, *average[2:], "-o", str(adapters / out)]) == 2
        said = capsys.readouterr().err
        assert message in said, (out, said)
        assert said.count("\n") == 1
    assert {path: path.read_bytes() for path in adapters.rglob("*") if path.is_file()} == before


def test_what_adapters_say_of_their_kind_of_model_stays_where_all_agree(tmp_path):
    torch.manual_seed(0)
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(tmp_path / "base")
    for name, kind in (("one", "CAUSAL_LM"), ("two", "CAUSAL_LM"), ("three", None)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        adapted(model, tmp_path / name, target_modules=["q_proj"], **({"task_type": kind} if kind else {}))
    assert run(tmp_path, "one", "two", "--method", "average") == 0
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o666 & ~disk._UMASK
    listed = (tmp_path / "out" / "README.md").read_text()
    digest = hashlib.sha256((tmp_path / "one" / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert f"- `one/adapter_model.safetensors`, sha256 {digest}" in listed
    assert run(tmp_path, "one", "three", "--method", "average", "--force") == 0
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["task_type"] is None


def test_adapters_of_gpt2s_turned_layers_merge_and_load_in_peft(tmp_path, capsys):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=20, n_positions=8))
    base.save_pretrained(tmp_path / "base")
    start, weight = base.state_dict(), "transformer.h.0.attn.c_attn.weight"

    def moved(name):
        found = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / name)
        return found.merge_and_unload().state_dict()[weight]

    for seed, name in enumerate(("one", "two")):
        model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        adapted(model, tmp_path / name, seed, target_modules=["c_attn"], fan_in_fan_out=True)
    assert json.loads((tmp_path / "one" / CONFIG).read_text())["fan_in_fan_out"] is True
    assert run(tmp_path, "one", "two", "--method", "task_arithmetic", "--scale", "0.5") == 0
    wanted = start[weight] + 0.5 * sum(moved(name) - start[weight] for name in ("one", "two"))
    torch.testing.assert_close(moved("out"), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.equal(wanted, start[weight])
    assert run(tmp_path, "--base", "base", "one", "two", "--method", "average", "--force") == 2
    assert "fan_in_fan_out is True" in capsys.readouterr().err


def test_the_same_file_twice_is_told(tmp_path, capsys):
    TaskVector({"w": torch.ones(2, 2)}).save(tmp_path / "one.safetensors")
    assert run(tmp_path, "one.safetensors", "one.safetensors", "--method", "task_arithmetic") == 0
    assert "given more than once" in capsys.readouterr().err
    assert TaskVector.load(tmp_path / "out" / "task_vector.safetensors")["w"].eq(2).all()


def test_a_rank_that_cuts_nothing_says_nothing_and_a_dry_run_needs_no_place(adapters, capsys):
    assert run(adapters, "mnist", "dtd", "--method", "average", "--rank", "30") == 0
    assert "cut to rank" not in capsys.readouterr().out
    given = [str(adapters / name) for name in ("mnist", "dtd")]
    assert main(["merge", *given, "--method", "average", "--dry-run"]) == 0
    assert "would write an adapter of rank " in capsys.readouterr().out
    assert main(["merge", "--list", "x"]) == 2


def test_a_rank_and_layers_that_merge_to_nothing(adapters, monkeypatch, capsys):
    monkeypatch.setattr("saftnb.merging.deltas.WHOLE", 4)  # a large layer is not searched for its rank
    words = ("mnist", "dtd", "--method", "ties", "--scale", "0", "--rank", "2")
    assert run(adapters, *words) == 0, capsys.readouterr().err


def test_a_full_disk_is_one_line(adapters):
    words = [sys.executable, "-m", "saftnb", "merge", *(str(adapters / name) for name in ("mnist", "dtd"))]
    command = f"ulimit -f 1; exec {' '.join(words)} --method ties -o {adapters / 'out'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"saftnb: {adapters / 'out'}: File too large"
    assert "Traceback" not in done.stderr
    assert not [path for path in adapters.iterdir() if "out" in path.name]


def test_a_model_with_nan_is_named_and_leaves_nothing(models, capsys):
    state = load_file(models / "two" / "model.safetensors")
    name = next(name for name in state if name.endswith("pre_layrnorm.weight"))
    state[name][3] = torch.nan
    save_file(state, models / "two" / "model.safetensors", metadata={"format": "pt"})
    for method in ("ties", "tsv_m"):
        assert run(models, "--base", "base", "one", "two", "--method", method) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "pre_layrnorm.weight' of" in said
        assert "has NaN or infinite values" in said
        assert not (models / "out").exists()


def test_the_list_names_every_method_and_space(capsys):
    assert main(["merge", "--list"]) == 0
    said = capsys.readouterr().out
    assert "  ties(keep: number in (0, 1], default 0.2; scale: number, default 1.0;" in said
    assert "  knots(cutoff" in said
    assert len(said.splitlines()) == 2 + 10 + 3


def test_a_tensor_file_is_safetensors_and_refuses_what_was_not_announced(tmp_path):
    state = {"b": torch.randn(3, 2).bfloat16(), "a": torch.arange(4), "none": torch.zeros(0, 3)}
    file = TensorFile(tmp_path / "w.safetensors", {name: (v.dtype, v.shape) for name, v in state.items()})
    with file:
        for name, value in state.items():
            file.write(name, value)
    due = {"b": (torch.bfloat16, torch.Size([3, 2]))}
    with pytest.raises(ValueError, match="'b' is due, torch.bfloat16"), TensorFile(tmp_path / "x", due) as other:
        other.write("a", state["a"])
    found = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(found[name], value) for name, value in state.items())
    with pytest.raises(ValueError, match="'b' was never written"), TensorFile(tmp_path / "y", due):
        pass
    with pytest.raises(FileExistsError), new_folder(tmp_path):
        pass


def test_layers_that_one_adapter_lacks_and_heads_are_told(tmp_path, capsys):
    torch.manual_seed(0)
    from transformers import AutoModelForSequenceClassification

    for name, targets in (("rte", ["q_proj"]), ("snli", ["q_proj", "v_proj"])):
        model = AutoModelForSequenceClassification.from_config(LLAMA)
        adapted(model, tmp_path / name, target_modules=targets, task_type="SEQ_CLS")
    assert run(tmp_path, "rte", "snli", "--method", "average") == 0
    said = capsys.readouterr().err
    assert "rte has no 'model.layers.0.self_attn.v_proj.weight' and 1 more" in said
    assert "classification heads stay with their tasks and are not merged: rte, snli" in said
    AutoModel.from_config(LLAMA).save_pretrained(tmp_path / "tower")
    assert run(tmp_path, "--base", "tower", "rte", "snli", "--method", "average", "--force") == 0
    assert all(name.startswith("layers.") for name in load_adapter(tmp_path / "out"))


def test_a_plan_is_checked_and_not_begun(adapters):
    planned = plan([str(adapters / "mnist"), str(adapters / "dtd")], adapters / "out", "ties", values={"keep": 0.5})
    assert planned.values == {"keep": 0.5, "scale": 1.0, "aggregate": "mean"}
    assert not (adapters / "out").exists()


def test_the_plan_of_a_dry_run_is_not_carried_out(adapters):
    planned = plan([str(adapters / "mnist"), str(adapters / "dtd")], None, "ties")
    with pytest.raises(ValueError, match="the plan of a dry run has no folder to write"):
        execute(planned, progress=False)


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_at_the_place_during_the_merge_stays(adapters, monkeypatch, force):
    out = adapters / "out"
    planned = plan([str(adapters / name) for name in ("mnist", "dtd")], out, "average", force=force)

    def slowly(*arguments, **options):
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        return merge(*arguments, **options)

    monkeypatch.setattr("saftnb.merging.files.merge", slowly)
    with pytest.raises(FileExistsError, match="is no result of a merge" if force else "is there already"):
        execute(planned, progress=False)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    assert not list(adapters.glob(".*"))


@pytest.mark.parametrize("where", ["one", "base"])
def test_whole_numbers_in_the_place_of_weights_are_refused(models, capsys, where):
    file = models / where / "model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("fc1.weight"))
    save_file(state | {name: (100 * state[name]).to(torch.int8)}, file)
    assert run(models, "one", "two", "--base", "base", "--method", "average") == 2
    assert f"{name!r} is torch." in capsys.readouterr().err
    assert not (models / "out").exists()


def test_models_in_float8_are_merged(models, capsys):
    for name in ("base", "one", "two"):
        file = models / name / "model.safetensors"
        save_file({key: value.to(torch.float8_e4m3fn) for key, value in load_file(file).items()}, file)
    assert run(models, "one", "two", "--base", "base", "--method", "average") == 0
    states = [load_file(models / name / "model.safetensors") for name in ("base", "one", "two", "out")]
    for key, (base, one, two, merged) in {key: [state[key].float() for state in states] for key in states[0]}.items():
        wanted = (base + ((one - base) + (two - base)) * 0.5).to(torch.float8_e4m3fn).float()
        assert torch.equal(merged, wanted), key


def test_a_link_that_leads_to_itself_and_a_user_who_is_not_there_are_one_line(adapters, capsys):
    (adapters / "loop").symlink_to("loop")
    for out in (adapters / "loop", adapters / "loop" / "x"):
        assert (
            main(["merge", str(adapters / "mnist"), str(adapters / "dtd"), "--method", "average", "-o", str(out)]) == 2
        )
    assert main(["merge", "~nobody-at-all/x", "y", "--method", "average", "-o", "z"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "saftnb: ~nobody-at-all/x: no such file or folder"
