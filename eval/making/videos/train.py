# SPDX-License-Identifier: Apache-2.0
"""Training of the model of videos, in two stages that can be stopped and restarted at any time.

1. see: the encoder, that of the embedded model of shapes, learns to tell what each token of a pair of small frames shows;
2. answer: the language model learns to answer all questions about a video; the encoder's blocks stay as they are. Its first layers
   are taught to tell what has happened to the thing that a token shows (read out of the hidden states behind layer `TOLD`), and a
   few heads behind them where to look.

All questions about a video share its visual tokens in one sequence (`packed.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....videos import video_arguments
from ...synthetic.pages.content import SPLITS
from ...synthetic.questions import Question
from ...synthetic.videos.benchmark import clip_of
from ...synthetic.videos.content import LENGTHS, MOST_COMING, PAIR, Video, make_video
from ...synthetic.videos.frames import draw_video
from ...synthetic.videos.questions import KINDS
from ..answering import Answering
from ..data import noisy
from ..model import HIDDEN
from ..packed import Packed, pack, right_answers
from .labels import EVENTS, LABELS, asked_about, come_until, event_labels, token_labels
from .model import Watcher

TOLD = 2
"""The layer of the language model behind which events are read out."""
LOOKS, LOOKING = (3, 4), 2
"""Two layers of the language model, and how many of their heads, that are taught where to look."""


@dataclass(frozen=True)
class VideoRecipe:
    """Sizes of the training run."""

    videos: int = 1_000_000
    """Seeds of training videos."""
    dev_videos: int = 48
    see_steps: int = 300
    see_pairs: int = 40
    see_rate: float = 8e-4
    answer_steps: int = 1800
    answer_batch: int = 6
    answer_rate: float = 1.5e-3
    simple: float = 0.15
    """Part of the answer stage whose videos show fewer things at a time."""
    save_every: int = 50
    """Steps between checkpoints, each with an evaluation on dev videos."""
    seed: int = 0
    start: str = ""
    """Folder in the package's assets of a run before, from whose weights the answer stage goes on (no see stage then)."""


class Reads(nn.Module):
    """Linear read-outs: of the encoder's tokens, of what happened to what a token shows, and, at the end of a pair of frames, of
    how many things have come."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Linear(HIDDEN, sum(LABELS.values()))
        self.events = nn.Linear(HIDDEN, sum(EVENTS.values()))
        self.come = nn.Linear(HIDDEN, MOST_COMING + 1)


def questions_of(video: Video) -> list[Question]:
    """All questions about a video."""
    return [question for ask in KINDS.values() for question in ask(video)]


class VideoTrainer(Answering):
    """Runs the stages in one folder; whatever the folder already holds is not done again."""

    recipe: VideoRecipe
    family: Watcher
    reads: Reads

    def __init__(self, folder: Path, recipe: VideoRecipe | None = None, device: str | None = None) -> None:
        super().__init__(folder, recipe or VideoRecipe(), Watcher(), device)

    def make_reads(self) -> Reads:
        return Reads()

    # ------------------------------------------------------------------ data
    def draw(self, step: int, size: int, salt: int, simple: bool = False, signs: bool = False) -> list[Video]:
        """Training videos of one step and one length, a function of seed, stage and step alone; signs: half of them with one."""
        rng = np.random.default_rng((self.recipe.seed, salt, step))
        frames = LENGTHS[step % len(LENGTHS)]
        found: list[Video] = []
        while len(found) < size:
            video = make_video(int(rng.integers(self.recipe.videos)), "train", simple)
            if video.frames == frames and (not signs or video.sign or len(found) % 2):
                found.append(video)
        return found

    def dev(self) -> list[Video]:
        """Dev videos, those of one length together."""
        found = [make_video(seed, SPLITS[1]) for seed in range(self.recipe.dev_videos)]
        return sorted(found, key=lambda video: video.frames)

    def inputs(self, frames: list[np.ndarray], augment: bool) -> dict[str, Any]:
        """What the processor makes of videos, with the beginning of the prompt."""
        made = self.processor(
            text=[f"USER: {self.family.video}"] * len(frames), padding=True, padding_side="right", return_tensors="pt",
            **video_arguments(self.processor, [clip_of(some) for some in frames]),
        ).to(self.device)  # fmt: skip
        if augment:
            made["pixel_values_videos"] = noisy(made["pixel_values_videos"])
        return made

    def features(self, made: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        """LLM tokens of all videos in a row [tokens, HIDDEN], and those of each level of DeepStack."""
        output = self.model.model.get_video_features(
            made["pixel_values_videos"], made["video_grid_thw"], return_dict=True
        )
        return torch.cat(list(output.pooler_output)), [torch.cat(list(level)) for level in output.deepstack_features]

    # ------------------------------------------------------------------ stage 1
    def see_batch(self, step: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Single pairs of frames, most of them with a sign in those that have one, and their labels."""
        rng = np.random.default_rng((self.recipe.seed, 5, step))
        frames, labels = [], []
        for video in self.draw(step, self.recipe.see_pairs, 1, signs=True):
            pair = int(rng.integers(video.frames // PAIR))
            if video.sign and rng.random() < 0.8:
                pair = video.shown[0] // PAIR
            frames.append(draw_video(video, range(PAIR * pair, PAIR * pair + PAIR)))
            labels.append(token_labels(video, [pair]))
        return frames, np.concatenate(labels, 1)

    def see_logits(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Logits of every label, from the normalised tokens as a language model sees them."""
        return self.reads.see(F.rms_norm(tokens.float(), (HIDDEN,))).split(list(LABELS.values()), -1)  # type: ignore[no-any-return]

    def see_loss(self, step: int) -> Tensor:
        frames, found = self.see_batch(step)
        tokens, _ = self.features(self.inputs(frames, augment=True))
        loss = torch.zeros((), device=self.device)
        for labels, logits in zip(torch.from_numpy(found).to(self.device), self.see_logits(tokens), strict=True):
            weight = torch.ones(logits.shape[-1], device=self.device)
            weight[0] = 0.2
            loss = loss + F.cross_entropy(logits, labels, weight)
        return loss

    @torch.no_grad()
    def see_scores(self) -> dict[str, float]:
        """Accuracy per label over the tokens of dev videos that have one."""
        right: dict[str, list[float]] = {name: [] for name in LABELS}
        for video in self.dev()[:: max(1, self.recipe.dev_videos // 12)]:
            tokens, _ = self.features(self.inputs([draw_video(video)], augment=False))
            labels = torch.from_numpy(token_labels(video)).to(self.device)
            for name, wanted, logits in zip(LABELS, labels, self.see_logits(tokens), strict=True):
                right[name] += (logits.argmax(-1) == wanted)[wanted > 0].float().tolist()
        return {name: float(np.mean(values)) for name, values in right.items()}

    # ------------------------------------------------------------------ stage 2
    def answers(self, batch: list[Video], asked: list[list[Question]], augment: bool) -> tuple[Tensor, Packed, Tensor]:
        """Logits at the tokens before an answer's, the conversations, hidden states [batch, length, HIDDEN] behind `TOLD`."""
        made = self.inputs([draw_video(video) for video in batch], augment)
        inner = self.model.model
        places, _ = inner.get_rope_index(
            made["input_ids"], mm_token_type_ids=made["mm_token_type_ids"], video_grid_thw=made["video_grid_thw"],
            attention_mask=made["attention_mask"],
        )  # fmt: skip
        packed = pack(self.vocabulary, made, places, asked)
        told: list[Tensor] = []
        with self.precision():
            visual, levels = self.features(made)
            embeds = self.model.get_input_embeddings()(packed.input_ids)
            there = packed.input_ids == self.model.config.video_token_id
            embeds = embeds.masked_scatter(there[..., None].expand_as(embeds), visual.to(embeds.dtype))
            handle = inner.language_model.layers[TOLD].register_forward_hook(
                lambda module, args, out: told.append(out[0] if isinstance(out, tuple) else out)
            )
            try:
                hidden = inner.language_model(
                    inputs_embeds=embeds, attention_mask=packed.mask, position_ids=packed.position_ids, use_cache=False,
                    visual_pos_masks=there, deepstack_visual_embeds=levels,
                ).last_hidden_state  # fmt: skip
            finally:
                handle.remove()
            return self.model.lm_head(hidden[:, :-1][packed.labels[:, 1:] >= 0]), packed, told[0]

    def answer_loss(self, step: int) -> Tensor:
        """Cross-entropy of the answers, of what is read out behind `TOLD`, and how little some heads look where they should."""
        recipe = self.recipe
        batch = self.draw(step, recipe.answer_batch, 3, simple=step < recipe.simple * recipe.answer_steps)
        asked = [questions_of(video) for video in batch]
        watched = [self.model.model.language_model.layers[layer].self_attn for layer in LOOKS]
        for module in watched:
            module.looked = None
        logits, packed, told = self.answers(batch, asked, augment=True)
        loss = F.cross_entropy(logits.float(), packed.labels[:, 1:][packed.labels[:, 1:] >= 0])
        loss = loss + self.event_loss(batch, packed, told)
        loss = loss + 0.3 * sum(self.look_loss(batch, asked, packed, module.looked) for module in watched)
        for module in watched:
            del module.looked
        return loss

    def read_events(self, packed: Packed, told: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Logits of the events at all visual tokens in a row, and of the numbers at the ends of pairs of frames."""
        told = F.rms_norm(told.float(), (HIDDEN,))
        config = self.model.config
        events = self.reads.events(told[packed.input_ids == config.video_token_id]).split(list(EVENTS.values()), -1)
        return events, self.reads.come(told[packed.input_ids == config.vision_end_token_id])

    def event_loss(self, batch: list[Video], packed: Packed, told: Tensor) -> Tensor:
        events, come = self.read_events(packed, told)
        wanted = torch.from_numpy(np.concatenate([event_labels(video) for video in batch], 1)).to(self.device)
        loss = F.cross_entropy(
            come, torch.tensor([n for video in batch for n in come_until(video)], device=self.device)
        )
        for logits, labels in zip(events, wanted, strict=True):
            weight = torch.ones(logits.shape[-1], device=self.device)
            weight[0] = 0.3
            loss = loss + F.cross_entropy(logits, labels, weight, ignore_index=-100)
        return loss

    def look_loss(self, batch: list[Video], asked: list[list[Question]], packed: Packed, looked: Tensor) -> Tensor:
        """How little attention some heads pay to what a question is about, where the words of the answer come from."""
        config = self.model.config
        rows, places, wanted = [], [], []
        for b, (video, questions) in enumerate(zip(batch, asked, strict=True)):
            ids = packed.input_ids[b]
            where = torch.cat([(ids == t).nonzero()[:, 0] for t in (config.video_token_id, config.vision_end_token_id)])
            labels, events = token_labels(video), event_labels(video)
            for i, question in enumerate(questions):
                begin = int((packed.turn[b] == i).nonzero()[0])
                for k, found in enumerate(asked_about(video, question, labels, events)):
                    if found.any():
                        at = torch.zeros(len(ids), device=self.device)
                        at[where] = torch.from_numpy(found).to(self.device, at.dtype)
                        rows.append(b)
                        places.append(begin + k - 1)
                        wanted.append(at)
        seen = (looked[rows, :LOOKING, places].float() * torch.stack(wanted)[:, None]).sum(-1).mean(-1)
        return -(seen + 1e-3).log().mean()

    @torch.no_grad()
    def answer_scores(self) -> dict[str, float]:
        """Share of whole answers that greedy decoding would get right, per question type, and of events, on dev videos."""
        right: dict[str, list[bool]] = {kind: [] for kind in (*KINDS, *EVENTS, "come")}
        videos = self.dev()
        for frames in LENGTHS:
            some = [video for video in videos if video.frames == frames]
            for first in range(0, len(some), 8):
                batch = some[first : first + 8]
                asked = [questions_of(video) for video in batch]
                logits, packed, told = self.answers(batch, asked, augment=False)
                for kind, good in right_answers(logits, packed, asked):
                    right[kind].append(good)
                events, come = self.read_events(packed, told)
                for name, logit, labels in zip(
                    EVENTS, events, np.concatenate([event_labels(video) for video in batch], 1), strict=True
                ):
                    there = torch.from_numpy(labels > 0)
                    right[name] += (logit.argmax(-1).cpu() == torch.from_numpy(labels))[there].tolist()
                right["come"] += (
                    come.argmax(-1).cpu() == torch.tensor([n for video in batch for n in come_until(video)])
                ).tolist()
        scores = {kind: float(np.mean(values)) for kind, values in right.items()}
        return {**scores, "mean": float(np.mean([scores[kind] for kind in KINDS]))}

    # ------------------------------------------------------------------ all
    def run(self) -> Path:
        """Run what is left of the stages and save the checkpoint; returns its folder."""
        recipe, model = self.recipe, self.model
        tower, projector = self.family.tower(model), self.family.projector(model)
        if not recipe.start:
            self.run_stage(
                "see",
                [*tower, *projector, self.reads],
                recipe.see_steps,
                recipe.see_rate,
                self.see_loss,
                self.see_scores,
            )
        for module in tower:
            module.requires_grad_(False)
        self.run_stage(
            "answer", [*projector, model.model.language_model, model.lm_head, self.reads], recipe.answer_steps,
            recipe.answer_rate, self.answer_loss, self.answer_scores,
        )  # fmt: skip
        return self.save_both()
