"""`pocket-nli`: the grammar's six tasks, offline. Synthetic pairs, a real encoder (see `saftnb.suites.grammar`)."""

import torch

from saftnb.backbones import SequenceBackbone
from saftnb.suites.grammar import PARTS, PHENOMENA, pairs
from saftnb.suites.pairs import PairSplit, PairTask

SIZES = {"train": 2400, "validation": 240, "test": 480}
THIMBLE_SIZES = {"train": 96, "validation": 24, "test": 24}
POCKET_NLI_TASKS = tuple(PHENOMENA)
THIMBLE_NLI_TASKS = ("coordination", "kinds")  # one with three classes, one with two


def pocket_nli_task(name: str, backbone: SequenceBackbone, sizes: dict[str, int] = SIZES) -> PairTask:
    """One of `POCKET_NLI_TASKS`, the same pairs at every call."""

    def split(part: str) -> PairSplit:
        premises, hypotheses, labels = zip(*pairs(name, part, sizes[part]), strict=True)
        return PairSplit(premises, hypotheses, torch.tensor(labels), backbone.tokenize)

    return PairTask(name, "generated", PHENOMENA[name].allowed, *map(split, PARTS))
