from .op import factored_linear

__all__ = ["factored_linear"]
