"""Hostile input at scale: no traceback, no hang, no memory over 2 GB, nothing written outside of the output folder.

    python -m tests.stress.fuzz cases=10000 out=runs/fuzz                 # about half an hour of one CPU core
    python -m tests.stress.fuzz cases=500 only=images,npz seed=1 out=runs/fuzz
    python -m tests.stress.fuzz case=1234 out=runs/fuzz                   # that case again, its output shown
    python -m tests.stress.fuzz again=true cases=10000 out=runs/fuzz   # those that failed again, then go on

Each case is made from its number (`fuzz_inputs`), and read by the command line, `gen_invariance.cli.main.run`, or by a
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
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.stress.resume import import_all, make_folder  # first: it sets the environment

# isort: split
from benchmarks.program import append_line, markdown, read_lines, read_settings
from gen_invariance.cli import main as cli
from gen_invariance.files import write_text
from tests.stress.fuzz_case import run_case
from tests.stress.fuzz_families import EXPORT, FAMILIES, FIT, MUNIT, TRAIN, keys_of


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


HEAD = ["input", "cases", "accepted", "refused in one line", "failed in one line", "tracebacks or crashes", "hangs",
        "over 2 GB", "written elsewhere, unpickled or started", "other faults", "longest, CPU s",
        "most memory, GB"]  # fmt: skip


def table(rows: list[dict]) -> str:
    """Counts by family as Markdown."""
    lines = []
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
        lines.append([name, *figures])
    return markdown(HEAD, lines)


def main() -> int:
    names = tuple(family.__name__ for family in FAMILIES)
    given = read_settings(__doc__, out=Path("runs/fuzz"), seed=0, cases=10_000, only=names, case=-1, again=False)
    out, seed, cases = given.out.resolve(), given.seed, given.cases
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
    chosen = [family for family in FAMILIES if family.__name__ in given.only]
    for verb in ("fit", "train", "measure", "augment", "order", "report", "inspect", "demo"):
        keys_of(verb)
    if given.case >= 0:
        number = given.case
        print(json.dumps(run_case(number, seed, family_of(number, seed, chosen), out, base), indent=1))
        print((out / f"case-{number}" / "log").read_text(errors="replace"))
        return 0
    rows = read_lines(file)
    if given.again:
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
        append_line(file, row)
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
    raise SystemExit(main())
