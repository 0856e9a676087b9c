"""Sphinx: `make docs` makes pages of the docstrings and of the executed examples, in build/docs/index.html."""

import sortkd_kernels

project = "sortkd_kernels"
version = release = sortkd_kernels.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
html_theme_options = {
    "description": "Logit distillation as one fused kernel",
    "page_width": "1320px",
    "body_max_width": "1060px",  # the code's 120 columns
}
# A reference to nothing is an error under -W; torch's and Python's own pages are not looked up.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|collections|typing)\..*|Tensor|nn\.Module")]
