"""A report on data as one HTML file that needs nothing else: light and dark, and readable on a telephone."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from .terminal import ROLES, facts, verdict


def page(data: dict[str, Any], command: str) -> str:
    """The whole page. ``command``: what made it."""
    from jinja2 import Environment

    source = files("luthier").joinpath("assets/findings.html.jinja").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    most = max((b["rows"] for b in data["histogram"]), default=1)
    return template.render(d=data, facts=list(facts(data)), verdict=verdict(data), roles=ROLES, most=most, command=command)
