"""What users would do instead of an edit: fine-tune the MLPs of the upper half, or LoRA on them, on the same texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from npt_kernels.plasticity import Fact
from npt_kernels.plasticity.facts import encode, encode_answer, padded, start_ids
from npt_kernels.plasticity.probes import HELD_SUBJECTS

__all__ = ["BASELINES", "fine_tuned"]

#: Name → (LoRA's rank or 0 for all weights, learning rate, weight of the locality penalty).
BASELINES: dict[str, tuple[int, float, float]] = {
    "fine-tuning": (0, 2e-5, 0.0),
    "LoRA": (4, 2e-3, 0.0),
    "LoRA, locality": (4, 2e-3, 1.0),
}


@contextmanager
def fine_tuned(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    prose: Tensor,
    name: str,
    *,
    steps: int = 40,
    stop: float = 0.05,
) -> Iterator[dict[str, float]]:
    """Inside the block ``model`` is trained on the statements and their phrasings; afterwards it has every bit it had.

    The locality penalty is KL to the untrained model on the same statements about held subjects and on ``prose [n, seq]``.
    """
    rank, learning_rate, locality = BASELINES[name]
    pairs = [
        encode_answer(tokenizer, prompt, fact.answer) for fact in facts for prompt in (fact.prompt, *fact.phrasings)
    ]
    fill = (start_ids(tokenizer) or [0])[0]
    held = [
        encode(tokenizer, fact.about(other)) for fact in facts for other in HELD_SUBJECTS[:3] if other != fact.subject
    ]
    with _trainable(model, rank) as parameters:
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        loss_value, taken = float("inf"), 0
        references = _References(model, held, prose, fill) if locality else None
        while taken < steps and loss_value >= stop:
            taken += 1
            order = torch.randperm(len(pairs), generator=generator).tolist()
            total = 0.0
            for batch in (order[i : i + 16] for i in range(0, len(order), 16)):
                ids, mask = padded([pairs[i].ids for i in batch], fill, torch.device("cpu"))
                log_p = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].log_softmax(-1)
                losses = [
                    -log_p[row, pairs[i].start - 1 + j, token]
                    for row, i in enumerate(batch)
                    for j, token in enumerate(pairs[i].answer)
                ]
                loss = torch.stack(losses).mean()
                total += float(loss.detach()) * len(batch) / len(order)
                if references is not None:
                    loss = loss + locality * references.kl(model, generator)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss_value = total
        yield {"steps": taken, "loss": loss_value, "parameters": sum(p.numel() for p in parameters)}


class _References:
    """The untrained model's predictions that training should keep."""

    def __init__(self, model: nn.Module, held: list[list[int]], prose: Tensor, fill: int) -> None:
        self.rows = [*held, *(row[:64].tolist() for row in prose)]
        self.fill = fill
        self.targets = [self._log_p(model, [row])[0].detach() for row in self.rows]

    def _log_p(self, model: nn.Module, rows: list[list[int]]) -> list[Tensor]:
        ids, mask = padded(rows, self.fill, torch.device("cpu"))
        with torch.set_grad_enabled(len(rows) > 1):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return [logits[i, : len(row)].log_softmax(-1) for i, row in enumerate(rows)]

    def kl(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.rows), (4,), generator=generator).tolist()
        found = self._log_p(model, [self.rows[i] for i in chosen])
        terms = [
            (self.targets[i].exp() * (self.targets[i] - log_p)).sum(-1).mean()
            for i, log_p in zip(chosen, found, strict=True)
        ]
        return torch.stack(terms).mean()


@contextmanager
def _trainable(model: nn.Module, rank: int) -> Iterator[list[nn.Parameter]]:
    """The parameters to train: the MLPs of the upper half, or PEFT's LoRA on them."""
    layers = range(model.config.num_hidden_layers // 2, model.config.num_hidden_layers)
    wanted = {p for p in model.parameters() if p.requires_grad}
    model.requires_grad_(False)
    undo: Callable[[], Any]
    if rank:
        import peft

        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=["gate_proj", "up_proj", "down_proj"],
            layers_to_transform=list(layers),
        )
        torch.manual_seed(0)
        tuned = peft.get_peft_model(model, config)
        parameters, undo = [p for p in tuned.parameters() if p.requires_grad], tuned.unload
    else:
        parameters = [p for i in layers for p in model.model.layers[i].mlp.parameters()]
        saved = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.requires_grad_(True)

        def undo() -> None:
            with torch.no_grad():
                for parameter, before in zip(parameters, saved, strict=True):
                    parameter.copy_(before)

    try:
        yield parameters
    finally:
        undo()
        for p in model.parameters():
            p.requires_grad_(p in wanted)
