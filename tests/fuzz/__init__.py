"""Fuzz: every public op and every reader of files on what nobody would write. ``python -m tests.fuzz --help``."""
