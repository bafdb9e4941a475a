# SPDX-License-Identifier: Apache-2.0
"""What the requests of lmms-eval ask for, as inputs and arguments of `generate`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...pictures import open_picture
from ...videos import Clip, read_video, video_arguments
from .base import Interface

GENERATION = ("temperature", "top_p", "top_k", "num_beams", "repetition_penalty", "length_penalty", "min_new_tokens")
"""What a task may say about generation beside do_sample, max_new_tokens and until."""


class Reader(Interface):  # type: ignore[misc, valid-type]
    """Makes batches of requests and the inputs of a batch, for a model with processor and settings."""

    processor: Any
    batch_size: int
    max_new_tokens: int
    frames: int
    fps: float | None
    system_prompt: str
    _ignored: set[str]

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
            with named(requests, [i]):
                _, doc_to_messages, _, document, task, split = requests[i].args
                text, images, videos = self._read(doc_to_messages(self.task_dict[task][split][document]))
                parts[bool(images or videos)].append((i, text, images, videos))
        found = []
        for part in filter(None, parts.values()):
            numbers = [i for i, *_ in part]
            with named(requests, numbers):
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
                    fetched = isinstance(part.url, str) and part.url.startswith(("http://", "https://"))
                    images.append(open_picture(load_image(part.url) if fetched else part.url))
                else:
                    videos.append(self._clip(part))
            turns.append({"role": message.role, "content": content})
        return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False), images, videos

    def _clip(self, part: Any) -> Clip:
        """The frames of a video: of a file at most so many as the settings say, all of those that are there already."""
        if not isinstance(part.url, str):
            return read_video(part.url)
        return read_video(part.url, fps=self.fps, most=self.frames, start=part.start_time, end=part.end_time)

    def _inputs(self, part: Sequence[tuple[int, str, list[Any], list[Any]]]) -> Any:
        images = [image for *_, shown, _ in part for image in shown]
        videos = [video for *_, shown in part for video in shown]
        more: dict[str, Any] = {"images": images} if images else {}
        more |= video_arguments(self.processor, videos)
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


class named:
    """An exception says to which documents it belongs."""

    def __init__(self, requests: Sequence[Any], numbers: Sequence[int]) -> None:
        self.requests, self.numbers = requests, numbers

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            of = ", ".join(f"{self.requests[i].args[4]} {self.requests[i].args[3]}" for i in self.numbers)
            raise RuntimeError(f"no answer to document(s) {of}: {type(error).__name__}: {error}") from error


def ahead(batches: Sequence[list[int]], prepare: Callable[[list[int]], Any]) -> Iterator[tuple[list[int], Any]]:
    """Each batch and what `prepare` makes of it, the next one in a thread while the model is busy with this one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(prepare, batch) for batch in batches[:1]]
        for number, batch in enumerate(batches):
            ready = waiting.pop().result()
            waiting += [pool.submit(prepare, following) for following in batches[number + 1 : number + 2]]
            yield batch, ready
