# SPDX-License-Identifier: Apache-2.0
"""The embedded model: a LLaVA-1.5 architecture of under 3 M parameters, its tokenizer and its processor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from ..synthetic.questions import MOST_COUNTED
from ..synthetic.scenes import CHARACTERS, COLORS, COLUMNS, ROWS, SHAPES, SIDE

PATCH = 8
GRID = SIDE // PATCH
HIDDEN = 128
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_SPECIAL = ("<pad>", "</s>", "<s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
_WORDS = (
    *("what", "color", "is", "the", "shape", "how", "many", "shapes", "there", "a", "where", "of", "above", "below"),
    *("does", "sign", "say", "and", "in", "picture", "yes", "no", ",", ".", "?"),
)
WORDS = (*_WORDS, *COLORS, *SHAPES, *ROWS, *COLUMNS, *CHARACTERS, *map(str, range(MOST_COUNTED + 1)))
"""All words of the shapes benchmark."""


def make_tokenizer(words: Sequence[str] = WORDS, **special: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower case, one token per word, mark and character of a code; `special` tokens by the names
    under which the processor of a family looks for them, behind all others (so that words have the same ids everywhere)."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*_SPECIAL, *words, *special.values()]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[.,?]"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image>",
            "user_token": "USER:",
            "assistant_token": "ASSISTANT:",
            **special,
        },
        padding_side="left",
    )


def make_processor() -> LlavaProcessor:
    """The processor in the real LLaVA-1.5 form: CLIP image processor, `<image>` expanded to one token per patch."""
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def text_config(tokenizer: PreTrainedTokenizerFast, kind: str = "llama") -> PreTrainedConfig:
    """Configuration of the language model, in the architecture `kind`."""
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "initializer_range": HIDDEN**-0.5,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }
    if kind == "qwen3_vl_text":
        sizes |= {
            "head_dim": HIDDEN // 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        }
    return CONFIG_MAPPING[kind](**sizes)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaForConditionalGeneration:
    """A fresh random model for `tokenizer`.

    Linear layers and embeddings start with a standard deviation of 1 / sqrt(hidden): at this width the usual 0.02 keeps
    the model for thousands of steps where it knows what is in a picture but not which attributes belong together.
    """
    torch.manual_seed(seed)
    scale = HIDDEN**-0.5
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=HIDDEN,
    )
    text = text_config(tokenizer)
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        # the tower's features are several times larger than word embeddings
        model.model.multi_modal_projector.linear_1.weight.normal_(std=0.25 * scale)
        model.model.multi_modal_projector.linear_2.weight.normal_(std=0.1 * scale)
        model.lm_head.weight.copy_(model.get_input_embeddings().weight)
    return model
