"""The command line of a QEMU that the lab did not start, so that its snapshot can be restored.

`read_command_line` reads it from /proc, and `disks` tells the disk images on it.  `for_restore`
makes of it the line of a second QEMU, which waits for the snapshot and stays out of the way of the
first; `require_restorable` says early why that would not work.
"""

from lab.vm.argv.blocks import DiskOption, disks
from lab.vm.argv.line import CommandLine, read_command_line
from lab.vm.argv.restore import RestoreLine, device_ids, for_restore, require_restorable

__all__ = [
    "CommandLine",
    "DiskOption",
    "RestoreLine",
    "device_ids",
    "disks",
    "for_restore",
    "read_command_line",
    "require_restorable",
]
