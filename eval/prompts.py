# SPDX-License-Identifier: Apache-2.0
"""What a protocol makes of a question: the text, the chat format, how many tokens the answer may have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .data import Film, Question
from .metrics import Protocol
from .synthetic.benchmark import prompt as chat_prompt
from .tasks import Task

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
UNANSWERABLE = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"
MME_INSTRUCTION = " Please answer yes or no."
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)
"""The system sentence of LLaVA-1.5's own scripts, which the chat template on the hub does not have."""
BEST = "Only give the best option."
SELECT = (
    "Select the best answer to the following multiple-choice question based on the video{}. Respond with only the letter "
    "(A, B, C, or D) of the correct option."
)
FILMED = {"mvbench": f"\n{BEST}", "mlvu": f"\n{BEST}\nBest option: (", "videomme": "\nThe best answer is:"}
"""What stands behind the questions of benchmarks of videos; behind the others the sentence about the letter."""
TEMPLATES = ("chat", "vicuna")
LLAVA_NEW_TOKENS = 128
DRAWN_NEW_TOKENS = 16
NEW_TOKENS = {
    16: (
        "vqav2",
        "gqa",
        "mme",
        "scienceqa",
        "ai2d",
        "chartqa",
        "realworldqa",
        "mvbench",
        "videomme",
        "mlvu",
        "egoschema",
    ),
    32: ("docvqa", "infovqa", "longvideobench"),
}
"""What lmms-eval allows; 128 for everything else."""


def new_tokens(task: Task, protocol: Protocol) -> int:
    """How many tokens an answer may have at most."""
    if task.drawn:
        return DRAWN_NEW_TOKENS
    if protocol == "lmms":
        return next((most for most, names in NEW_TOKENS.items() if task.name in names), LLAVA_NEW_TOKENS)
    return LLAVA_NEW_TOKENS


def instruction(task: Task, question: Question, protocol: Protocol) -> str:
    """The sentence behind the question, with the line breaks before it: none for the tables of users, who ask as they wish."""
    lmms = protocol == "lmms"
    if task.own or task.drawn or task.name in ("ocrbench", "realworldqa", "hallusionbench"):
        return ""
    if task.name == "mme" and protocol == "official":
        return ""
    if task.name in FILMED:
        return f"\n{LETTER}" if task.name == "videomme" and lmms else FILMED[task.name]
    if task.name == "vizwiz" or (task.name == "okvqa" and lmms):
        return f"\n{UNANSWERABLE}"
    if task.name == "chartqa" and lmms:
        return "\nAnswer the question with a single word."
    if task.name == "mmstar" and lmms:
        return f"\n{LETTER.rstrip('.')}"
    if task.name == "mmmu":
        return f"\n\n{LETTER if question.options else SHORT}"
    if question.options or task.name == "mmstar":
        return f"\n\n{LETTER}" if task.name == "mmbench" and lmms else f"\n{LETTER}"
    return f"\n{SHORT}"


def question_text(task: Task, question: Question, protocol: Protocol, suffix: str | None = None) -> str:
    """What the user says beside the pictures. suffix: the user's own instruction instead of the protocol's."""
    ending = instruction(task, question, protocol) if suffix is None else f"\n{suffix}" if suffix else ""
    if protocol == "llava" and "llava_text" in question.extra:
        return question.extra["llava_text"] + ending
    text = question.text
    if task.name == "mme" and protocol != "official":
        text = text.removesuffix(MME_INSTRUCTION).rstrip()
    if task.name == "textvqa" and protocol == "lmms":
        text = text.capitalize()
    if task.name == "textvqa" and protocol == "llava" and question.extra.get("ocr"):
        text += f"\nReference OCR token: {question.extra['ocr']}"
    if question.hint:
        text = f"Context: {question.hint}\n{text}" if task.name == "scienceqa" else f"{question.hint}\n{text}"
    if task.name in ("mvbench", "mlvu"):
        listed = "\n".join(f"({letter}) {option}" for letter, option in question.options)
        return (f"Question: {text}\nOption:\n{listed}" if task.name == "mvbench" else f"{text}\n{listed}") + ending
    said = "\n".join(video.said() for video in question.videos if isinstance(video, Film))
    if task.name == "videomme":
        text = f"{SELECT.format(' and the subtitles' if said else '')}\n{text}"
    if said:
        text = f"This video's subtitles are listed below:\n{said}\n{text}"
    if question.options and task.name != "mmstar":
        listed = "\n".join(f"{letter}. {option}" for letter, option in question.options)
        text += "\nThere are several options:" if task.name == "mmbench" and protocol == "lmms" else ""
        text += f"\n{listed}"
    return text + ending


def conversation(processor: Any, text: str, images: int, template: str = "chat", videos: int = 0) -> str:
    """The prompt string. chat: the checkpoint's own template; vicuna: as LLaVA-1.5's scripts write it."""
    if template not in TEMPLATES:
        raise ValueError(f"template={template!r}: choose one of {', '.join(TEMPLATES)}")
    if template == "vicuna" and videos:
        raise ValueError("--template vicuna has no place for videos: leave it out")
    if template == "vicuna":
        return f"{VICUNA} USER: {(processor.image_token + chr(10)) * images}{text} ASSISTANT:"
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            "the checkpoint has no chat template, so there is no way to know its prompt format; or --template vicuna"
        )
    return chat_prompt(processor, text, images, videos)


def unknown_words(processor: Any, texts: Iterable[str]) -> str:
    """What is to be said of words that the tokenizer cannot read (embedded models know only a few); nothing if there are none."""
    tokenizer = processor.tokenizer
    words = list(dict.fromkeys(word for text in texts for word in text.split()))
    if tokenizer.unk_token_id is None or not words:
        return ""
    read = tokenizer(words, add_special_tokens=False)["input_ids"]
    unknown = [word for word, ids in zip(words, read, strict=True) if tokenizer.unk_token_id in ids]
    if not unknown:
        return ""
    more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
    return f"words that this model does not know, and reads as {tokenizer.unk_token}: {', '.join(unknown[:8])}{more}"
