# SPDX-License-Identifier: Apache-2.0
"""Training of the embedded model, in five stages that can be stopped and restarted at any time.

1. vision: the CLIP tower learns to tell colour, shape, character and neighbours of every patch (from the layer that
   LLaVA reads), and its CLS token what the whole picture shows (so that CLS attention means something, as in CLIP);
2. align: the projector learns to turn a patch into the sum of the word embeddings of its attributes and its place;
3. language: projector and language model learn to answer, several questions per picture in one sequence, at first from
   pictures with few objects. The tower stays frozen;
4. finish: the same with the hard question types asked twice as often, while linear probes keep in the projected patches
   what the tower knows. Without them the projector forgets what the questions that are learned last need: it lost the
   columns of the picture, and places and relations stayed at 30 and 44 %;
5. relations: the same with half of all questions on relations, which take longest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..synthetic.questions import KINDS
from ..synthetic.scenes import BOARD, CHARACTERS, CODE_LENGTH, COLORS, COLUMNS, ROWS, SHAPES, scenes
from .data import HARD, PATCH_LABELS, Encoder, Tokens, conversation, normalize, patch_labels, pictures, scene_labels
from .loop import Loop
from .model import GRID, HIDDEN, make_model, make_processor


@dataclass(frozen=True)
class Recipe:
    """Sizes of the training run. The defaults are those of the embedded weights, whose run was stopped and replanned a few
    times: parts of the vision, finish and relations stages ran under a cosine of another length."""

    scenes: int = 60_000
    test_scenes: int = 512
    vision_steps: int = 2000
    vision_batch: int = 64
    align_steps: int = 600
    language_steps: int = 1500
    language_batch: int = 32
    finish_steps: int = 2000
    relations_steps: int = 1300
    finish_batch: int = 20
    turns: int = 12
    vision_rate: float = 1.5e-3
    language_rate: float = 1.5e-3
    language_horizon: int = 3500
    """Where the cosine of the language stage would reach its end (likewise for the finish stage)."""
    finish_rate: float = 1.2e-3
    finish_horizon: int = 2700
    relations_rate: float = 1e-3
    few_objects: float = 0.35
    """Part of the language stage that uses only pictures with at most three objects."""
    save_every: int = 250
    """Steps between checkpoints, each with an evaluation on held-out scenes."""
    seed: int = 0


class Probes(nn.Module):
    """Linear read-outs of the projected patches in the last stage: labels, row and column; thrown away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [*PATCH_LABELS.values(), BOARD, BOARD]
        self.read = nn.Linear(HIDDEN, sum(self.sizes))


class Heads(nn.Module):
    """Linear read-outs of the vision stage; thrown away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(HIDDEN, sum(PATCH_LABELS.values()))
        self.present = nn.Linear(HIDDEN, len(COLORS) * len(SHAPES))
        self.code = nn.Linear(HIDDEN, CODE_LENGTH * len(CHARACTERS))


class Trainer(Loop):
    """Runs the stages of one recipe in one folder; whatever the folder already holds is not done again."""

    def __init__(self, folder: Path, recipe: Recipe | None = None, device: str | None = None) -> None:
        self.recipe = recipe or Recipe()
        super().__init__(folder, self.recipe.seed, self.recipe.save_every, device)
        self.processor = make_processor()
        self.model = make_model(self.processor.tokenizer, self.recipe.seed).to(self.device)
        if self.device.type == "cpu":  # the backward pass of sdpa in bfloat16 is slow there
            self.model.set_attn_implementation({"vision_config": "eager"})
        torch.manual_seed(self.recipe.seed + 1)
        self.heads, self.probes = Heads().to(self.device), Probes().to(self.device)
        self.encode = Encoder(self.processor.tokenizer)

    # ------------------------------------------------------------------ data
    def load_data(self) -> None:
        recipe = self.recipe
        self.console.print(f"drawing {recipe.scenes} training and {recipe.test_scenes} test scenes (once) ...")
        self.train, self.test = scenes("train", recipe.scenes), scenes("test", recipe.test_scenes)
        self.train_pixels = pictures(self.train, self.folder / "train.npy")
        self.test_pixels = pictures(self.test, self.folder / "test.npy")
        self.few = [i for i, scene in enumerate(self.train) if len(scene.things) <= 3]

    def labels(self, rows: list[int]) -> Tensor:
        """Patch labels of training scenes, [n, labels, patches]."""
        return torch.from_numpy(np.stack([patch_labels(self.train[row]) for row in rows])).to(self.device)

    def cells(self) -> tuple[Tensor, Tensor]:
        """Row and column of the board cell of every patch, counted from 1, [patches] each."""
        cell = torch.arange(GRID, device=self.device) // (GRID // BOARD) + 1
        return cell.repeat_interleave(GRID), cell.repeat(GRID)

    def pixels(self, rows: list[int], augment: bool, test: bool = False) -> Tensor:
        source = self.test_pixels if test else self.train_pixels
        pixels = normalize(source[torch.tensor(rows)].to(self.device))
        if augment:
            gain = 1 + 0.15 * torch.randn(len(rows), 3, 1, 1, device=self.device)
            pixels = pixels * gain.clamp(0.6, 1.4) + 0.05 * torch.randn_like(pixels)
        return pixels

    def rows(self, step: int, size: int) -> list[int]:
        """The training scenes of one step, a function of seed and step alone."""
        rng = np.random.default_rng((self.recipe.seed, step))
        return [int(i) for i in rng.integers(len(self.train), size=size)]

    def train_stage(
        self, stage: str, modules: list[nn.Module], steps: int, size: int, rate: float, horizon: int | None = None
    ) -> None:
        """Run `stage` with its own loss and scores on batches of `size`."""

        def loss_of(step: int) -> Tensor:
            rows = self.rows(step, size)
            if stage == "language" and step < self.recipe.few_objects * steps:
                rows = [self.few[row % len(self.few)] for row in rows]
            return getattr(self, f"{stage}_loss")(rows, step)

        self.run_stage(stage, modules, steps, rate, loss_of, getattr(self, f"{stage}_scores"), horizon)

    # ------------------------------------------------------------------ stage 1
    def run_tower(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Patch features of the layer LLaVA reads [n, patches, HIDDEN] and the pooled CLS output [n, HIDDEN]."""
        out = self.model.model.vision_tower(pixels, output_hidden_states=True)
        layer = self.model.config.vision_feature_layer
        return out.hidden_states[layer][:, 1:], out.pooler_output

    def vision_loss(self, rows: list[int], step: int) -> Tensor:
        with self.precision():
            features, pooled = self.run_tower(self.pixels(rows, augment=True))
            patch, present, code = self.heads.patch(features), self.heads.present(pooled), self.heads.code(pooled)
        picked = [self.train[row] for row in rows]
        labels = self.labels(rows)
        loss = patch.new_zeros((), dtype=torch.float32)
        for i, (name, logits) in enumerate(
            zip(PATCH_LABELS, patch.float().split(list(PATCH_LABELS.values()), -1), strict=True)
        ):
            weight = torch.ones(logits.shape[-1], device=self.device)
            weight[0] = 0.2
            part = F.cross_entropy(logits.flatten(0, 1), labels[:, i].flatten(), weight)
            loss = loss + (0.3 if name.startswith(("left", "right", "above", "below")) else 1.0) * part
        pairs, codes = (
            torch.from_numpy(np.stack(t)).to(self.device) for t in zip(*map(scene_labels, picked), strict=True)
        )
        loss = loss + 4 * F.binary_cross_entropy_with_logits(present.float(), pairs)
        return loss + 0.3 * F.cross_entropy(code.float().view(-1, len(CHARACTERS)), codes.flatten())

    @torch.no_grad()
    def vision_scores(self) -> dict[str, float]:
        """Accuracy per label over the patches that have one, and of the code read by CLS."""
        right: dict[str, list[float]] = {name: [] for name in (*PATCH_LABELS, "cls code")}
        for first in range(0, len(self.test), 128):
            rows = list(range(first, min(first + 128, len(self.test))))
            with self.precision():
                features, pooled = self.run_tower(self.pixels(rows, augment=False, test=True))
                patch, code = self.heads.patch(features), self.heads.code(pooled)
            labels = torch.from_numpy(np.stack([patch_labels(self.test[r]) for r in rows])).to(self.device)
            for i, (name, logits) in enumerate(
                zip(PATCH_LABELS, patch.split(list(PATCH_LABELS.values()), -1), strict=True)
            ):
                there = labels[:, i] > 0
                right[name] += (logits.argmax(-1) == labels[:, i])[there].float().tolist()
            codes = torch.from_numpy(np.stack([scene_labels(self.test[r])[1] for r in rows])).to(self.device)
            right["cls code"] += (
                (code.view(-1, CODE_LENGTH, len(CHARACTERS)).argmax(-1) == codes).float().flatten().tolist()
            )
        return {name: float(np.mean(values)) for name, values in right.items()}

    # ------------------------------------------------------------------ stage 2
    def align_loss(self, rows: list[int], step: int) -> Tensor:
        """Squared distance between a projected patch and the sum of the word embeddings of what it shows and where
        (background: the word "picture"), relative to the size of a word embedding."""
        labels = self.labels(rows)
        vocabulary, words = self.encode.vocabulary, self.model.get_input_embeddings().weight.detach()

        def table(names: Iterable[str]) -> Tensor:
            return torch.stack([torch.zeros_like(words[0]), *(words[vocabulary[name]] for name in names)])

        shown = (labels[:, :3] > 0).any(1)
        target = words[vocabulary["picture"]] * ~shown[..., None]
        for i, names in enumerate((COLORS, SHAPES, CHARACTERS)):
            target = target + table(names)[labels[:, i]]
        row, column = self.cells()
        target = target + (table(ROWS)[row] + table(COLUMNS)[column]) * shown[..., None]
        with torch.no_grad(), self.precision():
            features, _ = self.run_tower(self.pixels(rows, augment=False))
        error = (self.model.model.multi_modal_projector(features.float()) - target).square().mean(-1)
        return (error[shown].mean() + error[~shown].mean()) / words.square().mean()

    def align_scores(self) -> dict[str, float]:
        return {}

    # ------------------------------------------------------------------ stage 3
    def language_logits(self, pixels: Tensor, batch: Tokens) -> tuple[Tensor, Tensor]:
        """Logits of all tokens [n, length, words], and the projected patches [n, patches, HIDDEN]."""
        with self.precision():
            with torch.no_grad():
                features, _ = self.run_tower(pixels)
            visual = self.model.model.multi_modal_projector(features)
            ids = batch.input_ids.to(self.device)
            embeds = self.model.get_input_embeddings()(ids)
            mask = (ids == self.model.config.image_token_id)[..., None].expand_as(embeds)
            embeds = embeds.masked_scatter(mask, visual.to(embeds.dtype))
            hidden = self.model.model.language_model(
                inputs_embeds=embeds, attention_mask=batch.attention_mask.to(self.device), use_cache=False
            ).last_hidden_state
            return self.model.lm_head(hidden), visual

    def answer_loss(self, rows: list[int], step: int, more: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the answers of one conversation per picture, and the projected patches."""
        rng = np.random.default_rng((self.recipe.seed, 2, step))
        asked = [conversation(self.train[row], self.recipe.turns, rng, more) for row in rows]
        batch = self.encode(asked, [self.encode.square] * len(rows))
        logits, visual = self.language_logits(self.pixels(rows, augment=True), batch)
        labels = batch.labels.to(self.device)[:, 1:]
        return F.cross_entropy(logits[:, :-1][labels >= 0].float(), labels[labels >= 0]), visual

    def language_loss(self, rows: list[int], step: int) -> Tensor:
        return self.answer_loss(rows, step, ())[0]

    @torch.no_grad()
    def language_scores(self) -> dict[str, float]:
        """Share of whole answers that greedy decoding would get right, per question type, on held-out scenes."""
        rng = np.random.default_rng(99)
        right: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for first in range(0, len(self.test), 64):
            rows = list(range(first, min(first + 64, len(self.test))))
            asked = [conversation(self.test[row], 6, rng) for row in rows]
            batch = self.encode(asked, [self.encode.square] * len(rows))
            logits, _ = self.language_logits(self.pixels(rows, augment=False, test=True), batch)
            wrong = (logits[:, :-1].argmax(-1).cpu() != batch.labels[:, 1:]) & (batch.labels[:, 1:] >= 0)
            for b, questions in enumerate(asked):
                for i, question in enumerate(questions):
                    right[question.kind].append(float(not (wrong[b] & (batch.turn[b, 1:] == i)).any()))
        scores = {kind: float(np.mean(values)) for kind, values in right.items()}
        return {**scores, "mean": float(np.mean(list(scores.values())))}

    # ------------------------------------------------------------------ stage 4
    def finish_loss(self, rows: list[int], step: int) -> Tensor:
        return self.probed_loss(rows, step + self.recipe.language_steps, HARD)

    def relations_loss(self, rows: list[int], step: int) -> Tensor:
        first = self.recipe.language_steps + self.recipe.finish_steps
        return self.probed_loss(rows, first + step, ("relation",) * 7)

    def probed_loss(self, rows: list[int], step: int, more: tuple[str, ...]) -> Tensor:
        """Loss of the answers, and of the probes."""
        loss, visual = self.answer_loss(rows, step, more)
        labels = self.labels(rows)
        shown = (labels[:, :3] > 0).any(1)
        row, column = (cell.expand(len(rows), -1)[shown] - 1 for cell in self.cells())
        wanted = [*(labels[:, i][shown] for i in range(labels.shape[1])), row, column]
        read = self.probes.read(F.rms_norm(visual.float(), (HIDDEN,)))[shown].split(self.probes.sizes, -1)
        return loss + 0.05 * sum(F.cross_entropy(r, w) for r, w in zip(read, wanted, strict=True))

    def finish_scores(self) -> dict[str, float]:
        return self.language_scores()

    def relations_scores(self) -> dict[str, float]:
        return self.language_scores()

    # ------------------------------------------------------------------ all
    def run(self) -> Path:
        """Run what is left of the three stages and save the checkpoint; returns its folder."""
        self.load_data()
        base, recipe = self.model.model, self.recipe
        answering = [base.multi_modal_projector, base.language_model, self.model.lm_head]
        self.train_stage(
            "vision", [base.vision_tower, self.heads], recipe.vision_steps, recipe.vision_batch, recipe.vision_rate
        )
        self.train_stage("align", [base.multi_modal_projector], recipe.align_steps, recipe.language_batch, 5e-3)
        self.train_stage(
            "language",
            answering,
            recipe.language_steps,
            recipe.language_batch,
            recipe.language_rate,
            recipe.language_horizon,
        )
        probed = [*answering, self.probes]
        self.train_stage(
            "finish", probed, recipe.finish_steps, recipe.finish_batch, recipe.finish_rate, recipe.finish_horizon
        )
        self.train_stage("relations", probed, recipe.relations_steps, recipe.finish_batch, recipe.relations_rate)
        return self.save(self.model, self.processor, self.recipe)
