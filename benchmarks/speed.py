"""The package against a plain reading of the published recipe, hot path by hot path.

    python -m benchmarks.speed out=docs/results/speed/cpu            # under 15 minutes on one core
    python -m benchmarks.speed only=ekld_forward,loading rounds=9 out=runs/speed
    python -m benchmarks.speed only=stage,training_options rounds=20
    python -m benchmarks.speed device=cuda out=docs/results/speed/cuda

On a CPU it is processor time of one thread, on a GPU wall time with the queue emptied before and after. The variants of
a path take turns, in reverse order every other round, and ratios are taken within a round. `kind` says what a ratio may
be quoted as: "same" - the same mathematics, outputs compared; "changed" - other settings or another training, which is
worth its ratio only beside figures of quality (docs/performance.md). Writes `speed.jsonl` and `speed.md`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.paths_ekld import ekld_forward, ekld_precision
from benchmarks.paths_munit import generating, munit_per_image, munit_same
from benchmarks.paths_stage import batches, stage, training_options
from benchmarks.paths_training import loading, nuisances, training_step
from benchmarks.program import markdown, read_settings
from benchmarks.timing import Variant, compare, measure
from gen_invariance.files import write_text
from gen_invariance.records import provenance


def starting(device: torch.device) -> list[Variant]:
    """Processor seconds of child processes."""

    def seconds(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def imported(line: str) -> Callable[[], float]:
        """Beyond what torch takes."""
        clock = "import time, torch; t = time.process_time()"
        program = f"{clock}; {line}; print(time.process_time() - t)"

        def run() -> float:
            done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
            return float(done.stdout)

        return run

    command = str(Path(sys.executable).with_name("gen-invariance"))
    common = {"unit": "start"}
    return [
        Variant("python -c pass", "plain", seconds=lambda: seconds(sys.executable, "-c", "pass"), **common),
        Variant("gen-invariance --help", "same", seconds=lambda: seconds(command, "--help"), goal="< 1 s", **common),
        Variant(
            "import gen_invariance, torch not counted", "same", seconds=imported("import gen_invariance"),
            goal="< 1.5 s", **common,
        ),
        Variant(
            "gen_invariance.TailAugment, torch not counted", "same",
            seconds=imported("import gen_invariance; gen_invariance.TailAugment"), **common,
        ),
    ]  # fmt: skip


PATHS: dict[str, Callable[[torch.device], list[Variant]]] = {
    "munit_step_1": lambda device: munit_same(device, 1, ">= 1.5"),
    "munit_step_16": lambda device: munit_same(device, 16, ">= 1.2"),
    "munit_image": munit_per_image,
    "generating": generating,
    "training_step": training_step,
    "training_options": training_options,
    "stage": stage,
    "batches": batches,
    "loading": loading,
    "nuisances": nuisances,
    "ekld_forward": ekld_forward,
    "ekld_precision": ekld_precision,
    "starting": starting,
}

HEAD = ["path", "variant", "kind", "ms", "for each", "ratio: min / median / max", "of", "goal", "difference of outputs"]


def table(rows: list[dict[str, object]]) -> str:
    """The results as Markdown."""
    cells = []
    for row in rows:
        ratio = "" if row["ratio"] is None else " / ".join(f"{value:.3g}" for value in row["ratio"])
        difference = "" if row["difference"] is None else f"{row['difference']:.1e}"
        cells.append([
            row["path"], row["variant"], row["kind"], f"{row['ms']:.4g}", row["unit"], ratio, row["against"] or "",
            row["goal"] or "", difference,
        ])  # fmt: skip
    notes = [f"- {row['path']}, {row['variant']}: {row['note']}" for row in rows if row["note"]]
    return "\n".join([markdown(HEAD, cells), *notes, ""])


def main() -> None:
    """Measure the paths that are asked for."""
    given = read_settings(__doc__, device="cpu", only=tuple(PATHS), rounds=5, out=Path("runs/speed"))
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("device=cuda: this torch sees no CUDA device; run it where there is one")
    torch.set_num_threads(1)
    if missing := set(given.only) - set(PATHS):
        sys.exit(f"no path {', '.join(sorted(missing))}; choose some of {', '.join(PATHS)}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "one CPU thread"
    facts = {"device": name, "torch": torch.__version__, "commit": provenance().get("commit")}
    command = " ".join(["python -m benchmarks.speed", *sys.argv[1:]])
    head = f"`{command}`\n\n{', '.join(f'{key} {value}' for key, value in facts.items())}\n\n"
    rows: list[dict[str, object]] = []
    for path in given.only:
        started = time.process_time()
        variants = PATHS[path](device)
        new = compare(path, variants, measure(variants, rounds=given.rounds, device=device))
        rows += new
        print(table(new), f"({time.process_time() - started:.0f} s)", sep="\n", flush=True)
        write_text(given.out / "speed.jsonl", "".join(json.dumps({**row, **facts}) + "\n" for row in rows))
        write_text(given.out / "speed.md", head + table(rows))


if __name__ == "__main__":
    main()
