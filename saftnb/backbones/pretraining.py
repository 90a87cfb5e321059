"""Contrastive pre-training of the pocket backbone (run by `notebooks/appendix/pretrain_pocket_clip.ipynb`)."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from saftnb.backbones.clip import Vocabulary, build_clip
from saftnb.backbones.corpus import Captioned
from saftnb.backbones.device import resolve_device
from saftnb.disk import whole_file
from saftnb.progress import progress_bar

MEAN, STD = (0.5, 0.5, 0.5), (0.3, 0.3, 0.3)


@dataclass(frozen=True)
class Pretraining:
    """Everything that decides the weights, besides the corpus and the vocabulary."""

    steps: int = 6000
    batch: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup: int = 200
    seed: int = 0
    width: int = 128
    layers: int = 4
    patch: int = 7

    def config(self, vocabulary: int) -> dict[str, Any]:
        """The model in open_clip's config format."""
        vision = {
            "image_size": 28,
            "layers": self.layers,
            "width": self.width,
            "head_width": 32,
            "patch_size": self.patch,
        }
        text = {"context_length": 20, "vocab_size": vocabulary, "width": self.width, "heads": 4, "layers": 2}
        return {"embed_dim": 128, "vision_cfg": vision, "text_cfg": text}


def augment(images: Tensor, generator: torch.Generator, size: int = 28) -> Tensor:
    """RGBA uint8 (n, 4, h, w) → pixels in [0, 1] (n, 3, size, size).

    Random rotation (±15°), zoom (0.85 to 1.2), shift (±10 %) and smooth warp (up to 1.7 pixels) over a random flat
    ground where alpha is 0; half the pictures turn grey, a quarter are inverted, a quarter blurred, all get noise
    (standard deviation up to 0.12).
    """
    n = len(images)
    rand = lambda low, high: torch.rand(n, generator=generator) * (high - low) + low  # noqa: E731
    angle, zoom = rand(-0.26, 0.26), rand(0.85, 1.2)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom * angle.cos()
    theta[:, 0, 1], theta[:, 1, 0] = -zoom * angle.sin(), zoom * angle.sin()
    theta[:, 0, 2], theta[:, 1, 2] = rand(-0.2, 0.2), rand(-0.2, 0.2)
    grid = F.affine_grid(theta, [n, 4, size, size], align_corners=False)
    warp = torch.randn(n, 2, 4, 4, generator=generator) * rand(0, 0.06).view(-1, 1, 1, 1)
    grid = grid + F.interpolate(warp, size=(size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    pixels = images.float() / 255
    pixels[:, :3] *= pixels[:, 3:]  # premultiplied, so that transparent pixels do not bleed into the edges
    opaque = bool((images[:, 3] == 255).all())
    warped = F.grid_sample(pixels, grid, padding_mode="border" if opaque else "zeros", align_corners=False)
    colour, alpha = warped[:, :3], warped[:, 3:]
    picture = colour + (1 - alpha) * torch.rand(n, 3, 1, 1, generator=generator)
    grey = picture.mean(dim=1, keepdim=True).expand_as(picture)
    some = lambda share: (rand(0, 1) < share).view(-1, 1, 1, 1)  # noqa: E731
    picture = torch.where(some(1 / 2), grey, picture)
    picture = torch.where(some(1 / 4), 1 - picture, picture)
    coarse = F.interpolate(F.avg_pool2d(picture, 3, stride=3), size=(size, size), mode="bilinear", align_corners=False)
    picture = torch.where(some(1 / 4), coarse, picture)
    noise = torch.randn(n, 1, size, size, generator=generator) * rand(0, 0.12).view(-1, 1, 1, 1)
    return (picture + noise).clamp(0, 1)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, captions: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy, where every pair with the same caption counts as a match.

    Args:
        image, text: embeddings (n, d). scale: exp(logit_scale). captions: caption ids (n,).
    """
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    same = (captions[:, None] == captions[None, :]).float()
    target = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _batch(corpus: Sequence[tuple[Captioned, Tensor, float]], plan: Pretraining, step: int):
    """Pictures and caption ids of one step: a function of the seed and the step alone, so a run can be resumed."""
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
    pictures, ids = [], []
    for source, captions, share in corpus:
        chosen = torch.randint(len(captions), (round(plan.batch * share),), generator=generator)
        pictures.append(augment(source.images[chosen], generator))
        ids.append(captions[chosen])
    return torch.cat(pictures), torch.cat(ids)


def _optimizer(
    model: nn.Module, plan: Pretraining
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.98))

    def schedule(step: int) -> float:
        warm = min(1.0, (step + 1) / plan.warmup)
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / plan.steps)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)


class _Run:
    """Model, optimizer and schedule of a pre-training, which can be saved and gone on with."""

    def __init__(self, plan: Pretraining, vocabulary: Vocabulary, folder: Path, device: torch.device):
        torch.manual_seed(plan.seed)
        self.plan, self.file, self.start = plan, folder / "state.pt", 0
        self.model = build_clip(plan.config(len(vocabulary.tokens))).to(device)
        self.optimizer, self.scheduler = _optimizer(self.model, plan)
        self.parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        folder.mkdir(parents=True, exist_ok=True)
        if self.file.is_file():
            state = torch.load(self.file, map_location=device, weights_only=True)
            if state["plan"] != asdict(plan):
                raise ValueError(f"{folder} holds another plan's training state: choose another folder")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.start = state["step"]

    def save(self, step: int) -> None:
        """Write the state whole or not at all."""
        state = {"plan": asdict(self.plan), "step": step} | {n: part.state_dict() for n, part in self.parts.items()}
        with whole_file(self.file) as part:
            torch.save(state, part)

    def step(self, pictures: Tensor, tokens: Tensor, ids: Tensor) -> None:
        unique, inverse = ids.unique(return_inverse=True)  # a caption is encoded once a batch
        image = self.model.encode_image((pictures - MEAN[0]) / STD[0])
        text = self.model.encode_text(tokens[unique])[inverse]
        loss = contrastive_loss(image, text, self.model.logit_scale.exp(), ids)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))


def pretrain(
    corpus: Sequence[tuple[Captioned, float]], vocabulary: Vocabulary, plan: Pretraining, folder: Path,
    *, device: str = "auto", save_every: int = 500, watch: Callable[[nn.Module, int], None] | None = None,
) -> nn.Module:  # fmt: skip
    """Train a CLIP on captioned pictures; goes on from `folder` when a run with the same plan was cut off.

    Args:
        corpus: sources with their shares of a batch. folder: where the training state is kept.
        watch: called with the model and the step at every save.
    Returns:
        the open_clip model, on the CPU, in evaluation mode.
    Raises:
        ValueError: the folder holds the state of another plan.
    """
    where = resolve_device(device)
    captions = sorted({caption for source, _ in corpus for caption in source.captions})
    row = {caption: i for i, caption in enumerate(captions)}
    tokens = vocabulary(captions).to(where)
    sources = [(s, torch.tensor([row[c] for c in s.captions]), share) for s, share in corpus]
    run = _Run(plan, vocabulary, folder, where)
    steps = range(run.start, plan.steps)
    for step in progress_bar(steps, desc="pre-training", initial=run.start, total=plan.steps, mininterval=5):
        pictures, ids = _batch(sources, plan, step)
        run.step(pictures.to(where), tokens, ids.to(where))
        if (step + 1) % save_every == 0 or step + 1 == plan.steps:
            run.save(step + 1)
            if watch:
                watch(run.model, step + 1)
    return run.model.cpu().eval()


def save_backbone(model: nn.Module, name: str, vocabulary: Vocabulary, plan: Pretraining, folder: Path) -> str:
    """Write `model.safetensors` (float16) and `config.json`; returns the weights' SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items() if key != "attn_mask"}
    save_file(weights, folder / "model.safetensors")
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    config = {"name": name, "sha256": sha256, "mean": MEAN, "std": STD, **plan.config(len(vocabulary.tokens))}
    config |= {"pretraining": asdict(plan), "tokens": vocabulary.tokens}
    (folder / "config.json").write_text(json.dumps(config) + "\n")
    return sha256
