"""What can be measured: ops × shapes × tokens × ranks × modes × providers, filters over it, and the plan of a run.

Without filters a run takes two slices through the grid of every op, shape and mode: all token counts at one rank, all ranks
at one token count. ``--tokens`` and ``--rank`` together give their whole product, with any numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from ..measure.reference import MODES
from ..measure.shapes import MODELS, Case, ModelShape
from ..rules import RULES
from .costs import minimum_bytes, minimum_flops
from .providers import BASELINE, PROVIDERS, Provider, find_provider
from .results import BenchError, unknown_name

__all__ = [
    "DTYPES", "OPS", "Filters", "Setting", "default_dtype", "estimate", "find_shape", "plan_settings", "settings_of_part",
]  # fmt: skip

_Group = TypeVar("_Group")

#: ``--op`` → the package's op.
OPS = {"mlp": "mlp", "linear": "factored_linear", "norm": "matched_norm"}
_OP_MODES = {"mlp": tuple(MODES), "linear": tuple(MODES), "norm": ("forward", "end_to_end")}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Grid:
    """Token counts and ranks of a size, and where the two slices cross."""

    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    base_tokens: int
    base_rank: int
    decode_tokens: tuple[int, ...]
    #: Compilation takes some 20 s a shape, so unasked it is done at these token counts only.
    compiled_tokens: tuple[int, ...]
    #: Models that run unasked.
    shapes: tuple[str, ...]
    #: Modes that run unasked.
    modes: tuple[str, ...] = tuple(MODES)
    #: Ops and modes in which ``compile`` takes part unasked; empty: all.
    compiled: tuple[tuple[str, str], ...] = ()
    #: Providers that build a weight for every token take part unasked up to this many tokens.
    slow_tokens: int = 2**31


#: ``cpu``: the real shapes of models that one runs on a CPU, in ten minutes on two cores.
GRIDS = {
    "full": Grid(
        tokens=(1, 16, 256, 2048, 8192, 32768), ranks=(8, 64, 256, 1024), base_tokens=8192, base_rank=64,
        decode_tokens=(1, 16), compiled_tokens=(16, 2048, 8192), shapes=("GPT-2", "1B", "8B", "70B"),
    ),
    "cpu": Grid(
        tokens=(1, 16, 256, 1024), ranks=(64, 128, 256), base_tokens=256, base_rank=128,
        decode_tokens=(1, 16), compiled_tokens=(1, 16, 256, 1024), shapes=("SmolLM2", "GPT-2"),
        modes=("forward", "local", "end_to_end"),  # without CUDA graphs decode is forward
        compiled=(("mlp", "forward"), ("mlp", "local"), ("mlp", "end_to_end")), slow_tokens=16,
    ),
    "small": Grid(
        tokens=(1, 16, 64), ranks=(4, 16, 64), base_tokens=64, base_rank=16,
        decode_tokens=(1, 16), compiled_tokens=(64,), shapes=("GPT-2", "8B"), compiled=(("mlp", "local"),),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One group of rows: its providers are timed against each other on the same tensors."""

    op: str
    model: ModelShape
    mode: str
    tokens: int
    rank: int
    rule: str
    dtype: torch.dtype
    providers: tuple[Provider, ...]

    @property
    def case(self) -> Case:
        return Case(OPS[self.op], self.model, self.tokens, self.dtype, rule=self.rule, rank=self.rank)

    def __str__(self) -> str:
        rank = "" if self.op == "norm" else f" r={self.rank}"
        return f"{self.op} {self.mode} {self.model.title} T={self.tokens}{rank}"

    def row(self) -> dict[str, object]:
        """The fields that say which setting a row is of."""
        return {
            "op": self.op, "shape": self.model.title, "d": self.model.d, "f": self.model.f, "mode": self.mode,
            "tokens": self.tokens, "rank": None if self.op == "norm" else self.rank, "rule": self.rule,
            "dtype": str(self.dtype).removeprefix("torch."),
        }  # fmt: skip


@dataclass(frozen=True)
class Filters:
    """What the command line narrows a run to; empty: everything."""

    ops: Sequence[str] = ()
    shapes: Sequence[str] = ()
    providers: Sequence[str] = ()
    modes: Sequence[str] = ()
    tokens: Sequence[int] = ()
    ranks: Sequence[int] = ()
    rule: str = "self_key"


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where it runs everywhere at the speed people get."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def find_shape(name: str) -> ModelShape:
    """The model of that name: ``8B``, ``llama-3.1-8b``, ``gpt2`` …, in any case. Raises :class:`BenchError`."""
    known = {key: shape for shape in MODELS.values() for key in (_plain(shape.name), _plain(shape.title))}
    if _plain(name) not in known:
        titles = {form: shape.title for shape in MODELS.values() for form in (shape.name.lower(), shape.title.lower())}
        raise unknown_name("--shape", name, list(dict.fromkeys(titles.values())), titles)
    return known[_plain(name)]


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum() or c == ".")


def plan_settings(filters: Filters, size: str, dtype: torch.dtype) -> list[Setting]:
    """The groups of a run, in the order in which they run. Raises :class:`BenchError` for what does not exist."""
    grid = GRIDS[size]
    ops = _chosen("--op", filters.ops, list(OPS))
    modes = _chosen("--mode", filters.modes or grid.modes, list(MODES))
    if filters.rule not in RULES:
        raise unknown_name("--rule", filters.rule, RULES)
    for option, values in (("--tokens", filters.tokens), ("--rank", filters.ranks)):
        for value in values:
            if value < 1:
                raise BenchError(f"{option} {value} must be at least 1")
    shapes = [find_shape(name) for name in filters.shapes] or [MODELS[name] for name in grid.shapes]
    shapes = [shape.small() if size == "small" else shape for shape in dict.fromkeys(shapes)]
    providers = _providers(filters.providers)
    settings = []
    for op in ops:
        for shape in shapes:
            for mode in modes:
                if mode not in _OP_MODES[op]:
                    continue
                for tokens, rank in _points(grid, filters, mode, op):
                    if rank > shape.d and not filters.ranks:
                        continue  # at rank = d the change is already exact
                    setting = Setting(op, shape, mode, tokens, rank, filters.rule, dtype, tuple(providers))
                    if not filters.providers:
                        takes_part = _unasked(grid, setting)
                        setting = replace(setting, providers=tuple(p for p in providers if takes_part(p)))
                    settings.append(setting)
    if not settings:
        raise BenchError(
            f"nothing to run: --op {' '.join(ops)} has no mode {' '.join(modes)}; norm has {' and '.join(_OP_MODES['norm'])}"
        )
    return settings


def _chosen(option: str, asked: Sequence[str], known: list[str]) -> list[str]:
    normal = [name.lower().replace("-", "_") for name in asked]
    for name, original in zip(normal, asked, strict=True):
        if name not in known:
            raise unknown_name(option, original, known)
    return [name for name in known if name in normal] if normal else known


def _providers(names: Sequence[str]) -> list[Provider]:
    if not names:
        return list(PROVIDERS.values())
    chosen = {find_provider(name).name for name in names} | {BASELINE}
    return [provider for provider in PROVIDERS.values() if provider.name in chosen]


def _unasked(grid: Grid, setting: Setting) -> Callable[[Provider], bool]:
    """Whether a provider takes part without being named: where it makes sense, and slow ones not where only the rank changes."""
    base = setting.rank == grid.base_rank
    compiles = base and setting.tokens in grid.compiled_tokens
    compiles = compiles and (not grid.compiled or (setting.op, setting.mode) in grid.compiled)
    slow = base and setting.tokens <= grid.slow_tokens

    def takes_part(provider: Provider) -> bool:
        if not provider.applies(setting.case, setting.mode):
            return False
        return compiles if provider.name == "compile" else slow or not provider.slow

    return takes_part


def _points(grid: Grid, filters: Filters, mode: str, op: str) -> list[tuple[int, int]]:
    tokens = grid.decode_tokens if mode == "decode" else grid.tokens
    base_tokens = grid.decode_tokens[0] if mode == "decode" else grid.base_tokens
    if filters.tokens and filters.ranks:
        points = [(t, r) for t in filters.tokens for r in filters.ranks]
    elif filters.tokens:
        points = [(t, grid.base_rank) for t in filters.tokens]
    elif filters.ranks:
        points = [(base_tokens, r) for r in filters.ranks]
    else:
        points = [(t, grid.base_rank) for t in tokens]
        points += [(base_tokens, r) for r in grid.ranks if r != grid.base_rank]
    if op == "norm":
        points = [(t, grid.base_rank) for t in dict.fromkeys(t for t, _ in points)]
    return list(dict.fromkeys(points))


def estimate(setting: Setting, device: torch.device, rounds: int, slow_limit: float = 5.0) -> float:
    """Seconds that a group will take, roughly: arithmetic at a guessed rate, per-call overheads, compilation, the check."""
    tflops, tbs = (400.0, 3.0) if device.type == "cuda" else (0.06, 0.008)
    overhead = 50e-6 if device.type == "cuda" else 150e-6
    seconds = 0.02 if device.type == "cuda" else 0.01
    for provider in setting.providers:
        if provider.why_not(setting.case, setting.mode, device) is not None:
            continue
        once = max(
            minimum_flops(setting.case, setting.mode, provider.function) / tflops / 1e12,
            minimum_bytes(setting.case, setting.mode, provider.function) / tbs / 1e12,
        )
        calls = 2 * rounds + 4
        if provider.slow:
            once, calls = slow_seconds(setting, tbs), 8
            if once > slow_limit:
                continue
        seconds += calls * (once + overhead) + (20.0 if provider.name == "compile" else 0.0)
    # The check: plain form in float64, forward and backward, and once in the dtype.
    return seconds + 10 * minimum_flops(setting.case, setting.mode, "npt") / (tflops / 8) / 1e12


def slow_seconds(setting: Setting, tbs: float) -> float:
    """Seconds of one call that builds a weight per token: written, read and added, three projections of an MLP."""
    case = setting.case
    projections = len(case.model.targets) if setting.op == "mlp" else 1
    passes, launches = (4, 60e-6) if setting.mode in ("forward", "decode") else (12, 180e-6)
    weight = case.model.d * case.model.f * case.dtype.itemsize
    return case.tokens * projections * (passes * weight / tbs / 1e12 + launches)


def settings_of_part(settings: list[_Group], part: tuple[int, int] | None, seconds: list[float]) -> list[_Group]:
    """Part ``i`` of ``n``: consecutive groups of about equal estimated time; the parts together are the whole."""
    if part is None:
        return settings
    index, count = part
    total, done = sum(seconds), 0.0
    chosen = []
    for setting, cost in zip(settings, seconds, strict=True):
        if min(count, 1 + int(count * (done + cost / 2) / total)) == index:
            chosen.append(setting)
        done += cost
    return chosen
