"""What a run will need, before anything is loaded: layers, bytes, time."""
