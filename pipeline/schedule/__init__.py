"""The scheduler, which starts `refract retrain` on one machine: at set times, when labels have been corrected, or when data drift.

Each run, and each measurement of drift, is a separate process. The retraining package does not know the scheduler.
"""
