"""Sizes and counts beyond all sense are refused in a line, before the memory or the patience of anybody is used up."""

import typing
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo
from torch import nn

import gen_invariance.devices as devices
from gen_invariance import Rotation, load_source, make_long_tailed
from gen_invariance.augment.cache import TranslationBank
from gen_invariance.benchmark.run import parse_numbers
from gen_invariance.cli.main import run
from gen_invariance.cli.verbs import VERBS
from gen_invariance.data.images import ImageData, resize_images
from gen_invariance.data.loader import ResidentLoader
from gen_invariance.devices import check_network, memory_of
from gen_invariance.errors import SettingsError
from gen_invariance.settings import check_options, is_settings_class
from gen_invariance.translator.fit import fit_translator
from gen_invariance.translator.registry import KINDS
from gen_invariance.translator.settings import FitSettings

ANY_NUMBER = {"seed", "seeds", "orders", "heldout_classes", "many_above", "few_below", "target"}
"""Settings that are numbers of things rather than how many there are; `target` has a limit of its own."""


def limits(hint):
    """Whether a type hint holds a whole number, and its largest value."""
    for part in typing.get_args(hint):
        metadata = part.metadata if isinstance(part, FieldInfo) else (part,)
        yield from (limit for each in metadata for name in ("le", "lt") if (limit := getattr(each, name, None)))
        yield from limits(part)


def whole_numbers(kind, before=""):
    """(dotted name, largest value or None) of the settings of a class that are whole numbers, nested."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for name, field in kind.__pydantic_fields__.items():
        if is_settings_class(field.annotation):
            yield from whole_numbers(field.annotation, f"{before}{name}.")
            continue
        kinds = [getattr(each, "__origin__", each) for each in (field.annotation, *typing.get_args(field.annotation))]
        if int in kinds:
            yield before + name, min(limits(hints[name]), default=None)


VERB_NUMBERS = [(verb, name, most) for verb, each in VERBS.items() for name, most in whole_numbers(each.settings)]


def test_every_whole_number_of_a_verb_has_a_largest_value():
    unbounded = {name.rpartition(".")[2] for _, name, most in VERB_NUMBERS if most is None}
    assert unbounded <= ANY_NUMBER
    assert len(VERB_NUMBERS) > 100


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.sampled_from([n for n in VERB_NUMBERS if n[2]]), power=st.integers(0, 60))
def test_numbers_beyond_it_are_refused_in_a_line(number, power, tmp_path_factory, capfd):
    verb, name, most = number
    out = Path(tmp_path_factory.getbasetemp()) / "absurd"
    words = [f"{name}={most + 10**power}", f"out={out}"] if "out" in VERBS[verb].settings.__pydantic_fields__ else []
    words += {"augment": ["data.path=x"], "compare": ["original=x", "augmented=y"]}.get(verb, [])
    words += ["run=x"] if verb == "measure" else ["translator=x"] if verb == "inspect" else []
    words = words or [f"{name}={most + 10**power}"]
    assert run([verb, *(f"{name}={most + 10**power}" if w.startswith(f"{name}=") else w for w in words)]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert not out.exists()


@pytest.mark.parametrize("name", ["redraw", "spatial", "munit", "flow", "pose"])
@given(data=st.data())
@settings(max_examples=5, deadline=None)
def test_networks_of_absurd_sizes_cost_nothing(name, data):
    model = KINDS[name].load("model")
    names = {"redraw": ["width", "bank_size", "side"], "pose": ["width", "bank_size"], "spatial": []}.get(name)
    if name == "munit":
        names = ["width", "downsamples", "residual_blocks", "style_dim", "style_downsamples", "mlp_width", "bank_size"]
    if name == "flow":
        names = ["style_dim", "width", "levels", "patch", "bank_size", "steps"]
    if names:
        option, power = data.draw(st.sampled_from(names)), data.draw(st.integers(7, 30))
        with pytest.raises(SettingsError, match=option):
            check_options(model, {option: 10**power}, "translator.network")
    objective = KINDS[name].load("settings")
    for field in {"discriminator_width", "discriminator_layers"} & objective.__pydantic_fields__.keys():
        with pytest.raises(SettingsError, match=field):
            objective(**{field: 10 ** data.draw(st.integers(5, 30))})


@pytest.mark.parametrize(
    ("network", "objective"),
    [({"width": 4096, "downsamples": 4}, {}), ({}, {"discriminator_width": 4096, "discriminator_layers": 9})],
)
def test_networks_that_only_together_are_too_large_are_refused(network, objective):
    images = ImageData(torch.zeros(30, 1, 16, 16, dtype=torch.uint8), torch.zeros(30, dtype=torch.int64), ("a",))
    with pytest.raises(SettingsError, match="of these sizes would take"):
        fit_translator("munit", images, FitSettings(steps=1), network=network, objective=objective, progress=False)


def test_lists_of_numbers_are_not_written_out_without_end():
    with pytest.raises(SettingsError, match="at most 10000 numbers"):
        parse_numbers("0-999999999999", "orders")


def test_weights_are_counted_without_being_made(monkeypatch):
    monkeypatch.setattr(devices, "memory_of", lambda device: 16 * 110)
    check_network(partial(nn.Linear, 9, 11), "it")
    state = torch.get_rng_state()
    with pytest.raises(SettingsError, match="training it of these sizes"):
        check_network(partial(nn.Linear, 10, 11), "it")
    assert torch.equal(torch.get_rng_state(), state)  # initial weights that follow are what they were


@given(side=st.integers(2, 40), count=st.integers(1, 9), batch=st.integers(1, 12), memory=st.integers(1, 10**6))
@settings(max_examples=40, deadline=None)
def test_images_and_batches_are_refused_exactly_where_they_do_not_fit(side, count, batch, memory):
    images = torch.zeros(count, 1, 4, 4, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "memory_of", lambda device: memory)
        if side != 4 and count * side * side > memory:
            with pytest.raises(SettingsError, match=f"{count} images of {side} x {side} pixels"):
                resize_images(images, side)
        else:
            assert resize_images(images, side).shape[2:] == (side, side)
        data = ImageData(images, torch.zeros(count, dtype=torch.int64), ("a",))
        if min(batch, count) * 16 * 128 > memory:
            with pytest.raises(SettingsError, match="a batch of"):
                ResidentLoader(data, batch_size=batch)
        else:
            ResidentLoader(data, batch_size=batch)


def test_repeated_images_and_banks_are_refused_before_they_are_made():
    source = load_source("digits")
    with pytest.raises(SettingsError, match="repeated as shortage=repeat says, would take"):
        make_long_tailed(source, largest=10**9, shortage="repeat", rest_is_test=True)
    with pytest.raises(SettingsError, match="images of 16 x 16 pixels would take"):
        TranslationBank(Rotation(30), source.train.images, versions=10**9)


def test_the_memory_of_this_machine_is_known():
    assert 1e8 < memory_of("cpu") < 1e15
