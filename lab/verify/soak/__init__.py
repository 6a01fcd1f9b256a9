"""Random snapshots: drawn, taken, verified, recorded."""
