"""How a command is shut in: the ways this machine may have, from the strongest, and which of them works here.

Owns the command lines of bubblewrap, unshare and plain resource limits, and trying them out. Running, feeding and killing what is
shut in is `rewards.sandbox`.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

TIERS = ("bubblewrap", "unshare", "rlimits")
"""From the strongest to the weakest. The last one has no namespaces: what it runs can read files and open sockets."""

STARTED = b"\1"
"""What comes before the output of a program that was really started, so that a sandbox that failed is not taken for a program that did."""

INSTALL = "install bubblewrap (`apt-get install bubblewrap`), or allow user namespaces"
FIRST_UID, UIDS = 0x6000_0000, 0x1000_0000
SYSTEM_FOLDERS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64")
DEVICES = ("null", "zero", "full", "random", "urandom")
_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run of a program may use.

    Attributes:
        cpu_seconds: of all its processes together.
        wall_seconds: from start to end.
        memory_mib: of all its processes together, and address space of each.
        processes: processes and threads that exist at once.
        file_mib: what it may write into its private folder.
        output_kib: what it may print.
    """

    cpu_seconds: float = 4.0
    wall_seconds: float = 8.0
    memory_mib: int = 512
    processes: int = 16
    file_mib: int = 16
    output_kib: int = 1024


@dataclass(frozen=True, slots=True)
class Way:
    """A tier, and whether it drops to a user id of its own (needs root) or stays the caller in a user namespace."""

    tier: str
    drops_user: bool


def new_uid() -> int:
    """A user id that no other run of this machine has at the moment: so limits count, and signals reach, that run alone."""
    return FIRST_UID + (os.getpid() * 64 + next(_serial) % 64) % UIDS


def command(way: Way, program: Sequence[str], box: Path, root: Path, limits: Limits, uid: int, seccomp: int | None = None) -> list[str]:
    """The command that runs `program` shut in.

    Args:
        program: its command; what it reads is below `box_path`.
        box: folder of this machine that it may read.
        root: an empty folder of this machine, which the `unshare` tier mounts over.
        uid: the user id it gets where the way drops to one.
        seccomp: a descriptor with the system call filter, for bubblewrap.
    """
    inner = [*_drop(way, uid), *_limit(way, limits), "/bin/sh", "-c", r'printf "\001"; exec "$@"', "sh", *program]
    if way.tier == "bubblewrap":
        filtered = [] if seccomp is None else ["--seccomp", str(seccomp)]
        return [*_bubblewrap(way, box, limits), *filtered, "--", *inner]
    if way.tier == "unshare":
        namespaces = ["--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]
        user = [] if way.drops_user else ["--user", "--map-root-user"]
        script = _mounts(box, root, limits) + f"\n{shlex.join(inner)}"
        return ["setpriv", "--pdeathsig", "KILL", "unshare", *user, *namespaces, "setsid", "/bin/sh", "-c", script]
    return inner


def box_path(way: Way, box: Path) -> Path:
    """Where the program sees `box`."""
    return box if way.tier == "rlimits" else Path("/box")


def _drop(way: Way, uid: int) -> list[str]:
    user = ["--reuid", str(uid), "--regid", str(uid), "--clear-groups"] if way.drops_user else []
    if way.tier == "rlimits":
        return ["setpriv", "--pdeathsig", "KILL", "--no-new-privs", *user]
    if way.tier == "unshare":
        return ["setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", *user]
    return ["setpriv", *user] if user else []  # bubblewrap drops capabilities and sets no_new_privs itself


def _limit(way: Way, limits: Limits) -> list[str]:
    # Without namespaces and a user of its own, the kernel counts what else the user runs.
    others = _own_processes() if way == Way("rlimits", False) else 0
    seconds = int(limits.cpu_seconds + 0.999)
    mib = 2**20
    return [
        "prlimit",
        f"--cpu={seconds}:{seconds + 1}",
        f"--as={limits.memory_mib * mib}",
        f"--fsize={limits.file_mib * mib}",
        f"--nproc={limits.processes + others}",
        "--nofile=256",
        "--core=0",
        "--memlock=0",
        "--",
    ]


def _own_processes() -> int:
    count = 0
    for task in Path("/proc").glob("[0-9]*/task/*"):
        try:
            count += task.stat().st_uid == os.getuid()
        except OSError:
            continue
    return count


def python_prefix() -> Path:
    """Where the interpreter of the programs is installed: ours without the virtual environment, so without our libraries."""
    return Path(sys.base_prefix).resolve()


def python_command(way: Way) -> list[str] | None:
    """An interpreter that the program can start, with the standard library alone; None if there is none."""
    own = python_prefix() / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [own, Path("/usr/local/bin/python3"), Path("/usr/bin/python3")]
    for path in candidates:
        if path.exists() and (way != Way("rlimits", True) or _others_reach(path.resolve())):
            return [str(path), "-I", "-S", "-B"]
    return None


def _others_reach(path: Path) -> bool:
    return all(part.stat().st_mode & 0o001 for part in (path, *path.parents))


def _outside_usr(prefix: Path) -> bool:
    return prefix != Path("/") and not prefix.is_relative_to("/usr")


def _bubblewrap(way: Way, box: Path, limits: Limits) -> list[str]:
    parts = ["bwrap", "--die-with-parent", "--new-session"]
    parts += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    parts += ["--cap-drop", "ALL"]
    parts += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if way.drops_user else ["--unshare-user"]
    parts += ["--ro-bind", "/usr", "/usr"]
    for folder in map(Path, SYSTEM_FOLDERS):
        if folder.is_symlink():
            parts += ["--symlink", os.readlink(folder), str(folder)]
        elif folder.is_dir():
            parts += ["--ro-bind", str(folder), str(folder)]
    parts += ["--perms", "0755", "--dir", "/etc"]  # folders on the way to a mount have mode 0700 otherwise
    for path in ("/etc/alternatives", "/etc/ld.so.cache"):  # of compilers and of the dynamic linker
        parts += ["--ro-bind-try", path, path]
    prefix = python_prefix()
    if _outside_usr(prefix):
        for parent in reversed(prefix.parents[:-1]):
            parts += ["--perms", "0755", "--dir", str(parent)]
        parts += ["--ro-bind", str(prefix), str(prefix)]
    size = str(limits.file_mib * 2**20)
    parts += ["--ro-bind", str(box), "/box", "--proc", "/proc", "--dev", "/dev"]
    parts += ["--perms", "1777", "--size", size, "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
    parts += ["--perms", "1777", "--size", size, "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
    return parts


def _mounts(box: Path, root: Path, limits: Limits) -> str:
    """The shell script that builds a file system with what a program needs and moves into it."""
    size = limits.file_mib * 2**20
    lines = ["set -e", f"mount -n -t tmpfs -o size=4m,mode=755 none {shlex.quote(str(root))}", f"cd {shlex.quote(str(root))}"]
    prefix = python_prefix()
    bound = ["/usr", *([str(prefix)] if _outside_usr(prefix) else [])]
    for folder in map(Path, SYSTEM_FOLDERS):
        if folder.is_symlink():
            lines.append(f"ln -s {shlex.quote(os.readlink(folder))} .{folder}")
        elif folder.is_dir():
            bound.append(str(folder))
    if Path("/etc/alternatives").is_dir():
        bound.append("/etc/alternatives")
    folders = [f".{path}" for path in bound]
    lines.append(f"mkdir -p old box proc dev tmp etc {shlex.join(folders)}")
    lines.append("cp /etc/ld.so.cache etc/ 2>/dev/null || :")
    lines.append(f"touch {' '.join(f'dev/{name}' for name in DEVICES)}")
    # One table for one `mount`: a process for each would take longer than most programs.
    binds = {**{path: path for path in bound}, str(box): "/box", **{f"/dev/{name}": f"/dev/{name}" for name in DEVICES}}
    table = [f"{_field(source)} {_field(str(root) + at)} none {_options(source)} 0 0" for source, at in binds.items()]
    table.append(f"none {_field(str(root))}/proc proc nosuid,nodev,noexec 0 0")
    table.append(f"none {_field(str(root))}/tmp tmpfs size={size},nr_inodes=4096,mode=1777,nosuid,nodev 0 0")
    lines += ["cat >table <<'END'", *table, "END", "mount -n -a -T table", "rm table"]
    # Shared memory of the new ipc namespace counts for no process.
    lines.append("(echo 0 >proc/sys/kernel/shmall) 2>/dev/null || :")
    lines += ["pivot_root . old", "umount -n -l /old", "mount -n -o remount,bind,ro /", "cd /tmp", "set +e"]
    return "\n".join(lines)


def _field(path: str) -> str:
    """A path as `fstab` wants it."""
    return path.replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011")


def _options(source: str) -> str:
    return "bind" if source.startswith("/dev/") else "bind,ro,nosuid,nodev"


@lru_cache
def available(tier: str) -> tuple[Way | None, str]:
    """The way this machine can do a tier, or None and why not. Tried out once for each process."""
    if sys.platform != "linux":
        return None, "needs Linux"
    tools = {"bubblewrap": ["bwrap"], "unshare": ["unshare", "mount", "pivot_root", "setsid"], "rlimits": []}[tier]
    missing = [tool for tool in [*tools, "prlimit", "setpriv"] if shutil.which(tool, path=SEARCH) is None]
    if missing:
        return None, f"no `{missing[0]}`"
    why = "no Python that it could start"
    for way in [Way(tier, True), Way(tier, False)] if os.geteuid() == 0 else [Way(tier, False)]:
        if python_command(way) is None:
            continue
        why = try_out(way)
        if not why:
            return way, ""
    return None, why


SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def try_out(way: Way) -> str:
    """Run a trivial command; empty if that works, else what went wrong in a line."""
    from rewards.sandbox import SandboxError, run_in  # it imports this module

    try:
        result = run_in(way, lambda box: ["/bin/sh", "-c", "cat /proc/self/stat >/dev/null && echo fine"], {}, b"", Limits())
    except (SandboxError, OSError, subprocess.SubprocessError) as error:
        return " ".join(str(error).split())[:200]
    return "" if result.stdout == b"fine\n" else f"a trial gave {result.stdout[:40]!r} {result.stderr[:100]}"
