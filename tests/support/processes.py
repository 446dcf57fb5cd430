"""What tests run in other processes, where it must be importable."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from npt_kernels import npt_disabled

__all__ = ["answer_in_a_process", "in_a_forked_process"]


def in_a_forked_process(work: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether ``work`` returned ``True`` in a fork of this process; one that hangs is ended and counts as ``False``."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() else 3
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@torch.no_grad()
def answer_in_a_process(models: list[Any], ids: torch.Tensor, answers: Any) -> None:
    """The logits of all models, converted and original, as numpy-free copies that outlive this process."""
    torch.set_num_threads(1)
    on = [model(input_ids=ids).logits for model in models]
    off = []
    for model in models:
        with npt_disabled(model):
            off.append(model(input_ids=ids).logits)
    answers.put((on, off))
    # The tensors go through shared memory whose handle this process serves until it is fetched.
    answers.close()
    answers.join_thread()
    time.sleep(0.5)
