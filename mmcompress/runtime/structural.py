# SPDX-License-Identifier: Apache-2.0
"""Structural tokens among the features of a picture (newlines, separators, begin and end), found by what they are made of.

Such a token is no part of the picture: it is a parameter of the model, or the word for it, put among the features, perhaps with a
projection and a norm behind. So the rows of features are compared with what the model can make of its parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..visuals import Layout, View
from .shards import whole

STEPS = 2
"""Modules that a parameter goes through at most: a projection and a norm."""
LOOSE = 8.0
"""Rounding that tells no rows apart, in units of the last place of the largest element: the same row in another batch."""


class StructuralTokens:
    """The rows that a base model puts among its features, whatever the picture.

    Candidates are all vectors that belong to a composite module (no weight or bias of a layer), sent through up to STEPS of that
    module's own layers, as far as they come out as wide as features; and the embeddings of tokens that a codebook's vocabulary
    names (the end of a line). Nothing is known by name; what is no row of features is never met.
    """

    def __init__(self, base: Any, decoder: Any) -> None:
        inside = {id(module) for module in decoder.modules()} if decoder is not None else set()
        self.base = base
        self.owners = [
            (module, names)
            for module in base.modules()
            if id(module) not in inside
            if (names := [name for name, p in module.named_parameters(recurse=False) if _loose(name, p)])
        ]
        words = vars(getattr(base, "vocabulary_mapping", None) or nn.Identity())
        self.words = [value for name, value in words.items() if name.endswith("_token_id") and isinstance(value, int)]

    def __bool__(self) -> bool:
        return bool(self.owners or self.words)

    @torch.no_grad()
    def among(self, features: Tensor) -> Tensor:
        """Which rows of `features` [T, D] are structural: [T] bool on the host. Waits for the device."""
        rows = [
            row for owner, names in self.owners for row in self._made(owner, names) if row.shape == features.shape[1:]
        ]
        if self.words:
            embedding = self.base.get_input_embeddings()
            rows += [*embedding(torch.tensor(self.words, device=embedding.weight.device))]
        found = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        near = LOOSE * torch.finfo(features.dtype).eps
        for row in rows:
            row = row.to(features).float()
            found |= (features.float() - row).abs().amax(1) <= near * row.abs().amax()
        return found.cpu()

    def _made(self, owner: nn.Module, names: list[str]) -> Iterator[Tensor]:
        """What the layers of `owner` make of its parameters, and those themselves."""
        layers = [child for child in owner.children() if _is_layer(child)]
        with whole(self.base, owner), _present(owner):
            made = [getattr(owner, name).detach().flatten() for name in names]
            for step in range(STEPS + 1):
                yield from made
                if step < STEPS:
                    made = [row for x in made for layer in layers if (row := _through(layer, x)) is not None]


def _loose(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is one vector that is no weight or bias."""
    return name not in ("weight", "bias") and parameter.numel() == parameter.shape[-1] > 1


def _is_layer(module: Any) -> bool:
    """Whether a module has no parts, or only those that PEFT has put around it."""
    return next(module.children(), None) is None or hasattr(module, "base_layer")


def _present(owner: Any) -> Any:
    """With its own parameters where it computes, if accelerate has offloaded them."""
    if not hasattr(owner, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(owner)


def _through(layer: Any, x: Tensor) -> Tensor | None:
    """A vector [C] behind a layer, where that takes vectors and gives one."""
    if isinstance(layer, nn.Embedding) or any(p.dim() > 2 for p in layer.parameters()):
        return None
    try:
        made = layer(x[None, None])
    except Exception:  # of layers that take something else
        return None
    return made.flatten() if isinstance(made, Tensor) and made.shape[:-1] == (1, 1) else None


def ruled(structural: Tensor, picture: bool) -> Layout:
    """The layout of a visual whose structural tokens are known, [T] bool: rows of a grid, where they part a picture into rows of
    the same length, else one row."""
    places = structural.nonzero()[:, 0].tolist()
    edges = [-1, *places, len(structural)]
    lengths = [end - start - 1 for start, end in itertools.pairwise(edges) if end - start > 1]
    even = picture and len(set(lengths)) == 1
    grid = (len(lengths), lengths[0]) if even else (1, sum(lengths))
    return Layout((View(grid),), tuple(places))
