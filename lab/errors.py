"""What can go wrong, as one tree.

::

    LabError                 exit 1  anything the lab reports in one line
    ├── UsageError           exit 2  arguments that can never work
    ├── HostError            exit 2  this host lacks something; trying again will fail again
    ├── TransientError       exit 1  may work when tried again
    ├── BuildError           exit 1  QEMU or the guest could not be obtained or built
    ├── LaunchError          exit 1  QEMU did not start, or died; carries command, log and exit code
    ├── QmpError             exit 1  the monitor refused a command or went away
    ├── GuestError           exit 1  the guest reported an error
    │   └── GuestSilentError exit 1  the guest did not say in time what it had to
    ├── SnapshotError        exit 1  a snapshot did not complete; the guest goes on
    ├── RestoreError         exit 1  an image could not be turned into a running guest
    └── RunError             exit 1  a recorded run cannot be read, or is newer than this code

Every error has a cause and, where somebody can do something about it, a remedy. ``str()`` is one
line, because that line is all the command line prints.
"""

from collections.abc import Sequence


def _one_line(text: str) -> str:
    return " ".join(text.split())


class LabError(Exception):
    """An expected failure: what happened, and what to do about it.

    :param cause: what went wrong, in one line.
    :param remedy: what the reader can do, in one line; empty when nothing sensible is known.
    """

    exit_status = 1

    def __init__(self, cause: str, remedy: str = "") -> None:
        self.cause = _one_line(cause)
        self.remedy = _one_line(remedy)
        super().__init__(self.cause, self.remedy)

    def __str__(self) -> str:
        return f"{self.cause}; {self.remedy}" if self.remedy else self.cause


class UsageError(LabError):
    """The arguments contradict each other or can never work."""

    exit_status = 2


class HostError(LabError):
    """This host lacks something; the same call will fail again until that changes."""

    exit_status = 2


class TransientError(LabError):
    """A failure that may not happen again: a busy lock, a mirror that did not answer."""


class BuildError(LabError):
    """QEMU or the guest could not be obtained, verified, patched or built."""


class LaunchError(LabError):
    """QEMU did not start or died.

    :param command: the argument vector that was run.
    :param log_tail: the last lines QEMU wrote.
    :param exit_code: its exit status, negative for a signal, None while unknown.
    """

    def __init__(
        self,
        cause: str,
        remedy: str = "",
        *,
        command: Sequence[str] = (),
        log_tail: str = "",
        exit_code: int | None = None,
    ) -> None:
        super().__init__(cause, remedy)
        self.command = list(command)
        self.log_tail = log_tail
        self.exit_code = exit_code


class QmpError(LabError):
    """The monitor refused a command, or the connection to it was lost."""


class GuestError(LabError):
    """The guest reported an error, or did not report what it had to."""


class GuestSilentError(GuestError):
    """The guest did not say in time what it had to."""


class SnapshotError(LabError):
    """A snapshot did not complete. No image is left that looks complete, and the guest goes on."""


class RestoreError(LabError):
    """An image is missing, truncated, or not for this machine."""


class RunError(LabError):
    """A recorded run or one of its files is unreadable, or written by a newer version."""
