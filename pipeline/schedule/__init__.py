"""Starting `refract retrain` by the clock, on one machine. What a retraining is, this does not know."""
