"""Benchmarks by name: a file of `configs/benchmark`, or one of its variants.

`k49_rot_theta_lt` is the file `k49` with the changes it calls `rot` and `theta_lt`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gen_invariance import configs
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.data.readers.registry import missing_files, source_names
from gen_invariance.errors import SettingsError
from gen_invariance.experiment.settings import ClassifierSettings, MeasureSettings, StageSettings, Task
from gen_invariance.settings import read_settings
from gen_invariance.translator.settings import FitSettings

_SECTIONS = ("data", "classifier", "training", "stage", "fit", "measure")
_WITHOUT_FILES = ("digits", "npz", "folder")


@dataclass(frozen=True)
class Benchmark:
    """A task with how to train and measure on it.

    Attributes:
        name: in records.
        summary: what it is, in a line or two.
        task: its images.
        classifier, training: what the methods start from.
        augmentation: of every row, before what a method adds.
        stage: to whom the stage gives; what it gives is said by the arm.
        fit: loop of fitting a translator (`translator.settings.FitSettings`).
        fits: what single translators change about it, by name.
        translators: what to change about single translators' files, by name: {"munit": {"network": {"width": 16}}}.
        nuisances: options of what arms give by name: {"rotation": {"degrees": 30}}.
        measure: see `MeasureSettings`.
        classes, images: how many, where known without looking at the data.
    """

    name: str
    summary: str
    task: Task
    classifier: ClassifierSettings
    training: TrainSettings
    augmentation: str = "none"
    stage: StageSettings = field(default_factory=StageSettings)
    fit: Mapping[str, Any] = field(default_factory=dict)
    fits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    translators: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    nuisances: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    classes: int | None = None
    images: int | None = None

    def missing(self) -> list[str]:
        """Files of its data that are not there."""
        return missing_files(self.task.source, self.task.path)


@dataclass(frozen=True)
class TranslatorFit:
    """How one translator is fitted: its file in `configs/translator`, its network and objective, and the loop."""

    choice: str
    name: str
    network: Mapping[str, Any]
    objective: Mapping[str, Any]
    loop: Mapping[str, Any]

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result; how often to look is left out."""
        return {**asdict(self), "loop": read_settings(FitSettings, self.loop, "fit").identity()}


def benchmark_names() -> tuple[str, ...]:
    """Every benchmark, variants spelt out, file by file."""
    return tuple(name for file in configs.choice_names("benchmark") for name in _read_variants(file))


def read_benchmark(
    name: str, *, data_root: Path | str | None = None, changes: Mapping[str, Any] | None = None
) -> Benchmark:
    """The benchmark called `name`.

    Args:
        name: one of `benchmark_names()`.
        data_root: folder that holds published sets, each as SOURCE/ or SOURCE.npz; None looks into the cache.
        changes: settings that replace the file's: under "data", "classifier", "training", "stage", "measure" and
            "fit" (there also by translator: {"fit": {"munit": {"steps": 9}}}), "augmentation", "translators" and
            "nuisances" (see `Benchmark`). With another stage policy the file's "policy_options" are dropped.

    Raises:
        SettingsError: an unknown name or setting.
    """
    file, variant = _find_file(name)
    values = configs.read_choice("benchmark", file)
    values["data"] = {**values.get("data", {}), **variant}
    _apply_changes(values, changes or {})
    loop, fits = _split_fit(values["fit"], values.get("fits", {}))
    data = {"profile": "none", **values["data"]}
    data["path"] = _find_path(data.get("source", "digits"), data.get("path"), data_root)
    training = {**_resolve_like("training", values), "sampling": "instance"}  # each method brings its own rule
    return Benchmark(
        name=name,
        summary=" ".join(configs.read_summary("benchmark", file).split()),
        task=read_settings(Task, data, f"{name}: data"),
        classifier=read_settings(ClassifierSettings, _resolve_like("classifier", values), f"{name}: classifier"),
        training=read_settings(TrainSettings, training, f"{name}: training"),
        augmentation=values.get("augmentation", "none"),
        stage=read_settings(StageSettings, values["stage"], f"{name}: stage"),
        fit=loop,
        fits=fits,
        translators=values.get("translators", {}),
        nuisances=values.get("nuisances", {}),
        measure=read_settings(MeasureSettings, values["measure"], f"{name}: measure"),
        classes=values.get("classes"),
        images=values.get("images"),
    )


def read_every_benchmark(*, data_root: Path | str | None = None) -> Iterator[Benchmark]:
    """All benchmarks of `benchmark_names`."""
    for name in benchmark_names():
        yield read_benchmark(name, data_root=data_root)


def read_translator_fit(choice: str, benchmark: Benchmark) -> TranslatorFit:
    """How `benchmark` fits the translator of the file `choice`.

    Raises:
        SettingsError: no such file, or "auto".
    """
    if choice == "auto":
        raise SettingsError("a benchmark compares translators by name; gen-invariance choose finds the one to name")
    values, changes = configs.read_choice("translator", choice), benchmark.translators.get(choice, {})
    unknown = sorted(set(changes) - {"network", "objective"})
    if unknown:
        raise SettingsError(f"translator_options.{choice} has no {unknown[0]!r}; choose network or objective")
    network = {**(values.get("network") or {}), **changes.get("network", {})}
    objective = {**(values.get("objective") or {}), **changes.get("objective", {})}
    loop = {**benchmark.fit, **benchmark.fits.get(choice, {})}
    return TranslatorFit(choice, values["name"], network, objective, loop)


def _find_file(name: str) -> tuple[str, dict[str, Any]]:
    """The file of a benchmark, and what its variant changes about "data"."""
    for file in configs.choice_names("benchmark"):
        variants = _read_variants(file) if name.startswith(file) else {}
        if name in variants:
            return file, variants[name]
    names = benchmark_names()
    near = [other for other in names if other.split("_")[0] == name.split("_")[0]]
    raise SettingsError(f"no benchmark {name!r}; choose {', '.join(near or names)}")


def _read_variants(file: str) -> dict[str, dict[str, Any]]:
    """Changes to "data" by name of the variant: one of each axis of the file's "variants"."""
    axes = [axis.items() for axis in configs.read_choice("benchmark", file).get("variants", [])]
    variants = {}
    for chosen in itertools.product(*axes):
        changes: dict[str, Any] = {}
        for _, change in chosen:
            changes |= change
        variants["_".join([file, *(word for word, _ in chosen)])] = changes
    return variants


def _apply_changes(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put `changes` over the values of a benchmark's file, in place."""
    for section in _SECTIONS:
        own, changed = dict(values.get(section, {})), changes.get(section, {})
        if changed.get("policy", own.get("policy")) != own.get("policy"):
            own.pop("policy_options", None)
        values[section] = {**own, **changed}
    if changes.get("augmentation") is not None:
        values["augmentation"] = changes["augmentation"]
    for key in ("translators", "nuisances"):
        values[key] = _merge_options(values.get(key, {}), changes.get(key, {}))


def _merge_options(
    first: Mapping[str, Mapping[str, Any]], then: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Options by name, those of `then` over those of `first`."""
    return {name: {**first.get(name, {}), **then.get(name, {})} for name in (*first, *then)}


def _split_fit(
    fit: Mapping[str, Any], fits: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The loop of all translators, and what single ones change about it."""
    single = {name: value for name, value in fit.items() if isinstance(value, Mapping)}
    loop = {name: value for name, value in fit.items() if name not in single}
    return loop, _merge_options(fits, single)


def _resolve_like(group: str, values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Settings of a group: those of the file that `like` names, with the changes."""
    changes = dict(values[group])
    like = changes.pop("like", None)
    return {**(configs.read_choice(group, like) if like else {}), **changes}


def _find_path(source: str, path: str | None, data_root: Path | str | None) -> str | None:
    """Where the data of `source` lie: as given, or where they are found below `data_root`."""
    if path is not None or data_root is None or source in _WITHOUT_FILES or source not in source_names():
        return path
    root = Path(data_root).expanduser()
    candidates = [root / source, root / f"{source}.npz", root]
    for candidate in candidates:
        if candidate.exists() and not missing_files(source, candidate):
            return str(candidate)
    if not missing_files(source):
        return None  # it is where it is looked for without a path
    return str(candidates[0])
