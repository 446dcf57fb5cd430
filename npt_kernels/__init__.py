"""Per-token dynamic weights for transformers: the rank-1 (rank-k) weight change rides inside the matmul, never materialised.

Ops: :func:`npt_linear`, :func:`npt_factored_linear`, :func:`npt_gated_mlp`, :func:`npt_mlp`. Models: :func:`apply_npt` and
friends. Importing this package imports nothing heavy and never initialises CUDA.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .component import AdapterTensors, NPComponent
    from .config import NPTConfig
    from .conversion.apply import apply_npt
    from .functional import npt_factored_linear, npt_gated_mlp, npt_linear, npt_mlp
    from .model.apply_report import ApplyReport
    from .model.extra import add_extra, remove_extra
    from .model.install import npt_disabled, npt_parameters, npt_scale, remove_npt
    from .model.save import load_npt, save_npt
    from .ops.registry import BackendUnavailableError, available_backends, explain
    from .pretrained import NPTModelForCausalLM

#: Everything loads at first use, torch included, so that ``npt --help`` answers at once.
_LAZY = {
    "AdapterTensors": ".component",
    "ApplyReport": ".model.apply_report",
    "BackendUnavailableError": ".ops.registry",
    "NPComponent": ".component",
    "NPTConfig": ".config",
    "NPTModelForCausalLM": ".pretrained",
    "add_extra": ".model.extra",
    "apply_npt": ".conversion.apply",
    "available_backends": ".ops.registry",
    "explain": ".ops.registry",
    "load_npt": ".model.save",
    "npt_disabled": ".model.install",
    "npt_factored_linear": ".functional",
    "npt_gated_mlp": ".functional",
    "npt_linear": ".functional",
    "npt_mlp": ".functional",
    "npt_parameters": ".model.install",
    "npt_scale": ".model.install",
    "remove_extra": ".model.extra",
    "remove_npt": ".model.install",
    "save_npt": ".model.save",
}

__all__ = [
    "AdapterTensors",
    "ApplyReport",
    "BackendUnavailableError",
    "NPComponent",
    "NPTConfig",
    "NPTModelForCausalLM",
    "__version__",
    "add_extra",
    "apply_npt",
    "available_backends",
    "explain",
    "load_npt",
    "npt_disabled",
    "npt_factored_linear",
    "npt_gated_mlp",
    "npt_linear",
    "npt_mlp",
    "npt_parameters",
    "npt_scale",
    "remove_extra",
    "remove_npt",
    "save_npt",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
