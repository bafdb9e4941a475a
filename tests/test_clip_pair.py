# SPDX-License-Identifier: Apache-2.0
"""The embedded CLIP pair: loads as any open_clip checkpoint, shares its tower with the embedded LLaVA, knows its words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmcompress.assets import CLIP, model_path
from mmcompress.eval.making.clip import caption
from mmcompress.eval.synthetic import scenes
from mmcompress.eval.synthetic.benchmark import load
from mmcompress.eval.synthetic.scenes import draw

import mmcompress as mm

open_clip = pytest.importorskip("open_clip", reason="needs open_clip")


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any, Any]:
    name = f"local-dir:{model_path(CLIP)}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    return model.eval(), transform, open_clip.get_tokenizer(name)


@torch.no_grad()
def test_tower_is_that_of_the_embedded_llava(pair: tuple[Any, Any, Any]) -> None:
    clip, transform, _ = pair
    llava, processor = load(model_path())
    picture = draw(scenes("test", 1)[0])
    pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    assert (transform(picture) - pixels[0]).abs().max() < 0.05  # torchvision and PIL resize alike, not the same
    hidden = llava.model.vision_tower(pixels).last_hidden_state
    tower = clip.visual
    assert torch.allclose(tower.transformer(tower._embeds(pixels)), hidden, atol=2e-3)


@torch.no_grad()
def test_captions_find_their_pictures(pair: tuple[Any, Any, Any]) -> None:
    clip, transform, tokenizer = pair
    held_out = scenes("test", 200, 2_000_000)
    images = F.normalize(clip.encode_image(torch.stack([transform(draw(s)) for s in held_out])), dim=-1)
    names = [" , ".join(f"a {t.name}" for t in s.things) + f" and a sign {' '.join(s.sign.code)}" for s in held_out]
    texts = F.normalize(clip.encode_text(tokenizer(names)), dim=-1)
    found = (texts @ images.T).argmax(1) == torch.arange(len(held_out))
    assert found.float().mean() > 0.95
    pairs = sorted({t.name for s in held_out for t in s.things})
    words = F.normalize(clip.encode_text(tokenizer([f"a {p}" for p in pairs])), dim=-1)
    best = (images @ words.T).argmax(1)
    there = [pairs[int(b)] in {t.name for t in s.things} for b, s in zip(best, held_out, strict=True)]
    assert sum(there) / len(there) > 0.9


def test_captions_name_what_is_there() -> None:
    import numpy as np

    for i, scene in enumerate(scenes("train", 50)):
        said = caption(scene, np.random.default_rng(i))
        things = [part.removeprefix("a ") for part in said.replace(" and ", " , ").split(" , ")]
        names = [t.name for t in scene.things]
        for thing in things:
            assert thing in names or thing == f"sign {' '.join(scene.sign.code)}"


@torch.no_grad()
def test_the_pair_can_be_compressed(pair: tuple[Any, Any, Any]) -> None:
    clip, transform, _ = pair
    pixels = torch.stack([transform(draw(s)) for s in scenes("test", 4)])
    stock = F.normalize(clip.encode_image(pixels), dim=-1)
    with mm.compressed(clip, "tome", keep=0.5):
        merged = F.normalize(clip.encode_image(pixels), dim=-1)
    assert (stock * merged).sum(-1).min() > 0.7
    assert not torch.equal(stock, merged)
