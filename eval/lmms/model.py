# SPDX-License-Identifier: Apache-2.0
"""The model that lmms-eval runs: any supported checkpoint with a plan."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import mmcompress as mm

from ..evaluator import STOCK
from ..machine import synchronize
from ..team import Team
from .base import MODEL, load, positive, require
from .plans import read_plan, unquoted
from .requests import Reader, ahead, named


class CompressedModel(Reader):
    """Any supported checkpoint with a plan, as a chat model of lmms-eval: `lmms-eval --model mmcompress --model_args ...`.

    pretrained   folder or hub name, or an embedded model.
    plan         see `read_plan`; without it the stock model. plan_sha belongs to a plan file.
    batch_size   also as --batch_size; only what stands in model_args is known to the response cache. Padding changes the last
                 bits of logits: 1 gives the numbers to publish.
    dtype, attn_implementation, revision, device_map: as in `from_pretrained`; dtype "auto" is float32 on a CPU.
    max_new_tokens  where the task does not say. Greedy, unless the task has a temperature above 0 or do_sample; `until` cuts.
    frames, fps  of a video at most so many frames, and at most so many per second, evenly spread.
    system_prompt   a text or the name of a text file.
    loaded       (model, processor) that are there already, from Python.

    Every exception ends the run and names the task and the documents: there are no silently empty answers. Answers that the
    model itself leaves empty, and answers cut at max_new_tokens, are counted. In `accelerate launch` each process answers
    its part on its own device.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        plan: Any = None,
        plan_sha: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        device_map: str | None = None,
        max_new_tokens: int = 1024,
        frames: int = 8,
        fps: float | None = None,
        system_prompt: str | None = None,
        max_batch_size: int | None = None,
        loaded: tuple[Any, Any] | None = None,
        **unknown: Any,
    ) -> None:
        require()
        super().__init__()
        if unknown:
            raise ValueError(
                f"model_args: {', '.join(unknown)} unknown. If that belongs to the plan, write the plan in quotes, "
                'plan="fastv(layer=2, keep=0.5)", or with semicolons for commas; if to generation, use --gen_kwargs'
            )
        pipeline = read_plan(plan, plan_sha)
        self.batch_size = positive("batch_size", batch_size)
        self.max_new_tokens = positive("max_new_tokens", max_new_tokens)
        self.frames, self.fps = positive("frames", frames), fps
        self.system_prompt = self._resolve_system_prompt(unquoted(system_prompt)) if system_prompt else ""
        from accelerate import Accelerator

        Team.here()  # raises if accelerate does not know what was launched
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device or self.accelerator.device)
        if self._world_size > 1 and device_map:
            raise ValueError(
                "device_map spreads one model over devices, accelerate launch gives each its own: choose one"
            )
        if self._world_size > 1:
            if self.device.type != self.accelerator.device.type:
                raise ValueError(
                    f"device={device}, but accelerate launch uses {self.accelerator.device}: also set ACCELERATE_USE_CPU=true"
                )
            self.device = self.accelerator.device
        self.model, self.processor = loaded or load(
            unquoted(str(pretrained)), dtype, attn_implementation, revision, self.device, device_map
        )
        self.device = self.model.device
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(
                f"{pretrained}: the checkpoint has no chat template, so there is no way to know its prompt format"
            )
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        self.plan = STOCK
        if pipeline is not None:
            mm.compress(self.model, pipeline)
            self.plan = repr(pipeline)
        self.counts = dict.fromkeys(("answers", "empty", "cut", "new_tokens", "rows", "visual", "visual_in_llm"), 0.0)
        self.seconds = 0.0
        self._ignored: set[str] = set()

    def __str__(self) -> str:
        return MODEL  # what the response cache takes for the name of a model that it is given as an object

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> CompressedModel:
        """From model_args; what stands there goes before --batch_size and --device."""
        from lmms_eval.utils import simple_parse_args_string

        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        try:
            written = simple_parse_args_string(arg_string)
        except ValueError as error:
            raise ValueError(
                f"cannot read the model_args {arg_string!r}: name=value between commas, a plan with commas in quotes"
            ) from error
        return cls(**{**given, **written})

    # ------------------------------------------------------------------ requests
    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers in the order of the requests, each (context, doc_to_messages, generation kwargs, document, task, split)."""
        from lmms_eval.api.instance import GenerationResult, TokenCounts
        from lmms_eval.models.model_utils.gen_metrics import log_metrics
        from loguru import logger
        from tqdm import tqdm

        found: list[Any] = [None] * len(requests)
        before = dict(self.counts), self.seconds
        with tqdm(total=len(requests), desc=self.plan, disable=self.rank != 0) as bar:
            for batch, prepared in ahead(self._batches(requests), lambda batch: self._prepare(requests, batch)):
                for numbers, inputs, wanted in prepared:
                    with named(requests, numbers):
                        answers = self._answer(inputs, wanted)
                    for i, (text, read, made) in zip(numbers, answers, strict=True):
                        found[i] = GenerationResult(text, TokenCounts(input_tokens=read, output_tokens=made))
                        if not requests[i].metadata.get("__padding_only__"):
                            self.counts["answers"] += 1
                            self.counts["empty"] += not text.strip()
                            self.counts["cut"] += made >= wanted["max_new_tokens"]
                bar.update(len(batch))
        here = {name: value - before[0][name] for name, value in self.counts.items()}
        seconds, rows = self.seconds - before[1], here["rows"] or 1
        for name, what in (("empty", "are empty"), ("cut", "end at max_new_tokens")):
            if here[name]:
                logger.warning(f"{self.plan}: {here[name]:.0f} of {here['answers']:.0f} answers {what}")
        more = {
            "rank": self.rank, "answers": here["answers"], "empty_answers": here["empty"], "cut_answers": here["cut"],
            "visual_tokens_of_prompt": here["visual"] / rows, "visual_tokens_in_llm": here["visual_in_llm"] / rows,
        }  # fmt: skip
        log_metrics(seconds, int(here["new_tokens"]), here["new_tokens"] / seconds if seconds else 0.0, more)
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        raise NotImplementedError(
            "mmcompress answers tasks with output_type generate_until; lmms-eval asks chat models for nothing else. "
            "Of a task of the type loglikelihood or multiple_choice take the variant that generates"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        raise NotImplementedError(
            "mmcompress answers tasks with output_type generate_until, not generate_until_multi_round"
        )

    def _answer(self, inputs: Any, wanted: dict[str, Any]) -> list[tuple[str, int, int]]:
        """(text, tokens of the prompt, new tokens) of each row."""
        arguments = {name: value for name, value in wanted.items() if name != "until"}
        inputs = inputs.to(self.device, self.model.dtype)
        ids, config = inputs["input_ids"], self.model.generation_config
        synchronize()
        start = time.perf_counter()
        new = self.model.generate(**inputs, **arguments, pad_token_id=self.processor.tokenizer.pad_token_id)[
            :, ids.shape[1] :
        ]
        synchronize()
        self.seconds += time.perf_counter() - start
        ends = torch.tensor(
            [] if config.eos_token_id is None else config.eos_token_id, device=new.device, dtype=new.dtype
        )
        ended = torch.isin(new, ends)
        made = torch.where(ended.any(1), ended.long().argmax(1) + 1, new.shape[1]).tolist()
        self.counts["new_tokens"] += sum(made)
        self._count_visual(ids)
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        for stop in filter(None, wanted["until"]):
            texts = [text.split(stop)[0] for text in texts]
        return list(zip(texts, inputs["attention_mask"].sum(1).tolist(), made, strict=True))

    def _count_visual(self, ids: Tensor) -> None:
        names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        tokens = {getattr(self.model.config, name, None) for name in names} - {None}
        full = int(sum((ids == token).sum() for token in tokens))
        if not full:
            return
        inside = float(full)
        if self.plan != STOCK:
            last = mm.trace(self.model)  # raises if nothing was compressed
            layers = [last.tokens_per_layer(row) for row in range(last.call.batch)]
            inside += sum(sum(row) / len(row) - n for row, n in zip(layers, last.call.counts, strict=True)) * (
                len(ids) / last.call.batch
            )
        self.counts["rows"] += len(ids)
        self.counts["visual"] += full
        self.counts["visual_in_llm"] += inside
