"""Drift: which devices are unlike what their model was made with, and in what."""
