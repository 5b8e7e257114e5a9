"""The records of several measured runs, or of a grid, put together for one page.

Runs of any settings may be put together. Those that differ by the seed alone are repetitions of one method; the others
are labelled by the settings in which they differ. Other data make another benchmark. Runs measured against several
nuisances keep their accuracy in one table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from gen_invariance.errors import DataNotFoundError, SettingsError
from gen_invariance.records import load_records, measured
from gen_invariance.report.labels import (
    NOTHING_TRANSLATED,
    differing_keys,
    flatten_settings,
    make_distinct,
    make_labels,
)
from gen_invariance.run import config_digest

_AGAINST = " against "
_FIGURE = ["benchmark", "method", "seed", "order", "metric", "class_index", "class_name", "group"]
_LOCATION_KEYS = ("path", "skip_corrupt")
"""Settings of the data that do not matter where the images are the same."""


@dataclass(frozen=True, eq=False)
class Source:
    """A folder of records; of a training run also its settings and those of its data, by dotted key.

    `given_name` is the name that was given when it was measured; `label` and `benchmark` are what its method and its
    data are called on the page. Without a label the names of the records stay.
    """

    folder: Path
    frame: pd.DataFrame
    settings: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    seed: int = 0
    given_name: str | None = None
    label: str | None = None
    benchmark: str = ""

    @property
    def methods(self) -> list[str]:
        """What its methods are called on the page."""
        return [self.label] if self.label is not None else list(measured(self.frame)["method"].unique())


def read_sources(folders: Sequence[Path | str]) -> list[Source]:
    """The records of all `folders`, those of training runs with labels.

    Raises:
        DataNotFoundError: no folder, or one without records.
    """
    if not folders:
        raise DataNotFoundError("records=[] names no folder; give one or more that measure wrote")
    sources = [_read_source(Path(folder)) for folder in dict.fromkeys(map(str, folders))]
    runs = [source for source in sources if source.settings is not None]
    taken = [name for source in sources if source.settings is None for name in source.methods]
    kinds = {_kind(run): run for run in runs}
    labels = dict(zip(kinds, make_distinct(_label_runs(list(kinds.values())), taken), strict=True))
    benchmarks = dict(zip(map(id, runs), _name_benchmarks(runs), strict=True))
    labelled: list[Source] = []
    for source in sources:
        if source.settings is not None:
            benchmark, label = benchmarks[id(source)], labels[_kind(source)]
            same = [other.label for other in labelled if (other.benchmark, other.seed) == (benchmark, source.seed)]
            if label in same:  # the same settings and seed once more
                (label,) = make_distinct([f"{label} ({source.folder.name})"], same)
            source = replace(source, label=label, benchmark=benchmark)
        labelled.append(source)
    return labelled


def _read_source(folder: Path) -> Source:
    frame = load_records(folder)
    if frame.empty:
        raise DataNotFoundError(f"no records in {folder}; run: gen-invariance measure run={folder}")
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        config, facts = dict(about["config"]), dict(about.get("facts", {}))
        data, nuisance, seed = dict(config.pop("data")), str(config["stage"]["nuisance"]), int(about["seed"])
        idle = facts.get("given_share", {}).get("classes") == 0 and nuisance != "none"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Source(folder, frame)  # a grid, a demonstration, records alone
    if about.get("kind") != "train":
        return Source(folder, frame)
    frame, settings = measured(frame), flatten_settings(config)
    given, idle_name = frame["method"].iloc[-1], f"{nuisance} ({NOTHING_TRANSLATED})"
    if idle or given == idle_name:
        settings["stage.nuisance"] = idle_name
    given_name = None if given in (nuisance, idle_name) else given
    return Source(folder, frame, settings, flatten_settings(data), seed, given_name)


def _kind(source: Source) -> str:
    """Equal for runs that repeat each other: settings, and the name that was given."""
    return _to_key([source.settings, source.given_name])


def _to_key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _label_runs(runs: Sequence[Source]) -> list[str]:
    """The given name where no other has it, else the settings that differ, else the name in the records."""
    names = [run.given_name for run in runs]
    labels = _label_settings([run.settings or {} for run in runs])
    return [
        name if name and names.count(name) == 1 else label or str(run.frame["method"].iloc[-1])
        for run, name, label in zip(runs, names, labels, strict=True)
    ]


def _name_benchmarks(runs: Sequence[Source]) -> list[str]:
    """What the data of each run are called: their name, and the settings by which data of one name differ."""
    names = [str(run.frame["benchmark"].iloc[-1]).split(_AGAINST)[0] for run in runs]
    benchmarks = list(names)
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        labels = _label_settings(_relevant_data([runs[row] for row in rows]))
        for row, label in zip(rows, labels, strict=True):
            benchmarks[row] = f"{name} [{label}]" if label else name
    return benchmarks


def _relevant_data(runs: Sequence[Source]) -> list[Mapping[str, Any]]:
    """Settings of the data, without where they lie if the images are the same wherever two runs have one seed."""
    frame = pd.concat([run.frame.assign(seed=run.seed) for run in runs])
    ignored = () if (frame.groupby("seed")["data_digest"].nunique() > 1).any() else _LOCATION_KEYS
    return [{key: value for key, value in (run.data or {}).items() if key not in ignored} for run in runs]


def _label_settings(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """`make_labels`, equal settings being labelled alike."""
    keys = [_to_key(one) for one in settings]
    kinds = dict(zip(keys, settings, strict=True))
    labels = dict(zip(kinds, make_labels(list(kinds.values())), strict=True))
    return [labels[key] for key in keys]


def merge_sources(sources: Sequence[Source]) -> pd.DataFrame:
    """The records of all sources under their labels, each figure once: what was measured last."""
    runs = [_rename(source) for source in sources if source.label is not None]
    others = [source.frame for source in sources if source.label is None]
    merged = [_split_by_nuisance(pd.concat(runs)).drop_duplicates(_FIGURE, keep="last")] if runs else []
    return pd.concat([*merged, *others], ignore_index=True)


def _rename(source: Source) -> pd.DataFrame:
    against = source.frame["benchmark"].str.partition(_AGAINST)[2]
    digest = config_digest(source.settings or {})  # however many draws it was measured with
    return source.frame.assign(method=source.label, benchmark=source.benchmark, against=against, config_digest=digest)


def _split_by_nuisance(frame: pd.DataFrame) -> pd.DataFrame:
    """Benchmarks by what invariance was measured against; accuracy, which does not depend on it, in one of them.

    A translator is told from another of its kind by its digest only where a seed was measured against both.
    """
    short = frame["against"].str.replace(r" [0-9a-f]{6}$", "", regex=True)
    several = frame.assign(short=short).groupby(["benchmark", "short", "seed"])["against"].transform("nunique") > 1
    both = frame.assign(short=short, several=several).groupby(["benchmark", "short"])["several"].transform("any")
    against = frame["against"].where(both, short)
    various = against.groupby(frame["benchmark"]).transform("nunique") > 1
    invariance = frame["metric"].str.contains("ekld|^agreement$")
    named = frame["benchmark"] + (_AGAINST + against).where((against != "") & (invariance | ~various), "")
    return frame.assign(benchmark=named).drop(columns="against")


def describe_sources(sources: Sequence[Source], frame: pd.DataFrame) -> list[str]:
    """Which run is which, all settings by which they differ, and whether their invariance can be compared."""
    runs = [source for source in sources if source.label is not None]
    if len(runs) < 2:
        return []
    folders: dict[str, list[str]] = {}
    for run in runs:
        folders.setdefault(str(run.label), []).append(f"{run.folder} (seed {run.seed})")
    lines = ["Runs: " + "; ".join(f"{label}: {', '.join(several)}" for label, several in folders.items()) + "."]
    lines += _describe_differences("Settings", {str(run.label): run.settings or {} for run in runs})
    data: dict[str, dict[str, Mapping[str, Any]]] = {}
    for run in runs:
        data.setdefault(run.benchmark.partition(" [")[0], {})[run.benchmark] = run.data or {}
    for name, settings in data.items():
        lines += _describe_differences(f"Data of {name}", settings)
    against = {name for name in frame["benchmark"].unique() if _AGAINST in name}
    if len(against) > len({name.split(_AGAINST)[0] for name in against}):
        lines.append(
            "Invariance was measured against several nuisances, and figures against different ones are not compared; "
            "for that measure all runs with the same: gen-invariance measure run=RUN nuisance=NAME."
        )
    return lines


def _describe_differences(what: str, settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line with the values of all settings in which those of several names differ, if they do."""
    keys = differing_keys(list(settings.values()))
    values = [f"{key} {' / '.join(str(one.get(key)) for one in settings.values())}" for key in keys]
    return [f"{what} that differ, for {' / '.join(settings)}: {'; '.join(values)}."] if keys else []


def find_method(name: str, sources: Sequence[Source], setting: str) -> str:
    """The method that is called so, or whose run is: by a label, a folder, its last part, its index, or its records.

    Raises:
        SettingsError: it is none of them, or more than one.
    """
    methods = list(dict.fromkeys(method for source in sources for method in source.methods))
    if name in methods:
        return name
    rules: list[Callable[[int, Source], bool]] = [
        lambda index, source: name in (str(source.folder), source.folder.name),
        lambda index, source: name == str(index),
        lambda index, source: source.label is not None and name in set(source.frame["method"]),
    ]
    for matches in rules:
        named = {method for index, source in enumerate(sources) if matches(index, source) for method in source.methods}
        if len(named) == 1:
            return named.pop()
    raise SettingsError(
        f"{setting}={name} is no method here; choose {', '.join(map(repr, methods))}, or a run by its folder or its "
        "index (0, 1, ...)"
    )
