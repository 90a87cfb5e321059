"""The training loop. A run's every step is a function of (suite, task, recipe, seed, step) and nothing else."""

import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from saftnb.backbones import (
    ImageClassifier,
    SequenceClassifier,
    Tokens,
    add_lora,
    attention_weights,
    lora_vector,
    remove_lora,
    set_checkpointing,
    tensor_cores,
    threads,
)
from saftnb.delta import is_finite
from saftnb.evaluate import hits, naming
from saftnb.finetune.recipes import Recipe
from saftnb.finetune.resume import Saves, State
from saftnb.finetune.sharpness_aware import SharpnessAware
from saftnb.progress import progress_bar
from saftnb.suites import AnySplit, PairTask, Task
from saftnb.task_vector import TaskVector

LOOK_AT = 500  # pictures at once, at a look at the validation accuracy
CPU_THREADS = 1  # one process per core beats two threads here, and other counts give other bits


def build_optimizer(tower: nn.Module, recipe: Recipe, head: nn.Parameter | None = None) -> torch.optim.Optimizer:
    """AdamW over the parameters that train, by name, inside `SharpnessAware` where the recipe asks for it; over the
    head, too, where one is given, which is not perturbed."""
    named = [(name, p) for name, p in tower.named_parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(named, lr=recipe.lr, weight_decay=recipe.weight_decay)
    if head is not None:
        adamw.add_param_group({"params": [("head", head)], "perturb": False})
    if recipe.optimizer == "adamw":
        return adamw
    return SharpnessAware(adamw, recipe.rho, recipe.optimizer)


def draw_batch(split: AnySplit, recipe: Recipe, seed: int, step: int) -> tuple[Tensor | Tokens, Tensor]:
    """Pictures (uint8, or in [0, 1]) or tokens, and labels, of one step: epochs of fresh shuffles, the last short batch
    dropped."""
    size = min(recipe.batch_size, len(split))
    per_epoch = len(split) // size
    epoch, position = divmod(step, per_epoch)
    order = _epoch(split, size, seed, epoch)
    chosen = order[position * size : (position + 1) * size]
    crops = torch.Generator().manual_seed((seed + 1) * 7_368_787 + step)
    return split.drawn(chosen, recipe.crop, crops), split.labels[chosen]


@lru_cache(maxsize=2)  # the steps of an epoch share it: sorting half a million pairs by length takes a while
def _epoch(split: AnySplit, size: int, seed: int, epoch: int) -> Tensor:
    return split.order(size, torch.Generator().manual_seed(seed * 1_000_003 + epoch))


Batch = tuple[Tensor | Tokens, Tensor]


class _Batches(Dataset[Batch]):
    """The batches of a training by their step, for a `DataLoader`."""

    def __init__(self, split: AnySplit, recipe: Recipe, seed: int, first: int):
        self.arguments, self.first, self.steps = (split, recipe, seed), first, recipe.steps

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, number: int) -> Batch:
        return draw_batch(*self.arguments, self.first + number)


def adapter_seed(task: Task | PairTask, recipe: Recipe, seed: int) -> int:
    """What draws an adapter's first A: one for all tasks, as in KnOTS's released training script, or one for each."""
    return seed * 1_000_003 + (0 if recipe.shared_init else zlib.crc32(task.name.encode()))


def prepare_scope(tower: nn.Module, recipe: Recipe, seed: int = 0, **targets: Sequence[str]) -> None:
    """Leave only what the recipe's scope trains: for "lora" adapters, put there first (see `add_lora`)."""
    tower.requires_grad_(recipe.scope in ("full", "tangent"))
    if recipe.scope == "lora":
        add_lora(tower, rank=recipe.rank, alpha=recipe.alpha, dropout=recipe.dropout, seed=seed, **targets)
    if recipe.scope == "attention":
        for name in attention_weights(tower):
            tower.get_parameter(name).requires_grad_(True)


class Training:
    """A fine-tuning in progress, which can be saved and gone on from at any step.

    A language model is shared: it carries the adapters until `close`.
    """

    def __init__(
        self, classifier: ImageClassifier | SequenceClassifier, task: Task | PairTask, recipe: Recipe, seed: int,
        device: torch.device,
    ):  # fmt: skip
        self.classifier, self.task, self.recipe, self.seed, self.device = (
            classifier.to(device),
            task,
            recipe,
            seed,
            device,
        )
        classifier.bf16 = recipe.precision == "bf16"
        self.head: nn.Parameter | None = None
        targets: dict[str, Sequence[str]] = {}
        if isinstance(classifier, SequenceClassifier):
            if recipe.scope != "lora":
                raise ValueError(f"a language model is fine-tuned by adapters alone, scope lora, not {recipe.scope!r}")
            classifier.head.requires_grad_(True)
            self.head, targets = classifier.head, {"targets": classifier.tower.targets}
            if recipe.checkpointing:
                set_checkpointing(classifier.trunk, True)
        prepare_scope(classifier.trunk, recipe, adapter_seed(task, recipe, seed), **targets)
        classifier.to(device)  # adapters start on the CPU
        self.trained = {name: p for name, p in classifier.trunk.named_parameters() if p.requires_grad}
        self.start = {name: p.detach().cpu().clone() for name, p in self.trained.items()}
        self.forward = torch.compile(classifier) if recipe.compile else classifier
        size = min(recipe.batch_size, len(task.train))
        self.evaluate_every = recipe.evaluate_every or len(task.train) // size
        self.optimizer = build_optimizer(classifier.trunk, recipe, self.head)
        self.next_step, self.best_accuracy, self.seconds = 0, -1.0, 0.0
        self.best: dict[str, Tensor] = {}
        self.best_head: Tensor | None = None
        self._batches: tuple[int, Iterator[Batch]] | None = None
        self.history: list[tuple[int, float, float]] = []  # (steps done, training loss, validation accuracy)

    @property
    def batches(self) -> Iterator[Batch]:
        """The batches from the next step on; those of pictures on disk are prepared by processes of their own."""
        if self._batches is None or self._batches[0] != self.next_step:
            split = self.task.train
            steps = _Batches(split, self.recipe, self.seed, self.next_step)
            ahead = min(split.prepare(self.recipe.crop, len(steps) * self.recipe.batch_size), len(steps))
            loader = DataLoader(
                steps, batch_size=None, num_workers=ahead, prefetch_factor=4 if ahead else None,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),  # of its own, or the loader would draw from the global one
            )  # fmt: skip
            self._batches = self.next_step, iter(loader)
        self._batches = self.next_step + 1, self._batches[1]
        return self._batches[1]

    def step(self) -> float:
        """One optimizer step; returns the loss at the unperturbed weights.

        Raises:
            FloatingPointError: a loss or gradient that is not finite; the line names the step and the first parameter.
        """
        pixels, labels = next(self.batches)
        pixels, labels = pixels.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        count = min(self.recipe.accumulate, len(labels))
        parts = list(zip(pixels.tensor_split(count), labels.tensor_split(count), strict=True))
        norms: list[Tensor] = []
        rate = self.recipe.learning_rate(self.next_step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        def closure() -> Any:  # a Tensor, where torch's types want a float
            if self.recipe.scope == "lora":  # the same dropped inputs for both gradients, at every run of this step
                torch.manual_seed(self.seed * 1_000_003 + self.next_step)
            self.optimizer.zero_grad()
            total = torch.zeros((), device=self.device)
            for some, wanted in parts:
                loss = F.cross_entropy(self.forward(some), wanted, label_smoothing=self.recipe.label_smoothing)
                loss = loss * (len(wanted) / len(labels))
                loss.backward()
                total += loss.detach()
            # For SharpnessAware this clips both gradients; the first clip changes nothing, since ε is normalised.
            if self.recipe.clip == "both" or not norms:
                everything = [p for _, p in self._named() if p.grad is not None]
                norm = nn.utils.get_total_norm([p.grad for p in everything if p.grad is not None])
                # Of a norm that is NaN the factor would be, too, and no one could tell where it came from.
                nn.utils.clip_grads_with_norm_(everything, self.recipe.clip_norm, norm.nan_to_num(nan=math.inf))
                norms.append(norm)
            return total

        self.classifier.train()
        cards = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cards, enabled=self.recipe.scope == "lora"):
            try:
                loss: Any = self.optimizer.step(closure)
            except FloatingPointError as error:  # of SharpnessAware, which looks at norms itself
                raise FloatingPointError(f"{error}, at step {self.next_step + 1}; {self._first_bad()}") from None
        found, *norms = torch.stack([loss.detach(), *norms]).tolist()  # fetched together: a step waits once
        if not math.isfinite(found):
            raise FloatingPointError(f"the loss is {found} at step {self.next_step + 1}; {self._first_bad()}")
        if not all(map(math.isfinite, norms)):
            raise FloatingPointError(f"the gradient is not finite at step {self.next_step + 1}; {self._first_bad()}")
        self.next_step += 1
        return found

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What trains, with its name."""
        yield from self.trained.items()
        if self.head is not None:
            yield "head", self.head

    def _first_bad(self) -> str:
        """Where the numbers that are not finite begin, once it is known that there are some."""
        for what in ("gradient", "weight"):
            for name, p in self._named():
                values = p.grad if what == "gradient" else p.detach()
                if values is not None and not is_finite(values):
                    return f"first in the {what} of {name!r}"
        return "all gradients and weights are finite"

    def require_finite(self) -> None:
        """Raises FloatingPointError, which names the first, if weights are not finite."""
        values = [p.detach() for _, p in self._named()]
        if not torch.stack(torch._foreach_norm(values, math.inf)).isfinite().all():  # fetched once for all
            raise FloatingPointError(f"weights are not finite after step {self.next_step}; {self._first_bad()}")

    @torch.no_grad()
    def look(self, loss: float) -> None:
        """Measure validation accuracy and keep the weights if they are the best so far.

        Raises:
            FloatingPointError: weights or logits that are not finite.
        """
        self.require_finite()
        self.classifier.eval()
        with naming(f"validation after step {self.next_step}"):
            found = hits(self.classifier, self.task.validation, device=str(self.device), batch_size=LOOK_AT)
        accuracy = found.float().mean().item()
        self.history.append((self.next_step, loss, accuracy))
        if accuracy > self.best_accuracy:
            self.best_accuracy = accuracy
            self.best = {name: p.detach().cpu().clone() for name, p in self.trained.items()}
            self.best_head = None if self.head is None else self.head.detach().cpu().clone()

    @property
    def reached(self) -> bool:
        """Whether the recipe stops at the last look: it was good enough, or too many before it brought too little."""
        if self.recipe.stop_at is not None and self.history and self.history[-1][2] >= self.recipe.stop_at:
            return True
        best, since = float("-inf"), 0
        for _, _, accuracy in self.history:
            best, since = (accuracy, 0) if accuracy > best + self.recipe.min_delta else (best, since + 1)
        return bool(self.recipe.patience) and since >= self.recipe.patience

    def task_vector(self) -> TaskVector:
        """The best weights so far, as a task vector of the plain tower: of low rank for the scope "lora"."""
        if self.recipe.scope == "lora":
            return lora_vector(self.best, self.recipe.alpha / self.recipe.rank)
        return TaskVector.between(self.start, self.best)

    def close(self) -> None:
        """Take the adapters off a shared model, which is then as it was."""
        if isinstance(self.classifier, SequenceClassifier):
            remove_lora(self.classifier.trunk)
            if self.recipe.checkpointing:
                set_checkpointing(self.classifier.trunk, False)
            self.classifier.eval()

    def _good_state(self) -> State:
        """The state, to be kept: a bad one must not take the place of the last good one."""
        self.require_finite()
        return self.state()

    def state(self) -> State:
        if self.head is not None:  # of a shared model only what trains
            return {
                "trained": {name: p.detach().clone() for name, p in self.trained.items()},
                "head": self.head.detach().clone(), "best_head": self.best_head, **self._progress(),
            }  # fmt: skip
        return {"tower": self.classifier.tower.state_dict(), **self._progress()}

    def _progress(self) -> State:
        return {
            "optimizer": self.optimizer.state_dict(), "best": self.best,
            "next_step": self.next_step, "best_accuracy": self.best_accuracy, "history": self.history,
            "seconds": self.seconds,
        }  # fmt: skip

    def load_state(self, state: State) -> None:
        if self.head is not None:
            with torch.no_grad():
                for name, p in self.trained.items():
                    p.copy_(state["trained"][name])
                self.head.copy_(state["head"])
            self.best_head = state["best_head"]
        else:
            self.classifier.tower.load_state_dict(state["tower"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = [tuple(row) for row in state["history"]]
        for name in ("best", "next_step", "best_accuracy", "seconds"):
            setattr(self, name, state[name])

    def run(self, save: Callable[[State], None], *, label: str, progress: bool) -> None:
        """Train to the end, or to the accuracy at which the recipe stops, saving the state now and then."""
        steps, saves = self.recipe.steps, Saves(save)
        bar = progress_bar(total=steps, initial=self.next_step, desc=label, disable=not progress, mininterval=1)
        with threads(CPU_THREADS), tensor_cores(self.device, self.recipe.precision == "bf16"), bar:
            while self.next_step < steps and not self.reached:
                start = time.perf_counter()
                loss = self.step()
                if self.next_step % self.evaluate_every == 0 or self.next_step == steps:
                    self.look(loss)
                    bar.set_postfix_str(f"validation {self.history[-1][2]:.3f}", refresh=False)
                self.seconds += time.perf_counter() - start
                if self.next_step < steps and not self.reached:
                    saves.after(self.next_step, self._good_state)
                bar.update()
