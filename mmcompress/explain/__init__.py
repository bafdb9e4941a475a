# SPDX-License-Identifier: Apache-2.0
"""Explanations: where in the pictures each token of an answer comes from, and how faithful that is."""

from collections.abc import Callable

from .activation import token_activation_map
from .afford import unaffordable
from .attention import attention_rollout, last_attention
from .film import Film
from .gradients import grad_cam, gradient_relevance
from .measured import Measured
from .panes import Pane, panes
from .relevance import answer_relevances
from .result import Explanation, Token, Word
from .seen import Seen

EXPLANATIONS: dict[str, Callable[..., Explanation]] = {
    "token activation map": token_activation_map,
    "attention rollout": attention_rollout,
    "last-layer attention": last_attention,
    "gradient relevance": gradient_relevance,
    "Grad-CAM": grad_cam,
}
"""All explanations by their names: functions of the same arguments and result."""

__all__ = [
    "EXPLANATIONS",
    "Explanation",
    "Film",
    "Measured",
    "Pane",
    "Seen",
    "Token",
    "Word",
    "answer_relevances",
    "attention_rollout",
    "grad_cam",
    "gradient_relevance",
    "last_attention",
    "panes",
    "token_activation_map",
    "unaffordable",
]
