"""Which model answers: its source, hot swaps, canaries and captured requests."""
