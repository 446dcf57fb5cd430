"""What tests and benchmarks measure with: problems, the number rule, timing, live bytes."""
