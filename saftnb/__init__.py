"""The front door: `import saftnb as sn` holds what most notebooks use, each loaded when it is first asked for.

    suite = sn.load_suite("pocket")                           # tasks, and the model that learns them
    experts = sn.task_vectors(suite, "sgd", seed=0)           # {"mnist": τ, …}: trained once, then loaded
    merged = sn.merge(experts, "ties", keep=0.1, scale=0.5)   # one task vector for all tasks
    sn.accuracy(suite, merged)                                # of θ0 + merged, task by task

Everything stays where it is in the rooms of the library, such as `saftnb.merging.merge`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `_DOORS` once more, for type checkers: they do not run `__getattr__`
    from saftnb import plots as plots
    from saftnb import reference as reference
    from saftnb.analysis import compare as compare
    from saftnb.batch import record as record
    from saftnb.evaluate import suite_accuracy
    from saftnb.finetune import TaskVectors as TaskVectors
    from saftnb.finetune import finetune as finetune
    from saftnb.finetune import plans as plans
    from saftnb.finetune import recipe as recipe
    from saftnb.finetune import task_vectors as task_vectors
    from saftnb.formats import task_vector as task_vector
    from saftnb.merging import merge as merge
    from saftnb.merging.grid_search import search as search
    from saftnb.merging.learning import learn as learn
    from saftnb.merging.statistics import suite_statistics
    from saftnb.scores import differences as differences
    from saftnb.scores import score_table as score_table
    from saftnb.scores import spread as spread
    from saftnb.suites import load_suite as load_suite

    accuracy, statistics = suite_accuracy, suite_statistics

__version__ = "0.1.0"
# name -> its room, and what it is called there where that differs; "" is the room itself
_DOORS = {
    "load_suite": ("saftnb.suites", "load_suite"),
    "plans": ("saftnb.finetune", "plans"),
    "recipe": ("saftnb.finetune", "recipe"),
    "finetune": ("saftnb.finetune", ""),  # a room that can be called
    "task_vector": ("saftnb.task_vector", ""),  # as well
    "task_vectors": ("saftnb.finetune", "task_vectors"),
    "merge": ("saftnb.merging", "merge"),
    "learn": ("saftnb.merging.learning", "learn"),
    "search": ("saftnb.merging.grid_search", "search"),
    "accuracy": ("saftnb.evaluate", "suite_accuracy"),
    "statistics": ("saftnb.merging.statistics", "suite_statistics"),
    "TaskVectors": ("saftnb.finetune", "TaskVectors"),
    "compare": ("saftnb.analysis", "compare"),
    "score_table": ("saftnb.scores", "score_table"),
    "spread": ("saftnb.scores", "spread"),
    "differences": ("saftnb.scores", "differences"),
    "plots": ("saftnb.plots", ""),
    "reference": ("saftnb.reference", ""),
    "record": ("saftnb.batch", "record"),
}
__all__ = ["__version__", *_DOORS]


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module 'saftnb' has no attribute {name!r}")
    room, there = _DOORS[name]
    try:
        found = import_module(room)
        globals()[name] = getattr(found, there) if there else found
    except ModuleNotFoundError as error:
        from saftnb.extras import missing

        raise ModuleNotFoundError(f"sn.{name}: {missing(error)}", name=error.name) from error
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(__all__)
