"""Measuring: ``npt bench kernels | memory | train | report | compare``; one registry of ops, shapes, providers and modes.

Nothing here is imported by the rest of the package. ``benchmarks/`` of the repository holds scripts and committed results.
"""
