"""The system calls that a program in bubblewrap may not make: those that widen what it can reach in the kernel and that no solution needs.

Owns the filter as bytes; it is loaded by `bwrap --seccomp`.
"""

from __future__ import annotations

import platform
import struct
from functools import lru_cache

LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE, MISSING = 0x7FFF_0000, 0x0005_0001, 0x0005_0026
"""Verdicts: go on, EPERM, ENOSYS."""

NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
"""Offsets in the kernel's `struct seccomp_data`."""

X86_64 = 0xC000_003E
X32_BIT = 0x4000_0000
NEW_NAMESPACES = 0x7E02_0000
"""The flags of clone for new namespaces, user namespaces among them."""

CLONE, CLONE3 = 56, 435
REFUSED = {
    **{"ptrace": 101, "syslog": 103, "pivot_root": 155, "chroot": 161, "acct": 163, "mount": 165, "umount2": 166, "swapon": 167},
    **{"swapoff": 168, "reboot": 169, "init_module": 175, "delete_module": 176, "quotactl": 179, "kexec_load": 246, "add_key": 248},
    **{"request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298, "open_by_handle_at": 304, "setns": 308},
    **{"process_vm_readv": 310, "process_vm_writev": 311, "finit_module": 313, "kexec_file_load": 320, "bpf": 321},
    **{"userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428},
    **{"move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442},
    # Memory that is not a process's own, so that no limit counts it.
    **{"shmget": 29, "shmat": 30, "shmctl": 31, "shmdt": 67, "memfd_create": 319, "memfd_secret": 447},
}
"""Numbers on x86-64."""


@lru_cache
def seccomp_filter() -> bytes | None:
    """The filter as a classic BPF program; None on other processors than x86-64, where there is none."""
    if platform.machine() != "x86_64":
        return None
    # Every test jumps over the next instruction where it does not hold, so none needs to know how long the program is.
    program = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_EQUAL, 1, 0, X86_64),
        (RETURN, 0, 0, REFUSE),  # 32-bit system calls have other numbers
        (LOAD, 0, 0, NUMBER),
        (JUMP_AT_LEAST, 0, 1, X32_BIT),
        (RETURN, 0, 0, REFUSE),
        (JUMP_EQUAL, 0, 1, CLONE3),
        (RETURN, 0, 0, MISSING),  # its flags are behind a pointer; libraries fall back to clone
    ]
    for number in REFUSED.values():
        program += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    program += [
        (JUMP_EQUAL, 1, 0, CLONE),
        (RETURN, 0, 0, ALLOW),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (JUMP_ANY_BIT, 0, 1, NEW_NAMESPACES),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
