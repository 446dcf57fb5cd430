"""The frozen tensors of one decoder layer as one run of bytes, which may lie in host memory, in a mapped file or in a buffer.

Whatever a layer holds is moved: parameters, buffers, the parts of tensor subclasses (torchao), tensors that bitsandbytes hangs
on its parameters. Only bytes are copied, never numbers, so every dtype and layout comes back bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["LayerWeights", "is_mapped", "layer_tensors", "parts_of", "rebuild"]

#: Regions start at multiples of this: vector loads and TMA want 16 bytes, the allocator itself gives 512.
_ALIGNMENT = 256
#: Vectors below this many bytes (norms, biases, code books) stay on the device: .01 % of a layer, and code that reads a norm
#: outside its layer's forward needs no transfer.
_SMALL_VECTOR = 64 * 1024


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The tensors with storage behind a tensor: itself, or the parts of a wrapper subclass, outer to inner, in order."""
    if is_traceable_wrapper_subclass(tensor):
        return [part for name in tensor.__tensor_flatten__()[0] for part in parts_of(getattr(tensor, name))]
    return [tensor]


def rebuild(tensor: Tensor, parts: Iterator[Tensor]) -> Tensor:
    """``tensor`` with other ``parts`` (in the order of :func:`parts_of`); a wrapper subclass is wrapped anew."""
    if not is_traceable_wrapper_subclass(tensor):
        return next(parts)
    names, context = tensor.__tensor_flatten__()
    inner = {name: rebuild(getattr(tensor, name), parts) for name in names}
    return type(tensor).__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())


def _attached(value: Any, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Tensors in attributes: bitsandbytes keeps scales and code books on its parameters and in a module's ``state``."""
    for name, entry in vars(value).items() if hasattr(value, "__dict__") else ():
        if isinstance(entry, Tensor):
            if not name.startswith("_") and name != "grad":
                yield name, entry
        elif depth < 2 and type(entry).__module__.startswith("bitsandbytes"):
            for inner, tensor in _attached(entry, depth + 1):
                yield f"{name}.{inner}", tensor


def layer_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Name → tensor of everything in ``layer`` but its NP component; each object once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in layer.named_modules():
        if "np_component" in path.split("."):
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        extra = [(f"{name}.{inner}", t) for name, tensor in own for inner, t in _attached(tensor)]
        state = getattr(module, "state", None)
        if type(state).__module__.startswith("bitsandbytes"):
            extra += [(f"state.{name}", tensor) for name, tensor in _attached(state)]
        for name, tensor in (*own, *extra):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{path}.{name}" if path else name] = tensor
    return found


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's memory belongs to a mapped file (safetensors load so), which costs no RAM. Known on Linux only."""
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu" or not tensor.numel():
        return False
    address = tensor.data_ptr()
    with open("/proc/self/maps") as stream:
        for line in stream:
            span, _, _, _, inode, *path = line.split(maxsplit=5)
            low, _, high = span.partition("-")
            if int(low, 16) <= address < int(high, 16):
                return inode != "0" and bool(path) and not path[0].startswith("/dev/")
    return False


@dataclass(frozen=True)
class _Place:
    """Where a tensor's numbers lie: bytes from the start of the layer's run (or of its region), and the layout."""

    offset: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]


def view_of(buffer: Tensor, place: _Place) -> Tensor:
    """The tensor at ``place`` in a flat uint8 ``buffer``."""
    start = buffer.storage_offset() + place.offset
    itemsize = place.dtype.itemsize
    assert start % itemsize == 0
    view = torch.empty(0, dtype=place.dtype, device=buffer.device)
    return view.set_(buffer.untyped_storage(), start // itemsize, place.size, place.stride)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and the one behind the last, as addresses."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


@dataclass
class _Region:
    """Bytes that one or several tensors of the layer share."""

    offset: int
    nbytes: int
    source: Tensor


class LayerWeights:
    """The tensors of one layer that are streamed, where they are at home, and how to point them at a buffer.

    Args:
        index, layer: The layer.
        stay: Objects (by id) that must not move: other layers or the outside use them too.

    Attributes:
        nbytes: Length of the run of bytes, padding included; 0 for a layer of which nothing is streamed.
        staying: Tensors of the layer that stay on the device.

    Raises:
        ValueError: A tensor without storage (meta, sparse), or a tensor subclass that is not in host memory.
    """

    def __init__(self, index: int, layer: nn.Module, stay: set[int]) -> None:
        self.index, self.nbytes, self.staying = index, 0, []
        self._names: list[str] = []
        self._tensors: list[Tensor] = []  # plain tensors whose .data moves
        self._wrapped: list[tuple[nn.Module, str, nn.Parameter, list[int]]] = []
        for name, tensor in layer_tensors(layer).items():
            self._check(name, tensor)
            small = tensor.dim() < 2 and tensor.numel() * tensor.element_size() < _SMALL_VECTOR
            if id(tensor) in stay or not tensor.numel() or (small and parts_of(tensor)[0] is tensor):
                self.staying.append(tensor)
                continue
            parts = parts_of(tensor)
            first = len(self._tensors)
            self._names += [name] * len(parts)
            self._tensors += parts
            if parts[0] is not tensor:
                path, _, attribute = name.rpartition(".")
                positions = list(range(first, len(self._tensors)))
                self._wrapped.append((layer.get_submodule(path), attribute, tensor, positions))  # type: ignore[arg-type]
        self._devices = [tensor.device for tensor in self._tensors]
        self._kept: list[Tensor] = []  # the data the tensors had, where it is mapped and so costs nothing
        self._home: list[Tensor] = []
        self._pieces: list[tuple[int, Tensor]] = []
        self._versions: list[int] = []
        self._lay_out()

    def _check(self, name: str, tensor: Tensor) -> None:
        parts = parts_of(tensor)
        if any(part.is_meta for part in parts):
            raise ValueError(
                f"layer {self.index}: {name} has no values (device 'meta'); load the model before streaming it"
            )
        if any(part.layout is not torch.strided for part in parts):
            raise ValueError(f"layer {self.index}: {name} is a {tensor.layout} tensor, which cannot be streamed")
        if parts[0] is not tensor and any(part.device.type != "cpu" for part in parts):
            raise ValueError(
                f"layer {self.index}: {name} is a {type(tensor).__name__} on {tensor.device}; load it in host memory "
                "(device_map='cpu') to stream it"
            )

    def _lay_out(self) -> None:
        """Regions, and every tensor's place, from the addresses the tensors have now."""
        order = sorted(range(len(self._tensors)), key=lambda i: (str(self._devices[i]), *_extent(self._tensors[i])))
        self._regions: list[_Region] = []
        self._region_of = [0] * len(order)
        places: dict[int, _Place] = {}
        end = -1
        device: torch.device | None = None
        for i in order:
            tensor = self._tensors[i]
            start, stop = _extent(tensor)
            if start >= end or tensor.device != device:
                self.nbytes += -self.nbytes % _ALIGNMENT
                self._regions.append(_Region(self.nbytes, 0, tensor))
                base, end, device = start, stop, tensor.device
            end = max(end, stop)
            region = self._regions[-1]
            region.nbytes = end - base
            self.nbytes = region.offset + region.nbytes
            self._region_of[i] = len(self._regions) - 1
            places[i] = _Place(region.offset + start - base, tensor.dtype, tuple(tensor.shape), tensor.stride())
        self._places = [places[i] for i in range(len(order))]

    # ---- homes -------------------------------------------------------------------------------------------------------

    def _bytes(self, region: _Region) -> Tensor:
        """The region's bytes where they are now."""
        first = region.source.detach()
        flat = torch.empty(0, dtype=torch.uint8, device=first.device)
        return flat.set_(first.untyped_storage(), first.storage_offset() * first.element_size(), (region.nbytes,), (1,))

    @property
    def mapped(self) -> bool:
        """Whether all of it lies in mapped files already."""
        return bool(self._regions) and all(is_mapped(region.source) for region in self._regions)

    def settle(self, home: Tensor | None) -> None:
        """Give the tensors a home: ``home``, uint8 ``[nbytes]`` in host memory, or (``None``) where they are, mapped."""
        if home is None:
            self._pieces = [(region.offset, self._bytes(region)) for region in self._regions]
            self._kept = [tensor.data for tensor in self._tensors]
            self._home = self._kept
            return
        for region in self._regions:
            home[region.offset : region.offset + region.nbytes].copy_(self._bytes(region))
        self._pieces = [(0, home)]
        self._home = [view_of(home, place) for place in self._places]
        self._point(self._home)

    def load(self, buffer: Tensor, *, non_blocking: bool = False) -> None:
        """Copy the layer from its home into the first ``nbytes`` of ``buffer``."""
        for offset, piece in self._pieces:
            buffer[offset : offset + len(piece)].copy_(piece, non_blocking=non_blocking)

    # ---- visits ------------------------------------------------------------------------------------------------------

    def _point(self, data: list[Tensor]) -> None:
        for tensor, new in zip(self._tensors, data, strict=True):
            tensor.data = new

    def activate(self, buffer: Tensor) -> None:
        """The layer's tensors become views of ``buffer``, which holds its bytes."""
        data = [view_of(buffer, place) for place in self._places]
        wrapped = {i for *_, positions in self._wrapped for i in positions}
        for i, tensor in enumerate(self._tensors):
            if i not in wrapped:
                tensor.data = data[i]
        for module, name, parameter, positions in self._wrapped:
            # A wrapper's device is fixed when it is made: on the device it must be another one.
            made = rebuild(parameter, iter([data[i] for i in positions]))
            module._parameters[name] = nn.Parameter(made, requires_grad=False)
        self._versions = [tensor._version for tensor in self._tensors]

    def retire(self, buffer: Tensor) -> str | None:
        """Back home. Returns a complaint if something has written to a tensor or replaced its data during the visit."""
        start = buffer.data_ptr()
        wrapped = {i for *_, positions in self._wrapped for i in positions}
        problem = None
        for i, (tensor, place) in enumerate(zip(self._tensors, self._places, strict=True)):
            if i in wrapped:
                continue
            if tensor._version != self._versions[i] or tensor.data_ptr() != start + place.offset:
                problem = (
                    f"layer {self.index}: {self._names[i]} was written to while it was streamed; it must be frozen"
                )
            tensor.data = self._home[i]
        for module, name, parameter, _ in self._wrapped:
            module._parameters[name] = parameter
        return problem

    @property
    def trainable(self) -> str | None:
        """Name of a streamed tensor that wants a gradient."""
        return next((n for n, t in zip(self._names, self._tensors, strict=True) if t.requires_grad), None)

    def restore(self) -> None:
        """The tensors as they were before :meth:`settle`: on their device, in memory of their own."""
        if not self._home:
            return
        if self._kept:
            self._point(self._kept)
        else:
            _, home = self._pieces[0]
            memory = [
                home[r.offset : r.offset + r.nbytes].to(r_device, copy=True)
                for r, r_device in zip(self._regions, self._region_devices(), strict=True)
            ]
            data = []
            for i, place in enumerate(self._places):
                region = self._regions[self._region_of[i]]
                inner = _Place(place.offset - region.offset, place.dtype, place.size, place.stride)
                data.append(view_of(memory[self._region_of[i]], inner))
            self._point(data)
        self._kept, self._home, self._pieces = [], [], []

    def _region_devices(self) -> list[torch.device]:
        devices: dict[int, torch.device] = {}
        for i, position in enumerate(self._region_of):
            devices[position] = self._devices[i]
        return [devices[position] for position in range(len(self._regions))]
