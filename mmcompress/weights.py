# SPDX-License-Identifier: Apache-2.0
"""Weights that were trained for one base model: a folder with model.safetensors and config.json, which names that model."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .records import replacing, write_json

VERSION = 1
TENSORS, CONFIG = "model.safetensors", "config.json"
SAMPLES = 16
"""Values of each tensor that go into a fingerprint."""
L = TypeVar("L", bound="Learned")


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """The same for the same weights only, wherever they lie, in float32, and in half precision if they were saved so.

    Of every parameter its name, its shape, and evenly spaced values rounded to bfloat16. Quantised weights are others. Raises
    NotImplementedError where weights are not in memory.
    """
    digest, values = hashlib.sha256(), []
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise NotImplementedError(
                f"{name} is not in memory (offloaded by a device map): load the whole model first"
            )
        flat = weight.detach().flatten()
        step = max(1, len(flat) // SAMPLES)
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        values.append(flat[::step][:SAMPLES].float().to("cpu", torch.bfloat16))
    if values:
        digest.update(torch.cat(values).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Saved:
    """What a folder of weights holds.

    method   what they are for: the name of a method or conversion; options: its options.
    base     the model that they belong to: "class", "fingerprint".
    tensors  by name. training: how they were made, for people.
    """

    method: str
    base: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the folder; returns it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "mmcompress": VERSION, "method": self.method, "base": dict(self.base), "options": dict(self.options),
            "training": dict(self.training),
        }  # fmt: skip
        with replacing(folder / TENSORS) as part:
            save_file({name: t.detach().cpu().contiguous() for name, t in self.tensors.items()}, part)
        write_json(folder / CONFIG, about)
        return folder

    @staticmethod
    def load(folder: str | os.PathLike[str], method: str | None = None) -> Saved:
        """Read a folder; raises ValueError if it is none, or (where `method` is given) of something else."""
        folder = Path(folder)
        missing = [name for name in (CONFIG, TENSORS) if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"weights={str(folder)!r}: no {' and no '.join(missing)} there; give a folder that training wrote"
            )
        try:
            about = json.loads((folder / CONFIG).read_text())
            found = Saved(about["method"], about["base"], {}, about["options"], about["training"])
            version = about["mmcompress"]
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / CONFIG} does not describe weights of mmcompress ({error!r})") from error
        if version != VERSION:
            raise ValueError(f"{folder / CONFIG} is of version {version}; this mmcompress reads version {VERSION}")
        if method is not None and found.method != method:
            raise ValueError(f"{folder} holds weights for {found.method!r}, not for {method!r}")
        try:
            tensors = load_file(folder / TENSORS)
        except SafetensorError as error:
            raise ValueError(f"{folder / TENSORS} cannot be read: {error}") from error
        return Saved(found.method, found.base, tensors, found.options, found.training)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if these weights belong to another model than `model`."""
        mine = base_of(model)
        if mine["fingerprint"] != self.base["fingerprint"]:
            kind = f", a {self.base['class']}," if self.base["class"] != mine["class"] else ""
            raise ValueError(
                f"weights for {self.method!r} were trained for another model{kind} (fingerprint {self.base['fingerprint']}, this "
                f"{mine['class']} has {mine['fingerprint']}): load that model, or train for this one"
            )


def base_of(model: nn.Module) -> dict[str, str]:
    """What a folder of weights says of the model that it belongs to."""
    return {"class": type(model).__name__, "fingerprint": fingerprint(model)}


class Learned:
    """Mixed into stages that need trained weights: the option `weights` is a folder, `trained` the module made of it.

    A plan holds only the folder. `load`, which the engine calls, gives a copy of the stage that holds the module, after a
    look at whether it belongs to the model; `holding` gives one with a module that is being trained.
    """

    weights: str | None

    def check_weights(self) -> None:
        """Raise unless the option names a folder; a path becomes plain text."""
        value = self.weights
        if value is not None and (not isinstance(value, (str, os.PathLike)) or not os.fspath(value)):
            raise ValueError(f"weights={value!r}: give the folder that training wrote, as text or path")
        object.__setattr__(self, "weights", None if value is None else os.fspath(value))

    def build(self, saved: Saved) -> nn.Module:
        """The module that a folder holds."""
        raise NotImplementedError

    @property
    def trained(self) -> Any:
        """The module, None as long as there is none."""
        return self.__dict__.get("_module")

    def holding(self: L, module: nn.Module) -> L:
        """This stage with `module`."""
        made = copy.copy(self)
        object.__setattr__(made, "_module", module)
        return made

    def load(self: L, model: nn.Module) -> L:
        """This stage with the module of its folder, if it names one; raises ValueError if that belongs to another model."""
        if self.weights is None or self.trained is not None:
            return self
        saved = Saved.load(self.weights, self.name)  # type: ignore[attr-defined]
        saved.check(model)
        place = next(model.parameters())
        return self.holding(self.build(saved).to(place.device).eval().requires_grad_(False))


def load_into(module: nn.Module, saved: Saved, prefix: str = "") -> nn.Module:
    """Fill `module` with the tensors of `saved` whose names begin with `prefix`; raises ValueError if they do not fit."""
    tensors = {name[len(prefix) :]: t.float() for name, t in saved.tensors.items() if name.startswith(prefix)}
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the weights for {saved.method!r} do not fit: {' '.join(str(error).split())}") from error
    return module
