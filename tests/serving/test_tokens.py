# SPDX-License-Identifier: Apache-2.0
"""Answers of vLLM, token for token those of transformers: stock, with all tokens kept, and compressed by the same plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import IMAGE, OWN, checkpoint
from engines import Request, engine, expected, picture, served

WORDS = "what color is the shape in the picture ? ASSISTANT:"
ONE = ["divprune(keep=0.25)", "divprune(keep=0.11)", "visionzip(keep=0.25)", "scope(keep=0.11)"]
MERGING = {
    # reads the last block, which vLLM does not build for LLaVA, whose features come from the one before
    "llava": "plan(voronoi(keep=0.25), positions='reindex', mass=False)",
    "llava-next": "plan(voronoi(keep=0.25), positions='reindex', mass=False)",
}
TRAINED = ("llava-shapes", "qwen3-vl-shapes", "internvl-shapes")


def requests(name: str) -> list[Request]:
    """Pictures of several sizes, and two in one prompt."""
    image = IMAGE[name.removesuffix("-shapes")]
    one = [Request(f"USER: {image} {WORDS}", (picture(i, 90 + 40 * i, 120 - 20 * i),)) for i in range(3)]
    two = Request(f"USER: {image} and {image} {WORDS}", (picture(7, 100, 130), picture(8, 170, 60)))
    # transformers does not cut pictures of LLaVA-OneVision into tiles where a prompt has several; vLLM does
    return [*one, *([] if name == "llava-onevision" else [two])]


@pytest.mark.parametrize("name", OWN)
def test_with_all_tokens_nothing_changes(name: str, folder: Path) -> None:
    path, asked = checkpoint(name, folder), requests(name)
    with engine(path) as llm:
        stock = served(llm, asked)
    assert stock == expected(path, asked)
    with engine(path, "divprune(keep=1.0)") as llm:
        assert served(llm, asked) == stock


@pytest.mark.parametrize("name", OWN)
def test_compressed_as_in_transformers(name: str, folder: Path) -> None:
    path, asked = checkpoint(name, folder), requests(name)
    control = expected(path, asked, "uniform(keep=0.25)")
    for plan in [*ONE, MERGING.get(name, "prumerge(keep=0.25)")]:
        wanted = expected(path, asked, plan)
        with engine(path, plan) as llm:
            assert served(llm, asked) == wanted, plan
        assert wanted != control, plan  # another choice of tokens gives other answers


@pytest.mark.parametrize("name", TRAINED)
def test_trained_models(name: str, folder: Path) -> None:
    path, asked = checkpoint(name, folder), requests(name)
    for plan in (None, "divprune(keep=1.0)", "divprune(keep=0.25)", "visionzip(keep=0.25)"):
        with engine(path, plan) as llm:
            assert served(llm, asked) == expected(path, asked, plan), plan
