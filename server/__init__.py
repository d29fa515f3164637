"""The fleet: ingest, devices, registry, drift, learning, rollouts, API, console, CLI."""
