# SPDX-License-Identifier: Apache-2.0
"""Fused kernels for token selection. None yet: `mmcompress.ops` holds the plain-torch algorithms."""
