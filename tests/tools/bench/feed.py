"""Training pictures a second from JPEGs of 1024 × 768: decoded at every step, and decoded once and cropped from there.

python tests/tools/bench/feed.py
"""

import io
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from saftnb.finetune import recipe
from saftnb.finetune.train import _Batches
from saftnb.suites import stored
from saftnb.suites.stored import StoredSplit

PICTURES, BATCH, PROCESSES = 256, 64, 2


def jpeg(seed: int) -> bytes:
    """A smooth picture with some noise: about as large as a photo of this size."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((1024, 768), Image.BICUBIC)
    noisy = np.clip(np.asarray(coarse, dtype=np.int16) + draw.normal(0, 6, (768, 1024, 1)), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(noisy).save(out, "JPEG", quality=90)
    return out.getvalue()


def pictures_a_second(split: StoredSplit, batches: int) -> float:
    """As a training draws them, by so many processes; the first batches warm them up."""
    plan = recipe("sgd", "vision8", batch_size=BATCH, steps=batches + 8, warmup=0)
    loader = iter(DataLoader(_Batches(split, plan, 0, 0), batch_size=None, num_workers=PROCESSES, prefetch_factor=4))
    for _ in range(8):
        next(loader)
    start = time.perf_counter()
    found = sum(len(labels) for _, labels in loader)
    return found / (time.perf_counter() - start)


def main() -> None:
    import datasets

    files = [jpeg(seed) for seed in range(PICTURES)]
    table = datasets.Dataset.from_dict({"image": [{"bytes": file} for file in files], "label": [0] * PICTURES})
    table = table.cast_column("image", datasets.Image())
    with tempfile.TemporaryDirectory() as folder:
        split = StoredSplit(table, torch.arange(PICTURES), 224, Path(folder), identity="bench", name="bench")
        before = pictures_a_second(split, 8)
        start = time.perf_counter()
        split.prepare(0.9, 10**9)
        took, size = time.perf_counter() - start, split.training_file.stat().st_size
        after = pictures_a_second(split, 200)
    each = np.mean([len(file) for file in files]) / 1e3
    print(f"{PICTURES} JPEGs of 1024 × 768, {each:.0f} kB each; {PROCESSES} processes")
    print(f"decoded at every step: {before:.0f} pictures a second")
    print(
        f"decoded once to a shorter side of {stored.SHORTER}: {after:.0f} pictures a second, {after / before:.1f} times"
    )
    print(f"decoding once: {PICTURES / took:.0f} pictures a second, {size / PICTURES / 1e3:.0f} kB each on disk")


if __name__ == "__main__":
    main()
