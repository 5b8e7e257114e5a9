"""What the stages share: the device, clocks that wait for it, and results that are there if a stage is stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

ESTIMATE = "200 epochs, estimated seconds"
"""Name of the result that decides whether a whole training is begun."""


@dataclass
class Host:
    """The device of a stage, and where its results go.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        tiny: a dry run: as little as shows that the code works.
        data: folder of image sets.
        out: folder for files beside the results.
        result: file of the results.
    """

    device: str
    tiny: bool
    data: Path
    out: Path
    result: Path
    found: dict[str, object] = field(default_factory=dict)

    @property
    def is_cuda(self) -> bool:
        """Whether there is a queue to wait for."""
        return self.device.startswith("cuda")

    def pick(self, whole: object, tiny: object) -> object:
        """`tiny` in a dry run."""
        return tiny if self.tiny else whole

    def wait(self) -> None:
        """Until the device has done all that it was asked."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def note(self, name: str, value: object) -> None:
        """Keep a result, in the file, too."""
        self.found[name] = value
        self.result.write_text(json.dumps(self.found, default=str))

    def seconds(self, function: Callable[[], object], repeats: int) -> float:
        """Mean wall time of a call, the queue empty before and after."""
        self.wait()
        started = time.perf_counter()
        for _ in range(repeats):
            function()
        self.wait()
        return (time.perf_counter() - started) / repeats

    def note_time(self, name: str, function: Callable[[], object], repeats: int, *, divide: int = 1) -> bool:
        """Milliseconds of a call after three more, or the error it ends with; whether it worked."""
        try:
            for _ in range(3):
                function()
            self.note(name, {"ms": 1e3 * self.seconds(function, repeats) / divide})
        except Exception as error:  # one variant that fails stops no other
            self.note(name, describe(error))
            return False
        return True


def describe(error: Exception) -> dict[str, str]:
    """An error as a result."""
    return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
