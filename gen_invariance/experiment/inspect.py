"""Inspect a translator: train a judge on the head classes, assess the translator with it, write JSON and a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gen_invariance.augment.policy import auto
from gen_invariance.classifier.model import Classifier
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.classifier.train import fit_classifier
from gen_invariance.data.identity import find_change_since
from gen_invariance.data.images import ImageData
from gen_invariance.data.longtail import split_indices
from gen_invariance.errors import CheckpointError, DataError
from gen_invariance.experiment.build import build_model
from gen_invariance.experiment.choose import judge_translator
from gen_invariance.experiment.launch import Say, prepare_on_device, say_nothing
from gen_invariance.experiment.settings import ClassifierSettings, InspectRun, InspectSettings, StageSettings, Task
from gen_invariance.files import read_json, write_json
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import named_generator, package_versions, source_commit
from gen_invariance.translator.io import load_translator
from gen_invariance.translator.quality.assess import Memory, Quality, assess, translate
from gen_invariance.translator.quality.inspection import Inspection, compare_parameters
from gen_invariance.translator.quality.verdict import (
    QUALITY_FILE,
    Gain,
    Verdict,
    judge_by_gain,
    read_verdict,
    refuse_unidentified,
    translator_folder,
    weights_digest,
)

PAGE = "inspect.html"
AUTO_MAXIMUM = 0.5  # of `augment.policy.auto`, unless told otherwise


@dataclass(frozen=True)
class Truth:
    """The nuisance that is in the data, where it is known.

    Attributes:
        nuisance: what acted on the images.
        originals: the images before it acted, row for row.
    """

    nuisance: Nuisance
    originals: ImageData


def inspect_translator(
    translator: Nuisance | Path | str,
    data: ImageData,
    settings: InspectSettings | None = None,
    *,
    truth: Truth | None = None,
    out: Path | str | None = None,
    about: Mapping[str, Any] | None = None,
    flip_safe: bool = False,
    seed: int = 0,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Inspection:
    """Train a judge on the head classes, and assess `translator` on images of them that the judge has not seen.

    Args:
        translator: learned or hand-written, or the folder of a fitted one.
        data: the training set, never validation or test images.
        settings: see `InspectSettings`; None for the defaults.
        truth: the nuisance in the data; it is assessed beside the translator.
        out: folder for inspect.html and quality.json; None writes nothing. The verdict in quality.json is obeyed by
            `policy=auto` where it lies beside the translator, see `output_folder`.
        about: facts about the data for the page and quality.json; None tells their name and sizes.
        flip_safe: whether a mirrored image keeps its label, for the trainings of `settings.budget`.
        seed: of the judge, the held-out images and all draws.
        progress: show a bar in these trainings; None shows one on a terminal only.
        say: gets one line for each thing done.

    Raises:
        CheckpointError: `translator` is a folder that holds none.
        DataError: fewer than two head classes, or too few images held out.

    Example:
        >>> from gen_invariance import InspectSettings, Rotation, inspect_translator, load_source, make_long_tailed
        >>> train = make_long_tailed(load_source("digits"), largest=60, imbalance=20, rest_is_test=True).train
        >>> inspection = inspect_translator(Rotation(10), train, InspectSettings(judge_epochs=1))
        >>> len(inspection.quality.verdict.reasons) >= 6
        True
    """
    settings = settings or InspectSettings()
    folder = translator if isinstance(translator, Path | str) else None
    nuisance: Any = translator if folder is None else load_translator(folder).to(data.device)
    head = select_head_classes(data, head_from=settings.head_from)
    generator = named_generator(seed, "inspect", "held out")
    seen, held_out = split_indices(
        head.labels.cpu(), fraction=settings.held_out, generator=generator, groups=head.groups
    )
    say(f"training a judge on {len(seen)} images of {head.num_classes} head classes ...")
    judge = train_judge(head.subset(seen), settings, seed=seed)
    held_out = _some(held_out, settings.max_images, seed, "images")
    bank = _some(torch.arange(len(head)), 5 * settings.max_images, seed, "bank")
    row_in_bank = torch.full((len(head),), -1)
    row_in_bank[bank] = torch.arange(len(bank))
    memory = Memory(head.float_images(bank), row_in_bank[held_out])
    looked_at = head.subset(held_out)
    images = looked_at.float_images()

    def assess_one(which: Nuisance, sources: Tensor) -> Quality:
        generator = named_generator(seed, "inspect", "assess")
        return assess(
            which, looked_at, judge=judge, memory=memory, generator=generator, settings=settings, sources=sources
        )

    say(f"translating {len(held_out)} other images {settings.draws} times each ...")
    quality, oracle = assess_one(nuisance, images), None
    if settings.budget is not None and folder is not None:
        say(f"training with and without it on simulated tails, for {settings.budget} ...")
        gain = judge_translator(
            folder, data, budget=settings.budget, flip_safe=flip_safe, seed=seed, progress=progress, say=say
        )
        if gain is not None:
            quality = replace(quality, verdict=_decide_by_gain(gain, quality.verdict, nuisance))
    if truth is not None:
        say("the same with the nuisance that is in the data, on images it has not acted on, for comparison ...")
        clean = select_head_classes(truth.originals.to(head.device), head_from=settings.head_from)
        oracle = assess_one(truth.nuisance, clean.float_images(held_out))
    parameters = compare_parameters(nuisance, images[:256], truth=None if truth is None else truth.nuisance, seed=seed)
    labels = looked_at.labels
    first = torch.stack([(labels == label).nonzero()[0, 0] for label in range(min(8, head.num_classes))])
    drawn = translate(nuisance, images[first], draws=8, generator=named_generator(seed, "inspect", "examples"))
    examples = torch.cat([images[first][None], drawn]).transpose(0, 1)
    inspection = Inspection(quality, oracle, parameters, head, held_out, judge, examples, labels[first])
    if out is not None:
        nuisance_name = "identity" if truth is None else type(truth.nuisance).__name__
        facts = {"source": data.name, "nuisance": nuisance_name} if about is None else about
        write_inspection(inspection, out, translator=folder, data=facts, settings=settings, seed=seed)
    return inspection


def _decide_by_gain(gain: Gain, verdict: Verdict, nuisance: Nuisance) -> Verdict:
    """The verdict by a measured gain, what figures say as its explanation; what was not identified stays refused."""
    problem = getattr(nuisance, "unidentified", "")
    return refuse_unidentified(judge_by_gain(gain, [each for each in verdict.reasons if each != problem]), problem)


def run_inspect(run: InspectRun, *, say: Say = say_nothing) -> tuple[Inspection, Path]:
    """Prepare the data and inspect the saved translator on it; the inspection and its page.

    Raises:
        CheckpointError: the folder holds no translator, or a damaged one.
        DataError: fewer than two head classes, or too few images held out.
    """
    load_translator(run.translator)  # a folder without one is refused before images are read
    prepared = prepare_on_device(
        run.data, seed=run.seed, device=run.device, need_test=False, progress=run.progress, say=say
    )
    differences = differences_from_fit(run.translator, run.data, seed=run.seed)
    change = "" if differences else find_change_since(output_folder(run.translator), {"train": prepared.split.train})
    if differences or change:
        say(f"note: this translator was fitted with {', '.join(differences) or f'other images: {change}'}")
    truth = None
    if run.data.nuisance != "identity":
        truth = Truth(prepared.nuisance, prepared.originals("train"))
    out = Path(run.out or output_folder(run.translator))
    inspection = inspect_translator(
        run.translator,
        prepared.train,
        run.inspect,
        truth=truth,
        out=out,
        about=run.data.identity(),
        flip_safe=prepared.flip_safe,
        seed=run.seed,
        progress=run.progress,
        say=say,
    )
    return inspection, out / PAGE


def select_head_classes(data: ImageData, *, head_from: int) -> ImageData:
    """The images of classes with `head_from` images or more, labels renumbered.

    Raises:
        DataError: fewer than two such classes, so there is nothing for a judge to tell apart.
    """
    chosen = (data.counts >= head_from).nonzero()[:, 0]
    if len(chosen) < 2:
        raise DataError(
            f"{data.name}: {len(chosen)} class(es) with {head_from} images or more, a judge needs two; "
            "lower inspect.head_from"
        )
    return data.select_classes(chosen)


def train_judge(seen: ImageData, settings: InspectSettings, *, seed: int) -> Classifier:
    """A classifier of the head classes, in eval mode."""
    training = TrainSettings(
        epochs=settings.judge_epochs,
        batch_size=min(64, max(8, len(seen) // 5)),
        learning_rate=0.05,
        schedule="cosine",
        warmup=min(3, settings.judge_epochs - 1),
        sampling="class_balanced",
        checkpoint_every=settings.judge_epochs,
    )
    model = build_model(ClassifierSettings(backbone=settings.judge), seen, seed=seed)
    return fit_classifier(model, seen, training, loss=nn.CrossEntropyLoss(), seed=seed, progress=False)


def _some(rows: Tensor, most: int, seed: int, purpose: str) -> Tensor:
    """At most `most` of `rows`, in their order."""
    chosen = torch.randperm(len(rows), generator=named_generator(seed, "inspect", purpose))[:most]
    return rows[chosen.sort().values]


def write_inspection(
    inspection: Inspection,
    folder: Path | str,
    *,
    translator: Path | str | None,
    data: Mapping[str, Any],
    settings: InspectSettings,
    seed: int,
) -> Path:
    """Write `folder`/quality.json and `folder`/inspect.html; returns the page's path.

    `translator` is its folder; None is one that is not saved, whose verdict nobody obeys. `data` are facts about the
    images.
    """
    from gen_invariance.report.inspect_page import write_inspect_page  # matplotlib is slow to import

    folder = Path(folder)
    about: dict[str, Any] = {
        **inspection.to_json(),
        "translator_digest": None if translator is None else weights_digest(translator),
        "data": dict(data),
        "settings": asdict(settings),
        "seed": seed,
        "versions": package_versions(),
        "commit": source_commit(),
    }
    name = "translator" if translator is None else str(translator)
    page = write_inspect_page(folder / PAGE, inspection, about, name=name)
    write_json(folder / QUALITY_FILE, about)
    return page


def output_folder(translator: Path | str) -> Path:
    """Where `inspect` writes unless told otherwise: the run folder that holds the translator, or its own folder."""
    folder = translator_folder(translator)
    return folder.parent if folder.name == "translator" else folder


def differences_from_fit(translator: Path | str, task: Task, *, seed: int) -> list[str]:
    """What of data and seed differs from the run that fitted the translator; nothing where no run is known.

    Raises:
        CheckpointError: the run's description is damaged.
    """
    path = output_folder(translator) / "run.json"
    if not path.is_file():
        return []
    try:
        about = read_json(path)
        data = about["config"].get("data", {})
        data = {"path": data} if isinstance(data, str) else data  # as `augment` writes it
        fitted = {"group": None, **data, "seed": about["seed"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); copy the translator's folder elsewhere") from error
    now = {"group": None, **json.loads(json.dumps(task.identity(), default=str)), "seed": seed}
    names = [name for name in now if name in fitted and fitted[name] != now[name]]
    return [f"{name if name == 'seed' else f'data.{name}'}={fitted[name]}" for name in names]


def policy_from_verdict(counts: Tensor, translator: Path | str | None, *, maximum: float = AUTO_MAXIMUM) -> Tensor:
    """`augment.policy.auto`, scaled by what `inspect` said of the translator; unscaled where it said nothing.

    "use" keeps the probabilities, "use with lower strength" halves them, "do not use" sets them to 0.

    Args:
        counts: training images of each class, (K,).
        translator: its folder; None for a nuisance that is not learned.
        maximum: probability of the smallest class at full strength.
    """
    verdict = read_verdict(translator) if translator is not None else None
    return auto(counts, maximum=maximum * (1.0 if verdict is None else verdict.strength))


def obey_verdict(stage: StageSettings, translator: Path | str) -> StageSettings:
    """`stage` with its policy `auto` scaled as `policy_from_verdict` does; other policies and nuisances stay."""
    names = [name.strip() for name in stage.nuisance.split("+")]
    if stage.policy != "auto" or "translator" not in names:
        return stage
    verdict = read_verdict(translator)
    if verdict is None or verdict.strength == 1.0:
        return stage
    maximum = stage.policy_options.get("maximum", AUTO_MAXIMUM) * verdict.strength
    return replace(stage, policy_options={**stage.policy_options, "maximum": maximum})
