"""What a converted model is worth: perplexity, KL, fidelity per layer, samples, pictures."""
