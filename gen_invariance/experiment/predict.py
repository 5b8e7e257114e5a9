"""`run_predict`: the classes of images that nobody labelled, by a trained classifier, as a table."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from gen_invariance.data.images import ImageData, to_uint8
from gen_invariance.data.longtail import shot_groups
from gen_invariance.data.readers.registry import load_source
from gen_invariance.data.readers.unlabelled import find_pictures, read_pictures
from gen_invariance.errors import OutputError, RunError, SettingsError, printable
from gen_invariance.experiment.launch import shows_progress
from gen_invariance.experiment.mistakes import write_mistakes
from gen_invariance.experiment.trained import TrainedClassifier, load_classifier
from gen_invariance.experiment.use_settings import PredictRun
from gen_invariance.files import atomic_write, utf8_text
from gen_invariance.measure.accuracy import AccuracyScores, score_predictions
from gen_invariance.records import write_csv

_LISTED = 10
_PAGE_IMAGES = 20_000  # whose pixels are kept for the page


@dataclass(frozen=True)
class Predicted:
    """What `run_predict` did.

    Attributes:
        file: the table.
        rows: its rows.
        counts: images by predicted class, largest first, (class, images).
        skipped: (file, reason) of files that could not be read.
        accuracy: where class folders named as the classifier's classes say what is right, else None.
        page: of the mistakes, where it was asked for.
        prior: shares that the answers were adjusted to, by class; empty where they were not.
    """

    file: Path
    rows: int
    counts: tuple[tuple[str, int], ...]
    skipped: tuple[tuple[str, str], ...]
    accuracy: AccuracyScores | None
    page: Path | None
    prior: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class _Part:
    """Some images on their way: names, pixels (N, C, H, W), and what is right where it is known."""

    names: list[str]
    images: Tensor
    labels: list[int | None]
    skipped: list[tuple[str, str]]


@dataclass(frozen=True)
class _Seen:
    """What is known of all images; the pixels of the first ones alone, where there is to be a page."""

    names: list[str]
    labels: list[int | None]
    skipped: list[tuple[str, str]]
    answers: list[Tensor]
    images: list[Tensor]


def run_predict(settings: PredictRun) -> Predicted:
    """Name the classes of all images and write `settings.out`: path, class, probability, and more if asked for.

    Files that cannot be read are left out and listed, in OUT.skipped.csv too. Where images lie in folders that are
    named as classes, the table has a column "label" and `accuracy` says how many are right.

    Raises:
        SettingsError: an ending other than .csv and .parquet, pyarrow is missing, or an unknown prior.
        OutputError: `out` exists, or cannot be written.
        DataError, DataNotFoundError: no image.
        CheckpointError: no trained classifier in the run folder.
    """
    out = Path(settings.out)
    _check_output(out, overwrite=settings.overwrite)
    classifier = load_classifier(settings.run, device=settings.device)
    if settings.prior != "estimate":
        classifier.shares(settings.prior)  # before the work rather than after
    seen = _answer_all(settings, classifier)
    if not seen.names:
        file, reason = seen.skipped[0]
        raise RunError(
            f"none of the {len(seen.skipped)} files could be read, the first is {file}: {reason}; check them"
        )
    probabilities = classifier.adjust(torch.cat(seen.answers), settings.prior)
    accuracy = _score(probabilities, seen.labels, classifier)
    if settings.page and accuracy is None:
        raise SettingsError(
            "page=true needs images in folders that are named as the classifier's classes; leave it out for others"
        )
    labels = None if accuracy is None else seen.labels
    _write_table(out, seen.names, labels, probabilities, classifier, every=settings.probabilities)
    _write_skipped(out, seen.skipped, overwrite=settings.overwrite)
    prior: tuple[tuple[str, float], ...] = ()
    if settings.prior == "estimate":
        prior = tuple(zip(classifier.class_names, probabilities.mean(0).tolist(), strict=True))
    found = torch.bincount(probabilities.argmax(1), minlength=len(classifier.class_names)).tolist()
    return Predicted(
        file=out,
        rows=len(seen.names),
        counts=tuple(sorted(zip(classifier.class_names, found, strict=True), key=lambda pair: -pair[1])),
        skipped=tuple(seen.skipped),
        accuracy=accuracy,
        page=_write_page(out, seen, probabilities, classifier) if settings.page else None,
        prior=prior,
    )


def _answer_all(settings: PredictRun, classifier: TrainedClassifier) -> _Seen:
    """All images through the classifier, as it was trained."""
    seen = _Seen([], [], [], [], [])
    for part in _read_parts(settings, classifier):
        seen.skipped.extend(part.skipped)
        if not part.names:
            continue
        seen.names.extend(part.names)
        seen.labels.extend(part.labels)
        seen.answers.append(classifier.predict(part.images, batch_size=settings.batch_size))
        if settings.page and len(seen.names) <= _PAGE_IMAGES:
            seen.images.append(part.images)
    return seen


def _write_skipped(out: Path, skipped: list[tuple[str, str]], *, overwrite: bool) -> None:
    file = out.with_name(f"{out.name}.skipped.csv")
    if skipped:
        write_csv(pd.DataFrame(skipped, columns=["path", "reason"]), file)
    elif overwrite:
        file.unlink(missing_ok=True)


def _check_output(out: Path, *, overwrite: bool) -> None:
    if out.suffix.lower() not in (".csv", ".parquet"):
        raise SettingsError(f"out must end in .csv or .parquet, got {printable(out.name)!r}")
    if out.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise SettingsError("a Parquet table needs pyarrow; install it with: pip install 'gen_invariance[export]'")
    if out.exists() and not overwrite:
        raise OutputError(f"{printable(out)} exists; choose another file, or add overwrite=true")


def _read_parts(settings: PredictRun, classifier: TrainedClassifier) -> Iterator[_Part]:
    """The images, a few batches at a time, so that memory does not grow with their number."""
    data = settings.data
    if data.path is None and data.source == "folder":
        raise SettingsError("predict needs images: data.path=FOLDER")
    if data.source != "folder":
        yield from _read_source(settings, classifier)
        return
    files = find_pictures(data.path)
    root = Path(data.path).expanduser()
    root = root.parent if root.is_file() else root
    number = {name: label for label, name in enumerate(classifier.class_names)}
    yield _Part([], torch.zeros(0), [], [(_name(file.path, root), file.problem) for file in files if file.problem])
    readable = [file.path for file in files if not file.problem]
    bar = tqdm(total=len(readable), desc="predict", unit="image", disable=not shows_progress(settings.progress))
    for start in range(0, len(readable), 1024):
        batch = list(read_pictures(readable[start : start + 1024], classifier.shape))
        good = [picture for picture in batch if picture.pixels is not None]
        bar.update(len(batch))
        yield _Part(
            [_name(picture.path, root) for picture in good],
            torch.stack([picture.pixels for picture in good]) if good else torch.zeros(0),
            [_label(picture.path, root, number) for picture in good],
            [(_name(picture.path, root), picture.problem) for picture in batch if picture.pixels is None],
        )
    bar.close()


def _read_source(settings: PredictRun, classifier: TrainedClassifier) -> Iterator[_Part]:
    """The test images of a set that does not come as files, or its training images where it has no others."""
    data = settings.data
    source = load_source(data.source, data.path, image_size=data.image_size, skip_corrupt=data.skip_corrupt)
    images = source.train if source.test is None else source.test
    if tuple(images.images.shape[1:]) != classifier.shape:
        raise SettingsError(
            f"the classifier takes images of {classifier.shape} (channels, height, width), the data have "
            f"{tuple(images.images.shape[1:])}; set data.image_size"
        )
    number = {name: label for label, name in enumerate(classifier.class_names)}
    labels = [number.get(images.class_names[label]) for label in images.labels.tolist()]
    word = "train" if source.test is None else "test"
    yield _Part([f"{word} row {row}" for row in range(len(images))], images.images, labels, [])


def _name(file: Path, root: Path) -> str:
    return utf8_text(file.relative_to(root).as_posix())


def _label(file: Path, root: Path, number: dict[str, int]) -> int | None:
    """The class whose folder below `root` the file lies in, the innermost; None where there is none."""
    for folder in reversed(file.relative_to(root).parts[:-1]):
        if folder in number:
            return number[folder]
    return number.get(root.name)


def _score(probabilities: Tensor, labels: list[int | None], classifier: TrainedClassifier) -> AccuracyScores | None:
    rows = [row for row, label in enumerate(labels) if label is not None]
    if not rows:
        return None
    known = torch.tensor([labels[row] for row in rows], dtype=torch.int64)
    return score_predictions(probabilities[rows].argmax(1), known, len(classifier.class_names))


def _write_table(
    out: Path,
    names: list[str],
    labels: list[int | None] | None,
    probabilities: Tensor,
    classifier: TrainedClassifier,
    *,
    every: bool,
) -> None:
    sure, predicted = probabilities.max(1)
    columns: dict[str, object] = {
        "path": names,
        "class": [classifier.class_names[label] for label in predicted.tolist()],
        "probability": sure.tolist(),
    }
    if labels is not None:
        columns["label"] = ["" if label is None else classifier.class_names[label] for label in labels]
    if every:
        for label, name in enumerate(classifier.class_names):
            columns[f"p_{name}"] = probabilities[:, label].tolist()
    frame = pd.DataFrame(columns)
    if out.suffix.lower() == ".csv":
        write_csv(frame, out)
        return
    with atomic_write(out) as temporary:
        frame.to_parquet(temporary, index=False)


def _write_page(out: Path, seen: _Seen, probabilities: Tensor, classifier: TrainedClassifier) -> Path:
    images = torch.cat(seen.images)
    rows = [row for row, label in enumerate(seen.labels[: len(images)]) if label is not None]
    data = ImageData(
        images=images[rows] if images.dtype == torch.uint8 else to_uint8(images[rows]),
        labels=torch.tensor([seen.labels[row] for row in rows]),
        class_names=classifier.class_names,
        name=out.stem,
    )
    return write_mistakes(
        out.with_name(f"{out.stem}-mistakes"),
        data,
        probabilities[rows],
        title=f"Mistakes in {out.name}",
        names=[seen.names[row] for row in rows],
        counts=classifier.counts.tolist(),
        groups=shot_groups(classifier.counts),
    )


def format_predicted(predicted: Predicted) -> list[str]:
    """What was done, for a terminal."""
    common = [f"{name} {count}" for name, count in predicted.counts[:_LISTED] if count]
    more = sum(count > 0 for _, count in predicted.counts) - len(common)
    lines = [f"{predicted.rows} images: {', '.join(common)}{f' and {more} more classes' if more else ''}"]
    if predicted.prior:
        shares = sorted(predicted.prior, key=lambda pair: -pair[1])[:_LISTED]
        lines.append("estimated prior: " + ", ".join(f"{name} {share:.3f}" for name, share in shares))
    if predicted.accuracy is not None:
        count = int(predicted.accuracy.count.sum())
        lines.append(
            f"of {count} images in folders named as classes {predicted.accuracy.micro:.1%} are right, "
            f"balanced accuracy {predicted.accuracy.balanced:.1%}"
        )
    lines += [f"NOT USABLE: {file}: {reason}" for file, reason in predicted.skipped[:_LISTED]]
    if len(predicted.skipped) > _LISTED:
        lines.append(f"NOT USABLE: {len(predicted.skipped) - _LISTED} more, see {predicted.file.name}.skipped.csv")
    if predicted.page is not None:
        lines.append(f"page: {predicted.page}")
    return [*lines, f"written: {predicted.file}"]


def check_all_read(predicted: Predicted) -> None:
    """Raise `RunError` when files could not be read, so that the exit code says so."""
    if not predicted.skipped:
        return
    file, reason = predicted.skipped[0]
    number = len(predicted.skipped)
    words = "1 file could not be read and has" if number == 1 else f"{number} files could not be read and have"
    raise RunError(
        f"{words} no row, the first is {file}: {reason}; repair or remove what {predicted.file.name}.skipped.csv lists"
    )
