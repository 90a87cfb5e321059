"""How figures, tables, reports and launchers say things: recipes, merge methods, merge spaces, durations."""

LABELS = {
    "sgd": "AdamW (sgd)",
    "saft": "SAFT (saft)",
    "sam": "SAM (sam)",
    "asam-kwon": "Kwon's ASAM (asam-kwon)",
    "sgd-matched": "AdamW stopped at SAFT's accuracy",
    "sgd-2x": "AdamW, as many gradients as SAFT",
    "sgd-wd0": "AdamW, no weight decay, lr 6e-4",
    "ftts": "tangent (ftts)",
    "ftts+saft": "tangent with SAFT (ftts+saft)",
    "ftlo": "attention only (ftlo)",
    "ftlo+saft": "attention only with SAFT (ftlo+saft)",
    "lora": "LoRA (lora)",
    "lora+saft": "LoRA with SAFT (lora+saft)",
    "published:fusionbench": "FusionBench's models",
    "published:knots": "KnOTS's adapters",
    "average": "average",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "dare_task_arithmetic": "DARE, task arithmetic",
    "dare_ties": "DARE-TIES",
    "fisher": "Fisher",
    "regmean": "RegMean",
    "iso_c": "Iso-C",
    "iso_cts": "Iso-CTS",
    "tsv_m": "TSV-M",
}
SPACE_LABELS = {"weights": "weights", "knots": "KnOTS's basis", "core": "Core Space"}
KIND_LABELS = {  # what has a learned number of its own, see `saftnb.merging.coefficients`
    "task": "each task",
    "parameter": "each task and parameter",
    "channel": "each task and channel",
    "weights": "each weight: the control",
}


def spoken(name: str) -> str:
    """A recipe, merge method or space as people write it: TIES for "ties"; any other text as it is."""
    return LABELS.get(name) or SPACE_LABELS.get(name) or name


def duration(seconds: float) -> str:
    """Seconds as one would say them: 40 s, 1 min 15 s, 10 min, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    parts = [(minutes, "min"), (rest, "s")] if minutes < 60 else [(minutes // 60, "h"), (minutes % 60, "min")]
    return " ".join(f"{amount} {unit}" for amount, unit in parts if amount) or "0 s"
