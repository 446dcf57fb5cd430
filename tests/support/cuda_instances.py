"""The segmented-K GEMMs that csrc/inst compiles, as data: tests ask for each by name, whatever ``choose`` would pick.

``tests/cuda/test_host.py`` compares this list with the built module's, so a new instance without a test fails there.
"""

from __future__ import annotations

from dataclasses import dataclass

from npt_kernels.kernels.cuda.choose import DECODE_TOKENS, Config, Epilogue, Family

__all__ = ["BACKWARD", "FORWARD", "Instance", "instances"]

FORWARD = (Epilogue.STORE, Epilogue.ACT, Epilogue.GATE_UP)
BACKWARD = (Epilogue.ACT_BWD, Epilogue.GATE_UP_BWD)


@dataclass(frozen=True)
class Instance:
    """One kernel but for the element type: its configuration and the layout of its weights."""

    config: Config
    mn_major: bool

    def __str__(self) -> str:
        c = self.config
        layout = "mn" if self.mn_major else "k"
        split = f"-split{c.split}" if c.family == Family.SPLIT else ""
        return f"{c.family.name}-{c.epilogue.name}-{c.block_m}x{c.block_n}-cluster{c.cluster}{split}-{layout}".lower()


def _shapes(epilogue: Epilogue, mn_major: bool) -> list[tuple[Family, int, int, int, int]]:
    """(family, cluster, block_m, block_n, split); decode kernels are split by ``test_split_decode``."""
    clusters = (1, 2)
    if epilogue in BACKWARD:
        return [(Family.PINGPONG, n, 128, 192, 1) for n in clusters]
    coop = [(Family.COOP, n, 128, 256, 1) for n in clusters]
    decode = [(Family.DECODE, 1, tokens, 64, 1) for tokens in DECODE_TOKENS]
    if epilogue != Epilogue.GATE_UP:
        split = [(Family.SPLIT, n, 128, 256, parts) for n in clusters for parts in (1, 2, 4, 8) if n * parts <= 8]
        narrow = [(Family.PINGPONG, n, 128, 128, 1) for n in clusters]
        return [*coop, *narrow, *decode, *(split if epilogue == Epilogue.STORE else ())]
    # MN-major gate-up weights have no ping-pong kernel: csrc/README.md, traps.
    return [*coop, *((Family.PINGPONG, n, 64, 256, 1) for n in (() if mn_major else clusters)), *decode]


def instances(*epilogues: Epilogue) -> list[Instance]:
    """Every kernel with one of these epilogues; one that splits K, once for each number of parts."""
    return [
        Instance(Config(family, epilogue, cluster, block_m, block_n, 4, "test", split), mn_major)
        for epilogue in epilogues
        for mn_major in (False, True)
        for family, cluster, block_m, block_n, split in _shapes(epilogue, mn_major)
    ]
