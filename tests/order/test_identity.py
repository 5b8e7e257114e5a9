import json

import pytest
import torch

from gen_invariance.experiment.order import describe_cells
from gen_invariance.experiment.settings import OrderRun
from gen_invariance.nuisance.compose import Compose
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.nuisance.intensity import Background, Lighting
from gen_invariance.order.identity import describe_value
from gen_invariance.order.settings import AnalysisSettings, OrderSettings
from gen_invariance.translator.munit.model import MunitTranslator


class Own:
    """Somebody's nuisance, which keeps what it needs in all sorts of attributes."""

    def __init__(self, strength, table=None, pick=None):
        self._strength, self.table, self.pick = strength, table, pick

    def __call__(self):
        return self._strength


def turned(value):
    return value


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Rotation(30), Rotation(60)),
        (Rotation(30), Rotation(30, mode="bilinear")),
        (Rotation(30), Lighting()),
        (Compose([Rotation(30), Background()]), Compose([Background(), Rotation(30)])),
        (Compose([Rotation(30)]), Compose([Rotation(31)])),
        (Own(1), Own(2)),
        (Own(1, torch.zeros(2, 2)), Own(1, torch.zeros(4))),
        (Own(1, torch.zeros(2)), Own(1, torch.tensor([0.0, 1e-30]))),
        (Own(1, pick=turned), Own(1, pick=len)),
        (Rotation(30), None),
    ],
)
def test_what_acts_differently_has_another_identity(one, other):
    assert describe_value(one) != describe_value(other)


def test_the_same_again_has_the_same_identity_and_fits_into_json():
    for make in (
        lambda: Compose([Rotation(30), Background(7)]),
        lambda: Own(1, [torch.arange(3.0), {"deep": Rotation(1)}], pick=turned),
    ):
        assert describe_value(make()) == describe_value(make())
        assert json.loads(json.dumps(describe_value(make()))) == describe_value(make())
    assert describe_value(Rotation(30)) == {"class": "Rotation", "degrees": 30, "mode": "bicubic"}


def test_a_learned_nuisance_is_its_settings_and_its_weights():
    made = MunitTranslator(channels=1, width=4, residual_blocks=1)
    before = describe_value(made)
    assert before["class"] == "MunitTranslator"
    assert before["width"] == 4
    assert describe_value(made.half().float()) != before, "rounded weights are other weights"
    copy = MunitTranslator(channels=1, width=4, residual_blocks=1)
    copy.load_state_dict(made.state_dict())
    assert describe_value(copy) == describe_value(made)
    with torch.no_grad():
        next(copy.parameters()).flatten()[0] += 1
    assert describe_value(copy) != describe_value(made)


def test_cells_do_not_depend_on_how_they_are_read():
    def describe(**options):
        return describe_cells(OrderRun(order=OrderSettings(**options)), None)

    base = describe()
    assert describe(analysis=AnalysisSettings(threshold=0.7), seeds=(5,), head="knn") == base
    assert describe(pool=7) != base
    assert describe(draws=7) != base
    tuned = describe(mode="full")
    assert describe(mode="full", choose="pairs") != tuned, "its cells hold chosen targets"
