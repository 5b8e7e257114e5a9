"""What a content view leaves out is really gone, and what it keeps is still there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from gen_invariance.errors import SettingsError
from gen_invariance.nuisance.thickness import dilate, erode
from gen_invariance.translator.flow.view import (
    REMOVABLE,
    check_removes,
    content_view,
    ranks,
    sample_view,
    standardised,
)


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def images(count=4, channels=1, size=8, seed=0):
    return torch.rand(count, channels, size, size, generator=seeded(seed))


def drawn(count, channels=1, *, side=0, sign=1.0):
    return {
        "shares": torch.full((count, channels), 1 / channels),
        "side": torch.full((count,), side),
        "sign": torch.full((count,), sign),
    }


@settings(max_examples=40, deadline=None)
@given(gain=st.floats(0.2, 3), bias=st.floats(-1, 1))
def test_brightness_and_contrast_always_go(gain, bias):
    plain = content_view(images(), removes=())
    torch.testing.assert_close(content_view(gain * images() + bias, removes=()), plain, atol=1e-4, rtol=0)
    torch.testing.assert_close(plain.mean((1, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(plain.square().mean((1, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)


def test_a_constant_image_has_an_empty_view():
    assert standardised(torch.full((2, 1, 4, 4), 0.3)).abs().max() < 1e-3
    assert content_view(torch.zeros(2, 3, 4, 4), removes=tuple(REMOVABLE)).abs().max() == 0


@pytest.mark.parametrize("curve", [torch.square, torch.sqrt, lambda x: 0.2 + 0.5 * x**3, torch.exp])
def test_every_rising_curve_goes_with_tone(curve):
    quantised = (images() * 20).round() / 20  # with ties
    plain = content_view(quantised, removes=("tone",))
    torch.testing.assert_close(content_view(curve(quantised), removes=("tone",)), plain, atol=1e-5, rtol=0)
    assert (content_view(torch.square(quantised), removes=()) - content_view(quantised, removes=())).abs().max() > 0.1


def test_ranks_are_mean_ranks():
    quantised = (images(3, 3) * 10).round() / 10
    expected = rankdata(quantised.flatten(1).numpy(), axis=1) - 0.5
    found = ranks(quantised).flatten(1) * quantised[0].numel()
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), atol=1e-3, rtol=0)


@pytest.mark.parametrize("removes", [("sign",), ("tone", "sign")])
def test_an_inverted_image_under_the_other_sign_has_the_same_view(removes):
    found = content_view(1 - images(), removes=removes, draw=drawn(4, sign=-1.0))
    torch.testing.assert_close(found, content_view(images(), removes=removes, draw=drawn(4)), atol=1e-4, rtol=0)
    torch.testing.assert_close(found, content_view(images(), removes=removes), atol=1e-4, rtol=0)
    kept = content_view(images(), removes=("tone",), draw=drawn(4, sign=-1.0))
    torch.testing.assert_close(kept, content_view(images(), removes=("tone",)), atol=0, rtol=0)


def test_colour_goes_and_every_channel_shows_the_same_grey():
    colour = images(channels=3)
    view = content_view(colour, removes=("colour",))
    assert torch.equal(view[:, 0], view[:, 1])
    torch.testing.assert_close(content_view(colour[:, [2, 0, 1]], removes=("colour",)), view, atol=1e-5, rtol=0)
    red = {**drawn(4, 3), "shares": torch.tensor([[1.0, 0.0, 0.0]]).expand(4, 3)}
    expected = standardised(colour[:, :1].expand(-1, 3, -1, -1))
    torch.testing.assert_close(content_view(colour, removes=("colour",), draw=red), expected, atol=1e-5, rtol=0)


def test_thickness_dilates_and_erodes_row_by_row():
    source, sides = images(7), torch.arange(-3, 4)
    found = content_view(source, removes=("thickness",), draw={**drawn(7), "side": sides})
    for row, side in enumerate(sides.tolist()):
        operation = dilate if side > 0 else erode
        expected = standardised(operation(source[row : row + 1], max(abs(side), 1)))
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-5, rtol=0)
    assert torch.equal(content_view(source, removes=("thickness",)), standardised(source))


def test_what_is_not_removed_does_not_look_at_the_draw():
    draw = sample_view((4, 3, 8, 8), generator=seeded())
    source = images(channels=3)
    assert torch.equal(content_view(source, removes=(), draw=draw), content_view(source, removes=()))


def test_draws_have_their_ranges_and_come_from_the_generator():
    draw = sample_view((500, 3, 8, 8), generator=seeded())
    torch.testing.assert_close(draw["shares"].sum(1), torch.ones(500))
    assert draw["shares"].min() >= 0
    assert set(draw["side"].tolist()) == set(range(-3, 4))
    assert set(draw["sign"].tolist()) == {-1.0, 1.0}
    again = sample_view((500, 3, 8, 8), generator=seeded())
    assert all(torch.equal(value, again[name]) for name, value in draw.items())


def test_rows_are_on_their_own():
    source, draw = images(6, 3), sample_view((6, 3, 8, 8), generator=seeded(2))
    whole = content_view(source, removes=tuple(REMOVABLE), draw=draw)
    alone = content_view(source[2:3], removes=tuple(REMOVABLE), draw={key: value[2:3] for key, value in draw.items()})
    torch.testing.assert_close(alone, whole[2:3], atol=1e-6, rtol=0)


def test_unknown_and_repeated_things_to_remove():
    for removes in (("blur",), ("tone", "tone")):
        with pytest.raises(SettingsError, match="removes must be some of tone, sign, colour, thickness"):
            check_removes(removes)
