"""What the command `order` does: prepare the data, measure and order class subsets, write records beside the page."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from gen_invariance.errors import GenInvarianceError
from gen_invariance.experiment.evaluate import resolve_nuisance
from gen_invariance.experiment.order_study import OrderSettings, run_order
from gen_invariance.experiment.task import Task, prepare
from gen_invariance.order.analysis import AnalysisSettings, OrderStudy
from gen_invariance.order.backbone import SourceSettings
from gen_invariance.order.identity import cell_settings, plain
from gen_invariance.order.records import study_records
from gen_invariance.records import Record, RecordWriter, provenance
from gen_invariance.report.diagram import diagram_text
from gen_invariance.report.order_page import findings
from gen_invariance.run import config_digest
from gen_invariance.settings import settings_of


def order_subsets(config: Mapping[str, Any], *, device: torch.device, progress: bool) -> list[str]:
    """Carry out `order` with plain settings, as configs/order.yaml lists them.

    Returns:
        Lines for a terminal: the diagram, the findings and where the page is; none for processes other than the first.

    Raises:
        GenInvarianceError: as `prepare` and `run_order`; a folder made for nothing is taken away again.
    """
    task = settings_of(Task, config["data"], "data")
    settings = replace(order_settings(config["order"], seed=config["seed"]), device=str(device))
    prepared = prepare(task, seed=config["seed"], progress=progress)
    nuisance = None
    if config["nuisance"] is not None:
        options = config["nuisance_options"]
        nuisance = resolve_nuisance(config["nuisance"], options, config["translator"], prepared, device)
    folder = Path(config["out"])
    with _nothing_left_behind(folder):
        study = run_order(
            prepared.train,
            prepared.test,
            folder,
            settings,
            nuisance=nuisance,
            resume=config["resume"],
            progress=progress,
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        )
    if not PartialState().is_main_process:
        return []
    identity = {
        "data": task.identity(),
        "cells": cell_settings(settings, nuisance),
        "analysis": plain(asdict(settings.analysis)),
    }
    records = write_records(
        folder / "records", study, config_digest=config_digest(identity), data_digest=prepared.train.digest
    )
    text = diagram_text(study.order).splitlines()
    return [
        *prepared.duplicates.lines(),
        *text,
        "",
        *findings(study),
        "",
        f"records: {records}",
        f"page: {folder / 'order.html'}",
    ]


def order_settings(values: Mapping[str, Any], *, seed: int) -> OrderSettings:
    """`OrderSettings` out of plain nested values; one `seed` chooses the subsets and draws the bootstraps.

    Raises:
        SettingsError: an unknown name, or a value of another kind or outside its range.
    """
    values = dict(values)
    source = settings_of(SourceSettings, values.pop("source", {}), "order.source")
    analysis = settings_of(AnalysisSettings, {**values.pop("analysis", {}), "seed": seed}, "order.analysis")
    return settings_of(OrderSettings, {**values, "seed": seed, "source": source, "analysis": analysis}, "order")


def write_records(folder: Path, study: OrderStudy, *, config_digest: str, data_digest: str) -> Path:
    """Append the study's figures, one cell for each subset and training seed; the folder."""
    common = {"config_digest": config_digest, "data_digest": data_digest, **provenance()}
    writer = RecordWriter(folder)
    records = (Record(**figure, **common) for figure in study_records(study))
    for _, cell in itertools.groupby(records, key=lambda record: record.cell):
        writer.write_cell(cell)
    return folder


@contextmanager
def _nothing_left_behind(folder: Path) -> Iterator[None]:
    """Take a new run folder away again when bad input is found before anything was measured."""
    was_there, was_run = folder.is_dir(), (folder / "run.json").exists()
    try:
        yield
    except GenInvarianceError as error:
        found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        if error.exit_code == 2 and not was_run and found == {"run.json"} and PartialState().is_main_process:
            (folder / "run.json").unlink()
            None if was_there else folder.rmdir()
        raise
