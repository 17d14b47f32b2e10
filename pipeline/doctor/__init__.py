"""The doctor watches a training and reports each problem with its evidence and the settings that cure it."""
