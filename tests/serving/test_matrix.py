# SPDX-License-Identifier: Apache-2.0
"""Everything that vLLM does with a request, and the same answers: caches, chunks, preemption, mixed requests, half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import IMAGE, checkpoint
from engines import Request, engine, expected, loaded, picture, served

import mmcompress as mm

PLAN = "divprune(keep=0.25)"
FAMILIES = ("qwen2.5-vl", "llava")
QUESTIONS = (
    "what color is the circle ? ASSISTANT:",
    "how many shapes are there ? ASSISTANT:",
    "where is the ring ? ASSISTANT:",
)
LONG = " and the red circle above the blue square and the green star below the white ring" * 3


def asked(name: str, pairs: list[tuple[int, int]], long: bool = False) -> list[Request]:
    """Requests by (picture, question)."""
    image, words = IMAGE[name], LONG if long else ""
    return [Request(f"USER: {image} {words} {QUESTIONS[q]}", (picture(i, 150, 130),)) for i, q in pairs]


def one_by_one(llm: Any, requests: list[Request]) -> list[Any]:
    return [served(llm, [request])[0] for request in requests]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"enable_prefix_caching": True},
        {"enable_prefix_caching": True, "mm_processor_cache_gb": 0},
        {"enable_prefix_caching": True, "max_num_batched_tokens": 24, "max_num_seqs": 4},
        {"enable_prefix_caching": False, "max_num_batched_tokens": 24, "max_num_seqs": 4},
    ],
)
def test_caches_and_chunks(name: str, options: dict[str, Any], folder: Path) -> None:
    path = checkpoint(name, folder)
    pairs = [(0, 0), (0, 1), (1, 0), (1, 2), (0, 0), (0, 2)]
    short, long = asked(name, pairs), asked(name, pairs[:3], long=True)
    wanted = expected(path, short, PLAN)
    assert wanted != expected(path, short, "uniform(keep=0.25)")
    with engine(path, PLAN, block_size=32, **options) as llm:
        assert one_by_one(llm, short) == wanted  # where caches are on, later ones begin inside an image
        assert served(llm, [*short, *short[::-1]]) == [*wanted, *wanted[::-1]]
        assert one_by_one(llm, long) == expected(path, long, PLAN)  # whole images are in the cache


@pytest.mark.parametrize("name", FAMILIES)
def test_preemption(name: str, folder: Path) -> None:
    path, requests = checkpoint(name, folder), asked(name, [(0, 0), (1, 1), (2, 2)])
    blocks = 6 if name != "llava" else 8
    small = {"num_gpu_blocks_override": blocks, "max_model_len": blocks * 32 - 64, "max_num_batched_tokens": 1024}
    with engine(path, PLAN, block_size=32, enable_prefix_caching=False, disable_log_stats=False, **small) as llm:
        found = served(llm, requests, tokens=60)
        preempted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    assert preempted > 0
    assert found == expected(path, requests, PLAN, tokens=60)


@pytest.mark.parametrize("name", FAMILIES)
def test_text_beside_images(name: str, folder: Path) -> None:
    path, (image,) = checkpoint(name, folder), asked(name, [(0, 0)])
    texts = [Request(f"USER: {words}") for words in QUESTIONS[:2]]
    with engine(path, PLAN) as llm:
        assert served(llm, [texts[0], image, texts[1]]) == expected(path, [texts[0], image, texts[1]], PLAN)


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
def test_videos_stay_as_they_are(name: str, folder: Path) -> None:
    path, image, video = checkpoint(name, folder), IMAGE[name], "<|vision_start|><|video_pad|><|vision_end|>"
    frames = np.stack([np.array(picture(i, 64, 48)) for i in range(8)])
    about = {
        "fps": 2.0, "duration": 4.0, "total_num_frames": 8, "frames_indices": list(range(8)), "video_backend": "opencv",
        "do_sample_frames": False,
    }  # fmt: skip
    requests = [
        Request(f"USER: {video} {QUESTIONS[0]}", (), (frames, about)),
        Request(f"USER: {image} and {video} {QUESTIONS[0]}", (picture(3, 150, 90),), (frames, about)),
        Request(
            f"USER: {video} and {image} and {image} {QUESTIONS[1]}", (picture(3, 150, 90), picture(4)), (frames, about)
        ),
    ]
    both: dict[str, Any] = {"limit_mm_per_prompt": {"image": 2, "video": 1}}
    with engine(path, **both) as llm:
        stock = served(llm, requests)
    with engine(path, "divprune(keep=1.0)", **both) as llm:
        assert served(llm, requests) == stock
    with engine(path, PLAN, **both) as llm:
        whole = served(llm, requests)
    assert whole[0] == stock[0] and all(a.length < b.length for a, b in zip(whole[1:], stock[1:], strict=True))
    small = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "enable_prefix_caching": False}
    with engine(path, PLAN, **both, **small) as llm:
        assert served(llm, requests) == whole


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_with_all_tokens(name: str, folder: Path) -> None:
    path, requests = checkpoint(name, folder), asked(name, [(0, 0), (1, 1)])
    with engine(path, dtype="bfloat16") as llm:
        stock = served(llm, requests)
    with engine(path, "divprune(keep=1.0)", dtype="bfloat16") as llm:
        assert served(llm, requests) == stock


def test_places_matter(folder: Path) -> None:
    """The control of all tests on several axes: tokens numbered one after the other give other answers."""
    name = "qwen2.5-vl"
    path, requests = checkpoint(name, folder), asked(name, [(0, 0), (1, 1)])
    wanted = expected(path, requests, PLAN)
    with engine(path, PLAN) as llm:
        model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.get_model()
        model.recompute_mrope_positions = (
            lambda input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens: (
                [x[:, :-4] for x in multimodal_embeddings],
                mrope_positions,
                int(mrope_positions[:, -1].max()) + 1 - mrope_positions.shape[1],
            )
        )
        assert served(llm, requests) != wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_a_picture_that_is_encoded_again_keeps_its_tokens(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmcompress.adapters.vllm.models import Compressor

    decided: list[int] = []
    original = Compressor._chosen
    monkeypatch.setattr(
        Compressor, "_chosen", lambda self, x, *rest: (decided.append(len(x)), original(self, x, *rest))[1]
    )
    path, requests = checkpoint(name, folder), asked(name, [(0, 0), (0, 1), (1, 0)])
    for plan in (PLAN, "visionzip(keep=0.25)"):
        with engine(path, plan, enable_prefix_caching=False) as llm:
            decided.clear()
            wanted = expected(path, requests, plan)
            for _ in range(2):
                assert one_by_one(llm, requests) == wanted
                llm.reset_mm_cache()
                llm.llm_engine.reset_encoder_cache()
            assert len(decided) == 2, plan  # two pictures


def test_the_plan_is_part_of_every_key(folder: Path) -> None:
    """Also where a client names its images by itself."""
    name = "llava"
    path, (request,) = checkpoint(name, folder), asked(name, [(0, 0)])
    keys = []
    for plan in (PLAN, "divprune(keep=0.5)"):
        with engine(path, plan) as llm:
            processor = llm.llm_engine.input_processor.renderer.get_mm_processor()
            ids = loaded(path)[1].tokenizer(request.prompt)["input_ids"]
            items = processor.info.parse_mm_data({"image": list(request.images)})
            for named in (None, {"image": ["mine"]}):
                keys += processor(ids, items, named)["mm_hashes"]["image"]
    assert len(set(keys)) == 4


def test_the_encoder_gets_as_many_as_it_can_take(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler counts what is kept: 24 pictures of 16 tokens fit, and 24 times 144 do not."""
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    seen: list[int] = []
    original = LlavaForConditionalGeneration._process_image_pixels

    def watched(self: Any, inputs: Any) -> Any:
        seen.append(len(inputs["pixel_values"]))
        return original(self, inputs)

    path, requests = checkpoint("llava", folder), asked("llava", [(i, 0) for i in range(24)])
    with engine(path, "divprune(keep=16)", max_num_seqs=32, max_num_batched_tokens=1024) as llm:
        monkeypatch.setattr(LlavaForConditionalGeneration, "_process_image_pixels", watched)
        served(llm, requests, tokens=2)
    assert sum(seen) == 24 and max(seen) == 1024 // 144


@pytest.mark.parametrize("name", [*FAMILIES, "internvl"])
def test_stages_that_read_the_question(name: str, folder: Path) -> None:
    path, plan = checkpoint(name, folder), "mmtok(keep=0.25)"
    requests = asked(name, [(0, 0), (0, 1), (0, 0), (1, 1)])
    wanted = expected(path, requests, plan)
    with engine(path, mm.vllm(plan, text=True), block_size=32) as llm:
        assert one_by_one(llm, requests) == wanted
        llm.reset_prefix_cache()
        assert served(llm, requests) == wanted


def test_a_request_that_cannot_be_served_gets_an_error_and_the_engine_lives(folder: Path) -> None:
    path, (good,) = checkpoint("qwen2.5-vl", folder), asked("qwen2.5-vl", [(0, 0)])
    plan = "divprune(keep=60)"  # more tokens than a small picture has
    with engine(path, plan) as llm:
        with pytest.raises(Exception, match="keep=60, but only 4 visual tokens"):
            served(llm, [good._replace(images=(picture(1, 32, 32),))])
        with pytest.raises(Exception, match="prompt ends with an image"):
            served(llm, [good._replace(prompt="USER: <|vision_start|><|image_pad|>")])
        assert served(llm, [good]) == expected(path, [good], plan)


@pytest.mark.parametrize(
    ("name", "plan", "words"),
    [
        ("llava", {"plan": "prumerge(keep=0.25)"}, "block 6 of the vision encoder, and vLLM builds the first 5"),
        ("llava", {"plan": "divprun(keep=0.25)"}, "did you mean 'divprune'"),
        ("qwen2.5-vl", {"plan": "mmtok(keep=0.25)"}, "allow it by text=True"),
        ("qwen2.5-vl", None, "without settings"),
    ],
)
def test_what_cannot_be_served_does_not_start(name: str, plan: Any, words: str, folder: Path, capfd: Any) -> None:
    path = checkpoint(name, folder)
    overrides: dict[str, Any] = {
        "architectures": mm.vllm(PLAN)(loaded(path)[0].config.__class__.from_pretrained(path)).architectures
    }
    if plan is not None:
        overrides["mmcompress"] = plan
    with pytest.raises(Exception) as caught, engine(path, overrides):
        pass
    assert words in str(caught.value) + str(caught.value.__cause__) + capfd.readouterr().err
