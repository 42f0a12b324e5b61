"""Environments: vectorized simulators and games as TorchRL environments."""
