"""What the command `augment` does: open the set, find or fit the translator and the classifier, export.

Rooms that only some exports need are imported where they are needed: they take longer than a small export.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_invariance.errors import RunError, SettingsError
from gen_invariance.experiment.task import Task
from gen_invariance.export import FORMS, ExportSettings, ExportSummary, export, open_form
from gen_invariance.export.duplicates import set_duplicates
from gen_invariance.export.formats.base import Form
from gen_invariance.export.runner import check_output, keep_apart
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import Run
from gen_invariance.settings import settings_of, typed
from gen_invariance.translator.io import load_translator
from gen_invariance.translator.quality.verdict import read_verdict

_COLUMNS = {"table": ("path_column", "label_column"), "huggingface": ("image_column", "label_column")}
"""Settings that name columns, of the forms that have them."""

_LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue, as Pillow makes grey of them
_SETTINGS_OF_A_FIT = (  # what messages of a fit call its settings, and what they are called here
    (r"(?<![\w./-])fit\.(?=[a-z_]+\b)", "learn."),
    (r"\btranslator\.(network|objective)\b", r"learn.\1_options"),
)

_LISTED = 10  # problems named one by one; the manifest has all


def augment_set(
    config: Mapping[str, Any],
    configs: Path | str,
    *,
    device: torch.device,
    progress: bool,
    say: Callable[[str], None] = lambda line: None,
) -> ExportSummary:
    """Carry out `augment` with plain settings, as configs/augment.yaml lists them.

    Args:
        config: the settings.
        configs: folder of the config files, where `learn.translator` is looked up.
        device: where to translate.
        progress: show a bar.
        say: gets a line where the verdict of `inspect` changes what is done, or images are in two parts or classes.

    Raises:
        SettingsError: settings that do not fit each other.
        GenInvarianceError: as `export` and `fit_translator`.
    """
    task = settings_of(Task, config["data"], "data")
    form = _open(task, config)
    names = {field.name for field in dataclasses.fields(ExportSettings)} & config.keys()
    fit = typed(config["fit"], bool, "fit")
    strength = _strength(config, say)
    settings = settings_of(ExportSettings, {name: config[name] for name in names} | {"strength": strength}, "augment")
    if fit == bool(config["translator"]):
        raise SettingsError("augment needs one of translator=FOLDER (that fit wrote) and fit=true; see its --help")
    out = Path(config["out"]).expanduser()
    keep_apart(form.path, out)
    check_output(out, os.listdir(out) if out.is_dir() else (), resume=config["resume"])  # before fitting for hours
    for line in set_duplicates(form).lines():
        say(line)
    if fit:
        translator, size = _learned(config, configs, form, task.image_size, device, progress=progress), task.image_size
    else:
        translator, size = load_translator(config["translator"]), _fitted_size(Path(config["translator"]))
    settings = dataclasses.replace(settings, image_size=size if task.image_size is None else task.image_size)
    return export(
        form,
        translator,
        out,
        settings,
        predict=_predict(config["classifier"], form, device),
        resume=config["resume"],
        device=device,
        processes=typed(config["processes"], int, "processes"),
        engine=typed(config["engine"], str, "engine"),
        ray_address=typed(config["ray_address"], str | None, "ray_address"),
        progress=progress,
    )


def _strength(config: Mapping[str, Any], say: Callable[[str], None]) -> float:
    """The share of missing images to make: what is asked for, or what the verdict on the translator advises."""
    asked, force = typed(config["strength"], float | str, "strength"), typed(config["force"], bool, "force")
    if isinstance(asked, str) and asked != "auto":
        raise SettingsError(f"strength must be auto or a number in (0, 1], got {asked!r}")
    folder = config["translator"]
    verdict = read_verdict(folder) if folder and not force else None
    if verdict is not None and verdict.strength == 0:
        raise SettingsError(
            f"inspect says '{verdict.word}' of the translator in {folder}: {verdict.reasons[0].rstrip('.')}; fit a "
            "better one, or add force=true to use it all the same"
        )
    if not isinstance(asked, str):
        return float(asked)
    if verdict is None or verdict.strength == 1:
        return 1.0
    say(
        f"note: inspect says '{verdict.word}', so strength={verdict.strength:g}: classes get that share of the images "
        "they lack to the target"
    )
    return verdict.strength


def _open(task: Task, config: Mapping[str, Any]) -> Form:
    if task.source not in FORMS:
        raise SettingsError(f"augment cannot read data={task.source}; choose data={', data='.join(FORMS)}")
    if task.path is None:
        raise SettingsError("augment needs data.path=FOLDER or FILE, where the images are")
    if task.profile != "none" or task.nuisance != "identity":
        raise SettingsError("augment takes the data as they are; leave data.profile and data.nuisance alone")
    if task.group is not None and task.source not in ("npz", "folder"):
        raise SettingsError(f"augment tells no groups in data={task.source}; leave data.group out")
    columns = {name: typed(config[name], str | None, name) for name in _COLUMNS.get(task.source, ())}
    if task.source == "npz":
        columns["group"] = task.group
    return open_form(task.source, task.path, **columns)


def _learned(
    config: Mapping[str, Any],
    configs: Path | str,
    form: Form,
    image_size: int | None,
    device: torch.device,
    *,
    progress: bool,
) -> Nuisance:
    """The translator that is fitted on the data first, or was before the command was stopped."""
    from gen_invariance.benchmark.registry import translator_config
    from gen_invariance.export.learning import image_data
    from gen_invariance.translator.fit import fit_translator
    from gen_invariance.translator.fit_settings import FitSettings, class_members

    loop = dict(config["learn"])
    chosen = translator_config(typed(loop.pop("translator"), str, "learn.translator"), configs)
    options = {
        kind: chosen[kind] | typed(loop.pop(f"{kind}_options"), dict, f"learn.{kind}_options")
        for kind in ("network", "objective")
    }
    with _named_as_set():
        settings = settings_of(FitSettings, loop, "learn")
    folder = Path(f"{str(config['out']).rstrip('/')}-translator")
    identity = {"learn": dict(config["learn"]), "data": str(form.path), "image_size": image_size}
    if config["resume"] and (folder / "translator" / "config.json").is_file():
        Run(folder, kind="fit", seed=config["seed"], config=identity, resume=True)  # the same settings
        return load_translator(folder)
    data = image_data(form, image_size=image_size).to(device)
    opened = Run.open(folder, kind="fit", seed=config["seed"], config=identity, resume=config["resume"])
    with opened as run, _named_as_set():
        class_members(data, settings)  # says best which setting lets a class take part
        fit_translator(chosen["name"], data, settings, out=run, progress=progress, **options)
    return load_translator(folder)


@contextmanager
def _named_as_set() -> Iterator[None]:
    """Let errors of a fit call its settings what they are called in `augment`."""
    try:
        yield
    except SettingsError as error:
        text = str(error)
        for pattern, name in _SETTINGS_OF_A_FIT:
            text = re.sub(pattern, name, text)
        raise SettingsError(text) from error


def _fitted_size(folder: Path) -> int | None:
    """Side of the images that the translator was fitted on, where the run folder in or around `folder` says so."""
    if not (folder / "run.json").is_file() and folder.name == "translator":
        folder = folder.parent
    try:
        config = json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"]
        return config.get("image_size") or config["data"].get("image_size")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a translator without its run folder


class _Judge(nn.Module):
    """A classifier for results of other sizes, channels and orders of classes than it was trained on.

    Args:
        model: images (B, C, S, S) to logits (B, K).
        shape: (C, S, S) of its training images.
        order: the model's number of each class of the data.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int], order: Sequence[int]) -> None:
        super().__init__()
        self.model, self.shape, self.order = model, tuple(shape), list(order)

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
        return self.model(images)[:, self.order]


def _predict(folder: str | None, form: Form, device: torch.device) -> _Judge | None:
    if folder is None:
        return None
    from gen_invariance.experiment.evaluate import open_run

    model, prepared, *_ = open_run(folder, device=device)
    known = prepared.train.class_names
    if sorted(known) != sorted(form.class_names):
        raise SettingsError(
            f"the classifier in {folder} knows the classes {', '.join(known[:5])}..., the data "
            f"{', '.join(form.class_names[:5])}...; give one that was trained on these classes"
        )
    return _Judge(model, prepared.train.images.shape[1:], [known.index(name) for name in form.class_names]).eval()


def lines_of(summary: ExportSummary) -> list[str]:
    """What an export did, for a terminal."""
    old, new = sum(summary.before), sum(summary.after) - sum(summary.before)
    found = (_counted(old, "original"), _counted(new, "new image"), _counted(summary.rejected, "result"))
    lines = [f"{', '.join(found)} rejected"]
    lines += [
        f"  {name}: {before} -> {after}"
        for name, before, after in zip(summary.class_names, summary.before, summary.after, strict=True)
        if after != before
    ]
    lines += [f"class {name!r} lacks {_counted(missing, 'image')} to the target" for name, missing in summary.short]
    for what, found in (("left out", summary.ignored), ("NOT USABLE", summary.problems)):
        lines += [f"{what}: {key}: {reason}" for key, reason in found[:_LISTED]]
        if len(found) > _LISTED:
            lines.append(f"{what}: {len(found) - _LISTED} more, see the manifest")
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
