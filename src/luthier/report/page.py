"""report.html: everything about a run on one page, in one file, with nothing fetched and nothing run. Sections are in sections.py."""

from __future__ import annotations

from pathlib import Path

from .. import __version__, atomic
from . import sections
from .facts import Facts, read
from .sections import e
from .style import CSS

FILE = "report.html"


def write(folder: Path) -> Path:
    """Read a run's folder and write its report. Raises LuthierError where it is no run, or cannot be written."""
    path = folder / FILE
    atomic.text(path, html(read(folder)))
    return path


def html(facts: Facts) -> str:
    """The page."""
    parts = [
        sections.head(facts),
        sections.verdict(facts),
        *(
            f'<section aria-label="{e(title)}"><h2>{e(title)}</h2>{body}</section>'
            for title, body in (
                ("Before and after", sections.before_after(facts)),
                ("Data", sections.data(facts)),
                ("What the model sees", sections.examples(facts)),
                ("Curves", sections.curves(facts)),
                ("Prompts that were tried", sections.candidates(facts)),
                ("Target against retention", sections.retention(facts)),
                ("Samples, before and after", sections.samples(facts)),
                ("What was trained", sections.parameters(facts)),
                ("Memory and time: predicted and measured", sections.memory(facts)),
                ("Files", sections.files(facts)),
                ("Environment", sections.environment(facts)),
                ("What to do next", sections.following(facts)),
            )
            if body
        ),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{e(facts.name)} · luthier</title><style>{CSS}</style></head>\n<body>'
        + "\n".join(parts)
        + f'\n<footer><p class="soft small">Written by luthier {e(__version__)} from the files in this folder.</p></footer></body></html>\n'
    )
