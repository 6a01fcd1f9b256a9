"""A QEMU process with a guest in it."""
