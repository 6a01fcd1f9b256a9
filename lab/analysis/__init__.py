"""Figures from recorded tables: pure functions."""
