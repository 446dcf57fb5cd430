"""Convert a model, see what it costs, write with it, save the adapter and load it again.

python examples/convert_your_model.py
python examples/convert_your_model.py --model HuggingFaceTB/SmolLM2-135M --text book.txt --rank auto:184 --out smol-npt
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tiny_base import arguments, base_and_text

from npt_kernels import NPTConfig, NPTModelForCausalLM, apply_npt, npt_disabled, save_npt


def main() -> None:
    options = arguments(__doc__)
    model, text, heldout = base_and_text(options.model, options.text)
    # The calibration is token ids [n, seq] of text like the model will see: the closed form is fitted to it.
    report = apply_npt(model, NPTConfig(layers="all", rank=options.rank), calibration=text)
    print(report)

    with torch.no_grad():
        converted = model(input_ids=heldout).logits.log_softmax(-1)
        with npt_disabled(model):  # the original, bit for bit
            original = model(input_ids=heldout).logits.log_softmax(-1)
    kl = (original.exp() * (original - converted)).sum(-1).mean()
    print(f"KL(original‖converted) on held-out text: {kl:.4f} nats/token")

    prompt = heldout[:1, : heldout.shape[1] // 2]
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.out or temporary)
        # An adapter names its base model; the tiny one is in no folder yet.
        base = options.model or folder / "base"
        if options.model is None:
            with_base(model, folder / "base")
        save_npt(model, folder / "adapter")
        again = NPTModelForCausalLM.from_pretrained(folder / "adapter", base_model=base)
        same = torch.equal(
            again.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False), written
        )
        size = (folder / "adapter" / "npt_model.safetensors").stat().st_size
    print(f"saved and loaded: {size / 1e6:.2f} MB, {'the same text' if same else 'ANOTHER TEXT'}")


def with_base(model: torch.nn.Module, folder: Path) -> None:
    """The base model alone, without the components."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".np_component." not in name}
    model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]


if __name__ == "__main__":
    main()
