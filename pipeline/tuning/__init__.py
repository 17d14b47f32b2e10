"""Hyperparameter search: trials drawn from a space of values, one run each, stored in Optuna's storage."""
