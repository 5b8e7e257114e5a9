"""Several measured runs, or the records of a grid, on one page.

Runs of any settings may be put together. Those that differ by the seed alone are repetitions of one method; the others
are labelled by the settings in which they differ. Other data make another benchmark. Runs measured against several
nuisances keep their accuracy in one table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from gen_invariance.errors import DataNotFoundError, SettingsError
from gen_invariance.experiment.build import NOTHING
from gen_invariance.records import load_records, measured
from gen_invariance.report.labels import differing, distinct, flat, labels_of
from gen_invariance.run import config_digest

if TYPE_CHECKING:
    from gen_invariance.report.pages import Picture

_AGAINST = " against "
_FIGURE = ["benchmark", "method", "seed", "order", "metric", "class_index", "class_name", "group"]
_WHEREABOUTS = ("path", "skip_corrupt")
"""Settings of the data that do not matter where the images are the same."""


@dataclass(frozen=True, eq=False)
class Source:
    """A folder of the report.

    Attributes:
        folder: as given.
        frame: its records.
        settings: of a training run, by dotted key, without those of the data; None for other records.
        data: settings of its data.
        seed: of the run.
        named: the name that was given when it was measured.
        label: what its method is called on the page; None keeps the names of the records.
        benchmark: what its data are called.
    """

    folder: Path
    frame: pd.DataFrame
    settings: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    seed: int = 0
    named: str | None = None
    label: str | None = None
    benchmark: str = ""


def report_of(
    folders: Sequence[Path | str],
    out: Path | str,
    *,
    title: str,
    baseline: str | int | None,
    references: Collection[str] = (),
) -> Path:
    """One page over the records of several measured runs.

    Args:
        folders: run folders that `measure` wrote records into, or folders of records.
        out: folder of the page.
        title: of the page.
        baseline: what the others are compared with: a label, a folder or its last part, or its place in `folders`
            from 0.
        references: methods that do not compete, named likewise.

    Raises:
        DataNotFoundError: a folder without records.
        SettingsError: a baseline or reference that is none of them.
        DataError: records of a grid that must not be put together; see `write_report`.
    """
    from gen_invariance.report.report_page import write_report

    if not folders:
        raise DataNotFoundError("records=[] names no folder; give one or more that measure wrote")
    sources = labelled([source_of(Path(folder)) for folder in dict.fromkeys(map(str, folders))])
    frame = together(sources)
    return write_report(
        out,
        title=title,
        frame=frame,
        figures=figures_of(frame),
        notes=_notes(sources, frame),
        command="gen-invariance report",
        baseline=None if baseline is None else _method_called(str(baseline), sources, "baseline"),
        references=[_method_called(str(name), sources, "references") for name in references],
    )


def source_of(folder: Path) -> Source:
    """The records of `folder`, and the settings where it is a training run.

    Raises:
        DataNotFoundError: no records there.
    """
    frame = load_records(folder / "records" if (folder / "records").is_dir() else folder)
    if frame.empty:
        raise DataNotFoundError(f"no records in {folder}; run: gen-invariance measure run={folder}")
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if about["kind"] != "train":
            return Source(folder, frame)
        data, config = dict(about["config"]["data"]), dict(about["config"])
        nuisance, seed = str(config["stage"]["nuisance"]), int(about["seed"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Source(folder, frame)  # a grid, a demonstration, records alone
    given = measured(frame)["method"].iloc[-1]
    del config["data"]
    settings = flat(config)
    default = given in (nuisance, f"{nuisance} ({NOTHING})")
    if given == f"{nuisance} ({NOTHING})" or _translates_nothing(about, nuisance):
        settings["stage.nuisance"] = f"{nuisance} ({NOTHING})"
    return Source(folder, measured(frame), settings, flat(data), seed, None if default else given)


def _translates_nothing(about: dict[str, Any], nuisance: str) -> bool:
    share = about.get("facts", {}).get("given_share", {}).get("classes")
    return share == 0 and nuisance != "none"


def labelled(sources: Sequence[Source]) -> list[Source]:
    """`sources` with labels and benchmarks for those that are runs."""
    runs = [source for source in sources if source.settings is not None]
    kinds = {_kind(run): run for run in runs}
    names = dict(zip(kinds, _labels(list(kinds.values())), strict=True))
    taken = [name for source in sources if source.settings is None for name in source.frame["method"].unique()]
    unique = dict(zip(kinds, distinct([names[kind] for kind in kinds], taken), strict=True))
    places = _benchmarks(runs)
    used: set[tuple[str, str, int]] = set()
    found = []
    for source in sources:
        if source.settings is None:
            found.append(source)
            continue
        label, benchmark = unique[_kind(source)], places[runs.index(source)]
        if (benchmark, label, source.seed) in used:  # the same settings and seed once more
            others = [name for place, name, seed in used if (place, seed) == (benchmark, source.seed)]
            (label,) = distinct([f"{label} ({source.folder.name})"], others)
        used.add((benchmark, label, source.seed))
        found.append(replace(source, label=label, benchmark=benchmark))
    return found


def _kind(source: Source) -> str:
    """Equal for runs that repeat each other: settings, and the name that was given."""
    return json.dumps([source.settings, source.named], sort_keys=True, default=str)


def _labels(runs: Sequence[Source]) -> list[str]:
    """The given name where no other has it, else the settings that differ, else the name in the records."""
    texts = _labels_by_kind([run.settings or {} for run in runs])
    names = [run.named for run in runs]
    return [
        name if name and names.count(name) == 1 else text or str(run.frame["method"].iloc[-1])
        for run, name, text in zip(runs, names, texts, strict=True)
    ]


def _benchmarks(runs: Sequence[Source]) -> list[str]:
    """What the data of each run are called: their name, and the settings by which data of one name differ."""
    bases = [str(run.frame["benchmark"].iloc[-1]).split(_AGAINST)[0] for run in runs]
    found = list(bases)
    for base in dict.fromkeys(bases):
        places = [place for place, name in enumerate(bases) if name == base]
        data = _without_whereabouts([runs[place] for place in places])
        for place, text in zip(places, _labels_by_kind(data), strict=True):
            found[place] = f"{base} [{text}]" if text else base
    return found


def _labels_by_kind(data: Sequence[dict[str, Any]]) -> list[str]:
    """`labels_of`, equal settings being labelled alike."""
    keys = [json.dumps(one, sort_keys=True, default=str) for one in data]
    kinds = dict(zip(keys, data, strict=True))
    names = dict(zip(kinds, labels_of(list(kinds.values())), strict=True))
    return [names[key] for key in keys]


def _without_whereabouts(runs: Sequence[Source]) -> list[dict[str, Any]]:
    """Settings of the data, without where they lie if the images are the same wherever two runs have one seed."""
    digests: dict[int, set[str]] = {}
    for run in runs:
        digests.setdefault(run.seed, set()).update(run.frame["data_digest"])
    if any(len(found) > 1 for found in digests.values()):
        return [run.data or {} for run in runs]
    return [{key: value for key, value in (run.data or {}).items() if key not in _WHEREABOUTS} for run in runs]


def together(sources: Sequence[Source]) -> pd.DataFrame:
    """The records of all sources under their labels, each figure once: what was measured last."""
    runs = pd.concat([_renamed(source) for source in sources if source.label is not None] or [sources[0].frame[:0]])
    runs = _by_nuisance(runs).drop_duplicates(_FIGURE, keep="last")
    others = [source.frame for source in sources if source.label is None]
    return pd.concat([runs, *others], ignore_index=True) if len(runs) else pd.concat(others, ignore_index=True)


def _renamed(source: Source) -> pd.DataFrame:
    against = source.frame["benchmark"].str.partition(_AGAINST)[2]
    digest = config_digest(source.settings or {})  # however many draws it was measured with
    return source.frame.assign(method=source.label, benchmark=source.benchmark, against=against, config_digest=digest)


def _by_nuisance(frame: pd.DataFrame) -> pd.DataFrame:
    """Benchmarks by what invariance was measured against; accuracy, which does not depend on it, in one of them.

    A translator is told from another of its kind by its digest only where a seed was measured against both.
    """
    if frame.empty:
        return frame
    short = frame["against"].str.replace(r" [0-9a-f]{6}$", "", regex=True)
    several = frame.assign(short=short).groupby(["benchmark", "short", "seed"])["against"].transform("nunique") > 1
    both = frame.assign(short=short, several=several).groupby(["benchmark", "short"])["several"].transform("any")
    against = frame["against"].where(both, short)
    various = against.groupby(frame["benchmark"]).transform("nunique") > 1
    invariance = frame["metric"].map(lambda metric: metric == "agreement" or re.search("ekld", metric) is not None)
    named = frame["benchmark"] + (_AGAINST + against).where((against != "") & (invariance | ~various), "")
    return frame.assign(benchmark=named).drop(columns="against")


def _notes(sources: Sequence[Source], frame: pd.DataFrame) -> list[str]:
    """Which run is which, all settings by which they differ, and whether their invariance can be compared."""
    runs = [source for source in sources if source.label is not None]
    if len(runs) < 2:
        return []
    folders: dict[str, list[str]] = {}
    for run in runs:
        folders.setdefault(str(run.label), []).append(f"{run.folder} (seed {run.seed})")
    lines = ["Runs: " + "; ".join(f"{label}: {', '.join(found)}" for label, found in folders.items()) + "."]
    lines += _differences("Settings", {str(run.label): run.settings or {} for run in runs})
    data = {run.benchmark: run.data or {} for run in runs}
    for base in dict.fromkeys(name.partition(" [")[0] for name in data):
        lines += _differences(f"Data of {base}", {n: one for n, one in data.items() if n.partition(" [")[0] == base})
    against = {name for name in frame["benchmark"].unique() if _AGAINST in name}
    if len(against) > len({name.split(_AGAINST)[0] for name in against}):
        lines.append(
            "Invariance was measured against several nuisances, and figures against different ones are not compared; "
            "for that measure all runs with the same: gen-invariance measure run=RUN nuisance=NAME."
        )
    return lines


def _differences(what: str, named: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line with the values of all settings in which those of several names differ, if they do."""
    keys = differing(list(named.values()))
    values = [f"{key} {' / '.join(str(one.get(key)) for one in named.values())}" for key in keys]
    return [f"{what} that differ, for {' / '.join(named)}: {'; '.join(values)}."] if keys else []


def _method_called(name: str, sources: Sequence[Source], setting: str) -> str:
    """The method meant by a label, a folder, its last part or place, or the name in the records."""
    methods = list(dict.fromkeys(m for source in sources for m in _methods(source)))
    places: list[Callable[[int, Source], bool]] = [
        lambda place, source: name in (str(source.folder), source.folder.name),
        lambda place, source: name == str(place),
        lambda place, source: source.label is not None and name in set(source.frame["method"]),
    ]
    if name in methods:
        return name
    for fits in places:
        found = {m for place, source in enumerate(sources) if fits(place, source) for m in _methods(source)}
        if len(found) == 1:
            return found.pop()
    raise SettingsError(
        f"{setting}={name} is no method here; choose {', '.join(map(repr, methods))}, or a run by its folder or its "
        "place (0, 1, ...)"
    )


def _methods(source: Source) -> list[str]:
    return [source.label] if source.label is not None else list(measured(source.frame)["method"].unique())


def figures_of(frame: pd.DataFrame) -> list[Picture]:
    """Accuracy and invariance by class size, for each benchmark of `frame` that has figures by class."""
    from gen_invariance.report.class_figures import accuracy_by_class, ekld_against_class_size
    from gen_invariance.report.drawing import method_styles
    from gen_invariance.report.pages import Picture

    figures = []
    styles = method_styles(frame["method"].unique())
    for benchmark, rows in frame.groupby("benchmark", sort=False):
        for metric, draw, shows in (
            ("accuracy", accuracy_by_class, "Accuracy by class size"),
            ("ekld", ekld_against_class_size, "Invariance by class size"),
        ):
            if rows[rows["metric"] == metric]["value"].notna().any():
                name = f"{shows}: {benchmark}"
                alt = f"{shows} of each method on {benchmark}."
                figures.append(Picture(name, f"{shows}, all seeds.", alt, draw(rows, styles=styles)))
    return figures
