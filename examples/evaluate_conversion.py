"""What a conversion is worth: perplexity and KL with standard errors, fidelity and ‖ΔW‖ layer by layer, what single layers do.

python examples/evaluate_conversion.py
python examples/evaluate_conversion.py --model HuggingFaceTB/SmolLM2-135M --text book.txt --rank auto:128
"""

from __future__ import annotations

from tiny_base import arguments, base_and_text

from npt_kernels import NPTConfig, apply_npt, npt_disabled, npt_scale
from npt_kernels.evaluation.fidelity import layer_fidelity
from npt_kernels.evaluation.perplexity import evaluate
from npt_kernels.plasticity import capture


def main() -> None:
    options = arguments(__doc__)
    model, text, heldout = base_and_text(options.model, options.text)
    report = apply_npt(model, NPTConfig(layers="all", rank=options.rank), calibration=text)

    result = evaluate(model, heldout)
    print(f"perplexity {result.base_perplexity:.3f} → {result.npt_perplexity:.3f}")
    print(f"ratio {result.perplexity_ratio:.4f} ± {result.perplexity_ratio_se:.4f}")
    print(f"KL {result.kl:.4f} ± {result.kl_se:.4f} nats/token; same first choice {result.top1_agreement:.1%}")

    print("layer  rank  explained variance  ‖ΔW‖ of each target")
    for layer in layer_fidelity(model, heldout):
        norms = ", ".join(f"{target} {norm:.2f}" for target, norm in layer.delta_norm.items())
        print(f"{layer.index:5}  {layer.rank:4}  {layer.explained_variance:18.4f}  {norms}")

    # One layer as it was, the others converted: which one costs most?
    for index in report.layers:
        with npt_disabled(model, layers=[index]):
            print(f"without the conversion of layer {index}: KL {evaluate(model, heldout).kl:.4f}")
    with npt_scale(model, 0.5):  # every weight change at half its strength
        print(f"half of every change: KL {evaluate(model, heldout).kl:.4f}")

    # What each token's change is made of: the attention output and its bottleneck z, from which ΔW follows.
    with capture(model) as deltas:
        model(input_ids=heldout[:1])
    z = deltas.bottleneck(model)
    print(f"captured: {len(deltas)} tokens, z of layer 0 {list(z[0].shape)}, mean |z| {z[0].abs().mean():.3f}")


if __name__ == "__main__":
    main()
