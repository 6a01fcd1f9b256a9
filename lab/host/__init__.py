"""This host: what it has, what it permits, what runs on it."""
