# SPDX-License-Identifier: Apache-2.0
"""What the pages of docs/ say that is not written by hand: tables from records, and a page per method from code and records."""
