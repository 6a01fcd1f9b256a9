"""Ask the kernel by doing: userfaultfd through its own ioctl, KVM by running an instruction.

That a device node exists says little: it may be unreadable, or its KVM unable to run anything.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab.errors import HostError

# <linux/userfaultfd.h>, x86_64.
_NR_USERFAULTFD = 323
_UFFD_API = 0xAA
_UFFDIO_API = 0xC018AA3F
_USERFAULTFD_IOC_NEW = 0xAA00
_UFFD_USER_MODE_ONLY = 1
UFFD_FEATURES: dict[str, int] = {
    "wp": 1 << 0,
    "missing-hugetlbfs": 1 << 4,
    "missing-shmem": 1 << 5,
    "sigbus": 1 << 7,
    "thread-id": 1 << 8,
    "minor-hugetlbfs": 1 << 9,
    "minor-shmem": 1 << 10,
    "exact-address": 1 << 11,
    "wp-hugetlbfs-shmem": 1 << 12,
    "wp-unpopulated": 1 << 13,
    "poison": 1 << 14,
    "wp-async": 1 << 15,
    "move": 1 << 16,
}
UFFD_DEVICE = Path("/dev/userfaultfd")
KVM_DEVICE = Path("/dev/kvm")

# <linux/kvm.h>, x86_64.
_KVM_GET_API_VERSION = 0xAE00
_KVM_CREATE_VM = 0xAE01
_KVM_GET_VCPU_MMAP_SIZE = 0xAE04
_KVM_CREATE_VCPU = 0xAE41
_KVM_SET_USER_MEMORY_REGION = 0x4020AE46
_KVM_RUN = 0xAE80
_KVM_SET_REGS = 0x4090AE82
_KVM_GET_SREGS = 0x8138AE83
_KVM_SET_SREGS = 0x4138AE84
_KVM_API_VERSION = 12
_KVM_EXIT_HLT = 5
_KVM_TIMEOUT_S = 10


@dataclass(frozen=True, kw_only=True)
class UffdProbe:
    """What userfaultfd gives this process.

    ``access``: through the ``device`` or the ``syscall``; ``user-mode-only`` when faults of the
    kernel on the process's behalf would not be reported, which loses writes of device emulation;
    ``none``. ``features``: names out of `UFFD_FEATURES`. ``problem``: why there is no full access.
    """

    access: Literal["device", "syscall", "user-mode-only", "none"]
    features: frozenset[str] = frozenset()
    problem: str = ""

    @property
    def usable(self) -> bool:
        """Whether faults of any origin would be reported."""
        return self.access in ("device", "syscall")


def feature_names(bits: int) -> frozenset[str]:
    """The names of the feature bits the kernel reports."""
    return frozenset(name for name, bit in UFFD_FEATURES.items() if bits & bit)


def _offered_features(descriptor: int) -> frozenset[str]:
    # Asking for no features makes the kernel report all it has.
    request = bytearray(struct.pack("=QQQ", _UFFD_API, 0, 0))
    fcntl.ioctl(descriptor, _UFFDIO_API, request)
    return feature_names(struct.unpack("=QQQ", request)[1])


def _uffd_by_device() -> int:
    device = os.open(UFFD_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(device)


def _uffd_by_syscall(flags: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = int(libc.syscall(_NR_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | flags))
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return descriptor


def probe_uffd() -> UffdProbe:
    """Open a userfaultfd the way QEMU does, the device first, and ask what it can."""
    ways: tuple[tuple[Literal["device", "syscall", "user-mode-only"], int | None], ...] = (
        ("device", None),
        ("syscall", 0),
        ("user-mode-only", _UFFD_USER_MODE_ONLY),
    )
    problem = ""
    for access, flags in ways:
        try:
            descriptor = _uffd_by_device() if flags is None else _uffd_by_syscall(flags)
        except OSError as error:
            # The device is one way of two; that it is not there is no problem yet.
            if access == "syscall":
                problem = error.strerror or str(error)
                if error.errno == errno.ENOSYS:
                    break
            continue
        try:
            return UffdProbe(access=access, features=_offered_features(descriptor), problem=problem)
        except OSError as error:
            problem = error.strerror or str(error)
        finally:
            os.close(descriptor)
    return UffdProbe(access="none", problem=problem)


def kvm_is_pvm() -> bool:
    """Whether the host's KVM is PVM: ring 3 runs natively, the guest's kernel does not."""
    return Path("/sys/module/kvm_pvm").exists()


def run_kvm_instruction() -> None:
    """Create a VM with one vCPU and run `hlt` on it in this process.

    :raise HostError: naming the first step that fails.
    """
    step = f"open {KVM_DEVICE}"
    try:
        with contextlib.ExitStack() as stack:

            def own(descriptor: int) -> int:
                stack.callback(os.close, descriptor)
                return descriptor

            kvm = own(os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
            step = "ask KVM for its version"
            version = fcntl.ioctl(kvm, _KVM_GET_API_VERSION, 0)
            if version != _KVM_API_VERSION:
                raise HostError(f"KVM speaks version {version} of its interface")
            step = "create a VM"
            vm = own(fcntl.ioctl(kvm, _KVM_CREATE_VM, 0))
            step = "give the VM memory"
            memory = mmap.mmap(-1, mmap.PAGESIZE)
            memory[0:1] = b"\xf4"  # hlt
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            region = struct.pack("=IIQQQ", 0, 0, 0x1000, mmap.PAGESIZE, address)
            fcntl.ioctl(vm, _KVM_SET_USER_MEMORY_REGION, region)
            step = "create a vCPU"
            vcpu = own(fcntl.ioctl(vm, _KVM_CREATE_VCPU, 0))
            state_bytes = fcntl.ioctl(kvm, _KVM_GET_VCPU_MMAP_SIZE, 0)
            state = stack.enter_context(mmap.mmap(vcpu, state_bytes))
            step = "set the vCPU's registers"
            sregs = bytearray(312)
            fcntl.ioctl(vcpu, _KVM_GET_SREGS, sregs)
            struct.pack_into("=QIH", sregs, 0, 0, 0xFFFF, 0)  # cs: base, limit, selector
            fcntl.ioctl(vcpu, _KVM_SET_SREGS, bytes(sregs))
            # Sixteen general registers, then rip and rflags.
            fcntl.ioctl(vcpu, _KVM_SET_REGS, struct.pack("=18Q", *[0] * 16, 0x1000, 2))
            step = "run the vCPU"
            fcntl.ioctl(vcpu, _KVM_RUN, 0)
            (reason,) = struct.unpack_from("=I", state, 8)
            if reason != _KVM_EXIT_HLT:
                raise HostError(f"KVM stopped for reason {reason} where a guest executed hlt")
    except OSError as error:
        raise HostError(f"KVM cannot {step}: {error.strerror}") from error


def probe_kvm() -> str:
    """Run one instruction under KVM; return what is wrong, empty when nothing is.

    In a process of its own, because a KVM that does not work may also not return. It proves that
    vCPUs run, not that a Linux guest boots.
    """
    if not KVM_DEVICE.exists():
        return f"there is no {KVM_DEVICE}"
    try:
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name],
            capture_output=True,
            text=True,
            timeout=_KVM_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return "a vCPU does not come back from its first instruction"
    if not done.returncode:
        return ""
    said = (done.stdout or done.stderr).strip().splitlines()
    return said[-1] if said else f"the probe of KVM ended with status {done.returncode}"


def _main() -> int:
    try:
        run_kvm_instruction()
    except HostError as error:
        sys.stdout.write(f"{error.cause}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
