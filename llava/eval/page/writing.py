"""Writes the page: sections into HTML that needs nothing beside itself, and their tables into Markdown and LaTeX."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llava.eval.page.parts import Section

_PLACES = PackageLoader("llava.eval.page", "templates")
_TEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "→": r"$\to$", "−": "$-$"},
    **{
        "…": r"\ldots{}",
        "–": "--",
        "’": "'",
        "“": "``",
        "”": "''",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
    },
}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|~])")


def html(title: str, sections: Sequence[Section]) -> str:
    """The page. What stands in answers is text there and never markup, and no script but the page's own runs."""
    environment = Environment(
        loader=_PLACES, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["name"] = identifier
    script, style = (Markup(environment.get_template(name).render()) for name in ("script.js", "style.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html").render(
        title=title, sections=sections, script=script, style=style, digest=digest
    )


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The tables in GitHub's Markdown."""
    return _text("report.md", markdown_text, title, sections)


def latex(title: str, sections: Sequence[Section]) -> str:
    """The tables in LaTeX, to be taken over by ``\\input``; they need no package."""
    return _text("report.tex", latex_text, title, sections)


def _text(name: str, escaped: Callable[[str], str], title: str, sections: Sequence[Section]) -> str:
    def finalize(value: Any) -> Any:
        return value if isinstance(value, int) else escaped(str(value))

    environment = Environment(
        loader=_PLACES,
        autoescape=False,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
    )
    environment.filters["name"] = identifier
    return environment.get_template(name).render(title=title, sections=sections)


def markdown_text(text: str) -> str:
    """Text as itself in Markdown, also inside a table."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def latex_text(text: str) -> str:
    """Text as itself in LaTeX."""
    return "".join(_TEX.get(letter, letter) for letter in " ".join(text.split()))


def identifier(text: str) -> str:
    """A text as the name of a place on the page."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text)
