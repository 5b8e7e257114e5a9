"""Kill each long command at random moments, let it finish, and compare what it wrote with an uninterrupted run.

    python -m tests.stress.resume kills=50 out=runs/stress      # all commands, about 20 minutes of one CPU core
    python -m tests.stress.resume kills=50 only=fit,train seed=1 out=runs/stress

A command is killed again and again in one folder, each time started with resume=true, until it ends by itself; then
every file is compared with that of a run nobody disturbed, byte for byte (records and cells without times, commands and
paths; reports, which show times, by their records; of the two checkpoints a run keeps, the last), and the next folder
begins. How it dies is drawn each time:

    moment   SIGKILL after a random time, start-up included
    rename   SIGKILL right before or right after the n-th rename, removal or sync of a file
    writing  SIGKILL as soon as a temporary file is seen, from a random time on
    cold     as `moment`, on a new interpreter, so that it also falls into imports
    term     SIGTERM after a random time (beside the `kills`); must end with exit code 143 and one line

A new interpreter takes seconds to import everything, so all but `cold` are forks of this process, which has imported
all of it and computed nothing. After each kill all files but temporary ones must be whole. Lines of OUT/rounds.jsonl
are finished folders: the program itself may be stopped and started again. OUT/table.md is the summary.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a CPU repeats itself to the bit

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load as load_safetensors

from benchmarks.program import append_line, markdown, read_lines, read_settings
from gen_invariance.cli import main as cli
from gen_invariance.data.readers.registry import load_source
from gen_invariance.files import load_checkpoint, write_text
from gen_invariance.records import load_records

DIGITS = ["data=digits_rotation", "data.largest=40", "data.imbalance=8", "data.few_below=10", "data.many_above=20"]
COMMANDS = {
    "fit": [
        "fit", *DIGITS, "fit.steps=60", "fit.batch_size=16", "fit.log_every=5", "fit.checkpoint_every=8",
        "fit.sample_every=20",
    ],
    "fit munit": [
        "fit", *DIGITS, "fit.steps=30", "fit.batch_size=8", "fit.log_every=5", "fit.checkpoint_every=5",
        "fit.sample_every=15", "translator=munit_small", "translator.network={width: 4, residual_blocks: 1}",
    ],
    "train": ["train", *DIGITS, "stage=oracle", "training.epochs=12", "training.checkpoint_every=2"],
    "order": [
        "order", "order.count=2", "order.seeds=[0,1]", "order.source.epochs=1", "order.source.images_per_class=20",
        "order.analysis.resamples=100", "order.draws=2", "nuisance=rotation",
    ],
    "augment": ["augment", "data=folder", "target=40", "batch_size=8", "data.path=IN", "translator=FITTED"],
    "augment fit": [
        "augment", "data=folder", "target=20", "batch_size=8", "data.path=IN", "fit=true", "learn.steps=20",
        "learn.batch_size=8", "learn.head_from=5", "learn.checkpoint_every=5", "learn.sample_every=10",
    ],
    "benchmark": [
        "benchmark", "run", "benchmark=digits_rot_lt", "methods=[ce_drs,ce_drs+spatial]", "orders=0",
        "data_options.largest=40", "data_options.imbalance=8", "training_options.epochs=4",
        "fit_options.spatial.steps=20", "training_options.warmup=0", "measure_options.draws=2",
    ],
}  # fmt: skip
MODES = ("moment", "moment", "moment", "rename", "rename", "rename", "writing", "writing", "cold", "term", "term")
MOST_A_FOLDER = 12


def import_all() -> None:
    """Import what the commands import on their way, so that forks have it."""
    from gen_invariance.benchmark import demo, grid  # noqa: F401
    from gen_invariance.export.formats import table  # noqa: F401
    from gen_invariance.nuisance import generic  # noqa: F401
    from gen_invariance.translator import spatial  # noqa: F401

    with suppress(ImportError):
        import pyarrow.parquet  # noqa: F401
    with suppress(SystemExit), redirect_stdout(io.StringIO()):
        cli.main(["fit", "--cfg", "job"])
    torch.set_num_threads(1)


# ---- starting


def start(line: list[str], out: Path, log: Path, *, before: Callable[[], None] = lambda: None) -> int:
    """Fork a process that carries out the command line into `out`; its number."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["gen-invariance", *line]
        before()
        code = cli.run(words_of(line, out))
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def words_of(line: list[str], out: Path) -> list[str]:
    """The command line that starts the command in `out`, or goes on there."""
    return [*line, f"out={out}", *([] if line[0] == "benchmark" else ["resume=true"])]


def wait(child: int, *, seconds: float) -> int | None:
    """The exit status (negative: a signal) of `child`, or None when it still runs after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.001)


def die_at_rename(place: int, *, after: bool) -> Callable[[], None]:
    """Makes the process that calls it die at the `place`-th call that puts a file in place or takes one away."""

    def arm() -> None:
        count = 0

        def deadly(original: Callable) -> Callable:
            def call(*arguments: object, **options: object) -> object:
                nonlocal count
                count += 1
                if count == place and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = original(*arguments, **options)
                if count == place:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        for name in ("replace", "rename", "unlink", "rmdir", "fsync", "mkdir"):
            setattr(os, name, deadly(getattr(os, name)))

    return arm


def attempt(mode: str, line: list[str], out: Path, log: Path, whole: dict, dice: random.Random) -> int:
    """Start the command once and disturb it; its exit status."""
    moment = dice.uniform(0, 0.6 * whole["seconds"])
    if mode == "rename":
        arm = die_at_rename(dice.randint(1, max(2, whole["renames"] // 3)), after=dice.random() < 0.5)
        return wait(start(line, out, log, before=arm), seconds=600)
    if mode == "cold":
        return cold(line, out, log, dice.uniform(0, 8 + moment))
    child = start(line, out, log)
    status = wait(child, seconds=moment)
    if mode == "writing":
        while status is None and not leftovers(out):
            status = wait(child, seconds=0.0005)
    if status is None:
        os.kill(child, signal.SIGTERM if mode == "term" else signal.SIGKILL)
        status = wait(child, seconds=600)
    if status is None:
        os.kill(child, signal.SIGKILL)
        raise SystemExit(f"{line[0]} hangs, see {log}")
    return status


def cold(line: list[str], out: Path, log: Path, moment: float) -> int:
    """The command on a new interpreter, killed at `moment`."""
    words = ["-m", "gen_invariance.cli.main", *words_of(line, out)]
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, *words], stdout=file, stderr=file)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(moment)
        process.kill()
        return process.wait()


# ---- looking


def leftovers(out: Path) -> list[str]:
    """Temporary files below `out`; folders may vanish while one looks."""
    found = []
    for top, folders, files in os.walk(out):
        found += [f"{top}/{name}" for name in [*folders, *files] if name.endswith(".tmp")]
    return found


def broken(out: Path) -> list[str]:
    """Files that are not whole, temporary ones left out; a last line without an end is allowed in .jsonl files."""
    return [str(path) for path in files_of(out) if not _whole(path)]


def files_of(out: Path) -> list[Path]:
    return sorted(path for path in out.rglob("*") if path.is_file() and ".tmp" not in "/".join(path.parts))


def _whole(path: Path) -> bool:
    try:
        if path.suffix == ".ckpt":
            load_checkpoint(path)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                [arrays[name] for name in arrays.files]
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]
        elif path.suffix == ".safetensors":
            load_safetensors(path.read_bytes())
    except Exception:
        return False
    return True


def contents(out: Path) -> dict[str, str]:
    """A digest of every file, by its path below `out`; records as one entry, whatever files they lie in."""
    found = {}
    for path in files_of(out):
        name = path.relative_to(out).as_posix()
        if path.name == "seconds.json" or name.startswith("report/"):  # the report shows what a cell took
            continue
        if path.name.startswith("records-"):
            continue
        found[name] = hashlib.sha256(_comparable(path, out)).hexdigest()[:16]
    for folder in sorted({path.parent for path in files_of(out) if path.name.startswith("records-")}):
        frame = load_records(folder).drop(columns=["seconds", "command", "commit", "versions"])
        frame = frame[~frame["metric"].isin(["train_seconds", "fit_seconds"])]
        text = frame.sort_values(list(frame.columns), key=lambda column: column.astype(str)).to_csv(index=False)
        found[f"{folder.relative_to(out).as_posix()}/records"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def _comparable(path: Path, out: Path) -> bytes:
    content = path.read_bytes()
    if path.name == "run.json":
        about = {name: value for name, value in json.loads(content).items() if name not in ("command", "commit")}
        return json.dumps(about, sort_keys=True).encode().replace(os.fsencode(out), b"OUT")
    if path.suffix == ".npz":
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            kept = [(name, arrays[name].tobytes()) for name in sorted(arrays.files) if name != "seconds"]
        return repr(kept).encode()
    return content.replace(os.fsencode(out), b"OUT").replace(os.fsencode(out.name), b"OUT")


# ---- the study


def undisturbed(line: list[str], out: Path) -> dict:
    """The run nobody disturbs: how long it takes, how often it renames, what it writes."""
    about = out.with_suffix(".json")
    if about.exists():
        return json.loads(about.read_text())
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    status = wait(start(line, out, out.with_suffix(".log")), seconds=600)
    if status != 0:
        raise SystemExit(f"{line[0]} failed undisturbed: {out.with_suffix('.log').read_text()}")
    found = contents(out)
    whole = {"seconds": time.monotonic() - began, "renames": 3 * len(found), "contents": found}
    write_text(about, json.dumps(whole))
    return whole


def one_folder(name: str, line: list[str], work: Path, number: int, budget: int, whole: dict, seed: int) -> dict:
    """Disturb the command in one folder until it ends by itself, or `budget` kills are spent; then compare."""
    dice = random.Random(f"{seed}/{name}/{number}")
    out, log = work / f"killed-{number}", work / f"killed-{number}.log"
    for old in (out, Path(f"{out}-translator")):
        shutil.rmtree(old, ignore_errors=True)
    row = {"command": name, "folder": number, "kills": [], "terms": [], "faults": []}
    while len(row["kills"]) < min(budget, MOST_A_FOLDER):
        mode = dice.choice(MODES)
        status = attempt(mode, line, out, log, whole, dice)
        text = log.read_text() if log.exists() else ""
        stage = "start-up" if not any(out.glob("*")) else "writing" if leftovers(out) else "else"
        if status == -signal.SIGKILL:
            row["kills"].append([mode, stage])
            row["faults"] += [f"not whole after {mode}: {path}" for path in broken(out)]
        elif mode == "term" and status in (143, -signal.SIGTERM):
            row["terms"].append(status)
            if status == 143 and (text.count("gen-invariance: ") != 1 or "Traceback" in text):
                row["faults"].append(f"SIGTERM: {text[:300]}")
        elif status == 0:
            break
        else:
            row["faults"].append(f"{mode}: exit code {status}: {text[:500]}")
            return row
    status = wait(start(line, out, log), seconds=600)
    if status != 0:
        row["faults"].append(f"the last start ended with {status}: {log.read_text()[:500]}")
        return row
    found, expected = contents(out), whole["contents"]
    row["differ"] = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    row["left"] = [os.path.relpath(path, out) for path in leftovers(out)]
    if not row["differ"] and not row["faults"]:
        for old in (out, Path(f"{out}-translator")):
            shutil.rmtree(old, ignore_errors=True)
    return row


HEAD = ["command", "SIGKILLs", "during start-up", "while a file was written", "SIGTERMs", "folders brought to an end",
        "all bytes equal", "temporary files left", "faults"]  # fmt: skip


def table(rows: list[dict]) -> str:
    """The summary as Markdown."""
    lines = []
    for name in dict.fromkeys(row["command"] for row in rows):
        own = [row for row in rows if row["command"] == name]
        kills = [stage for row in own for _, stage in row["kills"]]
        ended = [row for row in own if "differ" in row]
        equal = sum(not row["differ"] for row in ended)
        figures = [
            len(kills), kills.count("start-up"), kills.count("writing"), sum(len(row["terms"]) for row in own),
            f"{len(ended)} of {len(own)}", f"{equal} of {len(ended)}", sum(len(row["left"]) for row in ended),
            sum(len(row["faults"]) for row in own),
        ]  # fmt: skip
        lines.append([name, *figures])
    return markdown(HEAD, lines)


def make_folder(path: Path) -> None:
    """Real digits as an image folder of three classes."""
    data = load_source("digits").train
    for label, count in ((0, 14), (1, 9), (2, 5)):
        folder = path / data.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        for number, row in enumerate((data.labels == label).nonzero().flatten()[:count].tolist()):
            Image.fromarray(data.images[row, 0].numpy()).save(folder / f"{number:02d}.png")


def main(out: Path, kills: int, only: Sequence[str], seed: int) -> int:
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    import_all()
    if not (out / "in").exists():
        child = os.fork()
        if not child:
            make_folder(out / "in")
            os._exit(0)
        os.waitpid(child, 0)
    undisturbed(COMMANDS["fit"], out / "whole-fit")
    file = out / "rounds.jsonl"
    for name in only:
        line = [word.replace("=IN", f"={out / 'in'}").replace("=FITTED", f"={out / 'whole-fit'}")
                for word in COMMANDS[name]]  # fmt: skip
        work = out / name.replace(" ", "-")
        work.mkdir(exist_ok=True)
        whole = undisturbed(line, out / f"whole-{name.replace(' ', '-')}")
        rows = read_lines(file)
        own = [row for row in rows if row["command"] == name]
        spent = sum(len(row["kills"]) for row in own)
        number = len(own)
        while spent < kills:
            row = one_folder(name, line, work, number, kills - spent, whole, seed)
            append_line(file, row)
            rows.append(row)
            spent, number = spent + len(row["kills"]), number + 1
            print(f"{name}: {spent} of {kills} kills, folder {number}", row.get("differ"), row["faults"], flush=True)
            write_text(out / "table.md", table(rows))
    rows = read_lines(file)
    print(table(rows))
    return int(any(row["faults"] or row.get("differ", True) for row in rows))


if __name__ == "__main__":
    given = read_settings(__doc__, out=Path("runs/stress"), kills=50, only=tuple(COMMANDS), seed=0)
    raise SystemExit(main(given.out, given.kills, given.only, given.seed))
