"""Whether an image is the guest's memory at the pause."""
