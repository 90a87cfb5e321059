"""Write a copy of every notebook with thimble-sized parameters, or of each run of a grid, for nbval (see the Makefile).

The copies keep the committed outputs: nbval compares those of the cells tagged `nbval-check-output`, which state
invariants that hold at every size.
"""

import sys
from pathlib import Path

import nbformat
import papermill

from saftnb.batch.grid import load_grid

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
# What makes each notebook small. A notebook that is not named here is an error, so that none goes untested.
SIZES = {
    "00_merging_by_hand": {
        "suite": "thimble",
        "steps": 8,
        "one": "digits",
        "points": 3,
        "pictures": 20,
        "scales": [0.3, 1.0],
    },
    "01_sharpness_aware_finetuning": {
        "suite": "thimble",
        "steps": 8,
        "task": "patterns",
        "more_seeds": [1],
        "random_directions": 2,
        "line_pictures": 20,
    },
    "02_merging_comparison": {
        "suite": "thimble",
        "steps": 8,
        "recipes": ["sgd", "saft"],
        "search_pictures": 10,
        "test_pictures": 20,
        "seeds": [0],
        "scales": [0.1, 0.5],
        "ties_scales": [0.5],
        "keeps": [0.2],
        "drops": [0.5],
        "spectral_scales": [0.5],
        "statistics_pictures": 4,
    },
    "03_evidence": {"draws": 500},
    "04_weight_disentanglement": {
        "suite": "thimble",
        "steps": 8,
        "seeds": [0, 1],
        "pairs": ["digits+patterns"],
        "cells": 3,
        "pictures": 20,
    },
    "05_cross_task_linearity": {"suite": "thimble", "steps": 8, "seeds": [0, 1], "pictures": 10},
    "06_joint_loss_linearity": {
        "suite": "thimble",
        "steps": 8,
        "seeds": [0, 1],
        "pairs": ["digits+patterns"],
        "points": 3,
        "pictures": 20,
        "curvature_pictures": 10,
        "lanczos_steps": 3,
    },
    "07_sharpness": {
        "suite": "thimble",
        "steps": 8,
        "seeds": [0, 1],
        "pair": "digits+patterns",
        "hessian_pictures": 10,
        "lanczos_steps": 3,
        "radii": [0.05],
        "asam_radii": [0.5],
        "rise_pictures": 20,
        "grid": 3,
        "plane_pictures": 10,
    },
    "08_lora_merging": {
        "suite": "thimble",
        "steps": 8,
        "seeds": [0, 1],
        "scales": [0.3, 1.0],
        "keeps": [0.2],
        "drops": [0.5],
        "draws": [0],
        "spectral_scales": [0.5],
        "densities": [0.5],
        "search_pictures": 20,
        "statistics_pictures": 4,
        "test_pictures": 40,
    },
    "09_joint_task": {
        "suite": "thimble",
        "steps": 8,
        "seeds": [0],
        "scales": [0.3, 1.0],
        "keeps": [0.2],
        "drops": [0.5],
        "draws": [0],
    },
    "10_alignment": {"suite": "thimble", "steps": 8, "seeds": [0, 1], "pictures": 3, "tokens": 100},
    "11_knots_ablations": {
        "suite": "thimble",
        "steps": 8,
        "seeds": [0],
        "ranks": [2, 16],
        "subset_sizes": [2],
        "scales": [0.3, 1.0],
        "keeps": [0.2],
        "test_pictures": 40,
    },
    "12_flat_and_aligned": {
        "suite": "thimble",
        "steps": 8,
        "seeds": [0, 1],
        "scales": [0.3, 1.0],
        "keeps": [0.2],
        "drops": [0.5],
        "draws": [0],
        "search_pictures": 20,
        "test_pictures": 40,
    },
    "13_nli": {
        "suite": "thimble-nli",
        "steps": 4,
        "seeds": [0],
        "methods": ["task_arithmetic", "ties", "dare_ties", "iso_c"],
        "scales": [0.3, 1.0],
        "keeps": [0.2],
        "drops": [0.5],
        "draws": [0],
        "spectral_scales": [1.0],
        "search_pairs": 6,
        "test_pairs": 12,
        "baseline_pairs": 24,
    },
    "14_learned_merging": {
        "suite": "thimble",
        "steps": 8,
        "seeds": [0],
        "pools": [4, 0],
        "kinds": ["channel", "weights"],
        "learn_steps": 2,
        "scales": [0.3, 0.5],
        "spectral_scales": [0.5],
        "keeps": [0.3],
        "statistics_pictures": 4,
        "test_pictures": 40,
    },
    "15_pocket_and_published": {"draws": 500},
    "appendix/finetune_task": {"suite": "thimble"},
    "appendix/backbone_seed": {
        "suite": "thimble",
        "methods": ["average", "task_arithmetic", "ties", "tsv_m", "regmean"],
        "scales": [0.1, 0.5],
        "ties_scales": [0.5],
        "keeps": [0.2],
        "spectral_scales": [1.0],
        "learned": ["parameter"],
        "learn_steps": 2,
        "statistics_pictures": 4,
    },
    "appendix/evidence_seed": {
        "suite": "thimble",
        "scales": [0.1, 0.5],
        "ties_scales": [0.5],
        "keeps": [0.2],
        "subset_sizes": [2],
        "subset_scales": [0.3],
    },
    "appendix/evidence_spectral": {"suite": "thimble", "scales": [0.5, 1.0]},
    "appendix/recipe_search": {
        "suite": "thimble",
        "tasks": ["digits"],
        "steps": 5,
        "rates": [1e-3],
        "ft_rates": [1e-3],
        "lora_rates": [1e-3],
        "more_rates": [],
        "decays": [0.1],
        "saft_radii": [0.2],
        "sam_radii": [0.05],
        "kwon_radii": [0.1],
    },
    "appendix/learning_search": {
        "suite": "thimble",
        "kinds": ["channel", "weights"],
        "rates": [0.03],
        "weight_rates": [1e-3],
        "pools": [4, 20],
        "radii": [0.5],
        "steps": 2,
    },
    "appendix/pretrain_pocket_clip": {"size": "thimble"},
}


def notebooks() -> list[Path]:
    return sorted(path for path in NOTEBOOKS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def check(path: Path) -> None:
    """A notebook has outputs, a parameters cell and one to three compared cells."""
    cells = nbformat.read(path, as_version=4).cells
    tags = [tag for cell in cells for tag in cell.metadata.get("tags", [])]
    compared = [cell for cell in cells if "nbval-check-output" in cell.metadata.get("tags", [])]
    if tags.count("parameters") != 1:
        sys.exit(f"{path.name}: needs exactly one cell tagged 'parameters'")
    if not 1 <= len(compared) <= 3 or not all(cell.outputs for cell in compared):
        sys.exit(f"{path.name}: needs one to three cells tagged 'nbval-check-output', with outputs (make notebooks)")


def main(folder: Path, seeds: Path) -> None:
    """`seeds` is the folder of the runs that 03_evidence and 15_pocket_and_published read, see thimble-seeds.yaml."""
    here = str(seeds.absolute())
    sizes = SIZES | {"03_evidence": SIZES["03_evidence"] | {"results": here, "regime": here}}
    sizes["15_pocket_and_published"] = SIZES["15_pocket_and_published"] | {"results": here}
    for path in notebooks():
        name = path.relative_to(NOTEBOOKS).with_suffix("").as_posix()
        if name not in SIZES:
            sys.exit(f"{name}: has no thimble size in tests/tools/thimble_notebooks.py")
        check(path)
        target = folder / f"{name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        papermill.execute_notebook(path, target, sizes[name], prepare_only=True, progress_bar=False)


def write_runs(folder: Path, grid: Path) -> None:
    """A copy for each run of a grid."""
    folder.mkdir(parents=True, exist_ok=True)
    for run in load_grid(grid).runs:
        papermill.execute_notebook(
            run.notebook.path, folder / f"{run.id}.ipynb", run.overrides, prepare_only=True, progress_bar=False
        )


if __name__ == "__main__":
    folder, source = map(Path, sys.argv[1:3])
    (write_runs if source.suffix == ".yaml" else main)(folder, source)
