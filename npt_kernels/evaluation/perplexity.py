"""What conversion and training cost the model: perplexity of both, KL, top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..masked_ids import plain_ids, unmask
from ..model.forward import evaluating
from ..model.head import CHUNK_ELEMENTS, OutputHead
from ..model.install import converted_layers, npt_disabled

__all__ = ["EvalResult", "TeacherStates", "evaluate", "evaluate_base"]

_METRICS = ("base_nll", "npt_nll", "kl", "top1_agreement")


class Ranks(Protocol):
    """The processes among which batches are dealt; :class:`npt_kernels.training.distributed.World` is one."""

    rank: int
    size: int
    sharded: bool

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""


@dataclass(frozen=True)
class EvalResult:
    """Both models on held-out text; every number is a mean over predicted positions.

    Attributes:
        tokens: Predicted positions: every token of a sequence but its first, and those that are masked.
        base_nll, npt_nll: −log p of the true next token under the original and the converted model, nats.
        kl: KL(original‖converted) of the next-token distributions, nats per token.
        top1_agreement: Share of positions where both models rank the same token first.
        base_nll_se, npt_nll_se, kl_se, top1_agreement_se: Standard errors of these means, over sequences (tokens of one text
            are not independent); over tokens when there is one sequence.
        log_ratio_se: Standard error of the mean of ``npt_nll − base_nll``, paired by position.
    """

    tokens: int
    base_nll: float
    npt_nll: float
    kl: float
    top1_agreement: float
    base_nll_se: float = 0.0
    npt_nll_se: float = 0.0
    kl_se: float = 0.0
    top1_agreement_se: float = 0.0
    log_ratio_se: float = 0.0

    @property
    def base_perplexity(self) -> float:
        return math.exp(min(self.base_nll, 700.0))

    @property
    def npt_perplexity(self) -> float:
        return math.exp(min(self.npt_nll, 700.0))

    @property
    def perplexity_ratio(self) -> float:
        """Converted ÷ original."""
        return math.exp(min(self.npt_nll - self.base_nll, 700.0))

    @property
    def base_perplexity_se(self) -> float:
        return self.base_perplexity * self.base_nll_se

    @property
    def npt_perplexity_se(self) -> float:
        return self.npt_perplexity * self.npt_nll_se

    @property
    def perplexity_ratio_se(self) -> float:
        return self.perplexity_ratio * self.log_ratio_se

    def original(self) -> EvalResult:
        """The original model's side alone: ratio 1, KL 0."""
        return EvalResult(
            self.tokens,
            self.base_nll,
            self.base_nll,
            0.0,
            1.0,
            base_nll_se=self.base_nll_se,
            npt_nll_se=self.base_nll_se,
        )

    def to_dict(self) -> dict[str, float]:
        """Every number above by name, plain JSON types."""
        names = ("base_perplexity", "npt_perplexity", "perplexity_ratio")
        return (
            asdict(self) | {n: getattr(self, n) for n in names} | {f"{n}_se": getattr(self, f"{n}_se") for n in names}
        )


@dataclass(frozen=True)
class TeacherStates:
    """The original's last hidden states on the evaluation text, so that it runs once however often one evaluates.

    Attributes:
        tokens: ``[n, seq]``, the text they belong to.
        states: ``[m, seq, d]``, of all sequences, or of those that this process evaluates.
    """

    tokens: Tensor
    states: Tensor


def _check(tokens: Tensor) -> Tensor:
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dim() != 2:
        kind = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens must be token ids [n, seq], got {kind}")
    if tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(f"tokens has shape {list(tokens.shape)}; evaluation needs at least one sequence of two tokens")
    return tokens


def evaluate_base(
    model: nn.Module,
    tokens: Tensor,
    *,
    batch_tokens: int = 2048,
    advance: Callable[[int], None] | None = None,
    ranks: Ranks | None = None,
) -> tuple[EvalResult, TeacherStates]:
    """The original model alone: its result (ratio 1, KL 0) and the states that :func:`evaluate` takes as ``teacher``.

    ``model`` may be converted or not. Arguments and errors as in :func:`evaluate`.
    """
    return _run(model, _check(tokens), batch_tokens, advance, None, ranks, student=False)


def evaluate(
    model: nn.Module,
    tokens: Tensor,
    *,
    batch_tokens: int = 2048,
    advance: Callable[[int], None] | None = None,
    teacher: TeacherStates | None = None,
    ranks: Ranks | None = None,
) -> EvalResult:
    """Original and converted model on held-out text, in one pass.

    Hidden states exist for one batch, logits for one chunk of tokens at a time.

    Args:
        model: A converted causal language model.
        tokens: Token ids ``[n, seq]``, seq ≥ 2; those that do not count are masked (:mod:`npt_kernels.masked_ids`).
        batch_tokens: Tokens per forward.
        advance: Called with the number of tokens done, for a progress bar.
        teacher: Of :func:`evaluate_base` on the same tokens; spares the original's forward.
        ranks: Several processes, among which batches are dealt. Every one must call this, with the same tokens; every one gets
            the result, which is that of one process.

    Raises:
        TypeError, ValueError: Tokens of a wrong form, a model without NPT layers or without a language-model head, or a
            ``teacher`` of another text.
    """
    if not converted_layers(model):
        raise ValueError("the model has no NPT layers; convert it with apply_npt or load_npt, or call evaluate_base")
    if teacher is not None and (teacher.tokens.shape != tokens.shape or not torch.equal(teacher.tokens, tokens.cpu())):
        raise ValueError("teacher belongs to other tokens; make it with evaluate_base(model, tokens) on these")
    return _run(model, _check(tokens), batch_tokens, advance, teacher, ranks, student=True)[0]


@torch.no_grad()
def _run(
    model: nn.Module,
    tokens: Tensor,
    batch_tokens: int,
    advance: Callable[[int], None] | None,
    teacher: TeacherStates | None,
    ranks: Ranks | None,
    *,
    student: bool,
) -> tuple[EvalResult, TeacherStates]:
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    with evaluating(model):
        head = OutputHead(model)
        device = next(model.parameters()).device
        batches = tokens.split(max(1, batch_tokens // tokens.shape[1]))
        kept: list[Tensor] = []
        metrics: dict[int, Tensor] = {}
        done = 0
        for number in _dealt(len(batches), rank, size, ranks is not None and ranks.sharded):
            ids = plain_ids(batches[number]).to(device)
            if teacher is not None:
                base = teacher.states[done : done + len(ids)].to(device)
            else:
                with npt_disabled(model) if converted_layers(model) else nullcontext():
                    base = head.states(ids)
            metrics[number] = _token_metrics(head, ids, base, head.states(ids) if student else None).cpu()
            done += len(ids)
            if not student:
                kept.append(base)
            if advance is not None:
                # As if the others were as far as this process; the bar has the length of all the text.
                advance(sum(batch.numel() for batch in batches[number : number + size]))
    if ranks is not None and size > 1:
        metrics = {number: part for parts in ranks.gather(metrics) for number, part in parts.items()}
    everything = torch.cat([metrics[number] for number in range(len(batches))], dim=1)
    states = torch.cat(kept) if kept else tokens.new_empty(0, dtype=torch.float32)
    counted = unmask(tokens[:, 1:])[1]
    return _summarise(everything, None if counted is None else counted.cpu()), TeacherStates(tokens.cpu(), states)


def _dealt(batches: int, rank: int, size: int, sharded: bool) -> list[int]:
    """The batches of this process. Where layers are sharded all processes must run equally many: some run the last one too."""
    mine = list(range(rank, batches, size))
    if sharded and len(mine) < -(-batches // size):
        mine.append(batches - 1)
    return mine


def _token_metrics(head: OutputHead, ids: Tensor, base: Tensor, student: Tensor | None) -> Tensor:
    """``[4, n, seq - 1]`` in the order of ``_METRICS`` for states ``[n, seq, d]``, in chunks of tokens."""
    labels = ids[:, 1:].reshape(-1)
    width = base.shape[-1]
    base_flat = base[:, :-1].reshape(-1, width)
    student_flat = None if student is None else student[:, :-1].reshape(-1, width)
    chunk = max(1, CHUNK_ELEMENTS // head.vocabulary)
    columns = []
    for start in range(0, len(labels), chunk):
        rows = slice(start, start + chunk)
        label = labels[rows].unsqueeze(1)
        log_t = _log_softmax(head.logits(base_flat[rows]))
        base_nll = -log_t.gather(1, label).squeeze(1)
        if student_flat is None:
            columns.append(torch.stack([base_nll, base_nll, torch.zeros_like(base_nll), torch.ones_like(base_nll)]))
            continue
        log_s = _log_softmax(head.logits(student_flat[rows]))
        nll = -log_s.gather(1, label).squeeze(1)
        agree = (log_t.argmax(1) == log_s.argmax(1)).to(nll.dtype)
        kl = torch.linalg.vecdot(log_t.exp(), log_t.sub_(log_s))
        columns.append(torch.stack([base_nll, nll, kl, agree]))
        # Else they live beside those of the next chunk.
        del log_t, log_s
    return torch.cat(columns, dim=1).unflatten(1, (ids.shape[0], -1))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _summarise(metrics: Tensor, counted: Tensor | None = None) -> EvalResult:
    """Means and standard errors of ``[4, n, positions]``; ``counted [n, positions]``: over these alone."""
    values = torch.cat([metrics.double(), (metrics[1] - metrics[0]).double().unsqueeze(0)])
    if counted is None:
        means = values.mean(dim=(1, 2))
        units = values.mean(2) if values.shape[1] > 1 else values.squeeze(1)
        errors = units.std(1) / units.shape[1] ** 0.5 if units.shape[1] > 1 else torch.zeros(len(units))
    else:
        total = int(counted.sum())
        if not total:
            raise ValueError("every token of the text is masked; there is nothing to measure")
        means = values[:, counted].mean(1)
        # A ratio of sums, linearised: sequences count different numbers of tokens.
        off = (values - means[:, None, None]).where(counted, 0.0)
        units = off.sum(2) if values.shape[1] > 1 else off[:, counted]
        n = units.shape[1]
        errors = (units.square().sum(1) * n / max(1, n - 1)).sqrt() / total if n > 1 else torch.zeros(len(units))
    return EvalResult(
        tokens=metrics[0].numel() if counted is None else total,
        **{name: float(mean) for name, mean in zip(_METRICS, means, strict=False)},
        **{f"{name}_se": float(error) for name, error in zip((*_METRICS, "log_ratio"), errors, strict=True)},
    )
