"""Run folders: settings, versions, metrics and checkpoints of one command, and the random numbers it draws.

A run folder describes itself: `run.json` (kind, resolved settings, seed, versions, commit, command),
`metrics.jsonl` (one JSON object a line), `checkpoints/step-*.ckpt`, and whatever the command writes beside them.
Everything is written under a temporary name and renamed, so a killed run never leaves half a file, and each
checkpoint carries a checksum, so a damaged one is noticed and passed over.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gen_invariance.errors import CheckpointError, GenInvarianceError, OutputError, SettingsError

MISFITS = (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError)
"""What `load_state_dict` of models and optimisers raises for a state that is not theirs."""

_MAGIC = b"gen_invariance checkpoint 1 "
_PACKAGES = ("gen_invariance", "torch", "torchvision", "diffusers", "kornia", "accelerate", "numpy", "scikit-learn")


def named_generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator whose stream depends only on `seed` and the words in `purpose`.

    Consumers get their own stream ("loader", "style", ...), and a step's stream is named by its step number, so
    nothing has to be saved or replayed to resume, and no result depends on the number of workers or ranks.
    """
    words = "/".join(map(str, (seed, *purpose)))
    # Names of files may hold bytes that are not UTF-8; Python keeps them as surrogates.
    digest = hashlib.sha256(words.encode(errors="surrogatepass")).digest()
    number = int.from_bytes(digest[:8], "little") >> 1
    return torch.Generator().manual_seed(number)


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place when the block ends without an error.

    Raises:
        OutputError: the folder is read-only, the disk is full, or the rename failed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
        if isinstance(error, GenInvarianceError) or error.filename not in (None, str(temporary)):
            raise  # about another file that the block touched
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def cannot_write(path: Path | str, error: OSError) -> OutputError:
    """The one-line error for a failed write to `path`."""
    reason = error.strerror or str(error)
    return OutputError(f"cannot write {path}: {reason}; free some space or choose a folder you may write to")


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


def source_commit() -> str | None:
    """The git commit of the package's own checkout, or None when it is installed from a wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def package_versions() -> dict[str, str]:
    """Versions of this package and of the libraries its figures depend on."""
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def config_digest(config: Mapping[str, Any]) -> str:
    """Short hash of settings; two runs with equal digests were asked for the same thing."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Run:
    """One run folder.

    Args:
        path: the folder; created when missing.
        kind: what is run ("fit", "train", ...).
        seed: root of every generator.
        config: resolved settings, JSON-able. Settings that do not change the result (`resume`, `progress`,
            output paths, how often to save) do not belong in it.
        resume: continue the run that is in the folder instead of refusing to touch it.
        anyway: continue it under other settings too; `run.json` then keeps the former ones under "earlier". None
            does not, and does not offer it in the error either.

    Raises:
        SettingsError: the folder holds a finished or half-done run and `resume` is off, a run of another kind,
            or one of other settings.
        OutputError: the folder cannot be created or written, or it holds foreign files.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        kind: str,
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        resume: bool = False,
        anyway: bool | None = None,
    ) -> None:
        self.path, self.kind, self.seed = Path(path), kind, seed
        self.config = json.loads(json.dumps(config or {}, default=str))
        self._metrics = self.path / "metrics.jsonl"
        if (self.path / "run.json").exists():
            self._check_same(resume=resume, anyway=anyway)
            remove_leftovers(self.path)
        else:
            self._create()

    def _check_same(self, *, resume: bool, anyway: bool | None) -> None:
        if not resume:
            raise SettingsError(
                f"{self.path} already holds a run; add resume=true to continue it, or choose another folder"
            )
        try:
            old = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
            old_kind, old_settings = old["kind"], {**old["config"], "seed": old["seed"]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{self.path / 'run.json'} is damaged ({error}); choose another folder") from error
        if old_kind != self.kind:
            raise SettingsError(f"{self.path} holds a '{old_kind}' run, not '{self.kind}'; choose another folder")
        settings = {**self.config, "seed": self.seed}
        changed = sorted(key for key in {*old_settings, *settings} if old_settings.get(key) != settings.get(key))
        if changed and not anyway:
            offered = "" if anyway is None else ", or add anyway=true"
            raise SettingsError(
                f"cannot resume {self.path}: settings differ from the run's in {', '.join(changed)}; "
                f"use the same settings or another folder{offered}"
            )
        if changed:
            warnings.warn(f"{self.path} goes on under other settings: {', '.join(changed)}", stacklevel=4)
            self._describe(earlier=[*old.pop("earlier", []), old])

    def _create(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path)
            foreign = [entry.name for entry in self.path.iterdir()]
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if foreign:
            raise OutputError(
                f"{self.path} is not empty and holds no run (found {foreign[0]!r}); choose an empty or a new folder"
            )
        self._describe()

    def _describe(self, **more: Any) -> None:
        """Write `run.json`."""
        about = {
            "kind": self.kind,
            "seed": self.seed,
            "config": self.config,
            "config_digest": config_digest(self.config),
            "versions": package_versions(),
            "commit": source_commit(),
            "command": sys.argv,
            **more,
        }
        write_json(self.path / "run.json", about)

    def note(self, **facts: Any) -> None:
        """Add `facts` on the run, JSON-able, to "facts" in `run.json`; unlike settings they may change on the way.

        Raises:
            CheckpointError: `run.json` is damaged.
            OutputError: read-only or full disk.
        """
        path = self.path / "run.json"
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            about["facts"] = {**about.get("facts", {}), **facts}
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); choose another folder") from error
        write_json(path, about)

    def generator(self, *purpose: object) -> torch.Generator:
        """The run's own generator for `purpose`; see `named_generator`."""
        return named_generator(self.seed, *purpose)

    def log(self, **values: Any) -> None:
        """Append one JSON line to `metrics.jsonl`; numbers only, strings and lists of them."""
        line = json.dumps(values, default=float)
        try:
            with open(self._metrics, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise cannot_write(self._metrics, error) from error

    def metrics(self) -> list[dict[str, Any]]:
        """The logged lines, oldest first; a half-written last line (a killed run) is left out."""
        if not self._metrics.exists():
            return []
        rows = []
        for line in self._metrics.read_bytes().splitlines():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):  # half a line, or a damaged one
                continue
        return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step", 0), int | float)]

    def save(self, step: int, state: Mapping[str, Any], *, keep: int = 2) -> Path:
        """Write the checkpoint of `step`; once it reads back intact, remove all but the newest `keep`.

        Checkpoints of later steps go as well: the run is at `step`, so those were passed over as damaged.
        """
        path = self.path / "checkpoints" / f"step-{step:08d}.ckpt"
        save_checkpoint(path, {"kind": self.kind, "step": step, **state})
        present = self._checkpoints()
        place = present.index(path)
        superseded = [*present[:place], *present[place + keep :]]
        if superseded and not _reads_back(path):
            warnings.warn(f"{path} was written but reads back damaged; older ones stay, check the disk", stacklevel=2)
            return path
        for old in superseded:
            old.unlink(missing_ok=True)
        return path

    def load_latest(self) -> dict[str, Any] | None:
        """The newest intact checkpoint, or None; damaged ones are named in a warning and passed over.

        Lines of `metrics.jsonl` from after that checkpoint are dropped, since they will be written again.
        """
        for path in self._checkpoints():
            try:
                state = load_checkpoint(path, kind=self.kind)
                _check_step(path, state)
            except CheckpointError as error:
                warnings.warn(f"{error}; trying an older one", stacklevel=2)
                continue
            self._truncate_metrics(state["step"])
            return state
        self._truncate_metrics(0)
        return None

    def _checkpoints(self) -> list[Path]:
        pattern = re.compile(r"step-\d{8}\.ckpt")
        folder = self.path / "checkpoints"
        found = folder.iterdir() if folder.is_dir() else ()
        return sorted((path for path in found if pattern.fullmatch(path.name)), reverse=True)

    def _truncate_metrics(self, step: int) -> None:
        if self._metrics.exists():
            kept = [json.dumps(row) + "\n" for row in self.metrics() if row.get("step", 0) <= step]
            write_text(self._metrics, "".join(kept))


def _check_step(path: Path, state: Mapping[str, Any]) -> None:
    step = state.get("step")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"checkpoint {path} does not say after which step it was written")


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that killed processes left in `folder` and its folders; of several processes the first."""
    if os.environ.get("RANK", "0") != "0" or not folder.is_dir():
        return
    for place in (folder, *(entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink())):
        for path in place.glob(".*.tmp"):
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
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}; check the path") from error
    header, _, payload = content.partition(b"\n")
    if not header.startswith(_MAGIC):
        raise CheckpointError(f"{path} is not a checkpoint of gen_invariance; give a file that a run wrote")
    if header[len(_MAGIC) :].decode("ascii", "replace") != hashlib.sha256(payload).hexdigest():
        raise CheckpointError(f"checkpoint {path} is truncated or damaged (checksum differs); use an older one")
    return payload


def _reads_back(path: Path) -> bool:
    try:
        _payload(path)
    except CheckpointError:
        return False
    return True
