# SPDX-License-Identifier: Apache-2.0
"""Tokens as text, and words made of them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"
"""What decoders write for a part of a character."""
SPACES = (" ", "\u2581", "\u0120", "\n", "\t")
"""How a piece can begin that begins a word: white space, or the marker for it of SentencePiece and of byte-level BPE."""


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text, its leading space included; "" where a character is not yet complete.
    Without a tokenizer tokens are called by their numbers."""
    if tokenizer is None:
        return [f" {i}" for i in ids]
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = now.rstrip(BROKEN) if end < len(ids) else now
        same = len(before) if whole.startswith(before) else _common(whole, before)
        texts.append(whole[same:])
        before = whole
    return texts


def surface_names(tokenizer: Any, ids: Sequence[int]) -> list[object]:
    """The tokenizer's own pieces, with their markers: tokens of the same piece are the same to the reader."""
    return list(ids) if tokenizer is None else list(tokenizer.convert_ids_to_tokens(list(ids)))


def group_words(texts: Sequence[str]) -> list[list[int]]:
    """Indices of the tokens of each word. A word begins at the first token, at punctuation, at a CJK character and at a token whose
    text begins with white space or a marker for it; every other token joins the word before it."""
    words: list[list[int]] = []
    for i, text in enumerate(texts):
        if not words or (text and (text.startswith(SPACES) or _punctuation(text) or _cjk(text[0]))):
            words.append([i])
        else:
            words[-1].append(i)
    return words


def word_text(texts: Sequence[str], tokens: Sequence[int]) -> str:
    """The text of a word without the space before it."""
    return "".join(texts[i] for i in tokens).lstrip("".join(SPACES))


def _punctuation(text: str) -> bool:
    return all(unicodedata.category(c).startswith("P") for c in text)


def _cjk(character: str) -> bool:
    return any(
        a <= ord(character) <= b
        for a, b in ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF))
    )


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
