from .op import mlp

__all__ = ["mlp"]
