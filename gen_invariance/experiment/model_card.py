"""The model card of an exported classifier: what it is, was trained on and scores, and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gen_invariance.classifier.library_names import LibraryNames
from gen_invariance.experiment.trained import TrainedClassifier
from gen_invariance.report.metrics import METRICS

_MOST_CLASSES = 200
_LINEARISED = (
    "It was trained with a cosine head, which became a linear one here: every image is named as before, probabilities "
    "are those of features of mean length."
)


def write_card(
    path: Path,
    classifier: TrainedClassifier,
    found: LibraryNames,
    *,
    loads: str,
    figures: Mapping[str, Any],
    is_exact: bool = True,
) -> None:
    """Write README.md, a card as the Hugging Face hub shows it.

    Args:
        path: of the file.
        classifier: what is described.
        found: the library whose names the weights have.
        loads: Python that loads the folder, which it calls {folder}.
        figures: of a measurement, by the name of their record; may be empty.
        is_exact: whether probabilities are those of the run; a cosine head that became a linear one gives others.
    """
    config, shape = classifier.about["config"], classifier.shape
    training, data = config["training"], config["data"]
    size = classifier.model.input_size
    library = "pytorch" if found.library == "gen_invariance" else found.library
    lines = [
        "---",
        f"library_name: {library}",
        "pipeline_tag: image-classification",
        "tags: [image-classification, long-tailed]",
        "---",
        "",
        f"# {found.architecture}, {len(classifier.class_names)} classes",
        "",
        "Trained on long-tailed images with gen_invariance.",
        "",
        "## Load it",
        "",
        "```python",
        loads.format(folder="FOLDER"),
        "```",
        "",
        f"Input: {'grey repeated to RGB' if shape[0] == 1 else 'RGB'}, values in [0, 1]. The largest centred part with "
        f"the proportions of {shape[2]} x {shape[1]} pixels is scaled to them (bilinear, antialiased)"
        + ("" if size is None or (size, size) == shape[1:] else f" and then to {size} x {size}")
        + ", then normalised with the `mean` and `std` of `config.json`. Classes are in the order of `label_names`.",
        "",
        *([] if is_exact else [_LINEARISED, ""]),
        "## Training",
        "",
        f"- Backbone `{config['classifier']['backbone']}`, start "
        f"`{config['classifier'].get('weights') or 'random weights'}`, transfer `{_transfer(config)}`.",
        f"- Loss `{config['classifier'].get('loss')}`, sampling `{training.get('sampling')}`, augmentation "
        f"`{config.get('augmentation', 'none')}`, stage `{config.get('stage', {}).get('nuisance', 'none')}`.",
        f"- {training.get('epochs')} epochs, batches of {training.get('batch_size')}, seed {classifier.about['seed']}.",
        f"- Data: `{data.get('source')}`, {int(classifier.counts.sum()):,} training images.",
        "",
        "| class | training images | prior |",
        "|---|---|---|",
    ]
    rows = zip(classifier.class_names, classifier.counts.tolist(), classifier.prior.tolist(), strict=True)
    for number, (name, count, prior) in enumerate(sorted(rows, key=lambda row: -row[1])):
        if number == _MOST_CLASSES:
            lines.append(f"| {len(classifier.class_names) - number} more | | |")
            break
        lines.append(f"| {_cell(name)} | {count} | {prior:.4f} |")
    lines += [
        "",
        "The prior is how common each class is to the model; where classes are as common as something else, multiply "
        "probabilities by deployed over prior and normalise.",
        "",
        "## Figures",
        "",
    ]
    known = [(METRICS[name], value) for name, value in figures.items() if name in METRICS and value is not None]
    if known:
        lines += [f"On the {figures.get('split', 'test')} images:", "", "| figure | value |", "|---|---|"]
        lines += [f"| {metric.title} | {metric.show(float(value))} |" for metric, value in known]
    else:
        lines.append("Not measured: `gen-invariance measure run=RUN` before the export puts them here.")
    lines += [
        "",
        "## Limits",
        "",
        "Classes that it was not trained on are named as one of those above. Small classes are known from few images: "
        "their figures vary most, and what is rare in them was never seen.",
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")


def _transfer(config: Mapping[str, Any]) -> str:
    transfer = config.get("transfer") or {}
    return str(transfer.get("mode", "none")) if isinstance(transfer, Mapping) else "none"


def _cell(text: str) -> str:
    """`text` in a cell of a Markdown table."""
    return "".join(f"\\{letter}" if letter in "|\\`*_<>[]" else letter for letter in text.replace("\n", " "))
