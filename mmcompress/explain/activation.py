# SPDX-License-Identifier: Apache-2.0
"""Token activation maps of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from .panes import panes
from .result import Explanation
from .session import Asked, Session, session
from .tam import targets, token_activation
from .taps import StatesTap, VocabularyHead


@torch.no_grad()
def token_activation_map(
    model: Any,
    processor: Any,
    visuals: Any = None,
    question: str = "",
    *,
    compat: str = "paper",
    interference: bool = True,
    kernel: int = 3,
    cap: float | None = None,
    candidates: int = 3,
    **asked: Unpack[Asked],
) -> Explanation:
    """Where in the pictures each token of the answer is: the activation of its class at every visual token, less what earlier
    tokens explain, through a rank filter.

    Li et al., "Token Activation Map to Visually Explain Multimodal LLMs", ICCV 2025, arXiv 2506.23270.

    model      stock or compressed; it answers greedily. processor: the model's own (with `inputs`, a tokenizer or None will do).
    visuals    an image (PIL, path or uint8 [height, width, 3]) or a list of images; with `video` the frames of one video.
    inputs     what the processor made of one prompt, instead of `visuals` and `question`. The question is then the text behind the
               last visual.
    answer     text or token ids to explain instead of the model's own answer (`Explanation.answer_ids` of another model's).
    max_new_tokens  that the model's own answer may have; default 64.
    compat     "reference": the class of the first answer token is that of the last prompt token, as in the authors' code.
    interference  False leaves out the estimated causal inference; `cap` bounds its scale (the paper has no bound).
    kernel     side of the filter's window, 1 for none. candidates: how many likely next tokens to note.

    A map is scaled together with the relevances of the text read so far, so a function word is dark. Question tokens are explained
    too. Compressed models: activations are laid on all cells that a token stands for before anything is compared; cells without
    one take no part, the filter included. Tiles are filtered as one grid, the thumbnail and every frame by itself.

    Cost: one matrix product of the N + P + A last hidden states with P + A rows of the head. Logits of the whole vocabulary are
    made at P + A places only, 16 at a time. Memory: last hidden states [N + A, D], 1024 rows of them in float32, and a few times
    (P + A) * N floats. Raises ValueError for a prompt without an image, longer than the context, padded or in a batch, and for an
    empty answer; NotImplementedError for a model without language model.
    """
    check_options(compat, kernel)
    with session(model, processor, visuals, question, **asked) as s:
        tap = StatesTap()
        s.run(tap)
        return activation_of(s, tap, compat, interference, kernel, cap, candidates)


def activation_of(
    s: Session,
    tap: StatesTap,
    compat: str = "paper",
    interference: bool = True,
    kernel: int = 3,
    cap: float | None = None,
    candidates: int = 3,
) -> Explanation:
    """Token activation maps of a session that has run under `tap`."""
    states, head = tap.states(), VocabularyHead(s.adapter.model)
    text = states[s.text_places]
    first = int(head.every(text[:1]).argmax()) if s.questions else 0
    assert s.answer is not None
    classes = targets(s.text_ids[: s.questions], s.answer, first, int(s.prompt.ids[-1]), compat)
    rows = s.rows()
    places, cells = torch.cat(rows).unique(return_inverse=True)
    valid = torch.cat(rows) >= 0
    raw = head.logits(states[places.clamp_min(0).to(states.device)], classes).relu().T.cpu()[:, cells]
    relevance = head.logits(text, classes).relu().T.cpu()
    found = token_activation(
        raw,
        relevance,
        s.questions,
        s.names(),
        all_grids(s),
        valid,
        interference=interference,
        kernel=kernel,
        cap=cap,
    )
    asked = [None] * s.questions + s.answer
    likely = head.likely(text, asked, candidates) if candidates else None
    options = {"compat": compat, "interference": interference, "kernel": kernel, "cap": cap}
    return s.explanation("token activation map", options, found.maps, found.relevance, rows, likely)


def check_options(compat: str, kernel: int) -> None:
    targets((), (0,), 0, 0, compat)
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(
            f"kernel={kernel}: the filter's window has an odd number of cells to each side; 1 filters nothing"
        )


def all_grids(s: Session) -> list[Tensor]:
    """Cells of all panes of a session's visuals, numbered through: [rows, columns] each."""
    found, first = [], 0
    for visual in s.visuals:
        found += [first + pane.cells for pane in panes(visual.layout)]
        first += visual.tokens
    return found
