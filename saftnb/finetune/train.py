"""The training loop. A run's every step is a function of (suite, task, recipe, seed, step) and nothing else."""

import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from saftnb.backbones import ImageClassifier, add_lora, attention_weights, lora_vector, threads
from saftnb.finetune.recipe import Recipe
from saftnb.finetune.sharpness_aware import SharpnessAware
from saftnb.suites import Split, Task
from saftnb.task_vector import TaskVector

CPU_THREADS = 1  # one process per core beats two threads here, and other counts give other bits
SAVE_EVERY = 50  # steps between saves of the training state, at least
SAVE_SHARE = 0.1  # of the time may go into saves: at full size a state is some GB


def build_optimizer(tower: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over the parameters that train, by name, inside `SharpnessAware` where the recipe asks for it."""
    named = [(name, p) for name, p in tower.named_parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(named, lr=recipe.lr, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "adamw":
        return adamw
    return SharpnessAware(adamw, recipe.rho, recipe.optimizer)


def draw_batch(split: Split, recipe: Recipe, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Pictures (uint8, or in [0, 1]) and labels of one step: epochs of fresh shuffles, the last short batch dropped."""
    size = min(recipe.batch_size, len(split))
    per_epoch = len(split) // size
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    chosen = order[position * size : (position + 1) * size]
    crops = torch.Generator().manual_seed((seed + 1) * 7_368_787 + step)
    return split.crops(chosen, recipe.crop, crops), split.labels[chosen]


class _Batches(Dataset):
    """The batches of a training by their step, for a `DataLoader`."""

    def __init__(self, split: Split, recipe: Recipe, seed: int, first: int):
        self.arguments, self.first, self.steps = (split, recipe, seed), first, recipe.steps

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return draw_batch(*self.arguments, self.first + number)


def adapter_seed(task: str, seed: int) -> int:
    """What draws an adapter's first A: another one for each task, as for adapters that were trained apart, and the same
    for all recipes."""
    return seed * 1_000_003 + zlib.crc32(task.encode())


def prepare_scope(tower: nn.Module, recipe: Recipe, seed: int = 0) -> None:
    """Leave only what the recipe's scope trains: for "lora" adapters, put there first."""
    tower.requires_grad_(recipe.scope in ("full", "tangent"))
    if recipe.scope == "lora":
        add_lora(tower, rank=recipe.rank, alpha=recipe.alpha, dropout=recipe.dropout, seed=seed)
    if recipe.scope == "attention":
        for name in attention_weights(tower):
            tower.get_parameter(name).requires_grad_(True)


class Training:
    """A fine-tuning in progress, which can be saved and gone on from at any step."""

    def __init__(self, classifier: ImageClassifier, task: Task, recipe: Recipe, seed: int, device: torch.device):
        self.classifier, self.task, self.recipe, self.seed, self.device = (
            classifier.to(device),
            task,
            recipe,
            seed,
            device,
        )
        classifier.bf16 = recipe.precision == "bf16"
        prepare_scope(classifier.tower, recipe, adapter_seed(task.name, seed))
        classifier.to(device)  # adapters start on the CPU
        self.trained = {name: p for name, p in classifier.tower.named_parameters() if p.requires_grad}
        self.start = {name: p.detach().cpu().clone() for name, p in self.trained.items()}
        self.forward = torch.compile(classifier) if recipe.compile else classifier
        size = min(recipe.batch_size, len(task.train))
        self.evaluate_every = recipe.evaluate_every or len(task.train) // size
        self.optimizer = build_optimizer(classifier.tower, recipe)
        self.next_step, self.best_accuracy, self.seconds = 0, -1.0, 0.0
        self.best: dict[str, Tensor] = {}
        self._batches: tuple[int, Iterator] | None = None
        self.history: list[tuple[int, float, float]] = []  # (steps done, training loss, validation accuracy)

    @property
    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from the next step on; those of pictures on disk are prepared by processes of their own."""
        if self._batches is None or self._batches[0] != self.next_step:
            split = self.task.train
            steps = _Batches(split, self.recipe, self.seed, self.next_step)
            ahead = min(split.workers, len(steps))
            self._batches = (
                self.next_step,
                iter(
                    # a generator of its own, or the loader would draw from the global one
                    DataLoader(steps, batch_size=None, num_workers=ahead, generator=torch.Generator())
                ),
            )
        self._batches = self.next_step + 1, self._batches[1]
        return self._batches[1]

    def step(self) -> float:
        """One optimizer step; returns the loss at the unperturbed weights."""
        pixels, labels = next(self.batches)
        pixels, labels = pixels.to(self.device), labels.to(self.device)
        count = min(self.recipe.accumulate, len(labels))
        parts = list(zip(pixels.tensor_split(count), labels.tensor_split(count), strict=True))
        clipped = 0
        rate = self.recipe.learning_rate(self.next_step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        def closure() -> Tensor:
            nonlocal clipped
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
            if self.recipe.clip == "both" or not clipped:
                nn.utils.clip_grad_norm_(self.trained.values(), self.recipe.clip_norm)
            clipped += 1
            return total

        self.classifier.train()
        cards = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cards, enabled=self.recipe.scope == "lora"):
            loss = self.optimizer.step(closure)
        self.next_step += 1
        return float(loss.detach())

    @torch.no_grad()
    def look(self, loss: float) -> None:
        """Measure validation accuracy and keep the weights if they are the best so far."""
        self.classifier.eval()
        split = self.task.validation
        hits = [
            self.classifier(images.to(self.device)).argmax(dim=1).cpu() == labels
            for images, labels in zip(split.images.split(500), split.labels.split(500), strict=True)
        ]
        accuracy = torch.cat(hits).float().mean().item()
        self.history.append((self.next_step, loss, accuracy))
        if accuracy > self.best_accuracy:
            self.best_accuracy = accuracy
            self.best = {name: p.detach().cpu().clone() for name, p in self.trained.items()}

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

    def state(self) -> dict:
        return {
            "tower": self.classifier.tower.state_dict(), "optimizer": self.optimizer.state_dict(), "best": self.best,
            "next_step": self.next_step, "best_accuracy": self.best_accuracy, "history": self.history,
            "seconds": self.seconds,
        }  # fmt: skip

    def load_state(self, state: dict) -> None:
        self.classifier.tower.load_state_dict(state["tower"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = [tuple(row) for row in state["history"]]
        for name in ("best", "next_step", "best_accuracy", "seconds"):
            setattr(self, name, state[name])

    def run(self, save: Callable[[dict], None], *, label: str, progress: bool) -> None:
        """Train to the end, or to the accuracy at which the recipe stops, saving the state now and then."""
        steps, saved, cost = self.recipe.steps, time.perf_counter(), 0.0
        bar = tqdm(total=steps, initial=self.next_step, desc=label, disable=not progress, mininterval=1)
        with threads(CPU_THREADS), bar:
            while self.next_step < steps and not self.reached:
                start = time.perf_counter()
                loss = self.step()
                if self.next_step % self.evaluate_every == 0 or self.next_step == steps:
                    self.look(loss)
                    bar.set_postfix_str(f"validation {self.history[-1][2]:.3f}", refresh=False)
                self.seconds += time.perf_counter() - start
                due = self.next_step % SAVE_EVERY == 0 and time.perf_counter() - saved >= cost / SAVE_SHARE
                if due and self.next_step < steps and not self.reached:
                    start = time.perf_counter()
                    save(self.state())
                    saved = time.perf_counter()
                    cost = saved - start
                bar.update()


def save_state(state: dict, path: Path) -> None:
    """Write a training state whole or not at all."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
