"""Several processes, one run: who is who, what they agree on, and how their gradients become one.

accelerate and torch.distributed supply process groups, devices, precision and trackers. Gradients are summed here instead of by
DDP's reducer: that one reduces when *one* backward has met every parameter, but local training runs one backward per layer
and micro-batch, most of them without a forward of the wrapped model. NP parameters are few (Llama-3.1-8B, rank 64: 1 % of the
base, 0.28 GiB in fp32), so one flat all-reduce per optimizer step costs little whatever the objective does.

All ranks take the same decisions: what one of them learns (out of memory, Ctrl-C) reaches the others through
:meth:`World.agree` before the next collective that assumes they are all there.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..configs.schema import ConfigError, RunConfig
from ..model.install import converted_layers, install, make_component, npt_config, npt_parameters
from ..model.save import adapter_state_dict
from ..model.select import plan_layers

__all__ = ["OtherRankError", "World", "choose_device", "first_to_say"]

T = TypeVar("T")

#: A rank that is this late in a collective of training has died or hangs.
_STEP_TIMEOUT = timedelta(minutes=30)
#: Waiting for rank 0 may take long: it downloads, tokenises, converts, saves. If it dies, the launcher ends the others.
_WAIT_TIMEOUT = timedelta(hours=12)
#: After an error: how far apart ranks notice it that do not wait for each other, and below the 30 s that torchrun gives.
_CALL_TIMEOUT = timedelta(seconds=15)


def choose_device() -> torch.device:
    """A GPU if torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class OtherRankError(RuntimeError):
    """Another process failed and has said why; this one only stops."""


@dataclass
class World:
    """The processes of a run, seen from one of them. With one process every method is trivial and free.

    Attributes:
        rank, size: This process's number and how many there are.
        local_rank: Its number on its machine.
        device: Where this process computes.
        sharded: Whether the frozen base is to be sharded (``optimization.distributed: fsdp``).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sharded: bool = False
    _control: Any = None
    _calls: int = 0

    # ---- start and end -----------------------------------------------------------------------------------------------

    @classmethod
    def join(cls, config: RunConfig) -> World:
        """Start the process groups if a launcher (``torchrun``, ``accelerate launch``) started several processes.

        Raises:
            ConfigError: Settings that cannot work together, or a launcher that asks for DeepSpeed.
        """
        mode = _mode(config)
        if _flag("ACCELERATE_USE_DEEPSPEED"):
            raise ConfigError(
                "npt train does not run under DeepSpeed: its engine owns backward and optimizer, and local training runs one "
                "backward per layer. Use optimization.distributed=fsdp (same memory), or your own loop (docs/distributed.md)"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls(device=choose_device())
        from accelerate import PartialState

        _check(config, mode)
        # Without a GPU accelerate starts several processes only if it is told that the CPU is meant.
        cpu = not torch.cuda.is_available() or _flag("ACCELERATE_USE_CPU")
        state = PartialState(cpu=cpu, timeout=_STEP_TIMEOUT)
        # On the host and apart from training's collectives: no GPU waits for it, and its time limit is its own.
        control = dist.new_group(backend="gloo", timeout=_WAIT_TIMEOUT)
        return cls(
            state.process_index, state.num_processes, state.local_process_index, state.device, mode == "fsdp", control
        )

    def leave(self) -> None:
        """End the process groups. Safe to call in any state, once all work is done."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    # ---- who speaks, who writes --------------------------------------------------------------------------------------

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and logs."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self._control)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block alone, then the others do and find its files (downloads, caches).

        Raises:
            OtherRankError: On the others, if rank 0 failed in it.
        """
        if self.size == 1:
            yield
        elif self.is_main:
            try:
                yield
            except BaseException:
                self.agree(1)
                raise
            self.agree(0)
        else:
            if self.agree(0)[0]:
                raise OtherRankError("rank 0 failed")
            yield

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Run ``work`` on rank 0 while the others wait; its result there, ``None`` elsewhere.

        Raises:
            OtherRankError: On the others, if rank 0 failed in it.
        """
        return self.together(work if self.is_main else lambda: None)

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work`` on every rank; it counts only if it worked on all.

        Raises:
            OtherRankError: If it failed on another rank only.
        """
        try:
            result = work()
        except BaseException:
            self.agree(self.rank + 1)
            raise
        if failed := self.agree(0)[0]:
            raise OtherRankError(f"rank {failed - 1} failed")
        return result

    def all_here(self) -> bool:
        """Whether every rank comes here within seconds: after an error, before anything that needs all of them."""
        if self.size == 1:
            return True
        # Through the store, not a collective: a rank that waits inside another collective must not be taken for one that came.
        # (gloo's monitored_barrier keeps its time limit on rank 0 only; the others waited for hours.)
        self._calls += 1
        store, keys = _store(), [f"npt/here/{self._calls}/{rank}" for rank in range(self.size)]
        try:
            store.set(keys[self.rank], "")
            store.wait(keys, _CALL_TIMEOUT)
        except RuntimeError:
            return False
        return True

    # ---- agreeing ----------------------------------------------------------------------------------------------------

    def agree(self, *values: int) -> tuple[int, ...]:
        """The largest of every value over all ranks. Every rank must call it with as many values."""
        return tuple(int(v) for v in self._reduce(values, torch.int64, dist.ReduceOp.MAX))

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum of every value over all ranks, in float64 and the same on every rank."""
        return [float(v) for v in self._reduce(values, torch.float64, dist.ReduceOp.SUM)]

    def broadcast(self, value: T) -> T:
        """Rank 0's value (anything that pickles), on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value (anything that pickles), in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def _reduce(self, values: Sequence[float], dtype: torch.dtype, op: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=dtype)
        dist.all_reduce(tensor, op=op, group=self._control)
        return tensor.tolist()  # type: ignore[no-any-return]

    # ---- a step ------------------------------------------------------------------------------------------------------

    def check_sequences(self, count: int) -> None:
        """Raise :class:`ConfigError` if there are fewer training sequences than ranks."""
        if count < self.size:
            raise ConfigError(
                f"{count} training sequences cannot be divided over {self.size} processes; give more text, lower "
                f"data.max_length, or start at most {max(count, 1)}"
            )

    def level(self, micro_batches: list[Tensor], shares: list[float]) -> tuple[list[Tensor], list[float]]:
        """As many micro-batches on every rank, by adding ones of one sequence and share 0.

        Only where the base is sharded: every forward gathers weights from all ranks, so all must run equally many.
        """
        if not self.sharded or self.size == 1:
            return micro_batches, shares
        count, length = self.agree(len(micro_batches), max((ids.shape[1] for ids in micro_batches), default=0))
        missing = count - len(micro_batches)
        filler = torch.zeros(1, length, dtype=torch.int64, device=self.device)
        return [*micro_batches, *[filler] * missing], [*shares, *[0.0] * missing]

    @torch.no_grad()
    def reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum ``.grad`` over all ranks, once per optimizer step, in one flat buffer of fp32 (fp64 for fp64 parameters).

        Micro-batches are weighted by their share of the *global* step, so the sum is the gradient of one process on all of
        it. A rank without rows adds zeros. The result is bitwise the same on every rank.
        """
        if self.size == 1 or not parameters:
            return
        dtype = functools.reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        flat = torch.cat(
            [
                torch.zeros(p.numel(), dtype=dtype, device=p.device) if p.grad is None else p.grad.reshape(-1).to(dtype)
                for p in parameters
            ]
        )
        for parameter in parameters:
            parameter.grad = None  # before the views below exist: two copies of the gradients, not three
        dist.all_reduce(flat)
        for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)

    def mean_losses(
        self, values: Mapping[str, float], layers: Mapping[int, float], expected: Sequence[int]
    ) -> tuple[dict[str, float], dict[int, float]]:
        """``(values, layers)`` summed over ranks: weighted means of the global step, if every rank brings share-weighted sums.

        Args:
            values: Name → share-weighted sum of this rank; the same names on every rank.
            layers: Layer index → the same; empty on a rank without rows.
            expected: The indices that ``layers`` has where there are rows.
        """
        if self.size == 1:
            return dict(values), dict(layers)
        sums = self.sums([*values.values(), *(layers.get(index, 0.0) for index in expected)])
        return dict(zip(values, sums, strict=False)), dict(zip(expected, sums[len(values) :], strict=True))

    # ---- NP components -----------------------------------------------------------------------------------------------

    def copy_adapter(self, model: nn.Module) -> None:
        """Give every rank rank 0's NP components: layers, ranks and numbers. The others' models may be unconverted.

        The closed form runs on rank 0 alone: on GPUs its last bits, and so the ranks that ``auto`` allots, may differ.
        """
        if self.size == 1:
            return
        header = None
        if self.is_main:
            own = converted_layers(model)
            header = npt_config(model), list(own), [layer.np_component.rank for layer in own.values()]
        header = self.broadcast(header)
        assert header is not None
        if not self.is_main and not converted_layers(model):
            config, layers, ranks = header
            choices, _, _ = plan_layers(model, replace(config, layers=layers))
            components = [make_component(choice, config, rank) for choice, rank in zip(choices, ranks, strict=True)]
            install(model, config, choices, components)
        for parameter in npt_parameters(model):
            # Through the device of the process group: NCCL has no collectives for the host.
            data = parameter.data.to(self.device)
            dist.broadcast(data, src=0)
            with torch.no_grad():  # not through .data: the change must be seen (NPComponent.tensors)
                parameter.copy_(data)

    def check_replicas(self, model: nn.Module) -> None:
        """Raise ``RuntimeError`` unless the NP parameters are bitwise the same on all ranks, naming the first that is not."""
        if self.size == 1:
            return
        names: list[str] = []
        sums: list[int] = []
        for name, tensor in adapter_state_dict(model).items():
            names.append(name)
            sums += _checksums(tensor)
        low, high = (self._reduce(sums, torch.int64, op) for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX))
        differing = [names[i // 2] for i, (a, b) in enumerate(zip(low, high, strict=True)) if a != b]
        if differing:
            raise RuntimeError(
                f"NP parameters differ between ranks, first {differing[0]} ({len(set(differing))} of {len(names)}); nothing was "
                "saved. This is a bug in npt_kernels or a faulty device, please report it"
            )


_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _checksums(tensor: Tensor) -> tuple[int, int]:
    """Sum of the bit patterns, plain and weighted by position, modulo 2^64: differs if a bit does, or if two entries swap."""
    bits = tensor.detach().contiguous().view(_INTEGER[tensor.element_size()]).reshape(-1).to(torch.int64)
    weights = torch.arange(1, len(bits) + 1, device=bits.device)
    return int(bits.sum()), int((bits * weights).sum())


# ---- settings --------------------------------------------------------------------------------------------------------


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true")


def _mode(config: RunConfig) -> Literal["ddp", "fsdp"]:
    """``optimization.distributed``; ``auto`` becomes what ``accelerate launch`` was configured for, else ``ddp``."""
    if config.optimization.distributed == "auto" and _flag("ACCELERATE_USE_FSDP"):
        config.optimization.distributed = "fsdp"
    # The wish is taken over here. Left in place, it makes accelerate wrap models and from_pretrained leave weights empty.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    return "fsdp" if config.optimization.distributed == "fsdp" else "ddp"


def _check(config: RunConfig, mode: str) -> None:
    o = config.optimization
    if mode != "fsdp":
        return
    for key, used in (
        ("stream_layers", o.stream_layers != "off"),
        ("use_cpu_offload", o.use_cpu_offload),
        ("quantization", o.quantization != "none" or o.use_8bit or o.use_4bit),
    ):
        if used:
            raise ConfigError(
                f"optimization.{key}={getattr(o, key)!r} and distributed=fsdp do not go together; use distributed=ddp"
            )


def first_to_say(message: str) -> bool:
    """Whether this process should print a message that other ranks may have too; the first to ask is the one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return True
    if not dist.is_available() or not dist.is_initialized():
        # Before the processes met, errors come from the command line and files: once per machine.
        return os.environ.get("LOCAL_RANK", "0") == "0"
    digest = hashlib.sha256(message.encode()).hexdigest()[:16]
    try:
        return bool(_store().add(f"npt/said/{digest}", 1) == 1)
    except (RuntimeError, ValueError):  # the store went with rank 0
        return True


def _store() -> Any:
    """The key–value store through which the processes found each other; the launcher holds it, so it outlives rank 0."""
    return dist.distributed_c10d._get_default_store()
