"""The device: runtime, monitor, spool, link, updates, training."""
