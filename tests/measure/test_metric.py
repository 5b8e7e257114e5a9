import pytest
import torch

import gen_invariance.torchvision_guard  # noqa: F401

pytest.importorskip("torchmetrics")

from gen_invariance import Rotation, measure_invariance
from gen_invariance.errors import RangeError, SettingsError, ShapeError
from gen_invariance.measure.metric import ExpectedKL


@pytest.fixture
def model():
    torch.random.set_rng_state(torch.Generator().manual_seed(0).get_state())
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4)).eval()


@pytest.fixture
def data(generator):
    return torch.rand(37, 1, 8, 8, generator=generator), torch.randint(3, (37,), generator=generator)


def gather(metric, model, images, labels, draws, rows):
    for draw in draws:
        moved = Rotation(90).apply(images[rows], {name: value[rows] for name, value in draw.items()})
        metric.update(model(images[rows]), model(moved), labels[rows])


def draws_of(images, number=3):
    generator = torch.Generator().manual_seed(7)
    return [Rotation(90).sample(images.shape, generator=generator) for _ in range(number)]


def test_agrees_with_measure_invariance_whatever_the_batches(model, data):
    images, labels = data
    expected = measure_invariance(
        model, images, labels, Rotation(90), draws=3, generator=torch.Generator().manual_seed(7)
    )
    metric = ExpectedKL(4, average="none")
    for rows in torch.arange(37).split(8):
        gather(metric, model, images, labels, draws_of(images), rows)
    torch.testing.assert_close(metric.compute(), expected.ekld, equal_nan=True)
    assert metric.compute()[3].isnan()  # no image of class 3
    macro = ExpectedKL(4)
    gather(macro, model, images, labels, draws_of(images), torch.arange(37))
    assert macro.compute() == pytest.approx(float(expected.ekld[:3].mean()))


def test_processes_add_up_as_one(model, data):
    images, labels = data
    whole, parts = ExpectedKL(4, average="none"), [ExpectedKL(4, average="none") for _ in range(2)]
    gather(whole, model, images, labels, draws_of(images), torch.arange(37))
    for rank, part in enumerate(parts):
        gather(part, model, images, labels, draws_of(images), torch.arange(rank, 37, 2))
    states = {name: [getattr(part, name).clone() for part in parts] for name in ("total", "count")}
    parts[0].dist_sync_fn = lambda state, group=None: states["total" if state.is_floating_point() else "count"]
    parts[0].distributed_available_fn = lambda: True
    parts[0]._computed = None
    torch.testing.assert_close(parts[0].compute(), whole.compute(), equal_nan=True)


def test_equal_answers_give_exactly_zero_and_reset_forgets(model, data):
    images, labels = data
    metric = ExpectedKL(4)
    metric.update(model(images), model(images), labels)
    assert metric.compute() == 0.0
    metric.reset()
    assert metric.count.sum() == 0


def test_wrong_input_is_named(model, data):
    images, labels = data
    metric = ExpectedKL(4)
    with pytest.raises(ShapeError, match="two sets of logits"):
        metric.update(model(images), model(images)[:5], labels)
    with pytest.raises(RangeError, match="labels must lie"):
        metric.update(model(images), model(images), labels + 2)
    with pytest.raises(SettingsError, match="average"):
        ExpectedKL(4, average="micro")
    with pytest.raises(SettingsError, match="num_classes"):
        ExpectedKL(0)
