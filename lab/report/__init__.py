"""The report, and notebooks that are executed."""
