"""The joint task: all of a suite's pictures, one classifier over the union of all labels (KnOTS, arXiv 2410.19735)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saftnb.suites.suite import Suite


@dataclass(frozen=True, eq=False)
class JointLabels:
    """The union of some tasks' labels.

    Attributes:
        names: one a label. templates: its prompt templates, those of all tasks that have it.
        index: task -> for each of its classes the label that it is, int64 (classes,).
    """

    names: tuple[str, ...]
    templates: tuple[tuple[str, ...], ...]
    index: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.names)


def joint_labels(
    suite: Suite, protocol: Literal["released", "unique"] = "unique", tasks: Sequence[str] = ()
) -> JointLabels:
    """The labels of the joint task, in the order of the tasks.

    "released" is the list of KnOTS's code: tasks with the same classes (the digits of MNIST and SVHN) share them, but
    a name that other tasks repeat (forest, river, …) stays a label for each, so that naming the other copy is wrong.
    "unique": every name is one label. A shared label takes the templates of all its tasks.

    Args:
        tasks: those of the suite to join; () is all of them.

    Raises:
        ValueError: unknown protocol.
    """
    if protocol not in ("released", "unique"):
        raise ValueError(f"protocol is released or unique, not {protocol!r}")
    chosen = [suite.tasks[name] for name in tasks or suite.tasks]
    places: dict[tuple[object, ...], int] = {}
    names: list[str] = []
    templates: list[dict[str, None]] = []
    index = {}
    for task in chosen:
        found = []
        for name in task.class_names:
            key = (name,) if protocol == "unique" else (name, task.class_names)
            if key not in places:
                places[key] = len(names)
                names.append(name)
                templates.append({})
            templates[places[key]].update(dict.fromkeys(task.prompts))
            found.append(places[key])
        index[task.name] = torch.tensor(found)
    return JointLabels(tuple(names), tuple(tuple(some) for some in templates), index)


def joint_head(suite: Suite, labels: JointLabels) -> Tensor:
    """The frozen zero-shot head over the joint labels, (labels, embedding)."""
    rows = [
        suite.backbone.zero_shot_head([name], prompts)[0]
        for name, prompts in zip(labels.names, labels.templates, strict=True)
    ]
    return torch.stack(rows)
