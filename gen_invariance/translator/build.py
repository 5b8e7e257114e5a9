"""Untrained translators with the objective they are fitted by, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gen_invariance.errors import SettingsError
from gen_invariance.run import named_generator
from gen_invariance.translator.fit import Objective
from gen_invariance.translator.munit import MunitObjective, MunitTranslator, MunitWeights
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
    if name not in TRANSLATORS:
        raise SettingsError(f"unknown translator {name!r}; choose one of {', '.join(TRANSLATORS)}")
    translator_class, objective_class = TRANSLATORS[name]
    if isinstance(options.get("weights"), Mapping):
        options["weights"] = MunitWeights(**options["weights"])
    with torch.random.fork_rng(devices=[]):
        # Layers initialise themselves from the global stream; lend it to them and give it back.
        torch.random.set_rng_state(named_generator(seed, "translator").get_state())
        try:
            return objective_class(translator_class(channels=channels, **(network or {})), **options)
        except TypeError as error:
            raise SettingsError(f"translator {name}: {error}") from error
