"""The doctor: watches a training, and says in words what is wrong, by what evidence, and what to change."""
