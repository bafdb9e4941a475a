# SPDX-License-Identifier: Apache-2.0
"""Training of what methods learn, on the synthetic benchmark: exit routers, flexible projectors, mixtures of depths.

A run can be stopped and restarted at any time. The base model is one of the package, or any checkpoint whose processor has a chat
template; scenes and questions are those that train the embedded models, scores come from held-out ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mmcompress as mm

from ...learn.dyvte import exit_loss, exit_sample
from ...learn.tokenflex import CHANCES, SHARES, draw_share, flexible_loss, fresh_projector, weighted_loss
from ...methods.dyvte import ExitRouters
from ...weights import Saved, base_of
from ..synthetic.benchmark import evaluate, items, prepare, takes_any_shape
from ..synthetic.questions import Question
from ..synthetic.scenes import Scene, draw, scenes
from .data import HARD, conversation
from .loop import Loop

VALIDATION = 9_000_000
"""First seed of the held-out scenes that scores during training are measured on; the benchmark has others."""


@dataclass(frozen=True)
class LearnRecipe:
    """Sizes of a training run. turns: questions per picture; questions: how many held-out ones are asked at each checkpoint."""

    steps: int
    batch: int
    rate: float
    turns: int = 1
    save_every: int = 100
    questions: int = 70
    seed: int = 0


RECIPES = {
    "dyvte": LearnRecipe(steps=600, batch=32, rate=1e-3),
    "tokenflex": LearnRecipe(steps=900, batch=16, rate=2e-3, turns=8),
    "p_mod": LearnRecipe(steps=700, batch=12, rate=6e-4, turns=12),
    "gamma_mod": LearnRecipe(steps=700, batch=12, rate=6e-4, turns=12),
}
"""How the embedded models are trained. The papers train models a thousand times larger on real data, at lower rates."""
OPTIONS: dict[str, dict[str, Any]] = {"p_mod": {"std": 0.02}, "gamma_mod": {"loss_weight": 0.1, "std": 0.05}}
"""Where conversions depart from their papers. Routers of p_mod do not begin at zero, so that not the first tokens alone run at
first; that of gamma_mod has a larger loss, since it has to be almost binary after a short training."""
WIDTH = 128
"""Hidden width of the exit routers; 2,048 in the paper."""


def asked(scene: Scene, turns: int, rng: np.random.Generator) -> list[Question]:
    """Questions about one scene: all types alike if it is only one, else more of those that are learned last."""
    return conversation(scene, turns, rng, (*HARD, "relation") if turns > 1 else ())


def inputs_of(processor: Any, pictures: Sequence[Any], talks: Sequence[Sequence[Question]]) -> dict[str, Any]:
    """Model inputs of conversations about one picture each, with `labels` [B, S]: the answers, -100 elsewhere."""
    tokenizer = processor.tokenizer
    texts, answers = [], []
    for talk in talks:
        messages: list[dict[str, Any]] = []
        ends = []
        for i, question in enumerate(talk):
            image = [] if i else [{"type": "image"}]
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": question.text}]})
            begin = processor.apply_chat_template(messages, add_generation_prompt=True)
            messages.append({"role": "assistant", "content": question.answer})
            texts_so_far = (begin, processor.apply_chat_template(messages))
            ends.append([len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts_so_far])
        texts.append(texts_so_far[1])
        answers.append(ends)
    made = processor(images=list(pictures), text=texts, padding=True, return_tensors="pt")
    ids, mask = made["input_ids"], made["attention_mask"]
    labels = torch.full_like(ids, -100)
    for row, ends in enumerate(answers):
        stop = int(mask[row].nonzero()[-1]) + 1
        for first, last in ends:  # counted from the end, where the picture does not matter
            at = slice(stop - ends[-1][1] + first, stop - ends[-1][1] + last)
            labels[row, at] = ids[row, at]
    return {**made, "labels": labels}


def visual_tokens(model: Any) -> list[float]:
    """Mean number of visual tokens of a row of the last call in each LLM layer."""
    last = mm.trace(model)
    rows = sorted({visual.row for visual in last.visuals})
    totals = [0.0] * last.text_config.num_hidden_layers
    for row in rows:
        text = last.call.counts[row] - sum(v.tokens for v in last.visuals if v.row == row)
        for layer, count in enumerate(last.tokens_per_layer(row)):
            totals[layer] += (count - text) / len(rows)
    return totals


class Learning(Loop):
    """Trains one method for one model in one folder; whatever the folder already holds is not done again."""

    def __init__(
        self, folder: Path, model: Any, processor: Any, method: str, recipe: LearnRecipe | None = None,
        device: str | None = None,
    ) -> None:  # fmt: skip
        if method not in RECIPES:
            raise ValueError(f"method {method!r}: there is training for {', '.join(RECIPES)}")
        self.method, self.recipe = method, recipe or RECIPES[method]
        super().__init__(folder, self.recipe.seed, self.recipe.save_every, device)
        self.model, self.processor = model.to(self.device).eval(), processor
        self.base = base_of(model)
        self.stretched = takes_any_shape(model)
        questions = items(self.recipe.questions, start=VALIDATION, stretched=self.stretched)
        self.held_out = prepare(processor, questions, 35)

    def inputs(self, step: int) -> dict[str, Any]:
        """The batch of one step, a function of seed and step alone."""
        recipe = self.recipe
        rng = np.random.default_rng((recipe.seed, 17, step))
        drawn = [
            scenes("train", 1, int(start), self.stretched)[0] for start in rng.integers(900_000, size=recipe.batch)
        ]
        talks = [asked(scene, recipe.turns, rng) for scene in drawn]
        made = inputs_of(self.processor, [draw(scene) for scene in drawn], talks)
        return {name: x.to(self.device) for name, x in made.items()}

    def accuracy(self, plan: Any = None) -> float:
        """On held-out questions, of the model as it is or compressed by `plan`."""
        was = self.model.training
        self.model.eval()
        try:
            if plan is None:
                return evaluate(self.model, self.processor, self.held_out).accuracy()
            with mm.compressed(self.model, plan):
                return evaluate(self.model, self.processor, self.held_out).accuracy()
        finally:
            self.model.train(was)

    def about(self, scores: dict[str, float]) -> dict[str, Any]:
        """What is written beside the weights."""
        return {"data": "mmcompress synthetic benchmark", "recipe": asdict(self.recipe), "scores": scores}

    def run(self) -> Path:
        """Train what is left, and write the weights; returns their folder."""
        torch.manual_seed(self.recipe.seed)
        if self.method == "dyvte":
            return self._dyvte()
        if self.method == "tokenflex":
            return self._tokenflex()
        return self._depth()

    # ------------------------------------------------------------------ dyvte
    def _dyvte(self) -> Path:
        config = self.model.config.get_text_config()
        layers = config.num_hidden_layers - 1  # behind the last one there is nothing to save
        routers = ExitRouters(layers, config.hidden_size, WIDTH).to(self.device)
        self.model.requires_grad_(False)

        def loss_of(step: int) -> Tensor:
            layer = int(np.random.default_rng((self.seed, 19, step)).integers(layers))
            return exit_loss(routers, exit_sample(self.model, self.inputs(step), layer))

        def scores() -> dict[str, float]:
            right: list[float] = []
            for layer in range(layers):
                sample = exit_sample(self.model, self.inputs(10**6 + layer), layer)
                with torch.no_grad():
                    leaves = mm.DyVTE().exits(routers(sample.features, layer))
                right += (leaves == sample.safe.to(leaves.device)).float().tolist()
            found = {"right exits": float(np.mean(right)), "stock": self.accuracy()}
            with mm.compressed(self.model, mm.DyVTE().holding(routers)):
                found["with exits"] = evaluate(self.model, self.processor, self.held_out).accuracy()
                tokens = visual_tokens(self.model)
            return {**found, "visual tokens": float(np.mean(tokens)) / max(tokens[0], 1e-9)}

        self.run_stage("dyvte", [routers], self.recipe.steps, self.recipe.rate, loss_of, scores)
        tensors = {name: t.detach() for name, t in routers.state_dict().items()}
        return self._done(Saved("dyvte", self.base, tensors, {"width": WIDTH}, self.about(scores())))

    # ------------------------------------------------------------------ tokenflex
    def _tokenflex(self) -> Path:
        projector = fresh_projector(self.model).to(self.device)
        self.model.requires_grad_(False)
        aligning = self.recipe.steps // 3

        def loss_of(step: int) -> Tensor:
            share = draw_share(step, self.seed)
            with self.precision():
                loss, error = flexible_loss(self.model, projector, self.inputs(step), share, 1.0)
            return error + (0.1 if step < aligning else 1.0) * loss

        def scores() -> dict[str, float]:
            found = {}
            for share in SHARES:
                percent = f"{100 * share:.0f} %"
                found[f"trained {percent}"] = self.accuracy(mm.TokenFlex(keep=share).holding(projector))
                found[f"own {percent}"] = self.accuracy(mm.TokenFlex(keep=share))
            return found

        self.run_stage("tokenflex", [projector], self.recipe.steps, self.recipe.rate, loss_of, scores)
        tensors = {name: t.detach() for name, t in projector.state_dict().items()}
        options = {"shares": list(SHARES), "chances": list(CHANCES)}
        return self._done(Saved("tokenflex", self.base, tensors, options, self.about(scores())))

    # ------------------------------------------------------------------ mixture of depths
    def _depth(self) -> Path:
        self.model.requires_grad_(False)
        mm.convert(self.model, self.method, **OPTIONS[self.method])
        made = mm.conversion(self.model)
        base = self.model.model
        trained: list[nn.Module] = [base.language_model]
        if self.model.get_output_embeddings() is not None:
            trained.append(self.model.get_output_embeddings())
        for module in trained:
            module.requires_grad_(True)

        def loss_of(step: int) -> Tensor:
            given = self.inputs(step)
            labels = given.pop("labels")
            self.model.train()
            try:
                with self.precision():
                    logits = self.model(**given, use_cache=False).logits
            finally:
                self.model.eval()
            return weighted_loss(logits, labels) + made.router_loss()

        def scores() -> dict[str, float]:
            accuracy = self.accuracy()
            tokens = np.array(made.engine.tokens, dtype=float).sum(1)
            return {"accuracy": accuracy, "tokens per layer": float(np.mean(tokens / tokens[0]))}

        self.run_stage(self.method, trained, self.recipe.steps, self.recipe.rate, loss_of, scores)
        target = made.save(self.folder / "weights", self.about(scores()), torch.float16)
        self.console.print(f"saved {target}")
        mm.unconvert(self.model)
        return target

    def _done(self, saved: Saved) -> Path:
        """Write weights in half precision."""
        half = {name: t.to(torch.float16) for name, t in saved.tensors.items()}
        target = replace(saved, tensors=half).save(self.folder / "weights")
        self.console.print(f"saved {target}")
        return target
