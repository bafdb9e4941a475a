# SPDX-License-Identifier: Apache-2.0
"""Every image-text and multimodal architecture of transformers: each kind of stage is exact or refused, as the table in
assets/architectures.json says.

After a change that is meant, `python -m tests.architectures --write` writes what is there now.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from mmcompress.adapters import adapter_for
from torch import nn

import mmcompress as mm
from mmcompress.runtime.adapter import Encoded
from mmcompress.runtime.call import Call
from mmcompress.runtime.locate import locate
from mmcompress.visuals import Layout

from .architectures import (
    IMAGE,
    LAYERS,
    NAMES,
    OLDEST,
    OVERRIDES,
    SHARED,
    SQUARE,
    TABLE,
    VIDEO,
    build,
    prompts,
    shrunk,
    table,
    told,
)
from .exactness import PLANS, judge_all

pytestmark = pytest.mark.skipif(OLDEST, reason="configs, inputs and the table are those of the newest transformers")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kinds", [("input", "layer"), pytest.param(tuple(PLANS), marks=pytest.mark.slow)], ids="-".join
)
def test_exact_or_refused(name: str, kinds: tuple[str, ...]) -> None:
    found = judge_all(name, kinds)
    said = {kind: table(outcome) for kind, outcome in found.items()} | told(name)
    assert said == {kind: verdict for kind, verdict in TABLE[name].items() if kind in said}, found


def test_every_architecture_has_a_verdict() -> None:
    """None crashes, none is silently wrong, none is unjudged."""
    assert set(TABLE) == set(NAMES)
    verdicts = {kind: [TABLE[name][kind] for name in TABLE] for kind in PLANS}
    for kind, found in verdicts.items():
        print(f"{kind}: {found.count('ok')} of {len(found)} exact")
        assert not [verdict for verdict in found if verdict not in ("ok", *SHARED)]
    assert verdicts["input"].count("ok") >= 79 and verdicts["layer"].count("ok") >= 56
    assert verdicts["audio"].count("ok") >= 18
    assert verdicts["signal"].count("ok") >= 9 and verdicts["encoder"].count("ok") >= 9


PIXTRAL = {"vision_config": "pixtral", "vision_feature_select_strategy": "full", "vision_feature_layer": -1}
SHARING = {
    "text_config.num_kv_shared_layers": 2,
    "text_config.layer_types": ["sliding_attention", "full_attention"] * 2,
}
TEXTS = ("phi", "phi3", "glm4", "olmo2", "cohere", "stablelm", "smollm3", "helium", "nemotron", "ernie4_5")


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        ("llava", PIXTRAL, "ok"),
        ("mistral3", {"text_config": "ministral3"}, "ok"),
        ("mistral3", {"text_config": "mistral4"}, "ok"),
        ("internvl", {**SQUARE, "text_config": "qwen3_moe"}, "ok"),
        *[("llava", {"text_config": text}, "ok") for text in TEXTS],
        *[("llava", {"text_config": text}, "ok") for text in ("gemma2", "gpt_oss")],
        ("gemma4", {**OVERRIDES["gemma4"], **SHARING}, "shared"),
        ("gemma3n", {**OVERRIDES["gemma3n"], **SHARING}, "streams"),
    ],
)
def test_other_parts_in_the_same_classes(
    name: str, changes: dict[str, Any], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OVERRIDES, name, changes)
    found = judge_all(name, ("input", "layer"))
    assert {kind: table(outcome) for kind, outcome in found.items()} == {"input": "ok", "layer": wanted}


def wrapped(name: str, cls: str, **changes: Any) -> Any:
    config = transformers.CONFIG_MAPPING[name]
    return getattr(transformers, cls)._from_config(config(**{**shrunk(config()), **changes}))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: nn.Linear(2, 2), "Linear is not supported: it is no model of transformers"),
        (lambda: wrapped("llama", "LlamaForCausalLM"), "it takes no pictures"),
        (lambda: wrapped("t5", "T5ForConditionalGeneration"), "it takes no pictures"),
        (
            lambda: wrapped("qwen2_audio", "Qwen2AudioForConditionalGeneration"),
            r"takes audio: name it, as in divprune\(keep=0.25, on='audio'\)",
        ),
        (lambda: wrapped("clip", "CLIPModel"), "its base model has no decoder apart"),
        (
            lambda: wrapped("qwen3_omni_moe", "Qwen3OmniMoeForConditionalGeneration", enable_audio_output=False),
            r"it wraps the model that sees: compress\(model.thinker, \.\.\.\)",
        ),
    ],
)
def test_other_models_are_told_what_they_are(model: Any, said: str) -> None:
    with pytest.raises(NotImplementedError, match=said):
        mm.compress(model(), "divprune")


def test_the_part_that_sees_is_compressed_where_the_message_says() -> None:
    model = wrapped("qwen3_omni_moe", "Qwen3OmniMoeForConditionalGeneration", enable_audio_output=False)
    mm.compress(model.thinker, "divprune")
    mm.uncompress(model.thinker)


def test_layers_are_refused_by_their_kind() -> None:
    """A state takes stages before the language model."""
    with pytest.raises(NotImplementedError, match=r"fastv.*layers of type conv, whose state cannot forget tokens"):
        mm.compress(build("lfm2_vl"), "fastv(layer=1)")
    with pytest.raises(NotImplementedError, match=r"fastv.*indexers, which choose the tokens that a query sees"):
        mm.compress(build("dots3_note"), "fastv(layer=1)")


@torch.no_grad()
@pytest.mark.parametrize("given", ["ids", "embeddings"])
def test_pictures_and_videos_on_one_placeholder_are_told_apart_by_what_stands_around_a_video(given: str) -> None:
    model = build("glm5_next")
    samples: list[list[int | str]] = [[4, "1", 3, "v1", 5], [6, "v2", 2, "3", 4]]
    chosen = []
    for sample in ([4, "1", 5], [3, "v1", 5], [4, "v2", 5], [3, "3", 5]):
        mm.compress(model, "divprune(keep=0.25)")
        model(**prompts(model, [sample]))
        chosen += [visual.kept_cells().tolist() for visual in mm.trace(model).visuals]
    inputs = prompts(model, samples)
    ids = inputs["input_ids"]
    if given == "embeddings":
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    model(**inputs)
    visuals = sorted(mm.trace(model).visuals, key=lambda visual: (visual.row, int(visual.span.patches[0])))
    assert [visual.modality for visual in visuals] == ["image", "video", "video", "image"]
    assert [visual.kept_cells().tolist() for visual in visuals] == chosen
    for visual in visuals:
        assert (ids[visual.row, visual.span.patches] == IMAGE).all()
        before = ids[visual.row, : visual.span.patches[0]].tolist()
        opened = before.count(model.config.video_start_token_id) > before.count(model.config.video_end_token_id)
        assert opened == (visual.modality == "video")
    mm.uncompress(model)


def test_pictures_and_videos_that_nothing_tells_apart_are_refused_by_name() -> None:
    adapter: Any = SimpleNamespace(placeholders={"image": IMAGE, "video": VIDEO}, config=SimpleNamespace())
    ids = torch.tensor([[5, IMAGE, IMAGE, 6, IMAGE, IMAGE, 7]])
    encoded = [Encoded(modality, [Layout.raster(1, 1, 2)]) for modality in ("image", "video")]
    with pytest.raises(NotImplementedError, match="no video placeholder stands in the prompt"):
        locate(Call(ids, None, encoded), adapter, None, torch.zeros(1, 7, 4), False)


def test_videos_that_the_method_for_pictures_encodes_are_refused_by_name() -> None:
    model = build("perception_lm")
    inputs = prompts(model, [[4, "1", 5]])
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = VIDEO
    inputs["pixel_values_videos"] = inputs.pop("pixel_values")
    mm.compress(model, "divprune(keep=0.5)")
    with (
        pytest.raises(
            NotImplementedError, match="pixel_values_videos was given, but PerceptionLMModel has no get_video_features"
        ),
        torch.no_grad(),
    ):
        model(**inputs)


def test_pictures_of_a_sample_have_budgets_of_their_own() -> None:
    """Idefics gives one tensor of features per sample."""
    model = build("idefics3")
    inputs = prompts(model, [[4, "1", 2, "2", 5], [3, "3", 6]])
    mm.compress(model, "divprune(keep=4)")
    with torch.no_grad():
        model(**inputs)
    assert [(v.row, v.tokens, v.kept) for v in mm.trace(model).visuals] == [(0, 16, 4), (0, 16, 4), (1, 16, 4)]


@torch.no_grad()
@pytest.mark.parametrize("plan", ["fastv(layer=1, keep=0.5)", "pyramiddrop(layers=(1,), ratios=(0.5,))"])
def test_cuts_read_layers_that_are_given_no_rotary_tables(plan: str) -> None:
    """Of the layer before the cut, and ("@next") of the one behind it: as the model's own attention."""
    model = build("muse_spark", attention="eager")
    language_model = adapter_for(model).language_model
    language_model.config.layer_rope_theta = [0.0] * LAYERS
    inputs = prompts(model, [[4, "1", 6]])
    places = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    seen: list[Any] = []
    handle = language_model.layers[0 if "fastv" in plan else 1].self_attn.register_forward_hook(
        lambda module, args, output: seen.append(output[1])
    )
    model(**inputs)
    handle.remove()
    weights = seen[0][0, :, -1].mean(0)[places]
    mm.compress(model, plan)
    for use_cache in (False, True):
        model(**inputs, use_cache=use_cache)
        (visual,) = mm.trace(model).visuals
        kept = visual.kept_cells(LAYERS - 1)
        assert kept.tolist() == weights.topk(len(kept)).indices.sort().values.tolist() and len(kept) == 8


CUTS = ("dart(layer=1, keep=0.5)", "sparsevlm", "transprune", "aim_prune")
"""Cuts by other signals than FastV: norms and states, attention of the text, what layers change, PageRank."""


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NAMES if TABLE[name]["layer"] == "ok"])
def test_cuts_by_other_signals_decide_alike_with_and_without_a_cache_or_are_refused(name: str) -> None:
    model = build(name)
    inputs = prompts(model, [[4, "1", 2, "2", 6]])
    done = 0
    for plan in CUTS:
        try:
            mm.compress(model, plan)
        except NotImplementedError as refusal:
            assert any(
                word in str(refusal) for word in ("looks back only so far", "final norm", "beside its attention")
            )
            continue
        done += 1
        kept, last = [], []
        for use_cache in (False, True):
            last.append(model(**inputs, use_cache=use_cache).logits[:, -1])
            kept.append([visual.kept_cells(LAYERS - 1).tolist() for visual in mm.trace(model).visuals])
        assert kept[0] == kept[1] and any(
            len(cells) < v.tokens for v, cells in zip(mm.trace(model).visuals, kept[0], strict=True)
        )
        assert float((last[0] - last[1]).abs().max()) <= 1e-3
    assert done
