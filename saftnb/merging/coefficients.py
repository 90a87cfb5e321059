"""What is learned when merging is learned: θ(c) = θ0 + Σt c_t ∘ τ_t, with the coefficients c or all weights as values.

`c_t ∘ τ_t` multiplies each block of a task vector by its own coefficient. `by` says what a block is:

    "task"       the whole task vector: a number a task
    "parameter"  a parameter tensor ("layer-wise" in AdaMerging, arXiv 2310.02575)
    "channel"    a slice of a parameter along its first axis, for a linear layer's weight (O, I) an output channel;
                 a 1-D parameter is one block
    "weights"    no coefficients: every entry of Σt τt / n itself is learned; the control

A gradient with respect to c is a sum of the weights' own, ∂L/∂c[p, t, block] = ⟨∂L/∂θ[p], τt[p]⟩ over the block, so a
model and its gradient are all that learning needs beside the task vectors.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from saftnb.backbones.sequence import SequenceTower
from saftnb.delta import Delta, LowRank, dense
from saftnb.task_vector import TaskVector

KINDS = ("channel", "parameter", "task", "weights")
EVERY = "all"  # the key of the values that all parameters share, for "task"


def blocks(delta: Delta, by: str) -> int:
    """How many coefficients one task has for a parameter."""
    return delta.shape[0] if by == "channel" and len(delta.shape) > 1 else 1


def scaled(delta: Delta, c: Tensor) -> Delta:
    """c ∘ Δ, of Δ's own kind: for a low-rank one c scales the rows of B.

    Args:
        c: (blocks,).
    """
    if isinstance(delta, LowRank):
        return LowRank(delta.B * c[:, None], delta.A)
    return delta * _along(c, delta)


def _along(c: Tensor, delta: Tensor) -> Tensor:
    return c.view(-1, *[1] * (delta.ndim - 1)) if delta.ndim else c[0]


def correlation(gradient: Tensor, delta: Delta, count: int) -> Tensor:
    """⟨∂L/∂θ, Δ⟩ over each of so many blocks, (count,)."""
    if isinstance(delta, LowRank):
        return _pooled(((gradient @ delta.A.T) * delta.B).sum(dim=1), count)
    return torch.linalg.vecdot(gradient.reshape(count, -1), delta.reshape(count, -1))


def _pooled(rows: Tensor, count: int) -> Tensor:
    return rows if count > 1 else rows.sum(dim=0, keepdim=True)


class Values:
    """The learned numbers of some task vectors, by parameter name, and the merged task vector that they stand for.

    Attributes:
        learned: key -> (tasks, blocks); for "task" one entry for all parameters, for "weights" a delta of the
            parameter's own shape.

    Args:
        vectors: one a task, of equal names and shapes. start: every coefficient at first.
        clamp: bounds within which coefficients count; outside of them they have no gradient.
    """

    def __init__(
        self, vectors: Sequence[TaskVector], by: str, start: float, device: torch.device,
        clamp: tuple[float, float] | None = None,
    ):  # fmt: skip
        self.by, self.clamp, self.device = by, clamp, device
        self.vectors = [resident(vector, device) for vector in vectors]
        first = vectors[0]
        if by == "weights":
            learned = {name: sum(self._dense(name), torch.zeros((), device=device)) / len(vectors) for name in first}
        else:
            sizes = {EVERY: 1} if by == "task" else {name: blocks(delta, by) for name, delta in first.items()}
            learned = {key: torch.full((len(vectors), n), start, device=device) for key, n in sizes.items()}
        self.learned = {key: nn.Parameter(value) for key, value in learned.items()}

    def deltas(self, name: str) -> list[Delta]:
        """A parameter's delta of every task, on the device, in float32 at least."""
        return [_wide(vector[name].to(self.device)) for vector in self.vectors]

    def _dense(self, name: str) -> Iterator[Tensor]:
        return (dense(delta) for delta in self.deltas(name))

    def bounded(self, key: str) -> Tensor:
        """Coefficients as they count, (tasks, blocks)."""
        found = self.learned[key].detach()
        return found if self.clamp is None else found.clamp(*self.clamp)

    @torch.no_grad()
    def delta(self, name: str) -> Delta:
        """Σt c_t ∘ τ_t of one parameter; low-rank where all of its deltas are, unless all weights are learned."""
        if self.by == "weights":
            return self.learned[name].detach()
        c = self.bounded(self._key(name))
        parts = self.deltas(name)
        if all(isinstance(part, LowRank) for part in parts):
            return sum((scaled(part, own) for part, own in zip(parts[1:], c[1:], strict=True)), scaled(parts[0], c[0]))
        total = torch.zeros(parts[0].shape, device=self.device, dtype=parts[0].dtype)
        for part, own in zip(parts, c, strict=True):
            total.addcmul_(dense(part), _along(own, dense(part)))
        return total

    @torch.no_grad()
    def receive(self, name: str, gradient: Tensor) -> None:
        """Add to the values' gradients what follows from ∂L/∂(the parameter, or its merged delta)."""
        if self.by == "weights":
            self.learned[name].grad = gradient
        else:
            self._add(name, [correlation(gradient, delta, self._count(name)) for delta in self.deltas(name)])

    @torch.no_grad()
    def receive_factor(self, name: str, gradient: Tensor) -> None:
        """The same from ∂L/∂B of a merged low-rank delta, whose B is [c1 ∘ B1, c2 ∘ B2, …]."""
        factors = [delta.B for delta in self.deltas(name) if isinstance(delta, LowRank)]
        parts = gradient.split([B.shape[1] for B in factors], dim=1)
        rows = [(part * B).sum(dim=1) for part, B in zip(parts, factors, strict=True)]
        self._add(name, [_pooled(row, self._count(name)) for row in rows])

    def _key(self, name: str) -> str:
        return EVERY if self.by == "task" else name

    def _count(self, name: str) -> int:
        return self.learned[self._key(name)].shape[1]

    def _add(self, name: str, found: list[Tensor]) -> None:
        value, gradient = self.learned[self._key(name)], torch.stack(found)
        if self.clamp is not None:
            gradient = gradient * ((value >= self.clamp[0]) & (value <= self.clamp[1]))
        value.grad = gradient if value.grad is None else value.grad + gradient

    def tensors(self) -> dict[str, Tensor]:
        """What is learned, as it is now, on the CPU: for a file."""
        return {key: p.detach().cpu().clone() for key, p in self.learned.items()}

    @torch.no_grad()
    def fill(self, found: Mapping[str, Tensor]) -> None:
        """Take what `tensors` gave."""
        for key, p in self.learned.items():
            p.copy_(found[key])

    def vector(self) -> TaskVector:
        """The merged task vector, on the CPU, in the dtype of those that were merged."""
        given = self.vectors[0]
        return TaskVector({name: self.delta(name).to("cpu", given[name].dtype) for name in given})


def resident(vector: TaskVector, device: torch.device) -> TaskVector:
    """The vector on the device if at least twice its size is free there; else as it is, to be brought over parameter
    by parameter."""
    if device.type != "cuda":
        return vector
    size = sum(d.B.nbytes + d.A.nbytes if isinstance(d, LowRank) else d.nbytes for d in vector.values())
    return vector.to(device) if 2 * size < torch.cuda.mem_get_info(device)[0] else vector


def _wide(delta: Delta) -> Delta:
    return delta if delta.dtype in (torch.float32, torch.float64) else delta.to(torch.float32)


class InWeights:
    """A tower of its own whose weights are set to θ0 + the merged delta: plain and tangent models."""

    def __init__(self, tower: nn.Module, values: Values):
        self.tower, self.values = tower, values
        self.weights = {name: p for name, p in tower.named_parameters() if name in values.vectors[0]}
        self.start = {name: p.detach().clone() for name, p in self.weights.items()}
        for name, p in tower.named_parameters():
            p.requires_grad_(name in self.weights)

    @torch.no_grad()
    def place(self) -> None:
        """Set the model to the values."""
        for name, p in self.weights.items():
            p.copy_(self.start[name] + dense(self.values.delta(name)))

    def collect(self) -> None:
        """Hand the gradients on to the values, and let go of them."""
        for name, p in self.weights.items():
            if p.grad is not None:
                self.values.receive(name, p.grad)
                p.grad = None


class AtOutputs:
    """A shared language model to whose layers' outputs the merged delta is added: nothing of its size is copied."""

    def __init__(self, tower: SequenceTower, values: Values):
        self.tower, self.values = tower, values
        self.placed: dict[str, Delta] = {}

    def place(self) -> None:
        self.placed = {name: self.values.delta(name) for name in self.values.vectors[0]}
        for delta in self.placed.values():
            (delta.B if isinstance(delta, LowRank) else delta).requires_grad_(True)
        self.tower.moved_by(self.placed)

    def collect(self) -> None:
        for name, delta in self.placed.items():
            if isinstance(delta, LowRank):
                if delta.B.grad is not None:
                    self.values.receive_factor(name, delta.B.grad)
            elif delta.grad is not None:
                self.values.receive(name, delta.grad)
