# SPDX-License-Identifier: Apache-2.0
"""What words are to the faithfulness metrics: names of objects, other nouns, function words, anything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

NOUN, FUNCTION, OTHER = -1, -2, -3
"""Labels of words without an object: a noun, a function word, anything else. Objects have numbers above 0."""
_CLOSED = (
    "a an the this that these those some any no every each either neither both all and or but nor yet so there can could may might "
    "must shall should will would i me my mine you your yours he him his she her hers it its we us our ours they them their theirs "
    "oh yes which what whatever who whom whose how when where why whenever wherever"
)
FUNCTION_WORDS = frozenset(_CLOSED.split())
"""English words of closed classes; prepositions and numbers are none, as in the protocol."""


def label_words(
    words: Sequence[str],
    kinds: Sequence[str],
    categories: Mapping[str, int],
    stem: Callable[[str], str] = lambda word: word.removesuffix("s"),
) -> list[int]:
    """Labels of words by the protocol: a noun that is one of the words of a category's name (after lower-casing, without "-",
    stemmed) gets its number, the last that fits; kinds are "noun", "function" or anything else."""
    known = {
        stem(part): number for name, number in categories.items() for part in name.lower().replace("-", "").split()
    }
    found = []
    for word, kind in zip(words, kinds, strict=True):
        label = known.get(stem(word.lower().replace("-", "")), NOUN)
        found.append(label if kind == "noun" else FUNCTION if kind == "function" else OTHER)
    return found
