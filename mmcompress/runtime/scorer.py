# SPDX-License-Identifier: Apache-2.0
"""What scores frames by a question: a CLIP of its own, which need not be that of the model's vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .clip import question_of, tokenizer_of


class FrameScorer:
    """A CLIP beside a model. Frames come as the model is given them: they are brought back to colours by what its processor says,
    and made again as the CLIP wants them. float32, without gradients; the CLIP follows the device of the frames."""

    def __init__(self, name: str, model: Any, tokenizer: str | None, placeholders: tuple[int, ...]) -> None:
        self.name, self.placeholders = name, placeholders
        self.tokenizer = tokenizer_of(model, tokenizer)
        self.special = tuple(
            sorted(
                (t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True
            )
        )
        self.mean, self.std = colours_of(model, tokenizer)
        try:
            self._load(name)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"scorer={name!r} cannot be loaded: give an open_clip folder, an open_clip model as name/tag, or a CLIP of "
                f"transformers by name or folder ({error})"
            ) from error

    def _load(self, name: str) -> None:
        folder, (arch, _, tag) = Path(name), name.partition("/")
        if (folder / "open_clip_config.json").is_file() or (not folder.exists() and _is_open_clip(arch, tag)):
            try:
                import open_clip
            except ImportError as error:
                raise ImportError(f"scorer={name!r} needs open_clip (pip install mmcompress[clip])") from error
            local = folder.exists()
            clip: Any = open_clip.create_model(f"local-dir:{name}" if local else arch, None if local else tag).eval()
            read = open_clip.get_tokenizer(f"local-dir:{name}" if local else arch)
            self.encode_text = lambda text, device: clip.to(device).encode_text(read([text]).to(device))
            self.encode_image = lambda pixels: clip.to(pixels.device).encode_image(pixels)
            side = clip.visual.image_size
            self.side = (side, side) if isinstance(side, int) else tuple(side)
            self.wanted = clip.visual.image_mean, clip.visual.image_std
            return
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        tower: Any = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
        if not hasattr(tower, "get_text_features"):
            raise ValueError(f"it is a {tower.config.model_type}, which has no joint space of pictures and text")
        words, processor = AutoTokenizer.from_pretrained(name), AutoImageProcessor.from_pretrained(name)
        self.encode_text = lambda text, device: _pooled(
            tower.to(device).get_text_features(**words(text, truncation=True, return_tensors="pt").to(device))
        )
        self.encode_image = lambda pixels: _pooled(tower.to(pixels.device).get_image_features(pixels))
        self.side = (tower.config.vision_config.image_size,) * 2
        self.wanted = processor.image_mean, processor.image_std

    def question(self, row: Tensor) -> str:
        """The question of a prompt [S]."""
        kept = [i for i in row.tolist() if i not in self.placeholders]
        return question_of(self.tokenizer.decode(kept, skip_special_tokens=False), self.special)

    @torch.no_grad()
    def scores(self, pictures: Tensor, question: str) -> Tensor:
        """Cosine of each picture [n, 3, H, W] with the question, [n]."""
        with torch.autocast(pictures.device.type, enabled=False):
            text = F.normalize(self.encode_text(question, pictures.device).float(), dim=-1)
            found = []
            for part in pictures.split(32):
                seen = part.float() * _channels(self.std, part) + _channels(self.mean, part)
                seen = F.interpolate(seen, self.side, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
                seen = (seen - _channels(self.wanted[0], part)) / _channels(self.wanted[1], part)
                found.append(F.normalize(self.encode_image(seen).float(), dim=-1) @ text[0])
            return torch.cat(found)


def _channels(values: Any, like: Tensor) -> Tensor:
    return torch.tensor(list(values), device=like.device)[:, None, None]


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


def _is_open_clip(arch: str, tag: str) -> bool:
    """Whether open_clip knows a model by that name, with weights by that tag."""
    try:
        import open_clip
    except ImportError:
        return False
    return (arch, tag) in open_clip.list_pretrained()


def colours_of(model: Any, name: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of colours by which the processor of a model makes its frames."""
    from transformers import AutoImageProcessor, AutoVideoProcessor

    name = getattr(model, "name_or_path", "") or name or ""
    for kind in (AutoVideoProcessor, AutoImageProcessor):
        try:
            made: Any = kind.from_pretrained(name)
        except (OSError, ValueError, ImportError, KeyError):
            continue
        if getattr(made, "do_normalize", True) is False:
            return (0.0,) * 3, (1.0,) * 3
        return tuple(made.image_mean), tuple(made.image_std)
    raise ValueError(
        f"no processor at {name!r}, which says how frames are made for the model: load the model from a folder with its processor, "
        f"or give that folder by tokenizer="
    )
