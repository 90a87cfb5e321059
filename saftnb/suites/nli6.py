"""`nli6`: KnOTS's six tasks of sentence pairs, from the Hugging Face hub's parquet files.

    <data root>/nli6/<task>/<config>/<split>/*.parquet    (as the hub has them at the revision refs/convert/parquet)
    <data root>/nli6/sizes.json                           optional: {task: {split: pairs}} of a folder with other data

Labels are 0 entailment, 1 neutral, 2 contradiction. QNLI and RTE have two classes, of which the second becomes
"contradiction"; SciTail has no contradiction (KnOTS, arXiv 2410.19735; its data ids, label maps and splits). Unlike
KnOTS we keep a pair that stands twice once, and cut pairs to 256 tokens unless told otherwise (KnOTS: 1,000 or 2,000).
SciTail's configuration `tsv_format`, which KnOTS names, has 23,097 training pairs; `snli_format` has 23,596.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from saftnb.backbones import SequenceBackbone
from saftnb.paths import data_root
from saftnb.suites.pairs import PairSplit, PairTask

REVISION = "refs/convert/parquet"
SEED = 42  # of the permutation that deals a validation split into validation and test


@dataclass(frozen=True)
class PairSource:
    """A data set on the hub.

    Attributes:
        columns: of premise and hypothesis. labels: the data's label -> ours; pairs with another one stop the loading,
            those with −1 (no agreement of annotators) are left out.
        sizes: pairs of the hub's splits. older: an id that the data set had before.
        carved: the share of the hub's validation split that is our validation, rounded up, the rest being our test;
            None where the hub has both. last: whether it is the split's end, else a permutation's begin.
    """

    hub: str
    config: str
    columns: tuple[str, str]
    labels: Mapping[int, int] | Mapping[int | str, int]
    sizes: tuple[int, ...]
    older: str = ""
    carved: float | None = None
    last: bool = False


_ALL = {0: 0, 1: 1, 2: 2}
_TWO = {0: 0, 1: 2}
_SENTENCES, _TEXTS = ("sentence_A", "sentence_B"), ("text1", "text2")
_PAIR = ("premise", "hypothesis")
_SCITAIL = {"entails": 0, "neutral": 1, 0: 0, 1: 1}
PAIR_SOURCES = {
    "snli": PairSource("stanfordnlp/snli", "plain_text", _PAIR, _ALL, (550_152, 10_000, 10_000)),
    "mnli": PairSource("SetFit/mnli", "default", _TEXTS, _ALL, (392_702, 9815), carved=0.2, last=True),
    "sick": PairSource("RobZamp/sick", "default", _SENTENCES, _ALL, (4439, 495, 4906), older="sick"),
    "qnli": PairSource("SetFit/qnli", "default", _TEXTS, _TWO, (104_743, 5463), carved=0.2),
    "rte": PairSource("SetFit/rte", "default", _TEXTS, _TWO, (2490, 277), carved=0.5),
    "scitail": PairSource("allenai/scitail", "tsv_format", _PAIR, _SCITAIL, (23_097, 1304, 2126)),
}
NLI6_BACKBONE = "meta-llama/Meta-Llama-3-8B"


def nli_folder() -> Path:
    return data_root() / "nli6"


def nli_files(task: str, split: str) -> list[Path]:
    """The parquet files of one of the hub's splits, in order."""
    return sorted((nli_folder() / task / PAIR_SOURCES[task].config / split).glob("*.parquet"))


def hub_splits(task: str) -> tuple[str, ...]:
    return ("train", "validation") if PAIR_SOURCES[task].carved else ("train", "validation", "test")


def nli_sizes(task: str) -> dict[str, int]:
    """Pairs that the hub's splits must have: the published numbers, or those of the folder's `sizes.json`."""
    own = nli_folder() / "sizes.json"
    stated = json.loads(own.read_text()) if own.is_file() else {}
    return stated.get(task) or dict(zip(hub_splits(task), PAIR_SOURCES[task].sizes, strict=True))


def nli_fault(task: str) -> str | None:
    """What is wrong with a task's files, in one line; None if they are whole. Reads their footers only."""
    import pyarrow.lib
    import pyarrow.parquet

    wanted = {*PAIR_SOURCES[task].columns, "label"}
    for split in hub_splits(task):
        found = nli_files(task, split)
        if not found:
            return f"no {split} files"
        count = 0
        for file in found:
            try:
                footer = pyarrow.parquet.read_metadata(file)
            except (OSError, pyarrow.lib.ArrowException):
                return f"{file.name} of {split} cannot be read"
            missing = wanted - set(footer.schema.to_arrow_schema().names)
            if missing:
                return f"{file.name} of {split} lacks the column {sorted(missing)[0]!r}"
            count += footer.num_rows
        if count != nli_sizes(task)[split]:
            return f"{split} has {count:,} pairs, not {nli_sizes(task)[split]:,}"
    return None


def require_nli() -> None:
    """Raises FileNotFoundError, naming the first fault, unless all six tasks are here."""
    for task in PAIR_SOURCES:
        why = nli_fault(task)
        if why is not None:
            raise FileNotFoundError(f"nli6, {task}: {why}; `saftnb fetch nli6` brings what is missing")


def nli6_task(name: str, backbone: SequenceBackbone) -> PairTask:
    """One of `PAIR_SOURCES`. A pair that stands twice is kept once, in test before validation before train.

    Raises:
        ValueError: a label that the task's map does not have, or a sentence that is no text.
    """
    source = PAIR_SOURCES[name]
    rows = {split: _rows(name, split) for split in hub_splits(name)}
    if source.carved:
        every = rows.pop("validation")
        count = math.ceil(source.carved * len(every) - 1e-9)
        if source.last:
            rows["test"], rows["validation"] = every[: len(every) - count], every[len(every) - count :]
        else:
            order = np.random.default_rng(SEED).permutation(len(every))
            rows["validation"], rows["test"] = ([every[i] for i in some] for some in (order[:count], order[count:]))
    seen: set[tuple[str, str]] = set()
    splits = {}
    for part in ("test", "validation", "train"):
        own = {(premise, hypothesis): label for premise, hypothesis, label in reversed(rows[part])}
        kept = [(*pair, own[pair]) for pair in reversed(own) if pair not in seen]
        seen |= own.keys()
        premises, hypotheses, labels = zip(*kept, strict=True) if kept else ((), (), ())
        splits[part] = PairSplit(premises, hypotheses, torch.tensor(labels, dtype=torch.int64), backbone.tokenize)
    allowed = tuple(sorted(set(source.labels.values())))
    return PairTask(name, "real", allowed, splits["train"], splits["validation"], splits["test"])


def _rows(name: str, split: str) -> list[tuple[str, str, int]]:
    import pyarrow.parquet

    source = PAIR_SOURCES[name]
    found = []
    for file in nli_files(name, split):
        table = pyarrow.parquet.read_table(file, columns=[*source.columns, "label"])
        columns = (table[column].to_pylist() for column in (*source.columns, "label"))
        for row, (premise, hypothesis, label) in enumerate(zip(*columns, strict=True)):
            if label == -1:
                continue
            where = f"row {row} of {file.name}"
            if label not in source.labels:
                known = ", ".join(map(repr, source.labels))
                raise ValueError(f"nli6, {name}: {split} has the label {label!r}; the map knows {known} ({where})")
            for column, text in zip(source.columns, (premise, hypothesis), strict=True):
                if not isinstance(text, str):
                    raise ValueError(f"nli6, {name}: {split} has {text!r} for {column}, which is no text ({where})")
            found.append((premise.strip(), hypothesis.strip(), source.labels[label]))
    return found
