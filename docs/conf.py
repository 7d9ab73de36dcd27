"""How Sphinx builds these pages; warnings are errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import doraxp

sys.path.insert(0, str(Path(__file__).parent))  # for the extensions of these pages

project = "doraxp"
author = "the doraxp authors"
copyright = f"2026, {author}"
version = release = doraxp.__version__
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "api_tables",
    "crossrefs",
    "dark_pictures",
    "typeset",
]
html_theme = "furo"
html_title = f"doraxp {release}"
html_short_title = "doraxp"
html_permalinks = True
html_copy_source = False  # the pages have no links to their sources: no address of these is known
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5cad", "color-brand-content": "#0b5cad"},
    "dark_css_variables": {"color-brand-primary": "#7db8f7", "color-brand-content": "#7db8f7"},
    "top_of_page_buttons": [],
}
html_static_path = ["_static"]
html_css_files = ["doraxp.css"]
html_math_renderer = "mathml"
templates_path = ["_templates"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_mock_imports = ["jax", "torch"]  # the bridges are described without them
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
autosummary_context = {
    "shown": {  # of classes whose other members are explained by the class
        "doraxp.AdamW": "step, settings",
        "doraxp.Convolution": "apply, transpose, weight_gradient",
        "doraxp.Embedding": "apply, transpose, weight_gradient",
        "doraxp.MatMul": "apply, transpose, weight_gradient",
        "doraxp.SGD": "step, settings",
        "doraxp.Schedule": "settings, from_settings",
        "doraxp.backends.Dense": "v",
        "doraxp.backends.Factored": "",
        "doraxp.checkpoint.AdapterSet": "",
        "doraxp.checkpoint.CheckpointError": "",
        "doraxp.checkpoint.Merge": "",
        "doraxp.checkpoint.Model": "",
        "doraxp.checkpoint.Options": "",
        "doraxp.checkpoint.Training": "resume",
        "doraxp.torch.Accelerated": "layers, left, restore",
        "doraxp.torch.DoRALinear": "forward, merge, adapter",
    },
    "with_inherited": ["doraxp.AdamW", "doraxp.DoRALayer", "doraxp.SGD"],
}
napoleon_google_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_use_ivar = True

default_role = "code"  # `name` in a docstring
nitpick_ignore_regex = [
    ("py:.*", r"(?!doraxp\b).*"),  # of other libraries: the pages are built without a network
    # Types that users never name, so that the reference has no page for them.
    ("py:class", r"doraxp\._base\.types\.(AdamW\w+|Array|Namespace)"),
    ("py:class", r"doraxp\._core\.(operated\.Through|updates\.Update)"),
    ("py:class", r"doraxp\.backends\._direction\.Arithmetic"),
    ("py:class", r"doraxp\.backends\._generic\.\w+Gradients"),
    ("py:class", r"doraxp\.backends\._rows\.RowOperations"),
    ("py:class", r"doraxp\.checkpoint\._quantised\.protocol\.\w+"),
    ("py:class", r"doraxp\.checkpoint\._(adapters\.StoredLayer|rows\.Term|safetensors\.\w+)"),
    ("py:class", r"doraxp\.optim\._trees\.Params"),
]
suppress_warnings = ["ref.python"]  # a `weight` is an attribute of several classes

DESCRIPTION = (
    "doraxp: DoRA, weight-decomposed low-rank adaptation, for the Python array API. Train adapters "
    "on NumPy, PyTorch, JAX or CuPy, and merge them into models of any size."
)


def describe(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Give a page the description that search engines show."""
    tag = f'<meta name="description" content="{DESCRIPTION}">'
    context["metatags"] = context.get("metatags", "") + tag


def setup(app: Any) -> None:
    """Let Sphinx call `describe` with each page."""
    app.connect("html-page-context", describe)
