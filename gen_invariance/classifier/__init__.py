"""Classifiers for long-tailed images: backbones, losses, mixing, transfer, heads, post-hoc correction, training.

Nothing is imported here, so that `import gen_invariance` stays cheap: take what you need from its module.
"""
