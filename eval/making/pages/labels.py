# SPDX-License-Identifier: Apache-2.0
"""What an encoder of pages is taught to tell about every visual token."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ...synthetic.pages.content import CODE_LENGTH, DIGITS, LINES, is_code
from ...synthetic.pages.layout import UNIT, Page, font_of
from ...synthetic.questions import Question
from .model import CHARACTERS_WRITTEN, WORDS

_WORD = {word: i + 1 for i, word in enumerate(WORDS)}
_WRITTEN = {c: i + 1 for i, c in enumerate(CHARACTERS_WRITTEN)}
NUMBER, CODE = len(WORDS) + 1, len(WORDS) + 2
LABELS: dict[str, int] = {
    "word": len(WORDS) + 3,
    **{f"slot {i + 1}": len(CHARACTERS_WRITTEN) + 1 for i in range(CODE_LENGTH)},
    "letter": len(CHARACTERS_WRITTEN) + 1,
    "label": len(WORDS) + 1,
    "column": len(WORDS) + 1,
    "line": LINES[1] + 2,
    "last": 3,
    "rank": 4,
}
"""What each token is taught to tell, with the number of classes; class 0 is "nothing of that kind here". word: what is written
here; slot: the characters of the code or number; letter: the one in the middle; label, column: first word of the line and name of
the column, of what stands behind and below them; line: its number, a heading and names of columns last; last: whether it is the
last one; rank: largest, smallest or another bar."""


def token_labels(page: Page) -> np.ndarray:
    """Labels of every token, int64 [labels, tokens], in the order of `LABELS` and in raster order."""
    width, height = page.size[0] // UNIT, page.size[1] // UNIT
    rows = {name: i for i, name in enumerate(LABELS)}
    labels = np.zeros((len(LABELS), height, width), dtype=np.int64)
    y, x = np.arange(height) * UNIT, np.arange(width) * UNIT
    content, lines = page.content, len(page.content.lines)

    def covered(box: tuple[int, int, int, int]) -> np.ndarray:
        """Tokens of which the box covers more than a quarter in each direction."""
        high = np.minimum(y + UNIT, box[3]) - np.maximum(y, box[1]) >= min(3, box[3] - box[1])
        wide = np.minimum(x + UNIT, box[2]) - np.maximum(x, box[0]) >= min(3, box[2] - box[0])
        return high[:, None] & wide[None]

    def mark(box: tuple[int, int, int, int], line: int, column: int) -> np.ndarray:
        here = covered(box)
        labels[:, here] = 0
        labels[rows["line"], here] = line or LINES[1] + 1
        if line:
            labels[rows["last"], here] = 1 + (line == lines)
            if column:
                labels[rows["label"], here] = _WORD[content.lines[line - 1][0]]
        if line and content.bars:
            bar = content.bars[line - 1]
            labels[rows["rank"], here] = 1 if bar == max(content.bars) else 2 if bar == min(content.bars) else 3
        return here

    for number, box in enumerate(page.bars, 1):
        mark(box, number, 1)
    for field in page.fields:
        here = mark(field.box, field.line, field.column)
        text = field.text
        number = text[0] in DIGITS and not is_code(text)
        labels[rows["word"], here] = NUMBER if number else CODE if is_code(text) else _WORD[text]
        if field.column and field.line and content.columns:
            labels[rows["column"], here] = _WORD[content.columns[field.column - 1]]
        if number or is_code(text):
            for slot, character in enumerate(text):
                labels[rows[f"slot {slot + 1}"], here] = _WRITTEN[character]
        ends = [field.box[0] + font_of(field.size).getlength(text[: i + 1]) for i in range(len(text))]
        at = np.clip(np.searchsorted(ends, x + UNIT / 2), 0, len(text) - 1)
        letters = np.array([_WRITTEN[c] for c in text])[at]
        labels[rows["letter"], here] = np.broadcast_to(letters[None], here.shape)[here]
    return labels.reshape(len(LABELS), -1)


def tokens_asked_about(labels: Tensor, question: Question) -> list[tuple[int, Tensor]]:
    """Where a question's words should look, by labels [labels, tokens]: places in front of the first word of the answer (-1: the
    one that it follows from, less: in the question) with tokens, bool [tokens]. A name looks at what
    stands in its line, or below it."""
    named = dict(zip(LABELS, labels, strict=True))
    words, said = question.text.split(), question.answer.split()
    found: list[tuple[int, Tensor]] = []
    if question.kind == "largest":
        found = [(-1, (named["rank"] == 1 + (words[2] == "smallest")) & (named["word"] > 0))]
    elif question.kind == "heading":
        found = [(k - 1, named["word"] == _WORD[word]) for k, word in enumerate(said)]
    elif question.kind == "lines":
        found = [(-1, named["last"] == 2)]
    else:
        for place, word in enumerate(words, -1 - len(words)):
            if word in _WORD:
                column = question.kind == "cell" and place == 3 - 1 - len(words)
                found.append(
                    (
                        place,
                        named["word" if question.kind == "listed" else "column" if column else "label"] == _WORD[word],
                    )
                )
    return [(place, at) for place, at in found if at.any()]
