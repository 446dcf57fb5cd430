"""What autograd and the compiler see: one folder an op, with its maths (``README.md``), float64 truth and schema.

To read the package from its heart outwards:
1. ``rules/base.py``: every form of ΔW is a vector ``c`` of R numbers per token.
2. ``ops/mlp/README.md``, then ``ops/mlp/plan.py``: the whole MLP, forward and backward, in terms of ``c``.
3. ``kernels/triton/segmented_gemm.py``: ``x Wᵀ + c w_b_up`` as one GEMM whose K loop runs on into the columns of ``c``.
"""
