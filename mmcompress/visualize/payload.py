# SPDX-License-Identifier: Apache-2.0
"""What the HTML page knows about explanations, as plain values."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..explain import Explanation, Film
from ..explain.fates import DROPPED, KEPT, MERGED, Step, step_of_layer, steps
from .colours import cluster_hue
from .figures import named, place_name, strength, words_of
from .headline import part_of_llm
from .overlay import picture_of

MISSING = 255
"""In maps of one byte per cell: nothing is known. Other values are 0 to 254 for 0 to 1."""


def payload(
    found: Sequence[Explanation], embed: Callable[[Image.Image], str], words: Sequence[str] = ()
) -> dict[str, Any]:
    """Pictures (each once, through `embed`), one run per explanation, how faithful each sort is, and the stops of the slider over
    layers: all tokens, what the stages before the LLM leave, then each layer. words: the first that is there opens the page."""
    pictures: dict[tuple[tuple[int, int], bytes], int] = {}
    sources: list[str] = []

    def number(picture: Image.Image) -> int:
        key = (picture.size, picture.tobytes())
        if key not in pictures:
            pictures[key] = len(sources)
            sources.append(embed(picture))
        return pictures[key]

    decided = [steps(one.trace, one.row) for one in found]
    early = max(sum(step.layer is None for step in mine) for mine in decided)
    depth = max(len(layers_of(one)) for one in found)
    stops = [
        "all tokens",
        *(f"before the LLM, stage {i}" for i in range(1, early)),
        *(f"layer {i}" for i in range(depth)),
    ]
    runs = [_run(one, mine, early, number) for one, mine in zip(found, decided, strict=True)]
    return {
        "pictures": sources, "stops": stops, "early": early, "runs": runs, "faithful": faithfulness(found),
        "word": _first_word(found, words),
    }  # fmt: skip


def _first_word(found: Sequence[Explanation], words: Sequence[str]) -> int:
    """Number of the word that the page opens with: of the explanations that have one of `words` the first; else of the answer."""
    named = [one.find(word)[0] for word in words for one in found if one.has(word)]
    return (named or [*words_of(found[0]), 0])[0]


def faithfulness(found: Sequence[Explanation]) -> dict[str, str]:
    """Of each sort of explanation how faithful it was measured to be, in words."""
    said: dict[str, str] = {}
    for method in dict.fromkeys(one.method for one in found if one.words):
        mine = [one for one in found if one.method == method]
        known = dict.fromkeys(str(one.measured) for one in mine if one.measured)
        unknown = dict.fromkeys(f"with {one.plan}" for one in mine if one.measured and one.plan != one.measured.plan)
        missing = [f"not measured {how}" for how in unknown] if known else ["not measured for this model"]
        scale = (
            ["100 % where maps lie on the true boxes of the objects that words name, and only there"] if known else []
        )
        said[method] = "; ".join([*known, *missing, *scale])
    return said


def layers_of(found: Explanation) -> list[int]:
    return found.trace.tokens_per_layer(found.row)


def _run(
    found: Explanation,
    decided: list[Step],
    early: int,
    number: Callable[[Image.Image], int],
) -> dict[str, Any]:
    before = sum(step.layer is None for step in decided)
    layers = layers_of(found)
    at_stop = [min(i, before - 1) for i in range(early)] + [step_of_layer(decided, i) for i in range(len(layers))]
    return {
        "name": named(found),
        "method": found.method,
        "question": found.question,
        "answer": found.answer,
        "coverage": round(found.coverage, 4),
        "flops": _rounded(part_of_llm(found)),
        "words": [_word(found, i) for i in range(len(found.words))],
        "maps": _maps(found),
        "relevance": _relevance(found),
        "visuals": _visuals(found, number),
        "steps": [_step(step) for step in decided],
        "at_stop": at_stop,
        "films": [_film(film) for film in found.films],
        "layers": layers,
    }


def _word(found: Explanation, number: int) -> dict[str, Any]:
    word = found.words[number]
    first = found.tokens[word.tokens[0]]
    return {
        "text": word.text or "·",
        "part": word.part,
        "strength": _rounded(strength(found, number)),
        "probability": _rounded(first.probability),
        "special": all(found.tokens[t].special for t in word.tokens),
    }


def _maps(found: Explanation) -> str:
    """Maps of all words, [words, cells] bytes in base64: the largest value of a word's tokens."""
    rows = [_of_tokens(found.maps[list(word.tokens)]) for word in found.words]
    values = torch.stack(rows) if rows else found.maps[:0]
    held = (values.nan_to_num(0).clamp(0, 1) * (MISSING - 1)).round().masked_fill(values.isnan(), MISSING)
    return base64.b64encode(held.to(torch.uint8).numpy().tobytes()).decode()


def _relevance(found: Explanation) -> list[list[float | None]]:
    """Of each word for each word."""
    groups = [list(word.tokens) for word in found.words]
    return [
        [
            None if bool(part.isnan().all()) else _rounded(part[~part.isnan()].max().item())
            for part in (found.relevance[row][:, column] for column in groups)
        ]
        for row in groups
    ]


def _of_tokens(values: Tensor) -> Tensor:
    gone = values.isnan().all(0)
    return values.nan_to_num(float("-inf")).amax(0).masked_fill(gone, float("nan"))


def _visuals(found: Explanation, number: Callable[[Image.Image], int]) -> list[dict[str, Any]]:
    visuals: list[dict[str, Any]] = []
    first = 0
    for i, one in enumerate(found.visuals):
        panes = []
        for pane in one.panes:
            picture = picture_of(one.pictures, one.panes, pane)
            panes.append(
                {
                    "role": pane.role,
                    "frame": pane.frame,
                    "box": list(pane.box),
                    "grid": list(pane.grid),
                    "seams": [list(side) for side in pane.seams],
                    "cells": (first + pane.cells).flatten().tolist(),
                    "picture": number(picture),
                    "size": list(picture.size),
                }
            )
        name = f"{one.modality} {i + 1}"
        visuals.append({"name": name, "panes": panes, "first": first, "cells": len(one.valid), "frame": one.frame})
        first += len(one.valid)
    return visuals


def _step(step: Step) -> dict[str, Any]:
    merged = step.stands[step.share > 1].unique().tolist()
    scores = None if step.scores is None else [_rounded(v, 4) for v in step.scores.tolist()]
    return {
        "place": place_name(step),
        "stage": step.stage,
        "stands": step.stands.tolist(),
        "hues": {cell: round(360 * cluster_hue(cell)) for cell in merged},
        "scores": scores,
        "tokens": step.tokens,
        "fates": [int((step.fate == fate).sum()) for fate in (KEPT, MERGED, DROPPED)],
    }


def _film(film: Film) -> dict[str, Any]:
    """A video: of each frame its visual, its number there, its cells and its name; when it is shown; tokens behind each step."""
    return {
        "name": film.name,
        "places": [list(place) for place in film.places],
        "cells": [cells.tolist() for cells in film.cells],
        "labels": [film.label(i) for i in range(len(film))],
        "times": film.times,
        "milliseconds": film.milliseconds(),
        "tokens": film.tokens.tolist(),
    }


def _rounded(value: float | None, digits: int = 3) -> float | None:
    """With few digits; None for what JSON has no name for."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")
