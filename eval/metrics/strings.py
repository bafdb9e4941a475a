# SPDX-License-Identifier: Apache-2.0
"""One reply against gold strings: exact match, ANLS, relaxed accuracy, containment."""

from __future__ import annotations

import string
from collections.abc import Sequence

from .protocol import Protocol, check_protocol

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


def gqa_answer(reply: str, protocol: Protocol = "official") -> str:
    """A reply as GQA compares it. official: as it is; LLaVA: lower case without full stops at the end; lmms-eval: lower case
    without punctuation (the gold answer too), spaces stay."""
    check_protocol(protocol)
    if protocol == "lmms":
        return reply.lower().translate(_PUNCTUATION)
    return reply.rstrip(".").lower() if protocol == "llava" else reply


def gqa_correct(reply: str, answer: str, protocol: Protocol = "official") -> bool:
    """Exact match of a reply with the gold answer."""
    return gqa_answer(reply, protocol) == (gqa_answer(answer, "lmms") if protocol == "lmms" else answer)


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance; O(len x len) time, one row of memory."""
    if len(first) < len(second):
        first, second = second, first
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def anls(reply: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest answer (DocVQA, InfoVQA), 0 below `threshold`.

    Distance between lower-case strings with single spaces, over the longer of the two raw lengths. A similarity of exactly
    0.5 counts, as in the server's script and both harnesses (the paper's formula drops it).
    """
    best = 0.0
    said = " ".join(reply.lower().split())
    for answer in answers:
        longest = max(len(answer), len(reply))
        distance = edit_distance(" ".join(answer.lower().split()), said)
        best = max(best, 1 - distance / longest if longest else 1.0)
    return best if best >= threshold else 0.0


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_correct(reply: str, target: str, tolerance: float = 0.05, strip: bool = False) -> bool:
    """ChartQA: numbers within 5 % of the target (inclusive), anything else equal but for case.

    A percentage is a hundredth of its number, "1,000" is no number, and a target of 0 needs the same string. lmms-eval does
    not strip the reply (strip=False), most other harnesses do.
    """
    if strip:
        reply = reply.strip()
    said, meant = _number(reply), _number(target)
    if said is not None and meant:
        return abs(said - meant) / abs(meant) <= tolerance
    return reply.lower() == target.lower()


def ocrbench_correct(
    reply: str, answers: Sequence[str] | str, dataset: str = "", protocol: Protocol = "official"
) -> bool:
    """OCRBench: whether any answer is contained in the reply, whatever the case; formulas (dataset HME100k) without spaces
    and with their case. lmms-eval also takes full-width characters for plain ones."""
    check_protocol(protocol)

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        if protocol == "lmms":
            text = text.translate(_FULL_WIDTH)
        return text.replace(" ", "") if dataset == "HME100k" else text.lower()

    return any(plain(answer) in plain(reply) for answer in ([answers] if isinstance(answers, str) else answers))
