"""What all tests share: few threads per process (pytest-xdist starts several), repeatable property tests, and the `distributed` mark."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

# before anything imports torch or numpy; child processes inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
    os.environ.pop(name, None)

_DISTRIBUTED = Path(__file__).resolve().parent / "distributed"


def pytest_configure() -> None:
    """Property tests draw the same examples in every run, and a busy machine fails none of them."""
    from hypothesis import HealthCheck, settings

    settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _no_scale_left_behind() -> Iterator[None]:
    """megatron-core keeps the balancing loss's scale in a class; the next test may set one of another shape."""
    yield
    moe_utils = sys.modules.get("megatron.core.transformer.moe.moe_utils")
    if moe_utils is not None:
        moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything under tests/distributed carries the mark of that name."""
    for item in items:
        if _DISTRIBUTED in item.path.resolve().parents:
            item.add_marker(pytest.mark.distributed)


def pytest_collection_finish() -> None:
    """The CPU backend has to prepare megatron-core before any test imports it; tests of configuration alone do not pay for that."""
    torch = sys.modules.get("torch")
    if torch is not None and not torch.cuda.is_available():
        from dsvl_train.parallel import cpu_backend

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cpu_backend.install()
