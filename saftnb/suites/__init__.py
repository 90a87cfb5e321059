"""What is learned: a suite is a backbone and its tasks."""

from saftnb.suites.grammar import LABELS
from saftnb.suites.joint import JointLabels, joint_head, joint_labels
from saftnb.suites.pairs import PairSplit, PairSuite, PairTask
from saftnb.suites.sources import MissingSource, fetch
from saftnb.suites.suite import AnySplit, AnySuite, Suite, conditions, load_suite
from saftnb.suites.task import Split, Task

__all__ = [
    "LABELS", "AnySplit", "AnySuite", "JointLabels", "MissingSource", "PairSplit", "PairSuite", "PairTask", "Split",
    "Suite", "Task", "conditions", "fetch", "joint_head", "joint_labels", "load_suite",
]  # fmt: skip
