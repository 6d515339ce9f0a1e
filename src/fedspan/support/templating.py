"""The template environment of every page, in which all that comes from outside is escaped."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from fedspan.support.errors import one_line

_FOLDER = "templates"


@cache
def environment(package: str, template: str, longest: int) -> Environment:
    """Return an environment with one page's template, and the `head.html` that all pages begin with.

    Parameters
    ----------
    package
        Holds the template in its folder `templates`.
    longest
        Characters of one text from outside, beyond which it is cut.
    """

    def printable(value: Any) -> Any:
        """Return a text in one line of printable characters; marks of direction would turn the page's own."""
        return one_line(value, longest) if type(value) is str and value else value

    sources = {template: read(package, template), "head.html": read("fedspan.reporting", "head.html")}
    return Environment(
        loader=DictLoader(sources),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=printable,
    )


def read(package: str, name: str) -> str:
    """Return a file of a package's templates."""
    return (resources.files(package) / _FOLDER / name).read_text(encoding="utf-8")
