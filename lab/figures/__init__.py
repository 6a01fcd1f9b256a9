"""Drawings of recorded runs."""
