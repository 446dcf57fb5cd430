"""NPT and LoRA together: a LoRA of peft on the attention of a converted model, both trained on a task, saved and loaded apart.

python examples/with_peft.py
python examples/with_peft.py --model HuggingFaceTB/SmolLM2-135M --text task.txt
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import peft
import torch
from tiny_base import arguments, base_and_text

from npt_kernels import NPTConfig, apply_npt, load_npt, npt_parameters, save_npt


def main() -> None:
    options = arguments(__doc__)
    model, text, _ = base_and_text(options.model, options.text)
    task = text.flip(1)  # the text backwards: something that the model does not know
    # For a task the attention residual may stay: the change starts at zero, which is the original model.
    apply_npt(model, NPTConfig(layers="all", rank=8, attention_residual=True, rule="anchored"))

    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for parameter in npt_parameters(wrapped):
        parameter.requires_grad_(True)  # peft freezes all that is not its own
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    ours = sum(p.numel() for p in npt_parameters(wrapped))
    print(f"training {sum(p.numel() for p in trained):,} parameters, {ours:,} of them NPT's")

    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    for step in range(30):
        batch = task[step * 8 % (len(task) - 8) :][:8]
        loss = wrapped(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.out or temporary)
        save_npt(wrapped, folder / "npt")
        wrapped.save_pretrained(folder / "lora")
        # Back in the same order: NPT on the base model, LoRA on the converted one.
        fresh = base_and_text(options.model, options.text)[0]
        load_npt(fresh, folder / "npt")
        fresh = peft.PeftModel.from_pretrained(fresh, str(folder / "lora"))
        with torch.no_grad():
            difference = (
                (fresh.eval()(input_ids=task[:2]).logits - wrapped.eval()(input_ids=task[:2]).logits).abs().max()
            )
    print(f"loaded again: largest difference of a logit {difference:.1e}")


if __name__ == "__main__":
    main()
