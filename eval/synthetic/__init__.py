# SPDX-License-Identifier: Apache-2.0
"""A synthetic VQA benchmark drawn by this project."""

from .benchmark import Batch, Item, Score, evaluate, items, prepare
from .questions import CHANCE, KINDS, Question, ask
from .scenes import Scene, draw, make_scene, scenes

__all__ = [
    "CHANCE",
    "KINDS",
    "Batch",
    "Item",
    "Question",
    "Scene",
    "Score",
    "ask",
    "draw",
    "evaluate",
    "items",
    "make_scene",
    "prepare",
    "scenes",
]
