"""The command line that builds the outer jail: an empty world with one interpreter in it and no way out.

bubblewrap gives new user, pid, network, ipc, uts and cgroup namespaces, no capabilities, an empty environment and a
root file system made here of read-only parts. Only the interpreter and its standard library are in it: installed
packages are hidden, because data sets with their solutions live in site-packages.
"""

from __future__ import annotations

import glob
import os
import platform
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from omni_fast.rewards.sandbox.job import JailError

NOBODY = 65534  # uid and gid of the jail when the trainer runs as root

_PROBE = (
    "import sys, sysconfig, os; stdlib = os.path.realpath(sysconfig.get_paths()['stdlib']); "
    "print(sys.version_info >= (3, 9), os.path.realpath(sys.executable), stdlib, sys.base_prefix, sep='\\n')"
)


@lru_cache(maxsize=1)
def interpreter() -> tuple[str, str, str]:
    """Executable, standard library and prefix of the Python for the jail.

    The system's comes first: a home folder of mode 700 is shut to the uid the jail runs as, and an interpreter with a
    shared libpython must lie at its own path. Raises JailError.
    """
    reasons = []
    for candidate in dict.fromkeys(("/usr/bin/python3", "/usr/local/bin/python3", os.path.realpath(sys.executable))):
        try:
            probe = subprocess.run(
                [candidate, "-I", "-S", "-c", _PROBE], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append(f"{candidate}: {error}")
            continue
        recent, executable, stdlib, prefix = probe.stdout.splitlines()
        if recent != "True":
            reasons.append(f"{candidate} is older than 3.9")
        elif os.getuid() == 0 and not (_open_to_all(executable) and _open_to_all(stdlib)):
            reasons.append(f"{candidate} lies in a folder that only root may enter")
        else:
            return executable, stdlib, prefix
    raise JailError("; ".join(reasons))


def _open_to_all(path: str) -> bool:
    return all(os.stat(folder).st_mode & 0o001 for folder in (Path(path), *Path(path).parents))


def command(jail_fd: int, wire_fd: int, argument: str) -> list[str]:
    """The bwrap command. jail_fd, wire_fd: descriptors that hold jail.py and wire.py. Raises JailError."""
    executable, stdlib, prefix = interpreter()
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise JailError("bwrap is not installed (package bubblewrap)")
    triplet = getattr(sys.implementation, "_multiarch", f"{platform.machine()}-linux-gnu")
    libraries = (
        [f"/usr/lib/{triplet}", "/usr/lib64"] if os.path.isdir(f"/usr/lib/{triplet}") else ["/usr/lib64", "/usr/lib"]
    )
    shared = [os.path.join(prefix, "lib", Path(name).name) for name in glob.glob(f"{prefix}/lib/libpython3*.so*")]
    visible = list(dict.fromkeys(path for path in [*libraries, executable, stdlib, *shared] if os.path.exists(path)))
    hidden = [path for root in visible for pattern in ("", "python3*/") for name in ("site", "dist")
              for path in glob.glob(f"{root}/{pattern}{name}-packages")]  # fmt: skip
    line = [bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    # A fixed hash seed makes the order of sets, and so the reward, the same in every run.
    for name, value in (("PYTHONHASHSEED", "0"), ("LC_ALL", "C.UTF-8"), ("LD_LIBRARY_PATH", f"{prefix}/lib")):
        line += ["--setenv", name, value]
    line += "--hostname jail --cap-drop ALL".split()
    for path in visible:
        line += ["--ro-bind", path, path]
    for path in dict.fromkeys(hidden):
        line += ["--tmpfs", path, "--remount-ro", path]
    line += "--symlink usr/lib /lib --symlink usr/lib64 /lib64".split()
    line += "--proc /proc --dir /tmp --dir /empty --dir /dev --dev-bind /dev/null /dev/null".split()
    line += ["--ro-bind-data", str(jail_fd), "/jail/jail.py", "--ro-bind-data", str(wire_fd), "/jail/wire.py"]
    # The root itself is a tmpfs of the jail's uid: left writable, it would carry files from job to job without a bound.
    line += ["--remount-ro", "/", "--chdir", "/"]
    return [*line, executable, "-I", "-S", "-B", "/jail/jail.py", argument]
