# SPDX-License-Identifier: Apache-2.0
"""Serving, as far as it needs no vLLM: settings, the twin of a model, positions of several axes, what is remembered, the commands.
With vLLM: tests/serving."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmcompress.adapters.vllm import Settings
from mmcompress.adapters.vllm.limits import check_engine, check_version
from mmcompress.adapters.vllm.memo import Kept, Memo
from mmcompress.adapters.vllm.mrope import AXES, Positions, marked
from mmcompress.adapters.vllm.plugin import ARCHITECTURES, PREFIX
from mmcompress.adapters.vllm.twin import Twin, sliced
from mmcompress.assets import MODELS, model_path
from transformers import AutoConfig, AutoProcessor

import mmcompress as mm
from mmcompress.cli import main
from mmcompress.visuals import Layout

QWEN, LLAVA, NEXT, INTERN = "qwen3-vl-shapes", "llava-shapes", "llava-next-shapes", "internvl-shapes"


def twin(model: str, plan: Any, **options: Any) -> Twin:
    return Twin(AutoConfig.from_pretrained(model_path(model)), mm.vllm(plan, **options))


# ---------------------------------------------------------------------- settings
def test_settings_become_overrides_and_come_back() -> None:
    settings = mm.vllm("divprune(keep=0.5) >> uniform(keep=8)", structural="drop")
    config = AutoConfig.from_pretrained(model_path(LLAVA))
    found = pickle.loads(pickle.dumps(settings))(config)
    assert found.architectures == [PREFIX + "LlavaForConditionalGeneration"]
    assert Settings.of(found) == settings and Settings.of(found).pipeline == mm.as_pipeline(
        "plan(divprune(keep=0.5) >> uniform(keep=8), structural='drop')"
    )
    assert settings(config).architectures == found.architectures  # asked again, nothing changes


def test_a_config_without_architectures_is_left_alone() -> None:
    for none in (None, [], [""]):  # vLLM tries what is called on configs that it makes up
        config = SimpleNamespace(architectures=none)
        assert mm.vllm("divprune")(config) is config and vars(config) == {"architectures": none}


@pytest.mark.parametrize(
    ("plan", "error", "words"),
    [
        ("fastv(keep=0.5)", NotImplementedError, "inside the language model"),
        ("tome(keep=0.5)", NotImplementedError, "inside the vision encoder"),
        ("downsample(keep=0.25)", NotImplementedError, "before the vision encoder"),
        ("divprune(keep=0.5) >> fastv(keep=0.5)", NotImplementedError, "fastv(keep=0.5) acts"),
        ("voronoi(keep=0.25)", NotImplementedError, "mass=False"),
        ("divprune(keep=0.25, on='video')", NotImplementedError, "images alone"),
        ("divprun(keep=0.25)", ValueError, "did you mean 'divprune'"),
        ("divprune(keep=1.5)", ValueError, "a ratio must lie in (0, 1]"),
    ],
)
def test_plans_that_cannot_serve_are_refused_by_name(plan: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        mm.vllm(plan)
    assert words in str(caught.value)


@pytest.mark.parametrize("found", ["divprune", {"keep": 0.25}, {"plan": "divprune", "method": 1}])
def test_settings_of_another_form_are_refused(found: Any) -> None:
    with pytest.raises(ValueError, match="vllm-overrides MODEL"):
        Settings.of(SimpleNamespace(mmcompress=found))


def test_other_models_are_refused() -> None:
    with pytest.raises(
        NotImplementedError, match="Gemma3ForConditionalGeneration: images are compressed inside vLLM for Llava"
    ):
        mm.vllm("divprune").overrides(["Gemma3ForConditionalGeneration"])


# ---------------------------------------------------------------------- the twin
@pytest.mark.parametrize(
    ("model", "plan", "options", "words"),
    [
        (
            LLAVA,
            "plan(voronoi(keep=0.25), mass=False)",
            {},
            "plan(voronoi(keep=0.25), positions='reindex', mass=False)",
        ),
        (LLAVA, "divprune", {"positions": "keep"}, "positions='reindex'"),
        (QWEN, "divprune", {"positions": "reindex"}, "not defined for"),
        (QWEN, "mmtok(keep=0.25)", {}, "text=True (--text)"),
        (LLAVA, "anchorprune(clip='a/b')", {"text": True}, "leave clip= out"),
    ],
)
def test_what_a_model_cannot_serve_is_refused(model: str, plan: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(NotImplementedError) as caught:
        twin(model, plan, **options)
    assert words in str(caught.value)


def test_signals_and_question_are_known_before_any_image() -> None:
    assert twin(LLAVA, "visionzip").signals == {"cls_attention", "keys", "encoder_features", "cls_feature"}
    assert twin(QWEN, "divprune").signals == set()
    assert twin(QWEN, "mmtok", text=True).reads_text and not twin(QWEN, "divprune", text=True).reads_text


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("structural", ["keep", "drop"])
def test_as_many_are_kept_as_transformers_keeps(model: str, structural: str) -> None:
    """The number before any encoder has run is that of `compress`, for pictures of several sizes."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    stock = AutoModelForImageTextToText.from_pretrained(model_path(model), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(model_path(model))
    plan = f"plan(divprune(keep=0.3), structural='{structural}')"
    served, config = twin(model, plan), stock.config
    token = next(getattr(config, name) for name in ("image_token_id", "image_token_index") if hasattr(config, name))
    mm.compress(stock, plan)
    for size in ((96, 96), (200, 90), (70, 160)):
        message = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the circle ?"}]}
        ]
        text = processor.apply_chat_template(message, add_generation_prompt=True)
        inputs = processor(text=[text], images=[Image.new("RGB", size, "red")], return_tensors="pt")
        with torch.no_grad():
            stock(**inputs)
        count = int((inputs["input_ids"] == token).sum())
        arguments = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes", "image_grid_thw")}
        if model == INTERN:
            arguments["image_num_patches"] = torch.tensor([len(inputs["pixel_values"])])
        kept = served.kept(arguments, count)
        assert kept == mm.trace(stock).tokens_per_layer()[0] - (inputs["input_ids"].shape[1] - count), size


def test_the_question_is_what_stands_behind_the_last_image() -> None:
    served = twin(QWEN, "mmtok", text=True)
    image, start, end = (
        getattr(served.adapter.config, f"{n}_token_id") for n in ("image", "vision_start", "vision_end")
    )
    assert served.question([7, start, image, end, 8, start, image, end, 9, 10]) == (9, 10)
    assert served.question([7, 8, start, image, end]) == (7, 8)
    assert served.question([start, image, end]) == ()


def test_what_vllm_hands_over_is_cut_picture_by_picture() -> None:
    grids = torch.tensor([[1, 2, 4], [1, 4, 4], [1, 2, 2]])
    given = {
        "pixel_values": torch.arange(28),
        "image_grid_thw": grids,
        "image_token_id": torch.tensor(7),
        "more": ["a", "b", "c"],
    }
    found = sliced(given, 1, 3, 3)
    assert (
        found["pixel_values"].tolist() == list(range(8, 28)) and found["image_grid_thw"].tolist() == grids[1:].tolist()
    )
    assert found["image_token_id"] == 7 and found["more"] == ["b", "c"]
    tiles = {"pixel_values": torch.arange(6), "image_num_patches": torch.tensor([3, 1, 2])}
    assert sliced(tiles, 0, 2, 3)["pixel_values"].tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------------- positions of several axes
IMAGE, VIDEO = 90, 91


@dataclass(frozen=True)
class Place:
    offset: int
    length: int


@dataclass(frozen=True)
class Feature:
    modality: str
    mm_position: Place
    data: Any


def prompt(parts: list[Any]) -> tuple[list[int], list[Feature]]:
    """Tokens and features of text (a number of tokens), images ((rows, columns), kept) and videos ((rows, columns),)."""
    tokens, features = [], []
    for part in parts:
        if isinstance(part, int):
            tokens += [1] * part
            continue
        (rows, columns), *kept = part
        count = kept[0] if kept else rows * columns
        grid = SimpleNamespace(data=torch.tensor([1, 2 * rows, 2 * columns]))
        features.append(Feature("image" if kept else "video", Place(len(tokens), count), {"image_grid_thw": grid}))
        tokens += [IMAGE if kept else VIDEO] * count
    return tokens, features


def in_full(tokens: list[int], features: list[Feature]) -> tuple[torch.Tensor, int]:
    """Positions as a model makes them of a prompt with all tokens."""
    columns, following, at = [], 0, 0
    for feature in features:
        while at < feature.mm_position.offset:
            columns.append([following] * 3)
            following, at = following + 1, at + 1
        _, h, w = (feature.data["image_grid_thw"].data // torch.tensor([1, 2, 2])).tolist()
        columns += [[following, following + y, following + x] for y in range(h) for x in range(w)]
        following, at = following + max(h, w), at + h * w
    columns += [[following + i] * 3 for i in range(len(tokens) - at)]
    positions = torch.tensor(columns).T
    return positions, int(positions.max()) + 1 - len(tokens)


def test_text_keeps_its_positions_and_what_is_kept_gets_its_own() -> None:
    parts = [3, ((4, 6), 5), 2, ((2, 3),), 2, ((300, 2), 4), 6]
    tokens, features = prompt(parts)
    everything, _ = in_full(
        *prompt([p if isinstance(p, int) or len(p) == 1 else (p[0], p[0][0] * p[0][1]) for p in parts])
    )
    kept = [torch.tensor([0, 7, 8, 20, 23]), torch.tensor([1, 2, 511, 599])]
    config = SimpleNamespace(
        vision_config=SimpleNamespace(spatial_merge_size=2), image_token_id=IMAGE, video_token_id=VIDEO
    )
    positions = Positions(SimpleNamespace(config=config))
    found, delta = positions.given(in_full, tokens, features)
    stays = torch.cat([torch.arange(3), 3 + kept[0], torch.arange(27, 37), 37 + kept[1], torch.arange(637, 643)])
    wanted = everything[:, stays]
    text = torch.tensor([token == 1 for token in tokens])
    assert torch.equal(found[:, text], wanted[:, text]) and delta == int(wanted[0, -1]) + 1 - len(tokens)
    assert not torch.equal(found, wanted)  # places of what is kept are not known yet

    def rows(index: int, dtype: torch.dtype) -> torch.Tensor:
        layout = Layout.raster(1, *((4, 6), (300, 2))[index])
        return marked(torch.zeros(len(kept[index]), 8, dtype=dtype), Kept(kept[index]), layout)

    for dtype in (torch.float32, torch.bfloat16):
        embeds = [rows(0, dtype), marked(torch.zeros(6, 8, dtype=dtype), None, None), rows(1, dtype)]
        stripped, repaired, again = positions.repaired(tokens, embeds, found, 0)
        assert torch.equal(repaired, wanted) and again == delta and [x.shape[1] for x in stripped] == [8, 8, 8]
        assert torch.equal(positions.repaired(tokens, embeds, repaired, 0)[1], wanted)  # once more, nothing changes
        # in chunks, cut inside an image
        here = positions.repaired(tokens, [embeds[0][:2]], found, 0)[1]
        here = positions.repaired(tokens, [embeds[0][2:], embeds[1]], here, 5)[1]
        assert torch.equal(positions.repaired(torch.tensor(tokens), embeds[2:], here, 18)[1], wanted)
    assert positions.repaired(tokens, [], wanted, 20)[1] is wanted
    assert marked(torch.zeros(24, 8), None, Layout.raster(1, 4, 6))[:, -AXES:].long()[-1].tolist() == [0, 3, 0, 5]


# ---------------------------------------------------------------------- what is remembered
def test_the_memo_forgets_the_longest_unused() -> None:
    one = Kept(torch.arange(4))
    memo = Memo(limit=3 * one.bytes)
    for i in range(3):
        memo.put((i, 0), one)
    assert memo.get((0, 0)) is one
    memo.put((3, 0), one)
    assert memo.get((1, 0)) is None and memo.get((0, 0)) is one and memo.used == 3 * one.bytes
    big = replace(one, rows=torch.zeros(100, 100))
    memo.put((4, 0), big)
    assert list(memo.entries) == [(4, 0)] and memo.used == big.bytes  # the last one stays, whatever it takes


# ---------------------------------------------------------------------- what a server may not ask
def server(**changes: Any) -> Any:
    parts: dict[str, dict[str, Any]] = {
        "mm": {"video_pruning_rate": None, "enable_mm_embeds": False, "mm_encoder_tp_mode": "weights"},
        "compilation_config": {"cudagraph_mm_encoder": False, "compile_mm_encoder": False},
        "parallel_config": {"pipeline_parallel_size": 1},
    }
    for name, value in changes.items():
        next(part for part in parts.values() if name in part)[name] = value
    mm_config = SimpleNamespace(**parts.pop("mm"))
    made = {name: SimpleNamespace(**values) for name, values in parts.items()}
    return SimpleNamespace(model_config=SimpleNamespace(multimodal_config=mm_config), lora_config=None, **made)


@pytest.mark.parametrize(
    ("changes", "plan", "words"),
    [
        ({"video_pruning_rate": 0.5}, "divprune", "video_pruning_rate=0.5"),
        ({"enable_mm_embeds": True}, "divprune", "enable_mm_embeds"),
        ({"cudagraph_mm_encoder": True}, "divprune", "cudagraph_mm_encoder"),
        ({"pipeline_parallel_size": 2}, "divprune", "tensor_parallel_size"),
        ({"mm_encoder_tp_mode": "data"}, "fastervlm", "reads received_attention"),
        ({"compile_mm_encoder": True}, "fastervlm", "compile_mm_encoder"),
    ],
)
def test_options_that_compression_cannot_go_with(changes: dict[str, Any], plan: str, words: str) -> None:
    served = twin(QWEN, plan)
    check_engine(server(), served, True)
    with pytest.raises(NotImplementedError) as caught:
        check_engine(server(**changes), served, True)
    assert words in str(caught.value)


def test_options_that_only_some_plans_cannot_go_with() -> None:
    check_engine(server(mm_encoder_tp_mode="data", compile_mm_encoder=True), twin(QWEN, "divprune"), True)
    check_engine(server(pipeline_parallel_size=2), twin(LLAVA, "fastervlm"), False)


def test_releases() -> None:
    for version in ("0.30.0", "0.32.0", "0.33.1", "0.32.0.dev1+cpu", "dev"):
        check_version(version)
    for version in ("0.29.1", "0.34.0", "1.0.0"):
        with pytest.raises(NotImplementedError, match=f"this is {version}"):
            check_version(version)


# ---------------------------------------------------------------------- commands
def test_overrides_are_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vllm-overrides", QWEN, "--plan", "scope(keep=0.25)"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "architectures": [PREFIX + "Qwen3VLForConditionalGeneration"],
        "mmcompress": {"plan": "scope(keep=0.25)", "text": False},
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["vllm-overrides", QWEN, "--plan", "fastv(keep=0.5)"], "inside the language model"),
        (["vllm-overrides", LLAVA, "--plan", "divprune(keep=0.25)", "--positions", "keep"], "positions='reindex'"),
        (["vllm-overrides", "./nowhere"], "no such folder"),
        (["serve", QWEN, "--plan", "divprune(keep=2.0)"], "keep=2.0"),
        (["serve", QWEN, "--hf-overrides", "{}"], "--hf-overrides is what serve makes"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmcompress.cli.serve.find_spec", lambda name: object())
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_server_gets_the_options_that_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr("mmcompress.cli.serve.find_spec", lambda name: object())
    monkeypatch.setattr("mmcompress.cli.serve.os.execv", lambda program, words: ran.append(words))
    assert main(["serve", QWEN, "--port", "8123", "--plan", "divprune(keep=0.1)", "--dtype=float32"]) == 0
    (words,) = ran
    assert words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"] and words[-3:] == [
        "--port",
        "8123",
        "--dtype=float32",
    ]
    assert json.loads(words[words.index("--hf-overrides") + 1])["mmcompress"]["plan"] == "divprune(keep=0.1)"


def test_serving_without_vllm_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmcompress.cli.serve.find_spec", lambda name: None)
    assert main(["serve", QWEN]) == 2
    assert "mmcompress[vllm]" in capsys.readouterr().err


def test_unknown_options_of_other_commands_stay_mistakes() -> None:
    with pytest.raises(SystemExit):
        main(["methods", "--port", "8123"])


def test_the_plugin_registers_names_and_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from mmcompress.adapters.vllm.plugin import register

    class Registry:
        known: dict[str, str] = {}  # noqa: RUF012

        @classmethod
        def get_supported_archs(cls) -> list[str]:
            return list(cls.known)

        @classmethod
        def register_model(cls, name: str, where: str) -> None:
            assert name not in cls.known
            cls.known[name] = where

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=Registry))
    before = set(sys.modules)
    register()
    register()  # once in each process, or more often
    assert set(sys.modules) == before
    assert Registry.known == {PREFIX + a: f"mmcompress.adapters.vllm.models:{PREFIX}{a}" for a in ARCHITECTURES}
