# SPDX-License-Identifier: Apache-2.0
"""How the embedded models and the weights of learned methods are made: training on the benchmarks of `eval.synthetic`."""
