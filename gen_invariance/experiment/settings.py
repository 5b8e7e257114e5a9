"""Settings of a task, of the parts of a training, and of every run of this room. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat

from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.classifier.transfer import TransferPlan
from gen_invariance.data.settings import LongTailSettings, SourceSettings
from gen_invariance.errors import SettingsError
from gen_invariance.export.settings import ResultSettings, WorkerSettings
from gen_invariance.order.settings import OrderSettings
from gen_invariance.referee.settings import CandidateSettings
from gen_invariance.settings import Count, CountOrZero, PathText, Rows, Side, Text, settings_class
from gen_invariance.translator.settings import AssessSettings, FitSettings, parse_seconds


@settings_class("data")
class Task(LongTailSettings, SourceSettings):
    """Which images, how long their tail, and what acted on them."""

    nuisance: str = "identity"
    """hand-written nuisance that acts once on each image; identity leaves the set as it is"""
    nuisance_options: Mapping[str, Any] = field(default_factory=dict)
    """of that nuisance"""
    transformed_ranks: tuple[CountOrZero, ...] | None = None
    """classes whose training images meet the nuisance, by rank in size from 0; null: all; test images always meet it"""
    many_above: int | None = 100
    """bounds of many- and few-shot classes; null, or bounds that leave one empty: thirds of the classes by size"""
    few_below: int | None = 20
    """see many_above"""

    def __post_init__(self) -> None:
        super().__post_init__()
        bounds_given = self.few_below is not None and self.many_above is not None
        if bounds_given and not 0 < self.few_below <= self.many_above + 1:
            raise SettingsError(
                f"data: few_below must be positive and at most many_above + 1, got {self.few_below}, {self.many_above}"
            )

    @property
    def name(self) -> str:
        """For records and titles: source and nuisance."""
        return self.source if self.nuisance == "identity" else f"{self.source}-{self.nuisance}"

    def identity(self) -> dict[str, Any]:
        """The settings as JSON-able values, for a run's config."""
        added_later = {"group": None, "cut": "own", "fill_tail": False}  # runs made before have the same identity
        values = {name: value for name, value in asdict(self).items() if name != "map_from"}  # which decides nothing
        return {name: value for name, value in values.items() if name not in added_later or value != added_later[name]}


@settings_class("run")
class RunSettings:
    """What every run with a run folder is told."""

    seed: int = 0
    """of everything random"""
    device: str = "auto"
    """auto, cpu or cuda"""
    out: PathText = "runs/run"
    """run folder; a new or an empty one"""
    resume: bool = False
    """go on with the run that is in it"""
    allow_changed_settings: bool = False
    """with resume=true: go on although settings are not those of the run"""
    progress: bool | None = None
    """true or false; null shows a bar on a terminal"""


@settings_class("choose")
class ChooseRun(CandidateSettings, RunSettings):
    """Settings of `run_choose`."""

    data: Task = field(default_factory=Task)
    out: PathText = "runs/choose"
    """run folder; a new or an empty one"""


@settings_class("translator")
class TranslatorChoice:
    """Which translator is fitted; network and objective take the settings of the class of that name."""

    name: str = "redraw"
    """redraw, spatial, munit, flow, pose or img2img; auto: the best candidate, or none where none helps"""
    network: Mapping[str, Any] | None = None
    """settings of the translator itself"""
    objective: Mapping[str, Any] | None = None
    """settings of what it learns from"""


@settings_class("fit")
class FitRun(RunSettings):
    """Settings of `run_fit`."""

    data: Task = field(default_factory=Task)
    translator: TranslatorChoice = field(default_factory=TranslatorChoice)
    fit: FitSettings = field(default_factory=FitSettings)
    choose: CandidateSettings = field(default_factory=CandidateSettings)
    """for translator=auto"""
    out: PathText = "runs/fit"
    """run folder; a new or an empty one"""


@settings_class("stage")
class StageSettings:
    """What the stage gives, and to whom."""

    nuisance: str = "none"
    """names joined by +: none (no stage), identity (second stream only), true (oracle), translator, randaugment, ...;
    in train also auto, which chooses stage and augmentation"""
    policy: str = "auto"
    """where the stage acts: a policy of augment.policy"""
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    """of that policy"""
    nuisance_options: Mapping[str, Any] = field(default_factory=dict)
    """by name: {rotation: {degrees: 30}}"""

    @property
    def parts(self) -> list[str]:
        """The names of `nuisance`, in order."""
        return [name.strip() for name in self.nuisance.split("+")]


@settings_class("classifier")
class ClassifierSettings:
    """Which classifier, with which loss."""

    backbone: str = "resnet20"
    """small_conv, resnet20, resnet32, efficientnet_lite0, ..."""
    head: str = "linear"
    """linear or cosine"""
    loss: str = "cross_entropy"
    """a name of classifier.losses"""
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    """of that loss"""
    second_loss_options: Mapping[str, Any] | None = None
    """of the loss from the second phase on; null keeps loss_options"""
    weights: PathText | None = None
    """start of the backbone: DEFAULT, a weights file or a run folder"""


@settings_class("stage")
class StageOfRun(StageSettings):
    """What the stage of one training gives, and to whom."""

    translator: PathText | None = None
    """folder that fit wrote, for nuisance=translator"""


@settings_class("train")
class TrainRun(RunSettings):
    """Settings of `run_train`."""

    data: Task = field(default_factory=Task)
    classifier: ClassifierSettings = field(default_factory=ClassifierSettings)
    training: TrainSettings = field(default_factory=TrainSettings)
    stage: StageOfRun = field(default_factory=StageOfRun)
    transfer: TransferPlan = field(default_factory=lambda: TransferPlan("none"))
    choose: CandidateSettings = field(default_factory=CandidateSettings)
    """for stage=auto"""
    out: PathText = "runs/train"
    """run folder; a new or an empty one"""
    augmentation: str = "none"
    """of every row: none, randaugment, trivialaugment, or crop_flip (mirrored where the data allow it)"""


@settings_class("measure")
class MeasureSettings:
    """How a cell measures invariance."""

    draws: Count = 20
    """transformations of each image"""
    invariance_images: Count | None = 40
    """test images of each class at most, the same ones for every method; null: all"""
    nuisance: str | None = None
    """hand-written nuisance that is measured against where none acts on the images"""


@settings_class("measure")
class MeasureRun:
    """Settings of `measure_run`."""

    run: PathText
    """folder that train wrote"""
    nuisance: str = "auto"
    """auto, data (what acted on the images), translator, lighting, ...; identity: accuracy alone"""
    nuisance_options: Mapping[str, Any] = field(default_factory=dict)
    """of a hand-written nuisance"""
    translator: PathText | None = None
    """folder that fit wrote"""
    split: Literal["test", "validation"] = "test"
    """test or validation"""
    draws: Count = 20
    """transformations of each image"""
    batch_size: Rows | None = None
    """images at a time, halved where the memory does not suffice; null: 512, of small images on a GPU more"""
    seed: int = 0
    """of the draws"""
    device: str = "auto"
    """auto, cpu or cuda"""
    method: Text | None = None
    """name in records and reports; null takes the stage's nuisance"""


@settings_class("inspect")
class InspectSettings(AssessSettings):
    """How a translator is inspected.

    Example:
        >>> from gen_invariance import InspectSettings
        >>> InspectSettings(draws=3).draws
        3
    """

    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the head-class images that the judge does not see and that are translated."""
    head_from: Annotated[int, Field(ge=2, le=10**9)] = 20
    """Smallest training count of a head class."""
    judge: str = "small_conv"
    """Backbone of the judge."""
    judge_epochs: Count = 60
    """Training time of the judge."""
    max_images: Annotated[int, Field(ge=20, le=10**9)] = 1000
    """Most images that are translated, and a fifth of those that near copies are looked for in."""
    budget: str | None = None
    """Time to measure what a saved translator gains on simulated tails, such as 5min; null: figures alone decide."""

    def __post_init__(self) -> None:
        if self.budget is not None:
            parse_seconds(self.budget, "inspect.budget")


@settings_class("inspect")
class InspectRun:
    """Settings of `run_inspect`."""

    translator: PathText
    """folder that fit wrote"""
    data: Task = field(default_factory=Task)
    inspect: InspectSettings = field(default_factory=InspectSettings)
    seed: int = 0
    """of the data, the judge and all draws; take that of the fit to look at the same images"""
    device: str = "auto"
    """auto, cpu or cuda"""
    out: PathText = ""
    """folder; empty writes beside the translator, where stage.policy=auto finds the verdict"""
    progress: bool | None = None
    """true or false; null shows a bar on a terminal"""


@settings_class("learn")
class LearnSettings(FitSettings):
    """The fit of `fit=true`: a translator by name, and how long it is fitted, on what."""

    flip: bool = False
    """mirror half of the images; only where a mirrored image keeps its label"""
    translator: str = "redraw"
    """a file of configs/translator: redraw, spatial, pose, flow, munit_small ..."""
    network_options: Mapping[str, Any] = field(default_factory=dict)
    """over those of the file"""
    objective_options: Mapping[str, Any] = field(default_factory=dict)
    """over those of the file"""

    def identity(self) -> dict[str, Any]:
        """The settings for a run's config, those of the pace as well, as in runs made before."""
        pace = ("log_every", "sample_every", "checkpoint_every")
        return super().identity() | {name: getattr(self, name) for name in pace}


@settings_class("augment")
class AugmentInput:
    """Which set is augmented, by what, and where to."""

    data: Task = field(default_factory=lambda: Task(source="folder", profile="none"))
    out: PathText = Field(kw_only=True)
    """a new or an empty folder, outside of the data"""
    translator: PathText | None = None
    """folder that fit wrote"""
    fit: bool = False
    """fit a translator on the data first, into OUT-translator"""
    strength: float | str = "auto"
    """share of the images lacking to the target that is made, in (0, 1]; auto asks inspect's verdict"""
    force: bool = False
    """use a translator whatever is said of it, and ask nobody"""
    judge_budget: str = "10min"
    """time for judging a translator that nobody has judged, before anything is written: 90s, 10min, 2h"""
    classifier: PathText | None = None
    """folder that train wrote: reject results that it takes for another class"""
    path_column: str | None = "path"
    """of a table"""
    label_column: str | None = "label"
    """of a table or a Hugging Face data set"""
    image_column: str | None = None
    """of a Hugging Face data set with several columns of images"""


@settings_class("augment")
class AugmentSettings(WorkerSettings, ResultSettings, AugmentInput):
    """Settings of `run_augment`."""

    device: str = "auto"
    """auto, cpu or cuda"""
    resume: bool = False
    """go on with the export that is in out"""
    progress: bool | None = None
    """true or false; null shows bars on a terminal"""
    learn: LearnSettings = field(default_factory=LearnSettings)
    """for fit=true"""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_seconds(self.judge_budget, "augment.judge_budget")
        if self.strength != "auto" and not (isinstance(self.strength, float) and 0 < self.strength <= 1):
            raise SettingsError(f"augment.strength must be auto or a number in (0, 1], got {self.strength!r}")


@settings_class("compare")
class CompareRun:
    """Settings of `run_compare`."""

    original: PathText
    """the set as it was: a folder of class folders, a file, or whatever source says"""
    augmented: PathText
    """the set that `augment` wrote of it"""
    test: PathText | None = None
    """images to test on, a set of the same kind; null: the test part of original"""
    source: Literal["folder", "table", "npz", "huggingface", "webdataset"] = "folder"
    """the format of all of them, as data= of augment"""
    seeds: Annotated[tuple[CountOrZero, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    """each trains one classifier on either set"""
    steps: Count = 1000
    """updates of each training, the same for both sets"""
    batch_size: Rows = 32
    """images a step"""
    learning_rate: PositiveFloat = 0.05
    """peak rate of SGD, which falls along a cosine"""
    image_size: Side | None = 32
    """side that the central squares of images are scaled to; null keeps images, which must be of one size"""
    backbone: str = "small_conv"
    """small_conv, resnet20, resnet32, efficientnet_lite0, ..."""
    weights: PathText | None = None
    """start of the backbone: DEFAULT, a weights file or a run folder"""
    augmentation: str = "crop_flip+trivialaugment"
    """of every row, on both sets: none, crop_flip, trivialaugment, randaugment, or some of them joined by +"""
    flip: bool = True
    """whether a mirrored image keeps its label; false for signs and letters"""
    device: str = "auto"
    """auto, cpu or cuda"""
    out: PathText = "runs/compare"
    """run folder; a new or an empty one"""
    resume: bool = False
    """go on with the comparison that is in it"""
    progress: bool | None = None
    """true or false; null shows bars on a terminal"""
    path_column: str | None = "path"
    """of a table"""
    label_column: str | None = "label"
    """of a table or a Hugging Face data set"""
    image_column: str | None = None
    """of a Hugging Face data set with several columns of images"""

    def identity(self) -> dict[str, Any]:
        """What decides the figures beside the images and the seeds."""
        names = ("steps", "batch_size", "learning_rate", "image_size", "backbone", "weights", "augmentation", "flip")
        return {name: getattr(self, name) for name in names}


@settings_class("order")
class OrderRun:
    """Settings of `run_order`.

    Example:
        >>> from gen_invariance import OrderRun, OrderSettings
        >>> OrderRun(order=OrderSettings(choose="pairs"), out=None).out is None
        True
    """

    data: Task = field(default_factory=Task)
    order: OrderSettings = field(default_factory=OrderSettings)
    nuisance: str | None = None
    """also measure eKLD against: data (what acted on the images), rotation, ..., or translator"""
    nuisance_options: Mapping[str, Any] = field(default_factory=dict)
    """of a hand-written nuisance"""
    translator: PathText | None = None
    """folder that fit wrote, for nuisance=translator"""
    seed: int = 0
    """of the data, the choice of subsets and the bootstraps"""
    device: str = "auto"
    """auto, cpu or cuda"""
    out: PathText | None = "runs/order"
    """run folder; a new or an empty one; null computes in memory"""
    resume: bool = False
    """go on with the run in it, or read it again with another threshold, more seeds or more subsets"""
    progress: bool | None = None
    """true or false; null shows a bar on a terminal"""
