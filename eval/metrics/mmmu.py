# SPDX-License-Identifier: Apache-2.0
"""MMMU: the option that a reply means, and the candidates of an open reply."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from .protocol import Protocol, check_protocol

Candidate: TypeAlias = "str | float"

_TAILS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
"""With thousands marked, with an exponent, and what is left (parts of the others among them)."""


def mmmu_letter(reply: str, options: Mapping[str, str], protocol: Protocol = "official") -> str | None:
    """The option a reply means: (X), else a letter between spaces, else (replies of more than five words) the text of an option;
    the last of several. None where the tools draw at random; count it as wrong.

    lmms-eval needs no space before the letter (so "DNA " means A), and then takes "X."; of several such letters, the one that
    stands last between spaces, so the first if none does. LLaVA follows the official parser.
    """
    check_protocol(protocol)
    text = reply
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    spaced = " {} "
    for form, sought in (
        ("({})", "({})"),
        *((("{} ", spaced), ("{}.", spaced)) if protocol == "lmms" else ((spaced, spaced),)),
    ):
        found = {letter: text.rfind(sought.format(letter)) for letter in options if form.format(letter) in text}
        if found:
            return max(found, key=lambda letter: found[letter])
    if len(text.split()) > 5:
        found = {letter: text.lower().rfind(option.lower()) for letter, option in options.items()}
        if max(found.values(), default=-1) >= 0:
            return max(found, key=lambda letter: found[letter])
    return None


def _normal(text: str) -> list[Candidate]:
    """A number rounded to two decimals, or lower case; a single character with a space on either side, so that it does not
    match inside words."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def mmmu_candidates(reply: str) -> set[Candidate]:
    """What an open reply may mean: the tails of its sentences behind words like "is" or "answer" (and "=" in the last), or
    the whole reply, and all numbers in these."""
    text = reply.strip().strip(".").lower()
    sentences = re.split(r"\.\s(?=[A-Z])|\n", text)  # as in the reference, in lower case: only new lines split
    tails = []
    for i, sentence in enumerate(sentences):
        words = (*_TAILS, "=") if i == len(sentences) - 1 else _TAILS
        shortest = ""
        for word in words:
            tail = sentence.split(word)[-1].strip() if word in sentence else None
            if tail is not None and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in tuple(",.!?;:'"):
            tails.append(shortest)
    tails = tails or [text]
    numbers = [number for tail in tails for pattern in _NUMBERS for number in pattern.findall(tail)]
    return {candidate for part in (*tails, *numbers) for candidate in _normal(part)}


def mmmu_open_correct(reply: str, answers: Sequence[str] | str) -> bool:
    """Whether a gold string is contained in a candidate, or a gold number equal to one."""
    gold = [c for answer in ([answers] if isinstance(answers, str) else answers) for c in _normal(answer)]
    return any(
        any(isinstance(g, str) and g in candidate for g in gold) if isinstance(candidate, str) else candidate in gold
        for candidate in mmmu_candidates(reply)
    )
