"""Long-tailed image data: class counts, splits, sampling rules, and batches; readers are in `data.readers.registry`."""

from gen_invariance.data.images import ImageData, check_images, to_uint8
from gen_invariance.data.loader import LongTailSampler, ResidentLoader, find_labels
from gen_invariance.data.longtail import (
    class_groups,
    class_order,
    counts_by_class,
    exponential_counts,
    long_tailed_indices,
    split_indices,
    step_counts,
    zipf_counts,
)
from gen_invariance.data.sampling import RULES, DelayedRule, epoch_indices, sampling_probabilities, second_phase
from gen_invariance.data.split import LongTailSettings, LongTailSplit, load_split_indices, make_long_tailed, save_split

__all__ = [
    "RULES",
    "DelayedRule",
    "ImageData",
    "LongTailSampler",
    "LongTailSettings",
    "LongTailSplit",
    "ResidentLoader",
    "check_images",
    "class_groups",
    "class_order",
    "counts_by_class",
    "epoch_indices",
    "exponential_counts",
    "find_labels",
    "load_split_indices",
    "long_tailed_indices",
    "make_long_tailed",
    "sampling_probabilities",
    "save_split",
    "second_phase",
    "split_indices",
    "step_counts",
    "to_uint8",
    "zipf_counts",
]
