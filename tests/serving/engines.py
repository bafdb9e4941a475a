# SPDX-License-Identifier: Apache-2.0
"""Engines of vLLM in this process, and the same prompts answered by transformers."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import mmcompress as mm

TOKENS = 12
LEAST = 5e-4


class Request(NamedTuple):
    prompt: str
    images: tuple[Image.Image, ...] = ()
    video: Any = None

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = {"image": list(self.images)} if self.images else {}
        return found | ({"video": self.video} if self.video is not None else {})


@dataclass(frozen=True, eq=False)
class Answer:
    """How many tokens the prompt had, the tokens of the answer, and by how much each was better than the next best.

    Answers are equal if their tokens are, up to one that transformers itself chose by less than what rounding can turn: LEAST,
    where logits have a standard deviation of about 3. One token in some thousands is such a one.
    """

    length: int
    tokens: list[int]
    margins: tuple[float, ...] = ()

    @property
    def sure(self) -> int:
        return next((i for i, margin in enumerate(self.margins) if margin < LEAST), len(self.tokens))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Answer):
            return NotImplemented
        least = min(self.sure, other.sure)
        same = self.tokens[:least] == other.tokens[:least]
        return self.length == other.length and len(self.tokens) == len(other.tokens) and same

    __hash__ = None  # type: ignore[assignment]


def picture(seed: int, width: int = 96, height: int = 96) -> Image.Image:
    """Soft random colours."""
    base = np.random.RandomState(seed).randint(0, 255, (6, 9, 3)).astype("uint8")
    return Image.fromarray(base).resize((width, height), Image.Resampling.BICUBIC)


@contextlib.contextmanager
def engine(path: str, plan: Any = None, **options: Any) -> Iterator[Any]:
    """An engine in this process; with a plan, one that compresses."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    if plan is not None:
        options.setdefault("hf_overrides", plan if callable(plan) or isinstance(plan, dict) else mm.vllm(plan))
    settings: dict[str, Any] = {
        "model": path, "enforce_eager": True, "dtype": "float32", "max_model_len": 2048, "max_num_seqs": 8, "seed": 0,
        "distributed_executor_backend": "uni", "kv_cache_memory_bytes": 64 << 20, "limit_mm_per_prompt": {"image": 3, "video": 0},
    }  # fmt: skip
    if "llava" in path and "onevision" not in path:
        settings["limit_mm_per_prompt"] = {"image": 3}
    gc.freeze()  # vLLM collects garbage nine times in the life of an engine, each time in all modules of this process
    llm = LLM(**settings | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def served(llm: Any, requests: Sequence[Request], tokens: int = TOKENS) -> list[Answer]:
    """The answers of an engine, all requests at once."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompts = [{"prompt": r.prompt, **({"multi_modal_data": r.data} if r.data else {})} for r in requests]
    done = llm.generate(prompts, how, use_tqdm=False)
    return [Answer(len(one.prompt_token_ids), list(one.outputs[0].token_ids)) for one in done]


@functools.lru_cache(2)
def loaded(path: str) -> tuple[Any, Any]:
    """Model and processor of transformers."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model, AutoProcessor.from_pretrained(path)


@torch.no_grad()
def expected(
    path: str, requests: Sequence[Request], plan: Any = None, tokens: int = TOKENS, **options: Any
) -> list[Answer]:
    """The answers of transformers, compressed by the same plan, one request after the other."""
    model, processor = loaded(path)
    found = []
    with contextlib.ExitStack() as stack:
        if plan is not None:
            stack.enter_context(mm.compressed(model, plan, **options))
        for request in requests:
            inputs = processor(text=[request.prompt], images=list(request.images) or None, return_tensors="pt")
            length = inputs["input_ids"].shape[1]
            how: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            out = model.generate(**inputs, **how, max_new_tokens=tokens)
            if plan is not None and request.images:
                length = mm.trace(model).tokens_per_layer()[0]
            best = torch.cat([logits[:1].float().topk(2).values for logits in out.logits])
            margins = tuple((best[:, 0] - best[:, 1]).tolist())
            found.append(Answer(length, out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), margins))
    return found
