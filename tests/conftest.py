"""Processes that test side by side (`pytest -n 2`) compute on one thread each: more would wait for one another."""

import os

if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:  # before any of them imports torch
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
