"""One case of `fuzz.py`: carried out in a fenced fork of this process, and looked at afterwards."""

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

from gen_invariance.cli import main as cli
from gen_invariance.cli import verbs
from gen_invariance.errors import GenInvarianceError
from tests.stress import fuzz_inputs as make
from tests.stress.fuzz_families import Door

CPU_SECONDS, CLOCK_SECONDS, GIGABYTES = 10, 90, 2.0


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
        if event == "pickle.find_class" and arguments[0] == "concurrent.futures.process":
            return  # what workers of our own say when they are done
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
