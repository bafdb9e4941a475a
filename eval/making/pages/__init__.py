# SPDX-License-Identifier: Apache-2.0
"""The embedded model that reads pages: its sizes, what its tokens show, its training."""
