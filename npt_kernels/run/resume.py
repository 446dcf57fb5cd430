"""``--resume PATH``: finds the checkpoint or plain adapter there; checks that the configuration can go on from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..configs import load_run_config, parse_yaml
from ..configs.schema import ConfigError, RunConfig
from ..model.save import CONFIG_NAME, find_adapter
from .checkpoints import MANIFEST, Checkpoint, DamagedCheckpoint, list_checkpoints, open_checkpoint

__all__ = ["ResumePoint", "changed_settings", "find_resume", "resumed_config"]


@dataclass(frozen=True)
class ResumePoint:
    """Where to start.

    Attributes:
        adapter: What ``load_npt`` reads.
        checkpoint: ``None`` for a plain adapter: components only, the optimizer starts anew.
        notes: For the user: checkpoints that were passed over, and why.
    """

    adapter: Path
    checkpoint: Checkpoint | None = None
    notes: list[str] = field(default_factory=list)


def find_resume(path: Path, *, thorough: bool = True) -> ResumePoint:
    """What lies in ``path``: a run's output or its folder of checkpoints (the newest whole one), one checkpoint, an adapter.

    Args:
        path: A directory, or the file of a published adapter.
        thorough: Compare the SHA-256 of all files of a checkpoint; else only their presence and size.

    Raises:
        ConfigError: Nothing is there, or the checkpoint that was named is damaged.
    """
    path = path.expanduser()
    if (path / MANIFEST).is_file():
        try:
            return ResumePoint(path, open_checkpoint(path, thorough=thorough))
        except DamagedCheckpoint as error:
            raise ConfigError(f"--resume: {error}; give the folder above it to take the newest whole one") from None
    notes: list[str] = []
    if not (path / CONFIG_NAME).is_file():
        for folder in _checkpoint_folders(path):
            checkpoints, problems = list_checkpoints(folder)
            notes += [f"{problem}: passed over" for problem in problems]
            for checkpoint in checkpoints:
                # A folder that several runs share: only those of the run that was asked for.
                if folder not in (path, path / "checkpoints") and checkpoint.output_dir != str(path.resolve()):
                    continue
                try:
                    return ResumePoint(checkpoint.path, open_checkpoint(checkpoint.path, thorough=thorough), notes)
                except DamagedCheckpoint as error:
                    notes.append(f"{error}: passed over")
    adapter = find_adapter(path)
    if adapter is not None:
        return ResumePoint(adapter, None, notes)
    if notes:
        raise ConfigError(f"--resume: no whole checkpoint and no adapter in {path}; {'; '.join(notes)}")
    what = "holds neither checkpoint nor adapter" if path.is_dir() else "does not exist"
    raise ConfigError(f"--resume: {path} {what}; give the output of `npt train`, a checkpoint in it, or an adapter")


def _checkpoint_folders(path: Path) -> list[Path]:
    folders = [path / "checkpoints", path]
    try:
        elsewhere = parse_yaml((path / "config.yaml").read_text(encoding="utf-8"), "config.yaml")["paths"][
            "checkpoint_dir"
        ]
        return [Path(elsewhere).expanduser(), *folders]
    except (OSError, KeyError, TypeError, ValueError):
        return folders


# ---- configurations that differ --------------------------------------------------------------------------------------

#: The shape and meaning of what is in the checkpoint; it cannot become another on the way.
_FIXED = {
    "model.base_model_name", "model.npt_layers", "model.rank", "model.modulation_scale", "model.rule", "model.num_ranks",
    "model.targets", "model.norm_match", "model.attention_residual", "model.fold",
    "model.extra_rank", "model.extra_rule", "model.extra_layers", "model.extra_targets",
    "training.seed", "data.streaming",
}  # fmt: skip
#: How a run looks and where it writes, and what only a conversion reads.
_FREE = {
    "model.init", "model.basis", "model.refit", "training.logging_steps", "training.prediction_logging_steps",
    "training.eval_steps", "training.save_steps", "training.save_total_limit", "training.report_to",
    "optimization.oom_retry", "optimization.num_threads",
}  # fmt: skip
_FREE_SECTIONS = {"paths", "wandb"}


def changed_settings(checkpoint: Checkpoint, config: RunConfig) -> list[str]:
    """``key: before → now`` for every setting that differs and matters but can be changed on the way.

    Raises :class:`ConfigError` for one that cannot. Keys that only one of the two versions knows are left out.
    """
    before = _flat(parse_yaml(checkpoint.file("config.yaml").read_text(encoding="utf-8"), str(checkpoint.path)))
    now = _flat(config.model_dump(mode="json"))
    changed = []
    for key in sorted(before.keys() & now.keys()):
        if before[key] == now[key] or key in _FREE or key.partition(".")[0] in _FREE_SECTIONS:
            continue
        if key in _FIXED:
            raise ConfigError(
                f"{key} is {now[key]!r}, but {checkpoint.path} was trained with {before[key]!r}, which a resumed run cannot "
                f"change; leave the key as it was, or take the components alone: --resume {_plain_adapter(checkpoint)}"
            )
        changed.append(f"{key} {before[key]!r} → {now[key]!r}")
    return changed


def _plain_adapter(checkpoint: Checkpoint) -> Path:
    return Path(checkpoint.output_dir) / "adapter"


def resumed_config(
    point: ResumePoint, path: Path, name: str | None = None, file: Path | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """The configuration of a run that goes on from what :func:`find_resume` found in ``path``.

    ``name``, ``file`` and ``overrides`` are those of :func:`load_run_config`; without name and file the checkpoint's own
    configuration is taken, and that of the run where it was stopped before its first checkpoint. Raises :class:`ConfigError` for
    what a resumed run cannot change.
    """
    checkpoint = point.checkpoint
    if name is None and file is None:
        # Else the default configuration, another model's, would go on from this run's adapter.
        of_run = path / "config.yaml" if point.adapter.parent == path else None
        if checkpoint is not None:
            file = checkpoint.file("config.yaml")
        elif of_run is not None and of_run.is_file():
            file = of_run
        moved = file == of_run if checkpoint is None else checkpoint.path.parent.parent == path
        if file is not None and moved and not any(text.startswith("paths.") for text in overrides):
            # A run's output that was moved goes on where it is now.
            overrides = [*overrides, f"paths.output_dir={json.dumps(str(path))}"]
    config = load_run_config(name, file, overrides)
    if checkpoint is not None:
        saved = parse_yaml(checkpoint.file("config.yaml").read_text(encoding="utf-8"), str(checkpoint.path))
        if config.optimization.mixed_precision == "auto":
            # What the run chose on its machine; autocast in another dtype would be another run.
            config.optimization.mixed_precision = saved.get("optimization", {}).get("mixed_precision", "no")
        if config.training.max_minutes is not None:
            # As long as the run made itself, on its machine.
            config.training.max_minutes = None
            config.training.max_steps = saved.get("training", {}).get("max_steps", config.training.max_steps)
            polish = saved.get("training", {}).get("polish_steps", config.training.polish_steps)
            config.training.polish_steps = polish
            tokens = saved.get("data", {}).get("calibration_tokens", config.data.calibration_tokens)
            config.data.calibration_tokens = tokens
        changed_settings(checkpoint, config)
    return config


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, keys in sections.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
    }
