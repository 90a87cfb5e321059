"""`nli6`: KnOTS's six tasks of sentence pairs, from the Hugging Face hub's parquet files.

    <data root>/nli6/<task>/<config>/<split>/*.parquet    (as the hub has them at the revision refs/convert/parquet)

Labels are 0 entailment, 1 neutral, 2 contradiction. QNLI and RTE have two classes, of which the second becomes
"contradiction"; SciTail has no contradiction (KnOTS, arXiv 2410.19735; its data ids, label maps and splits).
"""

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
        carved: the share of the hub's validation split that is our validation, the rest being our test; None where the
            hub has both. last: whether it is the split's end, else a permutation's begin.
    """

    hub: str
    config: str
    columns: tuple[str, str]
    labels: Mapping[int | str, int]
    carved: float | None = None
    last: bool = False


_ALL = {0: 0, 1: 1, 2: 2}
_TWO = {0: 0, 1: 2}
PAIR_SOURCES = {
    "snli": PairSource("stanfordnlp/snli", "plain_text", ("premise", "hypothesis"), _ALL),
    "mnli": PairSource("SetFit/mnli", "default", ("text1", "text2"), _ALL, 0.2, last=True),
    "sick": PairSource("sick", "default", ("sentence_A", "sentence_B"), _ALL),
    "qnli": PairSource("SetFit/qnli", "default", ("text1", "text2"), _TWO, 0.2),
    "rte": PairSource("SetFit/rte", "default", ("text1", "text2"), _TWO, 0.5),
    "scitail": PairSource(
        "allenai/scitail", "tsv_format", ("premise", "hypothesis"), {"entails": 0, "neutral": 1, 0: 0, 1: 1}
    ),
}  # fmt: skip
NLI6_BACKBONE = "meta-llama/Meta-Llama-3-8B"


def nli_folder() -> Path:
    return data_root() / "nli6"


def nli_files(task: str, split: str) -> list[Path]:
    """The parquet files of one of the hub's splits, in order."""
    return sorted((nli_folder() / task / PAIR_SOURCES[task].config / split).glob("*.parquet"))


def hub_splits(task: str) -> tuple[str, ...]:
    return ("train", "validation") if PAIR_SOURCES[task].carved else ("train", "validation", "test")


def nli_fault(task: str) -> str | None:
    """What is wrong with a task's files, in one line; None if they are there with their columns. Reads footers only."""
    import pyarrow.lib
    import pyarrow.parquet

    wanted = {*PAIR_SOURCES[task].columns, "label"}
    for split in hub_splits(task):
        found = nli_files(task, split)
        if not found:
            return f"no {split} files"
        for file in found:
            try:
                names = set(pyarrow.parquet.read_schema(file).names)
            except (OSError, pyarrow.lib.ArrowException):
                return f"{file.name} of {split} cannot be read"
            if wanted - names:
                return f"{file.name} of {split} lacks the column {sorted(wanted - names)[0]!r}"
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
        ValueError: a label that the task's map does not have.
    """
    source = PAIR_SOURCES[name]
    rows = {split: _rows(name, split) for split in hub_splits(name)}
    if source.carved:
        every = rows.pop("validation")
        count = round(source.carved * len(every))
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
        for premise, hypothesis, label in zip(*(table[c].to_pylist() for c in (*source.columns, "label")), strict=True):
            if label == -1:
                continue
            if label not in source.labels:
                known = ", ".join(map(repr, source.labels))
                raise ValueError(f"nli6, {name}: {split} has the label {label!r}; the map knows {known}")
            found.append((premise.strip(), hypothesis.strip(), source.labels[label]))
    return found
