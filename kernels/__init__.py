# SPDX-License-Identifier: Apache-2.0
"""Fused operations of token selection, one folder each: its definition (naive), blocked torch, and Triton. `dispatch` chooses."""
