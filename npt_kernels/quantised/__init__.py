"""Frozen linears in 8 and 4 bits: our own and those of other libraries."""
