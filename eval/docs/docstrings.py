# SPDX-License-Identifier: Apache-2.0
"""Docstrings of this house in parts, and as Markdown."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

SENTENCE = re.compile(r"(?:(?<=[.:?!])|(?<=\.\)))\s+(?=[A-Z`\[(])")
ABBREVIATED = re.compile(r"(\bet al|\be\.g|\bi\.e|\bvs)\.$")
ABOUT_PAPER = (
    "In the reference",
    "The reference ",
    "As in the code",
    "The paper ",
    "Departs from",
)
ALIGNED = re.compile(r"^(?P<name>\w[\w@, ]*?) (?P<text>\S.*)$")
"""The longest name of a list, behind which there is one space."""
DEFINED = re.compile(r"^(?P<name>\w[\w@, ]*?)(?: {2,}|\t)(?P<text>\S.*)$")


MEANS = r"(?:: | {2,})(?=\S)"
"""What stands between a name and its meaning."""


@dataclass
class Parts:
    """A docstring of a method. idea: one sentence or two; paper: the sentences that name it; body: paragraphs of how it works."""

    idea: str
    paper: str = ""
    body: list[str] = field(default_factory=list)
    cost: str = ""
    departs: str = ""


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph; names and numbers with points stay whole."""
    found: list[str] = []
    for piece in SENTENCE.split(" ".join(text.split())):
        if found and (ABBREVIATED.search(found[-1]) or found[-1].endswith(":") or found[-1].count('"') % 2):
            found[-1] += f" {piece}"
        else:
            found.append(piece)
    return found


def parts_of(doc: str) -> Parts:
    """The parts of a docstring: cost is what sentences say that begin with "Cost"; a paragraph is about the paper from its first
    sentence on that begins so, and paragraphs with definitions stay as they are."""
    first, *rest = re.split(r"\n\s*\n", inspect.cleandoc(doc))
    opening = sentences(first)
    parts = Parts(" ".join(s for s in opening[:2] if not s.startswith("Cost")))
    queue = [" ".join(opening[2:]), *rest] if len(opening) > 2 else rest
    parts.cost = " ".join(s for s in opening[:2] if s.startswith("Cost"))
    for paragraph in filter(None, queue):
        if any(DEFINED.match(line) for line in paragraph.splitlines()):
            parts.body.append(paragraph)
            continue
        left: list[str] = []
        departing = False
        for sentence in sentences(paragraph):
            departing = departing or sentence.startswith(ABOUT_PAPER)
            if sentence.startswith("Cost"):
                parts.cost = f"{parts.cost} {sentence}".strip()
                departing = False
            elif departing:
                parts.departs = f"{parts.departs} {sentence}".strip()
            elif not parts.paper and re.search(r"arXiv|preprint|baseline", sentence):
                parts.paper = sentence
            else:
                left.append(sentence)
        parts.body += [" ".join(left)] if left else []
    return parts


def meaning(option: str, docs: Sequence[str]) -> str:
    """What docstrings say of an option: where it is defined ("name: text", or in a list), else the first sentence that names it."""
    for doc in docs:
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
            flat = " ".join(line.strip() for line in paragraph.splitlines())
            if found := re.search(rf"(?:^|(?<=[.;:] )){option}{MEANS}", flat):
                rest = flat[found.end() :]
                end = re.search(rf"(?<=[.;]) [a-z_]+{MEANS}| Departs from| Cost", rest)
                return rest[: end.start() if end else None].rstrip("; ")
    told = (s for doc in docs for s in sentences(doc) if f"`{option}`" in s or f"`{option}=" in s)
    return next(told, "")


def as_markdown(doc: str) -> str:
    """A docstring as Markdown: lines of the form `name   text`, with what is indented below, become items of a list."""
    found: list[str] = []
    column = 0
    for line in textwrap.dedent(doc).splitlines():
        match = DEFINED.match(line) or _aligned(line, column)
        column = match.start("text") if match else column if line.startswith(" ") else 0
        if match:
            if found and found[-1] and not found[-1].startswith(("* ", "  ")):
                found.append("")
            found.append(f"* **{match['name']}** {match['text']}")
        elif line.startswith(" ") and found and found[-1].startswith(("* ", "  ")):
            found.append(f"  {line.strip()}")
        else:
            if line and found and found[-1].startswith(("* ", "  ")):
                found.append("")
            found.append(line)
    return "\n".join(found)


def _aligned(line: str, column: int) -> re.Match[str] | None:
    """A line whose name fills what is before the column of the texts above it."""
    found = ALIGNED.match(line) if column else None
    return found if found and found.start("text") == column else None
