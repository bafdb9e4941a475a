# SPDX-License-Identifier: Apache-2.0
"""Multiple choice: which option a reply means, in the reading of each benchmark and harness."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence

from .answers import drop_punctuation, one_line
from .protocol import Protocol, check_protocol
from .yesno import all_right

ROTATIONS = 1_000_000
"""Rows of MMBench whose index is equal modulo this are rotations of one question."""


def extract_letter(reply: str, letters: Sequence[str] = "ABCD") -> str:
    """The generic extractor of lmms-eval (MMStar, RealWorldQA, Video-MME): the upper-case letter in the most telling place.

    At the start, at the end, after "answer is" and the like, as (X), X., X:, X), X and a space, alone between other marks,
    in this order; of several in one kind of place the last. "" if there is none.
    """
    text = reply.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    if text[:1] in letters and text:
        return text[0]
    if text[-1:] in letters and text:
        return text[-1]
    one = "[" + "".join(map(re.escape, letters)) + "]"
    places = (
        rf"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*\(?({one})(?![A-Za-z])",
        *(
            rf"\(({one})\)",
            rf"({one})\.",
            rf"({one}):",
            rf"({one})\)",
            rf"({one}) ",
            rf"(?<![A-Za-z])({one})(?![A-Za-z])",
        ),
    )
    return next((found[-1] for place in places if (found := re.findall(place, text))), "")


def mmbench_letter(reply: str, options: Mapping[str, str | None], protocol: Protocol = "official") -> str | None:
    """The option of MMBench that a reply means by its letter or else by its text; None is for a judge, and wrong without one.

    official and LLaVA: VLMEvalKit's exact matching; the letter stands alone among the last four words, or behind "answer
    is"; the text counts in replies of at most twice the length of all options. lmms-eval: words as they are, "A" only in
    replies of three words at most, then X. X, X: X) (X) and the like, letters A to E whatever the options.
    """
    check_protocol(protocol)
    known = {letter: str(text) for letter, text in options.items() if text is not None}
    letter = _letter_lmms(reply) if protocol == "lmms" else _letter_vlmevalkit(reply, known)
    if letter is not None:
        return letter
    said = reply.lower()
    if protocol != "lmms" and len(said) > 2 * sum(map(len, known.values())):
        return None
    named = [letter for letter, text in known.items() if text.lower() in said]
    return named[0] if len(named) == 1 else None


def _letter_vlmevalkit(reply: str, options: Mapping[str, str]) -> str | None:
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", reply).split()
    alone = [letter for letter in options if letter in words]
    if len(alone) == 1 and words.index(alone[0]) >= len(words) - 4:
        return alone[0]
    phrases = re.findall(r"(?i:answer is)[\s:]*[(*]*([A-Z])\b", reply)
    return phrases[0] if len(set(phrases)) == 1 and phrases[0] in options else None


def _letter_lmms(reply: str) -> str | None:
    words = reply.split()
    for before, after in (
        *(("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ").")),
        *(("(", ")"), ("(", ")."), (":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")),
    ):
        found = [letter for letter in "ABCDE" if f"{before}{letter}{after}" in words]
        article = not before and not after and found == ["A"] and len(words) > 3
        if len(found) == 1 and not article:
            return found[0]
    return None


def circular_scores(
    index: Sequence[int], right: Sequence[bool], categories: Mapping[str, Sequence[str]] | None = None
) -> dict[str, float]:
    """ "circular": part of the questions of which every rotation is right; "single_pass": of the first rotations alone.

    categories: named columns of labels; each label adds "column/label", the mean over its questions.
    """
    groups = [i % ROTATIONS for i in index]
    whole = all_right(zip(groups, right, strict=True))
    first = [ok for i, ok in zip(index, right, strict=True) if i < ROTATIONS]
    scores = {
        "circular": sum(whole.values()) / len(whole) if whole else 0.0,
        "single_pass": sum(first) / len(first) if first else 0.0,
    }
    for column, labels in (categories or {}).items():
        of: dict[Hashable, str] = {}
        for group, label in zip(groups, labels, strict=True):
            of.setdefault(group, label)
        for label in sorted(set(of.values())):
            rights = [whole[group] for group, name in of.items() if name == label]
            scores[f"{column}/{label}"] = sum(rights) / len(rights)
    return scores


def scienceqa_letter(reply: str, protocol: Protocol = "official") -> str:
    """official and LLaVA: the reply is a letter, begins with "X. ", or says "The answer is X." once. lmms-eval: it is a letter
    in any case, or begins with "X.". "" otherwise."""
    check_protocol(protocol)
    if protocol == "lmms":
        text = reply.strip()
        if len(text) == 1 and text.isalpha():
            return text.upper()
        return text[0] if re.match(r"[A-Z]\.", text) else ""
    if reply in tuple("ABCDE"):
        return reply
    if re.match(r"[A-E]\. ", reply):
        return reply[0]
    said = re.findall(r"The answer is ([A-Z])\.", reply)
    return said[0] if len(said) == 1 else ""


def seed_letter(reply: str, protocol: Protocol = "official") -> str:
    """official and LLaVA: the whole reply; lmms-eval: its first character (compared whatever the case)."""
    check_protocol(protocol)
    return reply.strip()[:1] if protocol == "lmms" else reply


def ai2d_answer(reply: str) -> str:
    """The letter of a reply that begins with "X.", else the reply."""
    found = re.match(r"\s*([A-Z])\.", reply)
    return found[1] if found else reply


def mvbench_letter(reply: str) -> str:
    """The first letter A to E that stands alone, in any case, as upper case; "" if there is none."""
    first = re.match(r"([A-E])\.\s*.+$", reply.strip(), re.IGNORECASE)
    found = first or re.search(r"\b([A-E])\b", drop_punctuation(one_line(reply)), re.IGNORECASE)
    return found[1].upper() if found else ""


def longvideobench_letter(reply: str) -> str:
    """LongVideoBench: the first of A to E, once phrases like "The answer is" are taken out. "" where the tool draws at random
    (count it as wrong)."""
    text = reply.strip()
    for phrase in ("The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is",
                   "The correct option is", "Best answer:", "Best option:", "Answer:", "Option:"):  # fmt: skip
        text = text.replace(phrase, "")
    found = re.search("[A-E]", text)
    return found[0] if found else ""
