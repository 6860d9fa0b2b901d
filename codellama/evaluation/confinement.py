"""What Linux offers to confine a process: namespaces, Landlock, seccomp, limits. One function for each layer.

Each raises OSError where this machine refuses it, and knows nothing of the others. Nothing here knows of programs or
of what they are run for. macOS has the limits alone.
"""

import contextlib
import ctypes
import os
import resource
import stat
import struct
import sys
from typing import Any

LINUX = sys.platform == "linux"
READABLE = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
WORK = "/work"  # the program's only folder, where it has a root of its own
INODES = 4096
OPEN_FILES = 64

CLONE_NEWNS, CLONE_NEWUSER, CLONE_OTHERS = 0x20000, 0x10000000, 0x6C000000  # others: UTS, IPC, PID, NET
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 0x2, 0x4, 0x1000, 0x4000, 0x40000, 0x2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 0x1
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
# By machine: AUDIT_ARCH, pivot_root, capset, and the calls that are refused: socket, ptrace, process_vm_readv and
# _writev, io_uring_setup (which opens sockets, too), unshare, setns, mount, bpf, perf_event_open, userfaultfd, add_key,
# request_key, keyctl, setuid, setreuid, setresuid. Source: the kernel's tables of system calls.
MACHINES = {
    "x86_64": (
        0xC000003E,
        155,
        126,
        (41, 101, 310, 311, 425, 272, 308, 165, 321, 298, 323, 248, 249, 250, 105, 113, 117),
    ),
    "aarch64": (
        0xC00000B7,
        41,
        91,
        (198, 117, 270, 271, 425, 97, 268, 40, 280, 241, 282, 217, 218, 219, 146, 145, 147),
    ),
}


def call(name: str, *arguments: Any) -> int:
    """Call libc's function, which sets errno.

    Raises:
        OSError: it failed, or this libc has none of that name.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        result: int = getattr(libc, name)(*arguments)
    except AttributeError:
        raise OSError(f"no {name} here") from None
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def numbers(value: int) -> ctypes.c_ulong:
    """Make an argument of prctl or syscall, which take words."""
    return ctypes.c_ulong(value)


def syscall(number: int, *arguments: Any) -> int:
    """Call the kernel by number: libc has no function for it."""
    return call("syscall", numbers(number), *arguments)


def prctl(option: int, value: int) -> None:
    """Set one property of this process."""
    call("prctl", option, numbers(value), numbers(0), numbers(0), numbers(0))


def own_number() -> int | None:
    """Return a user id that nobody has, so that the program's processes can be counted and ended by it alone."""
    with open("/proc/self/status") as status:
        capabilities = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff"))
    if os.geteuid() != 0 or capabilities & 0xC0 != 0xC0:  # CAP_SETGID, CAP_SETUID
        return None
    with open("/proc/self/uid_map") as lines:
        ranges = [(int(inside), int(count)) for inside, _, count in map(str.split, lines)]
    for number in (0x6A000000 + os.getpid(), 20_000 + os.getpid() % 40_000):
        if any(inside <= number < inside + count for inside, count in ranges):
            return number
    return None


def open_to_all(path: str) -> bool:
    """Say whether a user that nobody knows may read a file."""
    folder = os.path.dirname(path)
    while folder != os.path.dirname(folder):
        if not os.stat(folder).st_mode & stat.S_IXOTH:
            return False
        folder = os.path.dirname(folder)
    return bool(os.stat(path).st_mode & stat.S_IROTH)


def open_namespaces() -> None:
    """Give this process's children a network without devices, and a table of processes of their own.

    Raises:
        OSError: neither root nor an unprivileged user may do so here.
    """
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # a container's root may lack the right; then the way of other users
            call("unshare", CLONE_OTHERS)
            return
    user, group = os.geteuid(), os.getegid()
    call("unshare", CLONE_NEWUSER | CLONE_OTHERS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def libraries() -> list[str]:
    """List what a Python without site packages reads."""
    return [path for path in dict.fromkeys([*READABLE, sys.base_prefix, *sys.path]) if os.path.isabs(path)]


def make_root(folder: str, size: int, owner: int) -> None:
    """Replace the root of the file system by one with Python, four devices, and a folder in memory to write to.

    Raises:
        OSError: this kernel or its policy does not let us.
    """
    call("unshare", CLONE_NEWNS)
    call("mount", None, b"/", None, numbers(MS_REC | MS_PRIVATE), None)
    bounds = f"size={size},nr_inodes={INODES},mode=0700,uid={owner}"
    call("mount", b"tmpfs", folder.encode(), b"tmpfs", numbers(MS_NOSUID | MS_NODEV), b"size=1m,mode=0755")
    try:
        done: list[str] = []
        for path in [*libraries(), *DEVICES]:
            if not os.path.exists(path) or any(path.startswith(f"{one}/") for one in done):
                continue
            target = folder + path
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if os.path.islink(path):
                os.symlink(os.readlink(path), target)
                continue
            if os.path.isdir(path):
                os.makedirs(target, exist_ok=True)
                done.append(path)
            else:
                os.close(os.open(target, os.O_CREAT))
            call("mount", path.encode(), target.encode(), None, numbers(MS_BIND | MS_REC), None)
        os.mkdir(folder + WORK)
        for name in ("/tmp", "/proc"):
            os.mkdir(folder + name)
        attributes = ctypes.create_string_buffer(struct.pack("QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0), 32)
        syscall(MOUNT_SETATTR, AT_FDCWD, folder.encode(), AT_RECURSIVE, attributes, numbers(32))
        call("mount", b"tmpfs", (folder + WORK).encode(), b"tmpfs", numbers(MS_NOSUID | MS_NODEV), bounds.encode())
        os.chdir(folder)
        syscall(MACHINES[os.uname().machine][1], b".", b".")
    except BaseException:
        os.chdir("/")
        call("umount2", folder.encode(), MNT_DETACH)
        raise
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def landlock_version() -> int:
    """Return what the kernel's Landlock can do: the 4th version knows of TCP, the 6th of signals.

    Raises:
        OSError: the kernel has no Landlock.
    """
    return syscall(LANDLOCK_CREATE, None, numbers(0), 1)


def restrict_files(work: str, own_root: bool) -> None:
    """Let this process and its children read what Python needs and write to its folder, with Landlock.

    Raises:
        OSError: the kernel has no Landlock.
    """
    version = landlock_version()
    every = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1
    handled = struct.pack("QQQ", every, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    rules = syscall(LANDLOCK_CREATE, ctypes.create_string_buffer(handled, 24), numbers(24), 0)
    of_files = every & 0b1100_0000_0000_0111  # execute, write, read, truncate, ioctl
    allowed = [(path, 0b1101) for path in (["/"] if own_root else libraries())]
    for path, rights in [*allowed, *((device, 0b110) for device in DEVICES), (work, every)]:
        if not os.path.exists(path):
            continue
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights &= every if stat.S_ISDIR(os.fstat(place).st_mode) else of_files
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, place), 12)
        syscall(LANDLOCK_ADD, rules, 1, rule, 0)
        os.close(place)
    syscall(LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def refuse_calls() -> None:
    """Let the kernel refuse sockets, and the calls that look into other processes, with a seccomp filter.

    Raises:
        OSError: the kernel has no filters, or the machine is not in our table.
    """
    if os.uname().machine not in MACHINES:
        raise OSError(f"no table of calls for {os.uname().machine}")
    architecture, _, _, refused = MACHINES[os.uname().machine]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000  # refuse: EPERM
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    steps += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # calls of x32 have other numbers
    for number in refused:
        steps += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    code = b"".join(struct.pack("HBBI", *step) for step in [*steps, (give, 0, 0, allow)])
    buffer = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("HP", len(code) // 8, ctypes.addressof(buffer)), 16)
    call("prctl", PR_SET_SECCOMP, numbers(2), program, numbers(0), numbers(0))


def give_up_rights(user: int | None, counted_only: bool) -> None:
    """Become a user without rights, for good.

    `counted_only` stays the owner of root's files, for a Python that others cannot read: the kernel limits the number
    of processes by the real user, and does not limit root's.
    """
    if user is not None and counted_only:
        os.setresuid(user, -1, -1)
    elif user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if os.uname().machine in MACHINES:
        header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0), 8)
        syscall(MACHINES[os.uname().machine][2], header, ctypes.create_string_buffer(24))


def limit(request: dict[str, Any], processes: int) -> None:
    """Set the limits of this process, which its children inherit and none can raise."""
    seconds = max(1, int(-(-request["cpu_time"] // 1)))
    limits = {"CPU": seconds, "FSIZE": request["file_size"], "NPROC": processes, "NOFILE": OPEN_FILES, "CORE": 0}
    for name, value in {**limits, "MSGQUEUE": 0, "AS": request["memory"]}.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        most = value + 1 if name == "CPU" else value  # SIGXCPU can be ignored, what follows cannot
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        with contextlib.suppress(*(() if LINUX else (ValueError, OSError))):  # macOS refuses AS
            resource.setrlimit(kind, (min(value, most), most))


def tasks_of(user: int) -> int:
    """Count the threads of a user."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == user:
                count += len(os.listdir(f"/proc/{name}/task"))
    return count
