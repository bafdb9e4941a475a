# SPDX-License-Identifier: Apache-2.0
"""From pictures and a question to what the model is given, and where the question's own tokens are in it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..pictures import is_picture, open_picture
from ..runtime.adapter import Adapter
from ..videos import Clip, read_video, video_arguments
from ..visuals import Layout

_NOTHING = "no image to explain: give an image, a list of images, or a video or its frames with video=True"


@dataclass(frozen=True, eq=False)
class Prompt:
    """inputs: for the model, one row. question: places of its tokens in `input_ids`. pictures: of each visual, the picture or the
    frames; empty where inputs came ready-made. asked: the question as it was given, "" there. times: of the frames of the video, in
    seconds; empty if nothing says so."""

    inputs: dict[str, Any]
    question: list[int]
    pictures: list[tuple[Any, ...]]
    asked: str = ""
    times: tuple[float, ...] = ()

    @property
    def ids(self) -> Tensor:
        return self.inputs["input_ids"][0]


def make_prompt(
    processor: Any, visuals: Any, question: str, video: bool
) -> tuple[Any, list[int], list[tuple[Any, ...]], tuple[float, ...]]:
    """Ask `question` about pictures in one user turn of the processor's chat template: inputs, places of the question's tokens
    counted from the end of the prompt, the pictures, and the times of a video's frames."""
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question={question!r}: give the text that the model is to answer")
    clip = _clip(visuals) if video else None
    pictures = [tuple(clip.pictures)] if clip else _pictures(visuals)
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            "the processor has no chat template to write the prompt with: give what it makes of yours as inputs="
        )
    question = question.strip()
    kind = "video" if video else "image"
    content = [*[{"type": kind}] * len(pictures), {"type": "text", "text": question}]
    from jinja2 import TemplateError  # which chat templates need

    try:
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(
            f"the processor's chat template has no place for {kind}s ({error}): this model may know none; if it does, give what "
            f"the processor makes of your own prompt as inputs="
        ) from error
    if clip:
        inputs = processor(text=[text], return_tensors="pt", **video_arguments(processor, [clip]))
    else:
        inputs = processor(images=[one for (one,) in pictures], text=[text], return_tensors="pt")
    times = () if clip is None or clip.times is None else tuple(clip.times.tolist())
    return inputs, _places_from_end(processor.tokenizer, text, question), pictures, times


def _clip(visuals: Any) -> Clip:
    """A video: what `read_video` gives or takes, or one picture for a video of one frame."""
    if isinstance(visuals, Clip):
        return visuals
    if visuals is None or (hasattr(visuals, "__len__") and not len(visuals)):
        raise ValueError(_NOTHING)
    file = isinstance(visuals, (str, os.PathLike, bytes)) or hasattr(visuals, "read")
    return read_video([visuals] if is_picture(visuals) and not file else visuals)


def _pictures(visuals: Any) -> list[tuple[Any, ...]]:
    """Every visual as the tuple of its one picture."""
    if is_picture(visuals):
        visuals = [visuals]
    if hasattr(visuals, "ndim") and visuals.ndim == 4:
        raise ValueError(
            "an array of four dimensions: say video=True if these are the frames of one video, or give a list of images"
        )
    found = [] if visuals is None else [open_picture(one) for one in visuals]
    if not found:
        raise ValueError(_NOTHING)
    return [(one,) for one in found]


def _places_from_end(tokenizer: Any, text: str, question: str) -> list[int]:
    """Which tokens of `text` carry `question`, counted from the end (1 is the last token); empty if that cannot be told."""
    first = text.rfind(question)
    if first < 0 or not getattr(tokenizer, "is_fast", False):
        return []
    spans = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    last = first + len(question)
    return [len(spans) - i for i, (start, end) in enumerate(spans) if start < last and end > first]


def ready(
    adapter: Adapter,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    from_end: Sequence[int],
    pictures: list[tuple[Any, ...]],
) -> Prompt:
    """Inputs on the model's device, checked. Where the question is not known, it is the text behind the last visual without
    special tokens. Raises ValueError for anything but one unpadded row with visuals that fits into the context."""
    device, dtype = adapter.model.device, adapter.model.dtype
    given = {
        name: x.to(device, dtype if x.is_floating_point() else None) if isinstance(x, Tensor) else x
        for name, x in dict(inputs).items()
    }
    ids = given.get("input_ids")
    if ids is None or ids.dim() != 2 or len(ids) != 1:
        shape = "no input_ids" if ids is None else f"input_ids of shape {list(ids.shape)}"
        raise ValueError(f"one prompt at a time: inputs need input_ids of shape [1, N], and here are {shape}")
    mask = given.get("attention_mask")
    if mask is not None and not bool(mask.bool().all()):
        raise ValueError("the prompt is padded: explain one prompt at a time, without padding")
    placeholders = torch.tensor(list(adapter.placeholders.values()), device=device)
    at = torch.isin(ids[0], placeholders).nonzero()[:, 0]
    if not len(at):
        raise ValueError("no image in the prompt: explanations show where in pictures an answer comes from")
    context = getattr(adapter.language_model.config, "max_position_embeddings", None)
    if context is not None and ids.shape[1] >= context:
        raise ValueError(
            f"the prompt has {ids.shape[1]} tokens, and the context of the model {context}: nothing could follow; ask a shorter "
            f"question, or give a smaller picture"
        )
    length = ids.shape[1]
    question = [length - back for back in from_end]
    if not question:
        special = {*getattr(tokenizer, "all_special_ids", ()), *placeholders.tolist()}
        behind = range(int(at[-1]) + 1 + adapter.delimited, length)
        question = [i for i in behind if int(ids[0, i]) not in special]
    return Prompt(given, question, pictures)


def of_the_whole_picture(layout: Layout, processor: Any, pictures: tuple[Any, ...]) -> Layout:
    """The layout of a picture of which the processor cut out the middle square (LLaVA-1.5), with the place of that square."""
    images = getattr(processor, "image_processor", None)
    crop, size = getattr(images, "crop_size", None), getattr(images, "size", None)
    if (
        len(pictures) != 1
        or len(layout.views) != 1
        or not getattr(images, "do_center_crop", False)
        or not crop
        or not size
    ):
        return layout
    shortest = size.get("shortest_edge") if hasattr(size, "get") else None
    if shortest is None:
        return layout
    width, height = pictures[0].size
    shown = [crop[name] * min(width, height) / shortest / side for name, side in (("width", width), ("height", height))]
    x, y = ((1 - part) / 2 for part in shown)
    return replace(layout, views=(replace(layout.views[0], box=(x, y, 1 - x, 1 - y)),))
