"""Linux doors that get closed around a program, by ctypes: namespaces, mounts, Landlock, limits.

Runs inside the sandbox, started without site-packages: standard library only. Every function
raises OSError if the machine does not let it; whoever calls it must not go on then.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterable

NOBODY = 2**16 - 2  # the kernel's overflow user; no file belongs to it
LIBC = ctypes.CDLL(None, use_errno=True)

# --- calling the kernel --------------------------------------------------------------------------

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
MOUNT_SETATTR = 442
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
CAPABILITIES = 64  # more than there are; the kernel refuses unknown numbers


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _syscall(number: int, *arguments: object) -> int:
    return _checked(LIBC.syscall(ctypes.c_long(number), *arguments))


def prctl(option: int, value: int) -> None:
    _checked(LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


# --- namespaces ----------------------------------------------------------------------------------

NEW_MOUNT, NEW_UTS, NEW_IPC = 2**17, 2**26, 2**27
NEW_USER, NEW_PID, NEW_NET = 2**28, 2**29, 2**30


def enter_namespaces() -> None:
    """Own users, processes (from the next fork on), mounts, network and IPC for this process.

    Inside, user 0 is who we are outside. The superuser gets a second user, 1, that is nobody
    outside: the kernel never counts processes of the real superuser, but it does those of nobody.
    """
    user, group = os.geteuid(), os.getegid()
    flags = NEW_USER | NEW_PID | NEW_MOUNT | NEW_NET | NEW_IPC | NEW_UTS
    if user == 0 and _unshare_with_two_users(flags):
        return
    if user != 0:
        _checked(LIBC.unshare(flags))
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {user} 1")
    _write("/proc/self/gid_map", f"0 {group} 1")


def _unshare_with_two_users(flags: int) -> bool:
    """Unshare; a helper that stays outside writes the map, for inside nobody may map others."""
    target, (wait, go) = os.getpid(), os.pipe()
    helper = os.fork()
    if helper == 0:
        status = 1
        try:
            os.close(go)
            os.read(wait, 1)
            for name in ("uid_map", "gid_map"):
                _write(f"/proc/{target}/{name}", f"0 0 1\n1 {NOBODY} 1")
            status = 0
        finally:
            os._exit(status)
    os.close(wait)
    try:
        _checked(LIBC.unshare(flags))
    finally:
        os.close(go)
        _, status = os.waitpid(helper, 0)
    return status == 0


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


# --- what can be seen of the host's files --------------------------------------------------------

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32
MS_BIND, MS_REC, MS_PRIVATE = 2**12, 2**14, 2**18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 2**15
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def libraries() -> list[str]:
    """Folders and files that the interpreter and its extension modules read; no secrets there."""
    wanted = [
        os.path.dirname(os.__file__),
        os.path.join(sys.base_prefix, sys.platlibdir),
        os.path.join(sys.base_prefix, "lib"),
        *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"),
        *("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo"),
    ]
    found: list[str] = []
    for path in sorted({os.path.abspath(path) for path in wanted if os.path.exists(path)}):
        if not any(path.startswith(above + "/") for above in found):
            found.append(path)
    return found


def hide_host(root: str, work_mib: int) -> str:
    """Make a new, small, read-only file tree the root: libraries, four devices and /tmp.

    `root` is an empty host folder that is covered, in this mount namespace only. Returns the one
    folder that can be written: it lives in memory, holds `work_mib` and vanishes with us.
    """
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in libraries():
        _show(path, root + path)
    for path in DEVICES:
        _show(path, root + path)
    os.mkdir(root + "/tmp")
    # No /proc at all: nobody can be looked up, and no descriptor reopened, by number.
    _mount("tmpfs", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={work_mib}m,mode=1777")
    _mount(None, root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(root)
    _checked(LIBC.pivot_root(b".", b"."))
    _checked(LIBC.umount2(b".", MNT_DETACH))
    os.chdir("/tmp")
    return "/tmp"


def _show(path: str, place: str) -> None:
    """The host's `path`, read-only, at `place`. A link stays a link (/lib to usr/lib)."""
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(path) and os.path.isdir(path):
        os.symlink(os.readlink(path), place)
        return
    if os.path.isdir(path):
        os.makedirs(place, exist_ok=True)
    else:
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(path, place, None, MS_BIND | MS_REC)
    if path not in DEVICES:
        attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
        size = ctypes.c_size_t(ctypes.sizeof(attributes))
        _syscall(MOUNT_SETATTR, AT_FDCWD, place.encode(), AT_RECURSIVE, attributes, size)


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    data = None if options is None else options.encode()
    _checked(LIBC.mount(*texts, ctypes.c_ulong(flags), data))


# --- Landlock: rights that the program gives up for good -----------------------------------------

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 2**0, 2**1, 2**2, 2**3
MAKE_CHAR, MAKE_BLOCK, TRUNCATE, IOCTL_DEV = 2**6, 2**11, 2**14, 2**15
RIGHTS_BY_ABI = {1: 2**13 - 1, 2: 2**14 - 1, 3: 2**15 - 1, 4: 2**15 - 1}  # 5 and up: 16 rights
BIND_AND_CONNECT_TCP = 0b11
ABSTRACT_SOCKETS_AND_SIGNALS = 0b11


def landlock(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Give up all files but these (and running any), TCP, and what lies outside: signals, sockets.

    TCP needs ABI 4 (Linux 6.7), signals and abstract sockets ABI 6 (Linux 6.12); an older kernel
    gives what it has, and the probe of the parent finds out whether that is enough.
    """
    abi = _syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    rights = RIGHTS_BY_ABI.get(abi, 2**16 - 1)
    attributes = (ctypes.c_uint64 * 3)(
        rights,
        BIND_AND_CONNECT_TCP if abi >= 4 else 0,
        ABSTRACT_SOCKETS_AND_SIGNALS if abi >= 6 else 0,
    )
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    ruleset = _syscall(LANDLOCK_CREATE, attributes, size, ctypes.c_uint32(0))
    in_folder = rights & ~(EXECUTE | MAKE_CHAR | MAKE_BLOCK | IOCTL_DEV)
    for path in readable:
        _allow(ruleset, path, READ_FILE | READ_DIR)
    for path in DEVICES:
        _allow(ruleset, path, rights & (READ_FILE | WRITE_FILE | TRUNCATE))
    for path in writable:
        _allow(ruleset, path, in_folder)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    _syscall(LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    if not os.path.isdir(path):
        rights &= ~READ_DIR
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        # The kernel's struct is packed: 8 bytes of rights, 4 of descriptor.
        rule = rights.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder)
        _syscall(LANDLOCK_ADD, ruleset, 1, rule, ctypes.c_uint32(0))
    finally:
        os.close(descriptor)


# --- privileges and limits -----------------------------------------------------------------------


def drop_privileges(second_user: bool) -> None:
    """No capabilities, now or by running a file; in namespaces of the superuser, be nobody."""
    for capability in range(CAPABILITIES):
        LIBC.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)  # refused if not ours
    if second_user:
        os.setgroups([])
        os.setresgid(1, 1, 1)
        os.setresuid(1, 1, 1)
    header = (ctypes.c_uint32 * 2)(0x2008_0522, 0)  # version 3, this process
    _checked(LIBC.capset(header, (ctypes.c_uint32 * 6)()))
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def can_be_nobody() -> bool:
    """Whether enter_namespaces mapped nobody, and nobody may read the standard library."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        users = len(file.readlines())
    return users == 2 and os.stat(os.path.dirname(os.__file__)).st_mode & 0o5 == 0o5


def threads_of_user() -> int:
    """What RLIMIT_NPROC has counted so far where we share our user with the rest of the machine."""
    found, us = 0, os.getuid()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == us:
                found += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return found


def limit(kind: int, value: int) -> None:
    """Lower one resource limit for good; a lower limit that is there already stays."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))
