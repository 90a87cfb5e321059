"""The learning of coefficients, step by step: what `saftnb.merging.learning.learn` runs."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saftnb.backbones import Tokens
from saftnb.delta import is_finite
from saftnb.disk import whole_file
from saftnb.evaluate import hits, logits, naming
from saftnb.finetune import SharpnessAware, store
from saftnb.finetune.resume import Saves, State, load_state, save_state
from saftnb.finetune.sharpness_aware import DEFAULT_RHO
from saftnb.merging.coefficients import KINDS, AtOutputs, InWeights, Values
from saftnb.progress import progress_bar
from saftnb.suites import AnySuite, PairSuite
from saftnb.suites.task import random_resized_crop
from saftnb.task_vector import TaskVector, save_tensors

OBJECTIVES = ("distillation", "entropy")
OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("cosine", "constant")
VIEWS = 512  # pictures and crops of them, a task
CROP = 0.7  # smallest share of a picture's area that a crop keeps
LOOKS = 4  # at the validation accuracy, after the one at the start
LOOK_AT = 200  # pictures a task, at most, for such a look


@dataclass(frozen=True)
class Plan:
    """The settings of `learn`, checked."""

    objective: str
    by: str
    rho: float | None
    steps: int
    examples: int
    views: int
    batch_size: int
    lr: float
    start: float
    temperature: float
    optimizer: str
    momentum: float
    weight_decay: float
    perturbation: str
    clamp: tuple[float, float] | None
    schedule: str

    def __post_init__(self) -> None:
        def need(good: bool, rule: str) -> None:
            if not good:
                raise ValueError(f"learn: {rule}")

        def one_of(name: str, allowed: tuple[str, ...]) -> None:
            given = getattr(self, name)
            need(given in allowed, f"{name} is one of {', '.join(allowed)}, not {given!r}")

        one_of("objective", OBJECTIVES)
        one_of("by", KINDS)
        one_of("optimizer", OPTIMIZERS)
        one_of("schedule", SCHEDULES)
        one_of("perturbation", tuple(DEFAULT_RHO))
        need(self.rho is None or 0 <= self.rho < math.inf, f"rho is a number from 0, or None, not {self.rho}")
        need(self.steps >= 1 and self.batch_size >= 1, "steps and batch_size are at least 1")
        need(self.examples >= 0, f"examples is a number a task, or 0 for all, not {self.examples}")
        need(self.views >= 0, f"views is a number a task, or 0 for no crops, not {self.views}")
        need(0 < self.lr < math.inf, f"lr is above 0, not {self.lr}")
        need(math.isfinite(self.start), f"start is a finite number, not {self.start}")
        need(0 < self.temperature < math.inf, f"temperature is above 0, not {self.temperature}")
        need(0 <= self.momentum < 1, f"momentum lies in 0 to 1 (not included), not {self.momentum}")
        need(0 <= self.weight_decay < math.inf, f"weight_decay is 0 or more, not {self.weight_decay}")
        need(self.clamp is None or self.clamp[0] < self.clamp[1], f"clamp is two rising numbers, not {self.clamp}")
        need(self.clamp is None or self.by != "weights", "clamp bounds coefficients, not all weights")

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, …: constant, or 20 steps of warm-up and then half a cosine down to 0."""
        if self.schedule == "constant":
            return self.lr
        return self.lr * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def build(self, values: Values) -> torch.optim.Optimizer:
        """The optimizer over the values, sharpness-aware where there is a ρ."""
        named = list(values.learned.items())
        if self.optimizer == "adam":
            base = torch.optim.Adam(named, lr=self.lr, weight_decay=self.weight_decay)
        else:
            base = torch.optim.SGD(named, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        return SharpnessAware(base, self.rho, self.perturbation) if self.rho else base


def pool(size: int, examples: int, seed: int) -> Tensor:
    """Which of a task's validation pictures or pairs are learned from, int64: so many of a shuffle, which knows no
    labels, or all where `examples` is 0. Smaller pools lie in larger ones."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: examples or None]


class Learning:
    """A learning in progress, which can be saved and gone on from at any step."""

    def __init__(
        self, suite: AnySuite, vectors: Mapping[str, TaskVector], values: Values, plan: Plan, seed: int, tangent: bool,
        device: torch.device,
    ):  # fmt: skip
        self.suite, self.values, self.plan, self.seed, self.device = suite, values, plan, seed, device
        if isinstance(suite, PairSuite):
            tower = suite.tower()
            tower.model.to(device)
            self.model = AtOutputs(tower, values)
        else:
            self.model = InWeights(suite.tower(tangent=tangent).to(device), values)
        self.models = {task: suite.classifier(task, self.model.tower).to(device) for task in vectors}
        self.pools = {task: self._pool(task) for task in vectors}
        self.teachers: dict[str, Tensor] = {}
        if plan.objective == "distillation":
            self.teachers = {task: self._teacher(task, vector, tangent) for task, vector in vectors.items()}
        self.optimizer = plan.build(values)
        self.next_step, self.seconds = 0, 0.0
        self.losses: list[float] = []  # since the last look
        self.curve: list[tuple[int, float, float]] = []

    def _pool(self, task: str) -> Tensor | Tokens:
        """What is learned from: the chosen pictures or pairs, and crops of the pictures after them."""
        chosen = pool(len(self.suite.tasks[task].validation), self.plan.examples, self.seed)
        found = self.suite.tasks[task].validation.inputs
        if len(chosen) < len(found):  # all of them may be a file of some GB, and stay there
            found = found[chosen]
        rounds = self.plan.views // len(chosen) - 1
        if rounds < 1 or not isinstance(found, Tensor):
            return found
        crops = torch.Generator().manual_seed((self.seed + 1) * 7_368_787)
        drawn = [(255 * random_resized_crop(found, CROP, crops)).round().to(torch.uint8) for _ in range(rounds)]
        return torch.cat([found, *drawn])

    @torch.no_grad()
    def _teacher(self, task: str, vector: TaskVector, tangent: bool) -> Tensor:
        """log p of the task's own model on the pool, (pictures, classes that it has)."""
        model = self.suite.classifier(task, self.suite.tower(vector, tangent=tangent))
        with naming(f"learn: {self.suite.name}, {task}'s own model"):
            return self._log_shares(logits(model, self.pools[task], device=str(self.device))).to(self.device)

    def _log_shares(self, given: Tensor) -> Tensor:
        known = ~torch.isneginf(given[0])  # a class that the task does not have is masked
        return (given[:, known] / self.plan.temperature).log_softmax(dim=1)

    def batch(self, task: str, step: int) -> Tensor:
        """Which of the pool, in a step: epochs of fresh shuffles, the last short batch dropped."""
        size = min(self.plan.batch_size, len(self.pools[task]))
        epoch, position = divmod(step, len(self.pools[task]) // size)
        shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.pools[task]), generator=shuffle)[position * size : (position + 1) * size]

    def loss(self, task: str, step: int) -> Tensor:
        """The task's mean loss on a step's batch, at the model as it stands."""
        chosen = self.batch(task, step)
        log_shares = self._log_shares(self.models[task](self.pools[task][chosen].to(self.device)))
        if self.plan.objective == "entropy":
            return -(log_shares.exp() * log_shares).sum(dim=1).mean()
        theirs = self.teachers[task][chosen.to(self.device)]
        return (theirs.exp() * (theirs - log_shares)).sum(dim=1).mean()

    def step(self) -> float:
        """One optimizer step; returns the loss at the values before it, without their perturbation."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.next_step)

        def closure() -> Any:  # a Tensor, where torch's types want a float
            self.optimizer.zero_grad()
            self.model.place()
            total = torch.zeros((), device=self.device)
            for task in self.models:
                loss = self.loss(task, self.next_step)
                loss.backward()
                total += loss.detach()
            self.model.collect()
            gradients = {key: p.grad for key, p in self.values.learned.items() if p.grad is not None}
            norms = torch._foreach_norm(list(gradients.values()), math.inf)
            if not torch.stack([total, *norms]).isfinite().all():
                if not total.isfinite():
                    raise FloatingPointError(f"the loss is {total.item()}")
                bad = next(key for key, gradient in gradients.items() if not is_finite(gradient))
                raise FloatingPointError(f"the gradient of {bad!r} is not finite")
            return total

        loss: Any = self.optimizer.step(closure)
        values = [p.detach() for p in self.values.learned.values()]
        loss, *largest = torch.stack([loss, *torch._foreach_norm(values, math.inf)]).tolist()
        if not all(map(math.isfinite, largest)):
            bad = list(self.values.learned)[[math.isfinite(one) for one in largest].index(False)]
            raise FloatingPointError(f"the learned {bad!r} is not finite after the update")
        self.next_step += 1
        self.losses.append(loss)
        return loss

    @torch.no_grad()
    def accuracy(self) -> float:
        """Mean validation accuracy of the merged model, 0 to 1, on at most `LOOK_AT` pictures a task."""
        self.model.place()
        found = []
        for task, model in self.models.items():
            with naming(task):
                found.append(hits(model, self.suite.tasks[task].validation[:LOOK_AT], device=str(self.device)))
        return sum(one.double().mean().item() for one in found) / len(found)

    def look(self) -> None:
        """Note the mean loss since the last look, and the validation accuracy."""
        self.curve.append((self.next_step, sum(self.losses) / len(self.losses), self.accuracy()))
        self.losses = []

    def state(self) -> State:
        return {
            "values": {key: p.detach().clone() for key, p in self.values.learned.items()},
            "optimizer": self.optimizer.state_dict(), "next_step": self.next_step, "losses": list(self.losses),
            "curve": list(self.curve), "seconds": self.seconds,
        }  # fmt: skip

    def load_state(self, state: State) -> None:
        self.values.fill(state["values"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.curve = [tuple(row) for row in state["curve"]]
        for name in ("next_step", "losses", "seconds"):
            setattr(self, name, state[name])

    def finish(self, inputs: store.Inputs, progress: bool) -> None:
        """Learn to the end, from where an earlier try with these inputs was cut off."""
        file = store.partial_file(inputs)
        if (state := load_state(file)) is not None:
            self.load_state(state)
        try:
            self._run(Saves(lambda state: save_state(state, file)), inputs["name"], progress)
        except FloatingPointError as error:
            kept, values = store.partial_file(inputs, ".safetensors"), self.values.tensors()
            where = f"learn: {self.suite.name}, {', '.join(self.models)}: {error} at step {self.next_step + 1}"
            if not all(map(is_finite, values.values())):
                raise FloatingPointError(f"{where}; these values are not kept, use a smaller lr") from None
            with whole_file(kept, alone=True) as part:
                save_tensors(values, part)
            raise FloatingPointError(
                f"{where}; the values after {self.next_step} steps are kept in the checkpoint store as "
                f"{kept.parent.name}/{kept.name}"
            ) from None

    def _run(self, saves: Saves, label: str, progress: bool) -> None:
        steps = self.plan.steps
        looks = {math.ceil(steps * number / LOOKS) for number in range(1, LOOKS + 1)}
        bar = progress_bar(total=steps, initial=self.next_step, desc=label, disable=not progress, mininterval=1)
        with bar:
            while self.next_step < steps:
                begun = time.perf_counter()
                at_start = self.accuracy() if self.next_step == 0 else None
                loss = self.step()
                if at_start is not None:
                    self.curve.append((0, loss, at_start))
                if self.next_step in looks:
                    self.look()
                    bar.set_postfix_str(f"validation {self.curve[-1][2]:.3f}", refresh=False)
                self.seconds += time.perf_counter() - begun
                if self.next_step < steps:
                    saves.after(self.next_step, self.state)
                bar.update()
