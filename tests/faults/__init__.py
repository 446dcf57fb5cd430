"""Faults of training: real ``npt train`` processes that are killed, starved and deceived (``python -m tests.faults``)."""
