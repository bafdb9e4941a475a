# SPDX-License-Identifier: Apache-2.0
"""Servers on loopback, asked over OpenAI's API: the accuracy of transformers, and errors that do not end them."""

from __future__ import annotations

import base64
import http.client
import io
import json
from typing import Any

import pytest
import torch
from engines import picture
from mmcompress.eval.serving import HOST, NAME, ask, load, servable, server
from mmcompress.eval.synthetic.benchmark import evaluate, items, prepare, same
from PIL import Image

import mmcompress as mm

PLAN = "divprune(keep=0.25)"
SMALL = [
    "--enforce-eager",
    "--dtype",
    "float32",
    "--max-model-len",
    "512",
    "--max-num-seqs",
    "8",
    "--kv-cache-memory-bytes",
    "64M",
]


def posted(port: int, content: Any, **more: Any) -> tuple[int, str]:
    """Status and text of the answer to one message."""
    connection = http.client.HTTPConnection(HOST, port, timeout=300)
    body = {
        "model": NAME,
        "temperature": 0,
        "max_tokens": 4,
        "messages": [{"role": "user", "content": content}],
        **more,
    }
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def shown(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava-shapes", "qwen3-vl-shapes", "internvl-shapes"])
def test_as_right_as_in_transformers(name: str) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    asked = items(140)
    with servable(name) as path:
        with server(path, PLAN, SMALL) as port:
            replies, _ = load(port, asked, 8)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(path)
    with mm.compressed(model, PLAN):
        score = evaluate(model, processor, prepare(processor, asked, 70))
    assert [reply.text.split() for reply in replies] == [text.split() for text in score.answers]
    right = [same(text, item.question.answer) for text, item in zip(score.answers, asked, strict=True)]
    assert [reply.right for reply in replies] == right and sum(right) > 35


@pytest.mark.slow
def test_bad_requests_get_errors_and_the_server_lives() -> None:
    (item,) = items(1)
    with servable("qwen3-vl-shapes") as path, server(path, "divprune(keep=100)", SMALL) as port:
        first = ask(port, item)
        words = {"type": "text", "text": item.question.text}
        for content, why in (
            ([shown(b"no picture"), words], "cannot identify image"),
            ([shown(png(item.picture)[:200]), words], "truncated"),
            ([shown(png(picture(0, 1, 999))), words], ""),
            ([shown(png(picture(0, 8, 8))), words], "keep=100"),
        ):
            status, said = posted(port, content)
            assert 400 <= status < 500 and why in said, (status, said)
        assert ask(port, item).text == first.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "words"), [("divprune(keep=1.5)", "keep=1.5"), ("fastv(keep=0.5)", "inside the language model")]
)
def test_a_server_that_cannot_compress_does_not_start(plan: str, words: str) -> None:
    asked = {"architectures": ["MMCompressQwen3VLForConditionalGeneration"], "mmcompress": {"plan": plan}}
    options = [*SMALL, "--hf-overrides", json.dumps(asked)]
    with servable("qwen3-vl-shapes") as path, pytest.raises(RuntimeError) as caught, server(path, None, options):
        pass
    assert words in str(caught.value)
