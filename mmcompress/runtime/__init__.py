# SPDX-License-Identifier: Apache-2.0
"""The only code that touches the forward pass of transformers models."""
