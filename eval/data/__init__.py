# SPDX-License-Identifier: Apache-2.0
"""Benchmarks on disk -> questions."""

from .film import Film, Showing
from .load import read_questions
from .question import Question, check_questions, digest, open_picture

__all__ = ["Film", "Question", "Showing", "check_questions", "digest", "open_picture", "read_questions"]
