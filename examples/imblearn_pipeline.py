"""imbalanced-learn: translated images as over-sampling, in a pipeline with any scikit-learn classifier."""

import sys
from pathlib import Path

from digits import long_tailed_digits, quick_translator
from imblearn.pipeline import make_pipeline
from sklearn.linear_model import LogisticRegression

from gen_invariance import NuisanceSampler, load_translator


def main(folder: Path) -> float:
    train, test = long_tailed_digits()
    translator = load_translator(quick_translator(folder, train))
    sampler = NuisanceSampler(translator, image_shape=(1, 16, 16), pixel_range=(0, 255), random_state=0)
    pipeline = make_pipeline(sampler, LogisticRegression(max_iter=200))
    pipeline.fit(train.images.flatten(1).numpy(), train.labels.numpy())
    score = pipeline.score(test.images.flatten(1).numpy(), test.labels.numpy())
    print("accuracy:", score)
    return score


if __name__ == "__main__":
    main(Path(sys.argv[1]))
