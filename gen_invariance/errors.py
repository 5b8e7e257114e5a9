"""Errors that name what was wrong, where, and what to do.

Every error the package raises on purpose derives from `GenInvarianceError`, and also from the built-in that a
caller would expect, so `except ValueError` keeps working. The message is one line: what was got, what was
expected, what to do. The command line prints that line and exits with `exit_code`.
"""

import re


class GenInvarianceError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line leaves with.

    Example:
        >>> from gen_invariance import GenInvarianceError, Rotation
        >>> try:
        ...     Rotation(degrees=270)
        ... except GenInvarianceError as error:
        ...     print(error)
        rotation.degrees must be in [0, 180], got 270
    """

    exit_code = 2


class SettingsError(GenInvarianceError, ValueError):
    """A setting is misspelt, missing, of the wrong kind, or out of its range."""


class ShapeError(GenInvarianceError, ValueError):
    """A tensor or array has the wrong number of axes, rows or channels."""


class RangeError(GenInvarianceError, ValueError):
    """A value is not finite or outside the range its kind allows (images in [0, 1], labels in [0, K))."""


class DataError(GenInvarianceError, ValueError):
    """A data set was found but cannot be used: a corrupt image, an empty class, a missing array."""


class DataNotFoundError(GenInvarianceError, FileNotFoundError):
    """A file or folder that should hold data does not exist."""

    def __str__(self) -> str:  # FileNotFoundError would otherwise format errno pairs
        return str(self.args[0]) if self.args else ""


class CheckpointError(GenInvarianceError, RuntimeError):
    """A checkpoint is truncated, damaged, of another kind, or does not fit the present settings."""


class OutputError(GenInvarianceError, OSError):
    """A result cannot be written: read-only or full disk, or a folder that holds somebody else's files."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class RunError(GenInvarianceError, RuntimeError):
    """A run that started well failed: a loss became non-finite, a worker died."""

    exit_code = 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left; torch says so in errors of several kinds."""
    if isinstance(error, MemoryError):
        return True
    text = "out of memory|not enough memory|can't allocate memory|(CUBLAS|CUDNN|CUFFT|CUSOLVER)_STATUS_ALLOC_FAILED"
    text += "|CUDNN_STATUS_INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED"
    return isinstance(error, RuntimeError) and re.search(text, str(error)) is not None


def is_device_failure(error: BaseException) -> bool:
    """Whether the device failed, as after an illegal access: what it computes after that in this process fails, too."""
    text = r"CUDA error|CUDA driver error|(CUBLAS|CUDNN|CUFFT|CUSOLVER|CUSPARSE)_STATUS_|HIP error"
    return isinstance(error, RuntimeError) and re.search(text, str(error)) is not None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def printable(text: object) -> str:
    """`text`, such as a path, for a message: line breaks and undecodable bytes escaped, so that it stays one line."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))
