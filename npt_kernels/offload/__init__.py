"""Frozen layers that wait in host memory or on disk and visit the device one after the other.

``weights.py`` finds the tensors of a layer and gives them a home; ``streamer.py`` brings layers into two device buffers, one
ahead; ``copy_speed.py`` is the arithmetic of transfer against work; ``setup.py`` turns a run's configuration into all that.
"""

from .copy_speed import TransferPlan, plan_transfer
from .setup import StreamMode, load_for_sharding, load_for_streaming, stream_mode, streaming, streaming_notes
from .streamer import LayerStreamer, Transfers

__all__ = [
    "LayerStreamer",
    "StreamMode",
    "TransferPlan",
    "Transfers",
    "load_for_sharding",
    "load_for_streaming",
    "plan_transfer",
    "stream_mode",
    "streaming",
    "streaming_notes",
]
