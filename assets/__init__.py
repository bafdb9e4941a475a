# SPDX-License-Identifier: Apache-2.0
"""Embedded data: tiny trained checkpoints in the ordinary Hugging Face form."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

MODELS = ("llava-shapes", "llava-next-shapes", "qwen3-vl-shapes", "internvl-shapes")
"""Vision-language models, one of each family, that answer questions about shapes."""
PAGES = "qwen3-vl-pages"
"""A vision-language model that answers questions about pages of text (not yet those about codes and cells of tables)."""
VIDEO = "qwen3-vl-video"
"""A vision-language model that answers questions about videos of moving shapes."""
_ANSWERING = (*MODELS, PAGES, VIDEO)
CLIP = "clip-shapes"
"""The CLIP pair whose image tower is that of `llava-shapes`, for `open_clip.create_model_and_transforms("local-dir:...")`."""


def weights_path(method: str, model: str) -> Path:
    """Folder of what `method` learned for the embedded model `model`: its option `weights`."""
    path = model_path(model) / method
    if not path.is_dir():
        there = sorted(p.parent.name for p in model_path(model).glob("*/config.json"))
        raise ValueError(
            f"no weights for {method!r} with {model}: there are those for {', '.join(there) or 'no method'}"
        )
    return path


def checkpoint(name: str) -> str:
    """What `from_pretrained` loads for a name that a user writes: the folder of an embedded model, else the name. Raises ValueError
    at once, without a look on the hub, for a folder that is not there and for what can only be a slip of the pen."""
    if name in _ANSWERING:
        return str(model_path(name))
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    if name == CLIP:
        raise ValueError(
            f"{name} answers no questions: it is the pair of towers for open_clip, create_model_and_transforms('local-dir:' + "
            f"str(mmcompress.assets.model_path({name!r}))), and for the option clip= of methods; models are {', '.join(_ANSWERING)}"
        )
    if name.startswith((".", "/", "~")):
        raise ValueError(
            f"{name}: no such folder; give one with a checkpoint, a hub name, or one of {', '.join(_ANSWERING)}"
        )
    if "/" not in name and (close := difflib.get_close_matches(name.lower(), (*_ANSWERING, CLIP), n=1)):
        raise ValueError(
            f"no model {name!r} here: did you mean {close[0]!r}? embedded are {', '.join(_ANSWERING)}; a name on the hub is "
            "written OWNER/NAME, a folder as ./NAME"
        )
    return name


def split(name: str) -> tuple[str, tuple[int, int] | None]:
    """A name that a user writes as that of a checkpoint and how much wider it is to be: `llava-shapes@8x4` is llava-shapes with a
    language model 8 and a vision encoder 4 times as wide (`mmcompress.eval.widen`)."""
    found = re.fullmatch(r"(.+)@(\d+)x(\d+)", name)
    if found is None or Path(name).expanduser().exists():
        return name, None
    return found[1], (int(found[2]), int(found[3]))


def model_path(name: str = "llava-shapes") -> Path:
    """Folder of an embedded checkpoint, for `from_pretrained` (or open_clip)."""
    if name not in (*_ANSWERING, CLIP):
        raise ValueError(f"no embedded model {name!r}: there is {', '.join((*_ANSWERING, CLIP))}")
    return Path(__file__).parent / name


def released() -> dict[str, dict[str, Any]]:
    """Configurations of released checkpoints by hub name: "config" as in config.json, and its "source"."""
    found: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("released.json").read_text())
    return found
