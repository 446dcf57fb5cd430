"""What only ``gpu_check.py`` needs; everything shared is in ``npt_kernels/bench/``."""
