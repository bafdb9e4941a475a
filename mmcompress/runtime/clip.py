# SPDX-License-Identifier: Apache-2.0
"""The CLIP that a vision tower comes from: its projection of the patches, and its text tower for the question.

A vision-language model keeps only the image tower of its CLIP. Methods that compare patches with the question in CLIP's
joint space load the rest beside the model: `clip=` names it, as transformers or a local open_clip folder has it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.relevance import direction
from ..stage import Pipeline
from .adapter import Adapter
from .call import Call
from .record import Span

CLIP_PATCHES = ("clip_patches", "clip_patches_plain")
"""Tokens of the tower in the joint space, with and without the norm that CLIP trained for its CLS token."""
CLIP_TEXT = ("clip_text", "clip_text_last")
"""The question in the joint space, from its end token as CLIP was trained, or from the last place of the padded text."""
CLIP_SIGNALS = frozenset({*CLIP_PATCHES, *CLIP_TEXT})

REMEMBERED = 64
"""Questions whose embeddings are kept."""
SAME = 0.9
"""Cosine of the class embeddings of two towers from which on one is the other, perhaps fine-tuned. Towers that were trained
apart have nothing in common."""

_USER = re.compile(
    r"USER:|\[INST\]|<\|im_start\|>user\n|<\|start_header_id\|>user<\|end_header_id\|>|<start_of_turn>user\n"
)
_ASSISTANT = re.compile(
    r"ASSISTANT:|\[/INST\]|<\|im_start\|>assistant\b|<\|start_header_id\|>assistant<\|end_header_id\|>|<start_of_turn>model\b"
)
_FORMATS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)


def question_of(text: str, special: tuple[str, ...] = ()) -> str:
    """The question in a decoded prompt: the last turn of the user, without marks of turns, special tokens and the request for
    a form of answer that benchmarks put behind it."""
    text = _ASSISTANT.split(_USER.split(text)[-1])[0]
    for token in special:
        text = text.replace(token, " ")
    text = text.strip()
    for request in _FORMATS:
        text = text.removesuffix(request).rstrip()
    return text


def tokenizer_of(model: Any, name: str | None) -> Any:
    """The tokenizer that the prompts of `model` are written with."""
    from transformers import AutoTokenizer

    name = name or getattr(model, "name_or_path", "")
    if not name:
        raise ValueError(
            "the model does not say where it was loaded from: give its tokenizer by tokenizer=name or folder"
        )
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer at {name!r}: give that of the model by tokenizer=name or folder") from error


class Pair(Protocol):
    """What is taken from a CLIP.

    norm, projection   from the hidden state of the tower to the joint space: the norm of CLS, and a matrix [C, E].
    class_embedding    [C], by which the tower is known again.
    sizes              of the tower, by name.
    """

    norm: nn.Module
    projection: Tensor
    class_embedding: Tensor
    sizes: dict[str, int]

    def encode(self, text: str, device: torch.device, last: bool) -> Tensor:
        """The text in the joint space, [segments, E]."""


def _sizes(patches: Tensor, positions: Tensor, blocks: Any) -> dict[str, int]:
    """Sizes of a CLIP tower from the weights of its patch and position embeddings, and its blocks."""
    return {
        "hidden size": positions.shape[1],
        "patch size": patches.shape[-1],
        "positions": positions.shape[0],
        "layers": len(blocks),
    }


def _sizes_of(tower: Any) -> dict[str, int]:
    """The same of a tower of transformers."""
    found = tower.embeddings
    return _sizes(found.patch_embedding.weight, found.position_embedding.weight, tower.encoder.layers)


class _Transformers:
    """A CLIP of transformers. A text too long for it is cut into segments."""

    def __init__(self, name: str) -> None:
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        config = AutoConfig.from_pretrained(name)
        if config.model_type != "clip":
            raise ValueError(f"it is a {config.model_type}, not a clip")
        model: Any = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
        self.norm, self.projection = model.vision_model.post_layernorm, model.visual_projection.weight.detach().T
        self.class_embedding = model.vision_model.embeddings.class_embedding.detach()
        self.sizes = _sizes_of(model.vision_model)
        self.tower, self.out = model.text_model, model.text_projection
        self.context = config.text_config.max_position_embeddings

    def encode(self, text: str, device: torch.device, last: bool) -> Tensor:
        tower, out = self.tower.to(device), self.out.to(device)
        cut = {"truncation": True, "max_length": self.context, "return_tensors": "pt"}
        if last:  # as in the reference of recoverable compression: padding is not masked out
            ids = self.tokenizer(text, padding="max_length", **cut).input_ids
            return out(tower(input_ids=ids.to(device)).last_hidden_state[:, -1])
        found = self.tokenizer(text, padding=True, return_overflowing_tokens=True, **cut)
        inputs = {name: found[name].to(device) for name in ("input_ids", "attention_mask")}
        return out(tower(**inputs).pooler_output)


class _OpenClip:
    """A local open_clip folder. Its tokenizer cuts off what is too long."""

    def __init__(self, folder: str) -> None:
        try:
            import open_clip
        except ImportError as error:
            raise ImportError(
                f"clip={folder!r} is an open_clip folder: install open_clip (pip install mmcompress[clip])"
            ) from error

        self.model: Any = open_clip.create_model(f"local-dir:{folder}").eval()
        self.tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{folder}")
        visual = self.model.visual
        if not hasattr(visual, "class_embedding") or getattr(visual, "proj", None) is None:
            raise ValueError(f"its image tower is a {type(visual).__name__}, not a CLIP vision transformer")
        self.norm, self.projection = visual.ln_post, visual.proj.detach()
        self.class_embedding = visual.class_embedding.detach()
        self.sizes = _sizes(visual.conv1.weight, visual.positional_embedding, visual.transformer.resblocks)
        self.model.visual = nn.Identity()

    def encode(self, text: str, device: torch.device, last: bool) -> Tensor:
        if last:
            raise NotImplementedError(
                "the last place of a padded text (compat='reference') is only read from a CLIP of transformers"
            )
        return self.model.to(device).encode_text(self.tokenizer([text]).to(device))


def _loaded(name: str) -> Pair:
    try:
        return _OpenClip(name) if (Path(name) / "open_clip_config.json").is_file() else _Transformers(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"clip={name!r} cannot be loaded: give a CLIP of transformers by name or folder, or an open_clip folder ({error})"
        ) from error


class Clip:
    """Both halves of a CLIP beside a model whose vision tower is its image tower. All it computes is float32, without
    gradients; its weights follow the device of what they are given."""

    def __init__(self, adapter: Adapter, name: str, tokenizer: str | None = None) -> None:
        self.name = name
        tower = getattr(adapter.base, "vision_tower", None)
        kind = getattr(getattr(tower, "config", None), "model_type", "unknown")
        if kind != "clip_vision_model":
            raise NotImplementedError(
                f"clip={name!r}: the vision tower of this model ({adapter.family}) is of type {kind}, not that of a CLIP, so "
                f"its patches are not in the space of CLIP's text; leave clip out for the method's substitute"
            )
        self.pair = _loaded(name)
        self._check(tower)
        self.placeholders = tuple(adapter.placeholders.values())
        self.tokenizer = tokenizer_of(adapter.model, tokenizer)
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        self.special = tuple(sorted((token.content for token in added if token.special), key=len, reverse=True))
        self.remembered: dict[tuple[str, bool, torch.device], Tensor] = {}

    @staticmethod
    def of(adapter: Adapter, plan: Pipeline, loaded: Clip | None = None) -> Clip | None:
        """The CLIP that a plan asks for, None if it asks for none. `loaded`: the one that the plan had on these modules before."""
        if loaded is not None:
            loaded._check(adapter.base.vision_tower)
            return loaded
        asked = {(stage.clip, stage.tokenizer) for stage in plan.parts if getattr(stage, "clip", None)}  # type: ignore[attr-defined]
        if len(asked) > 1:
            raise ValueError(f"{plan!r}: all stages of a plan share one CLIP, give them the same clip and tokenizer")
        return Clip(adapter, *asked.pop()) if asked else None

    def _check(self, tower: Any) -> None:
        """Raise if the tower is not the one of this CLIP."""
        theirs, mine = _sizes_of(tower), self.pair.sizes
        if theirs != mine:
            differ = ", ".join(
                f"{name} {mine[name]} instead of {theirs[name]}" for name in mine if mine[name] != theirs[name]
            )
            raise ValueError(
                f"clip={self.name!r} does not fit the vision tower of the model: {differ}. Give the CLIP that the model was "
                f"built from (LLaVA-1.5: 'openai/clip-vit-large-patch14-336')"
            )
        own = tower.embeddings.class_embedding
        if own.is_meta:  # weights that are elsewhere cannot be compared
            return
        cosine = float(F.cosine_similarity(own.detach().float().cpu(), self.pair.class_embedding.float().cpu(), dim=0))
        if not cosine >= SAME:
            raise ValueError(
                f"clip={self.name!r} has the sizes of the model's vision tower, but other weights (class embeddings have a cosine "
                f"of {cosine:.2f}; a fine-tuned tower has one of at least {SAME}): its text has nothing to do with these "
                f"patches. Give the CLIP that the model was built from"
            )

    @torch.no_grad()
    def project(self, hidden: Tensor, plain: bool) -> Tensor:
        """Patches [n, P, C] as a block leaves them in the joint space, [n, P, E]; plain: without CLIP's last norm."""
        with torch.autocast(hidden.device.type, enabled=False):
            states = hidden.float()
            if not plain:
                states = self.pair.norm.to(hidden.device)(states)
            return states @ self.pair.projection.to(hidden.device)

    def text(self, names: set[str], call: Call, spans: list[Span], device: torch.device) -> dict[str, Tensor]:
        """Those of CLIP_TEXT in `names`, each [U, E] of unit length, for the questions beside the visuals `spans`."""
        if call.input_ids is None:
            raise ValueError("the prompt came as inputs_embeds, in which CLIP cannot read the question: pass input_ids")
        rows = call.input_ids.cpu()
        questions = [self.question(rows[span.row], span.text) for span in spans]
        return {
            name: torch.stack([self._embedded(question, name == CLIP_TEXT[1], device) for question in questions])
            for name in sorted(names)
        }

    def question(self, row: Tensor, instruction: Tensor) -> str:
        """The question of a prompt `row` [S] whose instruction is at the places `instruction` (the text behind the pictures);
        of its whole text if nothing is asked there."""
        for ids in (row[instruction], row):
            kept = [i for i in ids.tolist() if i not in self.placeholders]
            found = question_of(self.tokenizer.decode(kept, skip_special_tokens=False), self.special)
            if found:
                break
        return found

    def _embedded(self, question: str, last: bool, device: torch.device) -> Tensor:
        key = question, last, device
        found = self.remembered.pop(key, None)
        if found is None:
            # kept for later calls, which may want gradients: no inference tensors
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                found = direction(self.pair.encode(question, device, last).float())
        self.remembered[key] = found
        if len(self.remembered) > REMEMBERED:
            del self.remembered[next(iter(self.remembered))]
        return found
