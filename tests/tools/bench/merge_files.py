"""`saftnb merge`: seconds and peak memory, mapped files included.

On six adapters of Llama-3-8B's shapes (rank 16 on q, k, v, o of 32 layers), and on two whole models. Then PEFT and we
do the same, the sum of six adapters of ViT-B/32's shapes: how far the results are apart, and both times.

    python tests/tools/bench/merge_files.py
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
LAYERS, RANK, TASKS = 32, 16, 6
TENSORS, SIDE = 24, 4096  # of the whole models: 1.6 GB each in float32


def write_adapter(folder: Path, seed: int) -> None:
    """An adapter with random factors in PEFT's format."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for layer in range(LAYERS):
        for name, (out, into) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj"
            state[f"{key}.lora_A.weight"] = torch.randn(RANK, into, generator=generator) / 64
            state[f"{key}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) / 64
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [f"{n}_proj" for n in SHAPES]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_model(file: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    save_file({f"layer{n}.weight": torch.randn(SIDE, SIDE, generator=generator) for n in range(TENSORS)}, file)


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds, and the largest resident memory in GiB of the process."""
    code = f"import subprocess, resource, sys; done = subprocess.run({command!r}, capture_output=True, text=True); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr); "
    code += "print(done.stderr[-500:]) if done.returncode else None; sys.exit(done.returncode)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seconds = time.monotonic() - start
    if done.returncode:
        sys.exit(done.stdout)
    return seconds, int(done.stderr.split()[-1]) / 2**20


def beside_peft(folder: Path) -> None:
    """λ Σ B A of six adapters on a tower of 48 layers, by PEFT ("cat") and by us, from files to a merged adapter."""
    import peft
    from torch import nn

    from saftnb.formats import load_adapters
    from saftnb.merging import merge

    tower = nn.Sequential(*(nn.Linear(768, 768) for _ in range(48)))
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[str(i) for i in range(48)])
    for task in range(TASKS):
        adapted = peft.get_peft_model(tower, config)
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p, std=0.02)
        adapted.save_pretrained(folder / f"small{task}")
        tower = adapted.unload()
    places, names = [folder / f"small{task}" for task in range(TASKS)], [f"small{task}" for task in range(TASKS)]
    start = time.monotonic()
    theirs = peft.PeftModel.from_pretrained(tower, places[0], adapter_name=names[0])
    for place, name in zip(places[1:], names[1:], strict=True):
        theirs.load_adapter(place, adapter_name=name)
    theirs.add_weighted_adapter(names, [0.3] * TASKS, "sum", combination_type="cat")
    theirs.save_pretrained(folder / "theirs", selected_adapters=["sum"])
    middle = time.monotonic()
    merge(load_adapters(places), "task_arithmetic", scale=0.3).to_adapter(folder / "ours")
    end = time.monotonic()
    one, other = load_adapters([folder / "theirs" / "sum", folder / "ours"]).values()
    gap = (one.dense() - other.dense()).norm() / one.dense().norm()
    print(f"six adapters of 48 layers, PEFT {middle - start:.2f} s, saftnb {end - middle:.2f} s, apart by {gap:.1e}")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task in range(TASKS):
            write_adapter(folder / f"task{task}", task)
        nothing, base = measured([sys.executable, "-c", "import saftnb.merging.files"])
        print(f"starting Python with torch: {nothing:.1f} s, {base:.2f} GiB")
        adapters = [str(folder / f"task{task}") for task in range(TASKS)]
        for label, options in (
            ("ties in knots", ["--method", "ties", "--space", "knots", "--keep", "0.2", "--scale", "0.6"]),
            ("task arithmetic", ["--method", "task_arithmetic", "--scale", "0.3"]),
            ("tsv_m", ["--method", "tsv_m"]),
        ):
            given = [*adapters, *options, "--force", "-o", str(folder / "out")]
            seconds, peak = measured([sys.executable, "-m", "saftnb", "merge", *given])
            print(f"saftnb merge, adapters, {label}: {seconds:.1f} s, {peak:.2f} GiB at most")
        for name in ("base", "one", "two"):
            write_model(folder / f"{name}.safetensors", len(name))
        models = [str(folder / f"{name}.safetensors") for name in ("one", "two")]
        for method in ("task_arithmetic", "ties"):
            given = ["--base", str(folder / "base.safetensors"), *models, "--method", method, "--force"]
            seconds, peak = measured([sys.executable, "-m", "saftnb", "merge", *given, "-o", str(folder / "out")])
            size = f"{TENSORS * SIDE**2 * 4 / 1e9:.1f} GB"
            print(f"saftnb merge, two models of {size}, {method}: {seconds:.1f} s, {peak:.2f} GiB at most")
        beside_peft(folder)


if __name__ == "__main__":
    main()
    print(f"this process itself: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
