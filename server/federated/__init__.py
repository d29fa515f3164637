"""Federated rounds: leases for devices, the fold of their deltas, evaluation on their data."""
