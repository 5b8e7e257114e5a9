"""Standard streams that do not end the work: whoever reads them may go, and may know no letters but ASCII."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class LastingStream:
    """A text stream whose failures are noted instead of raised; what it cannot encode is written as an escape.

    Attributes:
        failure: why nothing more is written; None while all is well.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text` unless the stream has failed before."""
        if self.failure is None:
            try:
                self._stream.write(self._encodable(text))
            except (OSError, ValueError) as error:  # the reader is gone, the disk is full, the stream is closed
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Pass on what was written so far."""
        if self.failure is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _encodable(self, text: str) -> str:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def _give_up(self, error: Exception) -> None:
        self.failure = error
        try:  # Python flushes once more when it ends; what is left goes where it cannot fail
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
        except (OSError, ValueError):
            return  # a stream without a descriptor


@contextmanager
def lasting_streams() -> Iterator[LastingStream]:
    """Within the block `sys.stdout` and `sys.stderr` are lasting, also where they were closed; yields the former."""
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stdout, sys.stderr = (LastingStream(stream or nowhere) for stream in before)  # type: ignore[assignment]
        try:
            yield sys.stdout  # type: ignore[misc]
        finally:
            sys.stdout.flush()
            sys.stdout, sys.stderr = before


def _open_closed_descriptors() -> None:
    """A file that is opened next would otherwise get the number of a closed standard stream, and what it carries."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
