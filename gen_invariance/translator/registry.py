"""Every kind of translator in one table: its name in configs, its class, and how it is fitted."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from gen_invariance.data.images import ImageData
from gen_invariance.devices import check_network, plain_defaults
from gen_invariance.errors import SettingsError
from gen_invariance.run import named_generator
from gen_invariance.settings import check_options, read_settings
from gen_invariance.translator.objective import Objective
from gen_invariance.translator.settings import FitSettings

_OF_THE_LOOP = ("average", "budget", "watch_every")  # settings that only translators fitted by `fit_objective` have


@dataclass(frozen=True)
class TranslatorKind:
    """One row of the table. Dotted names are below `gen_invariance`; some of the modules are slow to import.

    Attributes:
        model: class of the translator, which its saved config names.
        settings: settings class of the objective, or of the fit function; None for neither.
        objective: `objective.Objective` made of the translator and these settings, for `fit.fit_objective`.
        fit: function that fits the translator in one go, in seconds: (translator, data, loop settings, settings, run,
            progress). Without an objective and a fit function there is nothing to fit.
        builder: function (data, network settings) for what the images choose of the network; None for nothing.
    """

    model: str
    settings: str | None = None
    objective: str | None = None
    fit: str | None = None
    builder: str | None = None

    @property
    def class_name(self) -> str:
        """Name of the translator's class."""
        return self.model.rpartition(".")[2]

    def load(self, what: str) -> Any:
        """The class or function that the attribute `what` names."""
        module, _, name = getattr(self, what).rpartition(".")
        return getattr(import_module(f"gen_invariance.{module}"), name)

    def build(self, data: ImageData, network: Mapping[str, Any]) -> nn.Module:
        """An untrained translator for images like `data`; initial weights come from the global random state."""
        if self.builder is not None:
            return self.load("builder")(data, network)
        make = functools.partial(
            self.load("model"), data.images.shape[1], **check_options(self.load("model"), network, "translator.network")
        )
        check_network(make, "a translator")
        return make()

    def read_settings(self, values: Mapping[str, Any]) -> Any:
        """The settings class made of plain values; None where there is none."""
        if self.settings is not None:
            return read_settings(self.load("settings"), values, "translator.objective")
        if values:
            raise SettingsError(f"translator.objective has no setting {next(iter(values))!r}: nothing is fitted")
        return None

    def check_loop(self, name: str, settings: FitSettings) -> None:
        """Raise `SettingsError` for a setting of the loop that would be passed over."""
        lacking: tuple[str, ...]
        if self.objective is None:
            lacking, reason = _OF_THE_LOOP, "is fitted in one go"
        elif self.load("objective").average_decay is not None:
            lacking, reason = ("average",), "keeps an average anyway, see its objective"
        else:
            return
        for each in lacking:
            if getattr(settings, each):
                raise SettingsError(f"translator {name!r} {reason}, so it has no fit.{each}; leave it out")


KINDS = {
    "redraw": TranslatorKind(
        "translator.redraw.model.RedrawTranslator",
        settings="translator.redraw.fit.PoseSettings",
        fit="translator.redraw.fit.fit_redraw",
        builder="translator.redraw.model.build_redraw",
    ),
    "pose": TranslatorKind(
        "translator.redraw.pose.PoseTranslator",
        settings="translator.redraw.fit.PoseSettings",
        fit="translator.redraw.fit.fit_pose",
    ),
    "spatial": TranslatorKind(
        "translator.spatial.SpatialTranslator",
        settings="translator.spatial.SpatialSettings",
        objective="translator.spatial.SpatialObjective",
    ),
    "flow": TranslatorKind(
        "translator.flow.model.FlowTranslator",
        settings="translator.flow.objective.FlowSettings",
        objective="translator.flow.objective.FlowObjective",
        builder="translator.flow.model.build_flow",
    ),
    "munit": TranslatorKind(
        "translator.munit.model.MunitTranslator",
        settings="translator.munit.model.MunitSettings",
        objective="translator.munit.model.MunitObjective",
    ),
    "img2img": TranslatorKind("contrib.img2img.DiffusersTranslator", builder="contrib.img2img.build_img2img"),
}
"""The kinds by the name that configs use."""


def find_kind(name: str) -> TranslatorKind:
    """The kind called `name` in configs; raises `SettingsError` where there is none."""
    if name not in KINDS:
        raise SettingsError(f"unknown translator {name!r}; choose one of {', '.join(KINDS)}")
    return KINDS[name]


@functools.cache
def kinds_by_class() -> dict[str, TranslatorKind]:
    """The kinds by the class that a saved config names."""
    return {kind.class_name: kind for kind in KINDS.values()}


@plain_defaults()
def build_objective(
    name: str,
    data: ImageData,
    *,
    network: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Objective:
    """The objective of the kind `name` ("spatial", "munit" or "flow") over a new translator for images like `data`.

    `network` are settings of the translator, without `channels`, `settings` those of the objective. `seed` decides the
    initial weights; the global random state is left alone.
    """
    kind = find_kind(name)
    with initial_weights_from(seed):
        translator = kind.build(data, network or {})
        return kind.load("objective")(translator, kind.read_settings(settings or {}))


@contextmanager
def initial_weights_from(seed: int) -> Iterator[None]:
    """Layers initialise themselves from the global random stream; lend it to them and give it back."""
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(named_generator(seed, "translator").get_state())
        yield
