"""``npt bench report``: one self-contained page, and PNGs, from result files."""

from __future__ import annotations

from .collect import Collected, collect
from .page import write_page, write_pngs

__all__ = ["Collected", "collect", "write_page", "write_pngs"]
