# SPDX-License-Identifier: Apache-2.0
"""The processes of one `accelerate launch` (or torchrun): each answers its part of the questions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

V = TypeVar("V")


def launched() -> int:
    """How many processes `accelerate launch` or torchrun started together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def check_all_here(known: int) -> None:
    """Raise if accelerate takes processes that were launched together for single ones, that would each do everything."""
    if known != launched():
        raise ValueError(
            f"{launched()} processes were launched, but accelerate knows of {known}: on a CPU set ACCELERATE_USE_CPU=true"
        )


@dataclass(frozen=True)
class Team:
    """How many processes were launched together, and which one this is; state: what accelerate knows of them."""

    rank: int = 0
    size: int = 1
    state: Any = None

    @staticmethod
    def here() -> Team:
        """This process alone, or with those that were launched beside it."""
        size = launched()
        if size < 2:
            return Team()
        from accelerate import PartialState

        told = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        state = PartialState(cpu=told or not torch.accelerator.is_available())
        check_all_here(state.num_processes)
        return Team(state.process_index, state.num_processes, state)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def together(self, part: Mapping[str, V]) -> dict[str, V]:
        """What all processes hold; waits for them."""
        if self.state is None:
            return dict(part)
        from accelerate.utils import gather_object

        return dict(pair for pair in gather_object(list(part.items())))

    @property
    def device(self) -> Any:
        """The device of this process, None for the usual one."""
        return None if self.state is None else self.state.device
