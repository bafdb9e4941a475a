# SPDX-License-Identifier: Apache-2.0
"""lmms-eval with plans: a model for that harness (`--model mmcompress`), and its tasks from our own command.

lmms-eval finds the model through the entry point `lmms_eval.models`. This file can be imported without it. Checked with 0.7.3.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmcompress as mm

from ..assets import MODELS, model_path
from ..plan import as_pipeline
from ..stage import Pipeline, Stage
from .evaluator import FORMAT, STOCK, weights_digest
from .journal import file_name, fingerprint
from .latency import machine, synchronize

_missing: ImportError | None = None
try:
    from lmms_eval.api.model import lmms as _Interface
except ImportError as error:
    _Interface, _missing = object, error

MODEL = "mmcompress"
"""The name of the model in lmms-eval."""
GENERATION = ("temperature", "top_p", "top_k", "num_beams", "repetition_penalty", "length_penalty", "min_new_tokens")
"""What a task may say about generation beside do_sample, max_new_tokens and until."""
_DECODERS = (("torchcodec", "torchcodec"), ("pyav", "av"), ("decord", "decord"), ("opencv", "cv2"))
_REASONING = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'


def manifests() -> list[Any]:
    """What the entry point gives to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id=MODEL, chat_class_path=f"{__name__}.{CompressedModel.__name__}")]


# ---------------------------------------------------------------------- plans as text between commas
def read_plan(plan: Any, plan_sha: str | None = None) -> Pipeline | None:
    """The pipeline of the argument `plan`; None for the stock model ("stock", "none", nothing).

    lmms-eval cuts model_args at commas outside of quotes and braces. So a plan with commas is written in quotes,
    plan="fastv(layer=2, keep=0.5)", or with semicolons for commas, plan=fastv(layer=2;keep=0.5), or as the JSON of
    Pipeline.to_dict(). The response cache knows a plan file by its name alone, so with a file its digest must be given, and a
    file that was changed since is refused.
    """
    text = _unquoted(plan) if isinstance(plan, str) else plan
    if text is None or text in ("", STOCK, "none"):
        return None
    if not isinstance(text, str):
        return as_pipeline(text)
    if text.startswith("{"):
        return as_pipeline(json.loads(text))
    if text.endswith(".json"):
        pipeline = as_pipeline(text)
        if plan_sha != plan_digest(pipeline):
            known = (
                "is known to the response cache of lmms-eval by its name alone"
                if plan_sha is None
                else f"is not {plan_sha}"
            )
            raise ValueError(
                f"plan file {text} {known}: if you mean {pipeline}, add plan_sha={plan_digest(pipeline)} to the model_args"
            )
        return pipeline
    if text.count("(") != text.count(")"):
        raise ValueError(
            f"the plan {text!r} was cut at a comma: in model_args write it in quotes, "
            'plan="fastv(layer=2, keep=0.5)", or with semicolons, plan=fastv(layer=2;keep=0.5)'
        )
    return as_pipeline(text.replace(";", ","))


def plan_digest(pipeline: Pipeline) -> str:
    """What names the content of a plan file. Not digits alone: lmms-eval would read a number."""
    return f"sha256:{hashlib.sha256(repr(pipeline).encode()).hexdigest()[:12]}"


def model_arguments(settings: Mapping[str, Any]) -> str:
    """`settings` as model_args of lmms-eval; those that are None are left out."""
    return ",".join(f"{name}={_quoted(value)}" for name, value in settings.items() if value is not None)


def _quoted(value: Any) -> str:
    text = str(value)
    if '"' in text or "\\" in text:
        raise ValueError(
            f"{text!r} cannot be written in the model_args of lmms-eval: it has a quotation mark or a backslash"
        )
    return f'"{text}"' if set(text) & set(",[]{}'= ") else text


def _unquoted(text: str) -> str:
    text = text.strip()
    inside = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1].replace(f"\\{text[0]}", text[0]).strip() if inside else text


# ---------------------------------------------------------------------- the model
class CompressedModel(_Interface):  # type: ignore[misc, valid-type]
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
        _require()
        super().__init__()
        if unknown:
            raise ValueError(
                f"model_args: {', '.join(unknown)} unknown. If that belongs to the plan, write the plan in quotes, "
                'plan="fastv(layer=2, keep=0.5)", or with semicolons for commas; if to generation, use --gen_kwargs'
            )
        pipeline = read_plan(plan, plan_sha)
        self.batch_size = _positive("batch_size", batch_size)
        self.max_new_tokens = _positive("max_new_tokens", max_new_tokens)
        self.frames, self.fps = _positive("frames", frames), fps
        self.system_prompt = self._resolve_system_prompt(_unquoted(system_prompt)) if system_prompt else ""
        from accelerate import Accelerator

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
                    f"device={device}, but accelerate launch uses {self.accelerator.device}: also give it --cpu"
                )
            self.device = self.accelerator.device
        self.model, self.processor = loaded or load(
            _unquoted(str(pretrained)), dtype, attn_implementation, revision, self.device, device_map
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
            for batch, prepared in _ahead(self._batches(requests), lambda batch: self._prepare(requests, batch)):
                for numbers, inputs, wanted in prepared:
                    with _named(requests, numbers):
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

    def _batches(self, requests: Sequence[Any]) -> list[list[int]]:
        """Numbers of requests with the same generation kwargs, the longest texts first."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            if not callable(request.args[1]):
                raise NotImplementedError(
                    "this is a request for models without chat format. lmms-eval makes them of a task file in --tasks: give "
                    "the name of the task there, and the folder of the file as --include_path"
                )
            groups.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(i)
        found = []
        for group in groups.values():
            group.sort(key=lambda i: (-len(requests[i].args[0]), i))
            found += [group[first : first + self.batch_size] for first in range(0, len(group), self.batch_size)]
        return found

    def _prepare(self, requests: Sequence[Any], batch: list[int]) -> list[tuple[list[int], Any, dict[str, Any]]]:
        """Inputs of a batch; text alone makes no mixed batch."""
        wanted = self._wanted(requests[batch[0]].args[2] or {})
        parts: dict[bool, list[tuple[int, str, list[Any], list[Any]]]] = {True: [], False: []}
        for i in batch:
            with _named(requests, [i]):
                _, doc_to_messages, _, document, task, split = requests[i].args
                text, images, videos = self._read(doc_to_messages(self.task_dict[task][split][document]))
                parts[bool(images or videos)].append((i, text, images, videos))
        found = []
        for part in filter(None, parts.values()):
            numbers = [i for i, *_ in part]
            with _named(requests, numbers):
                found.append((numbers, self._inputs(part), wanted))
        return found

    def _read(self, messages: list[Any]) -> tuple[str, list[Any], list[Any]]:
        """Prompt, pictures and videos of one request."""
        from lmms_eval.protocol import ChatMessages
        from transformers.image_utils import load_image

        chat = ChatMessages(messages=self._apply_system_prompt(list(messages), self.system_prompt))
        images: list[Any] = []
        videos: list[Any] = []
        turns: list[dict[str, Any]] = []
        for message in chat.messages:
            content: list[dict[str, str]] = []
            for part in message.content:
                if part.type == "text":
                    content.append({"type": "text", "text": part.text})
                    continue
                if part.type == "audio":
                    raise NotImplementedError("the request has audio: mmcompress compresses visual tokens only")
                content.append({"type": part.type})
                if part.type == "image":
                    images.append(load_image(part.url))
                else:
                    videos.append(read_video(part.url, self.frames, self.fps, part.start_time, part.end_time))
            turns.append({"role": message.role, "content": content})
        return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False), images, videos

    def _inputs(self, part: Sequence[tuple[int, str, list[Any], list[Any]]]) -> Any:
        images = [image for *_, shown, _ in part for image in shown]
        videos = [video for *_, shown in part for video in shown]
        more: dict[str, Any] = {"images": images} if images else {}
        if videos:
            if getattr(self.processor, "video_processor", None) is None:
                raise NotImplementedError(
                    f"{type(self.processor).__name__} takes no videos: choose another task or checkpoint"
                )
            more |= {"videos": [frames for frames, _ in videos], "do_sample_frames": False}
            if all(metadata is not None for _, metadata in videos):
                more["video_metadata"] = [metadata for _, metadata in videos]
        texts = [text for _, text, *_ in part]
        return self.processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **more)

    def _wanted(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` (and until) for the generation kwargs of a task."""
        from loguru import logger

        if (kwargs.get("num_return_sequences") or 1) > 1:
            raise NotImplementedError("num_return_sequences above 1: use --repeats of lmms-eval")
        temperature = kwargs.get("temperature")
        sample = temperature != 0 and bool(kwargs.get("do_sample", (temperature or 0) > 0))
        until = kwargs.get("until") or []
        found: dict[str, Any] = {
            "do_sample": sample, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None,
            "max_new_tokens": kwargs.get("max_new_tokens") or kwargs.get("max_gen_toks") or self.max_new_tokens,
            "until": [until] if isinstance(until, str) else list(until),
        }  # fmt: skip
        for name in GENERATION:
            if kwargs.get(name) is not None and (sample or name not in ("temperature", "top_p", "top_k")):
                found[name] = kwargs[name]
        if sample:
            found = {name: value for name, value in found.items() if value is not None}
        known = {*GENERATION, *found, "max_gen_toks", "num_return_sequences", "temperature", "top_p", "top_k"}
        for name in sorted(set(kwargs) - known - self._ignored):
            self._ignored.add(name)
            logger.warning(f"generation kwarg {name}={kwargs[name]!r} of the task means nothing to mmcompress, ignored")
        return found

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


def load(
    pretrained: str,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    revision: str | None = None,
    device: Any = None,
    device_map: str | None = None,
) -> tuple[Any, Any]:
    """Model and processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    place = str(model_path(pretrained)) if pretrained in MODELS else pretrained
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen: Any = torch.float32 if dtype == "auto" and device.type == "cpu" else dtype
    more = {"attn_implementation": attn_implementation, "revision": revision, "device_map": device_map}
    kept = {name: value for name, value in more.items() if value is not None}
    model = AutoModelForImageTextToText.from_pretrained(place, dtype=chosen, **kept).eval()
    processor = AutoProcessor.from_pretrained(place, **({"revision": revision} if revision else {}))
    return (model if device_map else model.to(device)), processor


def read_video(
    video: Any, frames: int, fps: float | None = None, start: float | None = None, end: float | None = None
) -> tuple[Any, Any]:
    """(frames, metadata) of a video file, at most `frames` of them, evenly spread from `start` to `end` in seconds; of frames
    that are there already: the same, without metadata."""
    if not isinstance(video, str):
        return video, None
    import importlib.util

    import numpy as np
    from transformers.video_utils import load_video

    usable = [backend for backend, module in _DECODERS if importlib.util.find_spec(module)]
    if not usable:
        raise ImportError(f"{video}: reading videos needs one of {', '.join(module for _, module in _DECODERS)}")

    def chosen(metadata: Any, **_: Any) -> Any:
        total, rate = metadata.total_num_frames, metadata.fps or 1.0
        first = min(total - 1, round((start or 0.0) * rate))
        last = total - 1 if end is None else max(first, min(total - 1, round(end * rate)))
        most = min(frames, last - first + 1)
        if fps is not None:
            most = min(most, max(1, round((last - first + 1) / rate * fps)))
        return np.linspace(first, last, most).round().astype(int)

    return load_video(video, backend=usable[0], sample_indices_fn=chosen)


class _named:
    """An exception says to which documents it belongs."""

    def __init__(self, requests: Sequence[Any], numbers: Sequence[int]) -> None:
        self.requests, self.numbers = requests, numbers

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            of = ", ".join(f"{self.requests[i].args[4]} {self.requests[i].args[3]}" for i in self.numbers)
            raise RuntimeError(f"no answer to document(s) {of}: {type(error).__name__}: {error}") from error


def _ahead(batches: Sequence[list[int]], prepare: Callable[[list[int]], Any]) -> Iterator[tuple[list[int], Any]]:
    """Each batch and what `prepare` makes of it, the next one in a thread while the model is busy with this one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(prepare, batch) for batch in batches[:1]]
        for number, batch in enumerate(batches):
            ready = waiting.pop().result()
            waiting += [pool.submit(prepare, following) for following in batches[number + 1 : number + 2]]
            yield batch, ready


def _positive(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or number != float(value):
        raise ValueError(f"{name}={value!r}: a whole number from 1 on")
    return number


def _require() -> None:
    if _missing is not None:
        raise ImportError(f"the bridge needs lmms-eval: pip install 'mmcompress[lmms]' ({_missing})") from _missing


# ---------------------------------------------------------------------- from our own command
def run_lmms(
    model: str,
    plans: Sequence[str | Stage | Pipeline],
    tasks: Sequence[str],
    out: Path | str,
    *,
    include: Path | str | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    device: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    max_new_tokens: int = 1024,
    frames: int = 8,
    generation: str | None = None,
    cache: Path | str | None = None,
    show: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Run tasks of lmms-eval with each plan ("stock": none) on a checkpoint; returns one record per plan, in their order.

    tasks: names that lmms-eval knows (groups too), NAME=FOLDER for a task whose data lie in FOLDER in the hub's format, or
    .yaml files of tasks. include: a folder with more of them. generation: as --gen_kwargs. cache: a folder for the response
    cache of lmms-eval.

    OUT gets lmms_PLAN_fingerprint.json for each plan with all that lmms-eval reports, and for each task a record that
    `mmcompress compare` reads (for the tasks that it knows). A plan whose record is there, of the same settings and weights, is
    not run again. In `accelerate launch` the first process writes and returns the records, the others return none. Raises
    what the harness raises; an answer that could not be made is never taken for an empty one.
    """
    _require()
    from lmms_eval.evaluator import simple_evaluate

    pipelines = [
        read_plan(plan) if isinstance(plan, str) and not plan.endswith(".json") else as_pipeline(plan) for plan in plans
    ]
    if not pipelines or not tasks:
        raise ValueError("nothing to evaluate: give at least one plan ('stock' for none) and one task")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: at least 1")
    manager = _manager(tasks, include)
    for task in tasks:
        _task(manager, task)  # what is not there fails before the model is loaded
    from accelerate import Accelerator

    where = device if Accelerator().num_processes == 1 else Accelerator().device
    loaded = load(model, dtype, attn_implementation, None, where)
    common = {
        "pretrained": model, "batch_size": batch_size, "dtype": str(loaded[0].dtype).removeprefix("torch."),
        "attn_implementation": getattr(loaded[0].config, "_attn_implementation", None), "max_new_tokens": max_new_tokens,
        "frames": frames,
    }  # fmt: skip
    settings = {
        **common, "harness": f"lmms-eval {version('lmms-eval')}", "weights": weights_digest(loaded[0]),
        "tasks": [_task_key(task) for task in tasks], "limit": limit, "generation": generation,
    }  # fmt: skip
    folder, todo = Path(out), []
    for pipeline in pipelines:
        named = {**settings, "task": "lmms", "protocol": "run", "plan": STOCK if pipeline is None else repr(pipeline)}
        path = folder / f"{file_name(named)}.json"
        todo.append((named, path, path.exists()))
    records = []
    for named, path, done in todo:
        if done:
            records.append(json.loads(path.read_text(encoding="utf-8")))
            continue
        if show:
            show(f"{named['plan']}: {', '.join(tasks)}")
        arguments = model_arguments({**common, "plan": named["plan"]})
        subject = CompressedModel.create_from_arg_string(arguments, {"loaded": loaded})
        try:
            results = simple_evaluate(
                model=subject, model_args=arguments, tasks=[_task(manager, task) for task in tasks],
                limit=limit, batch_size=batch_size, gen_kwargs=generation, task_manager=manager, verbosity="WARNING",
                use_cache=str(cache) if cache else None, log_samples=True,
                cli_args=argparse.Namespace(
                    model=MODEL, model_args=arguments, tasks=",".join(tasks), output_path=str(folder), batch_size=batch_size,
                    limit=limit, gen_kwargs=generation or "", log_samples=True, log_samples_suffix=MODEL, predict_only=False,
                    process_with_media=False, reasoning_tags=_REASONING, agentic_trace_mode="basic", timezone="UTC",
                ),
            )  # fmt: skip
        finally:
            mm.uncompress(loaded[0])
        if results is not None:
            records.append(_save(results, named, path))
    return records


def _manager(tasks: Sequence[str], include: Path | str | None) -> Any:
    """The tasks that lmms-eval knows, with those of our folders. (A task file that it is given itself it takes for one of
    models without chat format, and loses its name.)"""
    from lmms_eval.tasks import TaskManager

    files = [Path(task.partition("=")[0]) for task in tasks if _is_file(task)]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ValueError(f"no task file {missing[0]!r} here")
    folders = [*([include] if include else []), *(file.parent for file in files)]
    return TaskManager("WARNING", include_path=list(dict.fromkeys(map(str, folders))), model_name=MODEL)


def _is_file(task: str) -> bool:
    return task.partition("=")[0].endswith((".yaml", ".yml"))


def _task(manager: Any, task: str) -> Any:
    """What lmms-eval takes for one of our tasks: its name, or the task made with other data."""
    from lmms_eval.utils import load_yaml_config

    name, _, data = task.partition("=")
    if _is_file(task):
        name = load_yaml_config(name, mode="simple").get("task")
    if name not in manager.all_tasks:
        raise ValueError(f"lmms-eval has no task {name!r}: `lmms-eval tasks list` shows them; include= adds a folder")
    if not data:
        return name
    if not Path(data).is_dir():
        raise ValueError(f"task {name}: no folder {data!r} here")
    if name not in manager.all_subtasks:
        raise ValueError(f"{name} is a group of tasks: say which of them has its data in {data}")
    (made,) = manager.load_task_or_group([{"task": name, "dataset_path": str(Path(data).resolve())}], "chat").values()
    return made


def _task_key(task: str) -> str:
    """The name of a task, of a file with its content."""
    file = Path(task.partition("=")[0])
    return f"{task} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}" if _is_file(task) else task


def _save(results: dict[str, Any], settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write what a run gave, the record of each task first: when the record of the plan is there, everything is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = results.pop("samples", {})
    parts = {}
    for task, answers in samples.items():
        record = _task_record(task, answers, results, settings)
        part = path.with_name(f"{file_name(record['settings'])}.json")
        _write(record, part)
        parts[task] = part.name
    text = json.dumps(results, default=str)
    record = {
        "mmcompress": "lmms", "fingerprint": fingerprint(settings), "settings": settings, "plan": settings["plan"],
        "scores": {task: _numbers(scores) for task, scores in results["results"].items()},
        "answered": sum(map(len, samples.values())), "records": parts, "machine": machine(), "lmms_eval": json.loads(text),
        "empty": {task: sum(not _reply(answer).strip() for answer in answers) for task, answers in samples.items()},
    }  # fmt: skip
    _write(record, path)
    return record


def _task_record(
    task: str, answers: Sequence[dict[str, Any]], results: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """The answers to one task in the form of `mmcompress eval`, judged by lmms-eval."""
    listed = results["configs"][task].get("metric_list") or []
    headline = listed[0]["metric"] if listed else "score"
    rows = [
        {
            "id": str(answer["doc_id"]), "kind": "", "cluster": str(answer["doc_id"]), "answers": [str(answer["target"])],
            "reply": _reply(answer), "parsed": _reply(answer).strip(), "value": _value(answer.get(headline)), "chance": 0.0,
        }
        for answer in sorted(answers, key=lambda answer: answer["doc_id"])
    ]  # fmt: skip
    data = hashlib.sha256("".join(sorted(answer["doc_hash"] for answer in answers)).encode()).hexdigest()[:12]
    kept = {name: value for name, value in settings.items() if name not in ("task", "protocol", "tasks", "pretrained")}
    named = {"task": task, "protocol": "lmms", **kept, "model": Path(settings["pretrained"]).name}
    named |= {"questions": len(rows), "data": data}
    return {
        "mmcompress": "results", "format": FORMAT, "fingerprint": fingerprint(named), "settings": named,
        "checkpoint": settings["pretrained"], "machine": machine(), "headline": headline,
        "scores": _numbers(results["results"].get(task, {})), "chance": 0.0, "by_kind": {}, "answered": len(rows),
        "without_gold_answer": sum(row["value"] is None for row in rows), "failed": {}, "visual_tokens": {},
        "empty": sum(not row["reply"].strip() for row in rows), "cut": 0, "rows": rows,
    }  # fmt: skip


def _reply(answer: Mapping[str, Any]) -> str:
    reply: Any = answer["filtered_resps"]
    while isinstance(reply, (list, tuple)):
        reply = reply[0] if reply else ""
    return str(reply)


def _value(found: Any) -> float | None:
    """What a metric gave to one answer: a number, or the score in what its aggregation gets."""
    if isinstance(found, Mapping):
        found = found.get("score")
    return float(found) if isinstance(found, (bool, int, float)) else None


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """The metrics without the name of their filter and their standard errors."""
    return {
        name.partition(",")[0]: float(value)
        for name, value in scores.items()
        if isinstance(value, (int, float)) and "_stderr" not in name and "," in name
    }


def _write(record: Mapping[str, Any], path: Path) -> None:
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)
