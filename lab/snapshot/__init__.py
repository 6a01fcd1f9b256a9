"""Snapshots: take them, publish them whole, restore them."""
