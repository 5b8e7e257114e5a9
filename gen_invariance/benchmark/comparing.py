"""What `gen-invariance benchmark` does: lists benchmarks, runs a grid of them, and writes its report."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from gen_invariance.benchmark.arms import arm_names, read_arm
from gen_invariance.benchmark.grid import GridCell, grid_cells, grid_records, learned_of, run_grid
from gen_invariance.benchmark.registry import benchmark_names, every_variant, read_benchmark
from gen_invariance.benchmark.workload import estimated_seconds
from gen_invariance.errors import RunError, SettingsError
from gen_invariance.files import write_text
from gen_invariance.records import finished_cells, measured
from gen_invariance.report.gains import gain_tables
from gen_invariance.report.report_page import write_report
from gen_invariance.report.runs import figures_of
from gen_invariance.report.size_effect import size_effect_table, size_effects
from gen_invariance.settings import typed

ACTIONS = ("run", "list", "report")


def numbers_of(value: Any, where: str) -> list[int]:
    """Whole numbers out of 3, "0-2", "0,4" or a list of such.

    Raises:
        SettingsError: something else.

    >>> numbers_of("0-2", "orders"), numbers_of([1, "4-5"], "orders")
    ([0, 1, 2], [1, 4, 5])
    """
    words = value if isinstance(value, list | tuple) else str(value).split(",")
    found: list[int] = []
    for word in words:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(word).strip())
        if isinstance(word, bool) or match is None or (match[2] and int(match[2]) < int(match[1])):
            raise SettingsError(f"{where} must be whole numbers such as 3, 0-2 or [0,4], got {value!r}")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return list(dict.fromkeys(found))


def shard_of(value: Any) -> tuple[int, int]:
    """(i, n) out of "i/n".

    Raises:
        SettingsError: something else, or i not in 0 to n - 1.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", str(value))
    if match is None or int(match[1]) >= int(match[2]):
        raise SettingsError(f"shard must be i/n with i from 0 to n - 1, such as 0/4, got {value!r}")
    return int(match[1]), int(match[2])


def cells_of(config: Mapping[str, Any], configs: Path) -> list[GridCell]:
    """The cells that the settings of the verb ask for.

    Raises:
        SettingsError: an unknown benchmark, method, translator or setting.
    """
    names = config["benchmark"] if isinstance(config["benchmark"], list) else [config["benchmark"]]
    changes = {
        group: typed(config[f"{group}_options"], dict, f"{group}_options")
        for group in ("data", "classifier", "training", "stage", "fit", "measure")
    }
    root = typed(config["data_root"], str | None, "data_root")
    more = {
        "augmentation": typed(config["augmentation"], str | None, "augmentation"),
        "translators": _by_name(config, "translator_options"),
        "nuisances": _by_name(config, "nuisance_options"),
    }
    benchmarks = [read_benchmark(str(name), configs, data_root=root, changes=changes, **more) for name in names]
    return grid_cells(
        benchmarks,
        lambda benchmark: [read_arm(str(name), benchmark, configs) for name in arm_names(config["methods"], benchmark)],
        orders=numbers_of(config["orders"], "orders"),
        seeds=numbers_of(config["seeds"], "seeds"),
        learned=learned_of(typed(config["learned"], str | None, "learned"), configs),
    )


def _by_name(config: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """A mapping of mappings out of the settings."""
    return {name: typed(value, dict, f"{key}.{name}") for name, value in typed(config[key], dict, key).items()}


def compare(
    config: Mapping[str, Any], configs: Path, *, device: torch.device, say: Callable[[str], None] = lambda line: None
) -> None:
    """Carry out the action of the verb's settings.

    Raises:
        SettingsError: bad settings.
        DataNotFoundError: files of a benchmark are missing, or there is nothing to report.
        RunError: cells failed; the others were measured.
    """
    if config["action"] not in ACTIONS:
        raise SettingsError(f"benchmark knows {', '.join(ACTIONS)}, got {config['action']!r}")
    if config["action"] == "list":
        for line in list_lines(config, configs):
            say(line)
        return
    shard, processes = shard_of(config["shard"]), typed(config["processes"], int, "processes")
    if processes < 1:
        raise SettingsError(f"processes must be at least 1, got {processes}")
    cells, out = cells_of(config, configs), Path(config["out"])
    failed: list[str] = []
    if config["action"] == "run":
        failed = run_grid(cells, out, processes=processes, shard=shard, device=device, say=say)
    done = finished_cells(out / "records")
    left = sum(cell.key not in done for cell in cells)
    if config["action"] == "report" or (left < len(cells) and (shard[1] == 1 or not left)):
        say(f"report: {write_grid_report(cells, out, baseline=config['baseline'])}")
    if left:
        again = "the same command again" if shard[1] == 1 else "the other shards, or the same command again"
        say(f"{left} of {len(cells)} cells are missing; {again} will measure them")
    if failed:
        raise RunError(f"{len(failed)} cell(s) failed, the first: {failed[0]}; the others are in {out / 'records'}")


def list_lines(config: Mapping[str, Any], configs: Path) -> list[str]:
    """A table of all benchmarks: whether their data is there and about how long a cell takes on one CPU core."""
    wanted = config["benchmark"] if config["benchmark"] not in (None, "digits_rot_lt") else ""
    starts = tuple(wanted) if isinstance(wanted, list) else (wanted,)
    lines, summaries = [f"{'benchmark':28} {'a cell, about':>14}  data"], set()
    for benchmark in every_variant(configs, data_root=config["data_root"]):
        if not benchmark.name.startswith(starts):
            continue
        if benchmark.summary not in summaries:
            summaries.add(benchmark.summary)
            lines += ["", benchmark.summary]
        left = benchmark.missing()
        where = f" in {benchmark.task.path}" if benchmark.task.path else ""
        found = "found" if not left else f"lacks {', '.join(left[:2])}{' ...' * (len(left) > 2)}{where}"
        lines.append(f"{benchmark.name:28} {_duration(estimated_seconds(benchmark)):>14}  {found}")
    if not summaries:
        raise SettingsError(f"no benchmark starts with {wanted!r}; choose {', '.join(benchmark_names(configs))}")
    return [*lines, "", "A cell is one training and its measurement; times are for one CPU core, without the stage."]


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(round(seconds), 1)} s"


def write_grid_report(cells: list[GridCell], out: Path, *, baseline: str | None = None) -> Path:
    """The report of what is measured of `cells`, in `out`/report; its path.

    Raises:
        DataNotFoundError: no record.
        DataError, SettingsError: see `write_report`.
    """
    frame = grid_records(cells, out)
    names = list(dict.fromkeys(cell.arm.name for cell in cells))
    known = set(measured(frame)["method"])
    effects = size_effects(frame)
    baseline = baseline or next((name for name in names if name in known), None)
    page = write_report(
        out / "report",
        title="Long-tailed benchmarks: accuracy and invariance by class size",
        frame=frame,
        figures=figures_of(frame),
        notes=_notes(frame),
        command="gen-invariance benchmark",
        baseline=baseline,
        gains=gain_tables(frame, baseline=baseline),
        references=[name for name in names if "+oracle" in name or "+more_real" in name],
    )
    if len(effects):
        effects.to_csv(out / "report" / "class_size.csv", index=False)
        write_text(out / "report" / "class_size.md", size_effect_table(effects))
    return page


def _notes(frame: pd.DataFrame) -> list[str]:
    orders = frame.groupby("benchmark")["order"].nunique().max()
    unit = "class orders, training seeds averaged within each" if orders > 1 else "training seeds of one class order"
    invariance = (
        " eKLD compares an image of the test set with other draws of the nuisance on the same image before it met the "
        "nuisance. class_size.md holds the rank correlation of class size and eKLD."
    )
    return [f"Intervals and pairs are over {unit}.{invariance if 'ekld' in set(frame['metric']) else ''}"]
