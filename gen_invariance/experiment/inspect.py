"""Inspect a translator: train a judge on the head classes, assess the translator with it, write JSON and a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gen_invariance.augment.policy import auto
from gen_invariance.classifier.model import Classifier
from gen_invariance.classifier.train import TrainSettings, fit_classifier
from gen_invariance.data.images import ImageData
from gen_invariance.data.longtail import split_indices
from gen_invariance.errors import CheckpointError, DataError, SettingsError
from gen_invariance.experiment.build import ClassifierSettings, StageSettings, build_model
from gen_invariance.experiment.task import Prepared, Task
from gen_invariance.files import write_json
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import named_generator, package_versions, source_commit
from gen_invariance.stats import Estimate, bootstrap_ratio
from gen_invariance.translator.quality.assess import Quality, assess, translations
from gen_invariance.translator.quality.measures import kolmogorov_distance, resultant_length
from gen_invariance.translator.quality.verdict import QUALITY_FILE, read_verdict, translator_folder, weights_digest

PAGE = "inspect.html"
AUTO_MAXIMUM = 0.5  # of `augment.policy.auto`, unless told otherwise
_SAME = {"degrees": "rotation"}  # what hand-written nuisances call a parameter -> what learned ones call it
_ANGLES = frozenset({"rotation"})


@dataclass(frozen=True)
class InspectSettings:
    """How a translator is looked at.

    Attributes:
        held_out: share of the head-class images that the judge does not see and that are translated.
        head_from: the smallest training count of a head class.
        draws: translations of each image.
        neighbours: k of precision, recall, density and coverage.
        judge: backbone of the judge.
        judge_epochs: its training time.
        max_images: most images that are translated, and a fifth of those that near copies are looked for in.
        failures: worst translations to show.

    Raises:
        SettingsError: a value out of its range.
    """

    held_out: float = 0.5
    head_from: int = 20
    draws: int = 4
    neighbours: int = 5
    judge: str = "small_conv"
    judge_epochs: int = 60
    max_images: int = 1000
    failures: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise SettingsError(f"inspect.held_out must lie between 0 and 1, got {self.held_out}")
        least = {"head_from": 2, "draws": 2, "neighbours": 1, "judge_epochs": 1, "max_images": 20, "failures": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise SettingsError(f"inspect.{name} must be at least {low}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Parameter:
    """A readable parameter that a nuisance draws.

    Attributes:
        name: of the parameter.
        drawn: its draws, (S, N), one row a round.
        true: draws of the nuisance that is in the data, where it is known and has this parameter.
        distance: Kolmogorov distance of the two, and what to expect if they were equal; None without a truth.
        resultant: mean over images of the resultant length of the angles drawn for one image; None unless an angle.
    """

    name: str
    drawn: Tensor
    true: Tensor | None = None
    distance: tuple[float, float] | None = None
    resultant: Estimate | None = None


@dataclass(frozen=True)
class Inspection:
    """All that is known about a translator, for the page.

    Attributes:
        quality: of the translator.
        oracle: of the nuisance that is in the data, where it is known.
        parameters: readable draws of the translator.
        head: the head classes' images, labels renumbered.
        held_out: int64 (N,), the rows of `head` that were translated.
        judge: trained on the other rows.
        examples: float (R, 1 + S, C, H, W), an image of each of up to 8 head classes, then translations of it.
        example_labels: int64 (R,), their classes.
    """

    quality: Quality
    oracle: Quality | None
    parameters: tuple[Parameter, ...]
    head: ImageData
    held_out: Tensor
    judge: Classifier
    examples: Tensor
    example_labels: Tensor


def inspect_translator(
    nuisance: Nuisance,
    prepared: Prepared,
    settings: InspectSettings,
    *,
    seed: int = 0,
    oracle: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Inspection:
    """Train the judge, assess `nuisance` on images that the judge has not seen, and the true nuisance beside it.

    Args:
        nuisance: learned or hand-written, on the device of the images.
        prepared: only its training part is looked at, never validation or test images.
        settings: see `InspectSettings`.
        seed: of the judge, the held-out images and all draws.
        oracle: whether the nuisance in `prepared` is known to be the true one.
        say: gets one line for each thing done.

    Raises:
        DataError: fewer than two head classes, or too few images held out.
    """
    head = head_classes(prepared.train, head_from=settings.head_from)
    generator = named_generator(seed, "inspect", "held out")
    seen, held_out = split_indices(
        head.labels.cpu(), fraction=settings.held_out, generator=generator, groups=head.groups
    )
    say(f"training a judge on {len(seen)} images of {head.num_classes} head classes ...")
    judge = train_judge(head.subset(seen), settings, seed=seed)
    held_out = _some(held_out, settings.max_images, seed, "images")
    bank = _some(torch.arange(len(head)), 5 * settings.max_images, seed, "bank")
    place = torch.full((len(head),), -1)
    place[bank] = torch.arange(len(bank))
    images = head.float_images(held_out)
    groups = None if head.groups is None else head.groups[held_out.to(head.device)]

    def assessed(which: Nuisance, sources: Tensor) -> Quality:
        return assess(
            which,
            images,
            head.labels[held_out.to(head.device)],
            sources=sources,
            judge=judge,
            features=judge.features,
            bank=head.float_images(bank),
            bank_rows=place[held_out],
            num_classes=head.num_classes,
            generator=named_generator(seed, "inspect", "assess"),
            draws=settings.draws,
            neighbours=settings.neighbours,
            failures=settings.failures,
            groups=groups,
        )

    say(f"translating {len(held_out)} other images {settings.draws} times each ...")
    quality = assessed(nuisance, images)
    true = None
    if oracle:
        say("the same with the nuisance that is in the data, on images it has not acted on, for comparison ...")
        clean = head_classes(prepared.split.train.to(head.device), head_from=settings.head_from)
        true = assessed(prepared.nuisance, clean.float_images(held_out))
    parameters = learned_parameters(nuisance, images[:256], truth=prepared.nuisance if oracle else None, seed=seed)
    first = torch.stack([(head.labels[held_out] == label).nonzero()[0, 0] for label in range(min(8, head.num_classes))])
    drawn = translations(nuisance, images[first], draws=8, generator=named_generator(seed, "inspect", "examples"))
    examples = torch.cat([images[first][None], drawn]).transpose(0, 1)
    return Inspection(quality, true, parameters, head, held_out, judge, examples, head.labels[held_out][first])


def head_classes(data: ImageData, *, head_from: int) -> ImageData:
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


def learned_parameters(
    nuisance: Nuisance, images: Tensor, *, truth: Nuisance | None = None, draws: int = 16, seed: int = 0
) -> tuple[Parameter, ...]:
    """What `nuisance` draws for `images`, by readable parameter; nothing for one that has no such parameters.

    Args:
        nuisance: one with `parameters_of(draw)`, or one whose draw holds a number for each image.
        images: float (N, C, H, W).
        truth: the nuisance that is in the data, if known.
        draws: rounds.
        seed: of the draws.
    """
    generator = named_generator(seed, "inspect", "parameters")
    rounds = [_readable(nuisance, images, generator) for _ in range(draws)]
    drawn = {name: torch.stack([each[name] for each in rounds]) for name in rounds[0]}
    known = {} if truth is None else _readable(truth, images, generator)
    if truth is not None:
        more = [_readable(truth, images, generator) for _ in range(draws - 1)]
        known = {name: torch.stack([known[name], *(each[name] for each in more)]) for name in known}
    found = []
    for name, values in drawn.items():
        true = known.get(name)
        distance = None
        if true is not None:
            # Two samples of one distribution are this far apart on average (mean of Kolmogorov's law).
            expected = 0.8687 * (1 / values.numel() + 1 / true.numel()) ** 0.5
            distance = (kolmogorov_distance(values, true), expected)
        resultant = bootstrap_ratio(resultant_length(values.T), generator=generator) if name in _ANGLES else None
        found.append(Parameter(name, values, true, distance, resultant))
    return tuple(found)


def _readable(nuisance: Nuisance, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """One draw for each image as named numbers (N,), on the CPU."""
    draw = nuisance.sample(images.shape, generator=generator)
    read = getattr(nuisance, "parameters_of", None)
    with torch.no_grad():
        values = draw if read is None else read(draw)
    plain = {name.rsplit(".", 1)[-1]: value.detach().float().cpu() for name, value in values.items()}
    return {_SAME.get(name, name): value for name, value in plain.items() if value.shape == (len(images),)}


def write_inspection(
    found: Inspection, folder: Path | str, *, translator: Path | str, task: Task, settings: InspectSettings, seed: int
) -> Path:
    """Write `folder`/quality.json and `folder`/inspect.html; returns the page's path."""
    from gen_invariance.report.inspect_page import write_inspect_page

    folder = Path(folder)
    about: dict[str, Any] = {
        **found.quality.to_json(),
        "class_names": list(found.head.class_names),
        "parameters": {each.name: _parameter_json(each) for each in found.parameters},
        "oracle": found.oracle.to_json() if found.oracle is not None else None,
        "translator_digest": weights_digest(translator),
        "data": task.identity(),
        "settings": asdict(settings),
        "seed": seed,
        "versions": package_versions(),
        "commit": source_commit(),
    }
    page = write_inspect_page(folder / PAGE, found, about, name=str(translator))
    write_json(folder / QUALITY_FILE, about)
    return page


def _parameter_json(parameter: Parameter) -> dict[str, Any]:
    low, middle, high = torch.quantile(parameter.drawn.flatten(), torch.tensor([0.025, 0.5, 0.975])).tolist()
    return {
        "drawn": {"low": low, "median": middle, "high": high},
        "kolmogorov_distance": parameter.distance[0] if parameter.distance else None,
        "kolmogorov_if_equal": parameter.distance[1] if parameter.distance else None,
        "resultant_length": asdict(parameter.resultant) if parameter.resultant else None,
    }


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
        about = json.loads(path.read_text(encoding="utf-8"))
        fitted = {"group": None, **about["config"].get("data", {}), "seed": about["seed"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
