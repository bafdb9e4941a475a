# SPDX-License-Identifier: Apache-2.0
"""A tiny CLIP pair in the open_clip form: the vision tower of the embedded LLaVA, and a text tower trained to it.

As in locked-image tuning (Zhai et al., arXiv 2111.07991) the image tower stays what it is, so that it is the very tower of
the embedded LLaVA; its projection and the whole text tower learn from pictures and captions with CLIP's loss.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from ...assets import model_path
from ...records import write_json
from ..synthetic.scenes import SIDE, Scene, scenes
from .data import normalize, pictures
from .loop import Loop
from .model import HIDDEN, PATCH, make_tokenizer

CONTEXT = 32


@dataclass(frozen=True)
class ClipRecipe:
    """Sizes of the training run. The embedded weights were stopped at 500 steps of a cosine that was planned for 2500."""

    scenes: int = 20_000
    test_scenes: int = 500
    steps: int = 500
    batch: int = 256
    rate: float = 1e-3
    save_every: int = 500
    seed: int = 0


def config(words: int) -> dict[str, Any]:
    """What open_clip builds the pair from."""
    vision = {"layers": 6, "width": HIDDEN, "head_width": HIDDEN // 4, "patch_size": PATCH, "image_size": SIDE}
    text = {
        "context_length": CONTEXT, "vocab_size": words, "width": HIDDEN, "heads": 4, "layers": 4, "pool_type": "eos",
        "eos_id": 1, "pad_id": 0, "hf_tokenizer_name": "in this folder",
    }  # fmt: skip
    return {"embed_dim": 64, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Some or all objects of a scene in any order, and sometimes the sign."""
    names = [f"a {scene.things[int(i)].name}" for i in rng.permutation(len(scene.things))]
    if rng.random() < 0.4:
        names = names[: int(rng.integers(1, len(names) + 1))]
    if rng.random() < 0.5:
        names.append(f"a sign {' '.join(scene.sign.code)}")
    return " , ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]


def image_tower(vision: Any) -> dict[str, Tensor]:
    """Weights of a Hugging Face CLIP vision tower under the names of open_clip (all but the projection)."""
    emb = vision.embeddings
    found = {
        "class_embedding": emb.class_embedding,
        "positional_embedding": emb.position_embedding.weight,
        "conv1.weight": emb.patch_embedding.weight,
    }
    norms = {"ln_pre": vision.pre_layrnorm, "ln_post": vision.post_layernorm}
    for i, layer in enumerate(vision.encoder.layers):
        block, at = f"transformer.resblocks.{i}", layer.self_attn
        found |= {
            f"{block}.attn.in_proj_weight": torch.cat([at.q_proj.weight, at.k_proj.weight, at.v_proj.weight]),
            f"{block}.attn.in_proj_bias": torch.cat([at.q_proj.bias, at.k_proj.bias, at.v_proj.bias]),
        }
        norms |= {
            f"{block}.attn.out_proj": at.out_proj,
            f"{block}.ln_1": layer.layer_norm1,
            f"{block}.ln_2": layer.layer_norm2,
            f"{block}.mlp.c_fc": layer.mlp.fc1,
            f"{block}.mlp.c_proj": layer.mlp.fc2,
        }
    for name, module in norms.items():
        found |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    return {f"visual.{name}": weight.detach().clone() for name, weight in found.items()}


class ClipTrainer(Loop):
    """Trains the pair in one folder; a stopped run goes on from its last checkpoint."""

    def __init__(self, folder: Path, recipe: ClipRecipe | None = None, device: str | None = None) -> None:
        from open_clip import CLIP
        from transformers import LlavaForConditionalGeneration

        self.recipe = recipe or ClipRecipe()
        super().__init__(folder, self.recipe.seed, self.recipe.save_every, device)
        self.tokenizer = make_tokenizer()
        self.tokenizer.padding_side = "right"
        self.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", self.tokenizer.eos_token_id)]
        )
        self.config = config(len(self.tokenizer))
        torch.manual_seed(self.recipe.seed)
        self.model: Any = CLIP(**self.config)
        llava = LlavaForConditionalGeneration.from_pretrained(model_path(), dtype=torch.float32)
        missing = self.model.load_state_dict(image_tower(llava.model.vision_tower), strict=False)
        assert not missing.unexpected_keys and "visual.proj" in missing.missing_keys
        self.model.to(self.device)

    def load_data(self) -> None:
        self.train, self.test = scenes("train", self.recipe.scenes), scenes("test", self.recipe.test_scenes)
        self.pooled, self.test_pooled = (self._pooled(part) for part in (self.train, self.test))

    @torch.no_grad()
    def _pooled(self, part: list[Scene]) -> Tensor:
        """What the locked tower makes of pictures, before the projection: [n, HIDDEN]."""
        tower = self.model.visual
        found = []
        for first in range(0, len(part), 200):
            with self.precision():
                hidden = tower.transformer(
                    tower._embeds(normalize(pictures(part[first : first + 200])).to(self.device))
                )
            found.append(tower.ln_post(hidden.float()[:, 0]))
        return torch.cat(found)

    def tokens(self, captions: list[str]) -> Tensor:
        made = self.tokenizer(captions, padding="max_length", max_length=CONTEXT, return_tensors="pt")
        return made.input_ids.to(self.device)

    def both(self, pooled: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Normalised embeddings of pictures and of captions."""
        images = F.normalize(pooled @ self.model.visual.proj, dim=-1)
        return images, self.model.encode_text(self.tokens(captions), normalize=True)

    def loss(self, step: int) -> Tensor:
        rng = np.random.default_rng((self.recipe.seed, 5, step))
        rows = rng.choice(len(self.train), size=self.recipe.batch, replace=False)
        images, texts = self.both(self.pooled[torch.from_numpy(rows)], [caption(self.train[int(r)], rng) for r in rows])
        logits = self.model.logit_scale.exp().clamp(max=100) * images @ texts.T
        right = torch.arange(len(rows), device=self.device)
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """Retrieval among all held-out pictures by captions of everything in them, and whether the right one of all pairs
        of colour and shape is nearest to pictures in which it is."""
        names = [f"{' , '.join(f'a {t.name}' for t in s.things)} and a sign {' '.join(s.sign.code)}" for s in self.test]
        images, texts = self.both(self.test_pooled, names)
        found = (texts @ images.T).argmax(1) == torch.arange(len(texts), device=self.device)
        pairs = sorted({t.name for s in self.test for t in s.things})
        _, words = self.both(self.test_pooled[:1], [f"a {p}" for p in pairs])
        there = torch.tensor(
            [[any(t.name == p for t in s.things) for p in pairs] for s in self.test], device=self.device
        )
        best = (images @ words.T).argmax(1)
        hit = there[torch.arange(len(best)), best].float().mean()
        return {"retrieval": found.float().mean().item(), "best pair is there": hit.item()}

    def run(self) -> Path:
        """Train and save; returns the folder, which `open_clip.create_model_and_transforms("local-dir:...")` loads."""
        self.load_data()
        projection = nn.ParameterList([self.model.visual.proj, self.model.logit_scale])
        words = nn.ParameterList(
            [p for n, p in self.model.named_parameters() if not n.startswith("visual") and n != "logit_scale"]
        )
        self.run_stage("clip", [projection, words], self.recipe.steps, self.recipe.rate, self.loss, self.scores)
        target = self.folder / "checkpoint"
        target.mkdir(exist_ok=True)
        half = {
            n: w.detach().half().cpu().contiguous() for n, w in self.model.state_dict().items() if w.is_floating_point()
        }
        save_file(half, target / "open_clip_model.safetensors")
        preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
        (target / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": self.config, "preprocess_cfg": preprocess}, indent=2) + "\n"
        )
        self.tokenizer.save_pretrained(target)
        write_json(target / "recipe.json", asdict(self.recipe))
        self.console.print(f"saved {target}")
        return target
