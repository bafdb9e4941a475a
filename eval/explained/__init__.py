# SPDX-License-Identifier: Apache-2.0
"""How good explanations are, measured on drawn scenes whose truth is known."""
