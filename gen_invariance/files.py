"""Files that are written whole or not at all, and checkpoints with a checksum, so that a damaged one is noticed.

A file is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError

from gen_invariance.errors import CheckpointError, GenInvarianceError, OutputError

_REMEDY = "free some space or choose a folder you may write to"
_IN_THE_WAY = "something else of that name is in the way, choose another folder"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_REMEDIES = {
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY), _IN_THE_WAY),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder you may write to"),
    **dict.fromkeys(_NO_ROOM, "free some space, or choose a folder on another disk"),
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "choose a folder that is no link to itself",
}
_MAGIC = b"gen_invariance checkpoint 1 "
_LONGEST_HEADER = 200
_MOST_JSON = 2**28


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place when the block ends without an error.

    Raises:
        OutputError: the folder is read-only, the disk is full, or the rename failed.
    """
    path = Path(path)
    name = path.name
    if len(os.fsencode(name)) > 200:  # a name has 255 bytes, and some are added
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        is_about_another = error.filename not in (None, str(temporary)) and error.errno not in _NO_ROOM
        if isinstance(error, GenInvarianceError) or is_about_another:
            raise  # of a copy that finds no room Python names the source
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def cannot_write(path: Path | str, error: OSError | SafetensorError) -> OutputError:
    """The one-line error for a failed write to `path`; the writer of weights has its own error for a full disk."""
    reason = getattr(error, "strerror", None) or str(error)
    return OutputError(f"cannot write {path}: {reason}; {_REMEDIES.get(getattr(error, 'errno', None) or 0, _REMEDY)}")


def write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path`, whole or not at all; bytes of file names that are not UTF-8 appear escaped."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def utf8_text(text: str) -> str:
    """`text` as any file format can hold it: lone surrogates, as which Python keeps bytes of file names that are not
    UTF-8, are escaped.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that killed processes left in `folder` and its folders; of several processes the first."""
    if os.environ.get("RANK", "0") != "0" or not folder.is_dir():
        return
    for part in (folder, *(entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink())):
        for path in part.glob(".*.tmp"):
            owner = re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)
            if owner and not _is_alive(int(owner[1])):
                path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's
        return True
    return True


def save_checkpoint(path: Path | str, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, and lists and dicts of them) with a checksum, atomically."""
    buffer = io.BytesIO()
    torch.save(_plain(state), buffer)
    payload = buffer.getbuffer()
    header = _MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n"
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(header)
        file.write(payload)


def _plain(value: Any) -> Any:
    """`value` in new containers and with interned texts.

    Pickle writes an object that it has seen before as a reference, so equal states would give other bytes where one of
    them came from a file.
    """
    if isinstance(value, Mapping):
        return {_plain(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value] if isinstance(value, list) else tuple(map(_plain, value))
    return sys.intern(value) if type(value) is str else value


def load_checkpoint(path: Path | str, *, kind: str | None = None) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: missing, truncated, damaged, of another program, or not of `kind`.
    """
    path = Path(path)
    payload = _payload(path)
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"a {type(state).__name__} instead of a mapping")
    except Exception as error:  # torch raises many kinds: foreign objects, or a format newer than this torch
        raise CheckpointError(
            f"checkpoint {path} holds more than tensors, numbers and text, or is of a newer torch; it is not opened"
        ) from error
    if kind is not None and state.get("kind") != kind:
        raise CheckpointError(f"{path} is a checkpoint of kind {state.get('kind')!r}, not {kind!r}; choose another")
    return state


def _payload(path: Path) -> bytes:
    """What follows the header, if its checksum is right."""
    try:
        with open_regular(path) as file:
            header = file.readline(_LONGEST_HEADER).removesuffix(b"\n")
            payload = file.read() if header.startswith(_MAGIC) else b""
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}; check the path") from error
    if not header.startswith(_MAGIC):
        raise CheckpointError(f"{path} is not a checkpoint of gen_invariance; give a file that a run wrote")
    if header[len(_MAGIC) :].decode("ascii", "replace") != hashlib.sha256(payload).hexdigest():
        raise CheckpointError(f"checkpoint {path} is truncated or damaged (checksum differs); use an older one")
    return payload


def reads_back(path: Path) -> bool:
    """Whether the checkpoint at `path` is whole."""
    try:
        _payload(path)
    except CheckpointError:
        return False
    return True


def open_regular(path: Path | str, *, most: int | None = None) -> BinaryIO:
    """`path` opened for reading bytes, if it is a regular file: a pipe would block, a device might never end.

    Args:
        path: of the file.
        most: bytes that it may have; None takes any size.

    Raises:
        OSError: it cannot be opened, is no regular file, or is larger.
    """
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # NUL in a path
        raise OSError(errno.EINVAL, f"not a path ({error})") from None
    about = os.fstat(number)
    wrong = "" if stat.S_ISREG(about.st_mode) else "not a regular file"
    if most is not None and about.st_size > most:
        wrong = wrong or f"{about.st_size:,} bytes, which is more than {most:,}"
    if wrong:
        os.close(number)
        raise OSError(errno.EINVAL, wrong, str(path))
    return os.fdopen(number, "rb")


def read_regular(path: Path | str, *, most: int | None = None) -> bytes:
    """The bytes of a regular file; arguments and errors as for `open_regular`."""
    with open_regular(path, most=most) as file:
        return file.read()


def read_json(path: Path | str) -> Any:
    """What a file holds as JSON.

    Raises:
        OSError: it cannot be opened, is no regular file, or is larger than any that this package writes.
        ValueError: it is not JSON.
    """
    try:
        return json.loads(read_regular(path, most=_MOST_JSON))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def refuse_strangers(folder: Path) -> None:
    """Refuse to write into a folder from elsewhere that could make it write somewhere else, or wait for ever.

    Raises:
        OutputError: a link below `folder` leads out of it, or something is neither a file nor a folder.
    """
    home = os.path.realpath(folder)
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode) and not os.path.realpath(path).startswith(home + os.sep):
                raise OutputError(f"{path} is a link that leads out of {folder}; remove it")
            if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise OutputError(f"{path} is neither a file nor a folder; remove it")
