"""Batch methods on scalars and named vectors, without ranks: L-BFGS, OWL-QN, conjugate gradients, searches."""
