from .op import matched_norm

__all__ = ["matched_norm"]
