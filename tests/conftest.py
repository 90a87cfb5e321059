"""Tests draw figures without a screen, and none fails for being slow."""

import matplotlib as mpl
from hypothesis import settings

mpl.use("agg")
settings.register_profile("saftnb", deadline=None)
settings.load_profile("saftnb")
