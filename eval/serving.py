# SPDX-License-Identifier: Apache-2.0
"""Servers of vLLM on loopback, stock and compressed, asked the same questions over OpenAI's API."""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ..adapters.vllm import vllm
from ..adapters.vllm.twin import overrides
from ..api import compressed
from ..assets import checkpoint, split
from .cost.latency import count_flops
from .synthetic.benchmark import Item, encode, same
from .synthetic.benchmark import load as loaded
from .widen import widen

STOCK = "stock"
HOST, NAME = "127.0.0.1", "served"
TOWERS = ("clip_vision_model", "siglip_vision_model")
TOWER, INSIDE = "vision_tower.", "vision_model."


@dataclass(frozen=True)
class Reply:
    """One answer: text, right or not, tokens of the prompt, seconds to the first token and to the last."""

    text: str
    right: bool
    prompt_tokens: int
    first: float
    last: float


@dataclass(frozen=True)
class Row:
    """What a server did at one concurrency: requests per second, times to the first token (seconds), mean tokens of a prompt, part
    of the answers that are right; flops of the whole prefill of one request, vision included, as torch counts them."""

    plan: str
    concurrency: int
    requests: int
    rate: float
    ttft_p50: float
    ttft_p95: float
    prompt_tokens: float
    accuracy: float
    flops: int

    @staticmethod
    def of(plan: str, concurrency: int, replies: Sequence[Reply], seconds: float, flops: int) -> Row:
        firsts, many = sorted(reply.first for reply in replies), len(replies)
        return Row(
            plan, concurrency, many, many / seconds, _rank(firsts, 0.5), _rank(firsts, 0.95),
            sum(reply.prompt_tokens for reply in replies) / many, sum(reply.right for reply in replies) / many, flops,
        )  # fmt: skip


def _rank(values: Sequence[float], part: float) -> float:
    """The smallest value that is not below `part` of them."""
    return values[math.ceil(part * len(values)) - 1]


@contextmanager
def servable(model: str) -> Iterator[str]:
    """A checkpoint as vLLM reads it. NAME@8x4 is the copy of NAME that `widen` makes; towers that transformers 5 has saved under
    another name than those on the hub have are renamed. A copy lives as long as the block."""
    name, widths = split(model)
    path = Path(checkpoint(name))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        if widths:
            narrow, processor = loaded(path)
            widen(narrow, *widths).save_pretrained(copy)
            processor.save_pretrained(copy)
            path = copy
        config = path / "config.json"
        tower = json.loads(config.read_text()).get("vision_config", {}).get("model_type") if config.is_file() else None
        weights = {file.name: load_file(file) for file in path.glob("*.safetensors")} if tower in TOWERS else {}
        short = {n for found in weights.values() for n in found if n.startswith(TOWER) and INSIDE not in n}
        if short and path != copy:
            shutil.copytree(path, copy, dirs_exist_ok=True)
        for file, found in weights.items() if short else ():
            renamed = {n.replace(TOWER, TOWER + INSIDE, 1) if n in short else n: x for n, x in found.items()}
            save_file(renamed, copy / file, {"format": "pt"})
        yield str(copy if short else path)


def flops(path: str, plans: Sequence[str | None], item: Item) -> list[int]:
    """What the whole prefill of one question takes by each plan (None: stock), as torch counts it in transformers."""
    model, processor = loaded(path)
    inputs, found = encode(processor, [item]), []
    for plan in plans:
        with nullcontext() if plan is None else compressed(model, plan):
            found.append(count_flops(model, inputs))
    return found


@contextmanager
def server(model: str, plan: str | None, options: Sequence[str] = (), seconds: float = 900) -> Iterator[int]:
    """A server of `model` on a free port, stock or compressed by `plan`, until the block ends. Raises RuntimeError with what it
    said if it does not come up within `seconds`."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        port = found.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", NAME, "--host", HOST,
        "--port", str(port), *options,
    ]  # fmt: skip
    if plan is not None:
        command += ["--hf-overrides", json.dumps(overrides(model, vllm(plan)))]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            _wait(port, process, said, seconds)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()


def _wait(port: int, process: subprocess.Popen[Any], said: Any, seconds: float) -> None:
    """Until the server is up."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        try:
            if _get(port, "/health") == 200:
                return
        except OSError:
            pass
        time.sleep(0.5)
    said.seek(0)
    lines = [line for line in said.read().splitlines() if line.strip()]
    raise RuntimeError(f"the server did not come up: {_cause(lines)}")


def _cause(lines: Sequence[str]) -> str:
    """What a server died of: the first error that it told of; its last line where there was none."""
    said = [line for line in lines if re.search(r"\w(Error|Exception): ", line) and "WARNING" not in line] or lines[-1:]
    more = lines[lines.index(said[0]) + 1 :][:2] if said and "validation error" in said[0] else ()
    return " ".join([*said[:1], *more]) or "it said nothing"


def _get(port: int, path: str) -> int:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def body(item: Item, new_tokens: int = 8, **more: Any) -> dict[str, Any]:
    """A question as a request of OpenAI's API."""
    picture = io.BytesIO()
    item.picture.save(picture, "PNG")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": item.question.text}]
    return {
        "model": NAME, "temperature": 0, "max_tokens": new_tokens, "messages": [{"role": "user", "content": content}], **more,
    }  # fmt: skip


def ask(port: int, item: Item, new_tokens: int = 8, timeout: float = 600) -> Reply:
    """Ask one question, and read the answer token by token. Raises RuntimeError with what the server says if it refuses."""
    request = json.dumps(body(item, new_tokens, stream=True, stream_options={"include_usage": True}))
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout)
    text, first, tokens = "", math.nan, 0
    start = time.perf_counter()
    try:
        connection.request("POST", "/v1/chat/completions", request, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"the server answered {response.status}: {response.read().decode()[:500]}")
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            for choice in chunk.get("choices", ()):
                piece = choice["delta"].get("content") or ""
                if piece and not text:
                    first = time.perf_counter() - start
                text += piece
            tokens = (chunk.get("usage") or {}).get("prompt_tokens", tokens)
    finally:
        connection.close()
    last = time.perf_counter() - start
    return Reply(text, same(text, item.question.answer), tokens, last if math.isnan(first) else first, last)


def load(port: int, items: Sequence[Item], concurrency: int, new_tokens: int = 8) -> tuple[list[Reply], float]:
    """All questions, `concurrency` at a time; the replies in their order, and how many seconds they took together."""
    with ThreadPoolExecutor(concurrency) as threads:
        start = time.perf_counter()
        replies = list(threads.map(lambda item: ask(port, item, new_tokens), items))
        return replies, time.perf_counter() - start


def measure(
    model: str,
    plans: Sequence[str | None],
    items: Sequence[Item],
    levels: Sequence[int],
    options: Sequence[str],
    new_tokens: int,
) -> Iterator[Row]:
    """Each plan's server in turn (None: stock), at each of the concurrencies `levels`, after a few requests to get warm. Servers
    run without caches of prefixes and images, so that no level lives on the work of the one before."""
    fresh = ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    with servable(model) as path:
        for plan, cost in zip(plans, flops(path, plans, items[0]), strict=True):
            with server(path, plan, [*fresh, *options]) as port:
                load(port, items[: min(4, len(items))], 2, new_tokens)
                for level in levels:
                    yield Row.of(plan or STOCK, level, *load(port, items, level, new_tokens), cost)
