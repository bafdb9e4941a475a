# SPDX-License-Identifier: Apache-2.0
"""The answer normalisers of the VQA family, and soft accuracy over ten human answers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from .protocol import Protocol, check_protocol

Style: TypeAlias = Literal["official", "evalai", "vlmevalkit"]

_STOPS = {
    "official": re.compile(r"\.(?!\d)"),
    "evalai": re.compile(r"\.(?!\d)"),
    "vlmevalkit": re.compile(r"(?<!\d)\.(?!\d)"),
}
_MOST_STOPS = 32
"""The tools hand a flag over as the number of replacements, so later full stops stay."""


@cache
def _tables() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "vqa_tables.json").read_text())


def one_line(text: str) -> str:
    """New lines and tabs as spaces, ends stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def drop_punctuation(text: str, style: Style = "official") -> str:
    """Each mark goes if the text has it beside a space, or has digits with a comma between; otherwise a space stands for it.
    Then full stops that no digit follows go."""
    grouped = re.search(r"\d,\d", text) is not None
    found = text
    for mark in _tables()["punctuation"]:
        goes = grouped or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if goes else " ")
    return _STOPS[style].sub("", found, count=0 if style == "vlmevalkit" else _MOST_STOPS)


def normalize_answer(text: str, style: Style = "official") -> str:
    """An answer as the tools compare it: punctuation, case, number words, articles, contractions.

    official: the VQA v2 evaluation tool; evalai: the answer processor of EvalAI, LLaVA's TextVQA and lmms-eval, which
    first deletes commas and question marks and cuts 's off; vlmevalkit: official, but a full stop behind a digit stays.
    """
    if style not in _STOPS:
        raise ValueError(f"style={style!r}: choose one of {', '.join(_STOPS)}")
    if style == "evalai":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    tables = _tables()
    words = [tables["numbers"].get(word, word) for word in drop_punctuation(one_line(text), style).lower().split()]
    return " ".join(tables["contractions"].get(word, word) for word in words if word not in tables["articles"])


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(1, how many of the others gave `prediction` / 3); 0 without answers."""
    hits = [answer == prediction for answer in answers]
    total = sum(hits)
    return sum(min(1.0, (total - hit) / 3) for hit in hits) / len(hits) if hits else 0.0


def vqa_accuracy(
    prediction: str, answers: Sequence[str], benchmark: str = "vqav2", protocol: Protocol = "official"
) -> float:
    """Soft accuracy of one question, in [0, 1].

    benchmark: vqav2, okvqa, textvqa or vizwiz. Official VQAv2 and OK-VQA normalise only where the raw answers are not all
    the same, and round to four decimals; LLaVA sends them EvalAI-normalised predictions. lmms-eval always normalises.
    TextVQA and VizWiz (and lmms-eval's OK-VQA) use the EvalAI normaliser; LLaVA's TextVQA needs exactly ten answers.
    """
    check_protocol(protocol)
    if benchmark not in ("vqav2", "okvqa", "textvqa", "vizwiz"):
        raise ValueError(f"benchmark={benchmark!r}: choose one of vqav2, okvqa, textvqa, vizwiz")
    if benchmark in ("textvqa", "vizwiz") or (benchmark == "okvqa" and protocol == "lmms"):
        if benchmark == "textvqa" and protocol == "llava" and len(answers) != 10:
            raise ValueError(f"LLaVA's TextVQA metric needs ten answers, not {len(answers)}; protocol='lmms' takes any")
        return soft_accuracy(normalize_answer(prediction, "evalai"), [normalize_answer(a, "evalai") for a in answers])
    if protocol == "lmms":
        return soft_accuracy(normalize_answer(prediction), [normalize_answer(a) for a in answers])
    if protocol == "llava":
        prediction = normalize_answer(prediction, "evalai")
    prediction, answers = one_line(prediction), [one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalize_answer(prediction), [normalize_answer(answer) for answer in answers]
    return round(soft_accuracy(prediction, answers), 4)
