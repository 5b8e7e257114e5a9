"""What each verb of the command line does: build what the settings name, one library call, say where the result is.

Settings come as plain values; composing them is the business of `cli`. Torch is imported inside the verbs, so that
help is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from gen_invariance.errors import SettingsError
from gen_invariance.settings import settings_of, typed


def printable(text: str) -> str:
    """`text` without control characters, which a file or class name could use to write over the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise SettingsError(f"device must be auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"torch finds no CUDA device for device={name}; use device=cpu or device=auto")
    return device


def _prepared(config: Mapping[str, Any], *, seed: int, need_test: bool) -> Any:
    """The images of `data` for `seed`, on the device that `device` names."""
    from gen_invariance.experiment.task import Task, prepare

    task = settings_of(Task, config["data"], "data")
    progress = config.get("progress")
    prepared = prepare(
        task, seed=seed, need_test=need_test, progress=sys.stderr.isatty() if progress is None else progress
    )
    for line in prepared.duplicates.lines():
        _say(line)
    return task, prepared.to(_device(config["device"]))


@contextmanager
def _new_run(config: Mapping[str, Any], kind: str, identity: Mapping[str, Any], split: Any) -> Iterator[Any]:
    """The run folder of `out`, with the split in it."""
    from gen_invariance.data.split import save_split
    from gen_invariance.run import Run, is_first_process

    _join_processes(config)
    with Run.open(
        config["out"],
        kind=kind,
        seed=config["seed"],
        config=identity,
        resume=config["resume"],
        allow_changed_settings=config["allow_changed_settings"],
    ) as run:
        if is_first_process():
            save_split(run.path / "split.npz", split)
        yield run


def _join_processes(config: Mapping[str, Any]) -> None:
    """Join the processes that were launched together, if there are several, on the device that `config` names."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from accelerate import PartialState

        PartialState(cpu=_device(config["device"]).type == "cpu")


def _is_first() -> bool:
    from gen_invariance.run import is_first_process

    return is_first_process()


def _say(line: str) -> None:
    """One line on what a long command does, from the first process of several."""
    if _is_first():
        print(printable(line), flush=True)


def _watch(data: Any, settings: Any, *, seed: int) -> Any:
    """Looks at a fit with a judge, trained here on the images that are fitted on."""
    from gen_invariance.experiment.inspect import InspectSettings, train_judge
    from gen_invariance.translator.quality.monitor import judge_sets, quality_watch

    seen, held = judge_sets(data, settings, seed=seed)
    _say(f"training a judge on {len(seen)} images of {seen.num_classes} classes, {len(held)} are held out ...")
    judge = train_judge(seen, InspectSettings(), seed=seed)
    return quality_watch(seen, held, judge=judge, features=judge.features, seed=seed)


def _fit(config: dict[str, Any]) -> None:
    from gen_invariance.translator.fit import FitSettings
    from gen_invariance.translator.registry import fit_by_name

    task, prepared = _prepared(config, seed=config["seed"], need_test=False)
    loop = config["fit"]
    loop["flip"] = prepared.flip_safe if loop["flip"] is None else loop["flip"]
    settings = settings_of(FitSettings, loop, "fit")
    chosen = config["translator"]
    height, width = prepared.train.images.shape[2:]
    identity = {"data": task.identity(), "translator": chosen, "fit": settings.identity()}
    identity["image_size"] = width if height == width else None  # `augment` scales pictures to it
    with _new_run(config, "fit", identity, prepared.split) as run:
        translator = fit_by_name(
            chosen["name"],
            prepared.train,
            settings,
            run=run,
            network=chosen["network"],
            objective=chosen["objective"],
            progress=config["progress"],
            watch=_watch(prepared.train, settings, seed=run.seed) if settings.watch_every else None,
            say=_say,
        )
    print(f"translator: {run.path / 'translator'}")
    # "kept.png" of a watched fit comes before "step-...", and is the one to look at.
    grids = sorted((run.path / "samples").glob("*.png"))
    for grid in grids[:1] if grids and grids[0].stem == "kept" else grids[-1:]:
        print(f"sample grid: {grid}")
    if hasattr(translator, "describe"):
        print(translator.describe())


def _train(config: dict[str, Any]) -> None:
    from gen_invariance.classifier.train import TrainSettings
    from gen_invariance.classifier.transfer import TransferPlan
    from gen_invariance.experiment.cell import (
        ClassifierSettings,
        StageSettings,
        build_augmentation,
        build_stage,
        stage_source,
        train_classifier,
    )
    from gen_invariance.experiment.evaluate import require_channels
    from gen_invariance.experiment.inspect import obey_verdict
    from gen_invariance.experiment.translated import given_share, untranslated_note
    from gen_invariance.translator.io import load_translator
    from gen_invariance.translator.quality.verdict import read_verdict

    classifier = settings_of(ClassifierSettings, config["classifier"], "classifier")
    training = settings_of(TrainSettings, config["training"], "training")
    plan = None if config["transfer"]["mode"] == "none" else settings_of(TransferPlan, config["transfer"], "transfer")
    given = dict(config["stage"])
    folder = typed(given.pop("translator"), str | None, "stage.translator")
    stage_settings = settings_of(StageSettings, given, "stage")
    translator, verdict = load_translator(folder) if folder else None, ""
    if folder:
        given, stage_settings = stage_settings, obey_verdict(stage_settings, folder)
        if stage_settings != given:
            verdict = read_verdict(folder).word
            config["stage"]["policy_options"] = dict(stage_settings.policy_options)
    task, prepared = _prepared(config, seed=config["seed"], need_test=True)
    if translator is not None:
        require_channels(translator, prepared, folder)
    stage = build_stage(stage_settings, prepared, translator=translator)
    share = given_share(stage_settings, prepared)
    if note := untranslated_note(stage_settings, share, translator=bool(folder), verdict=verdict):
        _say(note)
    elif verdict:
        _say(f"note: inspect says '{verdict}', so the policy auto is weaker")
    identity = {
        "data": task.identity(),
        "classifier": config["classifier"],
        "training": training.identity(),
        "stage": {**config["stage"], "translator": str(folder) if folder else None},
        "transfer": config["transfer"],
        "augmentation": config["augmentation"],
    }
    base = build_augmentation(config["augmentation"], flip=prepared.flip_safe)
    with _new_run(config, "train", identity, prepared.split) as run:
        if _is_first():
            run.note(given_share=asdict(share))
        train_classifier(
            prepared,
            classifier,
            training,
            stage=stage,
            run=run,
            base=base,
            plan=plan,
            stage_source=stage_source(stage_settings, prepared),
            progress=config["progress"],
            say=lambda text: print(text) if _is_first() else None,
        )
    if _is_first():
        print(f"classifier: {run.path}")
        print(f"next: gen-invariance measure run={run.path}")


def _measure(config: dict[str, Any]) -> None:
    from gen_invariance.experiment.evaluate import measure_run, table_of

    measured = measure_run(
        config["run"],
        nuisance=config["nuisance"],
        nuisance_options=config["nuisance_options"],
        translator=config["translator"],
        split=config["split"],
        draws=config["draws"],
        batch_size=config["batch_size"],
        seed=config["seed"],
        device=_device(config["device"]),
        method=config["method"],
    )
    print("\n".join(printable(line) for line in (*measured.prepared.duplicates.lines(), *table_of(measured))))
    print(f"written: {measured.path}")


def _report(config: dict[str, Any]) -> None:
    from gen_invariance.report.runs import report_of

    folders = config["records"] if isinstance(config["records"], list) else [config["records"]]
    page = report_of(
        folders,
        config["out"],
        title=config["title"],
        baseline=config["baseline"],
        references=config["references"],
    )
    print(f"report: {page}")


def _demo(config: dict[str, Any]) -> None:
    from gen_invariance.benchmark.demo import DemoSettings, run_demo

    settings = settings_of(DemoSettings, config["demo"], "demo")
    page = run_demo(config["out"], settings, say=lambda line: print(line, flush=True))
    print((page.parent / "table.md").read_text(encoding="utf-8"))
    print(f"report: {page}")


def _inspect(config: dict[str, Any]) -> None:
    from gen_invariance.experiment import inspect as inspecting
    from gen_invariance.translator.io import load_translator

    settings = settings_of(inspecting.InspectSettings, config["inspect"], "inspect")
    folder, seed = config["translator"], config["seed"]
    translator = load_translator(folder)
    task, prepared = _prepared(config, seed=seed, need_test=False)
    fitted = inspecting.differences_from_fit(folder, task, seed=seed)
    if fitted:
        print(printable(f"note: this translator was fitted with {', '.join(fitted)}"))
    found = inspecting.inspect_translator(
        translator.to(prepared.train.device),
        prepared,
        settings,
        seed=seed,
        oracle=task.nuisance != "identity",
        say=lambda line: print(line, flush=True),
    )
    out = config["out"] or inspecting.output_folder(folder)
    page = inspecting.write_inspection(found, out, translator=folder, task=task, settings=settings, seed=seed)
    print("\n".join([found.quality.verdict.word, *(f"  {reason}" for reason in found.quality.verdict.reasons)]))
    print(f"page: {page}")


def _augment(config: dict[str, Any]) -> None:
    from gen_invariance.cli.help import config_folder
    from gen_invariance.experiment.augment import augment_set, check_complete, lines_of

    progress = sys.stderr.isatty() if config["progress"] is None else config["progress"]
    summary = augment_set(
        config,
        config_folder(),
        device=_device(config["device"]),
        progress=progress,
        say=lambda line: print(printable(line)),
    )
    print("\n".join(printable(line) for line in lines_of(summary)))
    check_complete(summary)


def _order(config: dict[str, Any]) -> None:
    from gen_invariance.experiment.order import order_subsets

    progress = sys.stderr.isatty() if config["progress"] is None else config["progress"]
    lines = order_subsets(config, device=_device(config["device"]), progress=progress)
    print("\n".join(printable(line) for line in lines), end="\n" * bool(lines))


def _benchmark(config: dict[str, Any]) -> None:
    from gen_invariance.benchmark.comparing import compare
    from gen_invariance.cli.help import config_folder

    compare(
        config,
        config_folder(),
        device=_device(config["device"]),
        say=lambda line: print(printable(line), flush=True),
    )


VERBS: dict[str, Callable[[dict[str, Any]], None]] = {
    "fit": _fit,
    "augment": _augment,
    "train": _train,
    "measure": _measure,
    "report": _report,
    "inspect": _inspect,
    "order": _order,
    "benchmark": _benchmark,
    "demo": _demo,
}
