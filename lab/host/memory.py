"""Read the memory of a process that this one may trace, without stopping it, and see what it is;
write to it, where an instrument is to be checked.

`process_vm_readv` copies straight between address spaces: no exit of the guest, no signal, no
lock that the target takes.  The parent of a process may use it on that process, and so may root.
A read is not atomic as a whole; an aligned 64-bit word in it is.
"""

import ctypes
import errno
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

from lab.errors import HostError

_MAX_CHUNK = 1 << 30  # a read larger than 2 GiB - 4 KiB is cut short by the kernel


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _prepared(library: ctypes.CDLL, name: str = "process_vm_readv") -> Callable[..., int]:
    call = getattr(library, name)
    call.restype = ctypes.c_ssize_t
    iovec, count = ctypes.POINTER(_Iovec), ctypes.c_ulong
    call.argtypes = (ctypes.c_int, iovec, count, iovec, count, count)
    return cast(Callable[..., int], call)


_readv = _prepared(ctypes.CDLL(None, use_errno=True))
_writev = _prepared(ctypes.CDLL(None, use_errno=True), "process_vm_writev")
# For a few words the interpreter lock is kept: giving it up and waiting to get it back would take
# longer than the read, and would be counted as part of it.
_readv_short = _prepared(ctypes.PyDLL(None, use_errno=True))
_SHORT_BYTES = 4096


class RemoteWindow:
    """A fixed range of another process's memory, read again and again into one buffer.

    The argument structures are built once, so that `read` costs little more than the system call.

    :param pid: the process.
    :param address: where the range begins in it.
    :param length: bytes, at most 1 GiB.
    """

    def __init__(self, pid: int, address: int, length: int) -> None:
        if not 0 < length <= _MAX_CHUNK:
            raise ValueError(f"length {length} is not in 1..{_MAX_CHUNK}")
        self.pid = pid
        self.length = length
        self.buffer = bytearray(length)
        self._keep_alive = (ctypes.c_char * length).from_buffer(self.buffer)
        self._local = _Iovec(ctypes.addressof(self._keep_alive), length)
        self._remote = _Iovec(address, length)
        self._readv = _readv_short if length <= _SHORT_BYTES else _readv
        self._call = (pid, ctypes.byref(self._local), 1, ctypes.byref(self._remote), 1, 0)

    def read(self) -> None:
        """Copy the range into `buffer`.

        :raise HostError: when this process may not read that one.
        :raise OSError: when the process is gone or the range is not mapped.
        """
        done = self._readv(*self._call)
        if done != self.length:
            _raise(self.pid, done, self.length, "reading", "process_vm_readv")


def _raise(pid: int, done: int, length: int, doing: str, call: str) -> NoReturn:
    if done >= 0:
        raise OSError(errno.EFAULT, f"only {done} of {length} bytes are mapped")
    code = ctypes.get_errno()
    if code == errno.EPERM:
        raise HostError(f"{doing} the memory of process {pid} is not permitted", _ptrace_remedy())
    raise OSError(code, f"{call} of process {pid}: {os.strerror(code)}")


def read_process(pid: int, address: int, length: int) -> bytes:
    """Return `length` bytes at `address` of process `pid`.

    :raise HostError: when this process may not read that one.
    :raise OSError: when the process is gone or the range is not mapped.
    """
    parts = []
    for start in range(0, length, _MAX_CHUNK):
        window = RemoteWindow(pid, address + start, min(_MAX_CHUNK, length - start))
        window.read()
        parts.append(bytes(window.buffer))
    return b"".join(parts)


def write_process(pid: int, address: int, data: bytes) -> None:
    """Write `data` to `address` of process `pid`; waits where a write of that process would.

    :raise HostError: when this process may not write to the memory of that one.
    :raise OSError: when the process is gone or the range is not mapped.
    """
    buffer = ctypes.create_string_buffer(data, len(data))
    local = _Iovec(ctypes.addressof(buffer), len(data))
    remote = _Iovec(address, len(data))
    done = _writev(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if done == len(data):
        return
    _raise(pid, done, len(data), "writing to", "process_vm_writev")


_CAP_SYS_NICE = 23
_SYS_PROCESS_MADVISE = 440  # the same on every architecture
_syscall = ctypes.CDLL(None, use_errno=True).syscall


def may_advise_others() -> bool:
    """Whether this process may tell the kernel what to do with the memory of another one.

    It may not with less, even for a child: see process_madvise(2).
    """
    status = Path("/proc/self/status").read_text()
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> _CAP_SYS_NICE & 1)


def process_madvise(descriptor: int, address: int, length: int, advice: int) -> int:
    """Tell the kernel what to do with a range of another process's memory.

    :param descriptor: names the process, see `os.pidfd_open`.
    :param advice: one of the kernel's `MADV_` numbers.
    :return: the error's number, 0 for success.
    """
    piece = _Iovec(address, length)
    done = _syscall(
        ctypes.c_long(_SYS_PROCESS_MADVISE),
        ctypes.c_int(descriptor),
        ctypes.byref(piece),
        ctypes.c_size_t(1),
        ctypes.c_int(advice),
        ctypes.c_uint(0),
    )
    return ctypes.get_errno() if done < 0 else 0


@dataclass(frozen=True, kw_only=True)
class Residency:
    """What is mapped of a range of a process's memory, in bytes.

    `resident`: pages of any size, among them huge pages.  `anon_huge` and `shmem_huge`:
    transparent huge pages that are mapped as such.  `hugetlb`: reserved huge pages.
    """

    resident: int = 0
    anon_huge: int = 0
    shmem_huge: int = 0
    hugetlb: int = 0


def residency(pid: int, address: int, length: int) -> Residency:
    """Return what is mapped of the mappings of process `pid` that begin in the range.

    A RAM block of QEMU's has mappings of its own, so this is exact for a whole block.

    :raise OSError: when the process is gone or may not be looked at.
    """
    with Path(f"/proc/{pid}/smaps").open() as lines:
        return parse_residency(lines, address, length)


def process_residency(pid: int, proc: Path = Path("/proc")) -> Residency:
    """Return what is mapped of all memory of process `pid`.

    The kernel walks all its page tables, and page faults of the process may have to wait for that.

    :param proc: where procfs is.
    :raise OSError: when the process is gone or may not be looked at, or the kernel is older than
        Linux 4.14.
    """
    with (proc / str(pid) / "smaps_rollup").open() as lines:
        return parse_residency(lines, 0, 1 << 64)


_MAPPING = re.compile(r"([0-9a-f]+)-[0-9a-f]+ ")
# Reserved huge pages are not counted in Rss.
_FIELDS: dict[str, tuple[str, ...]] = {
    "Rss": ("resident",),
    "AnonHugePages": ("anon_huge",),
    "ShmemPmdMapped": ("shmem_huge",),
    "Shared_Hugetlb": ("hugetlb", "resident"),
    "Private_Hugetlb": ("hugetlb", "resident"),
}


def parse_residency(lines: Iterable[str], address: int, length: int) -> Residency:
    """Add up what /proc/PID/smaps says about the mappings that begin in the range."""
    counts = dict.fromkeys(("resident", "anon_huge", "shmem_huge", "hugetlb"), 0)
    inside = False
    for line in lines:
        if mapping := _MAPPING.match(line):
            inside = address <= int(mapping[1], 16) < address + length
        elif inside:
            name, _, value = line.partition(":")
            for field in _FIELDS.get(name, ()):
                counts[field] += int(value.split()[0]) * 1024
    return Residency(**counts)


def _ptrace_remedy() -> str:
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    try:
        value = scope.read_text().strip()
    except OSError:
        return "run as root"
    return f"run as root, or lower {scope} (now {value}) to 1 or 0"
