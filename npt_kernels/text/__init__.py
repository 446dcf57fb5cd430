"""The text that a run reads: sources, formats, packing, streaming."""
