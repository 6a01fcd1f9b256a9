"""QEMU, patched and unpatched, from one source tree: obtained, verified, built and cached."""
