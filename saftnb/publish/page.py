"""One notebook as one HTML page that needs nothing but itself."""

import re
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import nbformat
from markupsafe import Markup
from nbconvert.exporters import TemplateExporter
from nbconvert.preprocessors import TagRemovePreprocessor

from saftnb.publish.outputs import read_outputs
from saftnb.publish.prose import read_prose
from saftnb.publish.tables import FILTERS
from saftnb.scrub import discreet

TURNS = re.compile("[\u202a-\u202e\u2066-\u2069]")
HIDDEN_TAGS = {"no-report", "papermill-error-cell-tag"}


class Pages:
    """Pages of the templates, without what is nobody's business; paths in `root` become relative."""

    def __init__(self, root: Path) -> None:
        self.clean, self.root = discreet([root]), root
        self.exporter = TemplateExporter(
            extra_template_basedirs=[str(files("saftnb.publish"))], template_name="report", file_extension=".html",
            optimistic_validation=True,
        )  # fmt: skip
        for each in (TagRemovePreprocessor(remove_cell_tags=HIDDEN_TAGS), read_prose, read_outputs):
            self.exporter.register_preprocessor(each, enabled=True)
        environment = self.exporter.environment
        environment.autoescape = environment.trim_blocks = environment.lstrip_blocks = True
        # All that the templates print is cleaned here and then escaped, but for what the sanitiser returned.
        environment.finalize = lambda value: value if isinstance(value, Markup) else self.clean(str(value))
        for name, each in (FILTERS | {"spaced": lambda name: self.clean(str(name)).replace("_", " ")}).items():
            self.exporter.register_filter(name, each)

    def notebook(self, path: Path, **values: Any) -> tuple[str, dict[str, Any]]:
        """The page of a notebook, and what was found in it: title, title_html, claim, figure. ValueError where it
        cannot be read. `code` says whether its code is shown, `changed` that it ran with other parameters than its own:
        cells tagged "committed-results" are then left out."""
        places = [path.parent, self.root / "notebooks", self.root / "notebooks" / "appendix"]
        found = {"title": path.parent.name, "title_html": "", "claim": "", "clean": self.clean, "places": places}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notebooks of older formats are fine to read
            try:
                html, found = self.exporter.from_notebook_node(nbformat.read(path, as_version=4), found | values)
            except Exception as error:  # nbformat raises many kinds, and a cell may be of another kind than it says
                raise ValueError(f"{path}: no page can be made of it ({type(error).__name__}: {error})") from error
        return _plain(html), found

    def page(self, template: str, **values: Any) -> str:
        """The page of any other template."""
        return _plain(self.exporter.environment.get_template(template).render(**values))


def _plain(html: str) -> str:
    """A page in which what turns the order of letters around is seen and turns nothing: text can otherwise be disguised
    as other text. Half a character, which JSON can hold, is no text."""
    html = TURNS.sub(lambda found: f"[U+{ord(found[0]):X}]", html)
    return html.encode("utf-8", "replace").decode("utf-8")
