"""The extra change of a run (``model.extra_rank``): beside the converted components, or met in the adapter to start from."""

from __future__ import annotations

from torch import nn

from ..configs.schema import ConfigError, RunConfig
from ..model.extra import add_extra, spec_of

__all__ = ["settle_extra"]


def settle_extra(model: nn.Module, config: RunConfig, processes: int) -> None:
    """Raises :class:`ConfigError` where adapter and configuration disagree, or several processes are to train it."""
    m, found = config.model, spec_of(model)
    if found is not None and (found.rank, found.rule) != (m.extra_rank, m.extra_rule):
        raise ConfigError(
            f"the adapter to start from has an extra change of rank {found.rank}, rule {found.rule}; the configuration says "
            f"model.extra_rank={m.extra_rank}, model.extra_rule={m.extra_rule}"
        )
    if not m.extra_rank:
        return
    if processes > 1:
        raise ConfigError(
            f"model.extra_rank is trained in one process, not in {processes}; start it without a launcher"
        )
    if found is None:
        try:
            add_extra(model, m.extra_rank, rule=m.extra_rule, scale=m.modulation_scale, layers=m.extra_layers,
                      targets=m.extra_targets, seed=config.training.seed)  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"model.extra_*: {error}") from error
