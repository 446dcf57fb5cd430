"""Measurements: what runs on a GPU machine and writes ``results/<device>/*.json``."""
