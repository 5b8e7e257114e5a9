"""How long 10,000 records take to be written, read, summarised and rendered as a report with pictures.

    python -m benchmarks.report [records=10000] [out=FOLDER]

Records are made up: five methods on two benchmarks of 49 classes, as many class orders as it takes. Prints wall and
processor seconds of each part.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.program import read_settings
from benchmarks.timing import Stopwatch

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


def main() -> None:
    """Time each part of making a report."""
    from gen_invariance.records import RecordWriter, finished_cells, load_records
    from gen_invariance.report.class_figures import class_pictures
    from gen_invariance.report.report_page import write_report
    from gen_invariance.report.settings import ReportSettings
    from gen_invariance.report.size_effect import size_effects
    from gen_invariance.report.summary import summarise

    given, watch = read_settings(__doc__, records=10_000, out=None), Stopwatch()
    made = list(cells(given.records))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(given.out or scratch)
        with watch.time("write"):
            writer = RecordWriter(out / "records")
            for records in made:
                writer.write_cell(records)
        with watch.time("read"):
            frame = load_records(out / "records")
        with watch.time("which cells are finished"):
            finished_cells(frame)
        with watch.time("summarise"):
            summarise(frame, baseline="ce_drs")
        with watch.time("class size and eKLD"):
            size_effects(frame)
        with watch.time("draw"):
            pictures = class_pictures(frame)
        with watch.time("render"):
            settings = ReportSettings(title="Speed", baseline="ce_drs")
            write_report(frame, out / "report", settings, pictures=pictures)
    print(f"{sum(map(len, made))} records of {len(made)} cells", *watch.lines(without="write"), sep="\n")
    print("the goal is 10 s of one core for all but writing")


if __name__ == "__main__":
    main()
