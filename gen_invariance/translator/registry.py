"""Fit any translator by its name: the one call behind the command line and the comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from gen_invariance.contrib.img2img import translator_over
from gen_invariance.data.images import ImageData
from gen_invariance.errors import SettingsError
from gen_invariance.run import Run, named_generator
from gen_invariance.settings import options_of, settings_of, typed
from gen_invariance.translator.build import build_objective
from gen_invariance.translator.fit import FitSettings, class_members, fit_translator, save_translator, write_grid
from gen_invariance.translator.flow.fit import FlowSettings, fit_flow
from gen_invariance.translator.flow.model import FlowTranslator, levels_for
from gen_invariance.translator.quality.monitor import Watch
from gen_invariance.translator.redraw.model import RedrawTranslator, build_redraw, fit_redraw
from gen_invariance.translator.redraw.pose import PoseSettings, PoseTranslator, fit_pose

_LOOP_ONLY = ("average", "budget", "watch_every")


SMALLEST = 4
"""Pixels of the smallest side of images that a translator can be fitted on."""


def fit_by_name(
    name: str,
    data: ImageData,
    loop: FitSettings,
    *,
    run: Run,
    network: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    watch: Watch | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """Fit the translator called `name` on `data`, save it to `run.path / "translator"`, and return it in eval mode.

    Args:
        name: "spatial", "munit", "pose", "redraw" or "flow".
        data: training images.
        loop: steps, batch size, head classes.
        run: of the fit.
        network: settings of the translator, without `channels`.
        objective: settings of the objective; of "pose" and "redraw" those of `PoseSettings` not in `loop`, of "flow"
            `FlowSettings`.
        progress: show a progress bar; None shows one on a terminal only.
        watch: see `fit_translator`.
        say: gets a line when the fit collapses, and when it stops early.

    Raises:
        SettingsError: unknown name, a setting that does not exist, or one of `loop` that this translator does not have;
            images of fewer than `SMALLEST` pixels a side.
        RunError: a loss became NaN or infinite.
    """
    name = typed(name, str, "translator.name")
    network = typed(network, Mapping | None, "translator.network")
    objective = typed(objective, Mapping | None, "translator.objective")
    channels, *sides = data.images.shape[1:]
    if min(sides) < SMALLEST:
        raise SettingsError(
            f"a translator is fitted on images of {SMALLEST} x {SMALLEST} pixels or more, got {sides[0]} x {sides[1]}; "
            "set data.image_size"
        )
    _check_loop(name, loop)
    seen = {"run": run, "progress": progress, "watch": watch, "say": say}
    if name == "img2img":  # nothing to fit: made of a pipeline in a folder
        return _write(translator_over(network or {}, channels=channels).to(data.device), data, loop, run)
    if name == "flow":
        options = settings_of(FlowSettings, objective or {}, "translator.objective")
        return fit_flow(_new_flow(data, network or {}, run), data, loop, options, **seen)
    if name not in ("pose", "redraw"):
        built = build_objective(name, channels=channels, seed=run.seed, network=network, **(objective or {}))
        return fit_translator(built, data, loop, **seen)
    shared = {each: getattr(loop, each) for each in ("steps", "batch_size", "classes", "head_from")}
    given = {**shared, **(objective or {})}
    settings = settings_of(PoseSettings, given, "translator.objective")
    with torch.random.fork_rng(devices=[]):
        # Layers initialise themselves from the global stream; lend it to them and give it back.
        torch.random.set_rng_state(named_generator(run.seed, "translator").get_state())
        if name == "redraw":
            translator, fit = _new_redraw(data, dict(network or {})), fit_redraw
        else:
            shape = options_of(PoseTranslator, network or {}, "translator.network")
            translator, fit = PoseTranslator(channels=channels, **shape), fit_pose
    fit(translator, data, settings, run=run, progress=progress)
    write_grid(run.path / "samples" / f"step-{loop.steps:08d}.png", translator, data, class_members(data, loop), run)
    save_translator(translator, run.path / "translator")
    return translator


def _check_loop(name: str, loop: FitSettings) -> None:
    """Raise `SettingsError` for a setting that would be passed over."""
    lacking = {"flow": ("average",)}.get(name, ()) if name in ("munit", "spatial", "flow") else _LOOP_ONLY
    for each in lacking:
        if getattr(loop, each):
            why = "keeps an average anyway, see its objective" if name == "flow" else "is fitted in one go"
            raise SettingsError(f"translator {name!r} {why}, so it has no fit.{each}; leave it out")


def _new_redraw(data: ImageData, network: dict[str, Any]) -> RedrawTranslator:
    """An untrained redraw translator for images like those of `data`; what is "auto" or None is chosen by them."""
    choice = {"parts": network.pop("parts", None), "kind": network.pop("kind", "auto")}
    return build_redraw(data, **choice, **options_of(RedrawTranslator, network, "translator.network"))


def _new_flow(data: ImageData, network: Mapping[str, Any], run: Run) -> FlowTranslator:
    """An untrained flow translator for images like those of `data`; levels that are not given suit their size."""
    shape = options_of(FlowTranslator, {k: v for k, v in network.items() if v is not None}, "translator.network")
    if "levels" not in shape:
        shape["levels"] = levels_for(min(data.images.shape[2:]), patch=shape.get("patch", 2))
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(named_generator(run.seed, "translator").get_state())
        return FlowTranslator(channels=data.images.shape[1], **shape)


def _write(translator: nn.Module, data: ImageData, loop: FitSettings, run: Run) -> nn.Module:
    """Save a translator that took no steps, and a sample grid of it."""
    write_grid(run.path / "samples" / "step-00000000.png", translator, data, class_members(data, loop), run)
    save_translator(translator, run.path / "translator")
    return translator
