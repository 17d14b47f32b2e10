"""The nightly run: data are frozen, checked and trained on, and what comes of it takes the champion's place if it is better."""
