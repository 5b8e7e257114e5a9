"""Slow, plain re-computations that tests hold the fast code against. The package never imports this file."""

import math

import torch

from gen_invariance.nuisance.protocol import select_rows


def softmax(row):
    """Probabilities of one list of logits, in plain Python."""
    largest = max(row)
    weights = [math.exp(value - largest) for value in row]
    return [weight / math.fsum(weights) for weight in weights]


def divergence(p, q):
    """KL(p || q) in nats of two lists of probabilities."""
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def slow_invariance(predict, images, labels, nuisance, *, num_classes, draws, generator, originals=None):
    """eKLD, agreement and standard error by class: one image at a time, one draw at a time.

    Draws come from the generator in rounds over the whole set, as the measure documents.
    """
    by_image = [([], []) for _ in images]
    for _ in range(draws):
        draw = nuisance.sample(images.shape, generator=generator)
        for place in range(len(images)):
            one = images[place : place + 1]
            source = one if originals is None else originals[place : place + 1]
            moved = nuisance.apply(source.clone(), select_rows(draw, torch.tensor([place])))
            with torch.no_grad():
                p, q = (softmax(predict(image)[0].tolist()) for image in (one, moved))
            by_image[place][0].append(divergence(p, q))
            by_image[place][1].append(p.index(max(p)) == q.index(max(q)))
    ekld, agreement, error = ([math.nan] * num_classes for _ in range(3))
    for label in range(num_classes):
        own = [by_image[place] for place in range(len(images)) if int(labels[place]) == label]
        if not own:
            continue
        means = [math.fsum(found) / draws for found, _ in own]
        ekld[label] = math.fsum(means) / len(own)
        agreement[label] = sum(sum(kept) / draws for _, kept in own) / len(own)
        if len(own) > 1:
            spread = math.fsum((mean - ekld[label]) ** 2 for mean in means) / (len(own) - 1)
            error[label] = math.sqrt(spread / len(own))
    return ekld, agreement, error


def slow_accuracy(logits, labels, num_classes):
    """Accuracy by class with a loop over rows; NaN for empty classes."""
    right, count = [0] * num_classes, [0] * num_classes
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        count[label] += 1
        right[label] += row.index(max(row)) == label
    return [r / n if n else math.nan for r, n in zip(right, count, strict=True)], count
