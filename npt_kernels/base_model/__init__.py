"""The model that a run converts: the demo's, a local folder, a hub id."""
