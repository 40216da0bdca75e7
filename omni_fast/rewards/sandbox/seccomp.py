"""The system calls that model-written code may make, as a classic-BPF seccomp program built here, without libseccomp.

An allow-list: what a pure-Python computation needs, and nothing that creates a process, a namespace, a socket, a mount
or a signal. Unknown calls fail with EPERM (the program goes on and can be scored); a foreign architecture kills.
The numbers stand in a search tree of ranges: the kernel walks the filter for every call number once per installation,
and it is installed once per job.
"""

from __future__ import annotations

import platform
import struct

# name: (x86_64, aarch64); None where the architecture lacks the call. Sources: asm/unistd_64.h, asm-generic/unistd.h.
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "access": (21, None), "pipe": (22, None), "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216),
    "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None), "nanosleep": (35, 101), "getpid": (39, 172),
    "exit": (60, 93), "uname": (63, 160), "fcntl": (72, 25), "fsync": (74, 82), "ftruncate": (77, 46),
    "getcwd": (79, 17), "chdir": (80, 49), "rename": (82, None), "mkdir": (83, None), "rmdir": (84, None),
    "unlink": (87, None), "readlink": (89, None), "umask": (95, 166), "gettimeofday": (96, 169),
    "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174),
    "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173),
    "sigaltstack": (131, 132), "gettid": (186, 178), "time": (201, None), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94), "openat": (257, 56),
    "mkdirat": (258, 34), "newfstatat": (262, 79), "unlinkat": (263, 35), "renameat": (264, 38),
    "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73),
    "set_robust_list": (273, 99), "dup3": (292, 24), "pipe2": (293, 59), "prlimit64": (302, 261),
    "renameat2": (316, 276), "getrandom": (318, 278), "statx": (332, 291), "rseq": (334, 293),
    "faccessat2": (439, 439),
}  # fmt: skip
CLONE = (56, 220)
CLONE3 = (435, 435)
IOCTL = (16, 29)
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

RET_KILL_PROCESS = 0x80000000
RET_ALLOW = 0x7FFF0000
RET_ERRNO = 0x00050000
EPERM, ENOTTY, ENOSYS = 1, 25, 38
CLONE_THREAD = 0x00010000
CLONE_NEW_ANY = 0x7E020080  # every CLONE_NEW* flag: user, pid, net, ipc, uts, cgroup, mount, time
X32_BIT = 0x40000000

LD_ABS, JEQ, JGE, JGT, AND, RET = 0x20, 0x15, 0x35, 0x25, 0x54, 0x06
OFFSET_NR, OFFSET_ARCH, OFFSET_ARG0 = 0, 4, 16

Code = list[tuple[int, int, int, int]]  # operation, jump if true, jump if false, operand


def build(machine: str = platform.machine()) -> bytes:
    """The filter as an array of `struct sock_filter`. Raises KeyError for a machine without a table."""
    if machine not in AUDIT_ARCH:
        raise KeyError(f"no system call table for {machine}")
    column = list(AUDIT_ARCH).index(machine)
    code: Code = [
        (LD_ABS, 0, 0, OFFSET_ARCH),
        (JEQ, 1, 0, AUDIT_ARCH[machine]),  # 32-bit entry points have other numbers for the same calls
        (RET, 0, 0, RET_KILL_PROCESS),
        (LD_ABS, 0, 0, OFFSET_NR),
        (JGE, 0, 1, X32_BIT),  # x32 is a second door to every call on x86_64
        (RET, 0, 0, RET_KILL_PROCESS),
        (JEQ, 0, 1, CLONE3[column]),  # its flags lie in memory, out of the filter's sight: libc falls back to clone
        (RET, 0, 0, RET_ERRNO | ENOSYS),
        (JEQ, 0, 1, IOCTL[column]),  # what isatty() expects to hear of a file; all else behind ioctl stays shut
        (RET, 0, 0, RET_ERRNO | ENOTTY),
        (JEQ, 0, 5, CLONE[column]),  # threads yes, processes and namespaces no
        (LD_ABS, 0, 0, OFFSET_ARG0),
        (AND, 0, 0, CLONE_THREAD | CLONE_NEW_ANY),
        (JEQ, 0, 1, CLONE_THREAD),
        (RET, 0, 0, RET_ALLOW),
        (RET, 0, 0, RET_ERRNO | EPERM),
    ]
    code += _tree(_ranges(sorted(number for pair in ALLOWED.values() if (number := pair[column]) is not None)))
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Sorted numbers as inclusive ranges."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def _tree(ranges: list[tuple[int, int]]) -> Code:
    """Instructions that allow exactly `ranges`; each half ends in returns, so no jump leaves it."""
    if len(ranges) == 1:
        low, high = ranges[0]
        return [(JGE, 0, 2, low), (JGT, 1, 0, high), (RET, 0, 0, RET_ALLOW), (RET, 0, 0, RET_ERRNO | EPERM)]
    middle = len(ranges) // 2
    left = _tree(ranges[:middle])
    return [(JGE, len(left), 0, ranges[middle][0]), *left, *_tree(ranges[middle:])]
