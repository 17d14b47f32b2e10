"""Label history: decisions on labels in an append-only database, and their effect on a data set."""
