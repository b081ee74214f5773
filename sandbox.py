"""
Running code that a model wrote, such as an answer to HumanEval, against a test. Nothing here runs unless asked for.

Two processes are started for each answer, and this file is the program of both:

    evals.py -> judge   runs the test; what the test calls is a stand-in that hands the arguments on and waits for a value
             -> solver  runs the answer's code; stdin, stdout and stderr are /dev/null, its folder is empty, its environment too

So an answer never shares an interpreter with its test. It can send values back and do nothing else: it cannot see the
test, replace `assert` or builtins for it, or return an object that equals everything, for values cross as JSON and arrive
as plain numbers, texts, lists, tuples, sets and dicts. That it passed is said by the judge, once the test has returned,
on a pipe that the solver never had, together with a token drawn for this run.

What holds on every Linux: limits on wall time, CPU time, memory (address space), file size, open files and core dumps; no
process or thread can be started (RLIMIT_NPROC of 0), so none stays behind; programs with the setuid bit gain nothing.
What holds where the system allows it, which `run` reports: no network; no other process can be signalled (a PID
namespace); no files but Python and the system's libraries, read-only, and an empty folder of 16 MB in memory, which vanishes
(a mount namespace, whose root is a folder of just these); and of root, no rights: a user that nobody else is. Root needs
CAP_SYS_ADMIN for it, which containers often withhold; others need unprivileged user namespaces, which some systems forbid.

What does not hold: without these namespaces the code runs as a user of its own (from root) or as yourself, and reads, and
as yourself changes and kills, what that user may. Always: shared memory of System V is counted by no limit, and a hole in the
kernel is a hole here. This keeps in a model's accidents and tricks; it is no place for code that someone attacks with.
Left out: seccomp, Landlock, cgroups. Arguments changed in place are not seen by the test, and packages are not importable.
"""

import ctypes
import json
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile

SECONDS = 10  # wall time of a test; the CPU may be used for half of it
MEMORY = 2**30  # bytes of address space, of judge and solver each
FILE = 2**20  # bytes of a file, and of a value that is sent
SYSTEM = "/usr /lib /lib64 /nix /etc/ld.so.cache /dev/null".split()  # what Python needs beside its own folder
KINDS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict, "bytes": bytes}
HERE = os.path.abspath(__file__)
START = [os.path.realpath(sys.executable), "-I", "-S", HERE]  # isolated: no site-packages, no variables, no folder on the path


def run(sources, setup, test, entry, seconds=SECONDS):
    """Does the function `entry` of the first of `sources` that is Python pass the test? (passed, why not, what holds).

    sources  pairs (head, code): texts that one answer may stand for; of code that is no Python, the longest beginning that is
    setup    code that the test needs beside the function
    test     code that defines check(candidate), which returns when all is well

    >>> run([("", "def f(x): return x + 1")], "", "def check(f): assert f(1) == 2", "f")[0]
    True

    Raises SystemExit where the system does not let code be confined at all.
    """
    token = secrets.token_hex(16)
    job = {"sources": sources, "setup": setup, "test": test, "entry": entry, "seconds": seconds, "token": token}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as box:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        judge = subprocess.Popen([*START, "judge"], cwd=box, env={"HOME": box}, start_new_session=True, **pipes)
        try:
            said, errors = judge.communicate(json.dumps(job).encode(), timeout=2 * seconds + 10)
        except subprocess.TimeoutExpired:
            return False, "the test itself did not end", []
        finally:
            if judge.poll() is None:
                judge.terminate()  # it kills the solver on its way out
                try:
                    judge.wait(5)
                except subprocess.TimeoutExpired:
                    os.killpg(judge.pid, signal.SIGKILL)
            judge.wait()
    found = json.loads(said or b"{}")
    if found.get("token") == token:
        return found["passed"], found["why"], found["holds"]
    raise SystemExit(f"code cannot be run here: {(errors.decode(errors='replace').strip() or 'the judge died').splitlines()[-1]}")


def confine(box, seconds):
    """Give up what a function under test does not need, for this process and all that it starts. Returns what holds."""
    libc, root, holds = ctypes.CDLL(None, use_errno=True), os.geteuid() == 0, []
    user, group = (10**9 + os.getpid(),) * 2 if root else (os.geteuid(), os.getegid())  # nobody else's, one for each run
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    # CLONE_NEWNS, _NEWIPC, _NEWPID (of children), _NEWNET, and without root's rights _NEWUSER, which lends them
    if libc.unshare(0x20000 | 0x8000000 | 0x20000000 | 0x40000000 | (0 if root else 0x10000000)) == 0:
        holds += ["no network", "no other process in reach"]
        if not root:
            for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
                with open(f"/proc/self/{name}", "w") as f:
                    f.write(line)
        try:
            hide(libc, box)
            box = "/box"
            holds.append("no files but Python's and an empty folder")
        except OSError:
            pass
    os.chdir(box)
    if root:
        if box != "/box":
            os.chown(box, user, group)
        os.setgroups([])
        os.setresgid(group, group, group)
        os.setresuid(user, user, user)
        holds.append("a user of its own")
    libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: nobody looks into this process's memory
    cpu = max(1, seconds // 2)
    limits = {"CPU": cpu, "AS": MEMORY, "FSIZE": FILE, "NOFILE": 32, "CORE": 0, "MSGQUEUE": 0, "MEMLOCK": 0}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    return holds + ["limits of time, memory, files and processes"]


def hide(libc, top):
    """Make an empty folder the root of what this process sees: what Python needs, read-only, and /box, empty. Raises OSError."""

    def mount(source, target, kind, flags, options=None):
        source, target, kind, options = (text and text.encode() for text in (source, target, kind, options))
        if libc.mount(source, target, kind, flags, options):
            raise OSError(ctypes.get_errno(), "mount", target)

    mount(None, "/", None, 0x4000 | 0x40000)  # MS_REC, MS_PRIVATE: what follows stays in this namespace
    mount("tmpfs", top, "tmpfs", 2 | 4, "size=1m,mode=755")  # MS_NOSUID, MS_NODEV
    shown = []
    for path in filter(os.path.exists, [*SYSTEM, sys.base_prefix, HERE]):
        if not any(f"{path}/".startswith(f"{other}/") for other in shown):
            os.makedirs(top + (path if os.path.isdir(path) else os.path.dirname(path)), exist_ok=True)
            if not os.path.isdir(path):
                open(top + path, "w").close()
            mount(path, top + path, None, 0x1000 | 0x4000)  # MS_BIND, MS_REC
            shown.append(path)
    os.makedirs(f"{top}/box")
    locked = (ctypes.c_uint64 * 4)(1 | 2)  # MOUNT_ATTR_RDONLY, _NOSUID
    if libc.syscall(442, -100, top.encode(), 0x8000, locked, 32):  # mount_setattr(AT_FDCWD, top, AT_RECURSIVE), Linux 5.12
        raise OSError(ctypes.get_errno(), "mount_setattr")
    mount("tmpfs", f"{top}/box", "tmpfs", 2 | 4, "size=16m,mode=777")
    os.chroot(top)


def pack(value):
    """A value as JSON takes it: {"tuple": [1, 2]} for (1, 2). What derives from a kind counts as that kind."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    for name, kind in KINDS.items():
        if isinstance(value, kind):
            return {name: [pack(part) for part in (value.items() if kind is dict else value)]}
    raise TypeError(f"a value of type {type(value).__name__} cannot be compared")


def unpack(value):
    return KINDS[next(iter(value))](unpack(part) for part in next(iter(value.values()))) if isinstance(value, dict) else value


class Gone(BaseException):
    """The solver has ended, or says what is no value. No `except Exception` of a test takes it for an answer."""


def judge():
    def stop(number, frame):
        raise Gone("out of time" if number == signal.SIGALRM else "stopped")

    job = json.loads(sys.stdin.read())
    signal.signal(signal.SIGALRM, stop), signal.signal(signal.SIGTERM, stop)
    holds = confine(os.getcwd(), job["seconds"])
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG: end with the evaluation; a change of user clears it
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    passed, why, started = False, "", False
    solver = subprocess.Popen([*START, "solver"], env={"HOME": os.getcwd()}, start_new_session=True, preexec_fn=alone, **pipes)
    try:
        signal.setitimer(signal.ITIMER_REAL, job["seconds"], 1)  # again each second, should a test swallow it

        def ask(value):
            try:
                solver.stdin.write(json.dumps(value).encode() + b"\n"), solver.stdin.flush()
                answer = json.loads(solver.stdout.readline(FILE))  # of a longer one, what is read is no JSON
                kind, value = answer["kind"], unpack(answer["value"])
            except (OSError, ValueError, TypeError, KeyError, StopIteration, RecursionError, AttributeError, MemoryError):
                raise Gone("it ended, or sent no value")
            if kind != "value":
                raise RuntimeError(str(value)[:200])
            return value

        started = ask([job["sources"], job["entry"]]) is None
        world = {"__name__": "test"}
        exec(job["setup"], world)
        world[job["entry"]] = lambda *args, **named: ask(pack([args, named]))  # some tests call it by its name
        exec(job["test"], world)
        world["check"](world[job["entry"]])
        passed = started
    except BaseException as error:
        why = f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        solver.kill(), solver.wait()
    print(json.dumps({"token": job["token"], "passed": passed, "why": why, "holds": holds}))


def alone():
    """Before the solver's program begins: it dies with the judge, and starts nothing."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def solver():
    asked, told, null = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"), os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    function = None
    for line in asked:
        try:
            value = unpack(json.loads(line)) if function else json.loads(line)
            if function is None:
                world = {"__name__": "answer"}
                exec(max(map(longest, value[0]), key=lambda source: source[0])[1], world)
                function, answer = world[value[1]], None
            else:
                answer = function(*value[0], **value[1])
            answer = {"kind": "value", "value": pack(answer)}
        except Exception as error:
            answer = {"kind": "error", "value": f"{type(error).__name__}: {error}"[:200]}
        told.write(json.dumps(answer).encode() + b"\n")
        told.flush()


def longest(source):
    """(lines, code) of the longest beginning that is Python, of what stands behind the head."""
    head, lines = source[0], source[1].splitlines()
    for count in range(len(lines), -1, -1):
        try:
            text = head + "\n".join(lines[:count]) + "\n"
            return count, compile(text, "answer", "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            pass
    return -1, ""


if __name__ == "__main__":
    {"judge": judge, "solver": solver}[sys.argv[1]]()
