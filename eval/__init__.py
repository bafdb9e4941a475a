# SPDX-License-Identifier: Apache-2.0
"""Measuring: what compression costs in accuracy and what it saves in time and memory."""
