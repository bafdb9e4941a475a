# SPDX-License-Identifier: Apache-2.0
"""Metrics of VQA benchmarks by three protocols: the benchmark's own tool, LLaVA's scripts, lmms-eval. Pure functions of text."""

from .answers import normalize_answer, soft_accuracy, vqa_accuracy
from .choices import (
    ROTATIONS,
    ai2d_answer,
    circular_scores,
    extract_letter,
    longvideobench_letter,
    mmbench_letter,
    mvbench_letter,
    scienceqa_letter,
    seed_letter,
)
from .mmmu import mmmu_candidates, mmmu_letter, mmmu_open_correct
from .protocol import PROTOCOLS, Protocol, check_protocol
from .strings import anls, edit_distance, gqa_answer, gqa_correct, ocrbench_correct, relaxed_correct
from .yesno import (
    COGNITION,
    PERCEPTION,
    all_right,
    hallusion_label,
    hallusion_scores,
    mme_label,
    mme_scores,
    pope_label,
    pope_scores,
)

__all__ = [
    "COGNITION",
    "PERCEPTION",
    "PROTOCOLS",
    "ROTATIONS",
    "Protocol",
    "ai2d_answer",
    "all_right",
    "anls",
    "check_protocol",
    "circular_scores",
    "edit_distance",
    "extract_letter",
    "gqa_answer",
    "gqa_correct",
    "hallusion_label",
    "hallusion_scores",
    "longvideobench_letter",
    "mmbench_letter",
    "mme_label",
    "mme_scores",
    "mmmu_candidates",
    "mmmu_letter",
    "mmmu_open_correct",
    "mvbench_letter",
    "normalize_answer",
    "ocrbench_correct",
    "pope_label",
    "pope_scores",
    "relaxed_correct",
    "scienceqa_letter",
    "seed_letter",
    "soft_accuracy",
    "vqa_accuracy",
]
