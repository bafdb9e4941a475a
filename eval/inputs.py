# SPDX-License-Identifier: Apache-2.0
"""Model inputs of questions. What cannot be asked is left out and named, and takes no other question with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..pictures import PictureError
from ..videos import VideoError, video_arguments
from .data import Question
from .data.question import open_clip, open_picture
from .prompts import conversation, question_text
from .tasks import Task


class AskError(ValueError):
    """A question that cannot be asked, where none may be left out."""


def texts_of(
    processor: Any, task: Task, questions: Sequence[Question], protocol: Any, suffix: str | None, template: str
) -> tuple[list[str], dict[str, str]]:
    """The prompt of each question, and why some have none (an empty text), by their ids."""
    texts, wrong = [], {}
    for question in questions:
        try:
            said = question_text(task, question, protocol, suffix)
            texts.append(conversation(processor, said, len(question.images), template, len(question.videos)))
        except VideoError as error:  # of a video with subtitles
            texts.append("")
            wrong[question.id] = str(error)
        except Exception as error:  # of the checkpoint's template
            texts.append("")
            wrong[question.id] = told("the chat template", error)
    return texts, wrong


def inputs_of(
    model: Any, processor: Any, questions: Sequence[Question], texts: Sequence[str], batch: Sequence[int]
) -> tuple[list[int], Any, dict[str, str]]:
    """Inputs of the questions of a batch that can be asked, their numbers, and why the others cannot, by their ids: a picture or
    video that cannot be read, what the processor refuses, a prompt longer than the context of the model."""
    pictures: dict[int, tuple[list[Any], list[Any]]] = {}
    wrong: dict[str, str] = {}
    for i in batch:
        if any("\ud800" <= letter <= "\udfff" for letter in texts[i]):
            wrong[questions[i].id] = "its text has half a character in it (a lone surrogate)"
            continue
        try:
            pictures[i] = [*map(open_picture, questions[i].images)], [*map(open_clip, questions[i].videos)]
        except (PictureError, VideoError) as error:
            wrong[questions[i].id] = str(error)

    def processed(some: Sequence[int]) -> Any:
        shown = [picture for i in some for picture in pictures[i][0]]
        more = video_arguments(processor, [clip for i in some for clip in pictures[i][1]])
        asked = [texts[i] for i in some]
        return processor(images=shown or None, text=asked, padding=True, return_tensors="pt", **more) if asked else None

    def lengths(inputs: Any) -> list[int]:
        return [] if inputs is None else inputs["attention_mask"].sum(1).tolist()

    asked, most = list(pictures), context_of(model)
    try:
        inputs = processed(asked)
    except Exception as refusal:
        if isinstance(refusal, MemoryError | ImportError):
            raise
        for i in list(asked):
            try:
                processed([i])
            except Exception as error:
                wrong[questions[i].id] = told("the processor", error)
                asked.remove(i)
        inputs = processed(asked)
    if long := {i: n for i, n in zip(asked, lengths(inputs), strict=True) if most is not None and n >= most}:
        wrong |= {questions[i].id: f"its prompt has {n} tokens, {beyond(most)}" for i, n in long.items()}
        asked = [i for i in asked if i not in long]
        inputs = processed(asked)
    return asked, inputs, wrong


def context_of(model: Any) -> int | None:
    """Positions that the language model was made for, None if its configuration does not say."""
    config = model.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def beyond(context: int | None) -> str:
    """What a prompt is that is too long."""
    return f"and the context of the model is {context}"


def told(who: str, error: Exception) -> str:
    """A refusal in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{who} refuses it ({type(error).__name__}{': ' + lines[0] if lines else ''})"


def is_refusal(error: Exception) -> bool:
    """Whether a model that raises this refuses its inputs; it may also lack memory, or lack what it was asked for at all."""
    if isinstance(error, NotImplementedError | torch.OutOfMemoryError):
        return False
    return isinstance(error, ValueError | IndexError | RuntimeError) and "CUDA" not in str(error)
