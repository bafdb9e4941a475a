# SPDX-License-Identifier: Apache-2.0
"""Training of the routers of DyVTE: may the visual tokens leave behind layer k? Yes, if the answers stay what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters import Adapter, adapter_for
from ..api import _stock, compressed
from ..methods.dyvte import ExitRouters
from ..ops.exits import agreement, answer_losses, exit_features, exit_is_safe
from ..runtime.call import Call
from ..runtime.locate import instruction_of, placeholder_masks
from ..stage import ExitStage
from ..visuals import Visuals


@dataclass(frozen=True, repr=False)
class ExitAlways(ExitStage):
    """All visual tokens leave before layer `layer`."""

    layer: int = 1

    def layers(self, depth: int) -> range:
        return range(self.layer, self.layer + 1)

    def leave(self, visuals: Visuals, layer: int) -> Tensor:
        return torch.ones(len(visuals.features), dtype=torch.bool, device=visuals.features.device)


@dataclass(frozen=True)
class ExitSample:
    """What a batch of B samples says about layer `layer`: what the router reads [B, 2D]; whether the visual tokens may leave behind
    it [B] bool; the loss of the answers with them and without [B], and the share of answer tokens that agree [B]."""

    layer: int
    features: Tensor
    safe: Tensor
    full: Tensor
    left: Tensor
    agreed: Tensor


def prompt_text(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The text of each row between its last visual and its answer, [B, S] bool, as the method finds it in a prompt."""
    adapter = adapter_for(_stock(model))
    if not isinstance(adapter, Adapter):
        raise NotImplementedError(f"{type(model).__name__} has no language model, which visual tokens could leave")
    ids, labels = inputs["input_ids"].cpu(), inputs["labels"].cpu()
    kinds = torch.zeros(ids.shape, dtype=torch.int8)
    for places in placeholder_masks(Call(ids, None, []), adapter).values():
        kinds[places] = 1
    mask = inputs.get("attention_mask")
    behind = (labels >= 0).long().cumsum(1) > 0  # the answer, and what comes after it
    kinds[behind if mask is None else behind | ~mask.cpu().bool()] = -1
    return torch.from_numpy(instruction_of(kinds.numpy(), adapter))


@torch.no_grad()
def exit_sample(
    model: Any, inputs: Mapping[str, Any], layer: int, least: float = 0.99, factor: float = 1.03
) -> ExitSample:
    """Run a batch twice, with all visual tokens and without them behind `layer`.

    inputs: those of the model with `labels` [B, S], -100 but for one answer at the end of each row. The text of a prompt before its
    answer is what the router will see. Cost: two forward passes, the second one shorter.
    """
    stock = _stock(model)
    layers = getattr(stock, stock.base_model_prefix).language_model.layers
    given = {name: value for name, value in inputs.items() if name != "labels"}
    labels = inputs["labels"]
    if not bool((labels[:, 1:] >= 0).any(1).all()):
        raise ValueError("a row has no answer: labels are -100 but for the tokens of the answer")
    seen: list[Tensor] = []

    def look(module: Any, args: tuple, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = layers[layer].register_forward_hook(look)
    try:
        full = stock(**given, use_cache=False).logits
    finally:
        handle.remove()
    with compressed(stock, ExitAlways(layer + 1)):
        left = stock(**given, use_cache=False).logits
    features = exit_features(seen[0], prompt_text(stock, inputs).to(seen[0].device))
    wanted = labels.to(full.device)
    losses = answer_losses(full, wanted), answer_losses(left, wanted)
    agreed = agreement(full, left, wanted)
    return ExitSample(layer, features, exit_is_safe(agreed, *losses, least, factor), *losses, agreed)


def exit_loss(routers: ExitRouters, sample: ExitSample) -> Tensor:
    """Cross-entropy of the router of one layer against what is safe."""
    logits = routers(sample.features, sample.layer)
    return F.cross_entropy(logits, sample.safe.to(logits.device).long())
