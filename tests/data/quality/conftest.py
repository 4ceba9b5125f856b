"""Files with planted faults, and what a check says of them."""

from __future__ import annotations

import json

import pytest

from luthier.data.inspection import Inspection, Report
from luthier.data.prepare import Reader
from luthier.data.quality import Finding, Setting
from luthier.data.rows import Form
from luthier.data.steps import File
from tests.data.conftest import CHATML, byte_bpe

TOPICS = ["rivers", "bridges", "violins", "harbours", "engines", "gardens", "winters", "markets", "lanterns", "orchards", "kitchens", "glaciers"]
ACTS = ["cross", "repair", "tune", "visit", "start", "water", "survive", "open", "light", "prune", "clean", "measure"]


def good(i: int) -> dict:
    """A row with nothing wrong, unlike any other."""
    a, b, c = TOPICS[i % 12], ACTS[(i // 12) % 12], TOPICS[(i * 5 + i // 144 + 1) % 12]
    return {
        "prompt": f"In town {i * 37 % 1009}, how would a visitor {b} the {a} near {c} number {i}?",
        "completion": f"Walk {i * 13 % 97} steps past {c}, {b} what you find, then ask person {i * 7919 % 10007} about {a} until {i % 24} o'clock.",
    }


class Checked:
    """The findings of a report by name, each with its lines."""

    def __init__(self, inspection: Inspection, report: Report):
        self.inspection, self.report = inspection, report
        self.findings: dict[str, Finding] = {f.name: f for f in report.findings}

    def lines(self, name: str) -> list[int]:
        return [self.line(i) for i in self.findings[name].hits.rows]

    def beside(self, name: str) -> list[int]:
        return [self.line(i) for i in self.findings[name].hits.beside]

    def line(self, index: int) -> int:
        return int(self.report.places[index].rpartition(":")[2])

    def severities(self) -> dict[str, str]:
        return {name: f.severity for name, f in self.findings.items()}


@pytest.fixture
def write(tmp_path):
    def write(rows, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def check(write):
    def check(rows, *, tokenizer=None, renders="chat", held=(), max_tokens=512, over_length="truncate", template=None, near=0.8, name="train.jsonl", **how):
        tokenizer = tokenizer or byte_bpe(template=CHATML, eos="<|im_end|>")
        files = [File(str(write(rows, name)), "train", "")]
        files += [File(str(write(r, f"{role}.jsonl")), role, "") for role, r in dict(held).items()]
        made = {"renders": renders, "form": Form(), "max_tokens": max_tokens, "over_length": over_length, "template": template, **how}
        reader = Reader(tokenizer, **made)
        setting = Setting(
            renderer=reader.how.renderer, renders=renders, form=Form(), max_tokens=max_tokens, over_length=over_length, positions=2048, near=near,
            expected=len(rows),
        )  # fmt: skip
        inspection = Inspection(files, reader, setting)
        return Checked(inspection, inspection.run())

    return check
