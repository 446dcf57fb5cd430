"""Equivalence pre-training: fit NP components so that a converted layer returns what the original layer returned."""
