# SPDX-License-Identifier: Apache-2.0
"""What training has in common where all questions about what a model is shown share its visual tokens in one sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AttentionInterface

from ... import assets
from .loop import Loop
from .packed import half_attention

READ = "read_out.safetensors"
"""Weights of the read-outs beside those of the model, for a recipe's `start`."""


class Answering(Loop):
    """A model of `family` with read-outs of its tokens; its weights are drawn, or those of the run that `recipe.start` names."""

    recipe: Any
    family: Any

    def __init__(self, folder: Path, recipe: Any, family: Any, device: str | None) -> None:
        super().__init__(folder, recipe.seed, recipe.save_every, device)
        self.recipe, self.family = recipe, family
        self.processor = family.make_processor()
        torch.manual_seed(recipe.seed)
        self.model = family.make_model(self.processor.tokenizer).to(self.device)
        AttentionInterface.register("half", half_attention)
        self.model.set_attn_implementation("half")
        self.vocabulary = self.processor.tokenizer.get_vocab()
        self.reads = self.make_reads().to(self.device)
        if recipe.start:
            start = Path(assets.__file__).parent / recipe.start
            self.model.load_state_dict(load_file(start / "model.safetensors"))
            self.reads.load_state_dict(load_file(start / READ))

    def make_reads(self) -> nn.Module:
        """The read-outs as they begin."""
        raise NotImplementedError

    def save_both(self) -> Path:
        """The checkpoint, and the read-outs beside it; returns its folder."""
        target = self.save(self.model, self.processor, self.recipe)
        save_file({name: weight.half() for name, weight in self.reads.state_dict().items()}, target / READ)
        return target
