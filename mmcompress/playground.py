# SPDX-License-Identifier: Apache-2.0
"""One picture, one question, one plan: everything that `mmcompress app` shows, without the page."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .assets import split
from .catalog import listed
from .eval.cost.record import Cost, costs, prompt_inputs
from .eval.prompts import unknown_words
from .eval.synthetic.benchmark import items, takes_any_shape
from .explain import Explanation
from .explain.beside import WORDS, explained
from .plan import as_pipeline
from .presets import NAMES, preset
from .visualize import fate_picture, heat_picture, steps
from .visualize.figures import strength

SIMPLE = ("input", "layer")
"""Kinds of methods that one slider is enough for."""
REPEATS = 3
"""Rounds of the clock."""


@dataclass(frozen=True)
class Shown:
    """What there is to see. maps: for each word of the compressed model's answer where it came from; note: what to know, or ""."""

    plan: str
    stock: str
    compressed: str
    overlay: Image.Image
    cells: tuple[int, int]
    maps: list[tuple[Image.Image, str]]
    stock_cost: Cost
    cost: Cost
    note: str
    code: str

    @property
    def milliseconds(self) -> tuple[float, float]:
        """To the first token, stock and compressed: medians."""
        return self.stock_cost.times.spread("ttft").median, self.cost.times.spread("ttft").median


class Playground:
    """A model to play with; one question at a time, whoever asks."""

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model, self.processor, self.name = model, processor, name
        self.family = getattr(model.config, "model_type", None)
        self._lock = threading.Lock()

    def about(self, embedded: tuple[str, ...]) -> str:
        """What the model can answer, in a sentence or two."""
        if split(self.name)[0] not in embedded:
            return f"{self.name}: whatever this checkpoint was trained for."
        asked = ", ".join(f"“{question}”" for _, question in self.samples(7))
        return (
            f"{self.name} is a tiny model that was trained on drawn scenes of coloured shapes, and knows nothing of photographs. "
            f"It answers questions like {asked}."
        )

    def samples(self, count: int = 4) -> list[tuple[Image.Image, str]]:
        """Drawn scenes with questions that the embedded models can answer."""
        return [(item.picture, item.question.text) for item in items(count, stretched=takes_any_shape(self.model))]

    def choices(self) -> list[str]:
        """Names to pick: presets, then methods for which a ratio is enough."""
        found = [
            name
            for name, about in listed().items()
            if about["kind"] in SIMPLE and isinstance(about["options"].get("keep"), (int, float))
        ]
        return [*NAMES[::-1], *found]

    def plan_of(self, choice: str, keep: float) -> str:
        """The plan that a choice and the slider (percent of the tokens) stand for; a preset has its own ratios."""
        return preset(choice, self.family).plan if choice in NAMES else f"{choice}(keep={keep / 100:g})"

    def ask(self, picture: Image.Image | None, question: str, plan: str, new_tokens: int = 32) -> Shown:
        """Answer stock and compressed, time both, and draw. Raises ValueError for what is missing or wrong."""
        if picture is None:
            raise ValueError("give a picture, your own or a sample")
        if not question.strip():
            raise ValueError("ask a question")
        text = repr(as_pipeline(plan, family=self.family))
        with self._lock:
            found = explained(self.model, self.processor, [picture], question, text, [WORDS], max_new_tokens=new_tokens)
            inputs = prompt_inputs(self.model, self.processor, picture, question)
            stock_cost, *_, cost = costs(self.model, inputs, [text], REPEATS, 1, 2)
        return self._shown(found, text, stock_cost, cost, question)

    def _shown(self, found: list[Explanation], plan: str, stock_cost: Cost, cost: Cost, question: str) -> Shown:
        stock, compressed = found
        last = steps(compressed.trace)[-1]
        maps = []
        for word in compressed.answer_words:
            most = strength(compressed, word)
            if most is not None:
                picture = heat_picture(compressed, compressed.word_map(word) / (most or 1), side=320)
                maps.append((picture, compressed.words[word].text.strip()))
        notes = [unknown_words(self.processor, [question])]
        if cost.speedup < 1 and cost.flops_ratio < 1:
            notes.append(
                "no faster here although FLOPs are saved: so small a model is all overhead; the same one at the width of a real "
                f"model: mmcompress app {split(self.name)[0]}@8x4"
            )
        code = f"import mmcompress as mm\n\nmm.compress(model, {plan!r})\nout = model.generate(**inputs)\nprint(mm.report(model))"
        return Shown(
            plan, stock.answer, compressed.answer, fate_picture(compressed, last), (last.tokens, len(last.stands)), maps,
            stock_cost, cost, "; ".join(note for note in notes if note), code,
        )  # fmt: skip
