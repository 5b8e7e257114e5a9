"""The page of a study: one self-contained HTML file, no network, readable on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from gen_invariance.files import write_text
from gen_invariance.order.analysis.study import OrderStudy
from gen_invariance.records import write_csv
from gen_invariance.report.diagram import render, write_diagram
from gen_invariance.report.pages import data_uri, write_page
from gen_invariance.run import package_versions, source_commit


def write_study(folder: Path | str, study: OrderStudy, *, title: str, command: str = "") -> Path:
    """Write the order, its diagram, the tables and the page; the path of the page."""
    folder = Path(folder)
    write_text(folder / "order.json", study.order.to_json() + "\n")
    diagram = write_diagram(folder, study.order, title=title)["svg"].read_bytes()
    write_csv(study.table, folder / "subsets.csv")
    write_csv(study.predictors, folder / "predictors.csv")
    return write_order_page(folder / "order.html", study, title=title, diagram=diagram, command=command)


def write_order_page(path: Path, study: OrderStudy, *, title: str, diagram: bytes, command: str = "") -> Path:
    """Write the page of `study`, with its `diagram` (SVG), to `path` and return it."""
    order = study.order
    names = {"precision": "precision", "recall": "recall", "f1": "F1", "cover_f1": "cover F1", "hamming": "wrong edges"}
    edges = pd.DataFrame([{"guess": guess, **asdict(score)} for guess, score in study.predicted_edges.items()])
    return write_page(
        "order.html.j2",
        path,
        title=title,
        sources=len(order.sources),
        classes=len(order.class_names),
        seeds=order.about["seeds"],
        mode=order.mode,
        head=order.head,
        budget=order.about.get("budget", "unknown"),
        level=f"{1 - order.about['alpha']:.0%}",
        notes=study.facts["notes"],
        diagram=data_uri(diagram, "image/svg+xml"),
        alt=f"Hasse diagram of {len(order)} class subsets; the same as text is in order.txt",
        findings=findings(study),
        subset_table=_table(study.table),
        sweep=data_uri(render(sweep_figure(study), "svg"), "image/svg+xml"),
        predictor_table=_table(study.predictors.drop(columns=["normalised_regret@1"], errors="ignore")),
        edge_table=_table(edges.rename(columns=names)),
        climbs=study.curricula,
        climb_table=_table(_climb_frame(study)),
        command=command,
        versions=sorted(package_versions().items()),
        commit=source_commit() or "unknown",
    )


def findings(study: OrderStudy) -> list[str]:
    """What was found, one sentence each."""
    order, facts = study.order, study.facts
    lines = [
        f"Of {len(order) * (len(order) - 1)} ordered pairs of subsets, {facts['certain']} are certainly below, "
        f"{facts['refuted']} certainly not, {facts['undecided']} undecided.",
        f"On top by the estimates: {_names(study, order.maximal(relation='estimated'))}.",
        f"Longest chain {facts['estimated_height']}, largest set of mutually incomparable groups "
        f"{facts['estimated_width']}.",
        f"{study.fundamental.number} subset(s) together separate every separable pair"
        + (" (exact)" if study.fundamental.exact else " (greedy)")
        + f": {_names(study, [order.subsets[row] for row in study.fundamental.members])}.",
        f"Mean separability of pairs with both classes in the source {_number(study.seen['seen'])}, one "
        f"{_number(study.seen['half_seen'])}, none {_number(study.seen['unseen'])}.",
        f"Rank correlation of separated pairs with accuracy on all classes: "
        f"{_number(facts['spearman_separated_accuracy'])}.",
    ]
    if math.isfinite(study.split_half):
        lines.append(f"Half the seeds against the other half: {study.split_half:.0%} of edges agree.")
    if study.against_start:
        harmful = sum(entry.harmful == "certain" for entry in study.against_start)
        gained, lost = (np.mean([getattr(e, name) for e in study.against_start]) for name in ("gained", "lost"))
        lines.append(
            f"Against the untouched start a source gains {gained:.1f} pairs and loses {lost:.1f} on average; "
            f"{harmful} of {len(study.against_start)} certainly lose one."
        )
    total = len(study.nested["obey"]) + len(study.nested["disobey"])
    if total:
        lines.append(
            f"More classes never hurt in {len(study.nested['obey'])} of {total} nested pairs of subsets; "
            f"{len(study.nested['refuted'])} disobey for certain. {study.nested['edges_not_nested']} edges link "
            "subsets that are not nested."
        )
    if study.chains:
        falls = np.mean([fit.violations for fit in study.chains])
        lines.append(f"On {len(study.chains)} maximal chains accuracy falls at {falls:.0%} of the steps.")
    return lines + _relation_lines(study)


def _relation_lines(study: OrderStudy) -> list[str]:
    lines = []
    if study.accuracy is not None:
        tested = int(study.accuracy.non_inferior.sum()) - len(study.accuracy.non_inferior)
        lines.append(
            f"As good on another's classes as that subset itself, within {study.accuracy.margin:g}: {tested} tested "
            f"edges, {study.accuracy.intransitive} triples without the third edge; closing the relation would add "
            f"{study.accuracy.closure_inflation:.0%}."
        )
    along = study.invariance
    if along is not None and along.steps:
        lines.append(
            f"Invariance to classes that neither saw: over {along.steps} steps up the order eKLD changes by a factor "
            f"{math.exp(along.mean_change):.2f} (log change {along.mean_change:+.3f} ± "
            f"{_number(along.seed_half_width)} over seeds), and falls at {along.more_invariant:.0%} of them. Rank "
            f"correlation of separated pairs with eKLD on unseen classes {_number(along.spearman)}, within equal size "
            f"{_number(along.spearman_within_size)}."
        )
    return lines


def _names(study: OrderStudy, subsets: Sequence[tuple[int, ...]]) -> str:
    shown = [study.order.name(subset) for subset in subsets[:4]]
    return ", ".join(shown) + (f" and {len(subsets) - 4} more" if len(subsets) > 4 else "")


def sweep_figure(study: OrderStudy) -> Figure:
    """Strict edges and distinct subsets over the threshold."""
    figure = Figure(figsize=(7, 3))
    axes = figure.add_subplot()
    axes.plot(study.sweep.thresholds, study.sweep.edges, color="#0072b2", label="strict edges")
    axes.plot(study.sweep.thresholds, study.sweep.classes, color="#d55e00", linestyle="--", label="subsets told apart")
    axes.axvline(float(np.mean(study.order.threshold)), color="#555555", linestyle=":")
    axes.set_xlabel("separation threshold (balanced two-class accuracy)")
    axes.set_ylabel("count")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.tight_layout()
    return figure


def _climb_frame(study: OrderStudy) -> pd.DataFrame:
    rows = []
    for run in study.curricula:
        for index, subset in enumerate(run.chain):
            rows.append(
                {
                    "subset": study.order.name(subset),
                    "seed": run.seed,
                    "step": index + 1,
                    "separated, climbing": run.climbing[index],
                    "lost": run.lost[index],
                    "separated, jumping": run.jumping if index == len(run.chain) - 1 else math.nan,
                }
            )
    return pd.DataFrame(rows)


def _table(frame: pd.DataFrame) -> dict[str, Any]:
    return {
        "columns": list(frame.columns),
        "rows": [
            [{"text": _number(value), "sort": _sort_key(value)} for value in row] for row in frame.to_numpy(object)
        ],
    }


def _number(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return "–" if not math.isfinite(value) else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _sort_key(value: Any) -> str:
    return str(value) if isinstance(value, int | float | np.number) and math.isfinite(value) else ""
