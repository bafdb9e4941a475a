# SPDX-License-Identifier: Apache-2.0
"""Training of the embedded model of pages, in two stages that can be stopped and restarted at any time.

1. read: the encoder learns to tell what is written at every token, from snippets of a few lines and then from whole pages;
2. answer: encoder, projector and language model learn to answer all questions about a page; linear read-outs keep in the tokens
   what the encoder knows.

All questions about a page share its visual tokens in one sequence. A mask keeps them apart and each one begins at the position
behind the page, so that every answer is computed as if its question were alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from ..loop import Loop
from ..model import HIDDEN
from ..questions import Question
from .content import SPLITS
from .labels import LABELS, token_labels
from .layout import Page, draw_page, make_page
from .model import WORDS, PageReader
from .questions import KINDS


@dataclass(frozen=True)
class PageRecipe:
    """Sizes of the training run."""

    pages: int = 200_000
    """Seeds of training pages, and of snippets."""
    dev_pages: int = 96
    read_steps: int = 900
    read_snippets: int = 32
    read_pages: int = 8
    """Whole pages of a step of the read stage, with half the snippets, once `only_snippets` of it is over."""
    only_snippets: float = 0.4
    read_rate: float = 2e-3
    answer_steps: int = 1350
    answer_batch: int = 8
    answer_rate: float = 1.2e-3
    turns: int = 16
    """Most questions about a page in a sequence."""
    save_every: int = 75
    """Steps between checkpoints, each with an evaluation on dev pages."""
    seed: int = 0


def half_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention with its softmax in the precision of the values: on a CPU twice as fast as the others in bfloat16, backward too."""
    logits = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        logits = logits.masked_fill(~attention_mask, torch.finfo(logits.dtype).min)
    return (logits.softmax(-1) @ value).transpose(1, 2), None


def questions_of(page: Page, most: int, rng: np.random.Generator) -> list[Question]:
    """At most so many different questions about a page: kinds in turn, those of each kind in random order."""
    piles = [[*found(page.content, rng)] for found in KINDS.values()]
    for pile in piles:
        rng.shuffle(pile)  # type: ignore[arg-type]
    piles = [piles[int(i)] for i in rng.permutation(len(piles)) if piles[int(i)]]
    asked: list[Question] = []
    while piles and len(asked) < most:
        asked += [pile.pop() for pile in piles]
        piles = [pile for pile in piles if pile]
    return asked[:most]


@dataclass
class Packed:
    """Conversations about a batch of pages, padded on the right. input_ids, labels (-100: none), turn (-1: none) [batch, length];
    position_ids [3, batch, length]; mask: who sees whom [batch, 1, length, length]."""

    input_ids: Tensor
    labels: Tensor
    turn: Tensor
    position_ids: Tensor
    mask: Tensor


class PageTrainer(Loop):
    """Runs the stages in one folder; whatever the folder already holds is not done again."""

    def __init__(self, folder: Path, recipe: PageRecipe | None = None, device: str | None = None) -> None:
        self.recipe = recipe or PageRecipe()
        super().__init__(folder, self.recipe.seed, self.recipe.save_every, device)
        self.family = PageReader()
        self.processor = self.family.make_processor()
        torch.manual_seed(self.recipe.seed)
        self.model = self.family.make_model(self.processor.tokenizer).to(self.device)
        if self.device.type == "cpu":
            AttentionInterface.register("half", half_attention)
            self.model.set_attn_implementation("half")
        self.vocabulary = self.processor.tokenizer.get_vocab()
        self.read = nn.Linear(HIDDEN, sum(LABELS.values())).to(self.device)
        self.start_reading()

    @torch.no_grad()
    def start_reading(self) -> None:
        """Words are read out of a token as the language model embeds them, at first."""
        words = self.model.get_input_embeddings().weight[[self.vocabulary[word] for word in WORDS]]
        self.read.weight[1 : 1 + len(WORDS)] = words / words.norm(dim=1, keepdim=True)

    # ------------------------------------------------------------------ data
    def draw(self, step: int, size: int, salt: int, snippet: bool = False) -> list[Page]:
        """Training pages of one step, a function of seed, stage and step alone."""
        rng = np.random.default_rng((self.recipe.seed, salt, step))
        return [make_page(int(i), "train", snippet) for i in rng.integers(self.recipe.pages, size=size)]

    def dev(self) -> list[Page]:
        return [make_page(seed, SPLITS[1]) for seed in range(self.recipe.dev_pages)]

    def inputs(self, batch: list[Page], augment: bool) -> dict[str, Any]:
        """What the processor makes of the pages, with the beginning of the prompt."""
        images = [draw_page(page) for page in batch]
        made = self.processor(
            images=images, text=[f"USER: {self.family.image}"] * len(batch), padding=True, padding_side="right",
            return_tensors="pt", images_kwargs={"do_resize": False},
        ).to(self.device)  # fmt: skip
        if augment:
            pixels = made["pixel_values"]
            made["pixel_values"] = pixels * (1 + 0.1 * torch.randn(()).item()) + 0.05 * torch.randn_like(pixels)
        return made

    def pack(self, made: dict[str, Any], asked: list[list[Question]]) -> Packed:
        """All questions about each page behind its visual tokens."""
        begin = made["attention_mask"].sum(1).tolist()
        places, _ = self.model.model.get_rope_index(
            made["input_ids"], mm_token_type_ids=made["mm_token_type_ids"], image_grid_thw=made["image_grid_thw"],
            attention_mask=made["attention_mask"],
        )  # fmt: skip
        rows = []
        for questions in asked:
            turns = []
            for question in questions:
                prompt, answer = [*question.text.split(), "ASSISTANT:"], [*question.answer.split(), "</s>"]
                turns.append([(self.vocabulary[w], i >= len(prompt)) for i, w in enumerate([*prompt, *answer])])
            rows.append(turns)
        lengths = [first + sum(map(len, turns)) for first, turns in zip(begin, rows, strict=True)]
        shape = (len(asked), max(lengths))
        ids, labels, turn = torch.full(shape, self.vocabulary["<pad>"]), torch.full(shape, -100), torch.full(shape, -1)
        position = torch.zeros(3, *shape, dtype=torch.long)
        number = torch.full(shape, -2)  # -2: padding, -1: the page, then the turns
        for b, (first, turns) in enumerate(zip(begin, rows, strict=True)):
            ids[b, :first] = made["input_ids"][b, :first].cpu()
            position[:, b, :first] = places[:, b, :first].cpu()
            number[b, :first] = -1
            at, after = first, int(places[:, b, :first].max()) + 1
            for i, words in enumerate(turns):
                span = slice(at, at + len(words))
                ids[b, span] = torch.tensor([word for word, _ in words])
                said = torch.tensor([answer for _, answer in words])
                labels[b, span] = ids[b, span].masked_fill(~said, -100)
                turn[b, span] = torch.full((len(words),), i).masked_fill(~said, -1)
                position[:, b, span] = after + torch.arange(len(words))
                number[b, span] = i
                at += len(words)
        same = (number[:, :, None] == number[:, None]) | (number[:, None] == -1)
        causal = torch.ones(shape[1], shape[1], dtype=torch.bool).tril()
        mask = (same & causal)[:, None]
        return Packed(*(t.to(self.device) for t in (ids, labels, turn, position, mask)))

    # ------------------------------------------------------------------ stage 1
    def label_loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of all labels, read from normalised tokens [tokens, HIDDEN]."""
        loss = tokens.new_zeros((), dtype=torch.float32)
        for i, (name, logits) in enumerate(zip(LABELS, self.read_out(tokens), strict=True)):
            weight = torch.ones(logits.shape[-1], device=self.device)
            weight[0] = 0.1
            loss = loss + (2.0 if name == "word" else 1.0) * F.cross_entropy(logits, labels[i], weight)
        return loss

    def read_out(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Logits of every label, from the normalised tokens as a language model sees them."""
        return self.read(F.rms_norm(tokens.float(), (HIDDEN,))).split(list(LABELS.values()), -1)

    def labels(self, batch: list[Page]) -> Tensor:
        return torch.from_numpy(np.concatenate([token_labels(page) for page in batch], 1)).to(self.device)

    def tokens(self, batch: list[Page], augment: bool) -> Tensor:
        """LLM tokens of all pages in a row [tokens, HIDDEN]."""
        with self.precision():
            return self.family.features(self.model, self.inputs(batch, augment))[0]

    def read_loss(self, step: int) -> Tensor:
        recipe = self.recipe
        whole = step >= recipe.only_snippets * recipe.read_steps
        batch = self.draw(step, recipe.read_snippets // (2 if whole else 1), 1, snippet=True)
        if whole:
            batch += self.draw(step, recipe.read_pages, 2)
        return self.label_loss(self.tokens(batch, augment=True), self.labels(batch))

    @torch.no_grad()
    def read_scores(self) -> dict[str, float]:
        """Accuracy per label over the tokens of dev pages that have one."""
        right: dict[str, list[float]] = {name: [] for name in LABELS}
        pages = self.dev()[:32]
        for first in range(0, len(pages), 8):
            batch = pages[first : first + 8]
            labels = self.labels(batch)
            for name, wanted, logits in zip(LABELS, labels, self.read_out(self.tokens(batch, False)), strict=True):
                right[name] += (logits.argmax(-1) == wanted)[wanted > 0].float().tolist()
        return {name: float(np.mean(values)) for name, values in right.items()}

    # ------------------------------------------------------------------ stage 2
    def answers(self, batch: list[Page], asked: list[list[Question]], augment: bool) -> tuple[Tensor, Packed, Tensor]:
        """Logits at the tokens before an answer's, the conversations, and the LLM tokens of the pages in a row."""
        made = self.inputs(batch, augment)
        packed = self.pack(made, asked)
        with self.precision():
            visual, output = self.family.features(self.model, made)
            levels = [torch.cat(list(level)) for level in output.deepstack_features]
            embeds = self.model.get_input_embeddings()(packed.input_ids)
            there = packed.input_ids == self.model.config.image_token_id
            embeds = embeds.masked_scatter(there[..., None].expand_as(embeds), visual.to(embeds.dtype))
            hidden = self.model.model.language_model(
                inputs_embeds=embeds, attention_mask=packed.mask, position_ids=packed.position_ids, use_cache=False,
                visual_pos_masks=there, deepstack_visual_embeds=levels,
            ).last_hidden_state  # fmt: skip
            return self.model.lm_head(hidden[:, :-1][packed.labels[:, 1:] >= 0]), packed, visual

    def answer_loss(self, step: int) -> Tensor:
        """Cross-entropy of the answers, and of the labels."""
        batch = self.draw(step, self.recipe.answer_batch, 3)
        rng = np.random.default_rng((self.recipe.seed, 4, step))
        asked = [questions_of(page, self.recipe.turns, rng) for page in batch]
        logits, packed, visual = self.answers(batch, asked, augment=True)
        loss = F.cross_entropy(logits.float(), packed.labels[:, 1:][packed.labels[:, 1:] >= 0])
        return loss + 0.1 * self.label_loss(visual, self.labels(batch))

    @torch.no_grad()
    def answer_scores(self) -> dict[str, float]:
        """Share of whole answers that greedy decoding would get right, per question type, on dev pages."""
        rng = np.random.default_rng(99)
        right: dict[str, list[float]] = {kind: [] for kind in KINDS}
        pages = self.dev()
        for first in range(0, len(pages), 16):
            batch = pages[first : first + 16]
            asked = [questions_of(page, 12, rng) for page in batch]
            logits, packed, _ = self.answers(batch, asked, augment=False)
            there = packed.labels >= 0
            wrong = logits.argmax(-1) != packed.labels[:, 1:][there[:, 1:]]
            row = torch.arange(len(batch), device=self.device)[:, None].expand_as(there)[there]
            for b, i, bad in zip(row.tolist(), packed.turn[there].tolist(), wrong.tolist(), strict=True):
                if bad:
                    asked[b][i] = Question(asked[b][i].kind, "", "")
            for questions in asked:
                for question in questions:
                    right[question.kind].append(float(bool(question.text)))
        scores = {kind: float(np.mean(values)) for kind, values in right.items()}
        return {**scores, "mean": float(np.mean(list(scores.values())))}

    # ------------------------------------------------------------------ all
    def run(self) -> Path:
        """Run what is left of the stages and save the checkpoint; returns its folder."""
        recipe, model = self.recipe, self.model
        tower, projector = self.family.tower(model), self.family.projector(model)
        self.run_stage(
            "read",
            [*tower, *projector, self.read],
            recipe.read_steps,
            recipe.read_rate,
            self.read_loss,
            self.read_scores,
        )
        self.run_stage(
            "answer", [model.model, model.lm_head, self.read], recipe.answer_steps, recipe.answer_rate, self.answer_loss,
            self.answer_scores,
        )  # fmt: skip
        return self.save(self.model, self.processor, self.recipe)
