"""Three-valued effects of transfer: against a loop over figures with scipy, Holm by hand, the better baseline."""

import math

import numpy as np
import pytest
from scipy import stats

from gen_invariance.errors import SettingsError, ShapeError
from studies.transfer_effects import best_baseline, transfer_effect

WORDS = {1: "helps", -1: "harms", 0: "undecided"}


def test_states_against_a_loop():
    rng = np.random.default_rng(0)
    transferred, baseline = rng.normal(0.5, 0.1, (40, 5)), rng.normal(0.5, 0.1, (40, 5))
    transferred[:10] += 0.4
    transferred[10:20] -= 0.4
    found = transfer_effect(transferred, baseline)
    for row in range(40):
        p_value = stats.ttest_rel(transferred[row], baseline[row]).pvalue
        sign = int(np.sign((transferred[row] - baseline[row]).mean())) if p_value < 0.05 else 0
        assert found.state[row] == WORDS[sign]
        interval_says = int(found.difference.low[row] > 0) - int(found.difference.high[row] < 0)
        assert interval_says == sign
    assert set(found.state) == set(WORDS.values())
    assert found.share("helps") == pytest.approx(np.mean(found.state == "helps"))


def test_one_number_one_seed_and_equal_differences():
    assert str(transfer_effect([0.9, 0.8, 0.85], [0.5, 0.5, 0.5]).state) == "helps"
    assert str(transfer_effect([0.9], [0.1]).state) == "undecided"
    assert str(transfer_effect([0.5, 0.5], [0.5, 0.5]).state) == "undecided"
    assert math.isnan(transfer_effect([math.nan], [0.1]).share("helps"))


def test_holm_takes_back_chance_findings():
    rng = np.random.default_rng(1)
    transferred, baseline = rng.normal(0, 1, (200, 4)), rng.normal(0, 1, (200, 4))
    plain = transfer_effect(transferred, baseline)
    corrected = transfer_effect(transferred, baseline, holm=True)
    assert plain.share("undecided") < 1
    assert corrected.share("undecided") == 1


def test_best_baseline_is_chosen_for_each_figure():
    scratch, start = [[0.5, 0.6], [0.9, math.nan]], [[0.7, 0.3], [0.1, 0.2]]
    found = best_baseline({"scratch": scratch, "start": start})
    np.testing.assert_array_equal(found, [[0.5, 0.6], [0.9, math.nan]])
    np.testing.assert_array_equal(best_baseline({"a": [0.1, 0.1], "b": [0.1, 0.2]}), [0.1, 0.2])


def test_bad_input():
    with pytest.raises(ShapeError, match="equal shapes"):
        transfer_effect([0.1, 0.2], [0.1])
    with pytest.raises(SettingsError, match="level"):
        transfer_effect([0.1, 0.2], [0.1, 0.3], level=2)
    with pytest.raises(SettingsError, match="one shape"):
        best_baseline({"a": [0.1], "b": [0.1, 0.2]})
    with pytest.raises(SettingsError, match="one shape"):
        best_baseline({})
