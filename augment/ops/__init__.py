"""The ops: one class each, one file for each family. Each file ends with a mapping of its ops by name."""
