import numpy as np
import pytest
from scipy import stats

from gen_invariance.errors import SettingsError, ShapeError
from gen_invariance.order.analysis.accuracy import accuracy_relation


def table(mean, noise=0.001, seeds=8):
    mean = np.asarray(mean, dtype=float)
    return mean + np.random.default_rng(0).normal(0, noise, (seeds, *mean.shape))


CHAIN = [[0.90, 0.89, 0.87], [0.90, 0.91, 0.89], [0.9, 0.9, 0.91]]


def test_three_states_and_the_diagonal():
    relation = accuracy_relation(table([[0.9, 0.7, 0.9], [0.9, 0.9, 0.9], [0.9, 0.88, 0.9]]), margin=0.02)
    assert relation.inferior[0, 1]
    assert relation.non_inferior[1, 0]
    assert not relation.inferior[2, 1]
    assert not relation.non_inferior[2, 1], "exactly at the margin stays undecided"
    assert relation.non_inferior.diagonal().all()
    assert not (relation.non_inferior & relation.inferior).any()


def test_p_values_are_paired_one_sided_with_holm():
    accuracy = table(CHAIN, noise=0.01, seeds=6)
    relation = accuracy_relation(accuracy, margin=0.02)
    cells, p = [], []
    for a in range(3):
        for b in range(3):
            if a != b:
                cells.append((a, b))
                gap = accuracy[:, a, b] - accuracy[:, b, b]
                p.append(stats.ttest_1samp(gap, -0.02, alternative="greater").pvalue)
    alive = True
    for rank, n in enumerate(np.argsort(p)):
        alive = alive and p[n] <= 0.05 / (len(p) - rank)
        assert relation.non_inferior[cells[n]] == alive


def test_intransitivity_and_closure():
    relation = accuracy_relation(table([[0.9, 0.89, 0.85], [0.7, 0.9, 0.89], [0.7, 0.7, 0.9]]), margin=0.02)
    assert set(relation.graph.edges) == {(0, 1), (1, 2)}
    assert relation.intransitive == 1
    assert relation.closure_inflation == pytest.approx(0.5)
    with pytest.warns(UserWarning, match="adds 50%"):
        assert set(relation.closure().edges) == {(0, 1), (1, 2), (0, 2)}


def test_closure_above_half_is_refused_unless_forced():
    means = np.full((4, 4), 0.7) + np.eye(4) * 0.2
    for n in range(3):
        means[n, n + 1] = 0.9
    relation = accuracy_relation(table(means), margin=0.02)
    assert relation.closure_inflation == pytest.approx(1.0)
    with pytest.raises(SettingsError, match="adds 100%"):
        relation.closure()
    with pytest.warns(UserWarning, match="adds 100%"):
        assert relation.closure(force=True).graph["inflation"] == pytest.approx(1.0)


def test_transitive_graphs_close_silently(recwarn):
    relation = accuracy_relation(table(np.full((3, 3), 0.9)), margin=0.02)
    assert relation.closure_inflation == 0
    relation.closure()
    assert not recwarn.list


def test_bad_tables_are_refused():
    with pytest.raises(ShapeError, match="two seeds"):
        accuracy_relation(np.ones((1, 2, 2)))
    with pytest.raises(ShapeError):
        accuracy_relation(np.ones((3, 2, 3)))
