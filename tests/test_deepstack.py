# SPDX-License-Identifier: Apache-2.0
"""DeepStack in both forms; Granite 4 Vision gives all features to layers, and zero embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmcompress.adapters import adapter_for

import mmcompress as mm
from mmcompress.selection import Selection
from mmcompress.stage import InputStage
from mmcompress.visuals import Visuals

from . import reference  # noqa: F401 - registers by_feature, pairs_mean, by_hidden
from .architectures import OLDEST, build, prompts
from .exactness import watched

pytestmark = pytest.mark.skipif(OLDEST, reason="transformers 5.17 has no granite4_vision")

SAMPLES: list[list[int | str]] = [[4, "1", 2, "2", 6]]


@torch.no_grad()
@pytest.mark.parametrize("cut", [None, 1, 3])
@pytest.mark.parametrize("early", ["pairs_mean(keep=0.5)", "by_feature(keep=0.5)"])
def test_levels_by_layer_equal_means_and_gathers_made_by_hand(early: str, cut: int | None) -> None:
    """Methods are shown the first level, and what they make goes there; later levels follow, also behind a cut."""
    model = build("granite4_vision")
    inputs = prompts(model, SAMPLES)
    language_model = adapter_for(model).language_model
    seen: list[dict[str, Any]] = []
    with watched(language_model, seen):
        model(**inputs)
    stock = seen[0]
    places = stock["vision_mask"][0, :, 0].nonzero()[:, 0]
    levels = {i: level.clone() for i, level in stock["deepstack_features"].items()}
    assert sorted(levels) == [0, 1, 2, 3] and not stock["inputs_embeds"][0, places].any()

    plan = early if cut is None else f"{early} >> by_hidden(layer={cut}, keep=0.5)"
    mm.compress(model, plan, positions="keep")
    out = model(**inputs).logits
    visuals, groups = mm.trace(model).visuals, mm.trace(model).call.groups
    mm.uncompress(model)
    live = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    for visual in visuals:
        slots = visual.span.patches
        rows = torch.searchsorted(places, slots)
        if early.startswith("pairs"):
            for level in levels.values():
                level[rows[::2]] = (level[rows[::2]] + level[rows[1::2]]) / 2
        live[slots] = False
        live[slots[visual.kept_cells()]] = True
    kept = live.nonzero()[:, 0]
    assert torch.equal(kept, groups[0].source[0])
    mask = stock["vision_mask"][:, kept]
    rows = torch.searchsorted(places, kept[mask[0, :, 0]])
    gone = ~torch.isin(kept, groups[-1].source[0])

    def hide(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
        seen = torch.ones(len(kept), len(kept), dtype=torch.bool).tril() & ~gone
        return args, {**kwargs, "attention_mask": (seen | torch.eye(len(kept), dtype=torch.bool))[None, None]}

    handles = [part.register_forward_pre_hook(hide, with_kwargs=True) for part in language_model.layers[cut or 4 :]]
    hidden = language_model(
        inputs_embeds=stock["inputs_embeds"][:, kept], position_ids=kept[None], vision_mask=mask,
        attention_mask=torch.ones(1, len(kept), dtype=torch.long),
        deepstack_features={i: level[rows] for i, level in levels.items()},
    ).last_hidden_state  # fmt: skip
    for handle in handles:
        handle.remove()
    wanted = model.lm_head(hidden) / model.config.text_config.logits_scaling
    assert torch.allclose(out[0, kept[-6:]], wanted[0, -6:], atol=5e-5)  # logits of up to 10
    assert gone.sum() == (0 if cut is None else 16)


@torch.no_grad()
def test_methods_are_shown_features_and_not_zeros() -> None:
    model = build("granite4_vision")
    found: list[torch.Tensor] = []

    class Looks(InputStage):
        keep = 0.5

        def select(self, visuals: Visuals) -> Selection:
            found.append(visuals.features)
            return Selection.of(visuals.features[..., 0].topk(visuals.k).indices.sort().values)

    inputs = prompts(model, SAMPLES)
    seen: list[dict[str, Any]] = []
    with watched(adapter_for(model).language_model, seen):
        model(**inputs)
    mm.compress(model, Looks())
    model(**inputs)
    level = seen[0]["deepstack_features"][0]
    spans = [visual.span for visual in mm.trace(model).visuals]
    places = seen[0]["vision_mask"][0, :, 0].nonzero()[:, 0]
    wanted = torch.stack([level[torch.searchsorted(places, span.patches)] for span in spans])
    assert torch.equal(torch.cat(found), wanted)
