import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_invariance.errors import CheckpointError, SettingsError, ShapeError
from gen_invariance.order.analysis.sensitivity import sweep_threshold
from gen_invariance.order.bootstrap import CellBounds, Resamples, cell_bounds
from gen_invariance.order.preorder import Preorder
from gen_invariance.order.relation import SubsetOrder, inclusion, subset_order
from gen_invariance.order.sets import class_pairs

tables = st.tuples(st.integers(1, 7), st.integers(4, 5), st.integers(0, 2**31)).map(
    lambda key: (key, np.random.default_rng(key[2]))
)


def make(key, rng, *, width=None, threshold=0.8):
    count, classes, _ = key
    pairs = class_pairs(classes)
    estimate = rng.choice([0.55, 0.7, 0.79, 0.8, 0.85, 0.9, 0.95], size=(count, len(pairs)))
    half = rng.choice([0.0, 0.02, 0.12], size=estimate.shape) if width is None else width
    bounds = CellBounds(estimate, estimate - half, estimate + half, 0.05, "bonferroni", 5)
    everything = [s for k in range(2, classes + 1) for s in itertools.combinations(range(classes), k)]
    subsets = [(), *everything][:count]
    names = [f"c{n}" for n in range(classes)]
    return bounds, subset_order(bounds, subsets=subsets, pairs=pairs, threshold=threshold, class_names=names)


def slow_certain(order):
    n, pairs = order.estimate.shape
    return np.array(
        [[a == b or all(order.no[a, p] or order.yes[b, p] for p in range(pairs)) for b in range(n)] for a in range(n)]
    )


@settings(deadline=None, max_examples=150)
@given(tables)
def test_laws_of_the_three_valued_order(table):
    _, order = make(*table)
    leq, likely = order.certain.leq, order.estimated.leq
    assert np.array_equal(leq, slow_certain(order))
    assert leq.diagonal().all()
    assert not ((leq.astype(int) @ leq.astype(int) > 0) & ~leq).any()
    assert not (leq & ~likely).any(), "certain lies inside the estimated order"
    assert not (likely & order.refuted).any(), "the estimated order lies outside what is refuted"
    for a, b in itertools.combinations(range(len(order)), 2):
        same = bool((order.separated[a] == order.separated[b]).all())
        assert same == (likely[a, b] and likely[b, a]), "antisymmetric on classes"


def brute_covers(relation):
    strict = relation & ~relation.T
    n = len(strict)
    return {
        (a, b)
        for a in range(n)
        for b in range(n)
        if strict[a, b] and not any(strict[a, c] and strict[c, b] for c in range(n))
    }


@settings(deadline=None, max_examples=150)
@given(tables)
def test_covers_extremes_and_chains_against_brute_force(table):
    _, order = make(*table)
    relation = order.estimated
    groups = relation.classes()
    assert sorted(m for g in groups for m in g) == list(range(len(order)))
    lead = {member: group[0] for group in groups for member in group}
    expected = {(lead[a], lead[b]) for a, b in brute_covers(relation.leq)}
    assert set(relation.covers()) == expected
    strict = relation.strict
    assert relation.maximal() == [a for a in range(len(order)) if not strict[a].any()]
    assert relation.minimal() == [a for a in range(len(order)) if not strict[:, a].any()]
    # closure of the Hasse diagram gives the order of the classes back
    reach = {(a, a) for a in lead.values()}
    for _ in range(len(order)):
        reach |= {(a, d) for a, b in reach for c, d in expected if b == c}
    assert reach == {(lead[a], lead[b]) for a, b in np.argwhere(relation.leq)}
    # width: the largest set of mutually incomparable classes
    firsts = sorted(set(lead.values()))
    largest = max(
        k
        for k in range(1, len(firsts) + 1)
        for chosen in itertools.combinations(firsts, k)
        if not any(strict[a, b] or strict[b, a] for a, b in itertools.combinations(chosen, 2))
    )
    assert relation.width() == largest
    chains = relation.chains(limit=1000)
    assert max(map(len, chains)) == len(relation.longest_chain())
    for chain in chains:
        assert all(edge in expected for edge in itertools.pairwise(chain))
        assert not strict[:, chain[0]].any()
        assert not strict[chain[-1]].any()


@settings(deadline=None, max_examples=80)
@given(tables, st.integers(0, 100))
def test_linear_extensions_respect_the_order(table, seed):
    _, order = make(*table)
    for relation in (order.certain, order.estimated):
        for extension in (
            relation.linear_extension(),
            relation.random_extension(generator=torch.Generator().manual_seed(seed)),
        ):
            assert sorted(extension) == list(range(len(order)))
            place = {member: n for n, member in enumerate(extension)}
            assert all(place[a] < place[b] for a, b in np.argwhere(relation.strict))


@settings(deadline=None, max_examples=80)
@given(tables, st.randoms(use_true_random=False))
def test_renaming_classes_only_renames(table, random):
    bounds, order = make(*table)
    _, classes, _ = table[0]
    new = list(range(classes))
    random.shuffle(new)
    place = {tuple(p): n for n, p in enumerate(order.pairs.tolist())}
    column = [place[tuple(sorted((new[i], new[j])))] for i, j in order.pairs.tolist()]
    moved = np.empty_like(bounds.estimate)
    low, high = moved.copy(), moved.copy()
    moved[:, column], low[:, column], high[:, column] = bounds.estimate, bounds.lower, bounds.upper
    other = subset_order(
        CellBounds(moved, low, high, 0.05, "bonferroni", 5),
        subsets=[tuple(sorted(new[c] for c in s)) for s in order.subsets],
        pairs=order.pairs,
        threshold=0.8,
        class_names=order.class_names,
    )
    assert np.array_equal(other.certain.leq, order.certain.leq)
    assert np.array_equal(other.estimated.leq, order.estimated.leq)


@settings(deadline=None, max_examples=80)
@given(tables)
def test_a_further_subset_changes_nothing_among_the_others(table):
    bounds, order = make(*table)
    if len(order) < 2:
        return
    fewer = subset_order(
        CellBounds(bounds.estimate[:-1], bounds.lower[:-1], bounds.upper[:-1], 0.05, "bonferroni", 5),
        subsets=order.subsets[:-1],
        pairs=order.pairs,
        threshold=0.8,
        class_names=order.class_names,
    )
    for name in ("certain", "estimated"):
        assert np.array_equal(getattr(fewer, name).leq, getattr(order, name).leq[:-1, :-1])


@settings(deadline=None, max_examples=60)
@given(tables, st.floats(0.001, 0.2), st.floats(0.001, 0.2))
def test_edges_grow_or_stay_when_alpha_grows(table, one, two):
    key, rng = table
    small, large = sorted((one, two))
    pairs = class_pairs(key[1])
    scores = np.clip(rng.uniform(0.6, 1, (1, key[0], len(pairs))) + rng.normal(0, 0.03, (4, key[0], len(pairs))), 0, 1)
    subsets = [(c,) for c in range(key[0])]
    orders = [
        subset_order(
            cell_bounds(Resamples(scores), alpha=a), subsets=subsets, pairs=pairs, class_names=["x"] * 9, threshold=0.9
        )
        for a in (small, large)
    ]
    assert not (orders[0].certain.leq & ~orders[1].certain.leq).any()
    assert not (orders[0].refuted & ~orders[1].refuted).any()


@settings(deadline=None, max_examples=60)
@given(tables)
def test_intersection_over_all_thresholds_is_dominance(table):
    bounds, order = make(*table)
    everywhere = np.ones((len(order),) * 2, dtype=bool)
    for tau in np.unique(bounds.estimate):
        everywhere &= inclusion(bounds.estimate >= tau, bounds.estimate >= tau)
    dominance = np.stack([(row <= bounds.estimate).all(axis=1) for row in bounds.estimate])
    assert np.array_equal(everywhere, dominance)
    sweep = sweep_threshold(bounds)
    assert (sweep.persistence >= sweep.certain_persistence - 1e-12).all()
    assert (sweep.persistence[dominance] == 1).all()


@settings(deadline=None, max_examples=100)
@given(tables)
def test_generalises_to_is_an_up_set_and_shrinks_with_the_target(table):
    _, order = make(*table)
    classes = table[0][1]
    everything = [s for k in range(2, classes + 1) for s in itertools.combinations(range(classes), k)]
    states = {target: order.generalises_to(target) for target in everything}
    for target, state in states.items():
        good = {a for a, s in enumerate(state) if s == "certain"}
        for a, b in np.argwhere(order.certain.leq):
            assert a not in good or b in good
        for part in everything:
            if set(part) <= set(target):
                assert good <= {a for a, s in enumerate(states[part]) if s == "certain"}
        least = {order.index(s) for s in order.sufficient_for(target)}
        strict = order.certain.strict
        assert least == {b for b in good if not any(a in good and strict[a, b] for a in good)}


@settings(deadline=None, max_examples=50)
@given(tables)
def test_json_round_trip(table):
    _, order = make(*table)
    again = SubsetOrder.from_json(order.to_json())
    assert again.to_json() == order.to_json()
    assert again.covers() == order.covers()
    assert again.subsets == order.subsets


def test_the_start_and_single_class_targets():
    rng = np.random.default_rng(0)
    _, order = make((5, 4, 0), rng)
    assert order.subsets[0] == ()
    assert order.generalises_to([2]) == ["trivial"] * 5
    assert order.name(()) == "start"
    with pytest.raises(SettingsError, match="was not measured"):
        order.index((0, 1, 2, 3))


def test_one_subset_makes_an_order_with_one_node():
    _, order = make((1, 3, 0), np.random.default_rng(0))
    assert order.covers() == []
    assert order.maximal() == order.minimal() == list(order.subsets)
    assert order.chains() == [[order.subsets[0]]]
    assert order.certain.width() == 1


def exact(estimate, **options):
    estimate = np.asarray(estimate, dtype=float)
    bounds = CellBounds(estimate, estimate, estimate, 0.05, "bonferroni", options.pop("seeds", 5))
    subsets = [(0, 1), (0, 2), (1, 2)][: len(estimate)]
    return subset_order(
        bounds, subsets=subsets, pairs=class_pairs(3), class_names="abc", **{"threshold": 0.9, **options}
    )


def test_ties_merge_into_one_node():
    order = exact([[0.95, 0.6, 0.6], [0.97, 0.7, 0.5], [0.95, 0.95, 0.5]])
    assert order.classes() == [((0, 1), (0, 2)), ((1, 2),)]
    assert order.covers() == [((0, 1), (1, 2))]
    assert order.counts()["incomparable"] == 0


@pytest.mark.parametrize("threshold", [0.5, 0.2, 1.01])
def test_thresholds_at_chance_or_above_one_are_refused(threshold):
    with pytest.raises(SettingsError, match="threshold"):
        exact([[0.9, 0.9, 0.9]], threshold=threshold)


def test_degenerate_thresholds_are_said_with_a_better_one():
    nothing = exact([[0.7, 0.8, 0.6], [0.6, 0.6, 0.6]], threshold=0.9)
    assert nothing.classes() == [((0, 1), (0, 2))]
    assert "degenerate: nothing separated" in nothing.notes[0]
    better = float(nothing.notes[0].split("threshold of ")[1].split(",")[0])
    assert len(exact([[0.7, 0.8, 0.6], [0.6, 0.6, 0.6]], threshold=better).classes()) == 2
    assert "too easy" in exact([[0.97, 0.98, 0.96], [0.95, 0.99, 0.96]], threshold=0.9).notes[0]
    assert exact([[0.97, 0.5, 0.96]], threshold=0.9).notes == ()


def test_chance_cells_are_marked():
    order = exact([[0.5, 0.51, 0.9]])
    assert order.chance.tolist() == [[True, False, False]]


def test_classes_with_few_test_samples_make_no_certain_edge():
    order = exact([[0.95, 0.6, 0.6], [0.95, 0.95, 0.6]], test_counts=np.array([50, 50, 9]))
    assert order.state((0, 1), (0, 2)) == "undecided"
    assert "fewer than 10 test samples" in order.notes[0]
    assert order.notes[0].endswith("c")
    assert exact([[0.95, 0.6, 0.6], [0.95, 0.95, 0.6]], test_counts=np.full(3, 10)).state((0, 1), (0, 2)) == "certain"


def test_one_seed_is_stamped():
    assert any(note.startswith("seeds=1") for note in exact([[0.9, 0.8, 0.99]], seeds=1).notes)


def test_relative_threshold_is_one_a_pair():
    order = exact([[0.9, 0.7, 0.6]], threshold=np.array([0.95, 0.65, 0.55]))
    assert order.separated.tolist() == [[False, True, True]]


def test_orders_of_other_modes_or_heads_are_not_compared():
    one = exact([[0.95, 0.6, 0.6], [0.95, 0.95, 0.6]])
    two = replace(one, mode="full")
    with pytest.raises(SettingsError, match="mode"):
        one.robust_edges(two)
    assert one.robust_edges(one) == [((0, 1), (0, 2))]
    three = exact([[0.95, 0.6, 0.6], [0.55, 0.95, 0.6]])
    assert one.robust_edges(three) == []


def test_targets_outside_the_pair_universe_are_refused():
    estimate = np.array([[0.95]])
    order = subset_order(
        CellBounds(estimate, estimate, estimate, 0.05, "none", 3),
        subsets=[(0, 1)],
        pairs=np.array([[2, 3]]),
        class_names="abcd",
        threshold=0.9,
    )
    assert order.generalises_to([2, 3]) == ["certain"]
    with pytest.raises(SettingsError, match="outside the measured ones"):
        order.generalises_to([0, 3])


def test_damaged_text_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a subset order"):
        SubsetOrder.from_json("{}")
    with pytest.raises(CheckpointError, match="cannot read"):
        SubsetOrder.load(tmp_path / "none.json")


def test_relations_that_are_no_preorder_are_refused():
    with pytest.raises(SettingsError, match="not reflexive"):
        Preorder(np.zeros((2, 2), dtype=bool))
    broken = np.eye(3, dtype=bool)
    broken[0, 1] = broken[1, 2] = True
    with pytest.raises(SettingsError, match="not transitive"):
        Preorder(broken)
    with pytest.raises(ShapeError):
        Preorder(np.ones((2, 3), dtype=bool))


def test_duplicates_and_contradictions_are_refused():
    estimate = np.full((2, 3), 0.9)
    bounds = CellBounds(estimate, estimate, estimate, 0.05, "none", 3)
    with pytest.raises(SettingsError, match="twice"):
        subset_order(bounds, subsets=[(0, 1), (0, 1)], pairs=class_pairs(3), class_names="abc", threshold=0.9)
