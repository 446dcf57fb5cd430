"""One launch against float64 truth: own row pitches, outputs framed in NaN, the same bits in every schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from control import Emulator, Schedule
from torch import Tensor

__all__ = ["Case", "Output", "difference", "normal", "pitched", "ternary"]

NAN = float("nan")
EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
FILL = 7.0  # compares NaN with NaN


def ternary(*shape: int, dtype: torch.dtype) -> Tensor:
    """-1, 0, 1: sums of products are integers, exact in fp32."""
    return torch.randint(-1, 2, shape).to(dtype)


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(*shape) * 0.5).to(dtype)


def pitched(make: Callable[..., Tensor], rows: int, cols: int, dtype: torch.dtype, extra: int = 8) -> Tensor:
    """``[rows, cols]`` with a row pitch of ``cols + extra``."""
    return make(rows, cols + extra, dtype=dtype)[:, :cols]


@dataclass(frozen=True)
class Output:
    """What a launch has to write.

    Attributes:
        truth: float64.
        exact: The truth rounded to dtype is the only right answer.
        slack: Otherwise: how many roundings (of the element, and of the mean element: sums in another order) are allowed.
        wanted: If not, the launch is given no place for it, or must leave it alone.
        start: What it holds before (a gradient computed in place), else NaN.
        extra: Row pitch beyond the columns rounded up to 8; an odd one where rows need no alignment.
        compact: No pitch at all (fp32 shares): a frame before and after.
    """

    name: str
    truth: Tensor
    dtype: torch.dtype
    exact: bool = False
    slack: tuple[float, float] = (1.01, 0.02)
    wanted: bool = True
    start: Tensor | None = None
    extra: int = 16
    compact: bool = False

    def place(self) -> tuple[Tensor, Tensor]:
        """``(frame, view)``: NaN everywhere, the view inside."""
        shape = self.truth.shape
        if self.compact:
            frame = torch.full((self.truth.numel() + 128,), NAN, dtype=self.dtype)
            return frame, frame[64:-64].view(shape)
        frame = torch.full((shape[0] + 4, -(-shape[1] // 8) * 8 + self.extra), NAN, dtype=self.dtype)
        first = self.extra // 2
        view = frame[2 : 2 + shape[0], first : first + shape[1]]
        if self.start is not None:
            view.copy_(self.start)
        return frame, view

    def fault(self, frame: Tensor, view: Tensor) -> str | None:
        """What is wrong with it, or ``None``."""
        if not self.wanted:
            return (
                None
                if self.start is not None or bool(view.isnan().all())
                else f"{self.name} was written and was not wanted"
            )
        why = difference(view, self.truth, exact=self.exact, slack=self.slack)
        if why is not None:
            return f"{self.name}: {why}"
        outside = frame.clone()
        outside[64:-64] = NAN if self.compact else outside[64:-64]
        if not self.compact:
            first = self.extra // 2
            outside[2 : 2 + view.shape[0], first : first + view.shape[1]] = NAN
        return None if bool(outside.isnan().all()) else f"{self.name}: its frame was written"


def difference(got: Tensor, truth: Tensor, *, exact: bool, slack: tuple[float, float]) -> str | None:
    """Why ``got`` is not ``truth``, or ``None``."""
    if got.isnan().any():
        return f"{int(got.isnan().sum())} of {got.numel()} are NaN"
    rounded = truth.to(got.dtype)
    if exact:
        wrong = got != rounded
        return f"{int(wrong.sum())} of {got.numel()} differ from the exact result" if wrong.any() else None
    finite = ~rounded.isinf()
    if not torch.equal(got[~finite], rounded[~finite]):
        return "it overflows elsewhere than the truth"
    error, size = (got.double() - truth).abs()[finite], truth.abs()[finite]
    if error.numel() == 0:
        return None
    tolerance = EPS[got.dtype] * (slack[0] * size + slack[1] * size.mean()) + 1e-6
    worst = (error / tolerance).max().item()
    return f"error {worst:.2f} times the tolerance" if worst > 1 else None


@dataclass(frozen=True)
class Case:
    """A launch to be repeated under several schedules: ``run`` gets the outputs' views in order."""

    family: str
    what: str
    outputs: Sequence[Output]
    run: Callable[[Sequence[Tensor]], None]

    def fault(self, emulator: Emulator, schedules: Sequence[Schedule]) -> str | None:
        """The first thing that is wrong under any of them, or ``None``."""
        first: list[Tensor] | None = None
        for schedule in schedules:
            emulator.follow(schedule)
            places = [output.place() for output in self.outputs]
            try:
                self.run([view for _, view in places])
            except RuntimeError as error:
                return f"{schedule}: {error}"
            for output, (frame, view) in zip(self.outputs, places, strict=True):
                why = output.fault(frame, view)
                if why is not None:
                    return f"{schedule}: {why}"
            now = [view.nan_to_num(FILL) for _, view in places]
            if first is None:
                first = now
            elif not all(map(torch.equal, first, now)):
                return f"{schedule}: other bits than under {schedules[0]}"
        return None
