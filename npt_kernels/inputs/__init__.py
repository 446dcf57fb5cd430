"""What a run reads: base models and text, from packages, files or the hub."""
