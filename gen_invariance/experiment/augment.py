"""`run_augment`: one export, from settings to an augmented set: find or fit the translator and the classifier, export.

Rooms that only some exports need are imported where they are needed: they take longer than a small export.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_invariance.configs import read_choice
from gen_invariance.data.identity import tie_run
from gen_invariance.data.images import ImageData
from gen_invariance.errors import RunError, SettingsError
from gen_invariance.experiment.advice import judge_translator, obey
from gen_invariance.experiment.launch import Say, choose_device, say_nothing, shows_progress
from gen_invariance.experiment.settings import AugmentSettings
from gen_invariance.export.formats.base import FORMATS, Format, open_format
from gen_invariance.export.inputs import (
    check_sizes,
    choose_fit_size,
    count_training_images,
    find_format_duplicates,
    read_training_images,
)
from gen_invariance.export.output import check_output, keep_apart
from gen_invariance.export.runner import ExportSummary, export_dataset
from gen_invariance.export.settings import ExportSettings, WorkerSettings, target_sizes
from gen_invariance.files import read_json
from gen_invariance.nuisance.compose import Identity
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import Run
from gen_invariance.translator.io import load_translator
from gen_invariance.translator.quality.verdict import Verdict, read_verdict
from gen_invariance.translator.samples import find_class_members

_T = TypeVar("_T")
_COLUMNS = {"table": ("path_column", "label_column"), "huggingface": ("image_column", "label_column")}
_LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue, as Pillow makes grey of them
_SETTINGS_OF_A_FIT = (  # what messages of a fit call its settings, and what they are called here
    (r"(?<![\w./-])fit\.(?=[a-z_]+\b)", "learn."),
    (r"\btranslator\.(network|objective)\b", r"learn.\1_options"),
)
_LISTED = 10  # problems named one by one; the manifest has all


def run_augment(settings: AugmentSettings, *, say: Say = say_nothing) -> ExportSummary:
    """Find or fit the translator and write the augmented set.

    Args:
        settings: see `AugmentSettings`.
        say: gets a line where a verdict changes what is done, nothing is to be done, or images are in two parts.

    Raises:
        SettingsError: settings that do not fit each other.
        GenInvarianceError: as `export_dataset` and `fit_translator`.
    """
    data, out = _open_data(settings), Path(settings.out).expanduser()
    if settings.fit == bool(settings.translator):
        raise SettingsError("augment needs one of translator=FOLDER (that fit wrote) and fit=true; see its --help")
    keep_apart(data.path, out)
    begun = check_output(out, resume=settings.resume)  # before fitting for hours
    if settings.translator and not settings.force:
        obey(read_verdict(settings.translator), settings.translator, 1.0, say)
    duplicates = find_format_duplicates(data)
    for line in duplicates.lines():
        say(line)
    device, counts = choose_device(settings.device), count_training_images(data)
    lacking = not any(counts) or target_sizes(counts, ExportSettings(target=settings.target)) != counts
    chosen = _choose_translator(settings, data, device, say) if lacking or settings.translator else _Chosen(Identity())
    predict = None if settings.classifier is None else _load_judge(settings.classifier, data, device)
    select = partial(_select, ExportSettings, settings, image_size=chosen.image_size)
    if lacking:
        check_sizes(data, chosen.translator, select(strength=1.0), chosen.name)
    if begun is not None:
        strength = _begun_strength(begun) if settings.strength == "auto" else float(settings.strength)
    else:
        asked = lacking and any(counts) and not settings.force
        verdict = _ask(settings, chosen, data, device, say) if asked else None
        strength = obey(verdict, chosen.name, settings.strength, say)
    return export_dataset(
        data,
        chosen.translator,
        out,
        select(strength=strength),
        workers=_select(WorkerSettings, settings, device=str(device)),
        predict=predict,
        resume=settings.resume,
        progress=shows_progress(settings.progress),
    )


@dataclass(frozen=True)
class _Chosen:
    """The translator of an export: its folder, the size it was fitted at, and the images if it was fitted just now."""

    translator: Nuisance
    folder: Path | None = None
    image_size: int | None = None
    images: ImageData | None = None

    @property
    def name(self) -> str:
        return str(self.folder or "")


def _choose_translator(settings: AugmentSettings, data: Format, device: torch.device, say: Say) -> _Chosen:
    if settings.fit:
        return _fit_translator(settings, data, device, say)
    folder = Path(settings.translator)
    return _Chosen(load_translator(folder), folder, settings.data.image_size or _read_fitted_size(folder))


def _ask(settings: AugmentSettings, chosen: _Chosen, data: Format, device: torch.device, say: Say) -> Verdict | None:
    """The verdict on the translator: the stored one, or that of a judge who is asked now."""
    verdict = read_verdict(chosen.folder)
    if verdict is not None:
        return verdict
    images = chosen.images
    if images is None:
        size = chosen.image_size or choose_fit_size(data)
        channels = getattr(getattr(chosen.translator, "config", None), "channels", None)
        images = read_training_images(data, image_size=size, channels=channels)
    verdict = judge_translator(
        chosen.folder,
        images.to(device),
        budget=settings.judge_budget,
        seed=settings.seed,
        out=chosen.folder if settings.fit else None,  # a folder that was named is only read
        about={"source": data.name, "path": str(data.path), "nuisance": "identity"},
        say=say,
    )
    if verdict is not None:
        say(f"{verdict.word}: {verdict.reasons[0]}")
    return verdict


def _begun_strength(begun: Path) -> float:
    """That of the export which is gone on with: it was asked for, or advised, when that began."""
    try:
        return float(read_json(begun)["settings"]["strength"])
    except (ValueError, KeyError, TypeError, OSError):
        return 1.0  # the export says what is wrong with the file


def _select(kind: Any, settings: AugmentSettings, **changes: Any) -> Any:
    """The settings class `kind`, with the values that `settings` has and `changes` do not give."""
    names = {each.name for each in dataclasses.fields(kind)} - changes.keys()
    return kind(**{name: getattr(settings, name) for name in names}, **changes)


def _open_data(settings: AugmentSettings) -> Format:
    task = settings.data
    if task.source not in FORMATS:
        raise SettingsError(f"augment cannot read data={task.source}; choose data={', data='.join(FORMATS)}")
    if task.path is None:
        raise SettingsError("augment needs data.path=FOLDER or FILE, where the images are")
    if task.profile != "none" or task.nuisance != "identity":
        raise SettingsError("augment takes the data as they are; leave data.profile and data.nuisance alone")
    if task.group is not None and task.source not in ("npz", "folder"):
        raise SettingsError(f"augment tells no groups in data={task.source}; leave data.group out")
    options = {name: getattr(settings, name) for name in _COLUMNS.get(task.source, ())}
    if task.source == "npz":
        options["group"] = task.group
    return open_format(task.source, task.path, **options)


def _fit_translator(settings: AugmentSettings, data: Format, device: torch.device, say: Say) -> _Chosen:
    """The translator that is fitted on the data first, or was before the command was stopped."""
    from gen_invariance.experiment.fit import build_evaluator
    from gen_invariance.translator.fit import fit_translator

    learn, image_size = settings.learn, settings.data.image_size
    if image_size is None and (image_size := choose_fit_size(data)) is not None:
        say(
            f"fitting on squares of {image_size} x {image_size} pixels, since pictures are large or of several sizes; "
            "data.image_size=N takes others, results keep the size of their source"
        )
    choice = read_choice("translator", learn.translator)
    if choice["name"] == "auto":
        raise SettingsError(
            "learn.translator=auto is not for augment, which judges the translator that it fits; name one, such as "
            "redraw, or let fit translator=auto choose and give its folder as translator="
        )
    folder = Path(f"{settings.out.rstrip('/')}-translator")
    config = {"learn": learn.identity(), "data": str(data.path), "image_size": image_size}
    how: dict[str, Any] = {"kind": "fit", "seed": settings.seed, "config": config, "resume": settings.resume}
    if settings.resume and (folder / "translator" / "config.json").is_file():
        Run(folder, **how)  # the same settings
        return _Chosen(load_translator(folder), folder, image_size)
    images = read_training_images(data, image_size=image_size).to(device)
    with Run.open(folder, **how) as run, _settings_named_as_here():
        tie_run(run, {"train": images})
        find_class_members(images, learn)  # says best which setting lets a class take part
        evaluate = build_evaluator(images, learn, seed=run.seed, say=say) if learn.watch_every else None
        fit_translator(
            choice["name"],
            images,
            learn,
            out=run,
            network={**choice["network"], **learn.network_options},
            objective={**choice["objective"], **learn.objective_options},
            progress=settings.progress,
            evaluate=evaluate,
            say=say,
        )
    return _Chosen(load_translator(folder), folder, image_size, images)


@contextmanager
def _settings_named_as_here() -> Iterator[None]:
    """Let errors of a fit call its settings what they are called in `augment`."""
    try:
        yield
    except SettingsError as error:
        text = str(error)
        for pattern, name in _SETTINGS_OF_A_FIT:
            text = re.sub(pattern, name, text)
        raise SettingsError(text) from error


def _read_fitted_size(folder: Path) -> int | None:
    """Side of the images that the translator was fitted on, where the run folder in or around `folder` says so."""
    if not (folder / "run.json").is_file() and folder.name == "translator":
        folder = folder.parent
    try:
        config = read_json(folder / "run.json")["config"]
        return config.get("image_size") or config["data"].get("image_size")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a translator without its run folder


class _Judge(nn.Module):
    """A classifier for results of other sizes, channels and class orders than it was trained on.

    Args:
        model: images (B, C, S, S) to logits (B, K).
        shape: (C, S, S) of its training images.
        class_order: the model's number of each class of the data.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int], class_order: Sequence[int]) -> None:
        super().__init__()
        self.model, self.shape, self.class_order = model, tuple(shape), list(class_order)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images float (B, C, H, W) in [0, 1]; their central square is looked at."""
        channels, *size = self.shape
        if images.shape[1] > channels:
            images = (images * images.new_tensor(_LUMINANCE)[:, None, None]).sum(1, keepdim=True)
        side = min(images.shape[2:])
        top, left = ((length - side) // 2 for length in images.shape[2:])
        images = images.expand(-1, channels, -1, -1)[..., top : top + side, left : left + side]
        if list(images.shape[2:]) != size:
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True).clamp(0, 1)
        return self.model(images)[:, self.class_order]


def _load_judge(folder: str, data: Format, device: torch.device) -> _Judge:
    from gen_invariance.experiment.evaluate import open_run

    model, prepared, *_ = open_run(folder, device=device, parts=("train",))
    known = prepared.train.class_names
    if sorted(known) != sorted(data.class_names):
        raise SettingsError(
            f"the classifier in {folder} knows the classes {', '.join(known[:5])}..., the data "
            f"{', '.join(data.class_names[:5])}...; give one that was trained on these classes"
        )
    number = {name: label for label, name in enumerate(known)}
    return _Judge(model, prepared.train.images.shape[1:], [number[name] for name in data.class_names]).eval()


def format_summary(summary: ExportSummary) -> list[str]:
    """What an export did, for a terminal."""
    old, new = sum(summary.before), sum(summary.after) - sum(summary.before)
    lines = [
        f"{_counted(old, 'original')}, {_counted(new, 'new image')}, {_counted(summary.rejected, 'result')} rejected"
    ]
    if not (new or summary.short):
        lines.append("no class lacks images to the target, so none was made; target=max asks for as many as possible")
    for name, before, after in zip(summary.class_names, summary.before, summary.after, strict=True):
        if after != before:
            lines.append(f"  {name}: {before} -> {after}")
    for name, missing in summary.short[:_LISTED]:
        why = f" (per_source={summary.per_source})" if name in summary.capped else ""
        lines.append(f"class {name!r} lacks {_counted(missing, 'image')} to the target{why}")
    if len(summary.short) > _LISTED:
        lines.append(f"{len(summary.short) - _LISTED} more classes lack images, see the manifest")
    for what, listed in (("left out", summary.ignored), ("NOT USABLE", summary.problems)):
        lines += [f"{what}: {key}: {reason}" for key, reason in listed[:_LISTED]]
        if len(listed) > _LISTED:
            lines.append(f"{what}: {len(listed) - _LISTED} more, see the manifest")
    return [*lines, f"manifest: {summary.out / 'manifest.jsonl'}", f"preview: {summary.out / 'preview.html'}"]


def check_complete(summary: ExportSummary) -> None:
    """Raise `RunError` when images of the input could not be used, so that the exit code says so."""
    if not summary.problems:
        return
    one = len(summary.problems) == 1
    where = f"{'is' if one else 'are'} not in {summary.out}"
    if summary.copied_in:
        where = f"{'has' if one else 'have'} no new ones, but came into {summary.out} with the {summary.copied_in}"
    key, reason = summary.problems[0]
    raise RunError(
        f"{_counted(len(summary.problems), 'image')} could not be used and {where}, the first is {key}: {reason}; "
        "repair or remove them, the manifest lists all"
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
