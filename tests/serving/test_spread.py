# SPDX-License-Identifier: Apache-2.0
"""A model over two processes, and a compiled one: the same answers as in one, uncompiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import checkpoint
from engines import engine, expected, served
from test_tokens import requests

SPREAD: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("llava", "visionzip(keep=0.25)"),  # heads of CLS attention are on two devices
        ("qwen2.5-vl", "visionzip(keep=0.25)"),  # and those of attention among patches
        ("qwen3-vl", "divprune(keep=0.11)"),
        ("internvl", "prumerge(keep=0.25)"),  # rows are made anew
    ],
)
def test_two_processes(name: str, plan: str, folder: Path) -> None:
    path, asked = checkpoint(name, folder), requests(name)
    with engine(path, plan, **SPREAD) as llm:
        assert served(llm, asked) == expected(path, asked, plan)


@pytest.mark.slow
def test_pictures_over_two_processes(folder: Path) -> None:
    """Each encodes other pictures: methods that read features can, those that read attention refuse."""
    name = "qwen2.5-vl"
    path, asked = checkpoint(name, folder), requests(name)
    with engine(path, "divprune(keep=0.25)", mm_encoder_tp_mode="data", **SPREAD) as llm:
        assert served(llm, asked) == expected(path, asked, "divprune(keep=0.25)")
    refused = pytest.raises(NotImplementedError, match="mm_encoder_tp_mode='data' gives each device other images")
    with refused, engine(path, "visionzip(keep=0.25)", mm_encoder_tp_mode="data"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("name", "plan"), [("llava", "visionzip(keep=0.25)"), ("qwen2.5-vl", "divprune(keep=0.25)")])
def test_compiled(name: str, plan: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))  # compiled here, not before
    path, asked = checkpoint(name, folder), requests(name)
    with engine(path, plan, enforce_eager=False) as llm:
        assert served(llm, asked) == expected(path, asked, plan)
        assert any(tmp_path.rglob("*.py")), "nothing was compiled"
