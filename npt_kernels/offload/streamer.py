"""Frozen layers on their way: two device buffers, the layer at work in one, the next one arriving in the other.

A layer is *current* from the moment any of its modules is called until another layer's is; nothing has to say that it is done.
So the same hooks serve forwards, several micro-batches per visit, generation, and backward passes, in which a checkpointed
layer is computed again and a saved weight is asked for again. Between visits a layer's tensors are those of its home, in host
memory: whoever reads them (fingerprints, ``state_dict``) reads the right numbers.

Which layer comes next is predicted from what followed the last time on the same two layers, so a walk that stops early, one
that wraps around and the way back of a backward pass are all learned in one round; a wrong guess costs a wait, never a wrong
number.

On a GPU, copies run on a side stream. It waits for the event that the compute stream recorded when the buffer's last layer
retired; the compute stream waits for the event recorded behind the copy. **Unverified on hardware.** On a CPU the same code
copies into a second host buffer.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..model.select import find_layers
from ..model.weight_location import set_residence
from .weights import LayerWeights, layer_tensors, parts_of, rebuild

__all__ = ["LayerStreamer", "Transfers"]


@dataclass
class Transfers:
    """What has been moved so far.

    Attributes:
        fetches, bytes: Layers copied to the device, and their bytes.
        misses: Fetches of a layer at the moment it was needed, because another one was expected (or none, at the start).
        host_seconds: Time that the program itself spent copying or waiting for a copy. On a GPU with pinned memory copies are
            only enqueued; there ``stall_seconds`` tells.
        stall_seconds: GPU, ``timed=True``: time that the compute stream stood still for a transfer.
    """

    fetches: int = 0
    bytes: int = 0
    misses: int = 0
    host_seconds: float = 0.0
    stall_seconds: float = 0.0


class _Slot:
    """One device buffer and the layer in it, if any."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.index: int | None = None
        self.pending: Future[None] | None = None
        #: GPU: recorded behind the copy into the buffer, and behind the last work that read it.
        self.ready = torch.cuda.Event() if device.type == "cuda" else None
        self.free = torch.cuda.Event() if device.type == "cuda" else None
        if self.free is not None:
            # The allocator may have given memory that work enqueued earlier still reads.
            self.free.record(torch.cuda.current_stream(device))


@dataclass(frozen=True)
class _Saved:
    """What autograd keeps instead of a streamed weight: where it is found again. ``places``: bytes and layout per part."""

    index: int
    tensor: Tensor
    places: list[tuple[int, torch.dtype, torch.Size, tuple[int, ...]]] | None


class LayerStreamer:
    """Context manager: inside it the decoder layers' frozen weights live on the host and visit ``device`` in turn.

    Everything else of the model (embeddings, norms, head, NP components) is on ``device`` inside the block. Afterwards the model
    is as before, bit for bit and device for device; so it is after an exception. Results are those of a resident model,
    bitwise. Layers must be frozen while they run with gradients; NP components may be added, trained and removed inside.

    Args:
        model: A model with decoder layers that NPT knows, converted or not.
        device: Where layers compute.
        where: ``"host"``: pinned host memory (ordinary memory if it cannot be pinned; ``notes`` says so). ``"disk"``: mapped
            files; what is not mapped yet is written to a file that goes with the context.
        folder: ``"disk"``: for those files; default the system's temporary folder.
        timed: GPU: measure ``transfers.stall_seconds`` (two events more per visit).

    Attributes:
        transfers: :class:`Transfers` since the start.
        notes: What deserves a line.
        layer_bytes: Streamed bytes of every layer.
        device_bytes: Of the two buffers.

    Raises:
        ValueError: No decoder layers, weights that are on ``meta``, or a model that accelerate's hooks already move.
        OSError: ``"disk"``: no room for the files.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str,
        *,
        where: Literal["host", "disk"] = "host",
        folder: str | Path | None = None,
        timed: bool = False,
    ) -> None:
        if where not in ("host", "disk"):
            raise ValueError(f"where={where!r} is not known; choose host or disk")
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise ValueError(
                "the model was loaded with a device_map, whose hooks move its weights; load it without to stream it"
            )
        self.model, self.device, self.where = model, torch.device(device), where
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.folder = None if folder is None else Path(folder)
        self.timed = timed and self.device.type == "cuda"
        self.layers = list(find_layers(model)[1])
        self.transfers, self.notes = Transfers(), list[str]()
        self.layer_bytes: list[int] = []
        self._weights: list[LayerWeights] = []
        self._slots: list[_Slot] = []
        self._moved: list[tuple[Tensor, torch.device]] = []
        self._side: Any = None
        self._worker: ThreadPoolExecutor | None = None
        self._stack = ExitStack()
        self._current: int | None = None
        self._trail: tuple[int | None, int | None] = (None, None)  # the last two layers
        self._followers: dict[tuple[int | None, int | None], int] = {}
        self._stalls: list[tuple[Any, Any]] = []

    @property
    def device_bytes(self) -> int:
        return sum(slot.buffer.numel() for slot in self._slots)

    # ---- start and end -----------------------------------------------------------------------------------------------

    def __enter__(self) -> LayerStreamer:
        if self._weights:
            raise RuntimeError("this LayerStreamer is already in use")
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._start()
        except BaseException:
            with torch.inference_mode(False), torch.no_grad():
                self._end()
            raise
        return self

    def _start(self) -> None:
        stay = _used_elsewhere(self.model, self.layers)
        where = self.where
        folder = None
        for index, layer in enumerate(self.layers):
            set_residence(layer, self)
            self._stack.callback(set_residence, layer, None)
            weights = LayerWeights(index, layer, stay)
            self._weights.append(weights)
            if where == "disk" and not weights.mapped and weights.nbytes and folder is None:
                folder = Path(tempfile.mkdtemp(prefix="npt-layers-", dir=self.folder))
                self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
            weights.settle(self._home(weights, folder))
        self.layer_bytes = [weights.nbytes for weights in self._weights]
        self._move_the_rest()
        self._slots = [_Slot(max(self.layer_bytes), self.device) for _ in range(2)]
        if self.device.type == "cuda":
            self._side = torch.cuda.Stream(self.device)
        if where == "disk" or (self.device.type == "cuda" and self.notes):
            # A copy out of ordinary memory or a file holds up whoever asks for it: someone else shall.
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="npt-streaming")
            self._stack.callback(self._worker.shutdown)
        for index, layer in enumerate(self.layers):
            # transformers recomputes a checkpointed layer below its own hooks, so its children call too.
            for module in (layer, *layer.children()):
                handle = module.register_forward_pre_hook(_Caller(self, index), prepend=True)
                self._stack.callback(handle.remove)
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._stack.enter_context(hooks)

    def _home(self, weights: LayerWeights, folder: Path | None) -> Tensor | None:
        if self.where == "disk":
            if weights.mapped or not weights.nbytes:
                return None
            assert folder is not None
            return self._file(weights, folder)
        return self._memory(weights.nbytes)

    def _memory(self, nbytes: int) -> Tensor:
        """Host memory for one layer, pinned where a GPU will read it."""
        if self.device.type == "cuda" and not self.notes:
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                self.notes.append(
                    f"streaming: host memory could not be pinned ({reason}); transfers are slower without"
                )
        return torch.empty(nbytes, dtype=torch.uint8)

    def _file(self, weights: LayerWeights, folder: Path) -> Tensor:
        free = shutil.disk_usage(folder).free
        if free < weights.nbytes:
            raise OSError(
                f"no room in {folder} for layer {weights.index}: need {weights.nbytes / 2**20:,.0f} MiB, have "
                f"{free / 2**20:,.0f} MiB; point paths.cache_dir at a larger disk"
            )
        # Only pages that the kernel has not written out yet take memory.
        path = folder / f"layer-{weights.index:03d}.bin"
        return torch.from_file(str(path), shared=True, size=weights.nbytes, dtype=torch.uint8)

    def _move_the_rest(self) -> None:
        """All that is not streamed to the device: objects stay, so tied weights stay tied."""
        streamed = {id(t) for layer in self.layers for t in layer_tensors(layer).values()}
        staying = {id(t) for weights in self._weights for t in weights.staying}
        seen: set[int] = set()
        for tensor in (*self.model.parameters(), *self.model.buffers(), *(t for w in self._weights for t in w.staying)):
            if id(tensor) in seen or (id(tensor) in streamed and id(tensor) not in staying):
                continue
            seen.add(id(tensor))
            if tensor.device != self.device:
                self._moved.append((tensor, tensor.device))
                tensor.data = tensor.data.to(self.device)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with torch.inference_mode(False), torch.no_grad():
            problem = self._end()
        if problem is not None and kind is None:
            raise RuntimeError(problem)

    def _end(self) -> str | None:
        for slot in self._slots:
            if slot.pending is not None:
                with suppress(Exception):
                    slot.pending.result()
        if self._side is not None:
            # Buffers go back to the allocator of the compute stream: no copy into them may be under way.
            self._side.synchronize()
            torch.cuda.current_stream(self.device).synchronize()
        problem = self._retire()
        if self.timed:
            self.measure()
        for weights in self._weights:
            weights.restore()
        for tensor, device in self._moved:
            tensor.data = tensor.data.to(device)
        self._take_back_components()
        self._stack.close()
        self._weights, self._slots, self._moved, self._side, self._worker = [], [], [], None, None
        self._trail = (None, None)
        return problem

    def _take_back_components(self) -> None:
        """NP components made inside go where their layer is now."""
        for layer in self.layers:
            component = getattr(layer, "np_component", None)
            if isinstance(component, nn.Module):
                own = {id(p) for p in component.parameters()}
                device = next(p.device for p in layer.parameters() if id(p) not in own)
                for parameter in component.parameters():
                    if parameter.device != device:
                        parameter.data = parameter.data.to(device)

    # ---- visits ------------------------------------------------------------------------------------------------------

    @contextmanager
    def hold(self, layer: nn.Module) -> Iterator[None]:
        """Inside the block ``layer`` is on the device, as long as no other layer is called."""
        self.acquire(next(i for i, other in enumerate(self.layers) if other is layer))
        yield

    def acquire(self, index: int) -> None:
        """Make layer ``index`` current, and start fetching the one expected next."""
        if index == self._current:
            return
        if not self._slots:
            raise RuntimeError(
                "a streamed layer was used outside its LayerStreamer; run the backward pass inside it too"
            )
        weights = self._weights[index]
        if torch.is_grad_enabled() and (name := weights.trainable) is not None:
            raise RuntimeError(
                f"layer {index}: {name} requires a gradient, but streamed weights are frozen; convert the model with apply_npt, "
                "or call model.requires_grad_(False), before anything runs with gradients"
            )
        with torch.inference_mode(False), torch.no_grad():
            working = None if self._current is None else self._slot_of(self._current)
            problem = self._retire()
            if problem is not None:
                raise RuntimeError(problem)
            slot = self._slot_of(index)
            if slot is None:
                # Into the buffer that is not being read: what was expected there is not wanted.
                slot = next(slot for slot in self._slots if slot is not working)
                self.transfers.misses += 1
                self._fetch(index, slot)
            self._arrive(slot)
            weights.activate(slot.buffer)
            self._current = index
            self._followers[self._trail] = index
            self._trail = self._trail[1], index
            expected = self._expected()
            other = next(s for s in self._slots if s is not slot)
            if expected not in (index, other.index):
                self._fetch(expected, other)

    def _slot_of(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.index == index), None)

    def _expected(self) -> int:
        """What followed the last two layers last time; at first: on in the same direction, and around at the top."""
        known = self._followers.get(self._trail)
        if known is not None:
            return known
        before, now = self._trail
        assert now is not None
        if before == now + 1 and now > 0:
            return now - 1
        return (now + 1) % len(self.layers)

    def _retire(self) -> str | None:
        """The current layer back home; its buffer may be overwritten once the work enqueued by now is done."""
        if self._current is None:
            return None
        slot = self._slot_of(self._current)
        assert slot is not None
        problem = self._weights[self._current].retire(slot.buffer)
        self._current = None
        if slot.free is not None:
            slot.free.record(torch.cuda.current_stream(self.device))
        return problem

    def _fetch(self, index: int, slot: _Slot) -> None:
        if slot.pending is not None:  # a copy that nobody waited for
            slot.pending.result()
            slot.pending = None
        slot.index = index
        self.transfers.fetches += 1
        self.transfers.bytes += self._weights[index].nbytes
        if self._worker is not None:
            slot.pending = self._worker.submit(self._copy, index, slot)
            return
        started = time.perf_counter()
        self._copy(index, slot)
        self.transfers.host_seconds += time.perf_counter() - started

    @torch.no_grad()
    def _copy(self, index: int, slot: _Slot) -> None:
        if self._side is None:
            self._weights[index].load(slot.buffer)
            return
        assert slot.free is not None and slot.ready is not None
        with torch.cuda.device(self.device), torch.cuda.stream(self._side):
            self._side.wait_event(slot.free)
            self._weights[index].load(slot.buffer, non_blocking=True)
            slot.ready.record(self._side)

    def _arrive(self, slot: _Slot) -> None:
        """Work enqueued from here on sees the layer in ``slot``."""
        if slot.pending is not None:
            started = time.perf_counter()
            slot.pending.result()
            slot.pending = None
            self.transfers.host_seconds += time.perf_counter() - started
        if slot.ready is None:
            return
        stream = torch.cuda.current_stream(self.device)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.timed else []
        if marks:
            marks[0].record(stream)
        stream.wait_event(slot.ready)
        if marks:
            marks[1].record(stream)
            self._stalls.append((marks[0], marks[1]))
            if len(self._stalls) >= 4096:
                self.measure()

    def measure(self) -> Transfers:
        """``transfers`` with ``stall_seconds`` up to now; waits for the GPU."""
        if self._stalls:
            torch.cuda.current_stream(self.device).synchronize()
            self.transfers.stall_seconds += sum(a.elapsed_time(b) for a, b in self._stalls) / 1e3
            self._stalls.clear()
        return self.transfers

    # ---- backward passes ---------------------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> Any:
        """Autograd saves a tensor. If it lies in a buffer, which another layer will overwrite, save where it is found."""
        wrapped = is_traceable_wrapper_subclass(tensor)
        if not wrapped and not isinstance(tensor, nn.Parameter) and type(tensor) is not Tensor:
            source = getattr(tensor, "source", None)  # a quantised weight that is made dense when it is used
            if self._current is not None and any(m is source for m in self.layers[self._current].modules()):
                return _Saved(self._current, tensor, None)
            return tensor
        parts = parts_of(tensor)
        if any(part.layout is not torch.strided or part.is_meta for part in parts):
            return tensor.detach()
        storages = [part.untyped_storage().data_ptr() for part in parts]
        slot = next((s for s in self._slots if s.buffer.untyped_storage().data_ptr() in storages), None)
        if slot is None or slot.index is None:
            return tensor.detach()  # itself would be a cycle where it is the output of its node
        places = [
            (int(part.storage_offset()) * part.element_size(), part.dtype, part.shape, part.stride()) for part in parts
        ]
        return _Saved(slot.index, tensor.detach() if wrapped else tensor.new_empty(0), places)

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Saved):
            return saved
        self.acquire(saved.index)
        if saved.places is None:
            return saved.tensor
        slot = self._slot_of(saved.index)
        assert slot is not None
        parts = [
            torch.empty(0, dtype=dtype, device=self.device).set_(
                slot.buffer.untyped_storage(), offset // dtype.itemsize, size, stride
            )
            for offset, dtype, size, stride in saved.places
        ]
        return rebuild(saved.tensor, iter(parts))


@dataclass(frozen=True)
class _Caller:
    """Hook in front of a module of layer ``index``."""

    #: For ``model/mlp.py``: a module with this hook alone still computes what its weights say.
    only_moves_weights: ClassVar[bool] = True

    streamer: LayerStreamer
    index: int

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.streamer.acquire(self.index)


def _used_elsewhere(model: nn.Module, layers: list[nn.Module]) -> set[int]:
    """Ids of tensors that several layers, or a layer and something outside, hold: such a tensor cannot come and go."""
    inside = [{id(t) for t in layer_tensors(layer).values()} for layer in layers]
    own = {id(module) for layer in layers for module in layer.modules()}
    outside = {
        id(t)
        for module in model.modules()
        if id(module) not in own
        for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    shared = set(outside)
    seen: set[int] = set()
    for ids in inside:
        shared |= ids & seen
        seen |= ids
    return shared
