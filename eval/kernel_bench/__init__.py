# SPDX-License-Identifier: Apache-2.0
"""What the kernels cost: `mmcompress bench kernels`."""
