"""The package against a plain reading of the published recipe, hot path by hot path.

    python -m benchmarks.speed out=docs/results/speed/cpu            # under 15 minutes on one core
    python -m benchmarks.speed only=ekld_forward,loading rounds=9 out=runs/speed
    python -m benchmarks.speed device=cuda out=docs/results/speed/cuda

On a CPU it is processor time of one thread, on a GPU wall time with the queue emptied before and after. The variants of
a path take turns, in reverse order every other round, and ratios are taken within a round. `kind` says what a ratio may
be quoted as: "same" - the same mathematics, outputs compared; "changed" - other settings or another training, which is
worth its ratio only beside figures of quality (docs/performance.md). Writes `speed.jsonl` and `speed.md`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.speed_paths import PATHS, Variant
from gen_invariance.files import write_text
from gen_invariance.records import provenance

COLUMNS = ("path", "variant", "kind", "ms", "ratio", "goal", "difference")


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds: of this process on a CPU, on the wall behind a GPU's queue."""
    if device.type == "cpu":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return wall


def measure(variants: list[Variant], *, rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds for one unit of work, one list for each variant; the first round warms up and is dropped."""
    now, taken = clock(device), [[] for _ in variants]
    for number in range(rounds + 1):
        order = range(len(variants)) if number % 2 else reversed(range(len(variants)))
        for place in order:
            variant = variants[place]
            started = now()
            if variant.seconds is None:
                for _ in range(variant.repeats):
                    variant.run()
                spent = (now() - started) / variant.repeats
            else:
                spent = variant.seconds()
            if number:
                taken[place].append(spent / variant.units)
    return taken


def rows_of(path: str, variants: list[Variant], taken: list[list[float]]) -> list[dict[str, object]]:
    """A line of results for each variant; ratios to the path's first variant, or to the one it names."""
    rows = []
    for place, variant in enumerate(variants):
        base = next((n for n, other in enumerate(variants) if other.name == variant.against), 0)
        if variant.kind == "plain" and variant.against is None:
            base = place
        ratios = [plain / own for plain, own in zip(taken[base], taken[place], strict=True)]
        if variant.cost:
            ratios = [1 / ratio for ratio in ratios]
        rows.append(
            {
                "path": path,
                "variant": variant.name,
                "kind": variant.kind,
                "against": variants[base].name if place != base else None,
                "ms": 1000 * statistics.median(taken[place]),
                "unit": variant.unit,
                "ratio": [min(ratios), statistics.median(ratios), max(ratios)] if place != base else None,
                "goal": variant.goal,
                "difference": variant.difference() if variant.difference is not None else None,
                "rounds": len(ratios),
                "note": variant.note,
            }
        )
    return rows


def table(rows: list[dict[str, object]], facts: dict[str, object], command: str) -> str:
    """The results as Markdown."""
    lines = [
        f"`{command}`",
        "",
        ", ".join(f"{name} {value}" for name, value in facts.items()),
        "",
        "| path | variant | kind | ms | for each | ratio: min / median / max | of | goal | difference of outputs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = "" if row["ratio"] is None else " / ".join(f"{value:.3g}" for value in row["ratio"])
        difference = "" if row["difference"] is None else f"{row['difference']:.1e}"
        cells = (
            row["path"], row["variant"], row["kind"], f"{row['ms']:.4g}", row["unit"], ratio, row["against"] or "",
            row["goal"] or "", difference,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    notes = [f"- {row['path']}, {row['variant']}: {row['note']}" for row in rows if row["note"]]
    return "\n".join([*lines, "", *notes, ""])


def main(given: dict[str, str]) -> None:
    unknown = set(given) - {"device", "only", "rounds", "out"}
    if unknown:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; choose device=, only=, rounds=, out=")
    device = torch.device(given.get("device", "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("device=cuda: this torch sees no CUDA device; run it where there is one")
    torch.set_num_threads(1)
    chosen = given["only"].split(",") if "only" in given else list(PATHS)
    if missing := set(chosen) - set(PATHS):
        sys.exit(f"no path {', '.join(sorted(missing))}; choose some of {', '.join(PATHS)}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "one CPU thread"
    facts = {"device": name, "torch": torch.__version__, "commit": provenance().get("commit")}
    out, rows = Path(given.get("out", "runs/speed")), []
    out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m benchmarks.speed", *(f"{key}={value}" for key, value in given.items())])
    for path in chosen:
        started = time.process_time()
        variants = PATHS[path](device)
        rounds = int(given.get("rounds", 5))
        new = rows_of(path, variants, measure(variants, rounds=rounds, device=device))
        rows += new
        print(*table(new, facts, command).splitlines()[6:], f"({time.process_time() - started:.0f} s)", sep="\n")
        write_text(out / "speed.jsonl", "".join(json.dumps({**row, **facts}) + "\n" for row in rows))
        write_text(out / "speed.md", table(rows, facts, command))


if __name__ == "__main__":
    main(dict(word.split("=", 1) for word in sys.argv[1:]))
