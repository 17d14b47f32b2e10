"""Model rollout: sources, hot swaps, canaries, and captured requests."""
