"""The documentation: pages in Markdown, API pages from the docstrings, the command line from its own parser.

pip install ".[docs]" && sphinx-build -W --keep-going -n docs docs/_build
"""

import os
import re
from argparse import _SubParsersAction
from importlib import metadata
from unittest.mock import patch

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.utils import unescape
from sphinx.domains.python import PyXRefRole

project = "streamcnn"
author = copyright = "The streamcnn developers"
release = metadata.version("streamcnn")
extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"streamcnn {release}"

# types stand in the docstrings, as people write them
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
# `name` in a docstring is a link where there is such a page, and code where there is none, which is no error then
default_role = "name-or-code"
nitpick_ignore_regex = [("py:obj", ".*")]


class CommandHelp(Directive):
    """What `streamcnn --help` prints, or with an argument `streamcnn COMMAND --help`."""

    optional_arguments = 1

    def run(self):
        from streamcnn.cli import build_parser

        parser = build_parser()
        if self.arguments:
            commands = next(action for action in parser._actions if isinstance(action, _SubParsersAction))
            parser = commands.choices[self.arguments[0]]
        # as in a window as wide as the page, without colours
        with patch.dict(os.environ, {"COLUMNS": "86", "NO_COLOR": "1"}):
            text = parser.format_help()
        return [nodes.literal_block(text, text, language="text")]


def name_or_code(name, rawtext, text, lineno, inliner, options=None, content=()):
    """The role: a reference of the Python domain, which would take the dot away of `.h5`, for nothing but names."""
    if re.fullmatch(r"[A-Za-z_][\w.]*", text):
        return PyXRefRole()("py:obj", rawtext, text, lineno, inliner, options or {}, content)
    return [nodes.literal(rawtext, unescape(text))], []


def resolve_public_name(app, env, node, contnode):
    """Where a docstring of another module says `open_images`, `streamcnn.open_images` is meant."""
    if node.get("reftype") != "obj":
        return None
    return env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, "obj", f"streamcnn.{node['reftarget']}", node, contnode)


def setup(app):
    """Called by Sphinx."""
    app.add_directive("command-help", CommandHelp)
    app.add_role("name-or-code", name_or_code)
    app.connect("missing-reference", resolve_public_name)
