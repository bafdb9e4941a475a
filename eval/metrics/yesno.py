# SPDX-License-Identifier: Apache-2.0
"""Yes-or-no benchmarks: POPE, MME, HallusionBench."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from .protocol import Protocol, check_protocol

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""The categories of MME."""


def pope_label(reply: str, protocol: Protocol = "official") -> str:
    """official and LLaVA: "no" if No, no or not is a word of the first sentence, else "yes" (so for "None", "NO" and nothing).
    lmms-eval: the reply in lower case, whatever it says."""
    check_protocol(protocol)
    if protocol == "lmms":
        return reply.lower().strip()
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_scores(replies: Sequence[str], labels: Sequence[str], protocol: Protocol = "official") -> dict[str, float]:
    """accuracy, precision, recall, f1 of "yes", and yes_ratio, of one split.

    In lmms-eval only replies that are exactly yes or no count for precision and recall, and its yes_ratio is that of the
    labels: use protocol="official" for papers.
    """
    said = [pope_label(reply, protocol) for reply in replies]
    counts = {(s, m): 0 for s in ("yes", "no") for m in ("yes", "no")}
    for pair in zip(said, labels, strict=True):
        if pair in counts:
            counts[pair] += 1
    right, false_yes, false_no = counts["yes", "yes"], counts["yes", "no"], counts["no", "yes"]
    precision, recall = _part(right, right + false_yes), _part(right, right + false_no)
    yes = labels if protocol == "lmms" else said
    return {
        "accuracy": _part(sum(s == m for s, m in zip(said, labels, strict=True)), len(labels)),
        "precision": precision,
        "recall": recall,
        "f1": _part(2 * precision * recall, precision + recall),
        "yes_ratio": _part(sum(label == "yes" for label in yes), len(labels)),
    }


def mme_label(reply: str, protocol: Protocol = "official") -> str:
    """ "yes", "no" or "other" from the first four characters (so "none" and "now" are no). lmms-eval first strips, deletes full
    stops and takes a single y or n."""
    check_protocol(protocol)
    text = reply.lower()
    if protocol == "lmms":
        text = text.strip().replace(".", "")
        text = {"y": "yes", "n": "no"}.get(text, text)
    if text in ("yes", "no"):
        return text
    return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"


def mme_scores(categories: Sequence[str], images: Sequence[Hashable], right: Sequence[bool]) -> dict[str, float]:
    """Score of each category (percent of questions right plus percent of images with all questions right), and the sums
    "perception", "cognition" and "total" over the categories that are there."""
    scores: dict[str, float] = {}
    for category in dict.fromkeys(categories):
        rows = [(image, ok) for c, image, ok in zip(categories, images, right, strict=True) if c == category]
        both = all_right(rows)
        scores[category] = 100 * sum(ok for _, ok in rows) / len(rows) + 100 * sum(both.values()) / len(both)
    sums = {
        "perception": sum(scores.get(name, 0.0) for name in PERCEPTION),
        "cognition": sum(scores.get(name, 0.0) for name in COGNITION),
    }
    return {**scores, **sums, "total": sums["perception"] + sums["cognition"]}


def all_right(rows: Iterable[tuple[Hashable, bool]]) -> dict[Hashable, bool]:
    """For each group: whether all of its rows are right."""
    found: dict[Hashable, bool] = {}
    for group, ok in rows:
        found[group] = found.get(group, True) and ok
    return found


def hallusion_label(reply: str) -> str:
    """Without a judge: "1" if the reply has "yes" in it, else "0"."""
    return "1" if "yes" in reply.lower() else "0"


def hallusion_scores(keys: Sequence[tuple[str, str, str, str, str]], right: Sequence[bool]) -> dict[str, float]:
    """aAcc over questions, qAcc over questions asked about several figures, fAcc over figures asked several questions.

    keys: (category, subcategory, set, figure, question) of each row. The official numbers need GPT-4 as judge; these are the
    rule-based ones of lmms-eval.
    """
    asked = all_right(((c, s, n, q), ok) for (c, s, n, _, q), ok in zip(keys, right, strict=True))
    shown = all_right(((c, s, n, f), ok) for (c, s, n, f, _), ok in zip(keys, right, strict=True))
    return {
        "aAcc": _part(sum(right), len(right)),
        "qAcc": _part(sum(asked.values()), len(asked)),
        "fAcc": _part(sum(shown.values()), len(shown)),
    }


def _part(value: float, whole: float) -> float:
    return value / whole if whole else 0.0
