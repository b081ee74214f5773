"""
Evaluations: bits per byte, tasks answered by generating, and the report of a run.

    python evals.py                                    # every task on the last stage in out/
    python evals.py --stage=sft --tasks=facts,counting --count=500 --seed=7
    python evals.py --tasks=gsm8k,mmlu,arc_easy,arc_challenge --files=DIR      # public tasks, from their own files
    python evals.py --tasks=humaneval --files=DIR --run_code=1                 # runs what the model writes: see there
    python evals.py --tasks=gsm8k --files=DIR --samples=16 --temperature=0.8   # pass@k
    python evals.py --tasks=chatcore --files=DIR --run_code=1                  # ChatCORE: the mean over six tasks
    python evals.py --stage=base --text=FILE           # bits per byte of any text
    python evals.py --stage=base --core=DIR            # CORE, from `python data.py download --source=core --out=DIR`
    torchrun --nproc_per_node=8 evals.py --stage=base --core=DIR --count=500   # an estimate of it
    python evals.py --report                           # only rebuild out/report.json and out/report.html
    python evals.py compare out/a out/b                # runs over each other: a table, and compare.html

The stages call `bits_per_byte` and `run_tasks` on their way and write what they find with `record`, which
rebuilds the report: out/report.json for programs, out/report.html for people, one page without outside
requests whose curves are drawn from out/metrics.jsonl.
"""

import builtins
import ctypes
import functools
import hashlib
import html
import inspect
import json
import math
import os
import platform
import random
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import gpt
from data import DEMO, RULES, SPECIALS, TASKS, HumanEval, TokenSet, batch, encode_documents, load_tokenizer, parse, question
from data import read_documents, read_lines, task_names, visible
from gpt import FREE_KNOBS, STAGES, KVCache, command, last_stage, latest, load_model, override, read_state, start_machine, write_whole
from sample import Engine, Params, common

# -----------------------------------------------------------------------------
# Bits per byte


def token_sizes(tokenizer):
    """The bytes of each token; none for special ones."""
    return [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size - len(SPECIALS))] + [0] * len(SPECIALS)


def bytes_per_token(tokenizer, val):
    """How much the tokenizer shortens the text of `val`, a TokenSet; special tokens are left out."""
    counts, size = np.bincount(np.concatenate(val.arrays), minlength=tokenizer.vocab_size), np.array(token_sizes(tokenizer))
    return float(counts @ size / max(1, counts[size > 0].sum()))


@torch.inference_mode()
def bits_per_byte(model, tokenizer, val, machine, micro_rows=16, rows=0):
    """Total nats over ln 2 and over the UTF-8 bytes of the predicted tokens; special tokens are left out.

    `val` is a TokenSet kept whole, so with rows=0 every byte of its documents is predicted exactly once;
    rows above 0 takes only so many rows of it. Comparable between tokenizers, unlike the loss. All ranks
    call it and get the same figure.
    """
    T = model.cfg.seq_len
    total = min(rows or 2**62, val.rows(T, 0))
    size = torch.tensor(token_sizes(tokenizer), device=machine.device)
    ids, targets = batch(val, total, T, 0, 0, machine.rank, machine.world)
    nats, count = 0.0, 0
    for x, y in zip(ids.split(micro_rows), targets.split(micro_rows)):
        x, y = x.to(machine.device), y.to(machine.device)
        length = size[y.clamp(min=0)] * (y >= 0)  # (B, T)
        nats += (model(x, y) * (length > 0)).sum().item()
        count += length.sum().item()
    return machine.sum(nats) / math.log(2) / max(1, machine.sum(count))


# -----------------------------------------------------------------------------
# Tasks


def wilson(share, n, z=1.96):
    """The 95% confidence interval of a share of n items (Wilson 1927), within 0 and 1 also where all or none are right.

    >>> [round(bound, 3) for bound in wilson(0.9, 10)]
    [0.596, 0.982]

    Of means of several answers an item it is wider than need be: they vary less than a yes or no.
    """
    middle, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def pass_at(n, right, k):
    """The chance that one of k answers is right, without bias from n answers of which so many are (Chen et al. 2021).

    >>> pass_at(4, 1, 2)
    0.5
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def centred_mean(scores):
    """The mean of (accuracy - chance) / (1 - chance) over [(accuracy, items, chance)], and half of its 95% interval.

    The interval is that of the sampling of items, each task by itself; that the tasks were chosen it knows nothing of.
    """
    centred = [(accuracy - chance) / (1 - chance) for accuracy, _, chance in scores]
    variance = sum(accuracy * (1 - accuracy) / n / (1 - chance) ** 2 for accuracy, n, chance in scores)
    return sum(centred) / max(1, len(centred)), 1.96 * math.sqrt(variance) / max(1, len(centred))


# what a chat model is summed up by, and what guessing gets (some questions of ARC have three or five choices)
CHATCORE = {"arc_easy": 0.25, "arc_challenge": 0.25, "mmlu": 0.25, "gsm8k": 0.0, "humaneval": 0.0, "counting": 0.0}


def askable(names, split, seed, files):
    """Which of these tasks have their items at hand, and why the others have not: ([name], {name: why})."""
    missing = {}
    for name in names:
        try:
            TASKS[name].items(split, seed, 1, files)
        except SystemExit as error:
            missing[name] = error
    return [name for name in names if name not in missing], missing


def run_tasks(model, tokenizer, machine, names, count, files="", seed=0, split="test", slots=64, samples=1, temperature=0.0):
    """Answer `count` items of each task greedily, of multiple choice with the likeliest letter, and grade them:
    {name: (accuracy, items, some answers, pass@k)}.

    With `samples` above 1 and a temperature, each item is answered so often, but for multiple choice; accuracy is then the
    mean over all answers, and pass@k is {k: share of items that one of k answers solves}. Ranks take every world-th
    item. All ranks call it and get the same figures.
    """
    engine, results = Engine(model, tokenizer, slots), {}
    for name in names:
        task = TASKS[name]
        items = task.items(split, seed, count, files)
        mine = items[machine.rank :: machine.world]
        prompts = [question(item, tokenizer, engine.cache.length, task.max_tokens) for item in mine]
        n = 1 if items and "letters" in items[0] else samples  # answers an item
        if items and "letters" in items[0]:
            texts = best_letters(model, tokenizer, prompts, [item["letters"] for item in mine], machine.device)
        else:
            seeds = ((seed * 10**6 + machine.rank + i * machine.world) * 10**4 + s for i in range(len(mine)) for s in range(n))
            params = [Params(max_tokens=task.max_tokens, temperature=temperature, seed=number) for number in seeds]
            done = engine.generate([prompt for prompt in prompts for _ in range(n)], params)
            texts = [visible(parse(r.ids, tokenizer)) for r in done]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # where a grade is a program's run, it is another process that works
            grades = list(pool.map(task.grade, [item for item in mine for _ in range(n)], texts))
        right = [sum(grade == 1 for grade in grades[i : i + n]) for i in range(0, len(grades), n)]
        tries = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < n} | {n}) if n > 1 else []
        passes = {k: machine.sum(sum(pass_at(n, c, k) for c in right)) / max(1, len(items)) for k in tries}
        told = zip(mine, texts[::n], grades[::n])
        shown = [(item["messages"][-1]["content"], text, item["answer"], grade) for item, text, grade in told]
        results[name] = machine.sum(sum(grades)) / max(1, len(items) * n), len(items), shown[:8], passes
    return results


BUDGET = {"cuda": 2**14, "cpu": 2**10}  # tokens of a forward pass
LOGITS = 2**28  # numbers that the logits of a forward pass may be


def by_length(lengths, device, most=2**62):
    """Yield lists of places that go through the model together, of like lengths, padding included within the budget.

    The longest come first, so that running out of memory shows at once.
    """
    order, budget = sorted(range(len(lengths)), key=lengths.__getitem__), min(BUDGET[torch.device(device).type], most)
    while order:
        n = max(1, budget // lengths[order[-1]])
        yield order[-n:]
        order = order[:-n]


@torch.inference_mode()
def best_letters(model, tokenizer, prompts, letters, device):
    """Of each prompt's letters, the one that is likeliest to come next."""
    found = [""] * len(prompts)
    for rows in by_length([len(p) for p in prompts], device, LOGITS // model.cfg.vocab_size):
        length = max(len(prompts[i]) for i in rows)
        ids = torch.tensor([prompts[i] + [0] * (length - len(prompts[i])) for i in rows])
        logits = model(ids.to(device))
        for b, i in enumerate(rows):
            of = [tokenizer.encode(letter)[0] for letter in letters[i]]
            found[i] = letters[i][logits[b, len(prompts[i]) - 1, of].argmax()]
    return found


# -----------------------------------------------------------------------------
# Running code that a model wrote, such as an answer to HumanEval, against a test: only where asked for
#
# Two processes are started for each answer, and the functions below are the program of both:
#
#     evals.py -> judge   runs the test; what the test calls is a stand-in that hands the arguments on and waits for a value
#              -> solver  runs the answer's code; stdin, stdout and stderr are /dev/null, its folder is empty, its environment too
#
# So an answer never shares an interpreter with its test. It can send values back and do nothing else: it cannot see the
# test, replace `assert` or builtins for it, or return an object that equals everything, for values cross as JSON and arrive
# as plain numbers, texts, lists, tuples, sets and dicts. That it passed is said by the judge, once the test has returned,
# on a pipe that the solver never had, together with a token drawn for this run.
#
# What holds on every Linux: limits on wall time, CPU time, memory (address space), file size, open files and core dumps; no
# process or thread can be started (RLIMIT_NPROC of 0), so none stays behind; programs with the setuid bit gain nothing.
# What holds where the system allows it, which `run_answer` reports: no network; no other process can be signalled (a PID
# namespace); no files but Python and the system's libraries, read-only, and an empty folder of 16 MB in memory, which vanishes
# (a mount namespace, whose root is a folder of just these); and of root, no rights: a user that nobody else is. Root needs
# CAP_SYS_ADMIN for it, which containers often withhold; others need unprivileged user namespaces, which some systems forbid.
#
# What does not hold: without these namespaces the code runs as a user of its own (from root) or as yourself, and reads, and
# as yourself changes and kills, what that user may. Always: shared memory of System V is counted by no limit, and a hole in the
# kernel is a hole here. This keeps in a model's accidents and tricks; it is no place for code that someone attacks with.
# Left out: seccomp, Landlock, cgroups. Arguments changed in place are not seen by the test, and packages are not importable.

SECONDS = 10  # wall time of a test; the CPU may be used for half of it
MEMORY = 2**30  # bytes of address space, of judge and solver each
FILE = 2**20  # bytes of a file, and of a value that is sent
SYSTEM = "/usr /lib /lib64 /nix /etc/ld.so.cache /dev/null".split()  # what Python needs beside its own folder
KINDS = ["list", "tuple", "set", "frozenset", "dict", "bytes"]  # of values that may cross


def run_answer(sources, setup, test, entry, seconds=SECONDS):
    """Does the function `entry` of the first of `sources` that is Python pass the test? (passed, why not, what holds).

    sources  pairs (head, code): texts that one answer may stand for; of code that is no Python, the longest beginning that is
    setup    code that the test needs beside the function
    test     code that defines check(candidate), which returns when all is well

    >>> run_answer([("", "def f(x): return x + 1")], "", "def check(f): assert f(1) == 2", "f")[0]
    True

    Raises SystemExit where the system does not let code be confined at all.
    """
    token = secrets.token_hex(16)
    job = {"sources": sources, "setup": setup, "test": test, "entry": entry, "seconds": seconds, "token": token}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as box:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        judge = subprocess.Popen(program(), cwd=box, env={"HOME": box}, start_new_session=True, **pipes)
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


@functools.lru_cache  # this file may be edited while it runs
def program():
    """The command that starts the judge: Python by itself, without packages, with the functions that judge and solver need."""
    parts = (confine, hide, pack, unpack, Gone, judge, alone, solver, longest)
    lines = ["import builtins, ctypes, json, os, resource, signal, subprocess, sys"]
    lines += [f"{name} = {globals()[name]!r}" for name in ("MEMORY", "FILE", "SYSTEM", "KINDS")]
    lines += [*map(inspect.getsource, parts), '{"judge": judge, "solver": solver}[sys.argv[1]]()']
    # isolated: no site-packages, no variables, no folder on the path
    return [os.path.realpath(sys.executable), "-I", "-S", "-c", "\n".join(lines), "judge"]


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
    for path in filter(os.path.exists, [*SYSTEM, sys.base_prefix]):
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
    for name in KINDS:
        if isinstance(value, getattr(builtins, name)):
            return {name: [pack(part) for part in (value.items() if name == "dict" else value)]}
    raise TypeError(f"a value of type {type(value).__name__} cannot be compared")


def unpack(value):
    if not isinstance(value, dict):
        return value
    ((name, parts),) = value.items()
    return getattr(builtins, KINDS[KINDS.index(name)])(unpack(part) for part in parts)


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
    solver = subprocess.Popen([*sys.orig_argv[:-1], "solver"], env={"HOME": os.getcwd()}, start_new_session=True, preexec_fn=alone, **pipes)
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


HumanEval.run = run_answer


# -----------------------------------------------------------------------------
# CORE: the 22 tasks of DCLM (Li et al. 2024, arXiv 2406.11794), the way published figures are made
#
# label, file under eval_data/, shots, kind, delimiter, what guessing gets in percent (of the first version of the
# metadata, as in published figures), rows of the published file

CHOICE, SCHEMA, LM, ANSWER = "multiple_choice", "schema", "language_modeling", "\nAnswer: "
CORE = [
    ("hellaswag_zeroshot", "language_understanding/hellaswag", 0, CHOICE, " ", 25, 10042),
    ("jeopardy", "world_knowledge/jeopardy_all", 10, LM, ANSWER, 0, 2117),
    ("bigbench_qa_wikidata", "world_knowledge/bigbench_qa_wikidata", 10, LM, " ", 0, 20321),
    ("arc_easy", "world_knowledge/arc_easy", 10, CHOICE, ANSWER, 25, 2376),
    ("arc_challenge", "world_knowledge/arc_challenge", 10, CHOICE, ANSWER, 25, 1172),
    ("copa", "commonsense_reasoning/copa", 0, CHOICE, " ", 50, 100),
    ("commonsense_qa", "commonsense_reasoning/commonsense_qa", 10, CHOICE, " ", 20, 1221),
    ("piqa", "commonsense_reasoning/piqa", 10, CHOICE, ANSWER, 50, 1838),
    ("openbook_qa", "commonsense_reasoning/openbook_qa", 0, CHOICE, " ", 25, 500),
    ("lambada_openai", "language_understanding/lambada_openai", 0, LM, " ", 0, 5153),
    ("hellaswag", "language_understanding/hellaswag", 10, CHOICE, " ", 25, 10042),
    ("winograd", "language_understanding/winograd_wsc", 0, SCHEMA, " ", 50, 273),
    ("winogrande", "language_understanding/winogrande", 0, SCHEMA, " ", 50, 1267),
    ("bigbench_dyck_languages", "symbolic_problem_solving/bigbench_dyck_languages", 10, LM, " ", 0, 1000),
    ("agi_eval_lsat_ar", "symbolic_problem_solving/agi_eval_lsat_ar", 3, CHOICE, " ", 20, 230),
    ("bigbench_cs_algorithms", "symbolic_problem_solving/bigbench_cs_algorithms", 10, LM, " ", 0, 1320),
    ("bigbench_operators", "symbolic_problem_solving/bigbench_operators", 10, LM, " ", 0, 210),
    ("bigbench_repeat_copy_logic", "symbolic_problem_solving/bigbench_repeat_copy_logic", 10, LM, " ", 0, 32),
    ("squad", "reading_comprehension/squad", 10, LM, " ", 0, 10570),
    ("coqa", "reading_comprehension/coqa", 0, LM, " ", 0, 7983),
    ("boolq", "reading_comprehension/boolq", 10, CHOICE, ANSWER, 62, 3270),
    ("bigbench_language_identification", "language_understanding/bigbench_language_identification", 10, CHOICE, " ", 9.1, 10000),
]


def core_rows(file, kind):
    """The items of one file. Raises SystemExit naming file and line."""
    choice, schema = ("query", "choices", "gold"), ("context_options", "continuation", "gold")
    wanted = {CHOICE: choice, SCHEMA: schema, LM: ("context", "continuation")}[kind]
    rows = []
    for where, row in read_lines(file):
        options = isinstance(row, dict) and row.get("choices" if kind == CHOICE else "context_options")
        if not isinstance(row, dict) or any(key not in row for key in wanted) or (kind != LM and not row["gold"] in range(len(options))):
            raise SystemExit(f"{where}: wanted an object with {', '.join(wanted)}; got {ascii(row)[:60]}")
        rows.append(row)
    return rows


def core_prompts(rows, i, shots, kind, delimiter):
    """The texts that item i is scored by: one for each choice; of language modelling, without and with the answer.

    The shots, each followed by an empty line, are drawn from all other items by a generator of the item's own.
    """
    drawn = random.Random(1234 + i).sample(range(len(rows) - 1), min(shots, len(rows) - 1))
    shown = [rows[j + (j >= i)] for j in drawn]  # the numbering skips item i

    def written(row, option=None):
        option = row.get("gold") if option is None else option
        if kind == CHOICE:
            return f"{row['query']}{delimiter}{row['choices'][option]}"
        if kind == SCHEMA:
            return f"{row['context_options'][option]}{delimiter}{row['continuation']}"
        return f"{str(row['context']).strip()}{delimiter}{row['continuation']}"

    before = "".join(written(row) + "\n\n" for row in shown)
    if kind == LM:  # without the delimiter's last space: tokenizers put it to the word that follows
        return [(before + str(rows[i]["context"]).strip() + delimiter).strip(), before + written(rows[i])]
    return [before + written(rows[i], option) for option in range(len(rows[i]["choices" if kind == CHOICE else "context_options"]))]


def shared(sequences):
    """How many elements the sequences have in common at their beginning."""
    return min(common(sequences[0], other) for other in sequences)


def core_spans(texts, kind):
    """(ids, first, end) of each sequence to run: the tokens first..end are what is scored. `texts` is the prompts' ids."""
    if kind == LM:
        return [(texts[1], shared(texts), len(texts[1]))]
    if kind == CHOICE:  # the choices differ from here on
        return [(ids, shared(texts), len(ids)) for ids in texts]
    common = shared([ids[::-1] for ids in texts])  # the contexts differ up to here
    return [(ids, len(ids) - common, len(ids)) for ids in texts]


@torch.inference_mode()
def core_scores(model, spans, device, greedy):
    """Of each (ids, first, end): whether greedy decoding says just these tokens, or else their mean loss.

    Sequences of like length are run together. The caller has cut them to the model's context.
    """
    scores = [0.0] * len(spans)
    for rows in by_length([len(ids) for ids, _, _ in spans], device, *[LOGITS // model.cfg.vocab_size] * greedy):
        length = max(len(spans[i][0]) for i in rows)
        ids, targets = torch.zeros(2, len(rows), length, dtype=torch.long).unbind()
        targets[:] = -1
        for b, i in enumerate(rows):
            tokens, first, end = spans[i]
            tokens = torch.tensor(tokens)
            ids[b, : len(tokens)] = tokens
            targets[b, first - 1 : end - 1] = tokens[first:end]
        ids, targets = ids.to(device), targets.to(device)
        scored = targets >= 0
        if greedy:
            found = ((model(ids).argmax(-1) == targets) | ~scored).all(1).double()
        else:
            found = model(ids, targets).double().sum(1) / scored.sum(1)
        for i, score in zip(rows, found.tolist()):
            scores[i] = score
    return scores


@torch.inference_mode()
def choice_scores(model, groups, device):
    """The mean losses of several items' choices: a group is one item's (ids, first, end), equal up to `first`.

    What the choices share, which with ten shots is nearly all, is read once into a cache, and then each choice's own end.
    """
    longest, scores = [max(end for _, _, end in group) for group in groups], [[] for _ in groups]
    for some in by_length(longest, device):
        N = max(longest[g] for g in some)
        cache = KVCache(model.cfg, len(some), N, device, model.dtype)
        prefix = torch.zeros(len(some), max(groups[g][0][1] for g in some), dtype=torch.long)
        for b, g in enumerate(some):
            tokens, first, _ = groups[g][0]
            prefix[b, :first] = torch.tensor(tokens[:first])
        model(prefix.to(device), cache=cache, pos=torch.zeros(len(some), dtype=torch.long, device=device), fill=True)
        for c in range(max(len(groups[g]) for g in some)):
            spans = [(b, g, *groups[g][c]) for b, g in enumerate(some) if c < len(groups[g])]
            width = max(1, max(end - first for *_, first, end in spans))
            ids, targets = torch.zeros(2, len(some), width, dtype=torch.long).unbind()
            targets[:], pos = -1, torch.zeros(len(some), dtype=torch.long)
            for b, g, tokens, first, end in spans:  # the last shared token foretells the first that differs
                pos[b] = at = min(first - 1, N - width)  # rows near the end read a little of what is shared again
                tail = torch.tensor(tokens[at : at + width])
                ids[b, : len(tail)] = tail
                targets[b, first - 1 - at : end - 1 - at] = torch.tensor(tokens[first:end])
            ids, targets = ids.to(device), targets.to(device)
            found = model(ids, targets, cache=cache, pos=pos.to(device)).double().sum(1) / (targets >= 0).sum(1)
            for (b, g, *_), score in zip(spans, found[[b for b, *_ in spans]].tolist()):
                scores[g].append(score)
    return scores


def core_task(model, tokenizer, machine, rows, shots, kind, delimiter):
    """Which items are answered rightly, in order, and how many had to be cut. All ranks call it and get the same."""
    T, bos, mine = model.cfg.seq_len, tokenizer.special("<|bos|>"), list(range(machine.rank, len(rows), machine.world))
    right, cut = {}, 0
    for at in range(0, len(mine), 1024):  # some at a time: ten shots of squad are 80 MB as tokens
        items, spans = mine[at : at + 1024], {}
        texts = [core_prompts(rows, i, shots, kind, delimiter) for i in items]
        ids, offsets = tokenizer.encode_batch([text for several in texts for text in several])
        ids, offsets = np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64).astype(int)
        encoded = ([bos, *ids[a:b].tolist()] for a, b in zip(offsets, offsets[1:]))
        for i, several in zip(items, texts):
            spans[i] = []
            for tokens, first, end in core_spans([next(encoded) for _ in several], kind):
                over = max(0, len(tokens) - T)  # of what is too long, the beginning is lost
                cut += over > 0
                spans[i].append((tokens[over:], max(1, first - over), max(1, end - over)))
        alike = []  # choices that were cut differently share nothing any more
        for i in items if kind == CHOICE else ():
            if shared([tokens for tokens, *_ in spans[i]]) >= max(first for _, first, _ in spans[i]):
                alike.append(i)
        found = dict(zip(alike, choice_scores(model, [spans[i] for i in alike], machine.device)))
        others = [(i, span) for i in items if i not in found for span in spans[i]]
        for (i, _), score in zip(others, core_scores(model, [span for _, span in others], machine.device, kind == LM)):
            found.setdefault(i, []).append(score)
        right |= {i: s[0] if kind == LM else s.index(min(s)) == rows[i]["gold"] for i, s in found.items()}
    merged = {i: value for part in machine.gather(right) for i, value in part.items()}
    return [int(merged[i]) for i in range(len(rows))], int(machine.sum(cut))


def run_core(model, tokenizer, machine, folder, cache, count=0):
    """Score the tasks whose files are under `folder`: {label: (accuracy, items, centred accuracy)}, and print them.

    What is known of this checkpoint is read from the file `cache`, and what is found goes there, item by item.
    """
    root = next((p for p in (Path(folder) / "eval_data", Path(folder) / "eval_bundle" / "eval_data") if p.is_dir()), Path(folder))
    known = json.loads(Path(cache).read_text()) if Path(cache).exists() else {}
    code = hashlib.sha256(Path(__file__).read_bytes() + Path(gpt.__file__).read_bytes()).hexdigest()[:16]  # other code, other figures
    known, results, missing = machine.gather(known)[0], {}, []
    for label, name, shots, kind, delimiter, guess, published in CORE:
        file, start = root / f"{name}.jsonl", time.time()
        if not file.exists():
            missing.append((label, file))
            continue
        rows = core_rows(file, kind)
        if len(rows) != published:
            machine.print(f"note: {file} has {len(rows):,} items where the published one has {published:,}")
        random.Random(1337).shuffle(rows)
        rows = rows[: count or len(rows)]
        if not rows:
            raise SystemExit(f"{file} holds no items")
        key = [label, len(rows), hashlib.sha256(file.read_bytes()).hexdigest()[:16], str(machine.dtype), code]
        if known.get(label, {}).get("key") != key:
            right, cut = core_task(model, tokenizer, machine, rows, shots, kind, delimiter)
            known[label] = {"key": key, "right": "".join(map(str, right)), "cut": cut}
            if machine.first:
                write_whole(cache, json.dumps(known))
        right, cut = known[label]["right"], known[label]["cut"]
        accuracy = right.count("1") / len(right)
        results[label] = accuracy, len(right), (accuracy - guess / 100) / (1 - guess / 100)
        note = f", {cut} texts were cut to {model.cfg.seq_len} tokens" if cut else ""
        score = f"{accuracy:7.2%} of {len(right):6,}   centred {results[label][2]:+.4f}"
        machine.print(f"{label:33}{score}   {time.time() - start:.1f} s{note}")
    guesses = {label: guess / 100 for label, _, _, _, _, guess, _ in CORE}
    mean, half = centred_mean([(*result[:2], guesses[label]) for label, result in results.items()])
    if missing:
        names = ", ".join(f"{label} ({file})" for label, file in missing)
        machine.print(f"missing: {names}; `python data.py download --source=core` has them")
        machine.print(f"so there is no CORE; the mean of the {len(results)} centred accuracies there are is {mean:.4f}")
    elif count:
        machine.print(f"CORE, estimated from at most {count} items a task: {mean:.4f} ± {half:.4f}")
    else:
        machine.print(f"CORE: {mean:.4f} ± {half:.4f}")
    return results, None if missing or count else {"CORE": mean, "ci/CORE": half}


# -----------------------------------------------------------------------------
# Report


def record(out, machine, stage, figures, seconds=None, examples=None):
    """Put a stage's figures into out/report.json and rebuild out/report.html. `figures` are numbers by name.
    `seconds` is what the stage took, where it has just been run."""
    if not machine.first:
        return
    path = Path(out) / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {"stages": {}, "seconds": {}, "machine": {}, "examples": {}}
    report["stages"].setdefault(stage, {}).update(figures)
    if seconds is not None:
        report["seconds"][stage] = round(seconds, 1)
        kind, cores = ("GPU", 1) if machine.device.type == "cuda" else ("CPU", machine.threads)  # of a CPU, each core counts
        report.setdefault("hours", {})[stage] = [round(seconds * machine.world * cores / 3600, 4), kind]
    report["machine"] = {
        "device": torch.cuda.get_device_name() if machine.device.type == "cuda" else f"{platform.machine()} CPU",
        "ranks": machine.world,
        "threads": machine.threads,
        "cores": os.cpu_count(),
        "dtype": str(machine.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    report["examples"].setdefault(stage, {}).update(examples or {})
    for meta in Path(out).glob("data/*/meta.json"):
        if cleaning := json.loads(meta.read_text()).get("cleaning"):
            report.setdefault("cleaning", {})[meta.parent.name] = cleaning
    write_whole(path, json.dumps(report, indent=1))
    write_whole(Path(out) / "report.html", page(out, report))


def task_figures(results):
    """{"accuracy/<task>", "n/<task>"} of run_tasks' results."""
    return {f"accuracy/{k}": v[0] for k, v in results.items()} | {f"n/{k}": v[1] for k, v in results.items()}


def read_entries(out):
    """The lines of metrics.jsonl."""
    path, entries = Path(out) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # half a line, of a run that was killed while writing it
    return entries


def read_metrics(out):
    """{(stage, quantity): [(step, value)]} of metrics.jsonl."""
    series = {}
    for entry in read_entries(out):
        for key, value in entry.items():
            if key not in ("stage", "step", "seconds") and isinstance(value, (int, float)):
                series.setdefault((entry["stage"], key), []).append((entry["step"], value))
    return series


def answers_on_the_way(out, stage, steps=40):
    """[(step, question, answer, reward)] that a stage sampled, of about so many of its steps."""
    entries = [entry for entry in read_entries(out) if entry["stage"] == stage and "samples" in entry]
    return [(entry["step"], *sample) for entry in entries[:: max(1, len(entries) // steps)] for sample in entry["samples"]]


def curve(lines, width=420, height=170):
    """Lines of (step, value), over each other, as SVG with its axes' ends labelled."""
    left, right, top, bottom = 52, 12, 10, 22
    xs, ys = [x for points in lines for x, _ in points], [y for points in lines for _, y in points]
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))
    sx = (width - left - right) / ((x1 - x0) or 1)
    sy = (height - top - bottom) / ((y1 - y0) or 1)
    paths = (" ".join(f"{left + (x - x0) * sx:.1f},{height - bottom - (y - y0) * sy:.1f}" for x, y in points) for points in lines)
    number = lambda v: f"{v:,.0f}" if abs(v) >= 100 else f"{v:.3g}"
    drawn = "".join(f'<polyline points="{path}" style="stroke:{COLORS[i % len(COLORS)]}"/>' for i, path in enumerate(paths))
    return f"""<svg viewBox="0 0 {width} {height}" role="img">
<path class="axis" d="M{left} {top}V{height - bottom}H{width - right}"/>
<text x="{left - 6}" y="{top + 8}" text-anchor="end">{number(y1)}</text>
<text x="{left - 6}" y="{height - bottom}" text-anchor="end">{number(y0)}</text>
<text x="{left}" y="{height - 6}">{x0}</text>
<text x="{width - right}" y="{height - 6}" text-anchor="end">step {x1}</text>
{drawn}</svg>"""


COLORS = "#2b7de9 #e4572e #2a9d5c #9b5de5 #d9a404 #00a6a6 #d6336c #7a7a7a".split()
CURVES = {  # what is drawn, of each stage, and in which words
    "loss": "loss (nats a token)",
    "bpb": "validation (bits a byte)",
    "reward": "reward (share of answers right)",
    "pass_at_k": "problems with at least one right answer",
    "length": "answer length (tokens)",
    "entropy": "entropy (nats a token)",
    "no_signal": "groups whose answers are all equally good",
    "valid_calls": "calls of the calculator that it could compute",
    "kl": "distance from the model it started from (nats a token)",
    "margin": "margin between the implicit rewards of a pair",
    "ranked_right": "pairs ranked right",
    "chosen_logprob": "log-probability of the chosen answers",
    "rejected_logprob": "log-probability of the rejected answers",
    "tokens_per_second": "tokens a second",
}


def score(figures, name):
    """A figure as text, and (low, high, items) of its 95% interval, or None where there is none to give."""
    value, n, half = figures[name], figures.get(name.replace("accuracy/", "n/")), figures.get(f"ci/{name}")
    if name.startswith("accuracy/"):
        return f"{value:.1%}", (*wilson(value, n), n) if n else None
    return f"{value:,.4g}", (value - half, value + half, 0) if half is not None else None


def score_cell(figures, name):
    """A figure with its interval and the number of its items, as a cell of a table."""
    if name not in figures:
        return "<td></td>"
    text, interval = score(figures, name)
    low, high, n = interval or (0, 0, 0)
    more = f"{low:.1%} to {high:.1%} of {n:,}" if n else f"{low:.4f} to {high:.4f}" if interval else ""
    return f"<td>{text} <small>{more}</small></td>"


def score_names(*several):
    """The names of what is a score among stages' figures, sorted."""
    return sorted({name for figures in several for name in figures if not name.startswith(("n/", "ci/"))})


def cost(report, stage):
    """What a stage cost, as text; of reports from before hours were written down, nothing."""
    hours, kind = report.get("hours", {}).get(stage, (0, ""))
    return f"{hours:.3g} {kind}-hours" if kind else ""


def page(out, report):
    """The report as one self-contained page."""
    e, series, body = html.escape, read_metrics(out), []
    stages = [s for s in STAGES if s in report["stages"]]
    head = "".join(f"<th>{STAGES[s]}</th>" for s in stages)
    rows = [f"<tr><th></th>{head}</tr>"]
    for name in score_names(*report["stages"].values()):
        rows.append(f"<tr><th>{e(name)}</th>{''.join(score_cell(report['stages'][s], name) for s in stages)}</tr>")
    rows.append("<tr><th>minutes</th>" + "".join(f"<td>{report['seconds'].get(s, 0) / 60:.1f}</td>" for s in stages) + "</tr>")
    rows.append("<tr><th>cost</th>" + "".join(f"<td>{cost(report, s)}</td>" for s in stages) + "</tr>")
    for s in stages:
        body.append(f"<h2>{STAGES[s]}</h2><div class=curves>")
        tasks = {key: f"{key.split('/')[1]}: share of held-out items right" for t, key in series if t == s and key.startswith("accuracy/")}
        for key, words in (CURVES | tasks).items():
            points = series.get((s, key), [])
            if len(points) > 1:
                body.append(f"<figure>{curve([points])}<figcaption>{e(words)}</figcaption></figure>")
        body.append("</div>")
        seen = answers_on_the_way(out, s)
        if seen:
            lines = "".join("<tr>" + "".join(f"<td>{e(str(c))}</td>" for c in row) + "</tr>" for row in seen)
            header = "<tr><th>step</th><th>question</th><th>answer</th><th>reward</th></tr>"
            body.append(f"<details><summary>sampled answers on the way</summary><table>{header}{lines}</table></details>")
        for task, shown in report["examples"].get(s, {}).items():
            cells = ((e(q), e(a), e(str(wanted)), "right" if grade == 1 else "wrong") for q, a, wanted, grade in shown)
            lines = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in cells)
            header = "<tr><th>question</th><th>answer</th><th>expected</th><th></th></tr>"
            body.append(f"<details><summary>{e(task)}: some answers</summary><table>{header}{lines}</table></details>")
    for name, cleaning in report.get("cleaning", {}).items():
        lines = "<tr><th>dropped</th><th>documents</th><th>three beginnings</th></tr>"
        for rule, count in cleaning["dropped"].items():
            shown = "".join(f"<div>{e(text)}</div>" for text in cleaning["examples"][rule])
            lines += f"<tr><th>{e(rule)}: {e(RULES.get(rule, ''))}</th><td>{count:,}</td><td>{shown}</td></tr>"
        body.append(f"<h2>Cleaning</h2><p>{e(name)}: {cleaning['kept']:,} documents kept</p><table>{lines}</table>")
    machine = ", ".join(f"{k} {v}" for k, v in report["machine"].items())
    note = f"{machine}; written {time.strftime('%Y-%m-%d %H:%M')}; shares with their 95% intervals (Wilson) and numbers of items"
    return whole_page(str(Path(out).resolve().name), f"<table>{''.join(rows)}</table>\n{''.join(body)}", note)


def whole_page(title, body, note):
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>onesitting: {html.escape(title)}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }}
th, td {{ text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #8884; vertical-align: top; }}
td {{ font-variant-numeric: tabular-nums; }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }}
figure {{ margin: 0; }} figcaption, small, footer {{ color: #888; font-size: .85rem; }}
svg {{ width: 100%; font-size: 11px; }} svg text {{ fill: #888; }}
polyline {{ fill: none; stroke-width: 1.6; }} .axis {{ fill: none; stroke: #8886; }}
summary {{ cursor: pointer; margin: .4rem 0; }}
</style>
<h1>onesitting</h1>
{body}
<footer>{html.escape(note)}</footer>
</html>"""


# -----------------------------------------------------------------------------
# Comparison of runs


@dataclass
class CompareConfig:
    out: str = "compare.html"  # the page that is written


def difference(a, b, name):
    """b less a of a score as (difference, low, high); both runs' items are taken as drawn apart, which errs to the wide side.

    Shares by Newcombe's method 10 (1998) from Wilson's intervals. None where there is no interval to give.
    """
    gap, (_, first), (_, second) = b[name] - a[name], score(a, name), score(b, name)
    if not first or not second:
        return gap, None, None
    below = math.hypot(b[name] - second[0], first[1] - a[name])
    return gap, gap - below, gap + math.hypot(second[1] - b[name], a[name] - first[0])


def read_run(folder):
    """(report, series, {(stage, knob): value}) of a run's folder. Raises SystemExit where there is none."""
    path = Path(folder) / "report.json"
    try:
        report = json.loads(path.read_text())
        report["stages"], report["seconds"]
    except (FileNotFoundError, NotADirectoryError):
        raise SystemExit(f"{folder} holds no run that reached a report: no {path}")
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"{path} is no report of a run; `python evals.py --out={folder}` cannot mend it, delete it and run a stage again")
    knobs = {}
    for stage in STAGES:
        if found := latest(Path(folder) / stage):
            state = read_state(found)
            knobs |= {(stage, knob): value for knob, value in (state["model"] | state["config"]).items()}
    return report, read_metrics(folder), knobs


def compare(folders, cfg):
    """Write one page on which runs lie over each other, and print its tables."""
    if len(folders) < 2:
        raise SystemExit("compare wants two or more folders of runs: python evals.py compare out/a out/b")
    e, runs, same = html.escape, [read_run(folder) for folder in folders], len({Path(f).resolve().name for f in folders}) < len(folders)
    names = [str(f) if same else Path(f).resolve().name for f in folders]
    legend = "".join(f'<span style="color:{COLORS[i % len(COLORS)]}">&#9632;</span> {e(name)} &nbsp; ' for i, name in enumerate(names))
    body, lines = [f"<p>{legend}</p>"], []

    def add(title, rows):
        """A table on the page and on the terminal; the cells are of text."""
        wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines.extend(["", title, *("  ".join(cell.ljust(w) for cell, w in zip(row, wide)).rstrip() for row in rows)])
        cells = ("".join(f"<{tag}>{e(cell)}</{tag}>" for tag, cell in zip(["th"] + ["td"] * len(row), row)) for row in rows)
        body.append(f"<h2>{e(title)}</h2><table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>")

    def told(figures, name):
        text, interval = score(figures, name) if name in figures else ("", None)
        low, high, n = interval or (0, 0, 0)
        return f"{text} ({low:.1%} to {high:.1%}, n={n:,})" if n else f"{text} ({low:.4f} to {high:.4f})" if interval else text

    for stage, title in STAGES.items():
        figures = [report["stages"].get(stage, {}) for report, _, _ in runs]
        if not any(figures):
            continue
        rows = [["", *names] + ["difference"] * (len(runs) == 2)]
        for name in score_names(*figures):
            rows.append([name, *(told(f, name) for f in figures)])
            if len(runs) == 2:
                gap, low, high = difference(*figures, name) if all(name in f for f in figures) else (None, None, None)
                unit, digits = (100, "+.1f") if name.startswith("accuracy/") else (1, "+.4f")
                within = "" if low is None else f" ({low * unit:{digits}} to {high * unit:{digits}})"
                rows[-1].append("" if gap is None else f"{gap * unit:{digits}}{within}")
        rows.append(["cost", *(cost(report, stage) for report, _, _ in runs)] + [""] * (len(runs) == 2))
        add(title, rows)
        body.append("<div class=curves>")
        known = dict.fromkeys(key for _, series, _ in runs for s, key in series if s == stage)
        for key, words in (CURVES | {key: key for key in known if key.startswith("accuracy/")}).items():
            drawn = [series.get((stage, key), []) for _, series, _ in runs]
            if any(len(points) > 1 for points in drawn):
                body.append(f"<figure>{curve(drawn)}<figcaption>{e(words)}</figcaption></figure>")
        body.append("</div>")
    keys = dict.fromkeys(key for _, _, knobs in runs for key in knobs if key[1] not in FREE_KNOBS)
    differing = [key for key in keys if len({json.dumps(knobs.get(key)) for _, _, knobs in runs}) > 1]
    rows = [[" ".join(key), *(str(knobs.get(key, "")) for _, _, knobs in runs)] for key in differing]
    add("Knobs that differ" if rows else "No knob differs", [["", *names], *rows])
    note = "95% intervals: Wilson's of shares, Newcombe's of differences (percentage points), which take the runs' items as drawn apart"
    write_whole(cfg.out, whole_page(" and ".join(names), "\n".join(body), note))
    print("\n".join([*lines[1:], "", f"{note}; the curves are in {cfg.out}"]))


# -----------------------------------------------------------------------------
# Command line


@dataclass
class Config:
    out: str = "out"  # folder of the run
    stage: str = ""  # base, mid, sft or rl; empty is the last there is
    tasks: str = DEMO  # names with commas between; or chatcore, the mean over six of them
    files: str = ""  # folder of the public tasks' own files, such as gsm8k_test.jsonl
    count: int = -1  # items a task, 0 is all; -1 is 500, and all of CORE and ChatCORE
    seed: int = 0  # another seed, other items
    split: str = "test"  # test or train
    samples: int = 1  # answers an item; several give pass@k
    temperature: float = 0.0  # of sampling them; 0 takes the likeliest token
    run_code: bool = False  # run what the model writes, which humaneval needs; `run_answer` says what holds then
    slots: int = 64  # answers generated at once
    show: int = 3  # answers printed a task
    core: str = ""  # folder of the CORE bundle: instead of tasks, the CORE metric
    text: str = ""  # file or folder: instead of tasks, the bits per byte of this text
    report: bool = False  # only rebuild the report
    device: str = "auto"  # cuda, cpu
    dtype: str = "auto"  # bfloat16, float32
    threads: int = 0  # CPU threads; 0 is all cores


def main(argv):
    if argv[:1] == ["compare"]:
        knobs = [arg for arg in argv[1:] if arg.startswith("-")]
        return compare([arg for arg in argv[1:] if arg not in knobs], override(CompareConfig(), knobs, __doc__))
    cfg = override(Config(), argv, __doc__)
    machine = start_machine(cfg.device, cfg.dtype, cfg.threads)
    if cfg.report:
        path = Path(cfg.out) / "report.json"
        if not path.exists():
            raise SystemExit(f"no {path} yet; `bash run.sh` makes one")
        write_whole(Path(cfg.out) / "report.html", page(cfg.out, json.loads(path.read_text())))
        return
    chat, HumanEval.allowed = cfg.tasks == "chatcore", cfg.run_code
    names, missing = askable(CHATCORE, cfg.split, cfg.seed, cfg.files) if chat else (task_names(cfg.tasks), {})
    if cfg.samples < 1 or (cfg.samples > 1 and cfg.temperature <= 0):
        raise SystemExit("--samples is 1 or more, and several answers to an item need --temperature above 0 to differ")
    if chat and (cfg.split != "test" or cfg.samples > 1):
        raise SystemExit("ChatCORE is one answer to each test item: leave --split and --samples as they are")
    stage = cfg.stage or last_stage(cfg.out)
    tokenizer, hash = load_tokenizer(cfg.out)
    model, state = load_model(f"{cfg.out}/{stage}", machine, hash)
    if cfg.text:
        bos = tokenizer.special("<|bos|>")
        tokens = np.concatenate(list(encode_documents(tokenizer, read_documents(cfg.text), bos)))
        bpb = bits_per_byte(model, tokenizer, TokenSet([tokens], bos, whole=True), machine)
        return machine.print(f"{cfg.out}/{stage} step {state['step']}: {bpb:.4f} bits per byte on {cfg.text}")
    if cfg.core:
        found, path = latest(f"{cfg.out}/{stage}"), f"{cfg.out}/{stage} step {state['step']}"
        machine.print(f"{path}: CORE, from {cfg.core}")
        results, core = run_core(model, tokenizer, machine, cfg.core, found / "core.json", max(0, cfg.count))
        figures = task_figures({f"core {label}": result for label, result in results.items()})
        return record(cfg.out, machine, stage, figures | (core or {}))
    machine.print(f"{cfg.out}/{stage} step {state['step']}, {cfg.split} items of seed {cfg.seed}")
    model, results = model.to(machine.dtype), {}
    if cfg.run_code and "humaneval" in names:
        holds = run_answer([("", "def f(): return 1")], "", "def check(f): assert f() == 1", "f")[2]
        machine.print(f"what the model writes is run here; what holds: {', '.join(holds)}")
    knobs = {"split": cfg.split, "slots": cfg.slots, "samples": cfg.samples, "temperature": cfg.temperature}
    for name in names:
        few = cfg.count if cfg.count > 0 else 2**31 if (chat or cfg.count == 0) and not TASKS[name].endless else 500
        results |= run_tasks(model, tokenizer, machine, [name], few, cfg.files, cfg.seed, **knobs)
        accuracy, n, shown, passes = results[name]
        if not n:
            raise SystemExit(f"there are no {cfg.split} items of {name}")
        low, high = wilson(accuracy, n)
        more = "".join(f"   pass@{k} {share:.1%}" for k, share in passes.items())
        machine.print(f"{name:13} {accuracy:6.1%} of {n:,} ({low:.1%} to {high:.1%}){more}")
        for asked, text, answer, grade in shown[: cfg.show]:
            machine.print(f"   {'right' if grade == 1 else 'wrong'} | {asked} -> {text!r} (expected {answer})")
    if chat:
        chatcore(cfg, machine, stage, results, missing)


def chatcore(cfg, machine, stage, results, missing):
    """Print ChatCORE, and record it where all of its tasks were answered in full."""
    mean, half = centred_mean([(*result[:2], CHATCORE[name]) for name, result in results.items()])
    if missing:
        machine.print("missing: " + "; ".join(f"{name} ({why})" for name, why in missing.items()))
        machine.print(f"so there is no ChatCORE; the mean of the {len(results)} centred accuracies there are is {mean:.4f}")
    elif cfg.count > 0:
        machine.print(f"ChatCORE, estimated from at most {cfg.count} items a task: {mean:.4f} ± {half:.4f}")
    else:
        machine.print(f"ChatCORE: {mean:.4f} ± {half:.4f}")
        record(cfg.out, machine, stage, task_figures(results) | {"ChatCORE": mean, "ci/ChatCORE": half})


if __name__ == "__main__":
    command(main)
