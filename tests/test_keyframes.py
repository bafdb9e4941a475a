# SPDX-License-Identifier: Apache-2.0
"""Frames that are chosen before the encoder: which ones, that no other is encoded, and that all else is as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import mmcompress as mm
from mmcompress.ops.keyframes import keyframes, leaves
from mmcompress.plan import register
from mmcompress.stage import InputStage

from .families import QWEN, VIDEO_FAMILIES, build, image, prompts
from .tiny import GREEDY


@register("keeps_frames")
@dataclass(frozen=True, repr=False)
class KeepsFrames(InputStage):
    """Keeps whole frames by their numbers."""

    keep: float | int = 0.4
    frames: tuple[int, ...] = ()
    positions: ClassVar[str] = "keep"

    def select(self, visuals: mm.Visuals) -> mm.Selection:
        x = torch.arange(visuals.layout.cells).unflatten(0, (visuals.layout.frames, -1))
        return mm.Selection.of(x[list(self.frames)].flatten().expand(len(visuals.features), -1))


# ---------------------------------------------------------------------- which ones
def test_always_as_many_as_asked_for() -> None:
    generator = np.random.default_rng(0)
    for count, most in ((5, 5), (7, 3), (40, 16), (97, 8), (200, 33), (3, 9), (1, 1)):
        scores = generator.random(count).round(2).tolist()
        for way in ("aks", "top", "bins"):
            found = keyframes(scores, most, way)
            assert found == sorted(set(found)) and len(found) == min(count, most)
    assert keyframes([0.3] * 9, 3) == [1, 4, 7]  # nothing to tell them apart by
    assert keyframes([0.0, 5.0, 1.0, 0.0, 4.0, 0.0], 2, "top") == [1, 4]
    assert keyframes([0.0, 5.0, 4.0, 0.0, 3.0, 0.0], 2, "bins") == [1, 4]
    assert keyframes(generator.random(180).tolist(), 16, compat="reference") == []


def test_a_moment_that_stands_out_gets_them_all() -> None:
    scores = [0.0] * 32 + [1.0] * 4 + [0.0] * 28
    assert [leaf.depth for leaf in leaves(scores, 4, peak=0.8)] == [0]
    assert keyframes(scores, 4) == [32, 33, 34, 35]
    assert keyframes(scores, 4, peak=1.0) != [32, 33, 34, 35]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: keyframes([0.1], 0), "at least 1"),
        (lambda: keyframes([0.1, float("nan")], 1), "not finite"),
        (lambda: keyframes([0.1], 1, "best"), "'aks', 'top', 'bins'"),
        (lambda: keyframes([0.1], 1, compat="paper"), "'reference' or None"),
        (lambda: mm.Keyframes(keep=4), "a number by frames="),  # type: ignore[arg-type]
        (lambda: mm.Keyframes(frames=0), "an int of at least 1"),
        (lambda: mm.Keyframes(scorer=""), "a name or a folder"),
        (lambda: mm.compress(build("llava_onevision"), "keyframes(scorer='no-such-clip')"), "tokenizer=name or folder"),
    ],
)
def test_what_means_nothing(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


# ---------------------------------------------------------------------- in models
def film(family: str, frames: int) -> Any:
    return ("video", frames, 8, 12) if family in QWEN else ("video", frames, 28, 28)


@torch.no_grad()
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_only_these_are_encoded_and_all_else_is_as_it_was(family: str) -> None:
    model = build(family)
    for frames, wanted in ((5, (1, 3)), (2, (1,)), (3, (1,))):
        inputs = prompts(model, family, [[4, film(family, frames), 3, image(family), 2], [3, film(family, frames), 5]])
        rows: list[int] = []  # of what the tower is given behind all hooks before
        with mm.compressed(model, f"keeps_frames(keep={len(wanted) / frames!r}, frames={wanted}, on='video')"):
            logits = model(**inputs).logits
            kept = [visual.kept_cells().tolist() for visual in mm.trace(model).visuals]
        with mm.compressed(model, f"keyframes(frames={len(wanted)})"):
            handle = _tower(model).register_forward_pre_hook(
                lambda m, a, k, rows=rows: rows.append(len(a[0])), with_kwargs=True
            )
            found = model(**inputs).logits
            handle.remove()
            assert [visual.kept_cells().tolist() for visual in mm.trace(model).visuals] == kept
            out = model.generate(**inputs, **GREEDY)
            assert torch.equal(out, model.generate(**inputs, **GREEDY, use_cache=False))
        here = inputs["attention_mask"].bool()
        assert (found - logits)[here].abs().max() < 1e-4
        assert 2 * len(wanted) * (96 if family in QWEN else 1) in rows and len(rows) == 2
    with mm.compressed(model, "keyframes(keep=0.5) >> evs(keep=0.5)"):
        model(**inputs)
        visual = next(v for v in mm.trace(model).visuals if v.modality == "video")
        assert visual.kept == round(0.5 * visual.tokens / 3 * 2)


def _tower(model: Any) -> Any:
    base = model.model
    return base.vision_tower if hasattr(base, "vision_tower") else base.visual


@torch.no_grad()
def test_the_frame_that_is_asked_for() -> None:
    pytest.importorskip("open_clip")
    from mmcompress.assets import CLIP, model_path
    from mmcompress.eval.synthetic import scenes
    from mmcompress.eval.synthetic.benchmark import load
    from mmcompress.eval.synthetic.scenes import draw

    model, processor = load(model_path("qwen3-vl-shapes"))
    shown = scenes("test", 6, 2_000_000)
    frames = np.stack([np.asarray(draw(scene)) for scene in shown for _ in range(2)])
    mm.compress(model, f"keyframes(frames=1, scorer={str(model_path(CLIP))!r})")
    right = 0
    for number, scene in enumerate(shown):
        asked = " , ".join(f"a {t.name}" for t in scene.things) + f" and a sign {' '.join(scene.sign.code)}"
        text = processor.tokenizer.decode([]) + f"<|vision_start|><|video_pad|><|vision_end|> {asked}"
        inputs = processor(text=[text], videos=[frames], do_sample_frames=False, return_tensors="pt")
        model(**inputs)
        (visual,) = mm.trace(model).visuals
        places = visual.tokens // 6
        cells = visual.kept_cells().tolist()
        assert len(cells) == places and len({cell // places for cell in cells}) == 1
        right += cells[0] // places == number
    assert right >= 5
    with pytest.raises(NotImplementedError, match="pass input_ids and pixels in one call"):
        model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
