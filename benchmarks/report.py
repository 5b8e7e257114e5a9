"""How long 10,000 records take to be written, read, summarised and rendered as a report with pictures.

    python -m benchmarks.report [--records 10000] [--out FOLDER]

Records are made up: five methods on two benchmarks of 49 classes, as many class orders as it takes. Prints CPU and
wall-clock seconds of each part and whether all but writing stays below ten seconds of one core.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

METHODS = ("ce", "ce_drs", "ce_drs+git", "ce_drs+pose", "ce_drs+oracle")
BENCHMARKS = ("k49_rot_lt", "k49_bg_lt")
CLASSES = 49
TOTALS = ("balanced_accuracy", "many_accuracy", "medium_accuracy", "few_accuracy", "mean_ekld", "few_ekld")
BY_CLASS = ("accuracy", "ekld", "agreement")


def cells(number: int) -> Iterator[list[Any]]:
    """Lists of the records of single cells, `number` records in all or a few more."""
    from gen_invariance.data.longtail import zipf_counts
    from gen_invariance.records import Record, provenance

    sizes = zipf_counts(CLASSES, largest=4800, power=2.0, smallest=5).numpy()
    random, facts, made, order = np.random.default_rng(0), provenance(), 0, 0
    while made < number:
        for benchmark in BENCHMARKS:
            counts = random.permutation(sizes).tolist()
            for place, method in enumerate(METHODS):
                about = {"benchmark": benchmark, "method": method, "config_digest": method, "seed": 0, "order": order}
                about |= facts
                records = [Record(metric=m, value=random.uniform() + place / 10, **about) for m in TOTALS]
                records += [
                    Record(metric=metric, value=random.uniform() / np.log(2 + count), class_name=str(label),
                           class_index=label, class_count=count, group="few" if count < 20 else "many", **about)
                    for metric in BY_CLASS for label, count in enumerate(counts)
                ]  # fmt: skip
                made += len(records)
                yield records
        order += 1


def parts(records: list[list[Any]], out: Path) -> dict[str, tuple[float, float]]:
    """Wall-clock and CPU seconds of each part of making a report of the cells in `out`."""
    from gen_invariance.records import RecordWriter, finished_cells, load_records
    from gen_invariance.report.report_page import write_report
    from gen_invariance.report.runs import figures_of
    from gen_invariance.report.size_effect import size_effects
    from gen_invariance.report.summary import summarise

    seconds: dict[str, tuple[float, float]] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        wall, cpu = perf_counter(), process_time()
        answer = function()
        seconds[name] = perf_counter() - wall, process_time() - cpu
        return answer

    writer = RecordWriter(out / "records")
    timed("write", lambda: [writer.write_cell(cell) for cell in records])
    frame = timed("read", lambda: load_records(out / "records"))
    timed("which cells are finished", lambda: finished_cells(frame))
    timed("summarise", lambda: summarise(frame, baseline="ce_drs"))
    timed("class size and eKLD", lambda: size_effects(frame))
    figures = timed("draw", lambda: figures_of(frame))
    page = {"title": "Speed", "frame": frame, "figures": figures, "baseline": "ce_drs"}
    timed("render", lambda: write_report(out / "report", **page))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    made = list(cells(given.records))
    with tempfile.TemporaryDirectory() as scratch:
        seconds = parts(made, given.out or Path(scratch))
    print(f"{sum(map(len, made))} records of {len(made)} cells")
    for name, (wall, cpu) in seconds.items():
        print(f"{name:26} {wall:6.2f} s, CPU {cpu:6.2f} s")
    wall, cpu = (sum(pair[n] for name, pair in seconds.items() if name != "write") for n in (0, 1))
    verdict = "below" if cpu < 10 else "NOT below"
    print(f"{'all but writing':26} {wall:6.2f} s, CPU {cpu:6.2f} s: {verdict} 10 s of one core")


if __name__ == "__main__":
    main()
