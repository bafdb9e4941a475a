# SPDX-License-Identifier: Apache-2.0
"""Recorded inputs and outputs of reference implementations, and what replays them: `python -m tests.golden DIR`."""
