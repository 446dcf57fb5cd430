"""The portable fused backend. Only ``support`` may be imported without Triton; kernels are loaded at their first use."""
