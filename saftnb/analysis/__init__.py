"""Why it works: measurements of trained models. Every function returns a tidy DataFrame, or a few numbers."""

from saftnb.analysis.alignment import (
    kept_entries,
    layer_inputs,
    linear_cka,
    shared_directions,
    update_cka,
    update_spectra,
)
from saftnb.analysis.baselines import bag_of_words_accuracy, frozen_accuracy
from saftnb.analysis.calibration import calibrate, intervals, recovered_share
from saftnb.analysis.comparison import Comparison, compare
from saftnb.analysis.disentanglement import disentanglement_map, mean_inside_box
from saftnb.analysis.evidence import gain_intervals, paired_gains
from saftnb.analysis.linearity import block_features, cross_task_linearity, joint_loss, segment_curvature
from saftnb.analysis.loss_slices import ascent_direction, loss_slice, random_direction
from saftnb.analysis.sharpness import hessian_eigenvalues, lanczos, loss_plane, sam_sharpness

__all__ = [
    "Comparison",
    "ascent_direction",
    "bag_of_words_accuracy",
    "block_features",
    "calibrate",
    "compare",
    "cross_task_linearity",
    "disentanglement_map",
    "frozen_accuracy",
    "gain_intervals",
    "hessian_eigenvalues",
    "intervals",
    "joint_loss",
    "kept_entries",
    "lanczos",
    "layer_inputs",
    "linear_cka",
    "loss_plane",
    "loss_slice",
    "mean_inside_box",
    "paired_gains",
    "random_direction",
    "recovered_share",
    "sam_sharpness",
    "segment_curvature",
    "shared_directions",
    "update_cka",
    "update_spectra",
]
