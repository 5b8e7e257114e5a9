"""With a pretrained backbone: heads on cached features of views, the same images held back for all splits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from referee_toys import TOY, save_blank, toned_patterns
from sklearn.linear_model import LogisticRegression

from gen_invariance.classifier.backbones import build_classifier
from gen_invariance.classifier.settings import TrainSettings
from gen_invariance.classifier.train import fit_classifier
from gen_invariance.errors import DataNotFoundError
from gen_invariance.referee import work
from gen_invariance.referee.candidates import read_candidate
from gen_invariance.referee.choose import choose_augmentation
from gen_invariance.referee.features import Views, score_head
from gen_invariance.referee.simulate import cut_classes, hold_back


@pytest.fixture(scope="module")
def data():
    return toned_patterns()


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """With a backbone that has seen such images without their tone."""
    other = toned_patterns((40,) * 8, seed=0)
    model = build_classifier("small_conv", num_classes=8)
    fit_classifier(model, other, TrainSettings(epochs=3, warmup=0, batch_size=32), progress=False)
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(model.state_dict(), path)
    return replace(TOY, weights=str(path), views=2, splits=4)


def test_held_back_images_are_those_of_no_split(data, settings):
    grouped = replace(data, groups=torch.arange(len(data)) // 3)
    for each in (data, grouped):
        rest, held = hold_back(each, settings, seed=1)
        assert not set(rest.tolist()) & set(held.tolist())
        if each.groups is not None:
            assert not set(each.groups[rest].tolist()) & set(each.groups[held].tolist())
        kept = each.subset(rest)
        sizes = [torch.bincount(kept.labels[cut_classes(kept, settings, number=n, seed=1)]).tolist() for n in (1, 2)]
        assert all(min(size) >= 1 for size in sizes)
        for label in range(4):  # each large class is cut in one of a pair of splits, to a size of the tail
            small, large = sorted(size[label] for size in sizes)
            assert small <= 4
            assert large == int(kept.counts[label])


def test_a_head_against_scikit_learn(generator):
    views = Views(torch.randn(2, 30, 5, generator=generator), torch.randn(2, 30, 5, generator=generator))
    labels, rows = torch.arange(30) % 3, torch.arange(0, 30, 2)
    held = (torch.randn(40, 5, generator=generator), torch.arange(40) % 3)
    everything = read_candidate("rotation@everywhere:1")
    right = score_head(views, everything, labels, rows, held, num_classes=3, seed=0)
    rows_of = views.staged[:, rows].reshape(-1, 5).double().numpy()
    mean, std = rows_of.mean(0), rows_of.std(0)
    model = LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000)
    model.fit((rows_of - mean) / std, labels[rows].repeat(2).numpy())
    expected = model.predict((held[0].double().numpy() - mean) / std) == held[1].numpy()
    assert (right == expected).mean() > 0.95
    nothing = score_head(
        views, replace(everything, policy_options={"probability": 0.0}), labels, rows, held, num_classes=3, seed=0
    )
    assert not np.array_equal(nothing, right)


def test_a_choice_by_features(data, settings, tmp_path, monkeypatch):
    blank = f"{save_blank(tmp_path / 'blank')}@everywhere"
    words = ["none", "redraw:photo:tone@everywhere", blank]
    met = []
    original = work.fit_candidate_translator
    monkeypatch.setattr(work, "fit_candidate_translator", lambda *a, **k: met.append(a[1]) or original(*a, **k))
    choice = choose_augmentation(data, words, settings, out=tmp_path / "run")
    assert choice.splits == 4
    assert choice.gain_of(blank).points < 0
    assert choice.chosen.name != blank
    rest, _ = hold_back(data, settings)
    assert [len(each) for each in met] == [len(rest)] * 2  # once for all splits, the one that is loaded included
    assert choose_augmentation(data, words, settings, out=tmp_path / "run", resume=True) == choice
    assert choose_augmentation(data, words, settings) == choice


def test_weights_that_are_not_there_leave_nothing_behind(data, settings, tmp_path):
    with pytest.raises(DataNotFoundError):
        choose_augmentation(
            data, ["none", "rotation@tail"], replace(settings, weights="no/where.pt"), out=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()
