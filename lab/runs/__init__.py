"""Recorded runs: records, tables, run sets on disk."""
