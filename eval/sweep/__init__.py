# SPDX-License-Identifier: Apache-2.0
"""Many plans in one run: answers, costs, Pareto fronts, and a report of them."""
