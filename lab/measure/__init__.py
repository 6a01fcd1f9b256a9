"""Measurements: samples and campaigns of them."""
