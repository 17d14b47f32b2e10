"""Retraining: a run takes a snapshot of the data, checks it, trains, and promotes the result if it is better than the champion."""
