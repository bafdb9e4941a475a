# SPDX-License-Identifier: Apache-2.0
"""What a runner is: recorded inputs through the library's public functions, results to compare with recorded outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

import mmcompress as mm

Arrays: TypeAlias = dict[str, Tensor]
Results: TypeAlias = Iterator[tuple[str, Tensor]]
Runner: TypeAlias = Callable[[Arrays, dict[str, Any]], Results]
RUNNERS: dict[str, Runner] = {}
TextRunner: TypeAlias = Callable[[dict[str, Any]], Iterator[tuple[str, Any, Any]]]
TEXT_RUNNERS: dict[str, TextRunner] = {}
"""For cases without arrays: the content of the JSON file to (what, found, recorded)."""


def runner(*names: str) -> Callable[[Runner], Runner]:
    """The decorated function replays the cases of these names; several functions may each replay a part of a case."""

    def add(function: Runner) -> Runner:
        for name in names:
            RUNNERS[name] = _both(RUNNERS[name], function) if name in RUNNERS else function
        return function

    return add


def text_runner(name: str) -> Callable[[TextRunner], TextRunner]:
    """The decorated function replays the cases of this name, which are a JSON file alone."""

    def add(function: TextRunner) -> TextRunner:
        TEXT_RUNNERS[name] = function
        return function

    return add


def _both(first: Runner, second: Runner) -> Runner:
    def run(arrays: Arrays, params: dict[str, Any]) -> Results:
        yield from first(arrays, params)
        yield from second(arrays, params)

    return run


def visuals(features: Tensor, k: int, **signals: Tensor) -> mm.Visuals:
    """Visuals [U, N, D] in one row of cells, with nothing between encoder and LLM."""
    return mm.Visuals(features, mm.Layout.raster(1, 1, features.shape[1]), k, signals, road=lambda x: x)


def mask_of(keep: Tensor, tokens: int) -> Tensor:
    """The slots `keep` [U, k] as a mask [U, tokens]."""
    return torch.zeros(len(keep), tokens, dtype=torch.bool).scatter(1, keep, True)
