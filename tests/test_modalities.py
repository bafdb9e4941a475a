# SPDX-License-Identifier: Apache-2.0
"""What a plan acts on: pictures, videos and sounds, each with a budget of its own; and `seats`, by windows of time."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from mmcompress.adapters import adapter_for
from torch import Tensor

import mmcompress as mm
from mmcompress.methods.seats import farthest
from mmcompress.plan import as_pipeline
from mmcompress.runtime.locate import _runs

from .architectures import OLDEST, build, config, prompts
from .exactness import close, extended, masked, shortened, visual_in
from .sounds import AUDIO

THREE = 'divprune(keep=0.5, on="image") >> divprune(keep=0.25, on="video") >> seats(keep=0.3, tokens=8, on="audio")'
MIXED: list[int | str] = [4, "1", 3, "v1", 3, "a2", 2, "a1", 6]
models = pytest.mark.skipif(OLDEST, reason="configs and inputs are those of the newest transformers")


# ---------------------------------------------------------------------- plans
def test_a_plan_says_what_it_acts_on() -> None:
    plan = as_pipeline(THREE)
    assert repr(plan) == THREE.replace('"', "'")
    assert [part.modalities for part in plan.parts] == [("image",), ("video",), ("audio",)]
    again = as_pipeline(json.loads(json.dumps(plan.to_dict())))
    assert as_pipeline(repr(plan)) == again == plan and hash(again) == hash(plan)
    assert plan != as_pipeline(THREE.replace("image", "video"))


def test_what_is_usual_is_not_written() -> None:
    plan = as_pipeline("divprune(keep=0.5) >> fastv(layer=2, keep=0.5)")
    assert repr(plan) == "divprune(keep=0.5) >> fastv(keep=0.5)" and '"on"' not in json.dumps(plan.to_dict())
    assert plan.parts[0].on == ("image", "video") and plan == as_pipeline(
        'divprune(keep=0.5, on=("video", "image")) >> fastv(layer=2, keep=0.5, on=("image", "video"))'
    )


def test_several_in_one_form() -> None:
    one, other = mm.DivPrune(0.5, on=("audio", "image")), mm.DivPrune(0.5, on=["image", "audio", "image"])
    assert one == other and hash(one) == hash(other) and repr(one) == "divprune(keep=0.5, on=('image', 'audio'))"
    assert as_pipeline(json.loads(json.dumps(as_pipeline(one).to_dict()))).stages == (one,)
    assert mm.DivPrune(0.5, on=("audio",)) == mm.DivPrune(0.5, on="audio")


def test_a_recipe_acts_with_all_its_parts() -> None:
    assert {part.on for part in as_pipeline('aim(keep=0.5, on="video")').parts} == {"video"}


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ('divprune(keep=0.5, on="sound")', "on='sound': give what a stage acts on, one of 'image', 'video', 'audio'"),
        ("divprune(keep=0.5, on=())", r"on=\(\): give what"),
        ("divprune(keep=0.5, on=3)", "on=3: give what"),
        ('tome(keep=0.5, on="audio")', "inside the vision encoder, where no audio comes by"),
        (
            'cmai(on="image") >> var_attention_sink(on="video", dims=(1,))',
            "rewrite attention act on the same modalities",
        ),
    ],
)
def test_bad_plans(plan: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        as_pipeline(plan)


# ---------------------------------------------------------------------- models
@models
@pytest.mark.parametrize(
    ("name", "plan", "said"),
    [
        ("qwen2_vl", 'divprune(keep=0.5, on="audio")', "takes image and video, and no audio"),
        ("llava", 'divprune(keep=0.5) >> divprune(keep=0.5, on="video")', "takes image, and no video"),
        ("voxtral", "divprune(keep=0.5)", r"acts on image and video, and .* takes audio: name it, as in .*on='audio'\)"),
        ("voxtral", 'visionzip(keep=0.5, on="audio")', "only a vision encoder gives; for audio choose one of: .*divprune, .*seats"),
        ("qwen2_5_omni_thinker", 'visionzip(keep=0.5, on=("image", "audio"))', "only a vision encoder gives"),
        ("voxtral", 'vflowopt_cuts(on="audio")', "needs input_scores"),
    ],
)  # fmt: skip
def test_what_a_model_does_not_take_is_refused(name: str, plan: str, said: str) -> None:
    with pytest.raises(NotImplementedError, match=said):
        mm.compress(build(name), plan)


def last(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[:, -1]


def generated(model: Any, inputs: dict[str, Any]) -> Any:
    return model.generate(
        **inputs, do_sample=False, max_new_tokens=3, min_new_tokens=3, output_logits=True, return_dict_in_generate=True,
        suppress_tokens=[150, 151, AUDIO],
    )  # fmt: skip


def exact(model: Any, inputs: dict[str, Any], plan: str) -> tuple[Any, list[tuple[str, int, int]]]:
    """Compress, check prefill and three cached steps against the stock language model on what is kept, and put back; the trace,
    and of each visual its modality, its tokens and those that enter."""
    stock = last(model, inputs)
    mm.compress(model, plan)
    got, trace = last(model, inputs), mm.trace(model)
    kept = trace.call.groups[-1].source[0]
    steps = generated(model, inputs)
    mm.uncompress(model)
    assert torch.equal(last(model, inputs), stock)
    length = inputs["input_ids"].shape[1]
    assert bool(visual_in(inputs["input_ids"])[0][[i for i in range(length) if i not in set(kept.tolist())]].all())

    def reference(ids: Tensor) -> Tensor:
        places = torch.cat([kept, torch.arange(length, ids.shape[1])])
        with shortened(model, places, ids, None, lambda embeds: embeds, {}):
            return last(model, extended(inputs, ids))

    close(got, reference(inputs["input_ids"]), "prefill", 0.0)
    for step, logits in enumerate(steps.logits):
        close(logits, reference(steps.sequences[:, : length + step]), f"step {step}", 2e-4)
    return trace, [(shown.modality, shown.tokens, shown.kept) for shown in trace.visuals]


@models
@pytest.mark.parametrize("name", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_every_modality_has_its_budget(name: str) -> None:
    model = build(name)
    inputs = prompts(model, [MIXED])
    trace, found = exact(model, inputs, THREE)
    rates = {"image": 0.5, "video": 0.25, "audio": 0.3}
    assert sorted(modality for modality, *_ in found) == ["audio", "audio", "image", "video"]
    assert [kept for *_, kept in found] == [max(1, round(rates[modality] * tokens)) for modality, tokens, _ in found]
    assert len({tokens for modality, tokens, _ in found if modality == "audio"}) == 2  # sounds of two lengths
    text = str(trace.report())
    assert (
        all(f"visual    {modality} 1 of prompt 1: " in text for modality in rates) and "audio " in text.split("time")[1]
    )


@models
def test_what_no_stage_names_stays() -> None:
    model = build("qwen2_5_omni_thinker")
    inputs = prompts(model, [MIXED])
    _, found = exact(model, inputs, "divprune(keep=0.5)")
    assert all(kept == (tokens if modality == "audio" else tokens // 2) for modality, tokens, kept in found)
    mm.compress(model, 'divprune(keep=0.5, on="audio")')
    alone = prompts(model, [[4, "1", 5]])
    mm.uncompress(model)
    stock = last(model, alone), last(model, prompts(model, [[9]]))
    mm.compress(model, 'divprune(keep=0.5, on="audio")')
    assert torch.equal(last(model, alone), stock[0]) and mm.trace(model).visuals[0].kept == 16
    assert torch.equal(last(model, prompts(model, [[9]])), stock[1])


@models
def test_cuts_in_layers_act_on_their_modality() -> None:
    model = build("qwen2_5_omni_thinker")
    inputs = prompts(model, [MIXED])
    ids = inputs["input_ids"][0]
    mm.compress(model, 'fastv(layer=1, keep=0.5, on="audio")')
    got, trace = last(model, inputs), mm.trace(model)
    kept = trace.call.groups[-1].source[0]
    gone = torch.ones(len(ids), dtype=torch.bool).index_fill(0, kept, False).nonzero()[:, 0]
    mm.uncompress(model)
    heard = int((ids == AUDIO).sum())
    assert bool((ids[gone] == AUDIO).all()) and len(gone) == heard - round(heard / 2)
    with masked(model, gone, 1):
        close(got, last(model, inputs), "prefill", 1e-4)


@models
@pytest.mark.parametrize(
    ("plan", "left"),
    [
        ('fastv(layer=1, keep=0.5, on="image") >> fastv(layer=2, keep=3, on="audio") >> fastv(layer=3, keep=0.25, on="video")',
         {"image": 8, "audio": 3, "video": 8}),
        ('fastv(layer=1, keep=10) >> fastv(layer=2, keep=5, on="audio")', {"seen": 10, "audio": 5}),
        ('fastv(layer=1, keep=14, on=("image", "audio")) >> fastv(layer=2, keep=1.0, on="image") >> fastv(layer=3, keep=0.5)',
         None),
    ],
)  # fmt: skip
def test_budgets_in_layers_are_exact(plan: str, left: dict[str, int] | None) -> None:
    model = build("qwen2_5_omni_thinker")
    mm.compress(model, plan)
    batch = prompts(model, [[5, "a3", 4, "1", 4], MIXED])
    last(model, batch)
    trace = mm.trace(model)
    found: dict[str, int] = {}
    for shown in trace.visuals:
        if shown.row == 1:
            found[shown.modality] = found.get(shown.modality, 0) + len(shown.kept_cells(3))
    found["seen"] = found["image"] + found["video"]
    if left is None:  # a budget that two share, and then others: what is left of each is counted
        layers = trace.tokens_per_layer(1)
        first = sum(len(s.kept_cells(1)) for s in trace.visuals if s.row == 1 and s.modality != "video")
        here = sum(len(s.kept_cells(2)) for s in trace.visuals if s.row == 1 and s.modality != "audio")
        assert first == 14 and found["seen"] == round(here / 2) and layers[2] - layers[3] == here - found["seen"]
    else:
        assert {name: found[name] for name in left} == left
    mm.compress(model, plan)
    alone = prompts(model, [MIXED], first=1)
    together, kept = last(model, batch)[1:], [s.kept_cells(3).tolist() for s in mm.trace(model).visuals if s.row == 1]
    close(last(model, alone), together, "batch", 1e-3)
    assert [s.kept_cells(3).tolist() for s in mm.trace(model).visuals] == kept


@models
def test_encoder_stages_leave_other_modalities_alone() -> None:
    model = build("qwen2_5_vl")
    inputs = prompts(model, [[4, "1", 3, "v1", 5]], runs=1)
    for plan in ('tome(keep=0.5, on="image")', 'downsample(keep=0.25, on="image")', 'visionzip(keep=0.5, on="image")'):
        mm.compress(model, plan)
        last(model, inputs)
        shown = {visual.modality: visual for visual in mm.trace(model).visuals}
        assert shown["image"].kept <= shown["image"].tokens // 2 and shown["video"].kept == shown["video"].tokens
        assert mm.trace(model).call.groups[-1].counts[0] == inputs["input_ids"].shape[1] - 16 + shown["image"].kept
    films = prompts(model, [[4, "v1", 5]], runs=1)
    mm.uncompress(model)
    stock = last(model, films)
    mm.compress(model, 'tome(keep=0.5, on="image")')
    assert torch.equal(last(model, films), stock)


@models
@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_the_thinker_inside_the_whole(name: str) -> None:
    """generate of the whole model calls that of its thinker."""
    whole = build(name)
    if not hasattr(whole, "talker"):  # of which the whole reads a token id, even for text
        whole.talker = SimpleNamespace(codec_pad_token=0)
    whole.speaker_map = {"Chelsie": {}, "Ethan": {}}
    inputs = prompts(whole.thinker, [[5, "a1", 6]])
    options: dict[str, Any] = {"generation_mode": "text", "thinker_max_new_tokens": 3}
    if name == "qwen3_omni_moe":
        options = {"return_audio": False, "thinker_max_new_tokens": 3, "thinker_return_dict_in_generate": False}
    plan = 'divprune(keep=0.5, on="audio")'
    _, found = exact(whole.thinker, inputs, plan)
    stock = whole.generate(**inputs, **options)
    mm.compress(whole.thinker, plan)
    got, kept = whole.generate(**inputs, **options), mm.trace(whole.thinker).visuals[0].kept
    alone = whole.thinker.generate(**inputs, max_new_tokens=3, do_sample=False)
    mm.uncompress(whole.thinker)
    got, stock = (x[0] if isinstance(x, tuple) else x for x in (got, stock))
    assert torch.equal(getattr(got, "sequences", got), alone) and [("audio", 2 * kept, kept)] == found
    again = whole.generate(**inputs, **options)
    again = again[0] if isinstance(again, tuple) else again
    assert torch.equal(getattr(again, "sequences", again), getattr(stock, "sequences", stock))


@models
def test_one_placeholder_for_a_whole_sound_is_refused() -> None:
    model = mm.compress(build("qwen2_audio"), 'divprune(keep=0.5, on="audio")')
    inputs = prompts(model, [[4, "a2", 5]])
    ids = inputs["input_ids"][:, [*range(5), *range(-5, 0)]]
    assert int((ids == AUDIO).sum()) == 1
    with pytest.raises(ValueError, match="10 tokens became 25 embeddings inside the model"), torch.no_grad():
        model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)})


@models
def test_placeholders_without_sound_are_refused() -> None:
    model = build("voxtral")
    inputs = prompts(model, [[4, "a2", 5]])
    mm.compress(model, 'divprune(keep=0.5, on="audio")')
    del inputs["input_features"]
    with pytest.raises(ValueError, match="has audio placeholders, but no audio came with it: pass its sound"):
        last(model, inputs)


def test_a_sound_in_turns_with_its_video_is_one() -> None:
    text, video, sound = 0, 1, 2
    row = torch.tensor([[text, video, video, sound, sound, video, sound, text, sound, sound, text, sound]])
    assert [run.length for run in _runs((row == sound).numpy())] == [2, 1, 2, 1]
    assert [run.length for run in _runs((row == sound).numpy(), ((row == sound) | (row == video)).numpy())] == [3, 2, 1]


@models
def test_a_sound_that_is_shown_in_turns_with_its_video() -> None:
    """Both have one budget each, whatever the order in the prompt."""
    model = build("qwen2_5_omni_thinker")
    inputs = prompts(model, [[4, "v1", 2, "a2", 5]])
    ids = inputs["input_ids"]
    tokens = [[i] * int((ids == i).sum()) for i in (151, AUDIO)]
    turns = [*tokens[0][:16], *tokens[1][:5], *tokens[0][16:], *tokens[1][5:]]
    inputs["input_ids"] = torch.tensor([[9, 8, 140, *turns, 141, 7, 6]])
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(1, length, dtype=torch.int64)
    inputs["position_ids"] = torch.arange(length).expand(3, 1, -1)
    mm.compress(model, 'seats(keep=0.25, on="video") >> seats(keep=3, on="audio")')
    last(model, inputs)
    assert [(v.modality, v.kept) for v in mm.trace(model).visuals] == [("audio", 3), ("video", len(tokens[0]) // 4)]


@models
def test_beams_repeat_sounds() -> None:
    model = build("qwen3_asr")
    inputs = prompts(model, [[4, "a2", 5]])
    mm.compress(model, 'divprune(keep=0.5, on="audio")')
    last(model, inputs)
    kept = mm.trace(model).visuals[0].kept_cells(3).tolist()
    one = model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False)
    assert one.shape[0] == 1
    mm.compress(model, 'divprune(keep=0.5, on="audio")')
    twice = {name: torch.cat([value] * 2) for name, value in inputs.items()}
    last(model, twice)
    assert [v.kept_cells(3).tolist() for v in mm.trace(model).visuals] == [kept] * 2


@models
def test_a_trace_of_sounds_is_shown_without_pictures() -> None:
    model = build("qwen2_5_omni_thinker")
    mm.compress(model, 'divprune(keep=0.5, on=("image", "audio"))')
    last(model, prompts(model, [[4, "a2", 3, "1", 5]]))
    from mmcompress.visualize.show import of_trace

    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    assert [len(seen.pictures) for seen in of_trace(mm.trace(model), picture).visuals] == [0, 1]
    with pytest.raises(ValueError, match="2 pictures for 1 visuals"):
        of_trace(mm.trace(model), [picture, picture])


@models
def test_config_without_sound() -> None:
    """A checkpoint without the token takes no sounds, whatever methods its class has."""
    model = transformers.VoxtralForConditionalGeneration(config("voxtral"))
    assert adapter_for(model).modalities == ["audio"]
    model.config.audio_token_id = None
    with pytest.raises(NotImplementedError, match="no token of its prompts stands for a part of sounds"):
        mm.compress(model, 'divprune(keep=0.5, on="audio")')


# ---------------------------------------------------------------------- seats
def sound(tokens: int, rows: int = 2) -> mm.Visuals:
    features = torch.randn(rows, tokens, 8, generator=torch.Generator().manual_seed(tokens))
    return mm.Visuals(features, mm.Layout((mm.View((1, tokens), role="audio"),)), 0)


def with_budget(visuals: mm.Visuals, k: int, **signals: Tensor) -> mm.Visuals:
    return mm.Visuals(visuals.features, visuals.layout, k, signals, visuals.slots)


@pytest.mark.parametrize(
    ("tokens", "k", "shares"), [(130, 39, [15, 15, 9]), (130, 1, [1, 0, 0]), (130, 130, [50, 50, 30]), (49, 7, [7])]
)
def test_windows_share_the_budget(tokens: int, k: int, shares: list[int]) -> None:
    kept = mm.Seats(0.3).select(with_budget(sound(tokens), k)).keep
    assert kept.shape == (2, k) and bool((kept.diff(dim=1) > 0).all())
    for row in kept:
        assert [int(((row >= start) & (row < start + 50)).sum()) for start in range(0, tokens, 50)] == shares


def test_windows_of_a_layout() -> None:
    video, picture = mm.Layout.raster(5, 2, 3), mm.Layout.raster(1, 4, 4)
    assert mm.Seats(0.5).windows(video) == [0] * 12 + [1] * 12 + [2] * 6
    assert set(mm.Seats(0.5, frames=5).windows(video)) == set(mm.Seats(0.5).windows(picture)) == {0}
    assert mm.Seats(0.5, tokens=4).windows(sound(10).layout) == [0] * 4 + [1] * 4 + [2] * 2


def test_windows_stay_where_they_are_behind_another_stage() -> None:
    visuals = sound(100)
    first = mm.Selection(torch.stack([torch.arange(40), torch.arange(40) + 50]))
    left = visuals.take(first)
    kept = mm.Seats(0.5, tokens=20).select(with_budget(left, 8)).keep
    shares = [
        [int(((row >= start) & (row < end)).sum()) for start, end in ((0, 10), (10, 20), (20, 30), (30, 40))]
        for row in kept
    ]
    assert (
        sum(shares[0][:2]) == 4 and shares[1][0] == 2 and sum(shares[1][1:3]) == 4
    )  # windows of 20, 20 and of 10, 20, 10
    alone = mm.Seats(0.5, tokens=20).select(
        with_budget(mm.Visuals(left.features[1:], left.layout, 8, {}, left.slots[1:]), 8)
    )
    assert torch.equal(alone.keep, kept[1:])


def test_attention_counts_from_the_first_pick_on() -> None:
    features = torch.eye(4)[None]
    assert farthest(features, torch.tensor([[1.0, 1.0, 3.0, 2.0]]), 3)[0].tolist() == [2, 3, 0]
    assert farthest(features, None, 3)[0].tolist() == [0, 1, 2]
    heavy = torch.zeros(2, 60).index_fill(1, torch.tensor([3, 59]), 5.0)
    kept = mm.Seats(0.1, tokens=30).select(with_budget(sound(60), 2, received_attention=heavy)).keep
    assert kept.tolist() == [[3, 59]] * 2


@pytest.mark.parametrize("options", ["frames=0", "tokens=2.5", "frames=True"])
def test_seats_refuses(options: str) -> None:
    with pytest.raises(ValueError, match=f"{options}: give how many make a window"):
        as_pipeline(f"seats(keep=0.5, {options})")
