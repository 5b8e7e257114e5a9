"""Which class subsets generalise to which: pair separability, the subset order, its diagram and its predictors."""
