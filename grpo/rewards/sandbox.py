"""What the kernel offers to hold a worker: namespaces, limits, privileges dropped, all descendants found and killed.

Linux, through libc; elsewhere the functions below do what is left: a session of its own and rlimits.
"""

import contextlib
import ctypes
import os
import platform
import resource
import signal
import struct
import sys

LINUX = sys.platform == "linux"
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
CAPABILITY_VERSION_3, CAP_DAC_READ_SEARCH = 0x20080522, 2
WITHOUT_NAMESPACES = "GRPO_REWARDS_WITHOUT_NAMESPACES"  # set to 1: as on a system that allows none

MAX_PROCESSES = 64  # of one worker, itself included
MAX_THREADS = 512  # and processes, where the kernel counts them for a worker alone
MAX_FILE_BYTES = 1 << 28
MAX_OPEN_FILES = 256


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if LINUX:
        _libc().prctl(option, value, 0, 0, 0)


def enclose() -> bool:
    """Put the children to come into namespaces of their own; False where the system does not allow it.

    Process, network and IPC namespace, and a user namespace where it takes one: they see no process but their own,
    have no network, and the death of the first child ends all the others, whatever they did to get away. Call
    before there are threads.
    """
    if not LINUX or os.environ.get(WITHOUT_NAMESPACES) == "1":
        return False
    inside = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC
    if os.geteuid() == 0 and _libc().unshare(inside) == 0:
        return True
    uid, gid = os.geteuid(), os.getegid()
    if _libc().unshare(CLONE_NEWUSER | inside) != 0:
        return False
    for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with contextlib.suppress(OSError), open(f"/proc/self/{file}", "w", encoding="ascii") as opened:
            opened.write(text)  # without a name for its user the worker can do less, not more
    return True


def die_with(parent: int, number: int) -> None:
    """Get signal `number` when the parent dies; end at once when it is dead already. Resets on a change of user."""
    _prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() not in (parent, 0):  # 0: it is outside our process namespace
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of descendants whose parents die, so that they are found, and reaped."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def hide() -> None:
    """Let no process of the same user read or write our memory or open files, nor those of our forks."""
    _prctl(PR_SET_DUMPABLE, 0)


def nest() -> None:
    """Make the next child the first process of one more namespace, where the system allows it."""
    if LINUX and os.environ.get(WITHOUT_NAMESPACES) != "1":
        _libc().unshare(CLONE_NEWPID)


def drop_privileges() -> None:
    """Give up capabilities, for good: for children, and through set-user-id programs, too."""
    if not LINUX:
        return
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    kept = 1 << CAP_DAC_READ_SEARCH if os.geteuid() == 0 else 0  # else a root could not read what others own
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    _libc().capset(header, struct.pack("=6I", kept, kept, 0, 0, 0, 0))


def limit(enclosed: bool) -> None:
    """Cores, files, processes. Memory comes later, when it is known what the worker needs idle."""
    wanted = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: MAX_FILE_BYTES, resource.RLIMIT_NOFILE: MAX_OPEN_FILES}
    own_count = enclosed and kernel() >= (5, 14)  # else all processes of the user count, here as elsewhere
    if own_count and os.geteuid() != 0:  # it does not bind a root, whose namespaces may come without a user's
        wanted[resource.RLIMIT_NPROC] = MAX_THREADS
    for what, most in wanted.items():
        _, hard = resource.getrlimit(what)
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (value, value))


def limit_memory(more_mb: int) -> None:
    """Allow `more_mb` MB of address space beyond what is mapped now."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    value = address_space() + (more_mb << 20)
    if LINUX and (hard == resource.RLIM_INFINITY or value < hard):
        resource.setrlimit(resource.RLIMIT_AS, (value, value))


def kernel() -> tuple[int, int]:
    """Major and minor version."""
    major, minor = platform.release().split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def address_space() -> int:
    """Bytes of this process's address space."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def resident(pids: list[int]) -> int:
    """Bytes of memory that these processes hold together; those that are gone count nothing."""
    pages = 0
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/statm", encoding="ascii") as file:
            words = file.read().split()
            pages += int(words[1]) - int(words[2])  # shared pages, such as those since the fork of code, not
    return pages * resource.getpagesize()


def descendants() -> list[int]:
    """Processes below this one, as /proc numbers them; none where the system does not tell."""
    found: list[int] = []
    stack = ["self"]
    while stack:
        pid = stack.pop()
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:  # gone
            continue
        for thread in threads:
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                children = file.read().split()
                found += map(int, children)
                stack += children
    return found


def kill_all(enclosed: bool, sessions: list[int]) -> None:
    """Kill every descendant, and reap them. `sessions`: process groups to kill where /proc does not tell.

    Enclosed, this is process 1 of its namespace, and one signal meets everybody in it.
    """
    while True:
        if enclosed:
            assert os.getpid() == 1  # anywhere else this would be everybody's end
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        else:
            for group in sessions:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, signal.SIGKILL)
            for pid in descendants():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)  # an orphan becomes our child before its parent is reaped: none is missed
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
