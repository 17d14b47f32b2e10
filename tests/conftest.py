"""For every test: one OpenMP thread a process. The networks are tiny, and the tests start servers and trainings beside each other; threads
that spin for each other on few cores make a test of two seconds last a minute."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
