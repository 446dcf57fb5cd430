"""Low-precision copies of a frozen float32 base, made once for a phase instead of in every call.

Autocast keeps the copies that it makes of weights only if they need a gradient, so the whole frozen base is cast in every
forward, the original's and the converted model's. Kept, bit for bit the same (two cores of an Intel Xeon with amx, 2026-11-27,
SmolLM2-135M, bf16, 512 tokens at a time): calibration without a Fisher 887 → 1,090 and 1,101 → 1,490 tokens/s; a training step
2.29 → 2.20 s, means of four that spread from 1.8 to 2.5, so hardly more than the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..configs.schema import RunConfig

__all__ = ["KeptCasts", "kept_casts"]


class KeptCasts(TorchFunctionMode):
    """While entered, and only in the thread that entered it, products with ``parameters`` take copies in autocast's dtype.

    The model is not touched. A parameter that was changed in place or moved, or that needs a gradient, is cast anew.

    Args:
        parameters: Those that may be; what needs a gradient or is no float32 is left to autocast.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        # Held, so that no other tensor can get the id of one of them.
        self._parameters = {id(p): p for p in parameters if p.dtype == torch.float32 and type(p) is nn.Parameter}
        self._copies: dict[int, tuple[tuple[Any, ...], Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) > 1:
            args = (args[0], self._low(args[1], args[0]), *args[2:])
        elif func is torch.addmm and len(args) == 3:  # transformers' Conv1D
            args = (*args[:2], self._low(args[2], args[1]))
        elif func is Tensor.to and len(args) == 2 and not kwargs and args[1] is self._dtype(args[0]):
            # The ops of this package and the loss cast by themselves.
            low = self._low(args[0], args[0])
            if low is not args[0]:
                return low
        return func(*args, **kwargs)

    @staticmethod
    def _dtype(x: Tensor) -> torch.dtype | None:
        return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None

    def _low(self, weight: Tensor, x: Tensor) -> Tensor:
        if self._parameters.get(id(weight)) is not weight or weight.requires_grad or x.dtype == torch.float64:
            return weight
        dtype = self._dtype(weight)
        if dtype is None:
            return weight
        state = (weight._version, weight.data_ptr(), dtype)
        found = self._copies.get(id(weight))
        if found is None or found[0] != state:
            found = self._copies[id(weight)] = state, weight.detach().to(dtype)
        return found[1]


def kept_casts(model: nn.Module, config: RunConfig, *, sharded: bool = False) -> KeptCasts | None:
    """For a phase of a run; ``None`` where the whole base is not at hand as plain float32 weights in host memory.

    On a GPU a base is stored in the dtype of its products, and memory is what one has too little of.
    """
    o = config.optimization
    if sharded or o.stream_layers != "off" or o.use_cpu_offload or o.base_quantization is not None:
        return None
    on_host = [p for p in model.parameters() if p.device.type == "cpu"]
    return KeptCasts(on_host) if on_host else None
