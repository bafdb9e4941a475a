# SPDX-License-Identifier: Apache-2.0
"""Training of the embedded model of pages, in two stages that can be stopped and restarted at any time.

1. read: the encoder learns to tell what is written at every token, from snippets of a few lines and then from whole pages;
2. answer: encoder, projector and language model learn to answer all questions about a page. Linear read-outs keep in the tokens
   what the encoder knows, and a few heads are taught where to look: names in a question at what stands in their line, and the
   answer at the names. Without that the model learned headings and counts in 1,000 steps, and to look something up not at all.

All questions about a page share its visual tokens in one sequence (`packed.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...synthetic.pages.content import COLUMNS, SPLITS
from ...synthetic.pages.layout import Page, draw_page, make_page
from ...synthetic.pages.questions import KINDS
from ...synthetic.questions import Question
from ..answering import Answering
from ..data import noisy
from ..model import HIDDEN
from ..packed import Packed, pack, right_answers
from .labels import LABELS, token_labels, tokens_asked_about
from .model import CHARACTERS_WRITTEN, WORDS, PageReader

LOOKS, LOOKING = (3, 4), 2
"""Two layers of the language model, and how many of their heads, that are taught where to look."""


@dataclass(frozen=True)
class PageRecipe:
    """Sizes of the training run.

    The weights in the package were not made in one go. The first 300 steps of the read stage had fewer codes in their snippets, the
    first 675 codes of three characters. The answer stage had 8 pages in a step until step 150 and 5 from there on; the loss of
    looking came at step 600, at first of the answer alone, in its form of today at step 2000. It ran under cosines to 1150, 1800,
    1350, 2200, 3100 and 2800 steps at a rate of 1.2e-3, and from step 2400 on to 3200 at 2.5e-3.
    """

    pages: int = 200_000
    """Seeds of training pages, and of snippets."""
    dev_pages: int = 48
    read_steps: int = 900
    read_snippets: int = 32
    read_pages: int = 8
    """Whole pages of a step of the read stage, with half the snippets, once `only_snippets` of it is over."""
    only_snippets: float = 0.4
    read_rate: float = 2e-3
    answer_steps: int = 3200
    answer_batch: int = 5
    answer_rate: float = 1.2e-3
    turns: int = 10
    """Most questions about a page in a sequence."""
    save_every: int = 100
    """Steps between checkpoints, each with an evaluation on dev pages."""
    seed: int = 0
    start: str = ""
    """Folder in the package's assets of a run before, from whose weights the answer stage goes on (no read stage then)."""


GO_ON = PageRecipe(start="qwen3-vl-pages")
"""What `mmcompress train qwen3-vl-pages` runs: the answer stage from the weights in the package, whose encoder reads pages and
whose language model does not yet look up words, codes and cells well. `PageRecipe()` begins from nothing."""


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


class PageTrainer(Answering):
    """Runs the stages in one folder; whatever the folder already holds is not done again."""

    recipe: PageRecipe
    family: PageReader
    reads: nn.Linear

    def __init__(self, folder: Path, recipe: PageRecipe | None = None, device: str | None = None) -> None:
        super().__init__(folder, recipe or PageRecipe(), PageReader(), device)

    @torch.no_grad()
    def make_reads(self) -> nn.Linear:
        """Words are read out of a token as the language model embeds them, at first."""
        reads = nn.Linear(HIDDEN, sum(LABELS.values()))
        words = self.model.get_input_embeddings().weight[[self.vocabulary[word] for word in WORDS]]
        reads.weight[1 : 1 + len(WORDS)] = words / words.norm(dim=1, keepdim=True)
        return reads

    @torch.no_grad()
    def start_answering(self) -> None:
        """The language model writes a word, and a first character, as the encoder's tokens are read; and a word in a question is
        embedded as the tokens that stand in its line, or below it, and those where it is written. What is left to learn is to
        look and to copy, which is the same for all words."""
        sizes = list(LABELS.values())
        rows = {name: part - part.mean(0) for name, part in zip(LABELS, self.reads.weight.split(sizes), strict=True)}
        embeds, head = self.model.get_input_embeddings().weight, self.model.lm_head.weight
        long = [table.norm(dim=1).mean() for table in (embeds, head)]
        for number, word in enumerate(WORDS, 1):
            written = F.normalize(rows["word"][number], dim=0)
            named = F.normalize(rows["column" if word in COLUMNS else "label"][number], dim=0)
            embeds[self.vocabulary[word]] = long[0] * F.normalize(written + named, dim=0)
            head[self.vocabulary[word]] = long[1] * written
        for number, character in enumerate(CHARACTERS_WRITTEN, 1):
            if character in self.vocabulary:
                head[self.vocabulary[character]] = long[1] * F.normalize(rows["slot 1"][number], dim=0)

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
            made["pixel_values"] = noisy(made["pixel_values"])
        return made

    def pack(self, made: dict[str, Any], asked: list[list[Question]]) -> Packed:
        """All questions about each page behind its visual tokens."""
        places, _ = self.model.model.get_rope_index(
            made["input_ids"], mm_token_type_ids=made["mm_token_type_ids"], image_grid_thw=made["image_grid_thw"],
            attention_mask=made["attention_mask"],
        )  # fmt: skip
        return pack(self.vocabulary, made, places, asked)

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
        return self.reads(F.rms_norm(tokens.float(), (HIDDEN,))).split(list(LABELS.values()), -1)

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
        watched = [self.model.model.language_model.layers[layer].self_attn for layer in LOOKS]
        for module in watched:
            module.looked = None
        rng = np.random.default_rng((self.recipe.seed, 4, step))
        asked = [questions_of(page, self.recipe.turns, rng) for page in batch]
        logits, packed, visual = self.answers(batch, asked, augment=True)
        loss = F.cross_entropy(logits.float(), packed.labels[:, 1:][packed.labels[:, 1:] >= 0])
        loss = loss + 0.3 * self.label_loss(visual, self.labels(batch))
        loss = loss + 0.3 * self.look_loss(batch, asked, packed, *(module.looked for module in watched))
        for module in watched:
            del module.looked
        return loss

    def look_loss(
        self, batch: list[Page], asked: list[list[Question]], packed: Packed, first: Tensor, second: Tensor
    ) -> Tensor:
        """How little attention some heads pay to what a question is about: those of one layer to the tokens of the page, and those
        of the next one, where the words of the answer come from, to the names in the question."""
        there = packed.input_ids == self.model.config.image_token_id
        length = packed.input_ids.shape[1]
        page_looks: list[tuple[int, int, Tensor]] = []
        name_looks: list[tuple[int, int, Tensor]] = []
        for b, (page, questions) in enumerate(zip(batch, asked, strict=True)):
            labels, start = torch.from_numpy(token_labels(page)).to(self.device), int(there[b].nonzero()[0])
            for i, question in enumerate(questions):
                begin = int((packed.turn[b] == i).nonzero()[0])
                found = tokens_asked_about(labels, question)
                page_looks += [(b, begin + p, F.pad(at, (start, length - start - len(at)))) for p, at in found]
                names = torch.zeros(length, dtype=torch.bool, device=self.device)
                names[[begin + p for p, _ in found if p < -1]] = True
                if names.any():
                    name_looks += [(b, begin + k - 1, names) for k in range(len(question.answer.split()))]
        loss = torch.zeros((), device=self.device)
        for looked, looks in ((first, page_looks), (second, name_looks)):
            if looks:
                rows, places, wanted = zip(*looks, strict=True)
                seen = (looked[rows, :LOOKING, places].float() * torch.stack(wanted)[:, None]).sum(-1).mean(-1)
                loss = loss - (seen + 1e-3).log().mean()
        return loss

    @torch.no_grad()
    def answer_scores(self) -> dict[str, float]:
        """Share of whole answers that greedy decoding would get right, per question type, on dev pages."""
        rng = np.random.default_rng(99)
        right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        pages = self.dev()
        for first in range(0, len(pages), 16):
            batch = pages[first : first + 16]
            asked = [questions_of(page, 12, rng) for page in batch]
            logits, packed, _ = self.answers(batch, asked, augment=False)
            for kind, good in right_answers(logits, packed, asked):
                right[kind].append(good)
        scores = {kind: float(np.mean(values)) for kind, values in right.items()}
        return {**scores, "mean": float(np.mean(list(scores.values())))}

    # ------------------------------------------------------------------ all
    def run(self) -> Path:
        """Run what is left of the stages and save the checkpoint; returns its folder."""
        recipe, model = self.recipe, self.model
        encoder = [*self.family.tower(model), *self.family.projector(model), self.reads]
        if not recipe.start:
            self.run_stage("read", encoder, recipe.read_steps, recipe.read_rate, self.read_loss, self.read_scores)
            if not (self.folder / "answer.pt").exists():
                self.start_answering()
        self.run_stage(
            "answer", [model.model, model.lm_head, self.reads], recipe.answer_steps, recipe.answer_rate, self.answer_loss,
            self.answer_scores,
        )  # fmt: skip
        return self.save_both()
