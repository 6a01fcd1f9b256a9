"""What tests of commands share with those of rooms."""

from tests.unit.disks.conftest import qemu_img

__all__ = ["qemu_img"]
