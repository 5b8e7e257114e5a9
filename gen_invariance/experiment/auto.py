"""`translator=auto` and `stage=auto`: what is fitted, or given to the tail, is what won on simulated tails.

The comparison lies beside the run, in OUT-choice, and a translator that `train` fits in OUT-translator.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path

from gen_invariance.errors import SettingsError
from gen_invariance.experiment.choose import Chosen, run_choose
from gen_invariance.experiment.fit import Fitted, run_fit
from gen_invariance.experiment.launch import Say, say_nothing
from gen_invariance.experiment.settings import ChooseRun, FitRun, StageOfRun, TrainRun, TranslatorChoice
from gen_invariance.files import write_json
from gen_invariance.referee.candidates import Candidate, Translator
from gen_invariance.referee.settings import CandidateSettings
from gen_invariance.translator.quality.verdict import QUALITY_FILE, judge_by_gain, weights_digest
from gen_invariance.translator.settings import FitSettings

AUTO = "auto"
"""Name of a translator, or of a stage's nuisance, that is chosen."""


def run_auto_fit(settings: FitRun, *, say: Say = say_nothing) -> tuple[Chosen, Fitted | None]:
    """Compare candidates, then fit the translator of the best one on all images; None where no translator helps.

    Raises:
        SettingsError: settings that do not fit each other or the data; a run folder of other settings.
        DataError: too few images or classes to choose by.
        RunError: a training or the fit failed.
    """
    chosen = _choose(settings, say)
    translator = _find_translator(chosen.choice.chosen)
    if translator is None:
        return chosen, None
    if translator.folder is not None:
        raise SettingsError(f"the best translator is there already, in {translator.folder}; nothing is fitted")
    fitted = run_fit(replace(settings, translator=_as_choice(translator)), say=say)
    _keep_verdict(fitted.folder, chosen)
    return chosen, fitted


def choose_stage(settings: TrainRun, *, say: Say = say_nothing) -> tuple[TrainRun, Chosen]:
    """`settings` with stage and augmentation of the best candidate; its translator is fitted on all training images.

    Raises:
        SettingsError: settings that do not fit each other or the data; a run folder of other settings.
        DataError: too few images or classes to choose by.
        RunError: a training or the fit failed.
    """
    if settings.stage != replace(StageOfRun(), nuisance=AUTO):
        raise SettingsError("stage.nuisance=auto chooses the whole stage; leave the other settings of the stage out")
    chosen = _choose(settings, say)
    candidate = chosen.choice.chosen
    translator, folder = _find_translator(candidate), None
    if translator is not None:
        folder = translator.folder or str(_fit_beside(settings, translator, chosen, say))
    plain = [settings.augmentation] if settings.augmentation != "none" else []
    plain += [_name(part, candidate) for part in candidate.every_row]
    stage = StageOfRun()
    if candidate.stage:
        names = ["translator" if isinstance(part, Translator) else _name(part, candidate) for part in candidate.stage]
        stage = StageOfRun(
            nuisance="+".join(names),
            policy=candidate.policy,
            policy_options=dict(candidate.policy_options),
            translator=folder,
        )
    return replace(settings, stage=stage, augmentation="+".join(plain) or "none"), chosen


def _choose(settings: FitRun | TrainRun, say: Say) -> Chosen:
    """The comparison that belongs to a run, made or gone on with in the folder beside it."""
    if (Path(settings.out) / "run.json").exists() and not settings.resume:
        raise SettingsError(
            f"{settings.out} already holds a run; add resume=true to continue it, or choose another folder"
        )
    of_candidates = {each.name: getattr(settings.choose, each.name) for each in fields(CandidateSettings)}
    run = ChooseRun(
        **of_candidates,
        data=settings.data,
        seed=settings.seed,
        device=settings.device,
        out=f"{settings.out}-choice",
        resume=settings.resume,
        progress=settings.progress,
    )
    chosen = run_choose(run, say=say)
    for line in chosen.choice.lines():
        say(line)
    return chosen


def _find_translator(candidate: Candidate) -> Translator | None:
    if len(candidate.translators) > 1:
        raise SettingsError(f"{candidate.name!r} gives several translators, and a stage can hold one; name others")
    return candidate.translators[0] if candidate.translators else None


def _name(part: object, candidate: Candidate) -> str:
    if not isinstance(part, str):
        raise SettingsError(f"{candidate.name!r} holds an object, and a run's settings can hold names only")
    return part


def _as_choice(translator: Translator) -> TranslatorChoice:
    return TranslatorChoice(translator.kind, dict(translator.network), dict(translator.objective))


def _fit_beside(settings: TrainRun, translator: Translator, chosen: Chosen, say: Say) -> Path:
    """The translator fitted on all training images of a run, in the folder beside it."""
    run = FitRun(
        data=settings.data,
        translator=_as_choice(translator),
        fit=FitSettings(steps=max(settings.choose.fit_steps, 1)),
        seed=settings.seed,
        device=settings.device,
        out=f"{settings.out}-translator",
        resume=settings.resume,
        progress=settings.progress,
    )
    fitted = run_fit(run, say=say)
    _keep_verdict(fitted.folder, chosen)
    return fitted.folder


def _keep_verdict(folder: Path, chosen: Chosen) -> None:
    """Write what was measured beside the translator, where everything that reads verdicts finds it."""
    gain = chosen.choice.gain_of(chosen.choice.chosen.name).to_gain()
    if gain is None:
        return
    verdict = judge_by_gain(gain)
    about = {
        "verdict": verdict.word,
        "reasons": [*verdict.reasons, f"It was chosen in {chosen.folder}: {chosen.choice.reason}"],
        "strength": verdict.strength,
        "gain": asdict(gain),
        "translator_digest": weights_digest(folder),
    }
    write_json(folder / QUALITY_FILE, about)
