# SPDX-License-Identifier: Apache-2.0
"""Wider copies of a model that say the same: its answers at the cost of a larger one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..api import is_compressed
from .cost.released import empty

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_heads")
"""What grows, as configs call it; the width of a head stays, and with it rotary positions and the norms of heads."""
MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def widen(model: Any, language: int = 8, vision: int = 4) -> Any:
    """A copy of a vision-language model with a language model and a vision encoder so many times as wide, that computes the same.

    Every head, and every stretch of as many features, stands there `language` (`vision`) times, each beside its copies:
    embeddings, outputs of matrices, biases, norms. A matrix divides by the number of copies that it sums. Mean and variance of
    a repeated vector are its own, as are cosines; lengths grow by a root. Outputs are equal to rounding, choices by cosine or by
    attention but for near ties. Weights grow by the square of the factor: 3 M to 100 M for the embedded models at 8 and 4.

    The model must be stock and hold its features in `hidden_size`; tied embeddings are untied. Raises ValueError for factors
    below 1 and compressed models, NotImplementedError where a weight does not grow as others do or the copy says something else.
    """
    for name, factor in (("language", language), ("vision", vision)):
        if factor < 1:
            raise ValueError(f"{name}={factor}: at least 1, which leaves it as wide as it is")
    if is_compressed(model):
        raise ValueError("widen a model before it is compressed: mm.uncompress(model) gives it back")
    wide = _wider(_wider(model, False, language), True, vision)  # one after the other: what grows has one reason
    words = torch.arange(16, device=model.device)[None] % model.config.get_text_config().vocab_size
    ours, theirs = (one(input_ids=words).logits.float() for one in (wide, model))
    if not torch.allclose(
        ours, theirs, rtol=0, atol=(0.001 if model.dtype == torch.float32 else 0.1) * theirs.std().item()
    ):
        raise NotImplementedError(
            f"a wider {type(model).__name__} would not say the same: its features are not repeated alike"
        )
    return wide


def _wider(model: Any, vision: bool, factor: int) -> Any:
    """A copy with one of its two parts wider."""
    config = copy.deepcopy(model.config)
    part, other = config.get_text_config(), getattr(config, "vision_config", None)
    part, other = (other, part) if vision else (part, other)
    heads = getattr(part, "num_attention_heads", None) or getattr(part, "num_heads", None)
    if part is None or not heads or not getattr(part, "hidden_size", None):
        raise NotImplementedError(f"{type(part).__name__} does not say how many features and heads there are")
    head = getattr(part, "head_dim", None) or part.hidden_size // heads
    if not vision:
        part.head_dim = head
        if hasattr(other, "out_hidden_size"):
            other.out_hidden_size *= factor
    for name in {part.attribute_map.get(name, name) for name in SIZES}:  # one number may go by two names
        if getattr(part, name, None):
            setattr(part, name, factor * getattr(part, name))
    for one in (config, config.get_text_config()):
        one.tie_word_embeddings = False
    wide, old = empty(config, model.dtype), dict(model.named_parameters(remove_duplicate=False))
    for path, module in wide.named_modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            value = old[f"{path}.{name}" if path else name]
            value = _repeated(value.data, weight.shape, factor, head, isinstance(module, MATRICES), f"{path}.{name}")
            setattr(module, name, nn.Parameter(value, requires_grad=weight.requires_grad))
    kept = dict(model.named_buffers())
    for path, buffer in wide.named_buffers():
        if buffer.shape != kept[path].shape:
            raise NotImplementedError(
                f"{path} is {tuple(kept[path].shape)}, and would be {tuple(buffer.shape)} in a wider copy"
            )
        buffer.copy_(kept[path])
    wide.generation_config = copy.deepcopy(model.generation_config)
    wide.set_attn_implementation(model.config._attn_implementation)
    return wide.to(model.device).train(model.training)


def _repeated(value: Tensor, shape: torch.Size, factor: int, head: int, matrix: bool, name: str) -> Tensor:
    """A weight in a wider shape: stretches of a head's width repeated in place, so that heads, queries beside keys beside values,
    and neighbours laid side by side all stay what they are."""
    for axis, (before, after) in enumerate(zip(value.shape, shape, strict=True)):
        if after == before:
            continue
        if after != factor * before:
            raise NotImplementedError(
                f"{name} is {tuple(value.shape)}, and would be {tuple(shape)} in a copy {factor} times as wide"
            )
        stretch = head if before % head == 0 else 1
        value = value.unflatten(axis, (-1, stretch)).repeat_interleave(factor, axis).flatten(axis, axis + 1)
        if matrix and axis == 1:
            value = value / factor
    return value.clone()
