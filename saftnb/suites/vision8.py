"""`vision8`: the eight image tasks of the papers, from the Hugging Face hub's parquet files.

    <data root>/vision8/<task>/…/train-*.parquet  test-*.parquet   (as the hub has them: a local copy will do)
    <data root>/vision8/sizes.json                optional: {task: {"train": n, "test": n}} of a folder with other data
    <data root>/vision8/.decoded, .arrow, .heads  what is made from them

Class names and prompt templates are those of CLIP's zero-shot heads (`vision8_prompts.json`).
"""

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saftnb import disk
from saftnb.paths import data_root
from saftnb.suites.stored import StoredSplit
from saftnb.suites.task import Task
from saftnb.task_vector import save_tensors

PARTS = ("train", "test")
SPLITS = ("saft", "knots")


@dataclass(frozen=True)
class Source:
    """A data set on the hub: its id, how many pictures its parts have, the folder of its configuration, and how many
    pixels one of them has for training, its shorter side at most 288 (about, where they differ)."""

    hub: str
    train: int
    test: int
    folder: str = "data"
    pixels: int = 288 * 384  # photos of 4:3


SOURCES = {
    "cars": Source("tanganke/stanford_cars", 8144, 8041),
    "dtd": Source("tanganke/dtd", 3760, 1880),
    "eurosat": Source("tanganke/eurosat", 21_600, 2700, pixels=64**2),
    "gtsrb": Source("tanganke/gtsrb", 26_640, 12_630, pixels=50**2),
    "mnist": Source("ylecun/mnist", 60_000, 10_000, "mnist", 28**2),
    "resisc45": Source("tanganke/resisc45", 18_900, 6300, pixels=256**2),
    "sun397": Source("tanganke/sun397", 19_850, 19_850),
    "svhn": Source("ufldl-stanford/svhn", 73_257, 26_032, "cropped_digits", 32**2),
}
# KnOTS validates on the first fifth of a permutation of test here. For the other three it uses validation splits that
# the hub's copies lack: there a tenth of train stands in, as for SAFT.
KNOTS_FROM_TEST = ("cars", "gtsrb", "mnist", "sun397", "svhn")
_MEND = "`saftnb fetch vision8` brings what is missing"


def folder() -> Path:
    return data_root() / "vision8"


def sizes(task: str) -> dict[str, int]:
    """Pictures that train and test must have: the published numbers, or those of the folder's `sizes.json`."""
    own = folder() / "sizes.json"
    if own.is_file():
        stated = json.loads(own.read_text())
        if task not in stated:
            raise ValueError(f"{own.name} states no sizes for {task!r}")
        return stated[task]
    return {"train": SOURCES[task].train, "test": SOURCES[task].test}


def files(task: str, part: str) -> list[Path]:
    """The parquet files of a part, in order."""
    return sorted((folder() / task / SOURCES[task].folder).glob(f"{part}-*.parquet"))


def fault(task: str) -> str | None:
    """What is wrong with a task's files, in one line; None if they are whole. Reads their footers only."""
    import pyarrow.lib
    import pyarrow.parquet

    for part in PARTS:
        found = files(task, part)
        if not found:
            return f"no {part}-*.parquet in vision8/{task}/{SOURCES[task].folder}"
        count = 0
        for file in found:
            try:
                count += pyarrow.parquet.read_metadata(file).num_rows
            except (pyarrow.lib.ArrowInvalid, OSError):
                return f"{file.name} is not a whole parquet file"
        if count != sizes(task)[part]:
            return f"{part} has {count:,} pictures, not {sizes(task)[part]:,}"
    return None


def require_whole(tasks: tuple[str, ...] = tuple(SOURCES)) -> None:
    """Raises FileNotFoundError, in one line, unless the files of all tasks are whole."""
    faults = {task: found for task in tasks if (found := fault(task))}
    if faults:
        first, why = next(iter(faults.items()))
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise FileNotFoundError(f"vision8: {first}: {why}{more}; {_MEND}")


def prompts(task: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Class names and prompt templates."""
    entry = _prompts()[task]
    return tuple(entry["classes"]), tuple(entry["templates"])


@cache
def _prompts() -> dict[str, dict[str, list[str]]]:
    return json.loads(Path(__file__).with_name("vision8_prompts.json").read_text())


def vision8_task(name: str, size: int, splits: str = "saft", deal: int = 0) -> Task:
    """A task with its pictures on disk, at `size` pixels a side.

    Args:
        splits: "saft": validation is a tenth of train, at most 5,000 pictures. "knots": validation is the first fifth
            of a permutation of test, which is then evaluated on the other four, for the tasks in `KNOTS_FROM_TEST`.
        deal: seed of the permutations; 0 is the standard one.

    Raises:
        FileNotFoundError: files are missing or not whole.
        ValueError: unknown splits; or the data set names its classes in another order than our prompts.
    """
    if splits not in SPLITS:
        raise ValueError(f"splits is one of {', '.join(SPLITS)}, not {splits!r}")
    require_whole((name,))
    class_names, templates = prompts(name)
    tables = {part: _table(name, part) for part in PARTS}
    for table in tables.values():
        check_label_order(name, class_names, getattr(table.features["label"], "names", None))
    rows = divide_rows(name, len(tables["train"]), len(tables["test"]), splits, deal)
    identity = {part: identify(files(name, part)) for part in PARTS}
    parts = {
        kind: StoredSplit(
            tables[part], chosen, size, folder() / ".decoded", identity=identity[part], name=f"{name}-{kind}"
        )
        for kind, (part, chosen) in rows.items()
    }
    return Task(name, "real", class_names, templates, **parts)


def kept_head(task: str, asked: str, make: Callable[[], Tensor]) -> Tensor:
    """The zero-shot head (classes, embedding) that `make` makes: a text tower does it once, later processes read it.
    `asked` says what decides it."""
    file = folder() / ".heads" / f"{task}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.safetensors"
    if file.is_file():
        try:
            return load_file(file)["head"]
        except (SafetensorError, KeyError):
            pass  # it is made anew
    head = make()
    with suppress(OSError):  # a data folder that cannot be written will do
        file.parent.mkdir(parents=True, exist_ok=True)
        with disk.whole_file(file, alone=True) as part:
            save_tensors({"head": head.contiguous()}, part)
    return head


def divide_rows(name: str, train: int, test: int, splits: str, deal: int) -> dict[str, tuple[str, Tensor]]:
    """Split -> which part of the data set it comes from, and which rows of it.

    All in a random order, the same each time: the hub's own may go class by class, and analyses take the first rows.
    """

    def permutation(size: int, seed: int = deal) -> Tensor:
        return torch.randperm(size, generator=torch.Generator().manual_seed(seed))

    if splits == "knots" and name in KNOTS_FROM_TEST:
        order, held = permutation(test), test // 5
        return {
            "train": ("train", permutation(train)),
            "validation": ("test", order[:held]),
            "test": ("test", order[held:]),
        }
    order, held = permutation(train), min(max(train // 10, 1), 5000)
    return {
        "train": ("train", order[: train - held]),
        "validation": ("train", order[train - held :]),
        "test": ("test", permutation(test, 0)),
    }


def check_label_order(task: str, ours: tuple[str, ...], theirs: list[str] | None) -> None:
    """Raises ValueError where a data set's own class names say another order than ours.

    Spelling may differ ("AnnualCrop", "annual crop land"): no name of ours may share more words with one of theirs than
    ours of the same number does. A data set without names, or with bare numbers for names, says nothing, nor does a
    name that shares no word with any of ours.
    """
    if theirs is None or (all(name.isdigit() for name in theirs) and not all(name.isdigit() for name in ours)):
        return
    if len(theirs) != len(ours):
        raise ValueError(f"{task}: the data set has {len(theirs)} classes, our prompts {len(ours)}")
    known = [_words(name) for name in ours]
    for number, name in enumerate(theirs):
        words = _words(name)
        if words == known[number]:
            continue
        shared = [len(words & other) / max(1, min(len(words), len(other))) for other in known]
        if shared[number] < max(shared):
            likely = ours[shared.index(max(shared))]
            raise ValueError(
                f"{task}: class {number} is {name!r} in the data set and {ours[number]!r} here, not {likely!r}"
            )


def _words(name: str) -> set[str]:
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return set(re.findall(r"[0-9a-z]+", apart.lower())) - {"or", "and", "of", "the", "a"}


def identify(parquet: list[Path]) -> str:
    """A hash of the files' contents. It is remembered beside them, with their sizes and times, since they are large."""
    known_file = parquet[0].parent / ".sha256.json"
    known = json.loads(known_file.read_text()) if known_file.is_file() else {}
    fresh = {}
    for file in parquet:
        stat = file.stat()
        key = f"{file.name} {stat.st_size} {stat.st_mtime_ns}"
        fresh[key] = known.get(key) or _sha256(file)
    if not fresh.items() <= known.items():
        kept = {key: value for key, value in known.items() if key.split()[0] not in {file.name for file in parquet}}
        with disk.whole_file(known_file) as part:
            part.write_text(json.dumps(kept | fresh, indent=1) + "\n")
    return hashlib.sha256("\n".join(fresh.values()).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _table(task: str, part: str):
    """The part as a Hugging Face `Dataset`, memory-mapped."""
    import datasets

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(
            "parquet", data_files=[str(file) for file in files(task, part)], split="train",
            cache_dir=str(folder() / ".arrow"),
        )  # fmt: skip
    finally:
        if bars:
            datasets.enable_progress_bars()
    wrong = [name for name in ("image", "label") if name not in table.features]
    if wrong or not isinstance(table.features["image"], datasets.Image):
        raise ValueError(f"vision8: {task}: {part} needs a column 'image' of pictures and a column 'label'")
    return table
