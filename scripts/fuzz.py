"""Hostile input at scale: no traceback, no hang, no memory over 2 GB, nothing written outside of the output folder.

    python scripts/fuzz.py cases=10000 out=runs/fuzz                 # about half an hour of one CPU core
    python scripts/fuzz.py cases=500 only=images,npz seed=1 out=runs/fuzz
    python scripts/fuzz.py case=1234 out=runs/fuzz                   # that case again, its output shown
    python scripts/fuzz.py again=true cases=10000 out=runs/fuzz      # those that failed again, after a fix; then go on

Each case is made from its number (`fuzz_inputs`), and read by the command line, `gen_invariance.cli.run`, or by a
public reader, in a fork of this process with limits on memory and time. A case passes if the command succeeds, or is
refused in one line with exit code 1 or 2 (readers: one of the package's own errors), within 10 s of processor time and
2 GB, and no file outside of the case's output and temporary folders was opened for writing, made, renamed or removed
(an audit hook sees every such call; the rest of the case's folder is compared as well), nothing was unpickled or
started, and no control character or hostile name reached the terminal or a page unescaped.

Written: OUT/cases.jsonl (one line a case; a stopped program goes on), OUT/findings/ (inputs of failed cases) and
OUT/table.md.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import fuzz_inputs as make
import torch
from stress_resume import DIGITS, import_all, make_folder  # first: it sets the environment

from gen_invariance import cli, verbs
from gen_invariance.benchmark.measuring import open_run
from gen_invariance.benchmark.records import finished_cells, load_records
from gen_invariance.cli_help import config_folder
from gen_invariance.data.arrays import read_idx, read_npz
from gen_invariance.data.folder import read_image_folder
from gen_invariance.errors import GenInvarianceError
from gen_invariance.run import load_checkpoint, write_text
from gen_invariance.translator.load import load_translator
from gen_invariance.translator.pipeline import TranslationPipeline

CPU_SECONDS, CLOCK_SECONDS, GIGABYTES = 10, 90, 2.0
TINY = [*DIGITS, "progress=false"]
FIT = [
    "fit",
    *TINY,
    "fit.steps=2",
    "fit.batch_size=4",
    "fit.sample_every=9",
    "translator.objective.discriminator_width=4",
]
TRAIN = ["train", *TINY, "training.epochs=1", "training.warmup=0", "training.batch_size=64"]
SMALL_FIT = ["fit.steps=1", "fit.batch_size=2", "fit.head_from=1", "translator.objective.discriminator_width=4"]
MUNIT = ["translator=munit_small", "translator.network={width: 4, residual_blocks: 1}"]

Door = list[str] | Callable[[], object]
"""A command line, or a call of a reader."""


# ---- families: each writes an input below `case/in` and says how it is read


def settings(dice: random.Random, case: Path, base: Path) -> Door:
    """One or two settings of a verb replaced by odd words."""
    verb = dice.choice(("fit", "train", "measure", "augment", "order", "report", "inspect", "demo"))
    line = {
        "fit": FIT, "train": TRAIN, "measure": ["measure", f"run={case / 'out'}", "draws=1"],
        "augment": ["augment", f"data.path={base / 'in'}", f"translator={base / 'fit'}", "target=6"],
        "order": ["order", "order.count=1", "order.seeds=[0]", "order.analysis.resamples=20", "order.source.epochs=1",
                  "order.source.images_per_class=8"],
        "report": ["report", f"records={base / 'train'}"], "demo": ["demo"],
        "inspect": ["inspect", f"translator={base / 'fit'}", *TINY, "inspect.judge_epochs=1", "inspect.draws=1",
                    "inspect.max_images=20", "inspect.held_out=0.3"],
    }[verb]  # fmt: skip
    known = keys_of(verb)
    words = []
    for _ in range(dice.choice((1, 1, 2))):
        key, word = dice.choice(known), dice.choice(make.WORDS if dice.random() < 0.5 else make.NUMBERS)
        if dice.random() < 0.1:
            key = make.mutated(key.encode(), dice).decode("latin-1").replace("\x00", "")
        if re.search(r"steps|epochs|draws|resamples|seeds|tries|milestones|count|operations|layers|blocks|depth", key):
            word = "2" if re.fullmatch(r"9+|0x10|1_000", word) else word  # long work is no fault
        words.append(f"{key}={word}" if dice.random() < 0.97 else dice.choice(make.WORDS))
    if verb == "demo":  # whole seeds of it are long work, which is no fault
        words = [*(word for word in words if not word.startswith("demo.seeds")), "demo.seeds=0"]
    if any(word.split("=")[0] == "out" for word in words):
        return [*line, *words]
    if verb == "measure":
        make.copy_tree(base / "train", case / "out")
        return [*line, *words]
    return [*line, *words, f"out={case / 'out'}"]


KEYS: dict[str, list[str]] = {}


def keys_of(verb: str) -> list[str]:
    if verb not in KEYS:
        found = cli._compose(verb, [], missing_is_error=False)
        groups = [path.name for path in config_folder().iterdir() if path.is_dir()]
        KEYS[verb] = [*cli._keys(found), *groups, "data.nuisance_options.degrees", "classifier.loss_options.gamma"]
    return KEYS[verb]


def images(dice: random.Random, case: Path, base: Path) -> Door:
    """An image folder with odd files, for fitting, for a reader, or for an export."""
    root = case / "in" / (dice.choice(make.NAMES) if dice.random() < 0.05 else "photos")
    make.image_folder(root, dice)
    return images_door(root, dice, case, base)


def images_door(root: Path, dice: random.Random, case: Path, base: Path) -> Door:
    size = dice.choice((None, None, 16, 8))
    if dice.random() < 0.4:
        skip = dice.random() < 0.7
        return lambda: read_image_folder(root, image_size=size, skip_corrupt=skip)
    sized = [] if size is None else [f"data.image_size={size}"]
    skips = ["data.skip_corrupt=true"] if dice.random() < 0.7 else []
    where = ["data=folder", quoted("data.path", root), *sized]
    if dice.random() < 0.2:
        return ["fit", *where, *skips, *SMALL_FIT, f"out={case / 'out'}"]
    return ["augment", *where, *export_options(dice, base), f"out={case / 'out'}"]


def export_options(dice: random.Random, base: Path) -> list[str]:
    options = [f"target={dice.choice(('max', '7', 'median', '3'))}", f"batch_size={dice.choice((2, 64))}", "tries=2"]
    options += [dice.choice(("originals=copy", "originals=link", "originals=reference"))]
    options += ["restore_size=true"] if dice.random() < 0.2 else []
    return [*options, f"translator={base / 'fit'}"]


def quoted(key: str, path: Path) -> str:
    return f"{key}='" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


def names(dice: random.Random, case: Path, base: Path) -> Door:
    """Readable images, every class and file name hostile."""
    root = case / "in" / "photos"
    for number in range(3):
        for place in range(4):
            file = root / dice.choice(make.NAMES) / (dice.choice(make.NAMES)[: 200 + 55 * (place % 2)] + ".png")
            make.put(file, make.good_png(dice))
            make.put(root / f"plain{number}" / f"{place}.png", make.good_png(dice))
    return images_door(root, dice, case, base)


def npz(dice: random.Random, case: Path, base: Path) -> Door:
    """Array files."""
    file = case / "in" / "data.npz"
    make.put(file, make.npz(dice))
    if dice.random() < 0.75:
        return lambda: read_npz(file)
    where = ["data=npz", f"data.path={file}"]
    if dice.random() < 0.5:
        return ["fit", *where, *SMALL_FIT, f"out={case / 'out'}"]
    return ["augment", *where, *export_options(dice, base), f"out={case / 'out'}"]


def tables(dice: random.Random, case: Path, base: Path) -> Door:
    """Tables of paths and labels."""
    file = make.csv_table(case / "in", dice)
    return ["augment", "data=table", f"data.path={file}", *export_options(dice, base), f"out={case / 'out'}"]


def shards(dice: random.Random, case: Path, base: Path) -> Door:
    """WebDataset tars."""
    for number in range(dice.choice((1, 1, 2))):
        make.put(case / "in" / f"part-{number}.tar", make.shard(dice))
    where = ["data=webdataset", f"data.path={case / 'in'}"]
    return ["augment", *where, *export_options(dice, base), f"out={case / 'out'}"]


def idx(dice: random.Random, case: Path, base: Path) -> Door:
    """IDX files."""
    file = case / "in" / dice.choice(("images.gz", "images"))
    make.put(file, make.idx(dice))
    return lambda: read_idx(file)


def checkpoints(dice: random.Random, case: Path, base: Path) -> Door:
    """Checkpoints and descriptions of runs, read when measuring and when going on."""
    kind = dice.choice(("train", "train", "fit"))
    out = make.copy_tree(base / kind, case / "out")
    file = max((out / "checkpoints").iterdir())
    how = dice.random()
    if how < 0.3:
        file.write_bytes(make.mutated(file.read_bytes(), dice))
    elif how < 0.7:
        file.write_bytes(make.checkpoint(load_checkpoint(file), dice))
    elif how < 0.9:
        about = json.loads((out / "run.json").read_text())
        (out / "run.json").write_bytes(make.json_bytes(make.mutated_json(about, dice), dice))
    else:
        other = dice.choice([path for path in out.rglob("*") if path.is_file()])
        other.write_bytes(make.mutated(other.read_bytes(), dice))
    if dice.random() < 0.4:
        return lambda: load_checkpoint(file, kind=kind)
    if kind == "fit":
        return [*FIT, f"out={out}", "resume=true"]
    if dice.random() < 0.5:
        return [*TRAIN, f"out={out}", "resume=true"]
    return dice.choice((["measure", f"run={out}", "draws=1"], lambda: open_run(out, device=torch.device("cpu"))))


def translators(dice: random.Random, case: Path, base: Path) -> Door:
    """Saved translators: settings, weights, verdicts."""
    folder = make.copy_tree(base / dice.choice(("fit", "munit")), case / "in" / "t")
    config, weights = (
        folder / "translator" / "config.json",
        folder / "translator" / "diffusion_pytorch_model.safetensors",
    )
    how = dice.random()
    if how < 0.4:
        config.write_bytes(make.json_bytes(make.mutated_json(json.loads(config.read_text()), dice), dice))
    elif how < 0.75:
        weights.write_bytes(make.safetensors_file(weights.read_bytes(), dice))
    elif how < 0.85:
        index = {"metadata": {}, "weight_map": {"x": dice.choice(make.TEXTS), "width": "../../../etc/passwd"}}
        name = "diffusion_pytorch_model.safetensors.index.json"
        (folder / "translator" / name).write_bytes(make.json_bytes(index, dice))
        if dice.random() < 0.5:
            weights.unlink()
    else:
        quality = {"verdict": "usable", "reasons": ["a"], "figures": {"x": {"value": 1}}, "data": {}}
        (folder / "quality.json").write_bytes(make.json_bytes(make.mutated_json(quality, dice), dice))
    if dice.random() < 0.5:
        return dice.choice((lambda: load_translator(folder), lambda: TranslationPipeline.from_pretrained(folder)))
    staged = [*TRAIN, "stage=translator", f"stage.translator={folder}", f"out={case / 'out'}"]
    exported = ["augment", f"data.path={base / 'in'}", f"translator={folder}", "target=max", f"out={case / 'out'}"]
    return dice.choice((staged, exported))


def records(dice: random.Random, case: Path, base: Path) -> Door:
    """Measured records, with hostile names of classes and methods, some lines damaged."""
    source = next((base / "train").rglob("records-*.jsonl"))
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    odd = dice.choice(make.TEXTS)
    lines = []
    for row in rows:
        if dice.random() < 0.05:
            row = make.mutated_json(row, dice)
        elif (isinstance(row.get("class_name"), str) and row.get("class_index") == 1) or dice.random() < 0.01:
            row = {**row, "class_name": odd}
        lines.append(json.dumps(row))
    if dice.random() < 0.3:
        lines = [line.replace('"method": "', f'"method": {json.dumps(odd)[:-1]}') for line in lines]
    content = "\n".join(lines).encode() + b"\n"
    folder = case / "in" / "records"
    make.put(folder / "records-0.jsonl", make.mutated(content, dice) if dice.random() < 0.3 else content)
    if dice.random() < 0.7:
        return lambda: finished_cells(load_records(folder))
    return ["report", f"records={case / 'in'}", f"out={case / 'out'}", f"baseline={dice.choice(('null', 'none'))}"]


def exports(dice: random.Random, case: Path, base: Path) -> Door:
    """A half-done or finished export, its state damaged, then resumed."""
    out = make.copy_tree(base / "export", case / "out")
    found = [path for path in out.rglob("*") if path.is_file()]
    for file in dice.sample(found, dice.choice((1, 1, 2))):
        how = dice.random()
        if how < 0.3:
            file.unlink()
        elif file.suffix == ".json" and how < 0.7:
            value = json.loads(file.read_text())
            file.write_bytes(make.json_bytes(make.mutated_json(value, dice), dice))
        elif file.suffix == ".jsonl" and how < 0.7:
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            place = dice.randrange(len(rows))
            rows[place] = make.mutated_json(rows[place], dice)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            file.write_bytes(make.mutated(file.read_bytes(), dice))
    return [*EXPORT, f"data.path={base / 'in'}", f"translator={base / 'fit'}", f"out={out}", "resume=true"]


EXPORT = ["augment", "data=folder", "target=16", "batch_size=4"]
FAMILIES = {
    settings: 16, images: 20, names: 8, npz: 14, tables: 8, shards: 6, idx: 4, checkpoints: 9, translators: 9,
    records: 4, exports: 2,
}  # fmt: skip


# ---- one case


def fixtures(base: Path) -> None:
    """What the cases read or damage: an image folder, two translators, a measured classifier, half an export."""
    lines = [
        [*FIT, f"out={base / 'fit'}"], [*FIT, *MUNIT, f"out={base / 'munit'}"], [*TRAIN, f"out={base / 'train'}"],
        ["measure", f"run={base / 'train'}", "draws=1"],
        [*EXPORT, f"data.path={base / 'in'}", f"translator={base / 'fit'}", f"out={base / 'export'}"],
    ]  # fmt: skip
    make_folder(base / "in")
    for line in lines:
        if cli.run(line):
            raise SystemExit(f"fixture failed: {line}")


def run_case(number: int, seed: int, family: Callable, work: Path, base: Path) -> dict:
    """Make the case, carry it out in a fork, look at what happened."""
    case = work / f"case-{number}"
    shutil.rmtree(case, ignore_errors=True)
    for name in ("in", "tmp", "home"):
        (case / name).mkdir(parents=True)
    report, log = case / "report.json", case / "log"
    began = time.monotonic()
    child = os.fork()
    if not child:
        in_child(lambda: family(random.Random(f"{seed}/{number}"), case, base), case, report, log)
    _, status, usage = wait4(child)
    row = {
        "case": number, "family": family.__name__, "cpu": round(usage.ru_utime + usage.ru_stime, 2),
        "seconds": round(time.monotonic() - began, 2), "gigabytes": round(usage.ru_maxrss / 2**20, 2),
        "faults": [], "code": os.waitstatus_to_exitcode(status),
    }  # fmt: skip
    told = json.loads(report.read_text()) if report.exists() else {"touched": [], "line": None}
    row["faults"] += faults_of(row, told, log.read_bytes() if log.exists() else b"", case)
    row["line"] = told["line"]
    return row


def wait4(child: int) -> tuple:
    end = time.monotonic() + CLOCK_SECONDS
    while True:
        found = os.wait4(child, os.WNOHANG)
        if found[0]:
            return found
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            return os.wait4(child, 0)
        time.sleep(0.002)


def in_child(prepare: Callable[[], Door], case: Path, report: Path, log: Path) -> None:
    """Prepare the input, fence this process in, read the input, report; never returns."""
    code, line, touched = 99, None, []
    try:
        door = prepare()
        line = door if isinstance(door, list) else "reader"
        before = snapshot(case)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = os.fdopen(1, "w", errors="surrogateescape")
        sys.stderr = os.fdopen(2, "w", errors="surrogateescape")
        os.chdir(case / "tmp")
        tempfile.tempdir = None  # found anew, from the line below
        os.environ.update(HOME=str(case / "home"), TMPDIR=str(case / "tmp"), HF_HUB_OFFLINE="1")
        fence(case, touched)
        code = through(door)
        sys.stdout.flush()
        sys.stderr.flush()
        changed = [name for name, about in snapshot(case).items() if before.get(name) != about]
        touched += [f"changed {name}" for name in [*changed, *(before.keys() - snapshot(case).keys())]]
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        FENCED.clear()
        with suppress(Exception):
            report.write_text(json.dumps({"touched": touched, "line": line}))
        os._exit(code)


def through(door: Door) -> int:
    """The exit code of a command line; of a reader 0, or 2 for one of the package's own errors."""
    if isinstance(door, list):
        sys.argv = ["gen-invariance", *door]
        return cli.run(door)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {verbs.printable(str(message))}", file=sys.stderr)
    try:
        door()
    except GenInvarianceError as error:
        print(f"gen-invariance: {verbs.printable(str(error))}", file=sys.stderr)
        return error.exit_code
    return 0


def snapshot(case: Path) -> dict[str, tuple]:
    """Size and time of everything in the case's folder but what may be written to."""
    found = {}
    for top, folders, files in os.walk(case):
        if top == str(case):
            folders[:] = [name for name in folders if not re.match(r"out|tmp|home", name)]
        for name in [*folders, *files]:
            if (top, name) not in ((str(case), "log"), (str(case), "report.json"), (str(case), "in")):
                about = os.lstat(os.path.join(top, name))
                found[os.path.join(top, name)] = (about.st_size, about.st_mtime_ns, about.st_mode)
    return found


FENCED: list[str] = []
WRITES = {"os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.symlink": 1, "os.link": 1, "os.truncate": 0,
          "os.chmod": 0, "os.chown": 0}  # fmt: skip
NEVER = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.startfile",
    "socket.connect",
    "pickle.find_class",
    "webbrowser.open",
)


def fence(case: Path, touched: list[str]) -> None:
    """Limit memory and time; note every call that writes elsewhere, unpickles, or starts something."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 6 * 2**30, now + 6 * 2**30))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS + 2, CPU_SECONDS + 4))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    FENCED[:] = [str(case / name) for name in ("out", "tmp", "home")] + ["/dev/null", "/dev/shm", "/proc/self"]

    def note(event: str, arguments: tuple) -> None:
        if not FENCED:
            return
        if event in NEVER or (event == "subprocess.Popen" and "git" not in str(arguments[0])):
            touched.append(f"{event} {str(arguments)[:200]}")
            return
        if event == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            target = arguments[0]
        elif event in WRITES:
            target = arguments[WRITES[event]]
        else:
            return
        if isinstance(target, int) or target is None:
            return
        place = os.path.abspath(os.fsdecode(target))
        if not place.startswith(tuple(FENCED)):
            touched.append(f"{event} {place}")

    sys.addaudithook(note)


def faults_of(row: dict, told: dict, output: bytes, case: Path) -> list[str]:
    """What a case must not do."""
    text = output.decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if not line.startswith("warning: ")]
    faults = [f"outside: {what}" for what in told["touched"]]
    if row["cpu"] > CPU_SECONDS or row["seconds"] >= CLOCK_SECONDS:
        faults.append(f"hang: {row['cpu']} s of processor, {row['seconds']} s on the clock")
    if row["gigabytes"] > GIGABYTES:
        faults.append(f"memory: {row['gigabytes']} GB")
    if "Traceback" in text or row["code"] not in (0, 1, 2):
        last = [line for line in text.splitlines() if line.strip()][-1:]
        faults.append(f"traceback or crash: exit code {row['code']}: {' '.join(last)[:300]}")
    elif row["code"] == 2 and (len(lines) != 1 or not lines[0].startswith("gen-invariance: ")):
        faults.append(f"not one line: {text[:300]!r}")
    # A progress bar that was asked for goes back to the start of its line.
    allowed = "\n\r" if any(str(word).startswith("progress=") for word in told["line"] or ()) else "\n"
    odd = [letter for letter in text if (not letter.isprintable() and letter not in allowed) or letter == "\ufffd"]
    if odd:
        faults.append(f"not printable: {odd[0]!r} in {text[:200]!r}")
    for page in [*case.glob("out*/**/*.html"), *case.glob("out*/**/*.svg")]:
        if make.MARK in page.read_text(errors="replace") or "<img src=x" in page.read_text(errors="replace"):
            faults.append(f"unescaped name in {page.name}")
    return faults


# ---- the study


def table(rows: list[dict]) -> str:
    """Counts by family as Markdown."""
    lines = [
        "| input | cases | accepted | refused in one line | failed in one line | tracebacks or crashes | hangs | over "
        "2 GB | written elsewhere, unpickled or started | other faults | longest, CPU s | most memory, GB |",
        "|" + "---|" * 12,
    ]
    for name in [*dict.fromkeys(row["family"] for row in rows), "all"]:
        own = [row for row in rows if name in ("all", row["family"])]
        fine = [row for row in own if not row["faults"]]
        kinds = [fault.split(":")[0] for row in own for fault in row["faults"]]
        listed = ("traceback or crash", "hang", "memory", "outside")
        figures = [
            len(own), *(sum(row["code"] == code for row in fine) for code in (0, 2, 1)),
            *(kinds.count(kind) for kind in listed), sum(kind not in listed for kind in kinds),
            f"{max(row['cpu'] for row in own):.1f}", f"{max(row['gigabytes'] for row in own):.2f}",
        ]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(map(str, figures)) + " |")
    return "\n".join(lines) + "\n"


def main(given: dict[str, str]) -> int:
    out = Path(given.get("out", "runs/fuzz")).resolve()
    seed, cases = int(given.get("seed", 0)), int(given.get("cases", 10_000))
    base, file = out / "fixtures", out / "cases.jsonl"
    import_all()
    if not (base / "done").exists():
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir(parents=True)
        child = os.fork()
        if not child:
            fixtures(base)
            (base / "done").touch()
            os._exit(0)
        os.waitpid(child, 0)
    chosen = [family for family in FAMILIES if family.__name__ in given.get("only", family.__name__).split(",")]
    for verb in ("fit", "train", "measure", "augment", "order", "report", "inspect", "demo"):
        keys_of(verb)
    if "case" in given:
        number = int(given["case"])
        print(json.dumps(run_case(number, seed, family_of(number, seed, chosen), out, base), indent=1))
        print((out / f"case-{number}" / "log").read_text(errors="replace"))
        return 0
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if given.get("again") == "true":
        for row in [row for row in rows if row["faults"]]:
            number = row["case"]
            rows[number] = run_case(number, seed, family_of(number, seed, chosen), out, base) | {
                "before": row.get("before", row["faults"])
            }
            print(number, row["family"], rows[number]["faults"] or "passes now", flush=True)
            shutil.rmtree(out / f"case-{number}", ignore_errors=True)
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    for number in range(len(rows), cases):
        row = run_case(number, seed, family_of(number, seed, chosen), out, base)
        rows.append(row)
        with open(file, "a") as stream:
            stream.write(json.dumps(row) + "\n")
        if row["faults"]:
            print(number, row["family"], row["faults"][0][:300], flush=True)
            (out / "findings").mkdir(exist_ok=True)
            shutil.rmtree(out / "findings" / f"case-{number}", ignore_errors=True)
            (out / f"case-{number}").rename(out / "findings" / f"case-{number}")
        shutil.rmtree(out / f"case-{number}", ignore_errors=True)
        if number % 100 == 99 or number == cases - 1:
            write_text(out / "table.md", table(rows))
    write_text(out / "table.md", table(rows))
    print(table(rows))
    return int(any(row["faults"] for row in rows))


def family_of(number: int, seed: int, chosen: list[Callable]) -> Callable:
    weights = [FAMILIES[family] for family in chosen]
    return random.Random(f"family/{seed}/{number}").choices(chosen, weights)[0]


if __name__ == "__main__":
    raise SystemExit(main(dict(word.split("=", 1) for word in sys.argv[1:])))
