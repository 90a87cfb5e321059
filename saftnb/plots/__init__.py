"""How it looks: one function a figure, tidy DataFrame in, matplotlib Figure out.

The same colour means the same recipe in every figure: the baseline is grey-blue, SAFT orange.
"""

from saftnb.plots.geometry import (
    alignment,
    alignment_heatmaps,
    block_linearity,
    disentanglement_maps,
    joint_losses,
    kept_entries,
    update_spectra,
)
from saftnb.plots.learning import coefficient_map, learned_by_pictures, learning_curves
from saftnb.plots.merging import (
    coefficient_curves,
    forest,
    interference,
    merging_comparison,
    recovered_shares,
    task_plane,
)
from saftnb.plots.spaces import EVERY_SPACE, effects, joint_task, knots_ablations, spaces_and_methods
from saftnb.plots.style import COLOURS, LABELS, MARKERS, STYLE, mako, pictures, use_style
from saftnb.plots.training import loss_planes, loss_slices, sharpness_by_task, training_curves

__all__ = [
    "COLOURS",
    "EVERY_SPACE",
    "LABELS",
    "MARKERS",
    "STYLE",
    "alignment",
    "alignment_heatmaps",
    "block_linearity",
    "coefficient_curves",
    "coefficient_map",
    "disentanglement_maps",
    "effects",
    "forest",
    "interference",
    "joint_losses",
    "joint_task",
    "kept_entries",
    "knots_ablations",
    "learned_by_pictures",
    "learning_curves",
    "loss_planes",
    "loss_slices",
    "mako",
    "merging_comparison",
    "pictures",
    "recovered_shares",
    "sharpness_by_task",
    "spaces_and_methods",
    "task_plane",
    "training_curves",
    "update_spectra",
    "use_style",
]
