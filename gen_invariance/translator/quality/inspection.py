"""What is known about a translator after an inspection: its quality, and the parameters that it draws."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gen_invariance.data.images import ImageData
from gen_invariance.nuisance.protocol import Nuisance
from gen_invariance.run import named_generator
from gen_invariance.stats import Estimate, bootstrap_ratio
from gen_invariance.translator.quality.assess import Judge, Quality
from gen_invariance.translator.quality.measures import kolmogorov_distance, resultant_length

_SAME = {"degrees": "rotation"}  # what hand-written nuisances call a parameter -> what learned ones call it
_ANGLES = frozenset({"rotation"})


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

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        low, middle, high = torch.quantile(self.drawn.flatten(), torch.tensor([0.025, 0.5, 0.975])).tolist()
        return {
            "drawn": {"low": low, "median": middle, "high": high},
            "kolmogorov_distance": self.distance[0] if self.distance else None,
            "kolmogorov_if_equal": self.distance[1] if self.distance else None,
            "resultant_length": asdict(self.resultant) if self.resultant else None,
        }


@dataclass(frozen=True)
class Inspection:
    """All that `experiment.inspect` finds out about a translator.

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
    judge: Judge
    examples: Tensor
    example_labels: Tensor

    def to_json(self) -> dict[str, Any]:
        """Figures, verdict and parameters as plain values."""
        return {
            **self.quality.to_json(),
            "class_names": list(self.head.class_names),
            "parameters": {each.name: each.to_json() for each in self.parameters},
            "oracle": None if self.oracle is None else self.oracle.to_json(),
        }


def compare_parameters(
    nuisance: Nuisance, images: Tensor, *, truth: Nuisance | None = None, draws: int = 16, seed: int = 0
) -> tuple[Parameter, ...]:
    """What `nuisance` draws for `images`, by readable parameter; nothing for one that has no such parameters.

    Args:
        nuisance: one with `read_parameters(draw)`, or one whose draw holds a number for each image.
        images: float (N, C, H, W).
        truth: the nuisance that is in the data, if known.
        draws: rounds.
        seed: of the draws.
    """
    generator = named_generator(seed, "inspect", "parameters")
    drawn = _draw_parameters(nuisance, images, draws, generator)
    known = {} if truth is None else _draw_parameters(truth, images, draws, generator)
    parameters = []
    for name, values in drawn.items():
        true = known.get(name)
        distance = None
        if true is not None:
            # Two samples of one distribution are this far apart on average (mean of Kolmogorov's law).
            expected = 0.8687 * (1 / values.numel() + 1 / true.numel()) ** 0.5
            distance = (kolmogorov_distance(values, true), expected)
        resultant = bootstrap_ratio(resultant_length(values.T), generator=generator) if name in _ANGLES else None
        parameters.append(Parameter(name, values, true, distance, resultant))
    return tuple(parameters)


def _draw_parameters(nuisance: Nuisance, images: Tensor, draws: int, generator: torch.Generator) -> dict[str, Tensor]:
    """`draws` draws for each image as named numbers (S, N), on the CPU."""
    read = getattr(nuisance, "read_parameters", None)
    rounds: list[dict[str, Tensor]] = []
    for _ in range(draws):
        draw = nuisance.sample(images.shape, generator=generator)
        with torch.no_grad():
            values = draw if read is None else read(draw)
        plain = {name.rsplit(".", 1)[-1]: value.detach().float().cpu() for name, value in values.items()}
        rounds.append({_SAME.get(name, name): value for name, value in plain.items() if value.shape == (len(images),)})
    return {name: torch.stack([values[name] for values in rounds]) for name in rounds[0]}
