# SPDX-License-Identifier: Apache-2.0
"""Training of the other embedded models from the embedded LLaVA-1.5: it teaches what a visual token should say.

1. codebook: a linear map from the labels of a patch (colour, shape, character, neighbours, place) to what the projector of
   the embedded LLaVA makes of it. Its language model answers 88 % of the questions on the codebook's tokens alone;
2. vision: a new encoder and projector learn to give the codebook's tokens, for pictures of different sizes. What a token
   cannot know (a tile does not know where it lies in the picture) becomes the mean of what is possible;
3. language: projector and language model (that of the embedded LLaVA at first) learn to answer from these tokens;
4. joint: where the recipe has steps for it, the encoder learns to answer with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...assets import model_path
from ...visuals import Layout
from ..synthetic.questions import KINDS, Question
from ..synthetic.scenes import BOARD, COLORS, SHAPES, Scene, draw, full_of_signs, scenes
from .data import HARD, PATCH_LABELS, Encoder, Tokens, conversation, labels_at, noisy, normalize, pictures, scene_labels
from .families import Family
from .loop import Loop
from .model import GRID, HIDDEN


@dataclass(frozen=True)
class TransferRecipe:
    """Sizes of the training run."""

    scenes: int = 40_000
    test_scenes: int = 256
    codebook_scenes: int = 1500
    vision_steps: int = 1500
    vision_batch: int = 24
    vision_rate: float = 1.5e-3
    language_steps: int = 1000
    language_batch: int = 16
    language_rate: float = 8e-4
    joint_steps: int = 0
    joint_rate: float = 3e-4
    weights: dict[int, float] = field(default_factory=lambda: {0: 0.5, 1: 1.0, 2: 6.0, 3: 0.5})
    """How much the cross-entropy of labels (by place in `PATCH_LABELS`) counts; 0.3 for those that are not named."""
    turns: int = 12
    save_every: int = 250
    """Steps between checkpoints, each with an evaluation on held-out scenes."""
    seed: int = 0


RECIPES = {
    "llava-next-shapes": TransferRecipe(
        vision_steps=1100, vision_batch=12, vision_rate=8e-4, language_steps=600, language_batch=12
    ),
    "qwen3-vl-shapes": TransferRecipe(
        vision_steps=3600, vision_batch=10, vision_rate=1e-3, language_steps=550, language_batch=12
    ),
    "internvl-shapes": TransferRecipe(
        vision_steps=2800, vision_batch=10, vision_rate=1.6e-3, language_steps=920, language_batch=10, joint_steps=1000
    ),
}
"""The embedded weights were not made in one go. The vision stage of `llava-next-shapes` ran its first 300 steps with a batch of 16
at a rate of 5e-4 under a cosine to 300, with equal `weights` and no pictures full of signs. That of `qwen3-vl-shapes` ran under
cosines to 1700, 3500 and 5000 steps; pictures full of signs came at step 2250, the weights of today at step 2600 (with equal
weights it read a quarter of the characters then). That of `internvl-shapes` ran 1500 steps at 1e-3 under a cosine to 1500 before;
its language stage had a batch of 12, began with a language model that 300 steps on the encoder of then had made, and ran under
cosines to 300, to 600, and to 920 at a rate of 1.5e-3; its joint stage ran its first 300 steps under a cosine to 300."""

SIZES = [*PATCH_LABELS.values(), BOARD, BOARD]
"""Classes of every label of a token: what it shows, and the row and column of its cell on the board."""


SQUARE = Layout.raster(1, GRID, GRID)
"""The layout of the embedded LLaVA-1.5."""


@dataclass(frozen=True)
class Shown:
    """A scene as a picture, with the labels of its tokens [labels, tokens], -1 for tokens that are no patches."""

    scene: Scene
    picture: Image.Image
    layout: Layout
    labels: Tensor


def show(scene: Scene, layout_of: Callable[[Image.Image], Layout]) -> Shown:
    """Draw a scene and find out what each of its tokens shows."""
    picture = draw(scene)
    layout = layout_of(picture)
    left, top, right, bottom = layout.boxes().unbind(1)
    x, y = ((left + right) / 2 * scene.size[0]).numpy(), ((top + bottom) / 2 * scene.size[1]).numpy()
    cells = [np.clip(at // side, 0, BOARD - 1) for at, side in ((y, scene.cell[1]), (x, scene.cell[0]))]
    labels = torch.full((len(SIZES), layout.tokens), -1)
    labels[:, layout.patch_tokens()] = torch.from_numpy(np.concatenate([labels_at(scene, x, y), cells]).astype(int))
    return Shown(scene, picture, layout, labels)


def one_hot(labels: Tensor) -> Tensor:
    """Labels [labels, tokens] as the input of the codebook [tokens, sum of SIZES + places]: place counts only where
    something is shown, and apart from that where nothing is."""
    parts = [F.one_hot(labels[i].clamp_min(0), n).float() for i, n in enumerate(SIZES)]
    something = (labels[:3] > 0).any(0)[:, None].float()
    places = parts[-2:]
    return torch.cat([*parts[:-2], *(p * something for p in places), *(p * (1 - something) for p in places)], -1)


class Transfer(Loop):
    """Runs the stages for one family in one folder; whatever the folder already holds is not done again."""

    def __init__(
        self, folder: Path, family: Family, recipe: TransferRecipe | None = None, device: str | None = None
    ) -> None:
        from transformers import LlavaForConditionalGeneration

        self.recipe = recipe or TransferRecipe()
        super().__init__(folder, self.recipe.seed, self.recipe.save_every, device)
        self.family, self.layout_of = family, family.layout
        self.processor = family.make_processor()
        torch.manual_seed(self.recipe.seed)
        self.model = family.make_model(self.processor.tokenizer).to(self.device)
        self.teacher = LlavaForConditionalGeneration.from_pretrained(model_path(), dtype=torch.float32).to(self.device)
        self.adopt()
        family.start(self.model)
        if self.device.type == "cpu":  # the backward pass of sdpa in bfloat16 is slow there
            self.model.set_attn_implementation({"vision_config": "eager"})
        self.read = nn.Linear(HIDDEN, sum(SIZES)).to(self.device)
        self.present = nn.LazyLinear(len(COLORS) * len(SHAPES)).to(self.device)
        self.encode = Encoder(self.processor.tokenizer)

    def adopt(self) -> None:
        """Take over from the embedded LLaVA what the architectures share."""
        mine, theirs = self.model.state_dict(), self.teacher.state_dict()
        with torch.no_grad():
            for name, weight in theirs.items():
                own = mine.get(name)
                if own is None:
                    continue
                if own.shape == weight.shape:
                    own.copy_(weight)
                elif (
                    "embed_tokens" in name or "lm_head" in name
                ):  # the words have the same ids, other tokens come later
                    own[: len(weight)] = weight
            for mine_layer, layer in zip(
                self.model.model.language_model.layers, self.teacher.model.language_model.layers, strict=True
            ):
                for which in ("q", "k"):
                    norm = getattr(mine_layer.self_attn, f"{which}_norm", None)
                    if norm is not None:  # give queries and keys the size that they had without a norm
                        weight = getattr(layer.self_attn, f"{which}_proj").weight * layer.input_layernorm.weight
                        norm.weight.fill_(weight.square().sum(1).mean().sqrt().item())

    # ------------------------------------------------------------------ data
    def load_data(self) -> None:
        recipe = self.recipe
        self.console.print(f"{recipe.scenes} training and {recipe.test_scenes} test scenes ...")
        self.train = scenes("train", recipe.scenes, stretched=True)
        self.test = scenes("test", recipe.test_scenes, stretched=True)

    def draw(self, step: int, size: int, salt: int) -> list[Scene]:
        """Training scenes of one step, a function of seed, stage and step alone."""
        rng = np.random.default_rng((self.recipe.seed, salt, step))
        return [self.train[int(i)] for i in rng.integers(len(self.train), size=size)]

    def inputs(self, batch: list[Shown], augment: bool) -> dict[str, Any]:
        """What the processor makes of the pictures, with the beginning of the prompt."""
        made = self.processor(
            images=[shown.picture for shown in batch], text=[f"USER: {self.family.image}"] * len(batch), padding=True,
            return_tensors="pt",
        ).to(self.device)  # fmt: skip
        if augment:
            made["pixel_values"] = noisy(made["pixel_values"])
        return made

    # ------------------------------------------------------------------ stage 1
    @torch.no_grad()
    def fit_codebook(self) -> None:
        """Least squares from labels to the projected patches of the embedded LLaVA, on square scenes."""
        path = self.folder / "codebook.pt"
        if not path.exists():
            known = wanted = torch.zeros(())
            drawn = scenes("train", self.recipe.codebook_scenes)
            for first in range(0, len(drawn), 100):
                part = drawn[first : first + 100]
                pixels = normalize(pictures(part)).to(self.device)
                tokens = self.teacher.model.get_image_features(pixels, return_dict=True).pooler_output
                rows = torch.cat([one_hot(show(scene, lambda _: SQUARE).labels) for scene in part]).double()
                known = known + rows.T @ rows
                wanted = wanted + rows.T @ torch.cat(list(tokens)).double().cpu()
            ridge = 1e-3 * torch.eye(len(known), dtype=torch.float64)
            torch.save(torch.linalg.solve(known + ridge, wanted).float(), path)
        self.codebook = torch.load(path, weights_only=True).to(self.device)

    # ------------------------------------------------------------------ stage 2
    def tokens(self, batch: list[Shown], augment: bool) -> tuple[Tensor, Tensor, Any]:
        """LLM tokens of all patches of a batch [patches, HIDDEN], their labels [labels, patches], the encoder's output."""
        with self.precision():
            features, output = self.family.features(self.model, self.inputs(batch, augment))
        labels = torch.cat([shown.labels for shown in batch], 1).to(self.device)
        patch = labels[0] >= 0
        return features.float()[patch], labels[:, patch], output

    def read_out(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Logits of every label, from the normalised tokens as a language model sees them."""
        return self.read(F.rms_norm(tokens.float(), (HIDDEN,))).split(SIZES, -1)

    def vision_loss(self, step: int) -> Tensor:
        drawn = self.draw(step, self.recipe.vision_batch, 1)
        batch = [show(full_of_signs(s) if i % 4 else s, self.layout_of) for i, s in enumerate(drawn)]
        tokens, labels, output = self.tokens(batch, augment=True)
        something = (labels[:3] > 0).any(0)
        target = one_hot(labels).to(self.device) @ self.codebook
        error = (tokens - target).square().mean(-1) / target.square().mean()
        loss = 2 * (error[something].mean() + error[~something].mean())
        for i, logits in enumerate(self.read_out(tokens)):
            weight = torch.ones(logits.shape[-1], device=self.device)
            if i < len(PATCH_LABELS):  # class 0 is "nothing", and most patches show nothing
                weight[0] = 0.2
            part = F.cross_entropy(logits, labels[i], weight)
            loss = loss + self.recipe.weights.get(i, 0.3) * part
        whole = self.family.whole(output, [shown.layout for shown in batch])
        if whole is not None:
            pairs = torch.from_numpy(np.stack([scene_labels(shown.scene)[0] for shown in batch])).to(self.device)
            loss = loss + 2 * F.binary_cross_entropy_with_logits(self.present(whole.float()), pairs)
        return loss

    @torch.no_grad()
    def vision_scores(self) -> dict[str, float]:
        """Accuracy per label over the patches that have one."""
        names = [*PATCH_LABELS, "row", "column"]
        right: dict[str, list[float]] = {name: [] for name in names}
        for first in range(0, len(self.test), 32):
            tokens, labels, _ = self.tokens([show(s, self.layout_of) for s in self.test[first : first + 32]], False)
            something = (labels[:3] > 0).any(0)
            for name, wanted, logits in zip(names, labels, self.read_out(tokens), strict=True):
                there = something if name in ("row", "column") else wanted > 0
                right[name] += (logits.argmax(-1) == wanted)[there].float().tolist()
        return {name: float(np.mean(values)) for name, values in right.items()}

    # ------------------------------------------------------------------ stage 3
    def answers(self, batch: list[Shown], asked: list[list[Question]], augment: bool) -> tuple[Tensor, Tokens, Tensor]:
        """Logits of conversations about a batch, the conversations, and the LLM tokens of the patches in a row."""
        made = self.inputs(batch, augment)
        prefixes = [
            ids[mask.bool()].tolist() for ids, mask in zip(made["input_ids"], made["attention_mask"], strict=True)
        ]
        text = self.encode(asked, prefixes)
        made["input_ids"], made["attention_mask"] = text.input_ids.to(self.device), text.attention_mask.to(self.device)
        if "mm_token_type_ids" in made:
            made["mm_token_type_ids"] = (made["input_ids"] == self.model.config.image_token_id).long()
        seen: list[Tensor] = []

        def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.append(kwargs["inputs_embeds"])

        handle = self.model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with self.precision():
                logits = self.model(**made).logits
        finally:
            handle.remove()
        return logits, text, seen[0][made["input_ids"] == self.model.config.image_token_id]

    def language_loss(self, step: int) -> Tensor:
        """Cross-entropy of the answers; linear read-outs keep in the tokens what the encoder knows."""
        recipe = self.recipe
        batch = [show(scene, self.layout_of) for scene in self.draw(step, recipe.language_batch, 2)]
        rng = np.random.default_rng((recipe.seed, 3, step))
        asked = [conversation(shown.scene, recipe.turns, rng, (*HARD, "relation")) for shown in batch]
        logits, text, tokens = self.answers(batch, asked, augment=True)
        wanted = text.labels.to(self.device)[:, 1:]
        loss = F.cross_entropy(logits[:, :-1][wanted >= 0].float(), wanted[wanted >= 0])
        labels = torch.cat([shown.labels for shown in batch], 1).to(self.device)
        something = (labels[:3] > 0).any(0)
        read = self.read_out(tokens[something])
        return loss + 0.05 * sum(F.cross_entropy(r, w) for r, w in zip(read, labels[:, something], strict=True))

    @torch.no_grad()
    def language_scores(self) -> dict[str, float]:
        """Share of whole answers that greedy decoding would get right, per question type, on held-out scenes."""
        rng = np.random.default_rng(99)
        right: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for first in range(0, len(self.test), 32):
            batch = [show(scene, self.layout_of) for scene in self.test[first : first + 32]]
            asked = [conversation(shown.scene, 6, rng) for shown in batch]
            logits, text, _ = self.answers(batch, asked, augment=False)
            wrong = (logits[:, :-1].argmax(-1).cpu() != text.labels[:, 1:]) & (text.labels[:, 1:] >= 0)
            for b, questions in enumerate(asked):
                for i, question in enumerate(questions):
                    right[question.kind].append(float(not (wrong[b] & (text.turn[b, 1:] == i)).any()))
        scores = {kind: float(np.mean(values)) for kind, values in right.items()}
        return {**scores, "mean": float(np.mean(list(scores.values())))}

    # ------------------------------------------------------------------ all
    def run(self) -> Path:
        """Run what is left of the stages and save the checkpoint; returns its folder."""
        recipe, family, model = self.recipe, self.family, self.model
        self.load_data()
        self.fit_codebook()
        tower, projector = family.tower(model), family.projector(model)
        two = [show(scene, self.layout_of) for scene in self.train[:2]]
        with torch.no_grad():
            whole = family.whole(self.tokens(two, False)[2], [shown.layout for shown in two])
        heads = [self.read] if whole is None else [self.read, self.present]
        if whole is not None:
            self.present(whole.float())  # the lazy layer learns its size
        self.run_stage(
            "vision", [*tower, *projector, *heads], recipe.vision_steps, recipe.vision_rate, self.vision_loss,
            self.vision_scores,
        )  # fmt: skip
        for module in tower:
            module.requires_grad_(False)
        answering = [*projector, model.model.language_model, model.lm_head, self.read]
        if hasattr(model.model, "image_newline"):
            answering.append(nn.ParameterList([model.model.image_newline]))
        self.run_stage(
            "language", answering, recipe.language_steps, recipe.language_rate, self.language_loss, self.language_scores
        )
        if recipe.joint_steps:
            for module in tower:
                module.requires_grad_(True)
            self.run_stage(
                "joint", [*tower, *answering], recipe.joint_steps, recipe.joint_rate, self.language_loss,
                self.language_scores,
            )  # fmt: skip
        return self.save(self.model, self.processor, self.recipe)
