"""The scheduler, which starts `refract retrain` at set times on one machine. It is independent of the retraining package."""
