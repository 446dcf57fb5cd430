"""Train a conversion towards the original: KL of the next-token distributions, only the NP components move.

    python examples/train_conversion.py
    python examples/train_conversion.py --model HuggingFaceTB/SmolLM2-135M --text book.txt --rank auto:64 --out smol-npt

A loop of one's own in twenty lines. `npt train` does this and more (per layer, streamed, resumed, on several devices).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny_base import arguments, base_and_text

from npt_kernels import NPTConfig, apply_npt, npt_disabled, npt_parameters, save_npt
from npt_kernels.evaluation.perplexity import evaluate

STEPS, BATCH = 60, 8


def main() -> None:
    options = arguments(__doc__)
    model, text, heldout = base_and_text(options.model, options.text)
    apply_npt(model, NPTConfig(layers="all", rank=options.rank), calibration=text)
    before = evaluate(model, heldout)

    optimizer = torch.optim.AdamW(npt_parameters(model), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        batch = text[torch.randint(len(text), (BATCH,), generator=generator)]
        with torch.no_grad(), npt_disabled(model):
            teacher = model(input_ids=batch, use_cache=False).logits.log_softmax(-1)
        student = model(input_ids=batch, use_cache=False).logits.log_softmax(-1)
        loss = F.kl_div(student.flatten(0, 1), teacher.flatten(0, 1), log_target=True, reduction="batchmean")
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: KL {loss:.4f}")

    after = evaluate(model, heldout)
    print(f"held out: KL {before.kl:.4f} → {after.kl:.4f}")
    print(f"perplexity ratio {before.perplexity_ratio:.4f} → {after.perplexity_ratio:.4f}")
    if options.out:
        print(f"saved in {save_npt(model, options.out)}")


if __name__ == "__main__":
    main()
