"""Faults of training: real ``npt train`` processes on a tiny model that are killed, starved and deceived (``python -m tests.faults``)."""
