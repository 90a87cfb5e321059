"""HTML for collaborators: runs as pages that carry everything they need, and an index of them."""

from saftnb.publish.index import publish_runs
from saftnb.publish.live import LiveReport

__all__ = ["LiveReport", "publish_runs"]
