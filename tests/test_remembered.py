# SPDX-License-Identifier: Apache-2.0
"""Vision blocks that are remembered from plan to plan give what they would give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmcompress.eval.remembered import remembered

import mmcompress as mm

from .families import build, image, prompts


def made(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    model = build(name)
    return model, prompts(model, name, [[3, image(name), 4]])


PLANS = ("divprune(keep=0.5)", "visionzip(keep=0.5)", "tome(keep=0.5)", "fastv(keep=0.5)")


@pytest.mark.parametrize("name", ["llava", "internvl_qwen3", "qwen3_vl"])
def test_plans_answer_as_without(name: str) -> None:
    model, inputs = made(name)

    @torch.no_grad()
    def answers() -> list[Any]:
        found = [model(**inputs).logits]
        for plan in PLANS:
            with mm.compressed(model, plan):
                found.append(model(**inputs).logits)
        return found

    plain = answers()
    with remembered(model) as counts:
        for theirs, mine in zip(plain * 2, answers() + answers(), strict=True):
            assert torch.equal(theirs, mine)
    assert counts[0] > counts[1] > 0
    again, run = counts
    assert all(torch.equal(a, b) for a, b in zip(plain, answers(), strict=True)) and counts == [again, run]


def test_other_pixels_other_outputs_and_gradients_run() -> None:
    model, inputs = made("llava")
    other = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
    with torch.no_grad():
        wanted = model(**other).logits
    with remembered(model) as counts:
        with torch.no_grad():
            model(**inputs)
            assert torch.equal(model(**other).logits, wanted)
        assert counts[0] == 0
        run = counts[1]
        assert model(**inputs).logits.requires_grad and counts[1] == run


def test_what_does_not_fit_is_not_held() -> None:
    model, inputs = made("llava")
    with remembered(model, most=0) as counts, torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    assert counts[0] == 0
