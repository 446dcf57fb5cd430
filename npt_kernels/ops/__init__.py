"""One folder an op: ``README.md`` (maths), ``naive.py`` (float64 truth), ``eager.py`` (vendor GEMM), ``op.py`` (schema)."""
