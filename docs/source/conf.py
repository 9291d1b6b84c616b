#   Copyright 2026 - present The PyMC Developers
#
#   Licensed under the Apache License, Version 2.0 (the "License");
#   you may not use this file except in compliance with the License.
#   You may obtain a copy of the License at
#
#       http://www.apache.org/licenses/LICENSE-2.0
#
#   Unless required by applicable law or agreed to in writing, software
#   distributed under the License is distributed on an "AS IS" BASIS,
#   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
#   See the License for the specific language governing permissions and
#   limitations under the License.
"""Settings of Sphinx, as in PyMC's own documentation; they need no network.

As there, headings get no anchors from MyST, so that pages link to pages, not to parts of them.
"""

from importlib.metadata import version as version_of

project = "Streaming variational inference for PyMC"
author = "The PyMC Developers"
copyright = "2026 - present The PyMC Developers"
version = release = version_of("pymc-streaming")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_design",
]

exclude_patterns = ["results"]  # tables in it are parts of pages

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autosummary_generate = False
toc_object_entries_show_parents = "hide"
numpydoc_show_class_members = False

myst_enable_extensions = ["colon_fence", "deflist"]

# PyMC's own names, which its documentation has; a link to them would need the network.
nitpick_ignore_regex = [
    ("py:.*", r"pymc\.(?!variational\.streaming).*"),
    ("py:.*", r"Inference\.\w+"),
]

html_theme = "pydata_sphinx_theme"
html_title = "PyMC streaming"
templates_path = ["_templates"]
html_sidebars = {"**": ["all-pages.html"]}
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sourcelink = False
html_theme_options = {
    "navbar_center": [],
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
