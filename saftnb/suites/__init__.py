"""What is learned: a suite is a backbone and its tasks."""

from saftnb.suites.sources import MissingSource, fetch
from saftnb.suites.suite import Suite, load_suite
from saftnb.suites.task import Split, Task

__all__ = ["MissingSource", "Split", "Suite", "Task", "fetch", "load_suite"]
