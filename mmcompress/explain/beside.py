# SPDX-License-Identifier: Apache-2.0
"""Explanations of an answer, stock and compressed side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

NAMES = ("token-activation-map", "attention-rollout", "last-layer-attention", "gradient-relevance", "grad-cam")
"""Methods as commands write them, in the order of `mmcompress.explain.EXPLANATIONS`."""
WORDS, GRADIENTS = "token-activation-map", "gradient-relevance"
"""The map of words; and what stands beside it wherever a backward pass is affordable."""


def explained(
    model: Any,
    processor: Any,
    pictures: Any,
    question: str,
    plan: Any = None,
    methods: Any = None,
    same_answer: bool = False,
    say: Callable[[str], object] = str,
    **how: Any,
) -> list[Any]:
    """Explanations of the stock model, then of the compressed one, by each method. Each explains its own
    answer; with `same_answer` the compressed one reads the stock model's, so that the words are the same.

    methods  names of `NAMES`. None: the map of words, and beside it gradient relevance wherever the model allows it and it is
             affordable (`mmcompress.explain.unaffordable`); `say` is told where it is left out, and why.
    """
    from ..api import compressed

    def ask(answer: list[int] | None) -> list[Any]:
        return _explained(model, processor, pictures, question, methods, say, answer, **how)

    found = ask(None)
    if plan is None:
        return found
    with compressed(model, plan):
        return [*found, *ask(found[0].answer_ids if same_answer else None)]


def _explained(
    model: Any,
    processor: Any,
    pictures: Any,
    question: str,
    methods: Sequence[str] | None,
    say: Callable[[str], object],
    answer: list[int] | None,
    **how: Any,
) -> list[Any]:
    """Explanations of one answer, the model's own or the one given."""
    from torch import OutOfMemoryError

    from . import EXPLANATIONS, unaffordable

    functions = dict(zip(NAMES, EXPLANATIONS.values(), strict=True))
    first, *others = methods or [WORDS]
    found = [functions[first](model, processor, pictures, question, answer=answer, **how)]
    how["answer"] = found[0].answer_ids
    found += [functions[name](model, processor, pictures, question, **how) for name in others]
    if methods is None:
        why = unaffordable(model, found[0].layers[0] + len(how["answer"]))
        try:
            found += [] if why else [functions[GRADIENTS](model, processor, pictures, question, **how)]
        except (NotImplementedError, OutOfMemoryError) as error:
            why = str(error).splitlines()[0]
        if why:
            say(f"{found[0].plan or 'stock model'} without gradient relevance: {why}")
    return found
