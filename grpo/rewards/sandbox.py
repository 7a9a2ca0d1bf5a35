"""What the kernel offers to confine a worker: namespaces, limits, dropping privileges, killing all descendants.

Linux, through libc. On other systems only the portable part remains: a session of its own, and rlimits.
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
WITHOUT_NAMESPACES = "GRPO_REWARDS_WITHOUT_NAMESPACES"  # set to 1: as on a system that does not allow namespaces

MAX_PROCESSES = 64  # of one worker, itself included
MAX_THREADS = 512  # threads and processes together, where the kernel counts them for each worker separately
MAX_FILE_BYTES = 1 << 28
MAX_OPEN_FILES = 256


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if LINUX:
        _libc().prctl(option, value, 0, 0, 0)


def enclose() -> bool:
    """Put future children into new namespaces; False where the system does not allow it.

    Process, network and IPC namespace, and a user namespace where one is needed: the children see only their own
    processes, have no network, and the death of the first child kills all others, whatever sessions or forks they
    made. Must be called before the process has threads.
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
            opened.write(text)  # best effort: an unmapped user has fewer rights, not more
    return True


def die_with(parent: int, number: int) -> None:
    """Get signal `number` when the parent dies; exit if it is dead already. A change of user resets this."""
    _prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() not in (parent, 0):  # 0: the parent is outside our process namespace
        os._exit(1)


def adopt_orphans(wanted: bool = True) -> None:
    """Become the parent of descendants whose parents die, so that they can be found and reaped; False: no longer."""
    _prctl(PR_SET_CHILD_SUBREAPER, int(wanted))


def hide() -> None:
    """Forbid processes of the same user to read or write the memory or open files of this process and its forks."""
    _prctl(PR_SET_DUMPABLE, 0)


def nest() -> None:
    """Make the next child the first process of a nested process namespace, where the system allows it."""
    if LINUX and os.environ.get(WITHOUT_NAMESPACES) != "1":
        _libc().unshare(CLONE_NEWPID)


def drop_privileges() -> None:
    """Give up capabilities permanently, also for children and through set-user-id programs."""
    if not LINUX:
        return
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    # root keeps one, without which it could not read files of other users
    kept = 1 << CAP_DAC_READ_SEARCH if os.geteuid() == 0 else 0
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    _libc().capset(header, struct.pack("=6I", kept, kept, 0, 0, 0, 0))


def limit(enclosed: bool) -> None:
    """Limit core dumps, files and processes. Memory is limited after the import, when the idle need is known."""
    wanted = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: MAX_FILE_BYTES, resource.RLIMIT_NOFILE: MAX_OPEN_FILES}
    # before 5.14 the limit counted the user's processes outside of the namespace too; it never binds root
    own_count = enclosed and kernel() >= (5, 14)
    if own_count and os.geteuid() != 0:
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
    """Major and minor version of the kernel."""
    major, minor = platform.release().split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def address_space() -> int:
    """Bytes of this process's address space, from /proc."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def resident(pids: list[int]) -> int:
    """Bytes of private memory of these processes together; ended processes count 0."""
    pages = 0
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/statm", encoding="ascii") as file:
            words = file.read().split()
            pages += int(words[1]) - int(words[2])  # less shared pages, such as code that a fork shares
    return pages * resource.getpagesize()


def descendants() -> list[int]:
    """Process ids of all descendants, from /proc; empty where /proc does not list them."""
    found: list[int] = []
    stack = ["self"]
    while stack:
        pid = stack.pop()
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:  # the process has ended
            continue
        for thread in threads:
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                children = file.read().split()
                found += map(int, children)
                stack += children
    return found


def kill_all(enclosed: bool, sessions: list[int]) -> None:
    """Kill and reap every descendant. `sessions`: process groups to kill where /proc does not list descendants.

    enclosed: this is process 1 of its namespace, so that one signal reaches every other process in it.
    """
    while True:
        if enclosed:
            assert os.getpid() == 1  # anywhere else the signal would kill every process of the user
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
            os.waitpid(-1, 0)  # an orphan becomes our child before its parent is reaped, so none is missed
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
