"""Why it works: measurements of trained models. Every function returns a tidy DataFrame."""

from saftnb.analysis.loss_slices import ascent_direction, loss_slice, random_direction

__all__ = ["ascent_direction", "loss_slice", "random_direction"]
