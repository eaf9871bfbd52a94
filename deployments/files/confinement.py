"""Takes from a process what it does not need: files, the network, other processes. What it has open it keeps.

Linux has two means that need no rights: Landlock (kernel 5.13; of TCP from 6.7 on) bounds what can be opened, and a
filter of system calls (seccomp) refuses what Landlock leaves: other sockets, programs, signals, modes of files. The
numbers of the calls are those of x86-64. This module imports nothing of this project: it is loaded by its path.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections.abc import Iterable

_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2  # of prctl
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on all machines
_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute (a library), read a file, list a folder
_READ_FILE = 1 << 0 | 1 << 2
_ACCESS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}  # kinds of access to files that each version knows; from 5 on 16
_LATEST_BITS = 16

_X86_64 = 0xC000003E
_OTHER_ABI = 0x40000000  # the same calls by other numbers
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _IS, _AT_LEAST, _HAS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16  # where they stand in what a filter sees
_CLONE, _CLONE_THREAD, _CLONE3, _PRLIMIT = 56, 0x10000, 435, 302
_REFUSED = {
    "socket": 41,
    "socketpair": 53,
    "fork": 57,
    "vfork": 58,
    "execve": 59,
    "kill": 62,
    "chmod": 90,
    "fchmod": 91,
    "chown": 92,
    "fchown": 93,
    "lchown": 94,
    "ptrace": 101,
    "utime": 132,
    "setpriority": 141,
    "mount": 165,
    "setxattr": 188,
    "lsetxattr": 189,
    "fsetxattr": 190,
    "tkill": 200,
    "sched_setaffinity": 203,
    "tgkill": 234,
    "utimes": 235,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "fchownat": 260,
    "futimesat": 261,
    "fchmodat": 268,
    "unshare": 272,
    "utimensat": 280,
    "perf_event_open": 298,
    "open_by_handle_at": 304,
    "setns": 308,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "bpf": 321,
    "execveat": 322,
    "userfaultfd": 323,
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "pidfd_open": 434,
    "pidfd_getfd": 438,
    "fchmodat2": 452,
}


class _Rules(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scope", ctypes.c_uint64))


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("value", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def confine(readable: Iterable[str]) -> list[str]:
    """Leaves this process nothing but to compute, and to read below the paths ``readable``. It cannot be undone.

    Returns what this system has no means for, in words.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    missing = []
    if platform.system() != "Linux" or libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
        return ["Landlock", "filter of system calls"]
    if not _close_files(libc, readable):
        missing.append("Landlock")
    if not _close_calls(libc):
        missing.append("filter of system calls")
    return missing


def _close_files(libc: ctypes.CDLL, readable: Iterable[str]) -> bool:
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    rules = _Rules((1 << _ACCESS_BITS.get(version, _LATEST_BITS)) - 1, 0b11, 0b11)  # TCP; abstract sockets, signals
    known = 8 if version < 4 else 16 if version < 6 else 24  # bytes of the rules
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(known), 0)
    for path in readable:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # what is not there is not read
        beneath = _Beneath(_READ if os.path.isdir(path) else _READ_FILE, place)
        libc.syscall(_ADD_RULE, ruleset, 1, ctypes.byref(beneath), 0)
        os.close(place)
    is_closed: bool = libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return is_closed


def _close_calls(libc: ctypes.CDLL) -> bool:
    if platform.machine() != "x86_64":
        return False
    refuse = (_RETURN, 0, 0, _FAIL | errno.EPERM)
    instructions = [
        (_LOAD, 0, 0, _MACHINE),
        (_IS, 1, 0, _X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _OTHER_ABI),
        refuse,
        (_IS, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _FAIL | errno.ENOSYS),  # whose arguments a filter does not see: clone is tried then
        *[step for number in _REFUSED.values() for step in ((_IS, 0, 1, number), refuse)],
        # Threads and its own limits are left to it: a clone with the flag, and a limit of process 0.
        (_IS, 0, 4, _CLONE),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_HAS, 0, 1, _CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW),
        refuse,
        (_IS, 0, 4, _PRLIMIT),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_IS, 0, 1, 0),
        (_RETURN, 0, 0, _ALLOW),
        refuse,
        (_RETURN, 0, 0, _ALLOW),
    ]
    program = (_Instruction * len(instructions))(*(_Instruction(*each) for each in instructions))
    whole = _Program(len(instructions), program)
    is_closed: bool = libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(whole), 0, 0) == 0
    return is_closed
