"""The kernels' tests run in Triton's CPU interpreter, which has to be switched on before Triton is first imported."""

from __future__ import annotations

import os
import sys

import pytest

if "triton.language" in sys.modules and os.environ.get("TRITON_INTERPRET", "0") != "1":
    raise pytest.UsageError(
        "Triton was imported before tests/triton could switch its interpreter on; set TRITON_INTERPRET=1, or run "
        "tests/triton in a pytest process of its own"
    )
os.environ["TRITON_INTERPRET"] = "1"

try:
    import triton.language  # noqa: F401
except ImportError as error:  # never skip in silence: triton is in the dev extra
    raise pytest.UsageError(f"tests/triton needs triton, which the dev extra installs: {error}") from error
