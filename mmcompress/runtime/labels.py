# SPDX-License-Identifier: Apache-2.0
"""The loss of a compressed model: visual tokens are no labels, for they may be gone, or are means of several."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor

from .scope import notes

VISUAL = "visual"
"""Note of an engine: which tokens of the call were visual, [B, S] bool on the host."""


def loss(engine: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    """What `original`, the loss of the model of `engine`, makes of its arguments without labels that are visual tokens."""
    visual = notes(engine).pop(VISUAL, None)
    if visual is None:
        return original(*args, **kwargs)
    bound = inspect.signature(original).bind(*args, **kwargs)
    shown = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    ignored = shown.get("ignore_index", -100)
    for name, at in (("labels", visual), ("shift_labels", torch.nn.functional.pad(visual, (0, 1))[:, 1:])):
        labels = shown.get(name)
        if labels is None or labels.shape != at.shape:
            continue
        at = at.to(labels.device)
        _tell(engine, labels, at, ignored)
        labels = labels.masked_fill(at, ignored)
        if name in bound.arguments:
            bound.arguments[name] = labels
        else:
            bound.arguments["kwargs"][name] = labels
    return original(*bound.args, **bound.kwargs)


def _tell(engine: Any, labels: Tensor, visual: Tensor, ignored: int) -> None:
    """Warn once of labels that do not count. Looks at them once: it waits for the device."""
    if "labels" not in engine.told and bool((labels.ne(ignored) & visual).any()):
        warnings.warn(
            "labels hold visual tokens, which compression may drop: they do not count in the loss of a compressed model "
            f"(set them to {ignored})",
            stacklevel=2,
        )
    engine.told |= {"labels"}
