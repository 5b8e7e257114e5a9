"""`run_fit`: one fit of a translator, from settings to a run folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from gen_invariance.data.images import ImageData
from gen_invariance.experiment.inspect import train_judge
from gen_invariance.experiment.launch import Say, open_run_folder, prepare_on_device, say_nothing
from gen_invariance.experiment.settings import FitRun, InspectSettings
from gen_invariance.translator.fit import fit_translator
from gen_invariance.translator.quality.monitor import Evaluate, make_evaluator, split_for_judge
from gen_invariance.translator.settings import FitSettings


@dataclass(frozen=True)
class Fitted:
    """A fitted translator and the run folder that holds it.

    Attributes:
        translator: in eval mode.
        folder: of the run.
    """

    translator: nn.Module
    folder: Path

    @property
    def sample_grid(self) -> Path | None:
        """The picture of translated images to look at: of the weights that were kept, else of the last step."""
        grids = sorted((self.folder / "samples").glob("*.png"))
        kept = self.folder / "samples" / "kept.png"
        if kept in grids:
            return kept
        return grids[-1] if grids else None


def run_fit(settings: FitRun, *, say: Say = say_nothing) -> Fitted:
    """Prepare the data, fit the translator on it and save it in the run folder.

    Raises:
        SettingsError: settings that do not fit each other or the data; the run folder of other settings.
        RunError: the fit failed.
    """
    prepared = prepare_on_device(
        settings.data, seed=settings.seed, device=settings.device, need_test=False, progress=settings.progress, say=say
    )
    loop = settings.fit
    if loop.flip is None:
        loop = replace(loop, flip=prepared.flip_safe)
    height, width = prepared.train.images.shape[2:]
    identity = {
        "data": settings.data.identity(),
        "translator": asdict(settings.translator),
        "fit": loop.identity(),
        "image_size": width if height == width else None,  # `augment` scales pictures to it
    }
    with open_run_folder(settings, "fit", identity, prepared.split) as run:
        translator = fit_translator(
            settings.translator.name,
            prepared.train,
            loop,
            network=settings.translator.network,
            objective=settings.translator.objective,
            out=run,
            progress=settings.progress,
            evaluate=build_evaluator(prepared.train, loop, seed=run.seed, say=say) if loop.watch_every else None,
            say=say,
        )
    return Fitted(translator, run.path)


def build_evaluator(data: ImageData, settings: FitSettings, *, seed: int, say: Say) -> Evaluate:
    """Evaluation of a fit, with a judge that is trained here on the images that are fitted on."""
    seen, held_out = split_for_judge(data, settings, seed=seed)
    say(f"training a judge on {len(seen)} images of {seen.num_classes} classes, {len(held_out)} are held out ...")
    return make_evaluator(seen, held_out, judge=train_judge(seen, InspectSettings(), seed=seed), seed=seed)
