# SPDX-License-Identifier: Apache-2.0
"""What a plan costs: FLOPs, milliseconds and bytes, by count and by clock."""
