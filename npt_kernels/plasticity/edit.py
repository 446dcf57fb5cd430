"""A weight change that can be kept: low rank, stored as safetensors, applied to a model and undone bit for bit.

A *static* edit is ``W' = W + Σ_j v_b[j] ⊗ v_a[j]`` on the last MLP matrix of some layers. A *conditional* edit is the per-token
form, ``y_t = (W + s_t Σ_j v_b[j] ⊗ v_a[j]) k_t`` with ``s_t = 1`` once a subject has been mentioned and 0 before: a change that
no single ``W'`` can make (``conditional.py``).

The model remembers its edits in order, and the original of every matrix that was written to. Undoing puts the originals back
and writes the remaining edits again: the same list of edits gives the same bits, whatever was applied and undone in between.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..durable_files import disk_errors, sync_file
from .changes import LayerChange, Trigger
from .conditional import Gate
from .facts import Fact
from .hooks import Sites, name_of

__all__ = [
    "Applied",
    "Edit",
    "EditWarning",
    "LayerChange",
    "active_edits",
    "apply_edit",
    "edited",
    "edits_suspended",
    "undo_edit",
]

FILE = "edit.safetensors"
_FORMAT = "npt-edit-1"
_STATE = "_npt_edits"
#: Largest cosine between the keys of two edits from which they are said to overlap: each then also fires on the other's key.
OVERLAP = 0.5


class EditWarning(UserWarning):
    """An edit was applied, but not to the weights that it was made for, or over another edit's keys."""


@dataclass(frozen=True, eq=False)
class Edit:
    """A low-rank change of a model's weights.

    Attributes:
        layers: Layer → its change.
        method: ``rome``, ``context`` or ``conditional``.
        facts: What it was learned from.
        triggers: Per fact, the token runs that switch its terms on; ``None`` for a static edit.
        base: Of the model it was made for: ``name``, and per layer ``size`` (in, out) and ``sha256`` of the matrix.
        settings: How it was found.
        history: Events with their time, oldest first.
    """

    layers: dict[int, LayerChange]
    method: str
    facts: tuple[Fact, ...] = ()
    triggers: tuple[Trigger, ...] | None = None
    base: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("the edit changes no layer")

    @property
    def conditional(self) -> bool:
        return self.triggers is not None

    @property
    def rank(self) -> int:
        """The largest number of terms of a layer."""
        return max(len(change.v_a) for change in self.layers.values())

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: dict[int, LayerChange],
        method: str,
        facts: Sequence[Fact] = (),
        triggers: Sequence[Trigger] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> Edit:
        """An edit made for the matrices that ``model`` has without its active edits."""
        sites, state = Sites(model), _state(model)
        base: dict[str, Any] = {"name": name_of(model), "layers": {}}
        for layer in sorted(layers):
            base["layers"][str(layer)] = {"size": list(sites.size(layer)), "sha256": _digest(state, sites, layer)}
        event: dict[str, Any] = {
            "event": "learned",
            "time": _now(),
            "version": __version__,
            "method": method,
            "facts": len(facts),
        }
        if state.edits:
            event["on_top_of"] = [f"{e.method}: {'; '.join(f.fact for f in e.facts)}" for e in state.edits]
        return cls(
            dict(sorted(layers.items())), method, tuple(facts), None if triggers is None else tuple(triggers), base,
            dict(settings or {}), (event,),
        )  # fmt: skip

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self, directory: Path | str) -> Path:
        """Write ``directory/edit.safetensors``, whole or not at all. Raises ``ValueError`` if it cannot be written."""
        from safetensors.torch import save_file

        directory = Path(directory).expanduser()
        about = {
            "format": _FORMAT,
            "method": self.method,
            "facts": [fact.to_dict() for fact in self.facts],
            "triggers": None
            if self.triggers is None
            else [[list(run) for run in trigger] for trigger in self.triggers],
            "base": self.base,
            "settings": self.settings,
            "history": list(self.history),
        }
        tensors = {}
        for layer, change in self.layers.items():
            for name in ("v_a", "v_b", "group"):
                tensors[f"layers.{layer}.{name}"] = (
                    getattr(change, name).cpu().clone(memory_format=torch.contiguous_format)
                )  # layers may share a tensor
        temporary = directory / f".{FILE}.{os.getpid()}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with disk_errors(directory):
                save_file(tensors, temporary, {"npt": json.dumps(about, ensure_ascii=False)})
            sync_file(temporary)
            temporary.replace(directory / FILE)
        except OSError as error:
            raise ValueError(f"{directory} cannot be written: {error.strerror}") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        return directory / FILE

    @classmethod
    def load(cls, path: Path | str) -> Edit:
        """Read a folder or file of :meth:`save`. Raises ``ValueError`` that says what is wrong with it."""
        from safetensors import SafetensorError, safe_open

        path = Path(path).expanduser()
        file = path / FILE if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{path} has no {FILE}; give the output folder of `npt learn` or of Edit.save")
        try:
            with safe_open(file, "pt") as stored:
                about = json.loads((stored.metadata() or {}).get("npt", "{}"))
                if about.get("format") != _FORMAT:
                    raise ValueError(f"{file} is no edit of npt_kernels (format {about.get('format')!r})")
                names = list(stored.keys())
                tensors = {name: stored.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read as an edit: {str(error).splitlines()[0]}") from error
        parts: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            _, layer, part = name.split(".")
            parts.setdefault(int(layer), {})[part] = tensor
        triggers = about["triggers"]
        return cls(
            {layer: LayerChange(**found) for layer, found in sorted(parts.items())},
            about["method"],
            tuple(Fact.from_dict(fact) for fact in about["facts"]),
            None if triggers is None else tuple(tuple(tuple(run) for run in trigger) for trigger in triggers),
            about["base"],
            about["settings"],
            tuple(about["history"]),
        )

    def export_lora(self, directory: Path | str, model: nn.Module) -> Path:
        """Write the edit as a PEFT LoRA adapter of ``model``'s MLP output matrices; returns the folder.

        Raises ``ValueError`` for a conditional edit, which no fixed weight can express, or a folder that cannot be written.
        """
        from safetensors.torch import save_file

        if self.conditional:
            raise ValueError(
                "a conditional edit acts per token, which a LoRA cannot express; export a static one (rome, context)"
            )
        sites, directory = Sites(model), Path(directory).expanduser()
        tensors, ranks, names = {}, {}, {}
        for layer, change in self.layers.items():
            path = sites.module_path(layer)
            ranks[path], names[path] = len(change.v_a), path.rpartition(".")[2]
            tensors[f"base_model.model.{path}.lora_A.weight"] = change.v_a.contiguous()
            tensors[f"base_model.model.{path}.lora_B.weight"] = change.v_b.t().contiguous()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base.get("name", ""),
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.rank,
            "rank_pattern": ranks,
            "alpha_pattern": ranks,
            "target_modules": sorted(ranks),
            "fan_in_fan_out": any(name == "c_proj" for name in names.values()),
            "bias": "none",
        }
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
            with disk_errors(directory):
                save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
        except OSError as error:
            raise ValueError(f"{directory} cannot be written: {error.strerror}") from error
        return directory

    # ---- relations ---------------------------------------------------------------------------------------------------

    def overlap(self, other: Edit) -> dict[int, float]:
        """Layer → largest cosine between directions that both edits answer to (0: they ignore each other)."""
        return {
            layer: float(
                torch.linalg.matrix_norm(_directions(self, layer).t() @ _directions(other, layer), ord=2).clamp_max(1)
            )
            for layer in self.layers.keys() & other.layers.keys()
        }


def _directions(edit: Edit, layer: int) -> Tensor:
    """Orthonormal basis ``[in, k]`` of what the edit answers to in a layer."""
    u, s, _ = torch.linalg.svd(edit.layers[layer].v_a.double().t(), full_matrices=False)
    return u[:, s > 1e-6 * s[0].clamp_min(1e-300)]


# ---- applying and undoing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Applied:
    """What :func:`apply_edit` did.

    Attributes:
        relative: Layer → ``‖ΔW‖/‖W‖``.
        kept: Layer → share of ΔW that the rounding to the weight's dtype kept, ``⟨W' − W, ΔW⟩/‖ΔW‖²``; 1 for conditional edits.
        noise: Layer → ``‖(W' − W) − ΔW‖/‖ΔW‖``, what the rounding added beside it.
        warnings: What the caller should know, one line each.
    """

    relative: dict[int, float]
    kept: dict[int, float]
    noise: dict[int, float]
    warnings: tuple[str, ...]


@dataclass
class _EditState:
    """What an edited model remembers; an attribute of the instance."""

    originals: dict[int, Tensor] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)
    gate: Gate | None = None


def _state(model: nn.Module) -> _EditState:
    return model.__dict__.get(_STATE) or _EditState()


def active_edits(model: nn.Module) -> tuple[Edit, ...]:
    """The edits that are applied, oldest first."""
    return tuple(_state(model).edits)


@torch.no_grad()
def apply_edit(model: nn.Module, edit: Edit) -> Applied:
    """Apply an edit to ``model``, in place, all or nothing. :func:`undo_edit` takes it back.

    Raises:
        ValueError: The matrices have other sizes, a static edit meets a quantised matrix, the edit is applied already, or the
            model is of a kind that cannot be edited. The model is then unchanged.

    Warns:
        EditWarning: The matrices are not those the edit was made for, or its keys overlap with an active edit's.
    """
    if not isinstance(edit, Edit):
        raise TypeError(f"edit must be an Edit, got {type(edit).__name__}; Edit.load reads one")
    sites = Sites(model)
    sites.refuse_unless_plain()
    state = _state(model)
    if any(active is edit for active in state.edits):
        raise ValueError("this edit is applied already; undo it first")
    _check_fits(sites, edit)
    warned = _cautions(sites, state, edit)
    applied = _measure(sites, edit, tuple(warned))
    if not edit.conditional:
        for layer in edit.layers:
            state.originals.setdefault(layer, sites.weight(layer).detach().clone())
    state.edits.append(edit)
    setattr(model, _STATE, state)
    _write(model, sites, state, only=set(edit.layers))
    for line in warned:
        warnings.warn(line, EditWarning, stacklevel=2)
    return applied


@torch.no_grad()
def undo_edit(model: nn.Module, edit: Edit | None = None) -> Edit:
    """Take back ``edit`` (default: the latest) and return it. The rest stays applied; after the last the model is the original,
    bit for bit. Raises ``ValueError`` if it is not applied."""
    state = _state(model)
    if not state.edits:
        raise ValueError("the model has no edits to undo")
    chosen = state.edits[-1] if edit is None else edit
    if not any(active is chosen for active in state.edits):
        raise ValueError("this edit is not applied to the model; active_edits(model) lists those that are")
    state.edits = [active for active in state.edits if active is not chosen]
    sites = Sites(model)
    _write(model, sites, state)
    for layer in [
        layer for layer in state.originals if not any(layer in e.layers and not e.conditional for e in state.edits)
    ]:
        del state.originals[layer]
    if not state.edits:
        delattr(model, _STATE)
    return chosen


@contextmanager
def edited(model: nn.Module, edit: Edit) -> Iterator[Applied]:
    """Inside the block the edit is applied."""
    applied = apply_edit(model, edit)
    try:
        yield applied
    finally:
        undo_edit(model, edit)


@contextmanager
def edits_suspended(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is the original, bit for bit; afterwards its edits are applied again, in order."""
    edits = active_edits(model)
    for edit in reversed(edits):
        undo_edit(model, edit)
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EditWarning)  # said when they were applied
            for edit in edits:
                apply_edit(model, edit)


def _write(model: nn.Module, sites: Sites, state: _EditState, only: set[int] | None = None) -> None:
    """Make the matrices and gates what ``state`` says: originals plus the static edits in order; one gate for
    the conditional ones."""
    for layer, original in state.originals.items():
        if only is not None and layer not in only:
            continue
        total = original
        for edit in state.edits:
            if not edit.conditional and layer in edit.layers:
                # Rounded after every edit, so that the bits of the first do not depend on whether a second follows.
                total = edit.layers[layer].added_to(total).to(original.dtype)
        sites.weight(layer).copy_(total)
    wanted = [edit for edit in state.edits if edit.conditional]
    if wanted != ([] if state.gate is None else state.gate.edits):
        if state.gate is not None:
            state.gate.remove()
        state.gate = Gate(sites, wanted) if wanted else None


def _check_fits(sites: Sites, edit: Edit) -> None:
    for layer, change in edit.layers.items():
        size = (change.v_a.shape[1], change.v_b.shape[1])
        if layer >= len(sites) or sites.size(layer) != size:
            has = f"its layer {layer} has {sites.size(layer)}" if layer < len(sites) else f"it has {len(sites)} layers"
            raise ValueError(
                f"the edit is for another model ({edit.base.get('name', 'unnamed')}: layer {layer} with (in, out) = {size}); "
                f"{has}"
            )
        if not edit.conditional and sites.quantised(layer):
            raise ValueError(
                f"layer {layer} is quantised: its stored codes cannot hold a change smaller than their step; use "
                "method='conditional', which adds the change to the output, or edit the dense model and quantise that"
            )


def _cautions(sites: Sites, state: _EditState, edit: Edit) -> list[str]:
    lines = []
    made_for = edit.base.get("layers", {})
    other = [
        layer for layer in edit.layers
        if str(layer) in made_for and made_for[str(layer)]["sha256"] != _digest(state, sites, layer)
    ]  # fmt: skip
    if other:
        lines.append(
            f"layer {other[0]} does not hold the weights this edit was made for ({edit.base.get('name', 'unnamed')}); measure "
            "again what it does here"
        )
    for active in state.edits:
        worst = max(edit.overlap(active).items(), key=lambda item: item[1], default=None)
        if worst is not None and worst[1] >= OVERLAP:
            lines.append(
                f"keys overlap with an edit that is applied ({'; '.join(f.fact for f in active.facts)[:60]}): cosine "
                f"{worst[1]:.2f} in layer {worst[0]}; each changes what the other wrote"
            )
    return lines


def _measure(sites: Sites, edit: Edit, warned: tuple[str, ...]) -> Applied:
    relative, kept, noise = {}, {}, {}
    for layer, change in edit.layers.items():
        weight = sites.weight(layer).detach()
        relative[layer] = change.norm / max(float(weight.float().norm()), 1e-30)
        if edit.conditional or change.norm == 0:
            kept[layer], noise[layer] = 1.0, 0.0
            continue
        delta = change.dense().double()
        written = change.added_to(weight).to(weight.dtype).double().cpu() - weight.double().cpu()
        kept[layer] = float((written * delta).sum() / delta.square().sum())
        noise[layer] = float((written - delta).norm() / delta.norm())
    return Applied(relative, kept, noise, warned)


def _digest(state: _EditState, sites: Sites, layer: int) -> str:
    """SHA-256 of the matrix without edits. Of a quantised one, the dense values."""
    weight = state.originals.get(layer)
    if weight is None:
        weight = sites.weight(layer).detach() + 0 if sites.quantised(layer) else sites.weight(layer).detach()
    flat = weight.contiguous().cpu().view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
