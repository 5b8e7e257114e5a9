from dataclasses import replace

import pytest
import torch

from gen_invariance.data.images import ImageData
from gen_invariance.errors import DataError, SettingsError
from gen_invariance.order.analysis.curriculum import climb
from gen_invariance.order.settings import SourceSettings
from gen_invariance.order.source import FittedSource, SourceTrainer, in_batches


def blobs(classes=4, per_class=16, seed=0, side=8):
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randint(40, 216, (classes, 1, side, side), generator=torch.Generator().manual_seed(99))
    labels = torch.arange(classes).repeat_interleave(per_class)
    noise = torch.randint(-40, 40, (len(labels), 1, side, side), generator=generator)
    return ImageData((patterns[labels] + noise).clamp(0, 255).to(torch.uint8), labels, tuple("abcd"[:classes]), "blobs")


FAST = {"images_per_class": 8, "epochs": 3, "steps": 8, "batch_size": 8}


def trainer(**options):
    return SourceTrainer(blobs(), SourceSettings(**{**FAST, **options}), pool=6)


def weights(model):
    return torch.cat([value.flatten() for value in model.backbone.state_dict().values()])


def test_head_images_and_source_images_never_meet():
    made = trainer()
    sources = set(torch.cat(made.source_rows).tolist())
    assert not sources & set(made.head_rows.tolist())
    assert len(sources) + len(made.head_rows) == 64
    task = made.source_task((1, 3), 0, head=torch.nn.Identity())
    assert set(task.rows.tolist()) <= sources
    assert set(made.train.labels[task.rows].tolist()) == {1, 3}
    assert torch.equal(torch.tensor([1, 3])[task.labels], made.train.labels[task.rows])


def test_head_images_and_source_images_share_no_group():
    data = replace(
        blobs(), groups=torch.arange(64) // 3
    )  # group 5 shows the end of one class and the start of the next
    made = SourceTrainer(data, SourceSettings(**FAST), pool=6)
    sources = torch.cat(made.source_rows)
    assert sorted(sources.tolist() + made.head_rows.tolist()) == list(range(64))
    assert not set(data.groups[sources].tolist()) & set(data.groups[made.head_rows].tolist())
    counts = torch.bincount(data.labels[made.head_rows], minlength=4)
    assert ((counts >= 3) & (counts <= 9)).all()
    lonely = replace(data, groups=torch.where(data.labels == 2, 99, data.groups))
    with pytest.raises(DataError, match="class 'c' has no group to spare"):
        SourceTrainer(lonely, SourceSettings(**FAST), pool=6)


def test_the_start_is_untouched_and_shared_by_all_subsets_of_a_seed():
    made = trainer()
    start = made.fit((), 0)
    assert torch.equal(weights(start.model), weights(made.start(0, num_classes=4)))
    assert not torch.equal(weights(start.model), weights(made.start(1)))
    assert start.probabilities(torch.rand(2, 1, 8, 8)) is None


def test_training_is_repeatable_and_learns_its_classes():
    made = trainer(epochs=12)
    one, two = made.fit((0, 2), 3), made.fit((0, 2), 3)
    assert torch.equal(weights(one.model), weights(two.model))
    assert not torch.equal(weights(one.model), weights(made.fit((0, 2), 4).model))
    rows = made.head_rows[torch.isin(made.train.labels[made.head_rows], torch.tensor([0, 2]))]
    guess = in_batches(one.probabilities, made.train, rows).argmax(1)
    truth = (made.train.labels[rows] == 2).long()
    assert (guess == truth).float().mean() > 0.8


@pytest.mark.parametrize(
    ("options", "subset", "images", "steps"),
    [
        ({"budget": "per_class"}, (0, 1, 2), 24, 3 * 3),
        ({"budget": "per_class"}, (0, 1), 16, 3 * 2),
        ({"budget": "total", "total_images": 12}, (0, 1, 2), 12, 3 * 2),
        ({"budget": "total", "total_images": 12}, (0, 1), 12, 3 * 2),
        ({"budget": "steps"}, (0, 1, 2), 24, 8),
        ({"budget": "steps"}, (0, 1), 16, 8),
    ],
)
def test_budgets(options, subset, images, steps):
    made = trainer(**options)
    task = made.source_task(subset, 0, head=torch.nn.Identity())
    assert len(task.rows) == images
    assert made.steps_for(task) == steps


def test_one_class_against_the_rest():
    made = trainer(single="one_vs_rest")
    task = made.source_task((1,), 0, head=torch.nn.Identity())
    assert task.labels.tolist() == [0] * 8 + [1] * 8
    assert set(made.train.labels[task.rows[8:]].tolist()) == {0, 2, 3}
    assert made.fit((1,), 0).probabilities(torch.rand(2, 1, 8, 8)).shape == (2, 2)


def test_a_diverged_run_is_said_so():
    fitted = trainer(learning_rate=1e30).fit((0, 1), 0)
    assert fitted.diverged


@pytest.mark.parametrize("mode", ["partial", "full", "joint"])
def test_adapting_answers_in_class_indices_and_leaves_the_source_alone(mode):
    made = trainer(steps=20)
    source = made.fit((0, 1), 0)
    before = weights(source.model)
    predict = made.adapt(source, (1, 3), made.head_rows, mode=mode, last_stages=1, seed=0)
    assert torch.equal(weights(source.model), before)
    test = blobs(seed=5)
    rows = torch.isin(test.labels, torch.tensor([1, 3])).nonzero().flatten()
    guess = in_batches(predict, test, rows)
    assert set(guess.tolist()) <= {1, 3}
    assert (guess == test.labels[rows]).float().mean() > 0.7


def test_partial_adapts_no_more_than_the_last_blocks():
    made = trainer(steps=4)
    source = made.fit((0, 1), 0)
    before = source.model.backbone.state_dict()
    models = []
    made.train_on = lambda model, tasks, **options: (
        models.append(model) or SourceTrainer.train_on(made, model, tasks, **options)
    )
    made.adapt(source, (1, 3), made.head_rows, mode="partial", last_stages=1, seed=0)
    for name, value in models[0].backbone.state_dict().items():
        assert torch.equal(value, before[name]) == ("conv4" not in name), name
    with pytest.raises(SettingsError, match="last_stages"):
        made.adapt(source, (1, 3), made.head_rows, mode="partial", last_stages=9, seed=0)


def test_climbing_and_jumping_use_equal_steps():
    made = trainer()
    run = climb(made, [(0, 1), (0, 1, 2), (0, 1, 2, 3)], test=blobs(seed=1), seed=0, threshold=0.9)
    assert run.steps == 3 * (made.steps_for(made.source_task((0, 1, 2, 3), 0, head=torch.nn.Identity())) // 3)
    assert len(run.climbing) == len(run.lost) == 3
    assert run.lost[0] == 0
    assert all(0 <= count <= 6 for count in (*run.climbing, *run.lost, run.jumping))
    with pytest.raises(SettingsError, match="curriculum"):
        climb(made, [(), (0, 1)], test=blobs(), seed=0, threshold=0.9)


@pytest.mark.parametrize(
    "bad", [{"budget": "free"}, {"single": "yes"}, {"epochs": 0}, {"learning_rate": 0.0}, {"momentum": 1.0}]
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(SettingsError):
        SourceSettings(**bad)


def test_a_class_with_one_image_is_refused():
    data = blobs()
    with pytest.raises(DataError, match="'d' has fewer than two"):
        SourceTrainer(data.subset(torch.arange(49)), SourceSettings())


def test_calling_a_source_gives_features():
    made = trainer()
    fitted = made.fit((0, 1), 0)
    assert isinstance(fitted, FittedSource)
    assert fitted(torch.rand(3, 1, 8, 8)).shape == (3, fitted.model.num_features)
