"""The search for a better config: trials drawn from a space of values, kept in Optuna's storage, a run each."""
