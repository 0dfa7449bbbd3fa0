"""How the site is built: `make docs`. Nothing on its pages comes from elsewhere."""

import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging
from sphinx_gallery.sorting import ExplicitOrder

import fisherlab

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402

logger = logging.getLogger(__name__)

project = "fisherlab"
author = "the authors of fisherlab"
release = fisherlab.__version__
exclude_patterns = [
    "gallery",
    "generated/gallery/**/*.ipynb",
    "**/sg_execution_times.rst",
    "generated/verdict.md",
    "REPRODUCTION.md",
]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.githubpages",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are committed executed
nb_ipywidgets_js = {}

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "generated/gallery",
    "subsection_order": ExplicitOrder(
        [f"gallery/{name}" for name in ("errors", "matrices", "purposes", "training")]
    ),
    "abort_on_example_error": True,
    "capture_repr": (),  # what a script returns is its figure
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1e9,
    "plot_gallery": "True",
}

html_theme = "furo"
html_title = f"fisherlab {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_search_summary = False  # it fetches pages, which a browser refuses to a folder
html_show_sphinx = html_show_copyright = False
html_math_renderer = "mathml"

# What docstrings write in plain characters, in the commands that the translator knows.
COMMANDS = {
    "⊗": r"\otimes ",
    "‖": r"\Vert ",
    "½": r"\tfrac{1}{2}",
    "∇": r"\nabla ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "Σ̂": r"\hat{Σ}",
    "F̂": r"\hat{F}",
    r"\textstyle": "",
}


def in_commands(text):
    """Write a formula in the commands that docutils translates to MathML."""
    text = re.sub(r"\\[bB]ig\b", "", text)
    text = re.sub(r"\\(t?frac)(\w)(\w)", r"\\\1{\2}{\3}", text)
    for plain, command in COMMANDS.items():
        text = text.replace(plain, command)
    return text


def formula(writer, node):
    """Write a formula as MathML, which browsers draw themselves, without scripts."""
    shown = isinstance(node, nodes.math_block)
    try:
        made = tex2mathml(in_commands(node.astext()), as_block=shown)
    except MathError as error:
        logger.warning("%s: %s", error, node.astext(), location=node)
        raise nodes.SkipNode from error
    writer.body.append(f'<div class="formula">{made}</div>' if shown else made)
    raise nodes.SkipNode


def keep_bars(app, what, name, value, options, lines):
    """Leave the bars of |x| and ‖x‖ to formulas; reStructuredText would substitute."""
    lines[:] = [generate.plain(line) for line in lines]


def setup(app):
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("autodoc-process-docstring", keep_bars)
    app.connect("builder-inited", lambda app: generate.write(HERE / "generated"))
