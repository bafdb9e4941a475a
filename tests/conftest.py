# SPDX-License-Identifier: Apache-2.0
"""Without a GPU, Triton kernels run in its interpreter. Triton reads this when a kernel is defined, so it is set before any
test imports one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# bytecode is kept, whatever the environment says: compiling this package takes every process that a test starts ten seconds
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real Chromium without a window; what it writes to its console can be read."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver or importlib.util.find_spec("selenium") is None:
        pytest.skip("no browser: apt-get install chromium chromium-driver, pip install selenium")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"):
        options.add_argument(argument)
    options.add_argument("--disable-background-networking")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture(scope="session")
def watcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the architecture of the embedded model of videos, untrained."""
    from mmcompress.eval.making.videos.model import Watcher

    made, family = tmp_path_factory.mktemp("watcher"), Watcher()
    processor = family.make_processor()
    family.make_model(processor.tokenizer).save_pretrained(made)
    processor.save_pretrained(made)
    return made
