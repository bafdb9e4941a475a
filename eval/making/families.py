# SPDX-License-Identifier: Apache-2.0
"""The other embedded models: one of each family, with pictures of different sizes as their processors make them.

Each one gets the language model of the embedded LLaVA-1.5 (as far as the architectures agree) and a vision encoder of its
own; `transfer.py` trains them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from ...adapters.layouts import AnyRes, tiled
from ...assets import model_path
from ...visuals import Layout
from .model import CHAT_TEMPLATE, HIDDEN, make_tokenizer, text_config

MEAN, STD = [0.5] * 3, [0.25] * 3
TILE = 96


class Family(ABC):
    """How one embedded model is built.

    image     how an image is written in a prompt before the processor expands it.
    """

    name: ClassVar[str]
    image: ClassVar[str] = "<image>"

    @abstractmethod
    def make_processor(self) -> Any:
        """The real processor of the family, with sizes of the embedded model."""

    @abstractmethod
    def make_model(self, tokenizer: Any) -> Any:
        """A fresh random model for `tokenizer`."""

    @abstractmethod
    def layout(self, picture: Image.Image) -> Layout:
        """Where the tokens of a picture lie."""

    def tower(self, model: Any) -> list[nn.Module]:
        """What the vision stage trains beside the projector."""
        return [model.model.vision_tower]

    def projector(self, model: Any) -> list[nn.Module]:
        """What makes LLM tokens of encoder features."""
        return [model.model.multi_modal_projector]

    def start(self, model: Any) -> None:  # noqa: B027 - most families have nothing to start from
        """Give the new vision encoder weights of another embedded model, where there is one of its kind."""

    def features(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """LLM tokens of all pictures in a row [tokens, HIDDEN], and what the encoder method returned."""
        names = ("pixel_values", "image_sizes", "image_grid_thw")
        output = model.model.get_image_features(**{n: inputs[n] for n in names if n in inputs}, return_dict=True)
        found = output.pooler_output
        return (found.flatten(0, 1) if isinstance(found, Tensor) else torch.cat(list(found))), output

    def whole(self, output: Any, layouts: list[Layout]) -> Tensor | None:
        """CLS token of the view of each picture that shows it whole, [n, width]; None without CLS."""
        return None

    def chat_template(self) -> str:
        return CHAT_TEMPLATE.replace("<image>", self.image)


class LlavaNext(Family):
    """LLaVA-NeXT: CLIP tower (that of the embedded LLaVA), thumbnail, one or two tiles, newlines."""

    name = "llava-next-shapes"
    pinpoints: ClassVar = [[TILE, TILE], [TILE, 2 * TILE], [2 * TILE, TILE]]

    def make_processor(self) -> Any:
        from transformers import LlavaNextImageProcessor, LlavaNextProcessor

        images = LlavaNextImageProcessor(
            size={"shortest_edge": TILE},
            crop_size={"height": TILE, "width": TILE},
            image_grid_pinpoints=self.pinpoints,
            image_mean=MEAN,
            image_std=STD,
        )
        return LlavaNextProcessor(
            images, make_tokenizer(), patch_size=8, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=self.chat_template(),
        )  # fmt: skip

    def make_model(self, tokenizer: Any) -> Any:
        from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

        vision = CLIPVisionConfig(
            hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=6, num_attention_heads=4, image_size=TILE,
            patch_size=8, projection_dim=HIDDEN,
        )  # fmt: skip
        config = LlavaNextConfig(
            vision_config=vision.to_dict(),
            text_config=text_config(tokenizer).to_dict(),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_grid_pinpoints=self.pinpoints,
            tie_word_embeddings=False,
        )
        return LlavaNextForConditionalGeneration(config)

    def layout(self, picture: Image.Image) -> Layout:
        pinpoints = tuple((height, width) for height, width in self.pinpoints)
        return AnyRes((picture.height, picture.width), pinpoints, TILE, 8).layout()

    def whole(self, output: Any, layouts: list[Layout]) -> Tensor | None:
        tiles = [1 + int(layout.views[1].tiles().max()) + 1 for layout in layouts]
        first = torch.tensor([0, *tiles[:-1]]).cumsum(0)
        return output.last_hidden_state[first, 0]


class InternVL(Family):
    """InternVL: a tower with CLS, pixel shuffle, one tile or two tiles and a thumbnail, Qwen2 language model. Its tower starts
    from that of the embedded Qwen3-VL, which has the same sizes (and rotary positions, which it has to do without)."""

    name = "internvl-shapes"
    image = "<IMG_CONTEXT>"
    patch: ClassVar = 4

    def make_processor(self) -> Any:
        from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

        tokenizer = make_tokenizer(
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        )
        size = {"height": TILE, "width": TILE}
        images = GotOcr2ImageProcessor(
            size=size, crop_to_patches=True, min_patches=1, max_patches=2, image_mean=MEAN, image_std=STD
        )
        videos = InternVLVideoProcessor(size=size, image_mean=MEAN, image_std=STD)
        return InternVLProcessor(
            images,
            tokenizer,
            videos,
            image_seq_length=(TILE // self.patch // 2) ** 2,
            chat_template=self.chat_template(),
        )

    def make_model(self, tokenizer: Any) -> Any:
        from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

        vision = InternVLVisionConfig(
            hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=[TILE, TILE],
            patch_size=[self.patch] * 2, layer_scale_init_value=1.0, attention_bias=True, hidden_act="gelu_pytorch_tanh",
        )  # fmt: skip
        config = InternVLConfig(
            vision_config=vision.to_dict(),
            text_config=text_config(tokenizer, "qwen2").to_dict(),
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=(TILE // self.patch // 2) ** 2,
            tie_word_embeddings=False,
        )
        model = InternVLForConditionalGeneration(config)
        with torch.no_grad():
            model.model.vision_tower.embeddings.position_embeddings.normal_(std=0.1)
            model.model.vision_tower.embeddings.cls_token.normal_(std=0.1)
        return model

    def layout(self, picture: Image.Image) -> Layout:
        from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

        columns, rows = get_optimal_tiled_canvas((picture.height, picture.width), (TILE, TILE), 1, 2)
        return tiled(rows, columns, TILE // self.patch // 2)

    def start(self, model: Any) -> None:
        from transformers import Qwen3VLForConditionalGeneration

        source = Qwen3VLForConditionalGeneration.from_pretrained(model_path("qwen3-vl-shapes"), dtype=torch.float32)
        visual, tower = source.model.visual, model.model.vision_tower
        tower.embeddings.patch_embeddings.projection.weight.data = visual.patch_embed.proj.weight.data.sum(2)
        tower.embeddings.patch_embeddings.projection.bias.data = visual.patch_embed.proj.bias.data
        tower.embeddings.position_embeddings.data[0, 1:] = visual.pos_embed.weight.data
        for layer, block in zip(tower.encoder.layer, visual.blocks, strict=True):
            pairs = [
                (layer.layernorm_before, block.norm1),
                (layer.layernorm_after, block.norm2),
                (layer.attention.projection_layer, block.attn.proj),
                (layer.mlp.fc1, block.mlp.linear_fc1),
                (layer.mlp.fc2, block.mlp.linear_fc2),
            ]
            for mine, theirs in pairs:
                mine.load_state_dict(theirs.state_dict())
            weights, biases = block.attn.qkv.weight.data.chunk(3), block.attn.qkv.bias.data.chunk(3)
            for which, weight, bias in zip("qkv", weights, biases, strict=True):
                projection = getattr(layer.attention, f"{which}_proj")
                projection.weight.data, projection.bias.data = weight.clone(), bias.clone()

    def whole(self, output: Any, layouts: list[Layout]) -> Tensor | None:
        last = torch.tensor([len(layout.views) for layout in layouts]).cumsum(0) - 1
        return output.last_hidden_state[last, 0]


class Qwen3VL(Family):
    """Qwen3-VL: native resolution, packed pictures, 2x2 merging, DeepStack, M-RoPE."""

    name = "qwen3-vl-shapes"
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    patch: ClassVar = 4
    merge: ClassVar = 2
    width: ClassVar = 96
    depth: ClassVar = 4
    pixels: ClassVar = {"shortest_edge": 64**2, "longest_edge": 112**2}
    special: ClassVar = {
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }  # fmt: skip

    def make_tokenizer(self) -> Any:
        return make_tokenizer(**self.special)

    def make_processor(self) -> Any:
        from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

        tokenizer = self.make_tokenizer()
        images = Qwen2VLImageProcessor(
            size=dict(self.pixels),
            patch_size=self.patch,
            merge_size=self.merge,
            temporal_patch_size=2,
            image_mean=MEAN,
            image_std=STD,
        )
        videos = Qwen3VLVideoProcessor(
            size={"shortest_edge": 64**2, "longest_edge": 16 * 112**2}, patch_size=self.patch,
            merge_size=self.merge, temporal_patch_size=2, image_mean=MEAN, image_std=STD,
        )  # fmt: skip
        return Qwen3VLProcessor(images, tokenizer, videos, chat_template=self.chat_template())

    def make_model(self, tokenizer: Any) -> Any:
        from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

        vision = {
            "depth": self.depth, "hidden_size": self.width, "intermediate_size": 4 * self.width, "num_heads": 4,
            "out_hidden_size": HIDDEN, "patch_size": self.patch,
            "spatial_merge_size": self.merge,
            "temporal_patch_size": 2, "num_position_embeddings": 24**2, "deepstack_visual_indexes": [1, 2],
        }  # fmt: skip
        ids = {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        }
        config = Qwen3VLConfig(
            text_config=text_config(tokenizer, "qwen3_vl_text").to_dict(),
            vision_config=vision,
            tie_word_embeddings=False,
            **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
        )
        model = Qwen3VLForConditionalGeneration(config)
        visual = model.model.visual
        with torch.no_grad():
            visual.pos_embed.weight.normal_(std=0.1)
            for (
                merger
            ) in visual.deepstack_merger_list:  # nothing at first; the language stage finds out what is worth adding
                merger.linear_fc2.weight.zero_()
                merger.linear_fc2.bias.zero_()
        return model

    def layout(self, picture: Image.Image) -> Layout:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        step = self.merge * self.patch
        low, high = self.pixels["shortest_edge"], self.pixels["longest_edge"]
        height, width = smart_resize(picture.height, picture.width, step, low, high)
        return Layout.raster(1, height // step, width // step)

    def tower(self, model: Any) -> list[nn.Module]:
        visual = model.model.visual
        return [visual.patch_embed, visual.pos_embed, visual.blocks]

    def projector(self, model: Any) -> list[nn.Module]:
        visual = model.model.visual
        return [visual.merger, visual.deepstack_merger_list]


FAMILIES: dict[str, type[Family]] = {family.name: family for family in (LlavaNext, InternVL, Qwen3VL)}


@torch.no_grad()
def take_over(model: Any, tokenizer: Any, parts: str = "", like: Mapping[str, str] | None = None) -> None:
    """Weights of the embedded `qwen3-vl-shapes` into a larger vocabulary, in place.

    parts: only weights with that in their name are copied. Words that both know keep their vectors, those of `like` (new ->
    known) start half of the way from there, all others at random.
    """
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    source = model_path("qwen3-vl-shapes")
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32).state_dict()
    known, mine = AutoTokenizer.from_pretrained(source).get_vocab(), model.state_dict()
    for name, weight in theirs.items():
        if "embed_tokens" in name or "lm_head" in name:
            mine[name].normal_(std=weight.std().item())
            for word, i in tokenizer.get_vocab().items():
                if word in known:
                    mine[name][i] = weight[known[word]]
                elif like and word in like:
                    mine[name][i] = 0.5 * (mine[name][i] + weight[known[like[word]]])
        elif parts in name:
            mine[name].copy_(weight)
