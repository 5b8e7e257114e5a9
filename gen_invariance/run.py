"""Run folders: settings, versions, metrics and checkpoints of one command, and the random numbers it draws.

A run folder describes itself: `run.json` (kind, resolved settings, seed, versions, commit, command),
`metrics.jsonl` (one JSON object a line), `checkpoints/step-*.ckpt` (`stop-*.ckpt` where the run was told to stop),
`data.json` (which images it saw, see `data.identity`), and whatever the command writes beside them.
Everything is written under a temporary name and renamed, so a killed run never leaves half a file, and each
checkpoint carries a checksum, so a damaged one is noticed and passed over.
"""

from __future__ import annotations

import hashlib
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
from gen_invariance.files import (
    cannot_write,
    load_checkpoint,
    read_json,
    read_regular,
    reads_back,
    refuse_strangers,
    remove_leftovers,
    save_checkpoint,
    write_json,
    write_text,
)

MISFITS = (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError)
"""What `load_state_dict` of models and optimisers raises for a state that is not theirs."""

_IMAGES = {"train": "its training images", "test": "its test images"}  # whose digests `order` keeps as settings
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
    versions = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def config_digest(config: Mapping[str, Any]) -> str:
    """Short hash of settings; two runs with equal digests were asked for the same thing."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


def is_first_process() -> bool:
    """Whether this is the first, or only, process of a launcher such as `accelerate launch` or `torchrun`."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def first_process_first() -> Iterator[None]:
    """Within the block the first of several processes runs alone; the others follow when it is done."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    from accelerate import PartialState

    cpu = not torch.accelerator.is_available()  # accelerate would wait for one
    with PartialState(cpu=cpu).main_process_first():
        yield


class Run:
    """One run folder, or a run in memory; `Run.open` opens one for the length of a block.

    Args:
        path: the folder, created when missing. None keeps metrics in memory and saves no checkpoint.
        kind: what is run ("fit", "train", ...).
        seed: root of every generator.
        config: resolved settings, JSON-able. Settings that do not change the result (`resume`, `progress`,
            output paths, how often to save) do not belong in it.
        resume: continue the run that is in the folder, or start one where there is none (None does the same). False
            refuses a folder that holds a run.
        allow_changed_settings: continue under other settings too; `run.json` then keeps the former ones under
            "earlier". None does not, and the error does not offer it either.

    Raises:
        SettingsError: the folder holds a finished or half-done run and `resume` is off, a run of another kind,
            or one of other settings.
        OutputError: the folder cannot be created or written, or it holds foreign files.
    """

    def __init__(
        self,
        path: Path | str | None,
        *,
        kind: str,
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        resume: bool | None = False,
        allow_changed_settings: bool | None = None,
    ) -> None:
        self.path, self.kind, self.seed = None if path is None else Path(path).expanduser(), kind, seed
        self.config = json.loads(json.dumps(config or {}, default=str))
        self.changed_settings: tuple[str, ...] = ()
        self._rows: list[dict[str, Any]] = []  # the metrics of a run in memory
        if self.path is None:
            return
        self._metrics = self.path / "metrics.jsonl"
        if os.path.lexists(self.path / "run.json"):
            refuse_strangers(self.path)
            self._check_same(resume=resume is not False, allow_changed_settings=allow_changed_settings)
            remove_leftovers(self.path)
        else:
            self._create()

    @classmethod
    @contextmanager
    def open(
        cls,
        path: Path | str | None,
        *,
        kind: str,
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        resume: bool | None = False,
        allow_changed_settings: bool | None = None,
    ) -> Iterator[Run]:
        """Open a run for the length of a block; arguments and errors as for `Run`.

        Of several processes the first makes the folder and the others join it. When bad input ends the block before
        anything was computed, a folder that was new is removed again, so that the next try finds nothing in its way.

        Example:
            >>> with Run.open(None, kind="train", seed=1) as run:
            ...     run.log(step=1, loss=0.5)
            >>> run.metrics()
            [{'step': 1, 'loss': 0.5}]
        """
        path = None if path is None else Path(path).expanduser()
        was_folder = path is not None and path.is_dir()
        was_run = path is not None and (path / "run.json").exists()
        with first_process_first():
            run = cls(
                path, kind=kind, seed=seed, config=config, resume=resume is not False or not is_first_process(),
                allow_changed_settings=allow_changed_settings,
            )  # fmt: skip
        try:
            yield run
        except GenInvarianceError as error:
            if error.exit_code == 2 and path is not None and not was_run and is_first_process():
                _remove_if_nothing_computed(run.path, keep_folder=was_folder)
            raise

    def _check_same(self, *, resume: bool, allow_changed_settings: bool | None) -> None:
        if not resume:
            raise SettingsError(
                f"{self.path} already holds a run; add resume=true to continue it, or choose another folder"
            )
        try:
            old = read_json(self.path / "run.json")
            old_kind, old_settings = old["kind"], {**old["config"], "seed": old["seed"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path / 'run.json'} is damaged ({error}); choose another folder") from error
        if old_kind != self.kind:
            raise SettingsError(f"{self.path} holds a '{old_kind}' run, not '{self.kind}'; choose another folder")
        settings = {**self.config, "seed": self.seed}
        changed = sorted(key for key in {*old_settings, *settings} if old_settings.get(key) != settings.get(key))
        if changed and not allow_changed_settings:
            names = ", ".join(_IMAGES.get(name, name) for name in changed)
            offered = "" if allow_changed_settings is None else ", or add allow_changed_settings=true"
            raise SettingsError(
                f"cannot resume {self.path}: settings differ from the run's in {names}; "
                f"use the same settings or another folder{offered}"
            )
        self.changed_settings = tuple(changed)
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
            "working_folder": os.path.abspath(os.curdir) if os.path.isdir(os.curdir) else None,
            **more,
        }
        write_json(self.path / "run.json", about)

    def locate(self, path: str) -> str:
        """A path that the run's settings name, as it is found from here: relative ones from where the run was made.

        A run that was moved together with its data is looked for below the present folder, as before.
        """
        try:
            about = read_json(self.path / "run.json")
            from_there = os.path.join(about["working_folder"], path)
        except (OSError, ValueError, KeyError, TypeError):
            return path  # of an earlier version
        return from_there if os.path.exists(from_there) else path

    def note(self, **facts: Any) -> None:
        """Add `facts` on the run, JSON-able, to "facts" in `run.json`; unlike settings they may change on the way.

        Raises:
            CheckpointError: `run.json` is damaged.
            OutputError: read-only or full disk.
        """
        if self.path is None:
            return
        path = self.path / "run.json"
        try:
            about = read_json(path)
            about["facts"] = {**about.get("facts", {}), **facts}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); choose another folder") from error
        write_json(path, about)

    def generator(self, *purpose: object) -> torch.Generator:
        """The run's own generator for `purpose`; see `named_generator`."""
        return named_generator(self.seed, *purpose)

    def log(self, **values: Any) -> None:
        """Append one JSON line to `metrics.jsonl`; numbers only, strings and lists of them."""
        line = json.dumps(values, default=float)
        if self.path is None:
            self._rows.append(json.loads(line))
            return
        try:
            with open(self._metrics, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise cannot_write(self._metrics, error) from error

    def metrics(self) -> list[dict[str, Any]]:
        """The logged lines, oldest first; a half-written last line (a killed run) is left out."""
        if self.path is None:
            return list(self._rows)
        if not self._metrics.exists():
            return []
        rows = []
        for line in read_regular(self._metrics).splitlines():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):  # half a line, or a damaged one
                continue
        return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step", 0), int | float)]

    def save(self, step: int, state: Mapping[str, Any], *, keep: int = 2, is_due: bool = True) -> Path | None:
        """Write the checkpoint of `step`; once it reads back intact, remove all but the newest `keep`.

        One that is not due, since the run was told to stop, goes when the next one that is has been written, so that
        in the end there are those of a run that nobody stopped. Checkpoints of later steps go as well: the run is at
        `step`, so those were passed over as damaged. A run in memory writes nothing and returns None.
        """
        if self.path is None:
            return None
        path = self.path / "checkpoints" / f"{'step' if is_due else 'stop'}-{step:08d}.ckpt"
        save_checkpoint(path, {"kind": self.kind, "step": step, **state})
        others = [each for each in list_checkpoints(self.path) if each != path]
        older = [each for each in others if _named_step(each) <= step and each.name[:4] == "step"]
        superseded = [each for each in others if each not in older[: keep - 1 if is_due else keep]]
        if superseded and not reads_back(path):
            warnings.warn(f"{path} was written but reads back damaged; older ones stay, check the disk", stacklevel=2)
            return path
        for old in superseded:
            old.unlink(missing_ok=True)
        return path

    def load_latest(self) -> dict[str, Any] | None:
        """The newest intact checkpoint, or None; damaged ones are named in a warning and passed over.

        Lines of `metrics.jsonl` from after that checkpoint are dropped, since they will be written again.
        """
        if self.path is None:
            return None
        for path in list_checkpoints(self.path):
            try:
                state = load_checkpoint(path, kind=self.kind)
                _check_step(path, state)
            except CheckpointError as error:
                warnings.warn(f"{error}; trying an older one", stacklevel=2)
                continue
            self._truncate_metrics(state["step"])
            return state
        self._truncate_metrics(None)
        return None

    def _truncate_metrics(self, step: int | None) -> None:
        """Keep the lines up to `step`; None keeps none, for a run that begins anew writes all of them again."""
        if self._metrics.exists():
            rows = [] if step is None else [row for row in self.metrics() if row.get("step", 0) <= step]
            write_text(self._metrics, "".join(json.dumps(row) + "\n" for row in rows))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of the run in `folder`, newest first; of one step the one that was due."""
    pattern = re.compile(r"(step|stop)-\d{8}\.ckpt")
    paths = (folder / "checkpoints").iterdir() if (folder / "checkpoints").is_dir() else ()
    found = [path for path in paths if pattern.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_named_step(path), path.name[:4] == "step"), reverse=True)


def _named_step(path: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(path.name[5:13])


def _remove_if_nothing_computed(folder: Path, *, keep_folder: bool) -> None:
    """Remove the run in `folder` if all there is was written before anything was computed."""
    present = {entry.name for entry in folder.iterdir()}
    if not present <= {"run.json", "data.json", "split.npz"}:
        return
    for name in present:
        (folder / name).unlink()
    if not keep_folder:
        folder.rmdir()


def _check_step(path: Path, state: Mapping[str, Any]) -> None:
    step = state.get("step")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"checkpoint {path} does not say after which step it was written")
