"""How much of the training a stage translates, and what a run is called where that is nothing."""

from __future__ import annotations

from dataclasses import dataclass

from gen_invariance.augment.policy import policy
from gen_invariance.experiment.cell import StageSettings
from gen_invariance.experiment.task import Prepared
from gen_invariance.nuisance.compose import is_identity

NOTHING = "nothing translated"


@dataclass(frozen=True)
class GivenShare:
    """The stage's probability, averaged.

    Attributes:
        rows: over training images: the share of rows that is translated where images are drawn as they come.
        classes: over the classes that have images: the share where classes are drawn evenly. 0 means nothing at all.
    """

    rows: float
    classes: float


def given_share(settings: StageSettings, prepared: Prepared) -> GivenShare:
    """The share that the stage of `settings` translates of the prepared training images; 0 where it only repeats them.

    Raises:
        SettingsError: an unknown policy or option.
    """
    idle = {"none", "identity", *(["true"] if is_identity(prepared.nuisance) else [])}
    if all(name.strip() in idle for name in settings.nuisance.split("+")):
        return GivenShare(0.0, 0.0)
    counts = prepared.train.counts.cpu()
    probability = policy(settings.policy, counts, **settings.policy_options).double()
    rows = float((probability * counts).sum() / counts.sum().clamp(min=1))
    return GivenShare(rows, float(probability[counts > 0].mean()) if (counts > 0).any() else 0.0)


def stage_label(nuisance: str, share: GivenShare | None) -> str:
    """What a run with this stage is called; `share` is None where it is not known.

    >>> stage_label("translator", GivenShare(0.0, 0.0)), stage_label("none", GivenShare(0.0, 0.0))
    ('translator (nothing translated)', 'none')
    """
    nothing = share is not None and share.classes == 0 and nuisance != "none"
    return f"{nuisance} ({NOTHING})" if nothing else nuisance


def untranslated_note(settings: StageSettings, share: GivenShare, *, translator: bool, verdict: str = "") -> str | None:
    """One line for `train` where a translation was asked for and none takes place; None otherwise.

    Args:
        settings: of the stage.
        share: from `given_share`.
        translator: whether a fitted translator was named.
        verdict: what `inspect` says of it, where the policy obeyed that.
    """
    if share.classes > 0 or (settings.nuisance == "none" and not translator):
        return None
    if settings.nuisance == "none":
        return "note: nothing is translated: stage.nuisance is none, so stage.translator is not used"
    if verdict:
        return (
            f"note: inspect says '{verdict}', so nothing is translated; stage.policy=everywhere would translate "
            "nevertheless"
        )
    names = {name.strip() for name in settings.nuisance.split("+")}
    if names <= {"identity", "true"}:
        return f"note: nothing is translated: stage.nuisance={settings.nuisance} leaves these images as they are"
    return f"note: nothing is translated: stage.policy={settings.policy} gives every class the probability 0"
