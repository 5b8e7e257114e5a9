"""Benchmarks by name: a file of `configs/benchmark`, or one of its variants.

`k49_rot_theta_lt` is the file `k49` with the changes it calls `rot` and `theta_lt`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gen_invariance.classifier.train import TrainSettings
from gen_invariance.data.readers.registry import missing_files, source_names
from gen_invariance.errors import SettingsError
from gen_invariance.experiment.build import ClassifierSettings, StageSettings
from gen_invariance.experiment.cell import MeasureSettings
from gen_invariance.experiment.task import Task
from gen_invariance.settings import settings_of

_CHANGES = ("data", "classifier", "training", "stage", "fit", "measure")


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
        fit: loop of fitting a translator (`translator.fit_settings.FitSettings`).
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
        from gen_invariance.translator.fit_settings import FitSettings  # accelerate is slow to import

        return {**asdict(self), "loop": settings_of(FitSettings, self.loop, "fit").identity()}


def benchmark_names(configs: Path | str) -> tuple[str, ...]:
    """Every benchmark of `configs`/benchmark, variants spelt out, file by file."""
    return tuple(itertools.chain.from_iterable(_variants(layered(path)) for path in _files(configs).values()))


def read_benchmark(
    name: str,
    configs: Path | str,
    *,
    data_root: Path | str | None = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    augmentation: str | None = None,
    translators: Mapping[str, Mapping[str, Any]] | None = None,
    nuisances: Mapping[str, Mapping[str, Any]] | None = None,
) -> Benchmark:
    """The benchmark called `name`.

    Args:
        name: one of `benchmark_names(configs)`.
        configs: folder of the config groups.
        data_root: folder that holds published sets, each as SOURCE/ or SOURCE.npz; None looks into the cache.
        changes: settings that replace the file's, under "data", "classifier", "training", "stage", "measure" and
            "fit" (there also by translator: {"fit": {"munit": {"steps": 9}}}). With another "policy" the file's
            "policy_options" are dropped.
        augmentation: of every row; None keeps the file's.
        translators: changes to translators' files, see `Benchmark`.
        nuisances: options of nuisances, see `Benchmark`.

    Raises:
        SettingsError: an unknown name or setting.
    """
    configs = Path(configs)
    for path in _files(configs).values():
        layers = layered(path)
        known = _variants(layers)
        if name in known:
            break
    else:
        names = benchmark_names(configs)
        near = [other for other in names if other.split("_")[0] == name.split("_")[0]]
        raise SettingsError(f"no benchmark {name!r}; choose {', '.join(near or names)}")
    values = {key: dict(layers.get(key, {})) for key in _CHANGES}
    values["data"] |= known[name]
    for group, changed in (changes or {}).items():
        if "policy" in changed and changed["policy"] != values[group].get("policy"):
            values[group].pop("policy_options", None)
        values[group] |= changed
    single = {key: value for key, value in values["fit"].items() if isinstance(value, Mapping)}
    fits = dict(layers.get("fits", {}))
    fits |= {key: {**fits.get(key, {}), **value} for key, value in single.items()}
    training = {**_like(configs, "training", values), "sampling": "instance"}  # each method brings its own rule
    data = {"profile": "none", **values["data"]}
    data["path"] = _path_of(data.get("source", "digits"), data.get("path"), data_root)
    return Benchmark(
        name=name,
        summary=layers["summary"],
        task=settings_of(Task, data, f"{name}: data"),
        classifier=settings_of(ClassifierSettings, _like(configs, "classifier", values), f"{name}: classifier"),
        training=settings_of(TrainSettings, training, f"{name}: training"),
        augmentation=layers.get("augmentation", "none") if augmentation is None else augmentation,
        stage=settings_of(StageSettings, values["stage"], f"{name}: stage"),
        fit={key: value for key, value in values["fit"].items() if key not in single},
        fits=fits,
        translators=translators or {},
        nuisances=_merged(layers.get("nuisances", {}), nuisances or {}),
        measure=settings_of(MeasureSettings, values["measure"], f"{name}: measure"),
        classes=layers.get("classes"),
        images=layers.get("images"),
    )


def translator_fit(choice: str, benchmark: Benchmark, configs: Path | str) -> TranslatorFit:
    """How `benchmark` fits the translator of the file `choice`.

    Raises:
        SettingsError: no such file.
    """
    values, changes = translator_config(choice, configs), benchmark.translators.get(choice, {})
    unknown = sorted(set(changes) - {"network", "objective"})
    if unknown:
        raise SettingsError(f"translator_options.{choice} has no {unknown[0]!r}; choose network or objective")
    parts = {key: {**(values[key] or {}), **changes.get(key, {})} for key in ("network", "objective")}
    loop = {**benchmark.fit, **benchmark.fits.get(choice, {})}
    return TranslatorFit(choice, values["name"], parts["network"], parts["objective"], loop)


def translator_config(choice: str, configs: Path | str) -> dict[str, Any]:
    """The file of a translator by its name: "name", "network" and "objective".

    Raises:
        SettingsError: no such file.
    """
    known = {file.stem: file for file in sorted((Path(configs) / "translator").glob("*.yaml"))}
    if choice not in known:
        raise SettingsError(f"no translator {choice!r}; choose {', '.join(known)}")
    return layered(known[choice])


def layered(path: Path | str) -> dict[str, Any]:
    """A config file over those it inherits from in its folder, mappings merged one level deep.

    "summary" is its leading comment, "stem" its name.
    """
    path = Path(path)
    own, summary = _parsed(path, path.stat().st_mtime_ns)
    own = dict(own)
    merged: dict[str, Any] = {}
    for parent in own.pop("defaults", ["_self_"]):
        layer = own if parent == "_self_" else layered(path.with_name(f"{parent}.yaml"))
        merged |= {
            key: {**merged[key], **value} if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
            for key, value in layer.items()
        }
    return {**merged, "summary": summary, "stem": path.stem}


@functools.lru_cache(maxsize=256)
def _parsed(path: Path, modified: int) -> tuple[dict[str, Any], str]:
    """What a file says and its leading comment; read again when it was `modified`. Not to be changed."""
    text = path.read_text(encoding="utf-8")
    header = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return yaml.safe_load(text) or {}, " ".join(line.lstrip("# ") for line in header)


def _files(configs: Path | str) -> dict[str, Path]:
    found = sorted((Path(configs) / "benchmark").glob("*.yaml"))
    return {path.stem: path for path in found if not path.stem.startswith("_")}


def _variants(layers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Changes to "data" by name of the variant."""
    axes = [list(axis.items()) for axis in layers.get("variants", [])]
    return {
        "_".join([layers["stem"], *(name for name, _ in chosen)]): {
            key: value for _, change in chosen for key, value in change.items()
        }
        for chosen in itertools.product(*axes)
    }


def _like(configs: Path, group: str, values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Settings of a group: those of the file that `like` names, with the changes."""
    changes = dict(values[group])
    base = layered(configs / group / f"{changes.pop('like')}.yaml") if "like" in changes else {}
    return {**{key: value for key, value in base.items() if key not in ("summary", "stem")}, **changes}


def _merged(first: Mapping[str, Mapping[str, Any]], then: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Options by name, those of `then` over those of `first`."""
    return {name: {**first.get(name, {}), **then.get(name, {})} for name in (*first, *then)}


def _path_of(source: str, path: str | None, data_root: Path | str | None) -> str | None:
    """Where the data of `source` lie: as given, or where they are found below `data_root`."""
    if path is not None or data_root is None or source in ("digits", "npz", "folder") or source not in source_names():
        return path
    root = Path(data_root).expanduser()
    places = [root / source, root / f"{source}.npz", root]
    found = next((place for place in places if place.exists() and not missing_files(source, place)), None)
    if found is None and not missing_files(source):
        return None  # it is where it is looked for without a path
    return str(found or places[0])


def every_variant(configs: Path | str, **options: Any) -> Iterator[Benchmark]:
    """All benchmarks of `benchmark_names`; `options` as for `read_benchmark`."""
    for name in benchmark_names(configs):
        yield read_benchmark(name, configs, **options)
