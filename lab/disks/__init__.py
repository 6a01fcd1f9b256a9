"""Disk images: what one is, overlays on it, and the layers that the lab keeps.

Nothing here writes to an image that a user has named.  Every function is given the path of a
`qemu-img`, which lies beside each QEMU that the lab builds.
"""
