"""Tests draw figures without a screen."""

import matplotlib as mpl

mpl.use("agg")
