# SPDX-License-Identifier: Apache-2.0
"""What every image-text and multimodal architecture of transformers takes, as the crossed test of this project found it on tiny
random models.

The table is `assets/architectures.json`, written by `python -m tests.architectures --write` and compared in every run of the tests.
"""

from __future__ import annotations

import functools
import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import assets
from .runtime.adapter import OF_CLS, OF_PATCHES, Adapter

FILE = Path(assets.__file__).with_name("architectures.json")
CHECKPOINTS = Path(assets.__file__).with_name("checkpoints.json")
"""A few checkpoints of each model type: those that the documentation of transformers names, and sizes of the same release."""
NEWEST = "5.24"
"""The transformers that the table was written with."""
GROUPS = {"CLS": OF_CLS, "patches": OF_PATCHES, "features": frozenset({"encoder_features"})}
"""Signals of a vision encoder, in a word: attention of a CLS token, attention among patches, and features."""

REASONS = {
    "tower": ("is not known to mmcompress", "nothing is known of its vision encoder"),
    "no encoder": ("has no vision encoder", "it has no vision encoder: every patch is a token"),
    "more features": (
        "puts more than the features of this vision encoder together",
        "its projector takes more than the features of one vision encoder: attention among patches, but none of those features",
    ),
    "pooling": (
        "pooled by attention from patches of overlapping crops",
        "its tokens are pooled by attention from patches of overlapping crops: stages behind the encoder only",
    ),
    "one table": (
        "one table of rotations for all pictures",
        "its vision encoder has one table of rotations for all pictures, so none can be shorter: stages behind it only",
    ),
    "two encoders": (
        "one of two vision encoders",
        "two vision encoders give each token: none of them can merge tokens",
    ),
    "class tokens": (
        "with a class token in front of each",
        "its pictures are packed into one row with a class token in front of each, among which nothing is merged",
    ),
    "states": (
        "whose state cannot forget tokens",
        "its language model has layers whose state cannot forget tokens: stages before it only",
    ),
    "indexers": (
        "has indexers, which choose",
        "indexers choose the tokens that a query sees: stages before the language model only",
    ),
    "windows": (
        "how far back they look is of a form that is not known",
        "some of its layers look back only so far, in a form that layer stages do not know: stages before it only",
    ),
    "stock": (
        "does not run in stock transformers",
        "it does not run in stock transformers 5.24, so nothing could be tried",
    ),
    "shared": (
        "share keys and values with earlier ones",
        "its layers share keys and values with earlier ones: stages before the language model only",
    ),
    "streams": (
        "has several residual streams",
        "its language model has several residual streams, which are not cut: stages before it only",
    ),
    "attention": (
        "which was compared with the module's own",
        "its attention is of a form that was compared and not matched: stages before the language model only",
    ),
    "cross-attention": (
        "looks at pictures by cross-attention",
        "its language model looks at pictures by cross-attention: no visual tokens stand in its prompt",
    ),
    "encoder-decoder": (
        "is an encoder-decoder",
        "it is an encoder-decoder: no visual tokens stand in the prompt of its decoder",
    ),
    "no pictures": ("takes no pictures", "it takes no pictures and no audio"),
    "no videos": ("no videos", "it takes no videos"),
    "no audio": ("no audio of which tokens", "it takes no audio"),
    "audio only": ("takes audio: name", 'it takes audio and no pictures: on="audio"'),
    "inside": ("it wraps the model that sees", "it wraps the model that sees: compress that one (model.thinker)"),
    "own decoder": (
        "is itself the decoder",
        "its base model is itself the decoder and puts features among its embeddings inside its forward pass",
    ),
    "own generate": (
        "its own generate() runs",
        "its own generate() runs the language model by itself, with features among the embeddings already",
    ),
    "features apart": (
        "is given features apart from the tokens",
        "its language model is given features apart from the tokens and puts them together itself",
    ),
    "no decoder": ("no decoder apart", "its base model has no decoder apart that is given embeddings"),
    "no placeholder": (
        "no token of its prompts stands for a",
        "no token of its prompts stands for a visual token, or a part of its sounds",
    ),
    "no features": (
        "encodes pictures inside its forward pass",
        "it encodes pictures inside its forward pass, not by a method of its own",
    ),
    "deepstack": (
        "enter layers of the language model in a form that is not supported",
        "its features enter layers of the language model in a form that is not supported",
    ),
}
"""Why an architecture takes no stages of a kind, in a word: a part of what `compress` says, and a sentence for tables."""


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """By model type: for each kind of stage "ok" or a word of REASONS; `signals`, words of GROUPS; `positions`, the policies;
    `task`, if transformers does not list it for pictures and text."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def facts(adapter: Any) -> dict[str, Any]:
    """What an adapter says of its model, as it stands in the table: `signals` and `positions`."""
    if not isinstance(adapter, Adapter):
        return {"signals": [], "positions": []}
    return {
        "signals": [word for word, names in GROUPS.items() if names & adapter.signals],
        "positions": ["keep", "reindex"] if adapter.reindexes else ["keep"],
    }


COLUMNS = {
    "input": "before the LLM",
    "video": "videos",
    "audio": "audio",
    "layer": "in the LLM",
    "encoder": "in the encoder",
}
"""Kinds of stages that are judged, as headings."""
ABSENT = ("no videos", "no audio")


@dataclass(frozen=True)
class Architecture:
    """A row of the table, and a few checkpoints that it serves."""

    name: str
    row: dict[str, Any]
    checkpoints: tuple[str, ...]

    @property
    def image_text(self) -> bool:
        """Whether transformers lists it for pictures and text; else for more modalities alone."""
        return bool("task" not in self.row)

    def cell(self, kind: str) -> str:
        """ "yes", "-" where there is nothing of the kind, or a word of REASONS."""
        verdict = self.row.get(kind, "-")
        return "yes" if verdict == "ok" else "-" if verdict in ABSENT else verdict

    @property
    def cells(self) -> list[str]:
        """All columns, a reason that holds for everything said once."""
        found = [self.cell(kind) for kind in COLUMNS]
        rest = ["-" if cell == found[0] != "yes" else cell for cell in found[1:]]
        signals = ", ".join(self.row["signals"]) if self.row.get("signal") == "ok" else "-"
        return [found[0], *rest, signals, ", ".join(self.row["positions"]) if "yes" in found else "-"]

    def matches(self, word: str) -> bool:
        return word.lower() in " ".join((self.name, *self.checkpoints)).lower()


def architectures(words: Sequence[str] = ()) -> list[Architecture]:
    """All of the table, or those whose name or checkpoints contain one of `words`."""
    known = json.loads(CHECKPOINTS.read_text())
    found = [Architecture(name, row, tuple(known.get(name, ()))) for name, row in sorted(table().items())]
    return [one for one in found if not words or any(map(one.matches, words))]


HEADINGS = ("architecture", "checkpoints", *COLUMNS.values(), "signals", "positions")


def counts(found: Sequence[Architecture]) -> str:
    """How many take each kind of stage, of those that have what it acts on; but for audio, of image-text architectures."""
    parts = []
    for kind, heading in (*COLUMNS.items(), ("signal", "signals of the encoder")):
        verdicts = [one.row.get(kind, ABSENT[0]) for one in found if one.image_text or kind == "audio"]
        judged = [verdict for verdict in verdicts if verdict not in ABSENT]
        if judged:
            parts.append(f"{heading} {judged.count('ok')} of {len(judged)}")
    return "; ".join(parts)


def summary() -> str:
    """Counts, and the reasons of all others: a paragraph of docs/models.md."""
    found = architectures()
    seeing = [one for one in found if one.image_text]
    reasons = Counter(one.row["input"] for one in seeing if one.row["input"] != "ok")
    later = Counter(one.row["layer"] for one in seeing if one.row["input"] == "ok" != one.row["layer"])

    hearing = f", and {len(found) - len(seeing)} that hear," if len(found) > len(seeing) else ""

    def listed(counted: Counter[str]) -> str:
        return ", ".join(f"{word} {number}" for word, number in counted.most_common())

    lines = (
        f"All {len(seeing)} image-text architectures of transformers {NEWEST}{hearing} are judged as tiny random models "
        f"(`python -m tests.architectures`, a test). Exact: {counts(found)}. All others are refused by `compress` with the "
        f"reason ({listed(reasons)}; in the LLM also {listed(later)})."
    )
    return textwrap.fill(lines, 140, break_long_words=False, break_on_hyphens=False) + "\n"


def markdown() -> str:
    """The page docs/models.md."""
    found = architectures()
    rows = [HEADINGS, ["---"] * len(HEADINGS)]
    rows += [(f"`{one.name}`", ", ".join(one.checkpoints) or "-", *one.cells) for one in found]
    said = {one.row.get(kind) for one in found for kind in (*COLUMNS, "signal")}
    reasons = [f"* **{word}**: {sentence}." for word, (_, sentence) in REASONS.items() if word in said - set(ABSENT)]
    return "\n".join(
        [
            "# Models",
            "",
            f"What mmcompress does on every image-text and multimodal architecture of transformers {NEWEST}, as the crossed test "
            "found it on tiny random models (`tests/test_architectures.py`: exact against the stock model that is given what was "
            "kept, in prefill, decoding and padded batches; or refused by `compress`). This page is made of the table of that test "
            "by `python -m mmcompress.architectures`.",
            "",
            "`mmcompress models WORD` prints the rows with a word; `mmcompress check MODEL` says it of one checkpoint, from its "
            "config alone: other language models inside the same architecture may take other stages.",
            "",
            summary(),
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
            "**yes**: exact. **-**: there is nothing of the kind, or the reason before holds for it too. Signals: **CLS**, "
            "attention of a CLS token; **patches**, attention among patches; **features**, of the encoder. Positions of kept "
            "tokens: their "
            "places in the full prompt (keep), or numbered anew (reindex). Reasons:",
            "",
            *reasons,
            "",
        ]
    )


def publish(root: Path) -> None:
    """Write docs/models.md in a checkout."""
    (root / "docs").mkdir(exist_ok=True)
    (root / "docs" / "models.md").write_text(markdown())


if __name__ == "__main__":
    publish(Path(assets.__file__).parent.parent)
