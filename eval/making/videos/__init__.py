# SPDX-License-Identifier: Apache-2.0
"""The model that watches videos: its sizes, what its tokens show, its training."""
