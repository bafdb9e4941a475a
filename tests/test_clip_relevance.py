# SPDX-License-Identifier: Apache-2.0
"""The question in CLIP's joint space: what is read from prompts, signals against transformers' own CLIP, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import transformers
from mmcompress.assets import CLIP, model_path
from mmcompress.kernels.diverse import greedy_map
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

import mmcompress as mm
from mmcompress.methods.cdpruner import CDPruner
from mmcompress.ops.relevance import direction
from mmcompress.runtime import clip as clip_module
from mmcompress.runtime.clip import question_of

from . import families
from .tiny import ALIKE, GREEDY, IMAGE, PAD, RAGGED, build, prompts, single

SEEN: list[mm.Visuals] = []
WORDS = 160
CONTEXT = 12


@mm.register("clip_spy")
@dataclass(frozen=True, repr=False)
class ClipSpy(mm.InputStage):
    """Keeps what it is shown, for the tests."""

    keep: float | int = 0.5
    clip: str | None = None
    tokenizer: str | None = None
    needs: ClassVar[tuple] = (
        "clip_patches", "clip_patches@-1", "clip_patches_plain@-1", "clip_text", "clip_text_last",
    )  # fmt: skip

    def select(self, visuals: mm.Visuals) -> mm.Selection:
        SEEN.append(visuals)
        return mm.Selection.top(visuals.features.sum(-1), visuals.k)


def words_tokenizer(folder: Path, clip: bool) -> str:
    """A tokenizer of the words w4, w5, ...; for a CLIP with a start token, and an end token that is also its padding."""
    names = {PAD: "<pad>", 1: "</s>", 2: "<s>", 3: "<unk>", IMAGE: "<image>"}
    made = Tokenizer(models.WordLevel({names.get(i, f"w{i}"): i for i in range(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>" if clip else "<pad>"}
    if clip:
        ends = [("<s>", 2), ("</s>", 1)]
        made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return str(folder)


def clip_of(tower: Any, folder: Path, change: Callable[[Any], None] | None = None) -> str:
    """A random CLIP around a vision tower, in a folder."""
    text = transformers.CLIPTextConfig(
        vocab_size=WORDS, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=CONTEXT, bos_token_id=2, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=tower.config.to_dict(), projection_dim=20
    )
    torch.manual_seed(3)
    made = transformers.CLIPModel(config)
    for name, parameter in made.named_parameters():
        if "norm" not in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    made.vision_model.load_state_dict(tower.state_dict())
    if change is not None:
        change(made)
    made.save_pretrained(folder)
    return words_tokenizer(folder, clip=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of the CLIP of `build()` and of a tokenizer for its prompts."""
    folder = tmp_path_factory.mktemp("pair")
    tower = build().model.vision_tower
    return clip_of(tower, folder / "clip"), words_tokenizer(folder / "words", clip=False)


def texts(inputs: dict[str, Tensor]) -> list[str]:
    """The question of each row: the words after its last image."""
    found = []
    for row in inputs["input_ids"].tolist():
        last = max(i for i, token in enumerate(row) if token == IMAGE)
        found.append(" ".join(f"w{token}" for token in row[last + 1 :]))
    return found


# ---------------------------------------------------------------------- reading the prompt
@pytest.mark.parametrize(
    ("text", "question"),
    [
        (" \nWhat is this? ASSISTANT:", "What is this?"),
        ("what color is the star ? ASSISTANT:", "what color is the star ?"),
        ("\nWhat is this? [/INST]", "What is this?"),
        ("\nWhat is this?<|im_end|>\n<|im_start|>assistant\n", "What is this?"),
        ("\nWhat is this?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "What is this?"),
        ("\nA or B?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly. ASSISTANT:",
         "A or B?\nA. cat\nB. dog"),
        ("Is it red?\nAnswer the question using a single word or phrase. ASSISTANT:", "Is it red?"),
        ("First? ASSISTANT: Yes.</s>USER: And the second? ASSISTANT:", "And the second?"),
        ("First? [/INST] Yes </s>[INST] And the second? [/INST]", "And the second?"),
        ("<s>A chat. USER: What is this?<pad> ASSISTANT: a label that is no question", "What is this?"),
        (" ASSISTANT:", ""),
        ("plain words", "plain words"),
        ("does the assistant see the user: yes?", "does the assistant see the user: yes?"),
    ],
)  # fmt: skip
def test_question_of(text: str, question: str) -> None:
    special = ("<|im_end|>", "<|eot_id|>", "</s>", "<s>", "<pad>")
    assert question_of(text, special) == question


def test_direction() -> None:
    x = torch.randn(3, 7)
    expected = (x / x.norm(dim=1, keepdim=True)).mean(0)
    assert torch.allclose(direction(x), expected / expected.norm(), atol=1e-6)
    assert torch.allclose(direction(5 * x[:1]), x[0] / x[0].norm(), atol=1e-6)


# ---------------------------------------------------------------------- signals
@torch.no_grad()
def test_signals_equal_those_of_transformers(pair: tuple[str, str]) -> None:
    folder, words = pair
    model, inputs = build(), prompts(build(), ALIKE)
    SEEN.clear()
    mm.compress(model, ClipSpy(clip=folder, tokenizer=words))
    model(**inputs)
    seen = {name: torch.cat([v.signals[name] for v in SEEN]) for name in ClipSpy.needs}
    clip = transformers.CLIPModel.from_pretrained(folder).eval()
    tower = clip.vision_model(inputs["pixel_values"], output_hidden_states=True)

    def projected(state: Tensor, norm: bool) -> Tensor:
        return clip.visual_projection(clip.vision_model.post_layernorm(state) if norm else state)[:, 1:]

    assert torch.allclose(seen["clip_patches"], projected(tower.hidden_states[-2], True), atol=1e-4)
    assert torch.allclose(seen["clip_patches@-1"], projected(tower.last_hidden_state, True), atol=1e-4)
    assert torch.allclose(seen["clip_patches_plain@-1"], projected(tower.last_hidden_state, False), atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for i, text in enumerate(texts(inputs)):
        features = clip.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output
        assert torch.allclose(seen["clip_text"][i], F.normalize(features, dim=-1)[0], atol=1e-5)
        ids = tokenizer(text, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
        assert ids.shape == (1, CONTEXT)
        last = clip.text_projection(clip.text_model(input_ids=ids).last_hidden_state[:, -1])
        assert torch.allclose(seen["clip_text_last"][i], F.normalize(last, dim=-1)[0], atol=1e-5)
        assert not torch.allclose(seen["clip_text_last"][i], seen["clip_text"][i], atol=0.05)


@torch.no_grad()
def test_a_long_question_is_cut_into_segments(pair: tuple[str, str]) -> None:
    folder, words = pair
    model, inputs = build(), prompts(build(), [["image", 2 * (CONTEXT - 2) + 3]])
    SEEN.clear()
    mm.compress(model, ClipSpy(clip=folder, tokenizer=words))
    model(**inputs)
    clip = transformers.CLIPModel.from_pretrained(folder).eval()
    ids = inputs["input_ids"][0, -(2 * (CONTEXT - 2) + 3) :]
    parts = [torch.cat([torch.tensor([2]), part, torch.tensor([1])])[None] for part in ids.split(CONTEXT - 2)]
    assert len(parts) == 3
    each = torch.cat([F.normalize(clip.get_text_features(input_ids=part).pooler_output, dim=-1) for part in parts])
    assert torch.allclose(SEEN[0]["clip_text"][0], F.normalize(each.mean(0), dim=0), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"compat": "reference"}, {"theta": 0.5}])
def test_cdpruner_in_a_model_decides_as_on_signals_of_transformers(
    pair: tuple[str, str], options: dict[str, Any]
) -> None:
    folder, words = pair
    model, inputs = build(), prompts(build(), ALIKE)
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    mm.compress(model, CDPruner(keep=5, clip=folder, tokenizer=words, **options))
    model(**inputs)
    kept = [v.kept_cells().tolist() for v in mm.trace(model).visuals]
    clip = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    states = clip.vision_model(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    patches = clip.visual_projection(clip.vision_model.post_layernorm(states))[:, 1:]
    alone = []
    for i, text in enumerate(texts(inputs)):
        embedded = clip.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output
        relevance = -F.cosine_similarity(patches[i], embedded, dim=-1)
        relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
        quality = CDPruner(**options).log_quality(relevance[None])
        alone.append(greedy_map(features[i][None], quality, 5)[0].sort().values.tolist())
    assert kept == alone  # the questions have different lengths: each visual is decided alone


@torch.no_grad()
def test_every_row_has_its_own_question(pair: tuple[str, str]) -> None:
    folder, words = pair
    model, inputs = build(), prompts(build(), RAGGED)
    mm.compress(model, CDPruner(keep=4, clip=folder, tokenizer=words))
    out = model.generate(**inputs, **GREEDY)
    both = [v.kept_cells().tolist() for v in mm.trace(model).visuals]
    assert [len(kept) for kept in both] == [4, 4, 4]
    assert {question for question, _, _ in model._mmcompress_engine.clip.remembered} == set(texts(inputs))
    for row, of_row in ((0, both[:1]), (1, both[1:])):
        one = single(inputs, row, [1, 2])
        alone = model.generate(**one, **GREEDY)
        assert [v.kept_cells().tolist() for v in mm.trace(model).visuals] == of_row
        assert torch.equal(alone[0, one["input_ids"].shape[1] :], out[row, inputs["input_ids"].shape[1] :])
    inputs = prompts(build(), ALIKE)
    model(**inputs)
    both = [v.kept_cells().tolist() for v in mm.trace(model).visuals]
    model.generate(**inputs, **GREEDY, num_beams=2)
    beams = {v.row: v.kept_cells().tolist() for v in mm.trace(model).visuals}
    assert [beams[row] for row in range(4)] == [both[0], both[0], both[1], both[1]]


@torch.no_grad()
def test_a_prompt_without_text_behind_the_picture(pair: tuple[str, str]) -> None:
    folder, words = pair
    model = mm.compress(build(), CDPruner(keep=4, clip=folder, tokenizer=words))
    for parts in ([6, "image"], ["image"]):
        with pytest.raises(ValueError, match="ends with image tokens"):
            model(**prompts(model, [parts]))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava_next", "llava_next_video"])
def test_tiles_and_frames(family: str, pair: tuple[str, str], tmp_path: Path) -> None:
    """Patches of tiles and frames go the way of the features: the same cut, the same pooling."""
    model = families.build(family)
    folder = clip_of(model.model.vision_tower, tmp_path / "clip")
    video = family == "llava_next_video"
    part = families.video(family) if video else families.image(family, True)
    inputs = families.prompts(model, family, [[4, part, 5], [2, part, 3]])
    inputs["input_ids"] = inputs["input_ids"].clamp_max(WORDS - 1)
    SEEN.clear()
    mm.compress(model, ClipSpy(keep=3, clip=folder, tokenizer=pair[1]))
    model(**inputs)
    clip = model._mmcompress_engine.clip
    for visuals in SEEN:
        assert visuals["clip_patches"].shape == (*visuals.features.shape[:2], 20)
    pixels = inputs["pixel_values_videos" if video else "pixel_values"].flatten(0, 1)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    joint = clip.project(states, plain=False)
    if video:
        grid = joint.unflatten(1, (4, 4)).movedim(3, 1)
        expected = F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2).reshape(2, -1, 20)
    else:
        expected = joint[:: len(pixels) // 2][:, :16]  # the thumbnails come first
    found = torch.cat([v["clip_patches"] for v in SEEN])[:, : expected.shape[1]]
    assert torch.allclose(found, expected, atol=1e-4)


@torch.no_grad()
def test_behind_merging_in_the_encoder_and_before_cuts(pair: tuple[str, str]) -> None:
    folder, words = pair
    model, inputs = build(), prompts(build(), RAGGED)
    mm.compress(model, mm.ToMe(keep=0.5) >> CDPruner(keep=4, clip=folder, tokenizer=words) >> mm.FastV(2, 0.5))
    assert model(**inputs).logits.isfinite().all()
    assert all(v.kept == 4 for v in mm.trace(model).visuals)
    with pytest.raises(NotImplementedError, match="reads clip_"):
        mm.compress(model, mm.Downsample(keep=0.5) >> CDPruner(keep=4, clip=folder, tokenizer=words))


@torch.no_grad()
def test_hosted_by_cen_prune(pair: tuple[str, str]) -> None:
    folder, words = pair
    model, inputs = build(), prompts(build(), ALIKE)
    mm.compress(model, f"cen_prune(keep=4, host=\"cdpruner(clip='{folder}', tokenizer='{words}')\")")
    model(**inputs)
    assert len(model._mmcompress_engine.clip.remembered) == 2
    assert mm.report(model).substitutes == {}


# ---------------------------------------------------------------------- life
@torch.no_grad()
def test_a_question_is_encoded_once(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, words = pair
    model, inputs = build(), prompts(build(), RAGGED)
    mm.compress(model, CDPruner(keep=4, clip=folder, tokenizer=words))
    clip = model._mmcompress_engine.clip
    asked: list[str] = []
    encode = clip.pair.encode

    def counted(text: str, *rest: Any) -> Tensor:
        asked.append(text)
        return encode(text, *rest)

    monkeypatch.setattr(clip.pair, "encode", counted)
    model(**inputs)
    model(**inputs)
    assert sorted(asked) == sorted(texts(inputs))
    monkeypatch.setattr(clip_module, "REMEMBERED", 2)
    for seed in range(3):
        model(**prompts(model, ALIKE, seed=seed + 5))
    assert len(clip.remembered) == 2
    model(**inputs)  # gone meanwhile
    assert sorted(asked[-2:]) == sorted(texts(inputs))


def test_half_precision_autocast_and_inference_mode_before_training(pair: tuple[str, str]) -> None:
    folder, words = pair
    model, inputs = build(dtype=torch.bfloat16), prompts(build(dtype=torch.bfloat16), ALIKE)
    mm.compress(model, CDPruner(keep=4, clip=folder, tokenizer=words))
    with torch.inference_mode():
        model(**inputs)
    kept = [v.kept_cells().tolist() for v in mm.trace(model).visuals]
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs).logits.sum().backward()
    assert [v.kept_cells().tolist() for v in mm.trace(model).visuals] == kept
    assert model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad is not None


@torch.no_grad()
def test_nothing_of_it_becomes_part_of_the_model(pair: tuple[str, str]) -> None:
    folder, words = pair
    model = build()
    before = set(model.state_dict())
    mm.compress(model, CDPruner(keep=4, clip=folder, tokenizer=words))
    model(**prompts(model, ALIKE))
    assert set(model.state_dict()) == before
    mm.uncompress(model)
    assert not any("mmcompress" in name for name in vars(model))


@torch.no_grad()
def test_the_report_names_the_substitute(pair: tuple[str, str]) -> None:
    folder, words = pair
    model, inputs = build(), prompts(build(), ALIKE)
    mm.compress(model, "cdpruner", keep=4)
    model(**inputs)
    assert "text_embeddings stands for clip_text, for which no clip= is given" in str(mm.report(model))
    mm.compress(model, "cdpruner", keep=4, clip=Path(folder), tokenizer=words)
    model(**inputs)
    assert "stands for" not in str(mm.report(model))


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 3}, "clip=3: give a name"),
        ({"clip": ""}, "clip=''"),
        ({"clip": "a", "tokenizer": 1.5}, "tokenizer=1.5"),
        ({"tokenizer": "a"}, "tokenizer='a' reads the question for a CLIP"),
    ],
)
@pytest.mark.parametrize("method", ["cdpruner", "recoverable_compression"])
def test_bad_options(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mm.as_pipeline(method, **options)


def test_options_are_plain_values() -> None:
    plan = mm.as_pipeline("cdpruner", clip=Path("some/folder"), tokenizer=Path("other"))
    assert repr(plan) == "cdpruner(keep=0.111, clip='some/folder', tokenizer='other')"
    assert mm.as_pipeline(plan.to_dict()) == plan == mm.as_pipeline(repr(plan))


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_families_without_a_clip_tower_refuse(family: str, pair: tuple[str, str]) -> None:
    model = families.build(family)
    with pytest.raises(NotImplementedError, match=r"not that of a CLIP.*leave clip out"):
        mm.compress(model, CDPruner(keep=4, clip=pair[0], tokenizer=pair[1]))
    assert not any("mmcompress" in name for name in vars(model))


def test_towers_that_are_not_those_of_the_clip(pair: tuple[str, str], tmp_path: Path) -> None:
    stage = CDPruner(keep=4, clip=pair[0], tokenizer=pair[1])
    with pytest.raises(ValueError, match="has the sizes of the model's vision tower, but other weights"):
        mm.compress(build(seed=7), stage)
    tuned = build()
    generator = torch.Generator().manual_seed(0)
    for parameter in tuned.model.vision_tower.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.1 * parameter.data.square().mean().sqrt() * noise
    mm.compress(tuned, stage)
    vision = families.VISION | {"num_hidden_layers": 3, "hidden_size": 64}
    other = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision))
    wide = clip_of(other, tmp_path / "wide")
    with pytest.raises(ValueError, match=r"hidden size 64 instead of 32, layers 3 instead of 4\. Give the CLIP"):
        mm.compress(build(), CDPruner(keep=4, clip=wide, tokenizer=pair[1]))


def test_what_cannot_be_loaded(pair: tuple[str, str], tmp_path: Path) -> None:
    folder, words = pair
    with pytest.raises(ValueError, match="the model does not say where it was loaded from"):
        mm.compress(build(), CDPruner(keep=4, clip=folder))
    with pytest.raises(ValueError, match="no tokenizer at"):
        mm.compress(build(), CDPruner(keep=4, clip=folder, tokenizer=str(tmp_path)))
    with pytest.raises(ValueError, match="cannot be loaded: give a CLIP of transformers"):
        mm.compress(build(), CDPruner(keep=4, clip=str(tmp_path), tokenizer=words))
    with pytest.raises(ValueError, match="it is a llava, not a clip"):
        mm.compress(build(), CDPruner(keep=4, clip=str(model_path()), tokenizer=words))
    with pytest.raises(ValueError, match="all stages of a plan share one CLIP"):
        plan = CDPruner(keep=8, clip=folder, tokenizer=words) >> CDPruner(keep=4, clip=str(tmp_path))
        mm.compress(build(), plan)


@torch.no_grad()
def test_a_prompt_without_ids_cannot_be_read(pair: tuple[str, str]) -> None:
    folder, words = pair
    model, inputs = build(), prompts(build(), ALIKE)
    mm.compress(model, CDPruner(keep=4, clip=folder, tokenizer=words))
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="inputs_embeds, in which CLIP cannot read the question"):
        model(**inputs, inputs_embeds=embeds)


def test_a_need_without_a_substitute_says_what_to_give() -> None:
    with pytest.raises(NotImplementedError, match=r"needs clip_patches, .*give clip=, the CLIP of its vision tower"):
        mm.compress(build(), ClipSpy())


# ---------------------------------------------------------------------- the embedded pair
@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    pytest.importorskip("open_clip", reason="needs open_clip")
    from mmcompress.eval.synthetic.benchmark import load

    return load(model_path())


@torch.no_grad()
def test_cdpruner_with_the_embedded_pair(embedded: tuple[Any, Any]) -> None:
    """In generate on a batch; the tokenizer is found by the name of the model, and the text is that of open_clip."""
    import open_clip
    from mmcompress.eval.synthetic import items
    from mmcompress.eval.synthetic.benchmark import encode

    model, processor = embedded
    some = items(5)
    with mm.compressed(model, CDPruner(keep=16, clip=str(model_path(CLIP)))):
        model.generate(**encode(processor, some), do_sample=False, max_new_tokens=4)
        assert [v.kept for v in mm.trace(model).visuals] == [16] * 5
        remembered = model._mmcompress_engine.clip.remembered
    name = f"local-dir:{model_path(CLIP)}"
    clip, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    assert {question for question, _, _ in remembered} == {item.question.text for item in some}
    for (question, _, _), found in remembered.items():
        assert torch.allclose(found, clip.encode_text(tokenizer([question]), normalize=True)[0], atol=1e-5)
    with pytest.raises(NotImplementedError, match="only read from a CLIP of transformers"):
        stage = mm.RecoverableCompression(keep=16, compat="reference", clip=str(model_path(CLIP)))
        with mm.compressed(model, stage):
            model(**encode(processor, some))


@torch.no_grad()
def test_the_embedded_pair_points_at_what_is_asked_for(embedded: tuple[Any, Any]) -> None:
    """Better than chance, no more: its text tower was trained on captions of whole pictures, not on questions and patches."""
    from mmcompress.eval.synthetic import items
    from mmcompress.eval.synthetic.benchmark import encode

    model, processor = embedded
    asked = [i for i in items(126) if i.question.kind in ("color", "shape", "existence") and i.question.targets]
    SEEN.clear()
    middle = (torch.arange(12) + 0.5) * 8
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    stage = ClipSpy(clip=str(model_path(CLIP)))
    object.__setattr__(stage, "needs", ("clip_text", "clip_patches"))
    areas = []
    with mm.compressed(model, stage):
        for item in asked:
            model(**encode(processor, [item]))
            things = [item.scene.things[i] for i in item.question.targets]
            inside = [((x - t.center[0]).abs() < t.radius) & ((y - t.center[1]).abs() < t.radius) for t in things]
            is_target = torch.stack(inside).any(0).flatten()
            seen = SEEN[-1]
            cosine = F.cosine_similarity(seen["clip_patches"][0], seen["clip_text"], dim=-1)
            above = cosine[is_target][:, None] > cosine[~is_target]
            areas.append(above.float().mean())
    assert len(areas) > 35 and torch.stack(areas).mean() > 0.62  # 0.5 by chance
