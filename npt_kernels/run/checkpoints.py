"""Checkpoints: all that another process needs to go on with a run as if it had never stopped.

A checkpoint is a directory:

    npt_model.safetensors, npt_config.json      the components, as save_npt writes them: npt eval and load_npt read them
    optimizer.bin, random_states_N.pkl, scaler.pt   by accelerate: AdamW's moments, random numbers per process, fp16 loss scale
    state.pt                                    position in the text and in the schedule, results and times so far
    metrics.jsonl, config.yaml                  the log up to here, the configuration
    checkpoint.json                             written last: phase, step, size and SHA-256 of every other file

It is made in a hidden directory beside, every file is synced to the disk, then the directory gets its name. So under a name
there is a whole checkpoint, and what a crash left half-written has none; a file that was damaged later shows in its SHA-256.
Nothing in it is unpickled: tensors are read as safetensors, or by torch.load(weights_only=True).

``accelerate.save_state`` writes what it knows: one optimizer, the loss scale, the random numbers of every process and kind of
device. Models are not prepared by accelerate (local training runs one backward per layer, which its wrappers do not foresee),
so the components are saved here. The schedule is not its business either: what counts is its position, from which it is built
anew, so that a resumed run follows a changed ``training.max_steps`` or ``learning_rate``.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..durable_files import disk_errors, sha256, sync_directory, sync_file
from ..messages import first_line, shown
from ..model.save import save_npt
from ..training.distributed import OtherRankError, World
from ..training.loop import is_out_of_memory

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "DamagedCheckpoint",
    "list_checkpoints",
    "load_optimizer",
    "open_checkpoint",
    "save_checkpoint",
]

MANIFEST = "checkpoint.json"
_STATE = "state.pt"
_FORMAT_VERSION = 1
#: What is being written; the leading dot keeps it out of every search.
_WRITING = ".writing"
_DELETING = ".deleting-"
#: Of the rest of the manifest: a digit that flipped in ``step`` would be a step.
_OWN_SHA256 = "manifest_sha256"


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what its manifest says; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, described by its manifest.

    Attributes:
        path: Its directory.
        run: Name of the run that wrote it; a resumed run keeps it.
        serial: Grows with every checkpoint in a folder: the newest has the largest, whatever its step.
        phase, objective: What was being trained.
        step, total_steps: Optimizer steps done, of the phase and of the run.
        processes: How many wrote it.
        output_dir: Of the run, resolved.
    """

    path: Path
    run: str
    serial: int
    phase: str
    objective: str
    step: int
    total_steps: int
    processes: int
    output_dir: str

    def state(self) -> dict[str, Any]:
        """What the run gave :func:`save_checkpoint` as ``state``. Raises :class:`DamagedCheckpoint`."""
        try:
            state: dict[str, Any] = torch.load(self.path / _STATE, map_location="cpu", weights_only=True)
        except Exception as error:
            raise DamagedCheckpoint(f"{self.path / _STATE} cannot be read: {first_line(error)}") from error
        if not isinstance(state, dict):
            raise DamagedCheckpoint(f"{self.path / _STATE} holds a {type(state).__name__}, not the state of a run")
        return state

    def file(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:
        return f"{self.path} (phase {self.phase}, step {self.step})"


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    accelerator: Any,
    *,
    run: str,
    phase: str,
    objective: str,
    step: int,
    total_steps: int,
    output_dir: Path,
    state: dict[str, Any],
    files: Sequence[Path] = (),
    keep: int = 2,
    world: World | None = None,
) -> Path:
    """Write a checkpoint into ``folder`` and delete this run's older ones; returns the new directory.

    All processes of a run call it together; the main one writes what is common to them. A checkpoint of another run in the same
    folder is never deleted. Raises ``OSError`` (disk full, no permission); the earlier checkpoints are then untouched.

    Args:
        folder: Made if it is not there.
        model: A converted model.
        accelerator: With the optimizer of this phase prepared, and no other.
        run, phase, objective, step, total_steps, output_dir: See :class:`Checkpoint`.
        state: Plain values and tensors.
        files: Copied into it.
        keep: How many of this run's checkpoints stay.
        world: The processes; ``None``: this one alone. What fails on one of them raises on all.
    """
    world = world or World()
    writing = folder / _WRITING

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Only of a process that was killed while it wrote.
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir()

    def fill() -> None:
        with disk_errors(writing):
            accelerator.save_state(str(writing))
            if world.is_main:
                save_npt(model, writing)
                torch.save(state, writing / _STATE)
                for file in files:
                    shutil.copyfile(file, writing / file.name)

    def finish() -> Path:
        present = list_checkpoints(folder)[0]
        manifest = {
            "format_version": _FORMAT_VERSION,
            "npt_kernels_version": __version__,
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "run": run,
            "serial": 1 + max((checkpoint.serial for checkpoint in present), default=0),
            "phase": phase,
            "objective": objective,
            "step": step,
            "total_steps": total_steps,
            "processes": world.size,
            "output_dir": str(output_dir.resolve()),
        }
        _write_manifest(writing, manifest)
        path = _free_name(folder, f"{phase}-{step:06d}")
        writing.rename(path)
        sync_directory(folder)
        _rotate(folder, run, keep)
        return path

    try:
        world.on_main(prepare)
        world.together(fill)
        path = world.broadcast(world.on_main(finish))
        assert path is not None
        return path
    except OtherRankError as error:
        raise OSError(f"no checkpoint in {folder}: {error}") from None
    finally:
        if world.is_main:
            shutil.rmtree(writing, ignore_errors=True)


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    files = {}
    for file in sorted(directory.iterdir()):
        sync_file(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    path, content = directory / MANIFEST, {**manifest, "files": files}
    path.write_text(json.dumps({**content, _OWN_SHA256: _digest(content)}, indent=2) + "\n")
    sync_file(path)
    sync_directory(directory)


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, however its text is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _free_name(folder: Path, name: str) -> Path:
    """``name``, or ``name.2`` … where a run that was resumed from an earlier point comes by the same step again.

    Replacing the directory would take two renames, and a crash between them would leave neither.
    """
    path, number = folder / name, 1
    while path.exists():
        number += 1
        path = folder / f"{name}.{number}"
    return path


def _rotate(folder: Path, run: str, keep: int) -> None:
    own = [checkpoint for checkpoint in list_checkpoints(folder)[0] if checkpoint.run == run]
    for checkpoint in own[keep:]:
        # Renamed first: half a checkpoint under its name would look like a damaged one.
        target = folder / f"{_DELETING}{checkpoint.path.name}"
        shutil.rmtree(target, ignore_errors=True)
        checkpoint.path.rename(target)
    for leftover in folder.glob(f"{_DELETING}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def list_checkpoints(folder: Path) -> tuple[list[Checkpoint], list[str]]:
    """``(checkpoints, problems)`` in a folder, the newest first; problems: a line for each whose manifest cannot be read.

    Files are not looked into: :func:`open_checkpoint` does.
    """
    found: list[Checkpoint] = []
    problems: list[str] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith(".") or not (path / MANIFEST).is_file():
            if re.fullmatch(r"\w+-\d{6}(\.\d+)?", path.name) and path.is_dir():
                problems.append(f"{path} has no {MANIFEST}")
            continue
        try:
            found.append(_read_manifest(path)[0])
        except DamagedCheckpoint as error:
            problems.append(str(error))
    return sorted(found, key=lambda checkpoint: -checkpoint.serial), problems


def _read_manifest(path: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint and its files; name → ``bytes`` and ``sha256``."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        version, own = manifest["format_version"], manifest.pop(_OWN_SHA256, None)
        if version > _FORMAT_VERSION:
            raise DamagedCheckpoint(
                f"{path} has format_version {version}; this npt_kernels {__version__} reads up to {_FORMAT_VERSION}: upgrade it"
            )
        # Those of an earlier version have none.
        if own is not None and own != _digest(manifest):
            raise DamagedCheckpoint(f"{file} is not what was written (SHA-256 differs)")
        values: dict[str, Any] = {name: manifest[name] for name in Checkpoint.__dataclass_fields__ if name != "path"}
        for name, value in values.items():
            whole = name in ("serial", "step", "total_steps", "processes")
            if not (type(value) is int and 0 <= value < 2**63 if whole else type(value) is str):
                raise DamagedCheckpoint(f"{file} is damaged: {name} is {shown(value)}")
        for name, entry in manifest["files"].items():
            # A name with a folder in it would have the reader look at other people's files.
            if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
                raise DamagedCheckpoint(f"{file} is damaged: {shown(name)} is no file of a checkpoint")
            if type(entry["bytes"]) is not int or type(entry["sha256"]) is not str:
                raise DamagedCheckpoint(f"{file} is damaged: {name} is {shown(entry)}")
        return Checkpoint(path, **values), manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DamagedCheckpoint):
            raise
        raise DamagedCheckpoint(f"{file} is damaged ({type(error).__name__}: {first_line(error)})") from None


def open_checkpoint(path: Path, *, thorough: bool = True) -> Checkpoint:
    """The checkpoint in ``path``, all files of it present and whole. Raises :class:`DamagedCheckpoint` with the file's name.

    Args:
        path: Its directory.
        thorough: Compare every SHA-256, which reads all of it; else presence and size.
    """
    checkpoint, files = _read_manifest(path)
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise DamagedCheckpoint(
                f"{file} has {file.stat().st_size:,} bytes, it was written with {expected['bytes']:,}"
            )
        if thorough and sha256(file) != expected["sha256"]:
            raise DamagedCheckpoint(f"{file} is not what was written (SHA-256 differs)")
    return checkpoint


def load_optimizer(checkpoint: Checkpoint, accelerator: Any) -> list[str]:
    """Moments of the optimizer, loss scale and random numbers, into what ``accelerator`` has prepared; notes for the user.

    Raises ``ValueError`` if this run needs a loss scale (fp16) and the checkpoint has none.
    """
    if accelerator.scaler is not None and not checkpoint.file("scaler.pt").is_file():
        raise ValueError(
            f"optimization.mixed_precision=fp16, but {checkpoint.path} was written without a loss scale; "
            "resume with the precision it was trained in"
        )
    try:
        accelerator.load_state(str(checkpoint.path))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        what = f"optimizer.bin of {checkpoint.path} cannot be loaded into this run"
        raise ValueError(f"{what}: {type(error).__name__}: {first_line(error)}") from error
    notes = []
    if checkpoint.processes != accelerator.num_processes:
        # accelerate keeps quiet where a process has no saved random numbers.
        notes.append(
            f"the checkpoint was written by {checkpoint.processes} processes, this run has {accelerator.num_processes}: "
            "random numbers start anew in the added ones"
        )
    return notes
