"""The closed form: fit NP components from a few thousand tokens without training."""

from __future__ import annotations

from .closed_form import closed_form_components

__all__ = ["closed_form_components"]
