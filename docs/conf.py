"""How Sphinx builds the documentation: `make docs`. Nothing is fetched, neither by the build nor by the pages."""

import re
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import reference_pages  # noqa: E402

from sightline import __version__  # noqa: E402

project = "sightline"
author = "The sightline authors"
copyright = "The sightline authors"
version = release = __version__
extensions = ["myst_parser", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nitpick_ignore_regex = [("py:.*", ".*")]  # names of types in signatures belong to other packages
suppress_warnings = ["ref.python"]  # types in signatures again: two modules have a class of the same name
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries = False
html_theme = "furo"
html_title = "sightline"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
html_theme_options = {"light_logo": "logo-light.svg", "dark_logo": "logo-dark.svg", "sidebar_hide_name": False}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def visit_math(self: Any, node: nodes.math) -> None:
    """Browsers draw MathML by themselves, so no page needs a script for formulas."""
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def visit_displayed_math(self: Any, node: nodes.math_block) -> None:
    self.body.append(tex2mathml(node.astext(), as_block=True))
    raise nodes.SkipNode


def write_pages(app: Sphinx) -> None:
    reference_pages.write()


def adapt(app: Sphinx, docname: str, source: list[str]) -> None:
    """Links to files of the repository lead to the pages that show them; `*` in a list of pages names all others."""
    path = DOCS / f"{docname}.md"
    if reference_pages.GENERATED not in path.parents:
        text = reference_pages.relinked(source[0], path, path)
        text = reference_pages.with_linked_rows(text) if docname.startswith("explanation/") else text
        source[0] = re.sub(r"^\*$", "\n".join(others(text, path)), text, flags=re.MULTILINE)


def others(text: str, index: Path) -> list[str]:
    """Pages beside an index page that its text does not list."""
    listed = [line for line in text.splitlines() if line != "*"]
    names = sorted(page.stem for page in index.parent.glob("*.md") if page != index)
    return [name for name in names if not any(fnmatch(name, line) for line in listed)]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displayed_math, None))
    app.connect("builder-inited", write_pages)
    app.connect("source-read", adapt)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
