# SPDX-License-Identifier: Apache-2.0
"""The tests of serving need vLLM, which has an environment of its own (`make test-vllm`); elsewhere there are none of them."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
THERE = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if THERE else ["test_*.py"]

if THERE:
    # for this process, and those that vLLM starts
    sys.path.insert(0, str(HERE / "shim"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "shim"), os.environ.get("PYTHONPATH", "")])
    import sitecustomize  # noqa: F401

    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session", autouse=True)
def here() -> None:
    """vLLM looks at the class of a model in a process of its own, which takes longer than a test; here it is this one. Tests of
    servers go the long way."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints are made, once."""
    return Path(os.environ.get("MMCOMPRESS_CHECKPOINTS", tmp_path_factory.mktemp("checkpoints")))
