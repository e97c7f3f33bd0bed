"""Fills in the templates beside this file. Text from anywhere is shown as it is and can do nothing to a page."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from lora_cli.errors import escaped


def render(template: str, **values: Any) -> str:
    """One HTML file that needs no other file, no script and no network.

    template: the name of a file in this folder. What the template does not find among the values is undefined: false,
    and empty where it is printed.
    """
    environment = Environment(
        loader=PackageLoader("lora_cli", "pages"),
        autoescape=True,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def _visible(value: Any) -> str:
    """What a template prints, with everything spelled out that would hide text or turn the direction of writing."""
    return value if isinstance(value, Markup) else "\n".join(map(escaped, str(value).split("\n")))
