"""Published numbers to set beside ours, with their sources. Never something to be tuned to."""

import pandas as pd

VISION8 = ("sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")

# FusionBench's documentation: CLIP ViT-B/32, full fine-tuning, test accuracy in %, one shared coefficient.
_FUSIONBENCH_B32 = {
    "zero-shot": (63.2, 59.8, 60.7, 46.0, 31.6, 32.5, 48.2, 43.9),
    "individual": (75.0, 78.3, 95.2, 99.0, 97.3, 98.9, 99.6, 79.7),
    "average": (65.4, 62.6, 70.8, 76.9, 64.5, 54.9, 86.3, 50.9),
    "task_arithmetic": (57.1, 55.7, 64.9, 76.7, 77.9, 68.5, 96.1, 47.2),
    "ties": (67.1, 64.2, 74.1, 76.8, 77.7, 69.4, 94.1, 54.0),
}
FUSIONBENCH = "FusionBench documentation (CLIP ViT-B/32, λ = 0.3 for task arithmetic and TIES)"


def vision8_merging() -> pd.DataFrame:
    """Accuracy in 0 to 1 of merged ViT-B/32 models on the eight tasks: rows are models, columns tasks (FusionBench)."""
    table = pd.DataFrame.from_dict(_FUSIONBENCH_B32, orient="index", columns=list(VISION8))
    return (table / 100).rename_axis(index="model", columns="task")


def task_addition() -> pd.DataFrame:
    """Task arithmetic with one shared λ on the eight tasks, mean accuracy in %: rows are fine-tunings, columns backbone
    and measure (arXiv 2604.17078, Table 1). Its attention-only row is close to FTLO."""
    rows = {
        "zero-shot": (47.74, None, 54.22, None, 64.54, None),
        "full (sgd)": (70.32, 77.56, 75.39, None, 84.07, 89.19),
        "tangent (ftts)": (74.68, 85.27, 78.97, 87.48, 86.19, 93.14),
        "attention only (≈ ftlo)": (78.07, 86.99, 80.71, 87.64, 87.81, 93.59),
    }
    columns = pd.MultiIndex.from_product([("ViT-B/32", "ViT-B/16", "ViT-L/14"), ("absolute", "normalised")])
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).astype(float)


def lora_merging() -> pd.DataFrame:
    """Merged LoRA adapters of rank 16 on the eight tasks, mean normalised accuracy in %: rows are method and space,
    columns backbones (KnOTS, arXiv 2410.19735; the rows of Iso-C and Iso-CTS from their own line of work)."""
    rows = {
        ("regmean", "weights"): (60.9, None),
        ("task_arithmetic", "weights"): (63.7, 74.4),
        ("ties", "weights"): (63.7, 75.2),
        ("dare_ties", "weights"): (63.7, 74.7),
        ("ties", "knots"): (68.0, 78.2),
        ("dare_ties", "knots"): (63.9, 75.6),
        ("iso_c", "weights"): (73.6, 83.7),
        ("iso_cts", "weights"): (73.7, 85.3),
    }
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["published, ViT-B/32", "published, ViT-L/14"])
    table.index = pd.MultiIndex.from_tuples(table.index, names=["model", "space"])
    return table.astype(float)


def nli_merging() -> pd.DataFrame:
    """Merged LoRA adapters of rank 16 of Llama-3-8B on six inference tasks, mean normalised accuracy in % (KnOTS,
    arXiv 2410.19735; TSV-M in Core Space from Panariello et al. 2025). KnOTS-TIES' number is from a summary of the
    paper and is not verified."""
    rows = {("ties", "weights"): 90.0, ("ties", "knots"): 92.9, ("tsv_m", "core"): 94.16}
    table = pd.Series(rows, name="published, Llama-3-8B").to_frame()
    table.index = pd.MultiIndex.from_tuples(table.index, names=["model", "space"])
    return table


def joint_task() -> pd.DataFrame:
    """Hits@k in % of merged ViT-B/32 adapters on the eight tasks' union (KnOTS, arXiv 2410.19735)."""
    rows = {
        ("ties", "knots"): (46.8, 68.1, 76.3),
        ("ties", "weights"): (43.6, 65.3, 73.9),
        ("ensemble", ""): (40.7, None, None),
    }
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["hits@1", "hits@3", "hits@5"])
    table.index = pd.MultiIndex.from_tuples(table.index, names=["model", "space"])
    return table.astype(float)


def learned_merging() -> pd.DataFrame:
    """Accuracy in % of ViT-B/32 models merged with learned coefficients, on the eight tasks and their mean: rows are
    what has a coefficient of its own, columns tasks (AdaMerging's released logs, arXiv 2310.02575). "++" learns on
    task vectors that TIES trimmed. It learned on the test pictures, without labels."""
    rows = {
        "each task": (58.0, 53.2, 68.8, 85.7, 81.2, 84.5, 92.4, 44.8, 71.09),
        "each task and parameter": (64.5, 68.1, 79.3, 93.9, 87.0, 92.0, 97.5, 59.1, 80.18),
        "each task, ++": (*[None] * 8, 73.76),
        "each task and parameter, ++": (*[None] * 8, 81.15),
    }
    table = pd.DataFrame.from_dict(rows, orient="index", columns=[*VISION8, "mean"]).astype(float)
    return table.rename_axis(index="learned", columns="task")


_TABLE = "FusionBench documentation, ViT-B/32"
_SINGULAR = "TSV-M (arXiv 2412.00081) and Iso-C (2502.04959), ViT-B/32; as quoted in our notes, tables not read"
_ADDITION = "arXiv 2604.17078, Table 1, ViT-B/32"
_KNOTS = "KnOTS (arXiv 2410.19735), ViT-B/32"
_INF = float("inf")
# key -> statement, published, unit, source, and the range of our measured number that agrees with it
_FACTS = {
    "average<ta": ("Task arithmetic beats the average", "+1.5", "points", _TABLE, 0, _INF),
    "ta<ties": ("TIES beats task arithmetic", "+4.2", "points", _TABLE, 0, _INF),
    "ties<iso_c": ("Iso-C beats TIES", "about +12", "points", _SINGULAR, 0, _INF),
    "ties<tsv_m": ("TSV-M beats TIES", "about +12", "points", _SINGULAR, 0, _INF),
    "iso_c=tsv_m": ("TSV-M and Iso-C are level, within 2 points", "about 0", "points", _SINGULAR, -2, 2),
    "share: average": ("The average: share of the gap recovered", "43", "%", _TABLE, 33, 53),
    "share: task_arithmetic": ("Task arithmetic: share of the gap recovered", "47", "%", _TABLE, 37, 57),
    "share: ties": ("TIES: share of the gap recovered", "57", "%", _TABLE, 47, 67),
    "share: regmean": ("RegMean: share of the gap recovered", "77", "%", _TABLE, 67, 87),
    "share: iso_c": ("Iso-C: share of the gap recovered", "about 85", "%", _SINGULAR, 75, 95),
    "share: tsv_m": ("TSV-M: share of the gap recovered", "about 85", "%", _SINGULAR, 75, 95),
    "share: adamerging": ("AdaMerging's coefficients by layer: share of the gap recovered", "82", "%", _TABLE, 72, 92),
    "scale: task_arithmetic": ("A good λ of task arithmetic", "0.3", "", _TABLE, 0.2, 0.4),
    "scale: tsv_m": ("A good λ of TSV-M", "1", "", "TSV-M (arXiv 2412.00081)", 0.7, 1.3),
    "norm": ("Task vectors are short: ‖τ‖ / ‖θ0‖", "no number found", "%", "", None, None),
    "cosine": ("Task vectors are close to orthogonal: mean cosine", "close to 0", "",
               "Ilharco et al. 2023 (arXiv 2212.04089)", -0.1, 0.1),
    "plain<tangent": ("Tangent models beat plain ones under task arithmetic", "+4.4", "points", _ADDITION, 0, _INF),
    "lora<full": ("LoRA adapters merge worse than full models under task arithmetic", "−13.9", "normalised points",
                  f"{_KNOTS} (63.7), against {_ADDITION} (77.6)", -_INF, 0),
    "ties<knots": ("KnOTS's basis helps TIES on LoRA adapters", "+4.3", "normalised points", _KNOTS, 0, _INF),
    "ties<adamerging": ("Coefficients by layer learned from entropy (AdaMerging) beat TIES", "+10.4", "points", _TABLE,
                        0, _INF),
    "regmean<adamerging": ("AdaMerging's coefficients by layer beat RegMean", "+2.1", "points", _TABLE, 0, _INF),
    "closed<distilled": ("Coefficients by layer learned from the experts' answers beat every closed formula",
                         "above", "points", "SAMerging (arXiv 2512.21288), abstract; no number read", 0, _INF),
}  # fmt: skip


def known_facts() -> pd.DataFrame:
    """What the literature reports of merging at ViT-B/32, and what would agree with it at another size.

    Rows are facts, by key. Columns: statement; published (text) in `unit`; source; from and to: the range in which our
    own number agrees (for "A beats B": above 0; for a share of the gap ± 10 points), empty where nothing stands beside
    it; agrees: this range as text. The share of the gap is (merged − zero-shot) / (individual − zero-shot) in %, of
    accuracies averaged over tasks.
    """
    columns = ["statement", "published", "unit", "source", "from", "to"]
    table = pd.DataFrame.from_dict(_FACTS, orient="index", columns=columns)
    table = table.astype({"from": float, "to": float}).rename_axis("fact")
    return table.assign(agrees=[_range(start, end) for start, end in zip(table["from"], table["to"], strict=True)])


def _range(start: float, end: float) -> str:
    if end == _INF:
        return f"above {start:g}"
    text = f"below {end:g}" if start == -_INF else f"{start:g} to {end:g}"
    return "" if start != start else text.replace("-", "−")


def recovered_shares() -> pd.Series:
    """The published share of the gap in %, by merge method (ViT-B/32; see `known_facts`)."""
    shares = {key.removeprefix("share: "): float(fact[1].split()[-1]) for key, fact in _FACTS.items() if "share" in key}
    return pd.Series(shares, name="published").rename_axis("method")
