""":class:`NPTConfig`: what to convert and how. Checked when it is made; independent of any model."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["BASES", "INITS", "NPTConfig", "parse_rank", "resolve_layers"]

INITS = ("auto", "closed_form", "small", "published")
BASES = ("fisher", "pca")
_RANGES = ("all", "upper_half", "lower_half")
#: The rule that can equal the original layer without training (docs/method.md).
_CLOSED_FORM_RULE = "self_key"


@dataclass(frozen=True)
class NPTConfig:
    """Conversion settings of :func:`npt_kernels.apply_npt`.

    Attributes:
        layers: ``"all"``, ``"upper_half"``, ``"lower_half"``, a list of indices (negative ones count from the end) or a
            slice such as ``"16:20"``.
        rule: Form of ΔW: ``self_key`` (closed form, the default), ``rank1``, ``diagonal``, ``anchored``.
        rank: r of one term: a whole number, a fraction of the hidden size (0 < r ≤ 1, rounded to a multiple of 8), a list
            with one number per converted layer, or ``"auto:128"``: mean rank 128, allotted over layers by the calibration.
        num_ranks: k, the number of rank-1 terms; R = k·r.
        targets: Linears that change: ``gate``, ``up``, ``down`` (GPT-2: ``c_fc``, ``c_proj``; ``gate``/``up`` and ``down`` are
            taken for them).
        init: ``"auto"`` (closed form if a calibration is given and the rule has one, else small), ``"closed_form"``,
            ``"small"`` (ΔW = 0 at the start), ``"published"`` (small Gaussians on every factor, as earlier recipes).
        basis: Directions the closed form keeps: ``"fisher"`` (weighted by what the loss feels) or ``"pca"``.
        refit: Closed form: fit each layer on the converted model's own stream, so that it also mends the drift of the layers
            below.
        norm_match: Divide by the norm of h + a instead of that of h. ``None``: on for ``self_key``, off for other rules.
        fold: Do without the attention's output projection: what reads its result a reads the bottleneck instead, whose encoder
            the projection is folded into, and the norm match divides by the norm of h + m, m the change of the down projection's
            output. Exact at full rank too. ``None``: wherever that can be: rules without a norm match, and ``self_key`` with
            ``down`` among the targets.
        modulation_scale: Scale of the ``diagonal`` rule.
        attention_residual: Keep the layer as it is, residual included, and let ΔW be an extra change of it: for training a task.
            Starts at ΔW = 0, which is the original; there is nothing to match and no closed form.
        seed: Seed of the random initialisations.

    Raises:
        ValueError: A value that cannot work; one line that names it and what would.
    """

    layers: str | Sequence[int] = "upper_half"
    rule: str = "self_key"
    rank: int | float | str | Sequence[int] = 128
    num_ranks: int = 1
    targets: Sequence[str] = ("gate", "up", "down")
    init: str = "auto"
    basis: str = "fisher"
    refit: bool = True
    norm_match: bool | None = None
    fold: bool | None = None
    modulation_scale: float = 1.0
    attention_residual: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        # Here, not above: the schema of runs imports this file for every --help, and rules import torch (1.2 s, measured).
        from .rules import RULES

        _one_of("rule", self.rule, tuple(RULES))
        _one_of("init", self.init, INITS)
        _one_of("basis", self.basis, BASES)
        if not isinstance(self.num_ranks, int) or isinstance(self.num_ranks, bool) or self.num_ranks < 1:
            raise ValueError(f"num_ranks={self.num_ranks!r} must be a whole number ≥ 1")
        if isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(t.strip() for t in self.targets.split(",") if t.strip()))
        try:
            object.__setattr__(self, "targets", tuple(self.targets))
        except TypeError:
            raise ValueError(
                f"targets={self.targets!r} must be a list of names: gate, up, down (GPT-2: c_fc, c_proj)"
            ) from None
        for target in self.targets:
            if not isinstance(target, str):
                raise ValueError(
                    f"targets contains {target!r}; names are strings: gate, up, down (GPT-2: c_fc, c_proj)"
                )
        if not self.targets:
            raise ValueError("targets is empty; name at least one of gate, up, down (GPT-2: c_fc, c_proj)")
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets={list(self.targets)} names one target twice")
        parse_rank(self.rank)
        if not isinstance(self.layers, str):
            if not isinstance(self.layers, Iterable):
                raise ValueError(
                    f"layers={self.layers!r} is not understood; one layer is written as a list: [{self.layers!r}]"
                )
            object.__setattr__(self, "layers", list(self.layers))
        resolve_layers(self.layers, None)
        if not isinstance(self.refit, bool):
            raise ValueError(f"refit={self.refit!r} must be True or False")
        if not isinstance(self.norm_match, bool | None):
            raise ValueError(f"norm_match={self.norm_match!r} must be True, False or None (on for self_key)")
        if not isinstance(self.fold, bool | None):
            raise ValueError(f"fold={self.fold!r} must be True, False or None (wherever it can be)")
        if self.fold and self.matches_norm and RULES[self.rule].key != "none":
            raise ValueError(
                f"fold=True cannot match the norm under rule={self.rule!r}, whose change of the down projection's output is not "
                "known before that; use norm_match=False or fold=False"
            )
        if isinstance(self.modulation_scale, bool) or not isinstance(self.modulation_scale, int | float):
            raise ValueError(f"modulation_scale={self.modulation_scale!r} must be a number")
        if not abs(self.modulation_scale) <= sys.float_info.max:
            raise ValueError(f"modulation_scale={self.modulation_scale!r} must be a finite number")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or abs(self.seed) >= 2**63:
            raise ValueError(f"seed={self.seed!r} must be a whole number of at most 64 bits")
        if not isinstance(self.attention_residual, bool):
            raise ValueError(f"attention_residual={self.attention_residual!r} must be True or False")
        if self.attention_residual:
            self._check_residual()
        if self.init == "closed_form" and not self.uses_closed_form:
            raise ValueError(
                f"init='closed_form' exists for rule={_CLOSED_FORM_RULE!r} only, not for rule={self.rule!r}; use init='small'"
            )

    def _check_residual(self) -> None:
        if self.norm_match:
            raise ValueError(
                "attention_residual=True keeps the norm of h + a, so there is nothing to match; leave norm_match out"
            )
        if self.fold:
            raise ValueError(
                "attention_residual=True adds the attention's own output, so fold=True cannot leave it out"
            )
        if self.init == "closed_form" or parse_rank(self.rank)[0] == "auto":
            key = f"rank={self.rank!r}" if self.init != "closed_form" else "init='closed_form'"
            raise ValueError(
                f"{key} needs the closed form, which replaces the attention residual; with attention_residual=True give a "
                "fixed rank and init='small'"
            )

    @property
    def matches_norm(self) -> bool:
        """``norm_match`` with its default resolved."""
        if self.attention_residual:
            return False
        return self.rule == _CLOSED_FORM_RULE if self.norm_match is None else self.norm_match

    @property
    def uses_closed_form(self) -> bool:
        """Whether a calibration would be used: the rule has a closed form and ``init`` does not ask for another start."""
        return self.rule == _CLOSED_FORM_RULE and not self.attention_residual and self.init in ("auto", "closed_form")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        data = asdict(self)
        data["targets"] = list(self.targets)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> NPTConfig:
        """The inverse of :meth:`to_dict`. Unknown keys raise with a suggestion."""
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}"
                raise ValueError(f"NPTConfig has no key {key!r}{hint}")
        return cls(**data)


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}{hint}")


def parse_rank(rank: int | float | str | Sequence[int]) -> tuple[str, Any]:
    """``("int", n)``, ``("fraction", x)``, ``("list", [...])`` or ``("auto", mean)``. Raises ``ValueError``."""
    message = (
        f"rank={rank!r} must be a whole number ≥ 1, a fraction of the hidden size (0 < r ≤ 1), a list with one number "
        "per converted layer, or 'auto:MEAN' such as 'auto:128'"
    )
    if isinstance(rank, bool) or rank is None:
        raise ValueError(message)
    if isinstance(rank, str):
        prefix, _, number = rank.partition(":")
        if prefix == "auto" and number.isdigit() and int(number) >= 1:
            return "auto", int(number)
        if rank.isdigit() and int(rank) >= 1:
            return "int", int(rank)
        raise ValueError(message)
    if isinstance(rank, int):
        if rank < 1:
            raise ValueError(message)
        return "int", rank
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise ValueError(message)
        return "fraction", rank
    if not isinstance(rank, Iterable):
        raise ValueError(message)
    ranks = list(rank)
    if not ranks or any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in ranks):
        raise ValueError(message)
    return "list", ranks


def resolve_layers(layers: str | Sequence[int], num_layers: int | None) -> list[int]:
    """Indices in ascending order; with ``num_layers=None`` only the form is checked. Raises ``ValueError``."""
    total = 1 if num_layers is None else num_layers
    if isinstance(layers, str):
        if layers in _RANGES:
            half = total // 2
            return list({"all": range(total), "upper_half": range(half, total), "lower_half": range(half)}[layers])
        start, colon, stop = layers.partition(":")
        try:
            if colon:
                bounds = slice(int(start) if start else None, int(stop) if stop else None)
                chosen = list(range(total))[bounds]
                if not chosen and num_layers is not None:
                    raise ValueError(f"layers={layers!r} selects no layer of a model with {num_layers}")
                return chosen
            layers = [int(part) for part in layers.split(",")]
        except ValueError as error:
            if "selects no layer" in str(error):
                raise
            raise ValueError(
                f"layers={layers!r} is not understood; use {', '.join(map(repr, _RANGES))}, a slice such as '16:20' "
                "or a list of indices"
            ) from None
    indices = list(layers)
    if not indices:
        raise ValueError("layers is an empty list; name at least one layer, or use 'all'")
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise ValueError(f"layers contains {index!r}; indices must be whole numbers")
        if num_layers is not None and not -num_layers <= index < num_layers:
            raise ValueError(f"layers contains {index}, but the model has {num_layers} layers (0 … {num_layers - 1})")
    if num_layers is None:
        return indices
    resolved = sorted(index % num_layers for index in indices)
    if len(set(resolved)) != len(resolved):
        raise ValueError(f"layers={layers!r} names one layer twice")
    return resolved
