"""Runs one command inside namespaces and limits: the process that `sandbox.run` starts.

A script of its own that reads one JSON object from standard input and writes one to standard
output. It uses the standard library alone and imports all of it at the top, since most of the file
system is hidden later.

Three processes: this one gives up root, enters the namespaces and waits; its child is process 1 of
the new process namespace, builds the view of the file system and watches the limits; its child is
the command. Process 1 keeps the capabilities of the new user namespace, which the command loses
when it is executed, so that the command can neither stop, trace nor outlive it.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import json
import os
import resource
import selectors
import shutil
import signal
import stat
import struct
import sys
import tempfile
import time

NOBODY = 65534
NAMESPACES = 0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000
"""User, mount, network, process, IPC and host-name namespaces (linux/sched.h)."""
NOSUID, NODEV, PRIVATE, RECURSIVE, BIND = 2, 4, 1 << 18, 1 << 14, 1 << 12  # linux/mount.h
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1
SET_PDEATHSIG, SET_DUMPABLE, SET_SUBREAPER, NO_NEW_PRIVILEGES = 1, 4, 36, 38  # linux/prctl.h
NO_RANDOM_ADDRESSES = 0x0040000  # linux/personality.h
DEVICES = ("null", "zero", "full", "random", "urandom")
PAGE = os.sysconf("SC_PAGE_SIZE")

libc = ctypes.CDLL(None, use_errno=True)


def checked(status: int, what: str) -> None:
    """Raises an OSError where a call into libc failed."""
    if status != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    text = [s.encode() if s is not None else None for s in (source, target, kind, data)]
    status = libc.mount(text[0], text[1], text[2], ctypes.c_ulong(flags), text[3])
    checked(status, f"mounting {target}")


def write(path: str, text: str) -> None:
    """Writes a file of /proc in one call."""
    with open(path, "w") as file:
        file.write(text)


def enter_namespaces() -> None:
    """Becomes nobody where it was root, and enters new namespaces; raises OSError."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        checked(libc.prctl(SET_DUMPABLE, 1, 0, 0, 0), "prctl")  # /proc/self is its own again
    user, group = os.geteuid(), os.getegid()
    checked(libc.unshare(NAMESPACES), "unshare")
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{NOBODY} {user} 1")
    write("/proc/self/gid_map", f"{NOBODY} {group} 1")


def build_view(hidden: list[str], disk_bytes: int) -> str:
    """Makes all read-only, hides the folders of users, and returns an empty folder in memory."""
    mount("none", "/", None, RECURSIVE | PRIVATE)
    devices = {name: os.open(f"/dev/{name}", os.O_PATH) for name in DEVICES}
    mount("tmpfs", "/dev", "tmpfs", NOSUID, "size=64k,mode=755")
    for name, descriptor in devices.items():
        os.close(os.open(f"/dev/{name}", os.O_CREAT | os.O_WRONLY, 0o666))
        mount(f"/proc/self/fd/{descriptor}", f"/dev/{name}", None, BIND)
        os.close(descriptor)
    os.mkdir("/dev/shm")
    for folder in hidden:
        if os.path.isdir(folder):
            mount("tmpfs", folder, "tmpfs", NOSUID | NODEV, "size=4k,mode=555")
    attributes = ctypes.create_string_buffer(struct.pack("QQQQ", READ_ONLY, 0, 0, 0))
    status = libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, 32)
    checked(status, "making all read-only")
    # LLVM's OpenMP runtime registers itself in shared memory; this is the command's own.
    mount("tmpfs", "/dev/shm", "tmpfs", NOSUID | NODEV, "size=1m,mode=700,nr_inodes=1024")
    mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, f"size={disk_bytes},mode=700,nr_inodes=4096")
    with contextlib.suppress(OSError):  # refused where /proc is masked; the old one then stays
        mount("proc", "/proc", "proc", NOSUID | NODEV)
        write("/proc/sys/user/max_user_namespaces", "0")
    os.chdir("/tmp")
    return "/tmp"


def become_command(spec: dict, folder: str, out: int, err: int) -> None:
    """Sets the limits of this process and executes the command; never returns."""
    try:
        os.chdir(folder)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.closerange(3, 4096)
        os.setsid()
        os.nice(5)  # so that the watching process gets its turn
        with contextlib.suppress(OSError):
            write("/proc/self/oom_score_adj", "1000")
        for name, value in spec["rlimits"].items():
            hard = value + (name == "RLIMIT_CPU")  # so that SIGXCPU comes first
            bound = resource.getrlimit(getattr(resource, name))[1]
            hard = hard if bound == resource.RLIM_INFINITY else min(hard, bound)
            resource.setrlimit(getattr(resource, name), (min(value, hard), hard))
        checked(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
        libc.personality(NO_RANDOM_ADDRESSES)  # sanitizers want it, counts repeat by it
        command = spec["command"]
        os.execvpe(command[0], command, {**spec["environment"], "HOME": folder, "TMPDIR": folder})
    except OSError as error:
        os.write(2, f"{spec['command'][0]} cannot be started: {error}\n".encode())
    finally:
        os._exit(127)


def descendants() -> list[int]:
    """Processes that stand below this one, by the numbers of the /proc that it sees."""
    below: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
                below.setdefault(parent, []).append(int(name))
    found, waiting = [], [int(os.readlink("/proc/self"))]
    while waiting:
        children = below.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def resident_bytes() -> int:
    """Memory that the processes below this one hold."""
    total = 0
    for pid in descendants():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/statm") as file:
            total += int(file.read().split()[1]) * PAGE
    return total


def threads_of_user() -> int:
    """Threads of the user of this process, which its limit on processes counts."""
    count = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.geteuid():
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def reaped(pid: int) -> int | None:
    """The exit code of a child where it has ended; other ended children are forgotten."""
    while True:
        ended, code = os.waitpid(-1, os.WNOHANG)
        if ended == pid:
            return os.waitstatus_to_exitcode(code)
        if not ended:
            return None


def end_all(isolated: bool) -> None:
    """Kills every process below this one and waits for its end."""
    while True:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if isolated:
                os.kill(-1, signal.SIGKILL)  # all of the process namespace but this one
            else:
                for pid in descendants():
                    os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, 0 if isolated else os.WNOHANG)[0]:
                pass
            time.sleep(0.002)
        except ChildProcessError:
            return


def watch(spec: dict, pid: int, pipes: dict[int, str], isolated: bool) -> dict:
    """Reads the command's output and enforces its limits until it ends or is ended."""
    selector, texts = selectors.DefaultSelector(), dict.fromkeys(pipes.values(), b"")
    selector.register(os.pidfd_open(pid), selectors.EVENT_READ)
    for pipe in pipes:
        selector.register(pipe, selectors.EVENT_READ)

    def read(pipe: int) -> None:
        data = os.read(pipe, 1 << 16)
        texts[pipes[pipe]] += data
        if not data or len(texts[pipes[pipe]]) > spec["output_bytes"]:
            selector.unregister(pipe)
            del pipes[pipe]

    begin, status, reason = time.monotonic(), None, ""
    measured = begin
    while status is None and not reason:
        for key, _ in selector.select(0.02 if isolated else 0.1):
            if key.fd in pipes:
                read(key.fd)
        now = time.monotonic()
        if now - measured > (0.02 if isolated else 0.1):
            measured = now
            if resident_bytes() > spec["memory_bytes"]:
                reason = f"It held more than {spec['memory_bytes']} bytes of memory."
        if now - begin > spec["seconds"]:
            reason = f"It ran for more than {spec['seconds']} seconds."
        if max(map(len, texts.values())) > spec["output_bytes"]:
            reason = f"It wrote more than {spec['output_bytes']} bytes of output."
        status = reaped(pid)
    seconds = time.monotonic() - begin
    end_all(isolated)
    while pipes and not reason:  # what is still in the pipes; nobody writes any more
        read(next(iter(pipes)))
    if status == -signal.SIGXCPU:
        reason = f"It used more than {spec['rlimits']['RLIMIT_CPU']} seconds of processor time."
    outputs = {name: text[: spec["output_bytes"]] for name, text in texts.items()}
    return {"returncode": status, "seconds": seconds, "reason": reason, **outputs}


def supervise(spec: dict, isolated: bool) -> dict:
    """Builds the folder, runs the command in it and collects what it leaves."""
    libc.prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(SET_SUBREAPER, 1, 0, 0, 0)
    disk = spec["disk_bytes"]
    folder = build_view(spec["hidden"], disk) if isolated else tempfile.mkdtemp(prefix="jaxfm-")
    try:
        for name, text in spec["files"].items():
            path = os.path.join(folder, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb", opener=lambda p, f: os.open(p, f, 0o755)) as file:
                file.write(base64.b64decode(text))
        if not isolated:  # elsewhere the new user namespace counts from zero
            spec["rlimits"]["RLIMIT_NPROC"] += threads_of_user()
        (read_out, out), (read_err, err) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            become_command(spec, folder, out, err)
        os.close(out)
        os.close(err)
        reply = watch(spec, pid, {read_out: "stdout", read_err: "stderr"}, isolated)
        reply["files"] = {}
        for name in spec["keep"]:
            with contextlib.suppress(OSError):
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
                with open(os.open(os.path.join(folder, name), flags), "rb") as file:
                    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                        reply["files"][name] = file.read(disk)
        return reply
    finally:
        if not isolated:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Reads what is to be run, runs it and says what came of it."""
    spec, out = json.load(sys.stdin), os.dup(1)
    os.dup2(2, 1)
    isolated, refusal = True, ""
    try:
        enter_namespaces()
    except OSError as error:
        isolated, refusal = False, f"This system gives no namespaces ({error})."
    if isolated or not spec["isolated"]:
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
            return
        try:
            reply = supervise(spec, isolated)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0)
            refusal = f"The sandbox could not be built ({name}: {error})."
    if refusal and (isolated or spec["isolated"]):
        reply = {"refusal": refusal}

    def plain(value):
        return base64.b64encode(value).decode() if isinstance(value, bytes) else value

    reply = {k: plain(v) for k, v in reply.items()}
    reply["files"] = {k: plain(v) for k, v in reply.get("files", {}).items()}
    with open(out, "w") as file:
        json.dump({**reply, "isolated": isolated}, file)


if __name__ == "__main__":
    main()
