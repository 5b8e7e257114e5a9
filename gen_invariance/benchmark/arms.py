"""Arms by name: a method of `configs/method`, what the stage gives and to whom, and what every row is given.

`ce_drs`, `ce_drs+munit_small`, `ldam_drw+oracle`, `ce_drs+redraw@everywhere+trivialaugment@every_row`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gen_invariance import configs
from gen_invariance.benchmark.registry import Benchmark, TranslatorFit, read_translator_fit
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.errors import CheckpointError, SettingsError
from gen_invariance.experiment.cell import Method
from gen_invariance.experiment.settings import ClassifierSettings, StageSettings
from gen_invariance.files import read_regular
from gen_invariance.nuisance.build import build_nuisance
from gen_invariance.settings import read_settings

PAPER = ("ce", "ce_drs", "ce_drw", "ldam", "ldam_drs", "ldam_drw")
EVERY_ROW, MORE_REAL = "every_row", "more_real"
"""`WORD@every_row` augments every row of every batch, after the stage; `more_real` trains on more real images."""

_GENERIC = ("randaugment", "trivialaugment")
_PLAIN = (
    "ce_drs",
    "ce_drs+identity",
    *(f"ce_drs+{name}@{EVERY_ROW}" for name in _GENERIC),
    *(f"ce_drs+{name}" for name in _GENERIC),
)


def _beside_generic(*names: str) -> tuple[str, ...]:
    """Arms that give a translator, alone and with generic augmentation of every row."""
    return tuple(f"ce_drs+{name}{more}" for name in names for more in ("", f"+trivialaugment@{EVERY_ROW}"))


METHOD_SETS: Mapping[str, tuple[str, ...]] = {
    "paper": tuple(f"{name}{stage}" for name in PAPER for stage in ("", "+git")),
    "plain": _PLAIN,
    "stages": (*_PLAIN, *_beside_generic("redraw", "spatial", "munit_small", "oracle")),
    "translators": (*_PLAIN, *_beside_generic("redraw", "flow", "spatial", "munit_small", "oracle")),
}
"""Lists of arms by one name. "paper": the rows of Zhou et al. (2022). The others begin with what needs no translator:
nothing, the stage's stream with nothing done to images, generic augmentation of every row and of the tail.
"oracle" stands for `more_real` on a benchmark whose nuisance is in the photos already."""

_WORDS = {"oracle": "true"}
_ALIASES = {"git": "munit"}
_WHERE = {"everywhere": "everywhere", "head": "head", "tail": "auto"}
"""Where the stage acts, as an arm may say (`ce_drs+redraw@everywhere`), and the policy of that name."""


@dataclass(frozen=True)
class GivenTranslator:
    """A translator that is fitted already, by folder; `digest` is of its files."""

    folder: str
    digest: str

    def identity(self) -> dict[str, Any]:
        """What decides the result: not where the folder lies."""
        return {"digest": self.digest}

    def load(self) -> Any:
        """The translator.

        Raises:
            CheckpointError: it is another one by now, or damaged.
        """
        from gen_invariance.translator.io import load_translator

        if compute_digest(self.folder) != self.digest:
            raise CheckpointError(f"the translator in {self.folder} has changed since the grid began; run it anew")
        return load_translator(self.folder)


@dataclass(frozen=True)
class Arm:
    """A method with what its stage gives, and the translator to fit for that, or one that was given."""

    name: str
    method: Method
    fit: TranslatorFit | None = None
    given: GivenTranslator | None = None


def arm_names(given: str | Sequence[str], benchmark: Benchmark) -> list[str]:
    """Names of arms on `benchmark`: a list of them, in which a name of `METHOD_SETS` stands for its arms.

    A set that knows no oracle, neither a nuisance of its own nor images that a cut leaves out, goes without one.
    """
    words = [given] if isinstance(given, str) else given
    oracle = _has_oracle(benchmark)
    names: list[str] = []
    for word in words:
        for arm in METHOD_SETS.get(word, (word,)):
            if arm not in names and (oracle or arm == word or "+oracle" not in arm):
                names.append(arm)
    return names


def _has_oracle(benchmark: Benchmark) -> bool:
    if benchmark.task.nuisance != "identity":
        return True
    try:
        replace(benchmark.task, fill_tail=True)
    except SettingsError:
        return False
    return True


def build_method(
    name: str, *, classifier: ClassifierSettings, training: TrainSettings, stage: StageSettings | None = None
) -> Method:
    """The method `name` of `configs/method`: `classifier` and `training` with what it changes, and a stage if given.

    Raises:
        SettingsError: an unknown method, or a file with an unknown setting.
    """
    changes = configs.read_choice("method", name)
    return Method(
        name,
        stage or StageSettings(),
        read_settings(TrainSettings, {**asdict(training), **changes.get("training", {})}, f"method {name}: training"),
        read_settings(
            ClassifierSettings, {**asdict(classifier), **changes.get("classifier", {})}, f"method {name}: classifier"
        ),
        augmentation=changes.get("augmentation", "none"),
    )


def read_arm(name: str, benchmark: Benchmark) -> Arm:
    """The arm called `name` on `benchmark`: METHOD, METHOD+WORD, METHOD+WORD@WHERE+WORD, ...

    A WORD is what the stage gives: `oracle` (the true nuisance), a translator of `configs`/translator, the folder of a
    fitted one (with a slash in it), or a nuisance of `nuisance.build`. WHERE says to whom, in place of the benchmark's
    policy: `everywhere`, `head`, `tail`; or `every_row`, which augments every row of every batch, after the stage.
    `more_real` trains on more real images, and is what `oracle` means on a set that has no nuisance of its own.

    Raises:
        SettingsError: an unknown method or word, two translators at once, or an oracle that cannot be.
    """
    method_name, *words = (part.strip() for part in name.split("+"))
    parts = _Parts(name, benchmark)
    for word in words:
        parts.add(word)
    method = build_method(
        method_name, classifier=benchmark.classifier, training=benchmark.training, stage=parts.make_stage()
    )
    plain = [word for word in (benchmark.augmentation, method.augmentation, *parts.every_row) if word != "none"]
    augmentation = "+".join(plain)
    method = replace(
        method,
        name=name,
        translator=parts.choice,
        augmentation=augmentation or "none",
        augmentation_options=parts.select_options(augmentation.split("+")),
        more_real=parts.more_real,
    )
    fit = None if parts.choice is None or parts.given else read_translator_fit(parts.choice, benchmark)
    return Arm(name, method, fit, parts.given)


class _Parts:
    """What the words of an arm's name say, one after the other."""

    def __init__(self, name: str, benchmark: Benchmark) -> None:
        self.name, self.benchmark = name, benchmark
        self.nuisances: list[str] = []
        self.every_row: list[str] = []
        self.choice: str | None = None
        self.given: GivenTranslator | None = None
        self.policy: str | None = None
        self.more_real = False

    def add(self, word: str) -> None:
        """Take in a word of the name."""
        what, _, where = word.partition("@")
        if where not in ("", EVERY_ROW, *_WHERE):
            raise SettingsError(
                f"method {self.name!r}: {what} cannot be given to {where!r}; choose {', '.join((*_WHERE, EVERY_ROW))}"
            )
        photos = self.benchmark.task.nuisance == "identity"
        if what == MORE_REAL or (what == "oracle" and photos):
            self._fill(where)
        elif where == EVERY_ROW:
            if self._is_translator(what):
                raise SettingsError(
                    f"method {self.name!r}: the stage gives a translator, not every row; write {what}@everywhere"
                )
            self.every_row.append(self._check_hand_written(what))
        else:
            if where and self.policy not in (None, where):
                raise SettingsError(f"method {self.name!r}: the stage acts in one place, not {self.policy} and {where}")
            self.policy = where or self.policy
            self.nuisances.append(self._name_for_stage(what))

    def make_stage(self) -> StageSettings:
        """The stage that the words describe."""
        if not self.nuisances:
            return StageSettings()  # whom it would give to does not matter
        if self.more_real:
            raise SettingsError(
                f"method {self.name!r}: with more real images no class is small, so the stage has nothing to do"
            )
        stage = replace(self.benchmark.stage, nuisance="+".join(self.nuisances))
        if self.policy is not None:
            share = self._read_share()
            option = "maximum" if self.policy == "tail" else "probability"
            stage = replace(stage, policy=_WHERE[self.policy], policy_options={option: share})
        return replace(stage, nuisance_options=self.select_options(self.nuisances))

    def select_options(self, names: Sequence[str]) -> dict[str, Any]:
        """Those of the benchmark's options of nuisances that belong to `names`."""
        return {name: dict(options) for name, options in self.benchmark.nuisances.items() if name in names}

    def _read_share(self) -> float:
        """Share of the rows that the benchmark's own policy gives to at most."""
        options = self.benchmark.stage.policy_options
        return float(options.get("probability", options.get("maximum", 0.5)))

    def _fill(self, where: str) -> None:
        if where:
            raise SettingsError(f"method {self.name!r}: more real images are for the tail; drop @{where}")
        try:
            replace(self.benchmark.task, fill_tail=True)
        except SettingsError as error:
            raise SettingsError(f"method {self.name!r}: {error}") from error
        self.more_real = True

    def _name_for_stage(self, word: str) -> str:
        """The name of what the stage gives."""
        if not self._is_translator(word):
            return _WORDS[word] if word in _WORDS else self._check_hand_written(word)
        if self.choice is not None:
            raise SettingsError(f"method {self.name!r} names 2 translators; give one")
        self.choice = _ALIASES.get(word, word)
        if not self._has_file(word):
            self.given = GivenTranslator(word, compute_digest(word))
        return "translator"

    def _is_translator(self, word: str) -> bool:
        return "/" in word or self._has_file(word)

    def _has_file(self, word: str) -> bool:
        return _ALIASES.get(word, word) in configs.choice_names("translator")

    def _check_hand_written(self, word: str) -> str:
        try:
            build_nuisance(word, **self.benchmark.nuisances.get(word, {}))
        except SettingsError as error:
            known = [*_WORDS, MORE_REAL, *_ALIASES, *configs.choice_names("translator")]
            raise SettingsError(
                f"method {self.name!r}: {error}; or a translator, by folder or by name: {', '.join(known)}"
            ) from error
        return word


def compute_digest(folder: Path | str) -> str:
    """SHA-256 over the files of a saved translator.

    Raises:
        CheckpointError: there is no translator in `folder`.
    """
    path = Path(folder).expanduser()
    if (path / "translator").is_dir():
        path = path / "translator"
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no translator (no config.json); give a folder that fit wrote")
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.suffix in (".json", ".safetensors")):
        digest.update(file.relative_to(path).as_posix().encode())
        digest.update(read_regular(file))
    return digest.hexdigest()
