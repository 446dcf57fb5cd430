"""Pieces shared by the benchmarks: shapes, problems, checking, timing, contenders, report."""
