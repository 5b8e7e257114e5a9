"""Untrained translators with the objective they are fitted by, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gen_invariance.errors import SettingsError
from gen_invariance.run import named_generator
from gen_invariance.settings import options_of, settings_of
from gen_invariance.translator.fit import Objective
from gen_invariance.translator.munit.model import MunitObjective, MunitTranslator, MunitWeights
from gen_invariance.translator.spatial import SpatialObjective, SpatialTranslator

TRANSLATORS = {"munit": (MunitTranslator, MunitObjective), "spatial": (SpatialTranslator, SpatialObjective)}
"""Translator and objective by the name used in configs."""


def build_objective(
    name: str, *, channels: int, seed: int = 0, network: Mapping[str, Any] | None = None, **options: Any
) -> Objective:
    """The objective called `name` over a new translator.

    Args:
        name: a key of `TRANSLATORS`.
        channels: 1 or 3.
        seed: of the initial weights; the global random state is left alone.
        network: settings of the translator, without `channels`.
        options: settings of the objective; `weights` of MUNIT may be a mapping.

    Raises:
        SettingsError: unknown name, or a setting that the translator or its objective does not have.
    """
    if not isinstance(name, str) or name not in TRANSLATORS:
        raise SettingsError(f"unknown translator {name!r}; choose one of {', '.join(TRANSLATORS)}")
    translator_class, objective_class = TRANSLATORS[name]
    if isinstance(options.get("weights"), Mapping):
        options["weights"] = settings_of(MunitWeights, options["weights"], "translator.objective.weights")
    network = options_of(translator_class, network or {}, "translator.network")
    options = options_of(objective_class, options, "translator.objective")
    _check_ranges({**network, **options})
    with torch.random.fork_rng(devices=[]):
        # Layers initialise themselves from the global stream; lend it to them and give it back.
        torch.random.set_rng_state(named_generator(seed, "translator").get_state())
        return objective_class(translator_class(channels=channels, **network), **options)


def _check_ranges(values: Mapping[str, Any]) -> None:
    """Counts and sizes are at least 1, rates positive, other numbers not negative, shares at most 1."""
    for name, value in values.items():
        low = 1 if isinstance(value, int) and name != "bank_size" else 0
        if isinstance(value, int | float) and (value < low or (name.endswith("rate") and value == 0)):
            expected = f"at least {low}" if isinstance(value, int) and not name.endswith("rate") else "positive"
            raise SettingsError(f"translator: {name} must be {expected}, got {value}")
        if name == "start" and value > 1:
            raise SettingsError(f"translator: start is a share of the cap and must be at most 1, got {value}")
