"""`run_benchmark`: a grid of benchmarks, methods, class orders and seeds by their names, measured and reported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from gen_invariance.benchmark.arms import arm_names, read_arm
from gen_invariance.benchmark.grid import GridCell, load_grid, make_cells, run_grid
from gen_invariance.benchmark.listing import format_list
from gen_invariance.benchmark.registry import Benchmark, read_benchmark, read_translator_fit
from gen_invariance.benchmark.settings import BenchmarkRun
from gen_invariance.errors import RunError, SettingsError
from gen_invariance.experiment.launch import Say, choose_device, say_nothing
from gen_invariance.files import write_text
from gen_invariance.records import finished_cells, measured, write_csv
from gen_invariance.report.gains import gain_tables
from gen_invariance.report.report_page import write_report
from gen_invariance.report.settings import ReportSettings
from gen_invariance.report.size_effect import size_effect_table, size_effects


def run_benchmark(
    benchmark: str | Sequence[str] = "digits_rot_lt",
    methods: str | Sequence[str] = "stages",
    *,
    out: Path | str,
    orders: int | str | Sequence[int] = "0-2",
    seeds: int | str | Sequence[int] = 0,
    say: Say = say_nothing,
    **settings: Any,
) -> pd.DataFrame:
    """Measure what `out` lacks of a grid, write its report to `out`/report, and return the records.

    Args:
        benchmark: name or names, as `gen-invariance benchmark list` shows them.
        methods: name or names, such as "ce_drs+redraw", or a list of methods by one name, such as "stages".
        out: folder; a grid that was stopped there goes on.
        orders: numbers of class orders; images and their draws follow from them.
        seeds: of training.
        say: is told what is done, a line at a time.
        settings: further fields of `BenchmarkRun`, such as `training_options={"epochs": 20}`.

    Returns:
        One row a figure, columns as of `records.Record`.

    Raises:
        SettingsError: an unknown name or setting.
        DataNotFoundError: files of a benchmark are missing.
        RunError: cells failed; the others were measured.

    Example:
        >>> import tempfile
        >>> frame = run_benchmark(
        ...     methods="ce", orders=0, out=tempfile.mkdtemp(), training_options={"epochs": 1},
        ...     data_options={"test_images": 5}, measure_options={"draws": 1}
        ... )
        >>> len(frame[frame["metric"] == "accuracy"])
        10
    """
    asked = BenchmarkRun(
        benchmark=_as_names(benchmark),
        methods=_as_names(methods),
        out=str(out),
        orders=_as_numbers(orders),
        seeds=_as_numbers(seeds),
        **settings,
    )
    carry_out(asked, say=say)
    return load_grid(list_cells(asked), out)


def _as_names(names: str | Sequence[str]) -> str | tuple[str, ...]:
    return names if isinstance(names, str) else tuple(names)


def _as_numbers(numbers: int | str | Sequence[int]) -> int | str | tuple[int, ...]:
    return numbers if isinstance(numbers, int | str) else tuple(numbers)


def carry_out(settings: BenchmarkRun, *, say: Say = say_nothing) -> None:
    """Carry out the action of the settings: list benchmarks, run a grid of them and report it, or report alone.

    Raises:
        SettingsError: bad settings.
        DataNotFoundError: files of a benchmark are missing, or there is nothing to report.
        RunError: cells failed; the others were measured.
    """
    if settings.action == "list":
        starts = "" if settings.benchmark == "digits_rot_lt" else settings.benchmark
        for line in format_list(starts, data_root=settings.data_root):
            say(line)
        return
    shard, cells, out = parse_shard(settings.shard), list_cells(settings), Path(settings.out)
    failed: list[str] = []
    if settings.action == "run":
        device = choose_device(settings.device)
        failed = run_grid(cells, out, processes=settings.processes, shard=shard, device=device, say=say)
    done = finished_cells(out / "records")
    left = sum(cell.key not in done for cell in cells)
    whole = shard[1] == 1
    if settings.action == "report" or (left < len(cells) and (whole or not left)):
        say(f"report: {write_grid_report(cells, out, baseline=settings.baseline)}")
    if left:
        again = "the same command again" if whole else "the other shards, or the same command again"
        say(f"{left} of {len(cells)} cells are missing; {again} will measure them")
    if failed:
        raise RunError(f"{len(failed)} cell(s) failed, the first: {failed[0]}; the others are in {out / 'records'}")


def list_cells(settings: BenchmarkRun) -> list[GridCell]:
    """The cells that the settings ask for.

    Raises:
        SettingsError: an unknown benchmark, method, translator or setting.
    """
    names = [settings.benchmark] if isinstance(settings.benchmark, str) else settings.benchmark
    changes = settings.read_changes()
    benchmarks = [read_benchmark(name, data_root=settings.data_root, changes=changes) for name in names]

    def read_learned(benchmark: Benchmark) -> Any:
        return None if settings.learned is None else read_translator_fit(settings.learned, benchmark)

    return make_cells(
        benchmarks,
        lambda benchmark: [read_arm(name, benchmark) for name in arm_names(settings.methods, benchmark)],
        orders=parse_numbers(settings.orders, "orders"),
        seeds=parse_numbers(settings.seeds, "seeds"),
        learned=read_learned,
    )


_MOST_NUMBERS = 10_000


def parse_numbers(value: Any, where: str) -> list[int]:
    """Whole numbers out of 3, "0-2", "0,4" or a list of such.

    Raises:
        SettingsError: something else.

    >>> parse_numbers("0-2", "orders"), parse_numbers([1, "4-5"], "orders")
    ([0, 1, 2], [1, 4, 5])
    """
    words = value if isinstance(value, list | tuple) else str(value).split(",")
    numbers: list[int] = []
    for word in words:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(word).strip())
        if isinstance(word, bool) or match is None or (match[2] and int(match[2]) < int(match[1])):
            raise SettingsError(f"{where} must be whole numbers such as 3, 0-2 or [0,4], got {value!r}")
        more = range(int(match[1]), int(match[2] or match[1]) + 1)
        if more.stop - more.start + len(numbers) > _MOST_NUMBERS:
            raise SettingsError(f"{where} must be at most {_MOST_NUMBERS} numbers, got {value!r}")
        numbers += more
    return list(dict.fromkeys(numbers))


def parse_shard(value: Any) -> tuple[int, int]:
    """(i, n) out of "i/n".

    Raises:
        SettingsError: something else, or i not in 0 to n - 1.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", str(value))
    if match is None or int(match[1]) >= int(match[2]):
        raise SettingsError(f"shard must be i/n with i from 0 to n - 1, such as 0/4, got {value!r}")
    return int(match[1]), int(match[2])


def write_grid_report(cells: Sequence[GridCell], out: Path, *, baseline: str | None = None) -> Path:
    """The report of what is measured of `cells`, in `out`/report; its path.

    Raises:
        DataNotFoundError: no record.
        DataError, SettingsError: see `write_report`.
    """
    frame = load_grid(cells, out)
    names = list(dict.fromkeys(cell.arm.name for cell in cells))
    known = set(measured(frame)["method"])
    effects = size_effects(frame)
    baseline = baseline or next((name for name in names if name in known), None)
    settings = ReportSettings(
        title="Long-tailed benchmarks: accuracy and invariance by class size",
        baseline=baseline,
        references=tuple(name for name in names if "+oracle" in name or "+more_real" in name),
    )
    page = write_report(
        frame,
        out / "report",
        settings,
        notes=[_describe_intervals(frame)],
        gains=gain_tables(frame, baseline=baseline),
        command="gen-invariance benchmark",
    )
    if len(effects):
        write_csv(effects, out / "report" / "class_size.csv")
        write_text(out / "report" / "class_size.md", size_effect_table(effects))
    return page


def _describe_intervals(frame: pd.DataFrame) -> str:
    orders = frame.groupby("benchmark")["order"].nunique().max()
    unit = "class orders, training seeds averaged within each" if orders > 1 else "training seeds of one class order"
    note = f"Intervals and pairs are over {unit}."
    if "ekld" in set(frame["metric"]):
        note += (
            " eKLD compares an image of the test set with other draws of the nuisance on the same image before it met "
            "the nuisance. class_size.md holds the rank correlation of class size and eKLD."
        )
    return note
