"""Shared fixtures: every test starts from the same seed and reads NaN from memory that nobody wrote."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

# Before anything imports Triton: which file does so first depends on how pytest deals tests out to its workers, and kernels
# defined without it cannot be interpreted later (seen: 87 failures when tests/triton was left out of a run).
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # tests run in parallel; one thread each also makes reductions reproducible

# Drawn examples are the same in every run (derandomize): a red test stays red until the code changes.
settings.register_profile(
    "npt",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("npt")


@pytest.fixture(autouse=True)
def nan_poison() -> Iterator[None]:
    """``torch.empty`` & co. return NaN: a kernel that leaves a corner of its output unwritten cannot pass by luck."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all(), "the poison does not work"
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[2]


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers whatever ran before."""
    torch.manual_seed(0)


def pytest_configure() -> None:
    # pytest's log capture would make the compiler render its structured trace (graphs, guards) for nothing, at minutes.
    logging.getLogger("torch.__trace").propagate = False
