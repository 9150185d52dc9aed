"""Measurements, each beside something else in the same run."""
