"""Stratified draws: the same draws, each still one of the nuisance's, an image's own spread, sharper figures."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gen_invariance.measure.invariance import measure_invariance
from gen_invariance.measure.stratified import StratifiedDraws
from gen_invariance.nuisance.compose import Compose, Identity
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.nuisance.intensity import Lighting
from gen_invariance.run import named_generator

COUNT = 400


class Shift:
    """Adds a uniform number to each image."""

    def sample(self, shape, *, generator):
        return {"shift": torch.rand(shape[0], generator=generator)}

    def apply(self, images, draw):
        return images + draw["shift"].view(-1, 1, 1, 1)


def places(rounds, seed=0, count=COUNT):
    """What each image is assigned, (rounds, N)."""
    generator = named_generator(seed)
    stratified = StratifiedDraws(count, generator=generator)
    drawn = [Shift().sample((count,), generator=generator) for _ in range(rounds)]
    return torch.stack([stratified.assign(draw)["shift"] for draw in drawn])


@given(st.integers(1, 30), st.integers(0, 10**6))
def test_a_round_assigns_the_draws_it_was_given(count, seed):
    nuisance = Compose([Lighting(), Rotation()])
    draw = nuisance.sample((count, 1, 8, 8), generator=named_generator(seed))
    assigned = StratifiedDraws(count, generator=named_generator(seed, "start")).assign(draw)
    assert assigned.keys() == draw.keys()
    rows = [torch.cat([value.reshape(count, -1).double() for value in each.values()], 1) for each in (draw, assigned)]
    ordered = [sorted(map(tuple, row.tolist())) for row in rows]
    assert ordered[0] == ordered[1], "rows stay together"


def test_nothing_drawn_is_nothing_assigned():
    draw = Identity().sample((5, 1, 4, 4), generator=named_generator(0))
    assert StratifiedDraws(5, generator=named_generator(1)).assign(draw).keys() == draw.keys()


def test_every_draw_of_every_image_is_still_uniform():
    found = torch.stack([places(7, seed)[:, :4] for seed in range(600)])  # (seeds, rounds, images)
    levels = torch.linspace(0.1, 0.9, 9)
    shares = (found[..., None] < levels).double().mean(0)
    assert (shares - levels).abs().max() < 5 * 0.5 / 600**0.5


@pytest.mark.parametrize("rounds", [3, 5, 8, 13, 21])
def test_an_images_own_draws_leave_no_wide_gap(rounds):
    own, other = places(rounds), torch.rand(rounds, COUNT, generator=named_generator(1))
    widest = []
    for each in (own, other):
        each = each.sort(0).values
        around = torch.cat([each, each[:1] + 1])  # the range is a circle to the golden ratio
        widest.append(float(around.diff(dim=0).max(0).values.mean()))
    assert widest[0] < 0.8 * widest[1]
    half = (own < 0.5).double().mean(0)
    assert (half - 0.5).abs().max() <= 1 / rounds + 0.15, "as many below the middle as above it"


def test_figures_are_as_expected_and_sharper():
    """KL of a logistic model under a uniform shift, against its integral."""
    images, labels = torch.zeros(COUNT, 1, 1, 1), torch.zeros(COUNT, dtype=torch.int64)

    def predict(images):
        value = 4 * images[:, 0, 0, 0]
        return torch.stack([value, torch.zeros_like(value)], dim=1)

    shift = torch.linspace(0, 1, 20001, dtype=torch.float64)
    q = torch.sigmoid(4 * shift)
    truth = float(torch.trapezoid(0.5 * (0.5 / q).log() + 0.5 * (0.5 / (1 - q)).log(), shift))
    errors = {}
    for stratified in (False, True):
        found = [
            measure_invariance(
                predict, images, labels, Shift(), draws=8, stratified=stratified, generator=named_generator(seed)
            )
            for seed in range(20)
        ]
        means = torch.stack([scores.ekld[0] for scores in found])
        assert abs(float(means.mean()) - truth) < 5 * float(means.std()) / 20**0.5
        errors[stratified] = float(torch.stack([scores.standard_error[0] for scores in found]).mean())
    assert errors[True] < 0.45 * errors[False], "five times as many independent draws"


def test_equal_generators_assign_equally():
    assert torch.equal(places(5, seed=3), places(5, seed=3))
    assert not torch.equal(places(5, seed=3), places(5, seed=4))
