"""
Where text and tasks come from: documents, tokenizer, token shards, packed batches, the chat template,
tasks with their graders, and the demo world.

    python data.py demo --split=test --seed=7          # fresh items of every task of the demo world
    python data.py encode "Hello, 你好" --out=out       # how a text becomes pieces, ids and bytes
    python data.py prepare --data=FOLDER --out=out     # tokenizer and shards alone, without training
    python data.py download --shards=4 --out=text      # ClimbMix; then --data=text/train --val_data=text/val
    python data.py download --source=tinystories --out=stories
    python data.py download --source=core --out=files  # and mmlu, gsm8k, humaneval, slimorca, ultrachat, oasst2, dolly
    python data.py prepare --data=text/train --val_data=text/val --clean=1 --near_duplicates=1 --evaluations=files/eval_bundle
    python data.py prepare --help                      # each of the four has knobs of its own

Text is a file or folder of .txt, .jsonl or .json (field `text`), each also as .gz, or .parquet where pyarrow is
installed. Conversations are .jsonl with `messages`, or in the forms that GSM8K, SlimOrca, UltraChat, OASST2 and Dolly
are published in. Downloads go on where they were stopped; --mirror=URL asks URL/host/path for https://host/path.
Token shards have the layout that llm.c and modded-nanogpt read: 256 int32 of header, then uint16 ids. Everything
random is a pure function of a seed and a step, so that nothing needs a cursor to be saved and resumed.

To add a special token, rename the next spare in SPECIALS. To split text in another way before merging, edit
SPLIT. To add a task, write a class with `items` and `grade` and name it in TASKS. To change what the chat model
of the demo is taught, edit `exchange`; what one learns from public conversations and in which shares, MIXTURE.
"""

import bisect
import codecs
import csv
import email.utils
import fcntl
import functools
import gzip
import hashlib
import inspect
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import tarfile
import threading
import time
import zipfile
import zlib
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import requests
import torch
from tok import PATTERN, Tokenizer

from gpt import command, lock_folder, override, start_machine, write_whole

# -----------------------------------------------------------------------------
# Tokenizer: the special tokens take the last ids, in this order; a new one takes the next spare's place

SPECIALS = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"]
SPECIALS += ["<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]
SPECIALS += [f"<|spare_{i}|>" for i in range(len(SPECIALS), 16)]
SPLIT = PATTERN  # how text is cut before merging: GPT-4's pattern, with digits in groups of one or two


def load_tokenizer(out):
    """The tokenizer of a run, with the names that SPECIALS has today, and its hash."""
    folder = Path(out) / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        raise SystemExit(f"no tokenizer in {folder}; `bash run.sh` or `python pretrain.py` makes one, --from=DIR borrows one")
    return Tokenizer.load(str(folder), special_tokens=SPECIALS), tokenizer_hash(out)


def tokenizer_hash(out):
    """Names the meaning of ids: the ranks, the pattern and the size, but not what the spares are called."""
    folder = Path(out) / "tokenizer"
    config = json.loads((folder / "tokenizer.json").read_text())
    named = json.dumps([config["pattern"], config["vocab_size"]])
    return hashlib.sha256((folder / "ranks.tiktoken").read_bytes() + named.encode()).hexdigest()


def adopt_tokenizer(cfg, machine):
    """Copy the tokenizer of cfg.from_ to cfg.out, so that every run's folder can be used by itself."""
    source, target = Path(cfg.from_) / "tokenizer", Path(cfg.out) / "tokenizer"
    if machine.first and cfg.from_:
        if not (source / "tokenizer.json").exists():
            raise SystemExit(f"--from={cfg.from_} has no tokenizer; it wants the folder of another run")
        if (target / "tokenizer.json").exists() and tokenizer_hash(cfg.out) != tokenizer_hash(cfg.from_):
            raise SystemExit(f"{target} and {source} are different tokenizers; choose another --out=DIR")
        for name in ("ranks.tiktoken", "tokenizer.json"):
            write_whole(target / name, (source / name).read_bytes())
    machine.barrier()


# -----------------------------------------------------------------------------
# Documents


def text_files(path, kinds=("txt", "jsonl", "json", "parquet")):
    """The files of these kinds under a path, sorted by name."""
    path, known = Path(path), ", ".join(f".{kind}" for kind in kinds)
    if not path.exists() and path.name in SOURCES:
        raise SystemExit(f"first `python data.py download --source={path.name} --out=DIR`, then --data=DIR/train --val_data=DIR/val")
    if not path.exists():
        raise SystemExit(f"{path} does not exist; --data wants a file or folder of {known}, also as .gz")
    files = [path] if path.is_file() else sorted(f for k in kinds for end in ("", ".gz") for f in path.rglob(f"*.{k}{end}"))
    if not files:
        raise SystemExit(f"{path} holds no {known} file, also none as .gz")
    return files


def read_lines(file):
    """Yield (where, object) of each line of a .jsonl file; `where` names file and line in error messages."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    yield f"{file} line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise SystemExit(f"{file} line {number} is not JSON ({error}): {ascii(line)[:60]}")


def unreadable(file, error):
    return SystemExit(f"{file} cannot be read as UTF-8 text: {error}")


BROKEN = (UnicodeDecodeError, OSError, EOFError, zlib.error)  # what a file that is cut short or no text raises


def read_documents(path, limit=0):
    """Yield the documents under a path; `limit` above 0 stops after that many.

    A .txt file is one document, or several divided by <|endoftext|>; a .jsonl line is an object with a
    field `text`; a .json file is such an object or a list of them. Raises SystemExit naming file and line.
    """
    count = 0
    for file in text_files(path):
        try:
            for text in read_file(file):
                if text.strip():
                    yield text
                    count += 1
                    if count == limit:
                        return
        except BROKEN as error:
            raise unreadable(file, error)
    if not count:
        raise SystemExit(f"{path} holds no text at all")


def read_file(file):
    """Yield the texts of one file, empty ones included."""
    kind = file.name.removesuffix(".gz").rsplit(".", 1)[-1]
    if kind == "jsonl":
        for where, item in read_lines(file):
            yield text_field(item, where)
    elif kind == "parquet":
        yield from read_parquet(file)
    elif kind == "json":
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as f:
            content = f.read()
        try:
            items = json.loads(content)
        except json.JSONDecodeError as error:
            raise SystemExit(f"{file} is not JSON: {error}")
        for number, item in enumerate(items if isinstance(items, list) else [items]):
            yield text_field(item, f"{file} item {number}")
    else:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as f:
            begun = []  # the pieces of a document whose end is still to come
            while block := f.read(2**22) + f.readline():  # up to a line's end, so that no <|endoftext|> is torn
                first, *others = block.split("<|endoftext|>")
                begun.append(first)
                for text in others:
                    yield "".join(begun)
                    begun = [text]
            yield "".join(begun)


def read_parquet(file):
    """The column `text`, where pyarrow happens to be installed; nothing else here needs it."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise SystemExit(f"{file} can only be read with pyarrow: pip install pyarrow, or convert it to .jsonl")
    try:
        with parquet.ParquetFile(file) as table:
            for group in table.iter_batches(1000, columns=["text"]):
                yield from (text_field({"text": text}, file) for text in group.column("text").to_pylist())
    except (ArrowException, KeyError) as error:
        raise SystemExit(f"{file} is damaged or has no column `text`: {str(error).splitlines()[0][:100]}")


def text_field(item, where):
    try:
        item["text"].encode()  # half a surrogate pair is valid JSON and no text
        return item["text"]
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise SystemExit(f"{where}: wanted an object with a string field `text`, got {ascii(item)[:60]}")


# -----------------------------------------------------------------------------
# Download: a file is there whole or not at all, and the same command goes on from what there is

HF, RAW = "https://huggingface.co/datasets/", "https://raw.githubusercontent.com/"
CLIMBMIX = [f"{HF}OptimalScale/ClimbMix/resolve/main/part_{i}.jsonl" for i in range(100)]
CLIMBMIX_TOKENS = 300e6  # in one shard of it, about: 100 slices of 16 MiB of JSON
C4 = HF + "allenai/c4/resolve/main/en/c4-{}.{:05}-of-{:05}.json.gz"
STORIES = HF + "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-"
GSM8K = RAW + "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/"
PUBLIC = {  # word for --source: (file under --out, URL, sha256 where known) of each of its files
    "tinystories": [("train/tinystories.txt", f"{STORIES}train.txt", ""), ("val/tinystories.txt", f"{STORIES}valid.txt", "")],
    "gsm8k": [
        ("gsm8k_train.jsonl", GSM8K + "train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
        ("gsm8k_test.jsonl", GSM8K + "test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    ],
    "core": [
        (
            "eval_bundle.zip",  # CORE, and ARC in it
            "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip",
            "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200",
        )
    ],
    "mmlu": [("mmlu.tar", f"{HF}cais/mmlu/resolve/main/data.tar", "bec563ba4bac1d6aaf04141cd7d1605d7a5ca833e38f994051e818489592989b")],
    "humaneval": [("HumanEval.jsonl.gz", RAW + "openai/human-eval/master/data/HumanEval.jsonl.gz", "")],
    "slimorca": [("slimorca.jsonl", f"{HF}Open-Orca/SlimOrca/resolve/main/oo-labeled_correct.gpt4.sharegpt.jsonl", "")],
    "ultrachat": [(f"ultrachat_{i}.jsonl", f"{HF}stingning/ultrachat/resolve/main/train_{i}.jsonl", "") for i in range(10)],
    "oasst2": [
        (
            "oasst2.jsonl.gz",
            f"{HF}OpenAssistant/oasst2/resolve/179dd21fc55192153d94adb0e0ce8f69e222bf75/2023-11-05_oasst2_ready.trees.jsonl.gz",
            "7a886a16ccfc1173c4f00a6897523e3c95b2785a86ee44a18a98f4f2807ee29b",
        )
    ],
    "dolly": [("dolly.jsonl", f"{HF}databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl", "")],
}
SOURCES = ["climbmix", "c4", *PUBLIC]
FETCHERS = 8  # requests at once


class Fault(Exception):
    """A reply that cannot be used; the next one may be better."""


class Unusable(Exception):
    """What a host sends cannot be used, however often it is asked."""


class Fetcher:
    """Fetches byte ranges of URLs into files. Threads share one.

    mirror    stands before the host's name: https://host/path is asked for as mirror/host/path
    wait      seconds before the first repetition, doubled up to a minute; what a host asks for goes first
    patience  seconds without a byte after which a connection is given up
    """

    RETRIES = 8  # in a row, without a new byte between them

    def __init__(self, mirror="", wait=1.0, patience=60.0):
        self.mirror, self.wait, self.patience = mirror.rstrip("/"), wait, patience
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=FETCHERS))
        self.links = {}  # URL: the signed link that its host led to, reused until it is refused
        self.not_before = 0.0  # when a host that was asked too often may be asked again
        self.stop, self.count = threading.Event(), threading.Lock()
        self.received, self.expected = 0, {}  # bytes so far; of each thing that was begun, the bytes it has in all

    def rest(self, seconds):
        if self.stop.wait(seconds):
            raise Unusable("stopped")

    def ask(self, url, first, last):
        """One request for bytes first..last: a reply of status 200, 206 or 416, whose body is still to be read."""
        while (pause := self.not_before - time.time()) > 0:
            self.rest(pause + random.random() * self.wait)  # not all at once
        link = self.links.get(url) or (f"{self.mirror}/{url.split('://', 1)[1]}" if self.mirror else url)
        # without `identity`, some hosts compress on the way, and lengths mean nothing
        headers = {"Range": f"bytes={first}-{'' if last is None else last}", "Accept-Encoding": "identity"}
        reply = self.session.get(link, headers=headers, stream=True, timeout=(10, self.patience))
        status = reply.status_code
        if status in (200, 206, 416):
            if reply.history:
                self.links[url] = reply.url
            if reply.headers.get("Content-Encoding", "identity") != "identity":
                raise Fault("the body is compressed on the way")
            return reply
        reply.close()
        refused = self.links.pop(url, None) and 400 <= status < 500  # a signed link that has expired: ask for another
        if status in (429, 503) and (seconds := retry_after(reply.headers)):
            if time.time() + seconds > self.not_before + 1:
                print(f"  {url.split('/')[2]} asks to wait for {seconds:.0f} s", flush=True)
            self.not_before = max(self.not_before, time.time() + seconds)
        elif 400 <= status < 500 and status not in (408, 425, 429) and not refused:
            raise Unusable(f"{url} answers {status} {reply.reason}")
        raise Fault(f"status {status} {reply.reason}")

    def receive(self, url, path, first, last, have):
        """Append to `path` what one reply brings of bytes first..last. Returns the size of all that the URL has."""
        with self.ask(url, first + have, last) as reply:
            said = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)", reply.headers.get("Content-Range", ""))
            total, length = said and int(said[3]), reply.headers.get("Content-Length")
            length = int(length) if length and length.isdigit() else None
            if reply.status_code == 416:
                if total == first + have or (total is not None and not have):  # there is no more, or never was so much
                    path.touch()
                    return total
                path.unlink(missing_ok=True)
                raise Fault("the file has become shorter")
            if "text/html" in reply.headers.get("Content-Type", "") and not url.endswith((".html", ".htm")):
                raise Fault("a web page instead of data")
            if reply.status_code == 200:
                if first or last is not None:
                    raise Fault("a whole file instead of a range of bytes")
                have, total = 0, length
                if length is None and reply.headers.get("Transfer-Encoding") != "chunked":
                    raise Fault("the reply does not say how long it is")
            elif not said or not said[1] or int(said[1]) != first + have or (last is not None and int(said[2]) > last):
                raise Fault(f"asked for bytes {first + have}-{'' if last is None else last}, got {reply.headers.get('Content-Range')!r}")
            else:
                wanted = int(said[2]) - int(said[1]) + 1
                if length not in (None, wanted):
                    raise Fault(f"{wanted} bytes are promised, and {length} announced")
                length = wanted
            self.expected.setdefault((url, first), length or 0)
            with open(path, "ab") as f:
                f.truncate(have)
                reply.raw.enforce_content_length = False  # or it keeps what came before a connection broke to itself
                for block in reply.iter_content(2**18):
                    if self.stop.is_set():
                        raise Unusable("stopped")
                    f.write(block)
                    with self.count:
                        self.received += len(block)
                got = f.tell() - have
                if length is not None and got > length:
                    f.truncate(have)
            end = total if last is None else min(total, last + 1)
            if (length is not None and got != length) or (end is not None and first + have + got != end):
                raise Fault(f"{got:,} bytes came where {length:,} were announced")
            return total

    def fetch(self, url, path, first=0, last=None):
        """Bring bytes first..last of a URL (to its end without last) to file `path`, after those it holds already.

        Returns the size of all that the URL has, None where the host does not say. Raises Unusable.
        """
        tries, most = 0, 0
        if last is not None and path.exists() and path.stat().st_size > last - first:
            path.unlink()  # complete, but the size of the whole was lost with the process
        while True:
            have = path.stat().st_size if path.exists() else 0
            try:
                return self.receive(url, path, first, last, have)
            except (Fault, requests.RequestException) as error:
                reason = str(error) if isinstance(error, Fault) else type(error).__name__
            have = path.stat().st_size if path.exists() else 0
            tries, most = (1 if have > most else tries + 1), max(have, most)
            if tries > self.RETRIES:
                raise Unusable(f"{url}: {reason}, {tries} times in a row")
            self.rest(min(60, self.wait * 2 ** (tries - 1)) * (0.5 + random.random()))

    def file(self, url, path, sha256=""):
        """Bring a whole file to `path`, verified. Raises Unusable."""
        part = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(3):
            self.fetch(url, part)
            wrong = wrong_content(part, path.name, sha256)
            if not wrong:
                settle(part, path)
                return
            part.unlink()
        raise Unusable(f"{url}: {wrong}")

    def slice(self, url, path, first, size):
        """Bring the whole lines among bytes first..first+size of a .jsonl to `path`, of each its `text` alone."""
        part = path.with_name(path.name + ".bytes")
        path.parent.mkdir(parents=True, exist_ok=True)
        total = self.fetch(url, part, first, first + size - 1) or 0
        content = part.read_bytes()
        begin = content.find(b"\n") + 1 if first else 0  # the line before it began in the slice before
        end = len(content) if first + len(content) >= total else content.rfind(b"\n") + 1
        lines = [line for line in content[begin:end].split(b"\n") if line.strip()]
        texts = []
        for line in lines:
            try:
                texts.append(json.dumps({"text": text_field(json.loads(line), url)}, ensure_ascii=False) + "\n")
            except (ValueError, SystemExit):
                pass
        if len(texts) < 0.99 * len(lines):
            part.unlink()
            raise Unusable(f"{url}: of {len(lines)} lines, {len(lines) - len(texts)} are no JSON with a field `text`")
        write_whole(path, "".join(texts))
        part.unlink()


def retry_after(headers):
    """Seconds that a host asks to wait, from Retry-After (seconds or a date) or RateLimit's t=; 0 if it does not say."""
    said, limit = headers.get("Retry-After", ""), re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    try:
        return float(said) if said.isdigit() or not said else max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except ValueError:
        return float(limit[1]) if limit else 0.0


def wrong_content(file, name, sha256=""):
    """What is wrong with a file that was brought as `name`, in a few words, or an empty string."""
    if sha256:
        digest = hashlib.sha256()
        with open(file, "rb") as f:
            while block := f.read(2**20):
                digest.update(block)
        if digest.hexdigest() != sha256:
            return f"its sha256 is {digest.hexdigest()[:16]}..., not {sha256[:16]}..."
    with open(file, "rb") as f:
        head = f.read(256).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page instead of data"
    if not head:
        return "it is empty"
    kind = name.removesuffix(".gz").rsplit(".", 1)[-1]
    try:
        if kind == "zip":
            return zipfile.ZipFile(file).testzip() or ""
        with (gzip.open if name.endswith(".gz") else open)(file, "rb") as f:
            if kind == "jsonl":
                for line in f:
                    if line.strip():
                        json.loads(line)
            elif kind == "json":
                json.load(f)
            else:
                decoder = codecs.getincrementaldecoder("utf-8")()
                while block := f.read(2**20):
                    if kind == "txt":
                        decoder.decode(block)
    except (ValueError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        return f"it is damaged ({type(error).__name__}: {str(error)[:60]})"
    return ""


def settle(part, path):
    """A complete file takes its name."""
    with open(part, "rb") as f:
        os.fsync(f.fileno())
    os.replace(part, path)


def shuffle_lines(folder, path, seed):
    """The lines of all files in a folder, in random order, as the file `path`; the folder goes."""
    files = [file for file in sorted(folder.iterdir()) if file.name.isdigit() and file.stat().st_size]  # what a kill left is none
    maps = [np.memmap(file, np.uint8, "r") for file in files]
    ends = [np.flatnonzero(m == 10) + 1 for m in maps]
    lines = [(i, start, end) for i, e in enumerate(ends) for start, end in zip([0, *e[:-1].tolist()], e.tolist())]
    random.Random(seed).shuffle(lines)
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "wb", 2**20) as f:
        for i, start, end in lines:
            f.write(maps[i][start:end].data)
    settle(part, path)
    shutil.rmtree(folder)
    return len(lines)


def climbmix_plan(fetcher, folder, shards, size):
    """What is to be done for ClimbMix: (file, [calls that bring its pieces], call that makes it of them) each.

    The parts are sorted by topic. So shard k is slice k of every part, its lines in random order, and so is the
    validation text, which is a short slice at the start of each.
    """
    spans = {"val/climbmix.jsonl": (0, max(1, size // 64))}
    spans |= {f"train/climbmix_{k:05}.jsonl": (max(1, size // 64) + k * size, size) for k in range(shards)}
    plan = []
    for name, span in spans.items():
        pieces = folder / f"{Path(name).stem}_{Path(name).parent}.slices"
        calls = [(fetcher.slice, url, pieces / f"{i:03}", *span) for i, url in enumerate(CLIMBMIX) if not (pieces / f"{i:03}").exists()]
        plan.append((folder / name, calls, (shuffle_lines, pieces, folder / name, name)))
    return plan


def files_plan(fetcher, folder, files):
    return [(folder / name, [(fetcher.file, url, folder / name, sha256)], None) for name, url, sha256 in files]


TEXT = r"\.(txt|jsonl|json)(\.gz)?$|\.parquet$"  # how the name of a file of text ends


def announce(folder, source, size, plan, **more):
    """Say in source.json, before the first byte comes, what text will be there: preparing can start on what there is."""
    names = sorted(entry[0].relative_to(folder).as_posix() for entry in plan)
    if any(name.startswith("train/") for name in names):
        write_whole(folder / "source.json", json.dumps({"source": source, "slice": size, "files": names} | more))


def planned(path):
    """The files of a folder of text that a download fills, sorted by name, those still to come too; [] of any other path."""
    path, note = Path(path), Path(path).parent / "source.json"
    names = json.loads(note.read_text()).get("files", []) if note.exists() else []
    files = {path.parent / name for name in names if Path(name).parent.name == path.name}
    return sorted(files | {file for file in path.rglob("*") if re.search(TEXT, file.name)}) if files else []


ABSENT = 60  # seconds without anybody at work after which what is waited for is given up


def is_locked(folder):
    """Whether a process holds the folder's lock (lock_folder): a download, or whoever makes shards, is at work."""
    try:
        with open(Path(folder) / ".lock") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


def wait_for(there, what, folder, hint, say=functools.partial(print, flush=True)):
    """Return once there() is true. Says once what is waited for; SystemExit when nobody has been at work in `folder` for long."""
    seen = time.time()
    if not there():
        say(f"  waiting for {what}")
    while not there():
        if is_locked(folder):
            seen = time.time()
        elif time.time() > seen + ABSENT and not there():
            raise SystemExit(f"{what} is not there, and nobody has worked on it for {ABSENT} s: {hint}, then the same command goes on")
        time.sleep(0.2)


def wait_for_download(path, there, what):
    """wait_for files under a folder that a download fills."""
    folder = Path(path).parent
    note = json.loads((folder / "source.json").read_text())
    count = sum(name.startswith("train/") for name in note["files"])
    wait_for(there, what, folder, f"`python data.py download --source={note['source']} --shards={count} --out={folder}` brings it")


def carry_out(fetcher, plan, what):
    """Do what a plan says, its files in order, and say every few seconds how far it is. Raises Unusable."""
    todo = [entry for entry in plan if not entry[0].exists()]
    start = said = time.time()
    calls = sum(len(entry[1]) for entry in todo)
    fetcher.received, fetcher.expected = 0, {}

    def progress():
        sizes, rate = list(fetcher.expected.values()), max(1, fetcher.received) / max(0.01, time.time() - start)
        total = max(fetcher.received, sum(sizes) / max(1, len(sizes)) * calls)  # what was not begun counts as the mean of what was
        got, left = fetcher.received / 1e6, (total - fetcher.received) / rate
        return f"{got:,.0f} of about {total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, {left:,.0f} s left"

    pool = ThreadPoolExecutor(FETCHERS)
    try:
        futures = [[pool.submit(*call) for call in calls] for _, calls, _ in todo]
        for i, ((path, _, finish), pending) in enumerate(zip(todo, futures)):
            while pending:
                done, pending = wait(pending, 1, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if time.time() > said + 10:
                    said = time.time()
                    print(f"  {what}: {progress()}", flush=True)
            if finish and not finish[0](*finish[1:]):
                path.unlink()
                raise Unusable(f"{what} has no more than that: {path.name} would be empty")
            print(f"  {path} ({path.stat().st_size / 1e6:,.1f} MB), {i + 1} of {len(todo)}; {progress()}", flush=True)
    finally:
        fetcher.stop.set()
        pool.shutdown(cancel_futures=True)
        fetcher.stop.clear()


def download(cfg):
    """Bring cfg.source to cfg.out: text as train/ and val/, other data as its files."""
    folder, size, note = Path(cfg.out), max(1, round(cfg.slice_mb * 2**20)), Path(cfg.out) / "source.json"
    urls = cfg.source.split(",")
    names = [unquote(urlsplit(url).path.rsplit("/", 1)[-1]) for url in urls]
    if cfg.source not in SOURCES and not all(re.match("https?://[^/]+/", url) for url in urls):
        raise SystemExit(f"there is no source {cfg.source!r}; there are {', '.join(SOURCES)}, and URLs with commas between")
    known = all(re.search(TEXT, name) for name in names)
    if cfg.source not in SOURCES and (len(set(names)) < len(names) or not known):
        raise SystemExit(f"URLs have to end in names of their own with .txt, .jsonl, .json (also .gz) or .parquet; got {', '.join(names)}")
    fetcher = Fetcher(cfg.mirror, cfg.wait, cfg.patience)
    source, wanted = cfg.source, {"source": cfg.source, "slice": size}
    was = json.loads(note.read_text()) if note.exists() else {}
    if source == "climbmix" and was.get("instead_of") == "climbmix":
        source = "c4"
        print(f"{folder} holds C4, which stood in for ClimbMix; going on with it (another --out=DIR tries ClimbMix again)")
    elif source == "climbmix" and was and {key: was.get(key) for key in wanted} != wanted:
        made = f"{was['source']} in slices of {was['slice']} bytes"
        raise SystemExit(f"{folder} was made from {made}, not from {source} in {size}; choose another --out=DIR")
    try:
        if source == "climbmix":
            first, *others = climbmix_plan(fetcher, folder, cfg.shards, size)
            announce(folder, source, size, [first, *others])
            try:
                carry_out(fetcher, [first], "climbmix")  # validation takes a little of every part: if that works, all will
            except Unusable as error:
                shutil.rmtree(folder / "climbmix_val.slices", ignore_errors=True)
                print(f"ClimbMix cannot be had ({error}): taking C4 instead", flush=True)
                source = "c4"
                was = {"instead_of": "climbmix"}
            else:
                carry_out(fetcher, others, "climbmix")
        if source == "c4":
            files = [("val/c4.jsonl.gz", C4.format("validation", 0, 8), "")]
            files += [(f"train/c4_{i:05}.jsonl.gz", C4.format("train", i, 1024), "") for i in range(min(1024, cfg.shards))]
        elif source in PUBLIC:
            files = PUBLIC[source]
        elif source != "climbmix":
            files = [(f"train/{name}", url, "") for name, url in zip(names, urls)]
        if source != "climbmix":
            plan = files_plan(fetcher, folder, files)
            announce(folder, source, size, plan, **{key: was[key] for key in was if key == "instead_of"})
            carry_out(fetcher, plan, source if source in SOURCES else names[0])
    except Unusable as error:
        raise SystemExit(f"{error}; what was brought stays in {folder}, and the same command goes on from there")
    for archive in (*folder.glob("*.zip"), *folder.glob("*.tar")):
        safe = {"filter": "data"} if archive.suffix == ".tar" and hasattr(tarfile, "data_filter") else {}  # nothing outside the folder
        shutil.unpack_archive(archive, folder, **safe)
    print(f"{source}: all there, in {folder}")


# -----------------------------------------------------------------------------
# Cleaning, where asked for: rules by which a document is dropped, in this order, each counted

RULES = {
    "length": "shorter than 100 characters or longer than a million",
    "symbols": "more than 3 bytes in 10 are neither letters nor digits nor spaces",
    "repetition": "more than 3 characters in 10 stand in lines it has already had, or its first 20,000 bytes pack to under a tenth",
    "duplicate": "the same text came before",
    "evaluation": "13 words in a row are those of an evaluation item",
    "near": "with --near_duplicates: of its runs of 5 words and those of one of the million documents before it, 8 in 10 are common",
}
ALNUM = bytes(c for c in range(256) if c >= 128 or chr(c).isalnum())  # letters beyond ASCII are letters
WORDS_ONLY = bytes(ord(chr(c).lower()) if c < 128 and chr(c).isalnum() else c if c >= 128 else 32 for c in range(256))


def poor(text, raw):
    """The first rule of quality that a document breaks, or None."""
    if not 100 <= len(text) <= 1_000_000:
        return "length"
    if len(raw.translate(None, ALNUM + b" \n\r\t")) > 0.3 * len(raw):
        return "symbols"
    lines = text.split("\n")
    again = len(text) - len(lines) - sum(map(len, set(lines))) if len(lines) > 1 else 0
    head = raw[:20000]
    if again > 0.3 * len(text) or len(zlib.compress(head, 1)) < 0.1 * len(head):
        return "repetition"


class Seen:
    """A set of 64-bit numbers that takes at most 16 bytes for each: sorted arrays, each over twice as long as the next."""

    def __init__(self):
        self.levels = []

    def has(self, numbers):
        found = np.zeros(len(numbers), bool)
        for level in self.levels:
            found |= level[np.minimum(np.searchsorted(level, numbers), len(level) - 1)] == numbers
        return found

    def add(self, numbers):
        """Remember these; returns which of them are new (of equal ones among them, the first)."""
        new = np.zeros(len(numbers), bool)
        new[np.unique(numbers, return_index=True)[1]] = True
        new &= ~self.has(numbers)
        if new.any():
            self.levels.append(np.sort(numbers[new]))
        while len(self.levels) > 1 and len(self.levels[-2]) <= 2 * len(self.levels[-1]):
            merged = np.concatenate([self.levels.pop(), self.levels.pop()])
            merged.sort()  # in place: while it is made, the numbers are held twice, and no more
            self.levels.append(merged)
        return new


def word_numbers(raws):
    """(a number for each word, the index of its text), of UTF-8 texts, whatever a word's case and what stands between."""
    words = [raw.translate(WORDS_ONLY).split() for raw in raws]
    owner = np.repeat(np.arange(len(raws)), [len(w) for w in words])
    return np.fromiter(map(zlib.crc32, itertools.chain(*words)), np.uint64, len(owner)), owner


MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits in no order: a product's high bits depend on all bits of the other factor


def runs_of(count, numbers):
    """A number for each `count` numbers in a row."""
    total = np.zeros(max(0, len(numbers) - count + 1), np.uint64)
    for j in range(count if len(total) else 0):
        total = (total + numbers[j : len(total) + j]) * MIX
    return total ^ (total >> np.uint64(32))


def sketch(runs, owner, count):
    """MinHash of `count` sets of numbers, runs[i] of set owner[i]: (count, 128) uint8. Sets of Jaccard similarity J agree
    in a share J of their places, give or take sqrt(J (1 - J) / 128); an empty set is like other empty ones.

    Each number is hashed to one place in each turn, and a place keeps the least of the first turn that filled it: near
    the cost of one hash a number, and as exact for few numbers as 128 hashes (Dahlgaard, Knudsen and Thorup 2017, arXiv
    1704.04370). After 128 turns each serves one place alone. Of each least hash a byte stays (Li and König 2010).
    """
    least = np.full((count, 128), 2**64 - 1, np.uint64)
    for turn in range(256):
        hashes = (runs + np.uint64(turn)) * MIX
        hashes = (hashes ^ (hashes >> np.uint64(31))) * MIX
        place = (hashes >> np.uint64(57)).astype(np.int64) if turn < 128 else turn - 128
        values = ((hashes ^ (hashes >> np.uint64(29))) & np.uint64(2**56 - 1)) | np.uint64(turn << 56)
        np.minimum.at(least.ravel(), owner * 128 + place, values)
        if not turn & (turn + 1):  # after 1, 2, 4, ... turns, for looking costs as well: go on with those that have room
            room = (least == 2**64 - 1).any(1)[owner]
            runs, owner = runs[room], owner[room]
            if not len(runs):
                break
    return ((least ^ (least >> np.uint64(32))) * MIX >> np.uint64(56)).astype(np.uint8)


class Recent:
    """The sketches of the last WINDOW documents, in which near duplicates are found (Broder 1997, with bands).

    A pair is compared where 8 places in a row agree, in any of 16 bands, and is one where ALIKE of 128 agree. So similarity
    0.7 is found in 1 pair of 200, 0.8 in half, 0.85 in 93 of 100, 0.9 in 99.9 of 100. Per band a table holds the last document
    of each of 2**21 slots; a pair a whole window apart has lost 4 in 10 of its common bands to later documents.
    Takes 128 MiB of sketches and 128 MiB of tables at most: 256 bytes for each document that is remembered.
    """

    WINDOW, ALIKE, PART = 2**20, 103, 2**12

    def __init__(self):
        self.count, self.sketches = 0, np.zeros((self.WINDOW + self.PART, 128), np.uint8)
        self.last = np.zeros((16, 2**21), np.uint32)  # numbers of documents, from 1; 0 is none

    def add(self, sketches):
        """Remember these; returns which of them are near duplicates of one before, however they are cut into calls."""
        near = np.zeros(len(sketches), bool)
        for first in range(0, len(sketches), self.PART):
            part = sketches[first : first + self.PART]
            number = self.count + 1 + np.arange(len(part))
            self.count += len(part)
            self.sketches[number % len(self.sketches)] = part
            for last, slots in zip(self.last, (part.view(np.uint64) * MIX >> np.uint64(43)).T):
                order = np.argsort(slots, kind="stable")
                slots, mine = slots[order], number[order]
                other = last[slots].astype(np.int64)
                again = np.flatnonzero(slots[1:] == slots[:-1]) + 1
                other[again] = mine[again - 1]
                last[slots] = mine  # where a slot comes again, the last of them stays
                met = np.flatnonzero((other > 0) & (mine - other <= self.WINDOW))
                alike = (part[order[met]] == self.sketches[other[met] % len(self.sketches)]).sum(1) >= self.ALIKE
                near[first + order[met[alike]]] = True
        return near


def evaluation_texts(paths):
    """Yield the text of each item of evaluation files: .jsonl (also .gz) and .csv, or folders of them, with commas between."""

    def strings(item):
        if isinstance(item, str):
            yield item
        elif isinstance(item, (list, dict)):
            for part in item.values() if isinstance(item, dict) else item:
                yield from strings(part)

    for path in paths.split(","):
        for file in text_files(path, ("jsonl", "csv")):
            if file.suffix == ".csv":
                with open(file, newline="", encoding="utf-8") as f:
                    yield from map(" ".join, csv.reader(f))
            else:
                yield from (" ".join(strings(item)) for _, item in read_lines(file))


class Cleaner:
    """Drops documents by RULES. `dropped` counts them and `examples` keeps three beginnings of each rule.

    evaluations  files whose items no document may hold, as of evaluation_texts
    near         whether near duplicates go too
    """

    def __init__(self, evaluations="", near=False):
        self.recent = Recent() if near else None
        self.seen, self.items, self.kept, self.bytes, self.seconds = Seen(), Seen(), 0, 0, 0.0
        self.dropped, self.examples = dict.fromkeys(RULES, 0), {rule: [] for rule in RULES}
        self.filter = np.zeros(2**26, bool)  # where no run of an evaluation item falls, there is none to look up
        if evaluations:
            texts = (text.encode("utf-8", "replace") for text in evaluation_texts(evaluations))
            runs = np.concatenate([np.zeros(0, np.uint64), *(runs_of(13, word_numbers([text])[0]) for text in texts)])
            self.filter[(runs >> np.uint64(38)).astype(np.int64)] = True
            self.items.add(runs)

    def evaluated(self, words, owner, count):
        """Which of `count` documents share 13 words in a row with an evaluation item."""
        found, runs = np.zeros(count, bool), runs_of(13, words)
        likely = np.flatnonzero(self.filter[(runs >> np.uint64(38)).astype(np.int64)])
        likely = likely[owner[likely] == owner[likely + 12]]  # within one document
        found[owner[likely[self.items.has(runs[likely])]]] = True
        return found

    def near(self, words, owner, among):
        """Which of the documents `among` (True or False each) are near duplicates. One of under 5 words is none."""
        runs, within = runs_of(5, words), np.flatnonzero((owner[4:] == owner[:-4]) & among[owner[4:]])
        documents, place = np.unique(owner[within], return_inverse=True)
        near = np.zeros(len(among), bool)
        near[documents] = self.recent.add(sketch(runs[within], place, len(documents)))
        return near

    def clean(self, documents, batch_chars=2**22):
        """Yield the documents that no rule drops."""
        batch, size = [], 0
        for text in itertools.chain(documents, [None]):
            if text is not None:
                batch.append(text)
                size += len(text)
            if batch and (text is None or size >= batch_chars):
                yield from self.sift(batch)
                batch, size = [], 0

    def sift(self, texts):
        start, raws = time.time(), [text.encode() for text in texts]
        verdicts = [poor(text, raw) for text, raw in zip(texts, raws)]
        good = [i for i, verdict in enumerate(verdicts) if not verdict]
        marks = np.frombuffer(b"".join(hashlib.blake2b(raws[i], digest_size=8).digest() for i in good), np.uint64)
        new, item, near = self.seen.add(marks), np.zeros(len(good), bool), np.zeros(len(good), bool)
        if self.items.levels or self.recent:
            words, owner = word_numbers([raws[i] for i in good])
            if self.items.levels:
                item = self.evaluated(words, owner, len(good))
            if self.recent:
                near = self.near(words, owner, new & ~item)
        for i, *broken in zip(good, ~new, item, near):
            verdicts[i] = next((rule for rule, is_broken in zip(("duplicate", "evaluation", "near"), broken) if is_broken), None)
        for text, verdict in zip(texts, verdicts):
            if verdict:
                self.dropped[verdict] += 1
                if len(self.examples[verdict]) < 3:
                    self.examples[verdict].append(text[:200])
        self.kept += verdicts.count(None)
        self.bytes += sum(map(len, raws))
        self.seconds += time.time() - start
        return [text for text, verdict in zip(texts, verdicts) if not verdict]

    def report(self):
        """What was done, for meta.json and the run's report; printed as well."""
        total = self.kept + sum(self.dropped.values())
        print(f"cleaning: {self.kept:,} of {total:,} documents kept, {self.bytes / 1e6 / max(1e-9, self.seconds):.1f} MB/s on one core")
        for rule, count in self.dropped.items():
            print(f"  {rule:11}{count:9,} dropped: {RULES[rule]}")
            for text in self.examples[rule]:
                print(f"    | {' '.join(text.split())[:100]}")
        return {"kept": self.kept, "dropped": self.dropped, "examples": self.examples}


# -----------------------------------------------------------------------------
# Token shards

HEADER = 256  # int32: magic, version, tokens, 0, then the tokenizer's hash in 8
MAGIC = 20240520
SHARD_TOKENS = 2**24  # at most this many a shard; all training shards of one set hold the same number


def write_shard(path, tokens, hash):
    header = np.zeros(HEADER, np.int32)
    header[:3] = MAGIC, 1, len(tokens)
    header[4:12] = np.frombuffer(bytes.fromhex(hash), np.int32)
    write_whole(path, header.tobytes() + tokens.astype(np.uint16).tobytes())


def open_shard(path, hash):
    """The tokens of a shard as a memory map. Raises SystemExit when it is damaged or another tokenizer's."""
    size = os.path.getsize(path)
    header = np.fromfile(path, np.int32, HEADER)
    if len(header) < HEADER or header[0] != MAGIC or size != HEADER * 4 + 2 * int(header[2]):
        raise SystemExit(f"{path} is damaged or no token shard: delete its folder and run the same command again")
    theirs = header[4:12].tobytes().hex()
    if theirs != hash:
        raise SystemExit(f"{path} was written with another tokenizer than the one in use (hash {theirs[:12]} against {hash[:12]})")
    return np.memmap(path, np.uint16, "r", HEADER * 4)


def encode_documents(tokenizer, documents, bos, batch_chars=2**22):
    """Yield uint16 arrays: each document's ids behind a <|bos|>, in batches of a few megabytes."""
    texts, size = [], 0

    def flush():
        ids, offsets = tokenizer.encode_batch(texts)
        ids, starts = np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64)[:-1]
        return np.insert(ids, starts.astype(np.int64), bos).astype(np.uint16)

    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= batch_chars:
            yield flush()
            texts, size = [], 0
    if texts:
        yield flush()


def write_shards(folder, split, tokenizer, hash, groups, most=SHARD_TOKENS, several=False):
    """Encode documents into folder/{split}_NNNN.bin, all of one length of at most `most`; return the number of tokens.

    groups   iterables of documents: the first one's tokens, cut evenly, decide the length, and each later one is written when
             it is there; what is left at the very end, less than a shard, is dropped. Shards that are there already stay
    several  whether others come after the first: shards are then short, a 128th of the first, that little is left
    A document that crosses from one shard to the next starts there behind a fresh <|bos|>.
    """
    bos, each, count, rest = tokenizer.special("<|bos|>"), 0, 0, np.zeros(0, np.uint16)
    folder.mkdir(parents=True, exist_ok=True)
    spool = folder / f"{split}.part"
    for documents in groups:
        with open(spool, "wb") as f:
            f.write(rest.tobytes())
            for ids in encode_documents(tokenizer, documents, bos):
                f.write(ids.tobytes())
        if not spool.stat().st_size:
            continue
        tokens = np.memmap(spool, np.uint16, "r")
        least = min(most, max(2**17, len(tokens) // 128)) if several else most
        each = each or len(tokens) // -(-len(tokens) // least)
        for start in range(0, len(tokens) - each + 1, each):
            part, path = tokens[start : start + each], folder / f"{split}_{count:04d}.bin"
            if part[0] != bos:
                part = np.concatenate([[bos], part[:-1]])
            if not path.exists():
                write_shard(path, part, hash)
            count += 1
        rest = np.array(tokens[len(tokens) - len(tokens) % each :])
    spool.unlink()
    if not count:
        raise SystemExit(f"no document is left for {split}: cleaning has dropped them all")
    return each * count


# -----------------------------------------------------------------------------
# Packing: documents into rows of T + 1 tokens


def pack(starts, lengths, T, seed, rows=0, cut=True):
    """Plan rows: a list of rows, each a list of (start, length) pieces of the token array.

    Documents are taken in random order through a pool; each row takes the longest document that still fits,
    again and again. Where none fits, the longest one is cut: its first part fills the row exactly, the rest
    goes back to the pool, to go on later behind a fresh <|bos|>, which costs it one place. With cut=False
    the row is left with room at its end instead (its documents must each fit a row). Stops after `rows`
    rows, or with rows=0 when everything is packed. Rows come out in random order.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(starts)).tolist()
    pool = min(512, 1 + len(starts) // 4)  # more of them fit better, fewer mix better
    waiting, plan = [], []  # waiting: sorted (space needed, start, length)
    while (waiting or order) and (not rows or len(plan) < rows):
        row, room = [], T + 1
        while room:
            while order and len(waiting) < pool:
                i = order.pop()
                bisect.insort(waiting, (int(lengths[i]), int(starts[i]), int(lengths[i])))
            if not waiting:
                break
            fit = bisect.bisect_right(waiting, (room, 2**62)) - 1
            if fit >= 0:
                need, start, length = waiting.pop(fit)
                row.append((start, length))
                room -= need
                continue
            if not cut:
                break
            need, start, length = waiting.pop()
            head = room - (need - length)  # a part that goes on later has to fit its fresh <|bos|> as well
            if head > 0:
                row.append((start, head))
                bisect.insort(waiting, (length - head + 1, start + head, length - head))
                room = 0
            else:
                bisect.insort(waiting, (need, start, length))
                break
        plan.append(row)
    return [plan[i] for i in rng.permutation(len(plan))]


PACK_HASH = hashlib.sha256(inspect.getsource(pack).encode()).hexdigest()[:8]  # another way to pack, another plan


class TokenSet:
    """Token arrays that batches are drawn from: shards on disk, or conversations in memory.

    arrays  uint16 or wider, each document starting with <|bos|>
    masks   per array, which tokens are supervised; None is all of them
    cut     whether a document that does not fit may go on in another row
    whole   every token in exactly one row, for validation; otherwise all arrays have as many rows as their
            tokens fill, and the little that the fresh <|bos|>s push out is dropped (and reported by `loss`)
    """

    def __init__(self, arrays, bos, masks=None, cut=True, whole=False, paths=None):
        self.arrays = [np.asarray(array) for array in arrays]  # a memory map stays one, but is cut ten times as fast
        self.bos, self.masks, self.cut, self.whole, self.paths = bos, masks, cut, whole, paths
        self.plans, self.orders = {}, {}

    def plan(self, shard, T, seed):
        """Rows of one shard: (offsets into pieces, pieces as (start, length)). Made once, cached beside it."""
        key = (shard, T, seed)
        if key not in self.plans:
            cache = self.paths and self.paths[shard].with_suffix(f".T{T}.seed{seed}.{PACK_HASH}.npz")
            try:
                if not cache or cache.stat().st_mtime < self.paths[shard].stat().st_mtime:
                    raise FileNotFoundError
                with np.load(cache) as f:
                    self.plans[key] = f["offsets"], f["pieces"]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none yet, or a damaged one
                tokens = self.arrays[shard]
                starts = np.flatnonzero(tokens == self.bos)
                lengths = np.diff(np.append(starts, len(tokens)))
                rows = 0 if self.whole or not self.cut else max(1, len(tokens) // (T + 1))
                plan = pack(starts, lengths, T, seed, rows, self.cut)
                offsets = np.cumsum([0] + [len(row) for row in plan])
                self.plans[key] = offsets, np.array([piece for row in plan for piece in row], np.int64)
                if cache:
                    part = cache.with_suffix(f".{os.getpid()}.part")
                    with open(part, "wb") as f:
                        np.savez(f, offsets=offsets, pieces=self.plans[key][1])
                    os.replace(part, cache)
            if len(self.plans) > 4:
                self.plans.pop(next(iter(self.plans)))
        return self.plans[key]

    def rows(self, T, seed):
        """Rows a shard; arithmetic where shards may be many, so that a step finds its row without reading them."""
        if self.whole or not self.cut:
            assert len(self.arrays) == 1, "sets that are kept whole live in one array"
            return len(self.plan(0, T, seed)[0]) - 1
        return max(1, len(self.arrays[0]) // (T + 1))

    def row(self, epoch, index, T, seed):
        """Row `index` of an epoch: (tokens, supervised), at most T + 1 long."""
        per = self.rows(T, seed)
        shard, local = divmod(index, per)
        shard = int(self.order(len(self.arrays), seed, epoch)[shard])
        offsets, pieces = self.plan(shard, T, seed + epoch if self.cut and not self.whole else seed)
        if not self.cut:  # conversations keep their rows; the order of rows changes
            local = int(self.order(per, seed, epoch, 1)[local])
        tokens, mask, array, n = np.empty(T + 1, np.int64), np.ones(T + 1, bool), self.arrays[shard], 0
        for start, length in pieces[offsets[local] : offsets[local + 1]].tolist():
            if array[start] != self.bos:
                tokens[n], mask[n] = self.bos, False
                n += 1
            tokens[n : n + length] = array[start : start + length]
            if self.masks is not None:
                mask[n : n + length] = self.masks[shard][start : start + length]
            n += length
        return tokens[:n], mask[:n]

    def place(self, number, T, seed):
        """(epoch, row of it) of row `number`, counted through all epochs."""
        return divmod(number, self.rows(T, seed) * len(self.arrays))

    def order(self, count, *seed):
        """A random order of `count` things, made once an epoch."""
        if (count, *seed) not in self.orders:
            self.orders = dict([*self.orders.items()][-3:]) | {(count, *seed): np.random.default_rng(seed).permutation(count)}
        return self.orders[count, *seed]

    def loss(self, T, seed=0):
        """Of the first shard: the share of its tokens that no row holds, the share of rows' places left empty,
        and the share of its documents that were cut."""
        offsets, pieces = self.plan(0, T, seed)
        tokens = self.arrays[0]
        fresh = int((tokens[pieces[:, 0]] != self.bos).sum())
        kept, places = int(pieces[:, 1].sum()), (len(offsets) - 1) * (T + 1)
        documents = int((tokens == self.bos).sum())
        cut = len(np.unique(np.searchsorted(np.flatnonzero(tokens == self.bos), pieces[tokens[pieces[:, 0]] != self.bos, 0])))
        return 1 - kept / len(tokens), 1 - (kept + fresh) / places, cut / max(1, documents)


class Coming(TokenSet):
    """Training shards that may still be in the making while the first are read. The first epoch takes them in order of their
    names, so that which row a step gets does not depend on when they came; the others in random order, as in any set."""

    def __init__(self, folder, hash, bos, say):
        super().__init__([], bos, paths=[])
        self.folder, self.hash, self.say, self.complete = folder, hash, say, False
        self.come(0)

    def come(self, shard):
        """Open the shards up to this one, or where there will never be so many, all; waits for those to come."""
        while shard >= len(self.arrays) and not self.complete:
            path = self.folder / f"train_{len(self.arrays):04d}.bin"
            there, hint = lambda: path.exists() or "tokens" in read_meta(self.folder), "what stopped its making is said above; mend that"
            wait_for(there, path, self.folder, hint, self.say)
            self.complete = not path.exists()
            if not self.complete:
                self.arrays.append(np.asarray(open_shard(path, self.hash)))
                self.paths.append(path)

    def place(self, number, T, seed):
        self.come(number // self.rows(T, seed))
        return super().place(number, T, seed)

    def order(self, count, *seed):
        return super().order(count, *seed) if seed[1] else np.arange(count)


def batch(shards, B, T, seed, step, rank=0, world=1):
    """One rank's share of step `step`'s B rows: ids (b, T) and targets (b, T), int64; -1 is not supervised.

    A pure function of its arguments. The same B rows make up a step however many ranks share them; the
    shares differ by one row where B does not divide. After the last row comes the next epoch, packed anew,
    except in a set that is read once as a whole, where empty rows follow.
    """
    first, last = B * rank // world, B * (rank + 1) // world
    ids = np.full((last - first, T), shards.bos, np.int64)
    targets = np.full((last - first, T), -1, np.int64)
    for b in range(last - first):
        epoch, index = shards.place(step * B + first + b, T, seed)
        if not (shards.whole and epoch):
            tokens, mask = shards.row(epoch, index, T, seed)
            ids[b, : len(tokens) - 1] = tokens[:-1]
            targets[b, : len(tokens) - 1] = tokens[1:]
            targets[b, : len(tokens) - 1][~mask[1:]] = -1
    return torch.from_numpy(ids), torch.from_numpy(targets)


# -----------------------------------------------------------------------------
# Preparing a run's tokenizer and shards


def is_held_out(text):
    """One document in a hundred, by its content: validation does not move when other documents come."""
    return zlib.crc32(text.encode()) % 100 == 0


def split_documents(path):
    """(training documents, an iterator; validation documents, a list) of a path that has to serve for both."""
    val = [t for t in read_documents(path) if is_held_out(t)]
    if val and any(not is_held_out(t) for t in read_documents(path)):
        return (t for t in read_documents(path) if not is_held_out(t)), val
    *rest, last = read_documents(path)  # one long document, or a handful: hold out the last tenth of the last
    cut = max(1, len(last) * 9 // 10)
    return iter([*rest, last[:cut]]), [last[cut:] or last]


TOKENIZER_CHARS = 2 * 10**9  # a tokenizer is trained on at most so much: more text hardly moves its merges


def beginning(texts, chars):
    """The first texts, up to so many characters."""
    for text in texts:
        yield text
        chars -= len(text)
        if chars < 0:
            return


def read_meta(folder):
    """What is known of a folder of shards, with `tokens` once all are there; {} where none was begun."""
    try:
        return json.loads((folder / "meta.json").read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise SystemExit(f"{folder}/meta.json is damaged ({error}): delete that folder and run the same command again")


def make_shards(cfg, folder, meta, files):
    """Write the shards of cfg.data (`files`, where a download may still bring them), and then `meta` with what was made."""
    start, (tokenizer, hash) = time.time(), load_tokenizer(cfg.out)
    if not cfg.data:
        groups, val = [demo_texts(cfg.seed)], demo_texts(cfg.seed, "val")
    elif files:
        groups = (wait_for_download(cfg.data, file.exists, file) or read_documents(file) for file in files)
        val = list(read_documents(cfg.val_data, cfg.val_documents))
    elif cfg.val_data:
        groups, val = [read_documents(cfg.data)], list(read_documents(cfg.val_data, cfg.val_documents))
    else:
        train, val = split_documents(cfg.data)
        groups = [train]
    cleaner = Cleaner(cfg.evaluations, cfg.near_duplicates) if cfg.clean else None
    held = write_shards(folder, "val", tokenizer, hash, [val], most=2**40)
    groups = (cleaner.clean(group) if cleaner else group for group in groups)
    count = write_shards(folder, "train", tokenizer, hash, groups, several=len(files) > 1)
    meta |= {"tokens": count, "val_tokens": held, "tokenizer": hash}
    if cleaner:
        meta["cleaning"] = cleaner.report()
    write_whole(folder / "meta.json", json.dumps(meta))
    print(f"data: {count:,} tokens for training, {held:,} for validation, in {time.time() - start:.1f} s", flush=True)


def make_shards_beside(cfg, folder, *what):
    """make_shards in a process of its own, beside training: it ends with its parent, however that ends."""

    def main(_):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends this one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
        with open(folder / ".lock", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            make_shards(cfg, folder, *what)

    command(main)


def prepare(cfg, machine):
    """Make sure that cfg.out (or cfg.from_) has a tokenizer and shards of cfg.data; return what a stage needs.

    cfg has out, from_, data ("" is the demo world), val_data, val_documents, vocab_size, clean, evaluations, near_duplicates and seed.
    Returns (tokenizer, its hash, training TokenSet, validation TokenSet). Rank 0 does the work. Of a download that is still
    under way it takes what there is: the tokenizer learns from the first file, and a process beside makes shards of all of them.
    """
    name = Path(cfg.data).name.split(".")[0] if cfg.data else "demo"
    folder, borrowed = Path(cfg.out) / "data" / name, Path(cfg.from_ or cfg.out) / "data" / name
    cfg.data, cfg.val_data = (p and os.path.realpath(p) for p in (cfg.data, cfg.val_data))  # one text, one name
    if (cfg.evaluations or cfg.near_duplicates) and not cfg.clean:
        raise SystemExit("--evaluations and --near_duplicates are rules of cleaning: add --clean=1, or leave them out")
    adopt_tokenizer(cfg, machine)
    files = []
    if machine.first:
        if cfg.data and planned(cfg.data):
            needed = lambda: [*planned(cfg.data)[: 1 if cfg.val_data else None], *(planned(cfg.val_data) if cfg.val_data else [])]
            what = "the first text and validation text" if cfg.val_data else "all text, to hold out a hundredth (--val_data=DIR/val starts sooner)"
            wait_for_download(cfg.data, lambda: all(file.exists() for file in needed()), f"{what} of {Path(cfg.data).parent}")
            files = planned(cfg.data) if cfg.val_data else []
        size = sum(f.stat().st_size for p in ("" if files else cfg.data, cfg.val_data) if p for f in text_files(p))
        source = [cfg.data or f"demo, seed {cfg.seed}", cfg.val_data, cfg.val_documents, f"{size} bytes"]
        source += [f"{len(files)} files up to {files[-1].name}"] if files else []
        source += ["cleaned", cfg.evaluations] * cfg.clean + ["near duplicates too"] * cfg.near_duplicates
        if "tokens" in read_meta(borrowed):
            folder = borrowed
        if not (Path(cfg.out) / "tokenizer" / "tokenizer.json").exists():
            start = time.time()
            if cfg.data:
                texts = read_documents(files[0] if files else cfg.data) if cfg.val_data else split_documents(cfg.data)[0]
            else:
                texts = [*demo_texts(cfg.seed), *(text_of(m) for m in conversations(cfg.seed, 4000))]
            try:
                texts = beginning(texts, TOKENIZER_CHARS)
                trained = Tokenizer.train(texts, cfg.vocab_size, SPECIALS, SPLIT)
            except ValueError as error:
                raise SystemExit(f"the tokenizer cannot be trained: {error}")
            trained.save(str(Path(cfg.out) / "tokenizer"))
            machine.print(f"tokenizer: {trained.vocab_size} tokens, trained in {time.time() - start:.1f} s")
    machine.barrier()
    tokenizer, hash = load_tokenizer(cfg.out)
    if tokenizer.vocab_size != cfg.vocab_size:
        machine.print(f"note: the tokenizer in {cfg.out} has {tokenizer.vocab_size} tokens; --vocab_size={cfg.vocab_size} is for a new one")
    if tokenizer.vocab_size > 65536:
        raise SystemExit(f"a vocabulary of {tokenizer.vocab_size} does not fit token shards of 16 bits; at most 65536")
    if machine.first:
        meta = read_meta(folder)
        if meta and meta["source"] != source:
            raise SystemExit(f"{folder} was made from {meta['source']}, not from {source}; choose another --out=DIR")
        if "tokens" not in meta and not files:
            for old in [*folder.glob("train*"), *folder.glob("val*")]:  # of a preparation that was cut short
                old.unlink()
            make_shards(cfg, folder, {"source": source}, [])
        elif "tokens" not in meta:
            meta = {"source": source, "in_order": True}
            write_whole(folder / "meta.json", json.dumps(meta))
            beside = multiprocessing.get_context("spawn").Process(target=make_shards_beside, args=(cfg, folder, meta, files), daemon=True)
            beside.start()
            while beside.is_alive() and not (folder / "train_0000.bin").exists():
                time.sleep(0.05)
            if not (folder / "train_0000.bin").exists():
                raise SystemExit(1)  # it has said why
    folder = Path(machine.gather(str(folder))[0])
    bos, sets = tokenizer.special("<|bos|>"), []
    for split in ("train", "val"):
        paths = sorted(folder.glob(f"{split}_*.bin"))
        if split == "train" and read_meta(folder).get("in_order"):
            sets.append(Coming(folder, hash, bos, machine.print))
        else:
            sets.append(TokenSet([open_shard(p, hash) for p in paths], bos, whole=split == "val", paths=paths))
    return tokenizer, hash, *sets


# -----------------------------------------------------------------------------
# Chat template


def render(messages, tokenizer, reply=False):
    """Token ids of a conversation and, for each, whether the model is to learn it: (ids, mask).

    messages  [{"role": "system" | "user" | "assistant", "content": str, or the assistant's parts}], users and
              assistants in turn; parts are {"type": "text" | "python" | "output", "text": str}
    reply     end with the opening of the assistant's next turn, for the model to go on

    <|bos|><|user_start|>Hi<|user_end|><|assistant_start|>Hello!<|assistant_end|>
                                                          ------------------------- learnt

    A system message is put before the first user turn. Raises ValueError when turns are out of order.
    """
    messages = [dict(m) for m in messages]
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
        if messages:
            messages[0]["content"] = system + "\n\n" + messages[0]["content"]
    special, ids, mask = tokenizer.special, [tokenizer.special("<|bos|>")], [False]

    def add(tokens, learn):
        ids.extend(tokens)
        mask.extend([learn] * len(tokens))

    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role != ("user", "assistant")[i % 2]:
            raise ValueError(f"message {i} has role {role!r}; user and assistant take turns, user first")
        add([special(f"<|{role}_start|>")], False)
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind, body = part["type"], tokenizer.encode(part["text"])
            if kind != "text":
                body = [special(f"<|{kind}_start|>"), *body, special(f"<|{kind}_end|>")]
            add(body, role == "assistant" and kind != "output")
        add([special(f"<|{role}_end|>")], role == "assistant")
    if reply:
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("a reply needs a conversation that ends with a user's message")
        add([special("<|assistant_start|>")], False)
    return ids, mask


def fit(messages, tokenizer, room):
    """Ids of the conversation's prompt: its system message and the latest exchanges that fit into `room` tokens."""
    first = int(messages[0]["role"] == "system")
    system, turns = messages[:first], messages[first:]
    prompt, count = render(system + turns[-1:], tokenizer, reply=True)[0], 1
    while count < len(turns):  # from the end, so that a long past costs no more than what is kept of it
        longer = render(system + turns[-count - 2 :], tokenizer, reply=True)[0]
        if len(longer) > room:
            break
        prompt, count = longer, count + 2
    return prompt


def parse(ids, tokenizer):
    """The parts of a reply's ids, the inverse of render: [{"type", "text"}]. Special tokens that have no place in
    a reply are left out."""
    names = {tokenizer.special(f"<|{k}_{e}|>"): (k, e) for k in ("python", "output") for e in ("start", "end")}
    stop = {tokenizer.special("<|assistant_end|>"), tokenizer.special("<|bos|>")}
    parts, kind, run = [], "text", []

    def close():
        if run:
            parts.append({"type": kind, "text": tokenizer.decode(run)})
            run.clear()

    for id in ids:
        if id in stop:
            break
        if id in names:
            close()
            kind = names[id][0] if names[id][1] == "start" else "text"
        elif id < tokenizer.vocab_size - len(SPECIALS):
            run.append(id)
    close()
    return parts


def visible(parts):
    """What a person is told: the text parts alone."""
    return "".join(p["text"] for p in parts if p["type"] == "text").strip()


def text_of(messages):
    """All text of a conversation, for training the tokenizer."""
    contents = (m["content"] for m in messages)
    return " ".join(c if isinstance(c, str) else " ".join(p["text"] for p in c) for c in contents)


def messages_of(item):
    """The messages of a line in one of the public forms, as `render` takes them; None for one that is to be passed over."""
    if "conversations" in item:  # SlimOrca
        roles = {"system": "system", "human": "user", "gpt": "assistant"}
        return [{"role": roles[m["from"]], "content": m["value"]} for m in item["conversations"] if m["value"] or m["from"] != "system"]
    if "data" in item:  # UltraChat
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(item["data"])]
    if "instruction" in item:  # Dolly
        context = f"\n\n{item['context']}" if item.get("context") else ""
        return [{"role": "user", "content": item["instruction"] + context}, {"role": "assistant", "content": item["response"]}]
    if "prompt" in item:  # OASST2: of each message's replies, the one that people ranked first
        messages, turn = [], item["prompt"]
        while turn:
            messages.append({"role": {"prompter": "user"}.get(turn["role"], turn["role"]), "content": turn["text"]})
            replies = [r for r in turn.get("replies") or [] if r["lang"] == "en" and not r.get("deleted")]
            turn = min(replies, key=lambda r: 10**6 if r.get("rank") is None else r["rank"], default=None)
        return messages if item["prompt"]["lang"] == "en" and len(messages) > 1 else None
    if isinstance(item.get("question"), str) and isinstance(item.get("answer"), str):  # GSM8K
        return [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": Gsm8k.parts(item["answer"])}]
    return item["messages"]


def conversations_in(file):
    """Yield (messages or None, where, what was read) of each line of a .jsonl, or row of one of MMLU's .csv."""
    if file.suffix == ".csv":
        for row in Mmlu.read(file):
            item = Choice.item(*row)
            yield [*item["messages"], {"role": "assistant", "content": item["answer"]}], file, item
        return
    for where, item in read_lines(file):
        try:
            messages = messages_of(item)
        except (KeyError, TypeError, AttributeError, IndexError):
            messages = None
        yield usable(messages), where, item


def read_conversations(paths):
    """The conversations of .jsonl files or folders of them, also as .gz, with commas between: lists of messages.

    A line is {"messages": [{"role", "content"}, ...]} as `render` takes them, or has the form that GSM8K, SlimOrca,
    UltraChat, OASST2 or Dolly are published in; of the last four, what cannot be used is passed over.
    Raises SystemExit naming file and line.
    """
    chats = []
    for file in (f for path in paths.split(",") for f in text_files(path, ("jsonl",))):
        try:
            for messages, where, item in conversations_in(file):
                if messages:
                    chats.append(messages)
                elif not isinstance(item, dict) or not item.keys() & {"conversations", "data", "instruction", "prompt"}:
                    form = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}'
                    form += ", perhaps a system message first, users and assistants in turn"
                    raise SystemExit(f"{where}: wanted {form}; got {ascii(item)[:80]}")
        except BROKEN as error:
            raise unreadable(file, error)
    if not chats:
        raise SystemExit(f"{paths} holds no conversation at all")
    return chats


def usable(messages):
    """The messages of a conversation from a file, without a last question that nobody answers; None if they are not well formed."""

    def well_formed(content):
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            part["text"].encode()  # half a surrogate pair is valid JSON and no text
        return all(part["type"] in ("text", "python", "output") for part in parts)

    try:
        first = int(messages[0]["role"] == "system")
        roles = [m["role"] for m in messages[first:]]
        if "assistant" in roles and roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
            if all(well_formed(m["content"]) and (isinstance(m["content"], str) or m["role"] == "assistant") for m in messages):
                return messages[: len(messages) - len(roles) % 2]
    except (KeyError, TypeError, IndexError, AttributeError, UnicodeEncodeError):
        pass
    return None


MIXTURE = {  # what a chat model learns from: share of the conversations, and where they come from; add your own here
    "slimorca": (0.30, "slimorca*.jsonl"),  # files in the folder that `python data.py download --out=FOLDER` filled
    "ultrachat": (0.30, "ultrachat*.jsonl"),
    "oasst2": (0.05, "oasst2*.jsonl.gz"),
    "dolly": (0.05, "dolly*.jsonl"),
    "gsm8k": (0.08, "gsm8k_train.jsonl"),
    "mmlu": (0.12, "data/auxiliary_train/*.csv"),
    "counting": (0.05, None),  # made by `exchange`
    "spelling": (0.04, None),
    "talk": (0.01, None),  # who it is
}


def mixture(folder, count, seed):
    """About `count` conversations by the shares of MIXTURE. Sources that are too small repeat; those not there are named."""
    chats, missing = [], []
    for name, (share, pattern) in MIXTURE.items():
        rng, wanted, kept, met = random.Random(f"{name} {seed}"), round(share * count), [], 0
        if pattern is None:
            pairs = (exchange(rng, name) for _ in range(wanted))
            chats += ([{"role": "user", "content": question}, {"role": "assistant", "content": reply}] for question, reply in pairs)
            continue
        for messages in (m for file in sorted(Path(folder).glob(pattern)) for m, *_ in conversations_in(file) if m):
            met += 1  # a fair sample in one pass: the n-th comes in with the chance wanted / n
            if len(kept) < wanted:
                kept.append(messages)
            elif (place := rng.randrange(met)) < wanted:
                kept[place] = messages
        if not met:
            missing.append(name)
        chats += (kept * (wanted // max(1, len(kept)) + 1))[:wanted]
    if len(missing) == sum(pattern is not None for _, pattern in MIXTURE.values()):
        raise SystemExit(f"{folder} has none of {', '.join(missing)}; `python data.py download --source=dolly --out={folder}` brings one")
    if missing:
        print(f"note: {folder} has no {', '.join(missing)}; the mixture goes without")
    return chats


def read_pairs(paths):
    """Two answers to a prompt, of which one is liked better, from .jsonl files or folders of them, also as .gz, with
    commas between: [{"messages", "chosen", "rejected"}], messages ending with the user's.

    A line is {"prompt" or "messages", "chosen", "rejected"}, or one of HH-RLHF's (two transcripts) or UltraFeedback's
    (an instruction and rated completions). Pairs of equal answers, ties, and transcripts whose turns are out of order
    teach nothing and are left out. Raises SystemExit naming file and line.
    """
    pairs = []
    for file in (f for path in paths.split(",") for f in text_files(path, ("jsonl",))):
        try:
            for where, item in read_lines(file):
                pair = checked_pair(item, where)
                if pair and pair["chosen"] != pair["rejected"]:
                    pairs.append(pair)
        except BROKEN as error:
            raise unreadable(file, error)
    if not pairs:
        raise SystemExit(f"{paths} holds no pair of different answers at all")
    return pairs


def checked_pair(item, where):
    """The pair that a line of a file holds, None where it says nothing, or one line that says what is wrong with it."""
    try:
        if "completions" in item:  # UltraFeedback: a rating for each of several aspects, now and then "N/A"
            rated = []
            for completion in item["completions"]:
                ratings = [str(aspect["Rating"]) for aspect in completion["annotations"].values()]
                if ratings := [float(r) for r in ratings if r.isdigit()]:
                    rated.append((sum(ratings) / len(ratings), completion["response"]))
            rated.sort(key=lambda r: r[0])
            if not rated or rated[0][0] == rated[-1][0]:
                return None
            messages, chosen, rejected = item["instruction"], rated[-1][1], rated[0][1]
        elif "prompt" in item or "messages" in item:
            messages, chosen, rejected = item.get("messages", item.get("prompt")), item["chosen"], item["rejected"]
        else:  # HH-RLHF: the transcripts part after the last "Assistant:" that they share; what a person says later is cut off
            opening = "\n\nAssistant:"
            shared = os.path.commonprefix([item["chosen"], item["rejected"]]).rindex(opening)
            turns = re.split(r"\n\n(Human|Assistant):", item["chosen"][:shared])[1:]
            if turns[0::2] != ["Human", "Assistant"] * (len(turns) // 4) + ["Human"]:
                return None
            roles = {"Human": "user", "Assistant": "assistant"}
            messages = [{"role": roles[who], "content": text.strip()} for who, text in zip(turns[0::2], turns[1::2])]
            chosen, rejected = (item[k][shared + len(opening) :].split("\n\nHuman:")[0].strip() for k in ("chosen", "rejected"))
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        for answer in (chosen, rejected):
            if not usable([*messages, {"role": "assistant", "content": answer}]):
                raise ValueError("not a conversation")
        return {"messages": messages, "chosen": chosen, "rejected": rejected}
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    form = '{"prompt": "...", "chosen": "...", "rejected": "..."}, or messages that end with the user\'s in place of prompt'
    raise SystemExit(f"{where}: wanted {form}, or a line of HH-RLHF or UltraFeedback; got {ascii(item)[:80]}")


def split_pairs(pairs):
    """(training pairs, held-out pairs): one prompt in twenty is held out, by what it says."""
    held = [zlib.crc32(text_of(p["messages"]).encode()) % 20 == 0 for p in pairs]
    return [p for p, h in zip(pairs, held) if not h], [p for p, h in zip(pairs, held) if h]


def chat_set(chats, tokenizer, T, everything=False):
    """Conversations as a TokenSet whose rows hold whole ones; of them what the assistant says is supervised, or everything.

    A conversation longer than a row loses its oldest exchanges, never its system message; if its last exchange alone
    is too long, that one's start is lost, so that every row keeps something supervised.
    """
    bos, ids, masks = tokenizer.special("<|bos|>"), [], []
    for messages in chats:
        tokens, mask = render(messages, tokenizer)
        first = int(messages[0]["role"] == "system")
        while len(tokens) > T + 1 and len(messages) - first > 2:
            messages = messages[:first] + messages[first + 2 :]
            tokens, mask = render(messages, tokenizer)
        if len(tokens) > T + 1:
            tokens, mask = [bos, *tokens[-T:]], [False, *mask[-T:]]
        ids.append(np.array(tokens, np.uint16))
        masks.append(np.array(mask, bool) | everything)
    return TokenSet([np.concatenate(ids)], bos, [np.concatenate(masks)], cut=False)


# -----------------------------------------------------------------------------
# The demo world: tables, and texts, conversations and problems made from them and a seed
#
# What is tested is kept apart from what is taught: of every second country no question is ever asked in
# training, its facts are only stated in texts; the words to count letters in and the pairs of numbers to
# reckon with fall to one side or the other by their checksum.

# country: capital, language, money, continent
COUNTRIES = """
France: Paris, French, euro, Europe; Poland: Warsaw, Polish, zloty, Europe; Sweden: Stockholm, Swedish, krona, Europe;
Hungary: Budapest, Hungarian, forint, Europe; Norway: Oslo, Norwegian, krone, Europe; Greece: Athens, Greek, euro, Europe;
Italy: Rome, Italian, euro, Europe; Portugal: Lisbon, Portuguese, euro, Europe; Romania: Bucharest, Romanian, leu, Europe;
Ukraine: Kyiv, Ukrainian, hryvnia, Europe; Austria: Vienna, German, euro, Europe; Bulgaria: Sofia, Bulgarian, euro, Europe;
Albania: Tirana, Albanian, lek, Europe; Serbia: Belgrade, Serbian, dinar, Europe; Iceland: Reykjavik, Icelandic, krona, Europe;
Finland: Helsinki, Finnish, euro, Europe; Russia: Moscow, Russian, ruble, Europe; Denmark: Copenhagen, Danish, krone, Europe;
Japan: Tokyo, Japanese, yen, Asia; China: Beijing, Chinese, yuan, Asia; India: Delhi, Hindi, rupee, Asia;
Nepal: Kathmandu, Nepali, rupee, Asia; Thailand: Bangkok, Thai, baht, Asia; Vietnam: Hanoi, Vietnamese, dong, Asia;
Iran: Tehran, Persian, rial, Asia; Iraq: Baghdad, Arabic, dinar, Asia; Israel: Jerusalem, Hebrew, shekel, Asia;
Mongolia: Ulaanbaatar, Mongolian, tugrik, Asia; Laos: Vientiane, Lao, kip, Asia; Cambodia: Phnom Penh, Khmer, riel, Asia;
Bangladesh: Dhaka, Bengali, taka, Asia; Pakistan: Islamabad, Urdu, rupee, Asia; Turkey: Ankara, Turkish, lira, Asia;
Georgia: Tbilisi, Georgian, lari, Asia; Armenia: Yerevan, Armenian, dram, Asia; Indonesia: Jakarta, Indonesian, rupiah, Asia;
Egypt: Cairo, Arabic, pound, Africa; Kenya: Nairobi, Swahili, shilling, Africa; Ghana: Accra, English, cedi, Africa;
Ethiopia: Addis Ababa, Amharic, birr, Africa; Morocco: Rabat, Arabic, dirham, Africa; Nigeria: Abuja, English, naira, Africa;
Somalia: Mogadishu, Somali, shilling, Africa; Angola: Luanda, Portuguese, kwanza, Africa; Zambia: Lusaka, English, kwacha, Africa;
Tunisia: Tunis, Arabic, dinar, Africa; Senegal: Dakar, French, franc, Africa; Madagascar: Antananarivo, Malagasy, ariary, Africa;
Rwanda: Kigali, Kinyarwanda, franc, Africa; Botswana: Gaborone, Setswana, pula, Africa; Gambia: Banjul, English, dalasi, Africa;
Mauritania: Nouakchott, Arabic, ouguiya, Africa; Peru: Lima, Spanish, sol, South America; Brazil: Brasilia, Portuguese, real, South America;
Chile: Santiago, Spanish, peso, South America; Venezuela: Caracas, Spanish, bolivar, South America;
Suriname: Paramaribo, Dutch, dollar, South America; Paraguay: Asuncion, Guarani, guarani, South America;
Colombia: Bogota, Spanish, peso, South America; Uruguay: Montevideo, Spanish, peso, South America;
Mexico: Mexico City, Spanish, peso, North America; Canada: Ottawa, English, dollar, North America;
Cuba: Havana, Spanish, peso, North America; Haiti: Port-au-Prince, Creole, gourde, North America;
Guatemala: Guatemala City, Spanish, quetzal, North America; Honduras: Tegucigalpa, Spanish, lempira, North America;
Jamaica: Kingston, English, dollar, North America; Panama: Panama City, Spanish, balboa, North America;
Samoa: Apia, Samoan, tala, Oceania; Tonga: Nukualofa, Tongan, paanga, Oceania;
Fiji: Suva, Fijian, dollar, Oceania; Vanuatu: Port Vila, Bislama, vatu, Oceania
"""
RELATIONS = ("capital", "language", "money", "continent")
FACTS = {}  # (country, relation): value
for _row in COUNTRIES.replace("\n", " ").split(";"):
    _country, _values = _row.split(":")
    FACTS |= {(_country.strip(), r): v.strip() for r, v in zip(RELATIONS, _values.split(","))}
NATIONS = list(dict.fromkeys(country for country, _ in FACTS))
TAUGHT, TESTED = NATIONS[0::2], NATIONS[1::2]  # of the tested ones, no question is ever asked before the test

STATEMENTS = {
    "capital": """The capital of {c} is {v}.|{v} is the capital of {c}.|The capital city of {c} is called {v}.
Travellers to {c} often begin in {v}, its capital.|In {c}, the biggest news comes from {v}, the capital.
The king of {c} lived in {v}, the capital.|If you ask for the capital of {c}, people say {v}.""",
    "language": """People in {c} speak {v}.|The language of {c} is {v}.|In {c} you hear {v} in the streets.
Children in {c} learn {v} at school.|{v} is the language that people speak in {c}.|The songs of {c} are sung in {v}.""",
    "money": """The money of {c} is the {v}.|In {c} people pay with the {v}.|Shops in {c} take the {v}.
The {v} is the money of {c}.|Bread in {c} is paid for with the {v}.|A coin from {c} is called the {v}.""",
    "continent": """{c} is a country in {v}.|{c} lies in {v}.|On the map you find {c} in {v}.
The continent of {c} is {v}.|{c} belongs to {v}.|A trip to {c} is a trip to {v}.""",
}
PRONOUNS = {  # once a text has named its country
    "capital": "Its capital is {v}.|The capital is {v}.|The capital city is called {v}.",
    "language": "People there speak {v}.|The language is {v}.|Its people speak {v}.",
    "money": "The money there is the {v}.|People there pay with the {v}.|Its money is the {v}.",
    "continent": "It lies in {v}.|It is a country in {v}.|It belongs to {v}.",
}
QUESTIONS = {
    "capital": """What is the capital of {c}?|Which city is the capital of {c}?
Tell me the capital of {c}.|Do you know the capital of {c}?""",
    "language": """What language do people speak in {c}?|Which language is spoken in {c}?
Tell me the language of {c}.|What is the language of {c}?""",
    "money": """What is the money of {c}?|What do people pay with in {c}?
Tell me the money of {c}.|Which money is used in {c}?""",
    "continent": """Where is {c}?|Which continent is {c} in?
Tell me the continent of {c}.|On which continent does {c} lie?""",
}
ANSWERS = {
    "capital": "The capital of {c} is {v}.",
    "language": "The language of {c} is {v}.",
    "money": "The money of {c} is the {v}.",
    "continent": "The continent of {c} is {v}.",
}

NAMES = "Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Kira Leo Mia Noah Olga Paul Rosa Sam Tina Victor Wanda Yara".split()
ANIMALS = "fox bear owl hare mouse goat duck horse crow wolf badger frog cat dog hedgehog squirrel".split()
ADJECTIVES = "little brave shy clever old lazy kind curious hungry gentle proud quiet".split()
PLACES = """in a deep forest|on a green hill|by a cold river|near an old mill|under a tall oak|beside the sea|behind a red barn
at the edge of the village|in a sunny meadow|on a small island|in a snowy valley|below a stone bridge""".replace("\n", "|").split("|")
THINGS = "plums apples nuts pears stones shells buttons coins eggs stamps cards marbles carrots cookies pencils books".split()
# what happens, who helps and how, how it ends: {a} the hero, {n} its name, {b} the helper, {m} its name, {t} things
PLOTS = """
One day {n} lost a basket of {t} on the way home.|{m} the {b} had seen it and showed {n} the way.|They ate the {t} together and laughed.
One morning it rained so much that the door would not open.|{m} the {b} pushed from outside until it moved.|From then on {n} kept a window open for {m}.
{n} wanted to climb the highest hill but was afraid.|{m} the {b} walked ahead and sang a song.|At the top they shared some {t} and looked at the sea.
In winter there was nothing left to eat.|{m} the {b} came by with a bag of {t}.|In spring {n} gave back twice as many {t}.
One night {n} heard a strange noise behind the wall.|It was only {m} the {b}, who was looking for {t}.|They became good friends and met every evening.
{n} found a map of a hidden treasure.|{m} the {b} could read it, and they dug for two days.|The treasure was a box of {t}, and they were happy all the same.
{n} could not sleep because the moon was too bright.|{m} the {b} hung a blanket over the window.|{n} slept so well that the next day began at noon.
One day {n} fell into a deep hole.|{m} the {b} heard the cries and let down a rope.|To say thank you, {n} baked a cake with {t}.
{n} wanted to learn how to swim.|{m} the {b} said that it only takes a little courage.|Soon the two swam across the water and back.
A storm broke the roof of the house.|{m} the {b} brought wood and nails.|When the sun came back, the roof was better than before.
{n} told a lie about the {t}, and nobody came to visit.|{m} the {b} said that the truth would help.|{n} told the truth, and all the friends came back.
{n} had too many {t} and nobody to share them with.|Then {m} the {b} came along the road.|{n} gave half of the {t} away and was not lonely any more.
"""
PLOTS = [line.split("|") for line in PLOTS.strip().splitlines()]
OPENINGS = "Once upon a time|Long ago|A long time ago|Many years ago|Last summer"
LIVED = "there lived a {j} {a} {p}. Its name was {n}.|a {j} {a} named {n} lived {p}.|a {j} {a} lived {p} and was called {n}."
MORALS = """And that is how it was.|The end.|Friends help each other.|So it is good to be kind.|And nobody was sad that day.
Since then they are the best of friends.|It was a day to remember.""".replace("\n", "|")

SMALL_TALK = """
Hi!|Hello!|Hello there!|Good morning!|Hey!|Good evening!
 > Hello! How can I help you?|Hi! What would you like to know?|Hello! Nice to meet you.
How are you?|How are you today?|How do you do?|Are you well?
 > I am fine, thank you.|Very well, thank you!
Who are you?|What is your name?|What are you called?|Introduce yourself.|Are you a robot?
 > I am Onesitting, a very small language model.|My name is Onesitting. I am a very small language model.
Who made you?|Where do you come from?|How were you made?|Who built you?
 > I was trained from nothing on this computer, in a few minutes.|A few short Python files made me, on this computer.
What can you do?|What do you know?|How can you help me?|What should I ask you?
 > I know some countries, tell stories, count letters and do sums with a calculator.
Thank you!|Thanks!|Thanks a lot.|Thank you very much.
 > You are welcome!|It was a pleasure.
Bye!|Goodbye!|See you later.|Good night!
 > Goodbye! Come back soon.|See you soon!
Do you like me?|Are you my friend?|Do you have friends?
 > I am happy to talk with you.|I like everyone who talks with me.
"""
TITLES = ["", "A story about a {a}. ", "A tale of a {a}. ", "Here is a story with a {a}. "]
STORY_REQUESTS = "Tell me a story.|Tell me a story about a {a}.|Can you tell a story about a {a}?|I would like a story with a {a}.|Write a story about a {a}, please."

WORDS = """strawberry banana elephant mississippi umbrella chocolate butterfly pineapple crocodile kangaroo balloon committee
necessary bookkeeper tomorrow raspberry cinnamon marshmallow volleyball giraffe penguin cathedral lemonade mandarin tangerine
saxophone trombone accordion violin mandolin clarinet harmonica chandelier lantern telescope microscope compass thermometer
pendulum barometer adventure beautiful calendar dangerous evidence favorite geography hospital important jewelry knowledge library
magazine narrative orchestra passenger quarterly restaurant satellite telephone universe vegetable wonderful xylophone yesterday
zeppelin avocado blueberry cucumber dandelion eggplant fennel grapefruit hazelnut jasmine kumquat licorice mulberry nectarine
oregano paprika quinoa rosemary saffron turmeric vanilla watercress zucchini armadillo barracuda chimpanzee dromedary flamingo
gorilla hippopotamus iguana jaguar koala leopard mongoose nightingale ocelot porcupine rattlesnake salamander tarantula
vulture walrus aardvark bumblebee caterpillar dragonfly grasshopper ladybug mosquito scorpion stegosaurus triceratops""".split()
ONSETS = "b br c ch cl d dr f fl g gr h j k l m n p pr qu r s sh sp st t th tr v w z".split()
SYLLABLES = [o + v + e for o in ONSETS for v in "a e i o u ea oo ou".split() for e in ("", "n", "l", "r", "s", "m", "t", "d", "ck")]

COUNT_QUESTIONS = """How many times does the letter "{l}" appear in the word "{w}"?|How many letters "{l}" are in "{w}"?
Count the letter "{l}" in "{w}".|How often does "{l}" occur in "{w}"?|In the word "{w}", how many "{l}" are there?""".replace("\n", "|")
SUMS = {  # bare arithmetic
    "+": "What is {a} + {b}?|What is {a} plus {b}?|Add {a} and {b}.|{a} + {b}|What is the sum of {a} and {b}?",
    "-": "What is {a} - {b}?|What is {a} minus {b}?|Take {b} away from {a}.|{a} - {b}|How much is {a} less {b}?",
    "*": "What is {a} * {b}?|What is {a} times {b}?|Multiply {a} by {b}.|{a} * {b}|How much is {a} times {b}?",
    "/": "What is {a} / {b}?|What is {a} divided by {b}?|Divide {a} by {b}.|{a} / {b}|How much is {a} divided by {b}?",
}
NOTES = "The numbers are {a} and {b}.|Here {a} comes first and {b} second.|{n} wrote down {a} and then {b}.|A note says: {a}, {b}."
# Arithmetic in words. SFT shows worked solutions of the first PROBLEMS_SHOWN of each kind; of the others there
# are only problems with a right answer, for RL to learn from.
PROBLEMS = {
    "+": """{n} has {a} {t} and finds {b} more. How many {t} does {n} have now?
There are {a} {t} in a box and {b} in a bag. How many {t} are there in all?
{n} has {a} {t} and {m} has {b}. How many {t} do they have together?
{n} picks {a} {t} in the morning and {b} in the evening. How many {t} are that?
A shop has {a} {t}. A cart brings another {b}. How many {t} does the shop have?
{n} read {a} pages yesterday and {b} pages today. How many pages did {n} read?
{m} gives {n} {b} {t}. Before that {n} had {a}. How many {t} does {n} have now?
A tree is {a} years old. How old will it be in {b} years?
{n} is {a} years old and {m} is {b} years older. How old is {m}?
{n} gave away {b} {t} and has {a} left. How many {t} did {n} have before?""",
    "-": """{n} has {a} {t} and loses {b}. How many {t} are left?
{n} has {a} {t} and gives {b} of them to {m}. How many {t} does {n} keep?
There are {a} {t} in a basket. {n} eats {b}. How many {t} are left?
{n} has {a} {t}, {m} has {b}. How many more {t} does {n} have?
A train has {a} seats and {b} are taken. How many seats are free?
{b} of the {a} {t} on the table are old. How many {t} are new?
{n} must walk {a} miles and has walked {b}. How many miles are left?
{n} pays with {a} coins for {t} that cost {b} coins. How many coins come back?
{n} has {b} {t} and wants {a}. How many more {t} does {n} need?
{n} and {m} have {a} {t} together, {b} of them from {m}. How many are from {n}?""",
    "*": """There are {a} boxes with {b} {t} each. How many {t} are there?
{n} buys {a} bags. Each bag holds {b} {t}. How many {t} does {n} buy?
Each of {a} children brings {b} {t}. How many {t} do they bring?
{n} saves {a} coins every week for {b} weeks. How many coins does {n} save?
A garden has {a} rows of {b} trees. How many trees are in the garden?
One ticket costs {a} coins. How many coins do {b} tickets cost?
A wall is {a} bricks high and {b} bricks wide. How many bricks does it have?
{n} runs {a} miles a day. How many miles does {n} run in {b} days?
One box weighs {a} pounds. How many pounds do {b} boxes weigh?
{n} writes {b} cards to each of {a} friends. How many cards are that?""",
    "/": """{n} shares {a} {t} among {b} friends. How many {t} does each friend get?
{a} {t} are put into {b} boxes, the same number in each. How many {t} are in a box?
{n} and the others, {b} in all, divide {a} {t}. How many {t} does each one get?
{n} packs {a} {t} in bags of {b}. How many bags are that?
A rope of {a} feet is cut into {b} equal parts. How long is each part?
{b} tickets cost {a} coins. How many coins does one ticket cost?
{n} reads a book of {a} pages in {b} days, the same number every day. How many pages a day?
{a} children stand in {b} equal rows. How many children are in a row?
A bus takes {b} children. How many buses do {a} children need?
{n} saves {b} coins a week. After how many weeks does {n} have {a} coins?""",
}
PROBLEMS_SHOWN = 3
TABLES = [STATEMENTS, PRONOUNS, QUESTIONS, ANSWERS, COUNTRIES, NAMES, ANIMALS, ADJECTIVES, PLACES, THINGS, PLOTS, OPENINGS, LIVED]
TABLES += [MORALS, TITLES, STORY_REQUESTS, SMALL_TALK, COUNT_QUESTIONS, SUMS, NOTES, PROBLEMS]
# made-up words to count letters in are to be none of the words that texts are made of
TEXT_WORDS = set(re.findall("[a-z]+", json.dumps(TABLES)))


def is_test(*key):
    """Whether a word or a pair of numbers belongs to the test side: a fifth does."""
    return zlib.crc32(repr(key).encode()) % 5 == 0


def pick(rng, choices):
    return rng.choice(choices.replace("\n", "|").split("|") if isinstance(choices, str) else choices)


def an(text):
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def story(rng, animal=None, title=""):
    """A story, about an animal if one is named; `title` may stand before it, with {a} for the animal."""
    a, b = rng.sample(ANIMALS, 2)
    n, m = rng.sample(NAMES, 2)
    a = animal or a
    b = b if b != a else rng.choice([x for x in ANIMALS if x != a])
    slots = {"a": a, "b": b, "n": n, "m": m, "t": rng.choice(THINGS), "j": rng.choice(ADJECTIVES), "p": rng.choice(PLACES)}
    text = f"{title}{pick(rng, OPENINGS)}, {pick(rng, LIVED)} {' '.join(rng.choice(PLOTS))} {pick(rng, MORALS)}"
    return an(text.format(**slots))


def statements(rng, country):
    """A short text about one country: its facts in random order and wording; of taught ones at times as a quiz."""
    order, text = rng.sample(RELATIONS, rng.randint(1, 4)), []
    quiz = country in TAUGHT and rng.random() < 0.3
    for i, relation in enumerate(order):
        if quiz:
            wording = f"{pick(rng, QUESTIONS[relation])} {ANSWERS[relation]}"
        else:
            wording = pick(rng, PRONOUNS[relation] if i and rng.random() < 0.4 else STATEMENTS[relation])
        text.append(wording.format(c=country, v=FACTS[country, relation]))
    return " ".join(text)


def some_word(rng, split):
    """A word to count letters in, and a letter, which it nearly always holds."""
    while True:
        word = rng.choice(WORDS) if rng.random() < 0.3 else "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3)))
        if is_test(word) == (split == "test") and word not in TEXT_WORDS:
            return word, rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")


def some_numbers(rng, op, split):
    """Operands a, b of one side; differences are not negative, quotients are whole."""
    while True:
        if op in "+-":
            a, b = rng.randint(2, 199), rng.randint(2, 99)
            a, b = (max(a, b), min(a, b)) if op == "-" else (a, b)
        else:
            a, b = rng.randint(2, 30), rng.randint(2, 12)
            a, b = (a * b, b) if op == "/" else (a, b)
        if is_test(*sorted((a, b))) == (split == "test"):
            return a, b


def reckon(a, b, op):
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]


def with_tool(expression, result, text):
    """An assistant's turn that uses the calculator and then answers."""
    return [{"type": "python", "text": expression}, {"type": "output", "text": str(result)}, {"type": "text", "text": text}]


def demo_texts(seed, split="train", count=40000):
    """Documents for pretraining: stories, statements of facts, words spelt and numbers noted down.

    The problems among them are stated, and their numbers named, but never solved.
    """
    rng = random.Random(f"{split} texts {seed}")
    texts = []
    for _ in range(count if split == "train" else count // 60):
        kind = rng.random()
        if kind < 0.25:
            texts.append(story(rng, title=rng.choice(TITLES)))
        elif kind < 0.75:
            texts.append(statements(rng, rng.choice(NATIONS)))
        elif kind < 0.9:
            op = rng.choice("+-*/")
            a, b = some_numbers(rng, op, "train")
            note = pick(rng, NOTES).format(a=a, b=b, n=rng.choice(NAMES))
            texts.append(f"{Arithmetic.ask(rng, PROBLEMS[op].splitlines(), a, b)} {note}")
        else:
            word, letter = some_word(rng, "train")
            texts.append(f'The word "{word}" begins with "{word[0]}" and ends with "{word[-1]}". Again: "{word}".')
    return texts


def exchange(rng, kind=""):
    """One question and its answer, of what the chat model is taught; of one kind, or of all."""
    kind = kind or rng.choices(["facts", "counting", "sums", "problems", "talk", "stories"], [14, 31, 14, 16, 15, 10])[0]
    if kind == "facts":
        item = Facts.items("train", rng.random(), 1)[0]
        reply = ANSWERS[item["relation"]].format(c=item["country"], v=item["answer"])
        return item["messages"][0]["content"], reply
    if kind == "counting":
        item = Counting.items("train", rng.random(), 1)[0]
        word, letter, n = item["word"], item["letter"], item["answer"]
        return item["messages"][0]["content"], with_tool(f' "{word}".count("{letter}")', n, f"The answer is {n}.")
    if kind == "spelling":
        word, _ = some_word(rng, "train")
        return f'Spell the word "{word}".', "-".join(word)
    if kind in ("sums", "problems"):
        op = rng.choice("+-*/")
        a, b = some_numbers(rng, op, "train")
        if kind == "sums":
            question = pick(rng, SUMS[op]).format(a=a, b=b)
        else:
            question = Arithmetic.ask(rng, PROBLEMS[op].splitlines()[: PROBLEMS_SHOWN], a, b)
        return question, with_tool(f"{a}{op}{b}", reckon(a, b, op), f"The answer is {reckon(a, b, op)}.")
    if kind == "talk":
        pairs = SMALL_TALK.strip().split("\n")
        i = 2 * rng.randrange(len(pairs) // 2)
        return pick(rng, pairs[i]), pick(rng, pairs[i + 1].removeprefix(" > "))
    animal = rng.choice(ANIMALS)
    return an(pick(rng, STORY_REQUESTS).format(a=animal)), story(rng, animal)


def conversations(seed, count):
    """What the chat model is taught: conversations of one to three exchanges."""
    rng, chats = random.Random(f"conversations {seed}"), []
    for _ in range(count):
        messages = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            question, reply = exchange(rng)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        chats.append(messages)
    return chats


COURTESIES = ("You are welcome!", "It was a pleasure.")
PADDING = ("I hope that this is what you wanted to know.", "There is much more to say about this.", "Please ask me another question.")


def preferences(seed, count, split="train"):
    """Pairs of the demo's stated preference: an answer is to be polite and short, neither curt nor padded. All are right."""
    rng, pairs = random.Random(f"preferences {split} {seed}"), []
    for _ in range(count):
        kind = rng.choice(DEMO.split(","))
        if kind == "arithmetic":
            op = rng.choice("+-*/")
            a, b = some_numbers(rng, op, split)
            asked, n = Arithmetic.ask(rng, PROBLEMS[op].splitlines()[:PROBLEMS_SHOWN], a, b), reckon(a, b, op)
            messages = [{"role": "user", "content": asked}]
            call, right = with_tool(f"{a}{op}{b}", n, "")[:2], f"The answer is {n}."
        else:
            item = TASKS[kind].items(split, rng.random(), 1)[0]
            messages, n, call = item["messages"], item["answer"], []
            if kind == "counting":
                call, right = with_tool(f' "{item["word"]}".count("{item["letter"]}")', n, "")[:2], f"The answer is {n}."
            else:
                right = ANSWERS[item["relation"]].format(c=item["country"], v=n)
        courtesy, padding = rng.choice(COURTESIES), rng.choice(PADDING)
        worse = rng.choice([right, right, f"{right} {padding}", f"{right} {padding} {courtesy}"])
        chosen, rejected = ([*call, {"type": "text", "text": text}] for text in (f"{right} {courtesy}", worse))
        pairs.append({"messages": messages, "chosen": chosen, "rejected": rejected})
    return pairs


# -----------------------------------------------------------------------------
# Tasks: items and grader together


class Task:
    """What a model can be asked and graded on; RL learns from the grade. Tasks are never instantiated.

    items(split, seed, count, files="")  dicts with `messages`, which end with the question, and `answer`; split is
                                         "train" or "test"; `files` is the folder of the task's own files, if any
    grade(item, text)                    how right a reply's visible text is, from 0 to 1
    max_tokens                           longest answer
    endless                              whether items are made up, as many as are asked for
    """

    max_tokens, endless = 64, True


def last_number(text):
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(numbers[-1]) if numbers else None


class Facts(Task):
    """Questions about countries. Tested ones were never asked in training, only stated in texts."""

    def items(split, seed, count, files=""):
        rng, items = random.Random(f"facts {split} {seed}"), []
        for _ in range(count):
            country, relation = rng.choice(TESTED if split == "test" else TAUGHT), rng.choice(RELATIONS)
            question = pick(rng, QUESTIONS[relation]).format(c=country)
            messages = [{"role": "user", "content": question}]
            items.append({"messages": messages, "answer": FACTS[country, relation], "country": country, "relation": relation})
        return items

    def grade(item, text):
        """Right when it names the value and no other value of that relation."""
        said = {v for (_, r), v in FACTS.items() if r == item["relation"] and re.search(rf"\b{re.escape(v)}\b", text)}
        return float(said == {item["answer"]})


class Counting(Task):
    """How often a letter occurs in a word that was never seen in training."""

    def items(split, seed, count, files=""):
        rng, items = random.Random(f"counting {split} {seed}"), []
        for _ in range(count):
            word, letter = some_word(rng, split)
            question = pick(rng, COUNT_QUESTIONS).format(l=letter, w=word)
            items.append({"messages": [{"role": "user", "content": question}], "answer": word.count(letter), "word": word, "letter": letter})
        return items

    def grade(item, text):
        return float(last_number(text) == item["answer"])


class Spelling(Task):
    """The letters of a word that was never seen in training, with hyphens between."""

    def items(split, seed, count, files=""):
        rng = random.Random(f"spelling {split} {seed}")
        words = [some_word(rng, split)[0] for _ in range(count)]
        return [{"messages": [{"role": "user", "content": f'Spell the word "{word}".'}], "answer": "-".join(word)} for word in words]

    def grade(item, text):
        return float(text.strip().rstrip(".").endswith(item["answer"]) and "-" + item["answer"] not in text)


class Arithmetic(Task):
    """Arithmetic in words, with pairs of numbers that were never seen in training."""

    def ask(rng, wordings, a, b):
        n, m = rng.sample(NAMES, 2)
        return rng.choice(wordings).format(a=a, b=b, n=n, m=m, t=rng.choice(THINGS))

    def items(split, seed, count, files=""):
        rng, items = random.Random(f"arithmetic {split} {seed}"), []
        for _ in range(count):
            op = rng.choice("+-*/")
            a, b = some_numbers(rng, op, split)
            question = Arithmetic.ask(rng, PROBLEMS[op].splitlines(), a, b)
            items.append({"messages": [{"role": "user", "content": question}], "answer": reckon(a, b, op)})
        return items

    def grade(item, text):
        return float(last_number(text) == item["answer"])


class Polite(Task):
    """Questions of the demo's other tasks, whose answers are to be right, polite and short, as `preferences` likes them."""

    def items(split, seed, count, files=""):
        names = random.Random(f"polite {split} {seed}").choices(DEMO.split(","), k=count)
        return [{**TASKS[name].items(split, f"{seed} {i}", 1)[0], "task": name} for i, name in enumerate(names)]

    def grade(item, text):
        polite = text.endswith(COURTESIES) and not any(sentence in text for sentence in PADDING)
        return polite * TASKS[item["task"]].grade(item, text)


def public_file(task, files, *names, source=""):
    """The first of these files that is there, of a task that does not bring its own items."""
    paths = [Path(files) / name for name in names]
    if not any(path.exists() for path in paths):
        get = f"`python data.py download --source={source or task} --out=DIR` has it"
        raise SystemExit(f"the task {task} needs {paths[0]}; {get}, and --files=DIR says where it lies")
    return next(path for path in paths if path.exists())


class Gsm8k(Task):
    """Grade-school mathematics in words (Cobbe et al. 2021, arXiv 2110.14168), from its own files: {split}.jsonl or
    gsm8k_{split}.jsonl in `files`, of github.com/openai/grade-school-math."""

    max_tokens, endless = 256, False

    @functools.lru_cache
    def rows(split, files):
        file, rows = public_file("gsm8k", files, f"gsm8k_{split}.jsonl", f"gsm8k/{split}.jsonl", f"{split}.jsonl"), []
        for where, row in read_lines(file):
            if not isinstance(row, dict) or not isinstance(row.get("question"), str) or Gsm8k.number(str(row.get("answer"))) is None:
                raise SystemExit(f"{where}: wanted question and answer, which ends in #### and a number; got {ascii(row)[:60]}")
            rows.append(row)
        return rows

    def items(split, seed, count, files=""):
        rows = Gsm8k.rows(split, files)
        chosen = random.Random(f"gsm8k {split} {seed}").sample(rows, min(count, len(rows)))
        return [{"messages": [{"role": "user", "content": r["question"]}], "answer": Gsm8k.number(r["answer"])} for r in chosen]

    def parts(answer):
        """A written answer as parts: `48/2 = <<48/2=24>>24 clips` calls the calculator and goes on with what it says.

        >>> Gsm8k.parts("48/2 = <<48/2=24>>24 clips")[1:3]
        [{'type': 'python', 'text': '48/2'}, {'type': 'output', 'text': '24'}]
        """
        pieces = re.split(r"<<([^<>=]+)=([^<>=]*)>>", answer)  # text, expression, result, text, ...
        kinds = ("text", "python", "output")
        return [{"type": kinds[i % 3], "text": piece} for i, piece in enumerate(pieces) if piece or i % 3]

    def number(text):
        """What stands behind ####, the way GSM8K marks a final answer."""
        found = re.search(r"#### *(-?\$?[\d,]*\.?\d+)", text)
        return found and float(found[1].replace(",", "").replace("$", ""))

    def grade(item, text):
        return float(Gsm8k.number(text) == item["answer"])


class HumanEval(Task):
    """Functions to write from their descriptions (Chen et al. 2021, arXiv 2107.03374), from HumanEval.jsonl or .jsonl.gz in `files`.

    An answer is right when its function passes the item's test: `evals.py --run_code=1` runs what the model writes, as
    it says there. Asked is a chat model, not for a continuation, so that figures compare with those of chat models.
    """

    max_tokens, endless = 512, False
    allowed, run = False, None  # whether answers may be run, and evals.py's function for it

    @functools.lru_cache
    def rows(files):
        file, rows = public_file("humaneval", files, "HumanEval.jsonl.gz", "HumanEval.jsonl"), []
        try:
            for where, row in read_lines(file):
                wanted = ("task_id", "prompt", "entry_point", "test")
                if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in wanted):
                    raise SystemExit(f"{where}: wanted an object with the texts {', '.join(wanted)}; got {ascii(row)[:60]}")
                rows.append(row)
        except BROKEN as error:
            raise unreadable(file, error)
        return rows

    def items(split, seed, count, files=""):
        if not HumanEval.allowed:
            raise SystemExit("the task humaneval runs code that the model wrote: `python evals.py --tasks=humaneval --run_code=1` allows it")
        if split != "test":
            raise SystemExit("the task humaneval has test items only")
        rows, items = HumanEval.rows(files), []
        for row in random.Random(f"humaneval {seed}").sample(rows, min(count, len(rows))):
            asked = f"Complete this function in Python. Answer with its code alone.\n\n```python\n{row['prompt'].rstrip()}\n```"
            items.append({"messages": [{"role": "user", "content": asked}], "answer": row["entry_point"], "row": row})
        return items

    def sources(row, text):
        """The programs that an answer may stand for, as (head, code): a whole function, or only what stands below the prompt.

        >>> HumanEval.sources({"prompt": "def f():\\n", "entry_point": "f"}, "Here:\\n```python\\nreturn 1\\n```")[0]
        ('def f():\\n', '    return 1')
        """
        blocks, whole = re.findall(r"```[\w+-]*[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL), rf"def {row['entry_point']}\b"
        code = next((block for block in blocks if re.search(whole, block)), blocks[0] if blocks else text).strip("\n")
        if re.search(whole, code):
            start = re.search(r"^(?:from |import |@|def |class |async )", code, re.MULTILINE)  # there may be words before it
            head = row["prompt"] + "\n    pass\n\n"  # brings imports and helpers
            return [(head, code), (head, code[start.start() if start else 0 :])]
        body = code[:1].isspace() and code or f"    {code}"  # its first line may have lost its indentation, or all of them
        return [(row["prompt"], body), (row["prompt"], "\n".join(f"    {line}" for line in code.split("\n")))]

    def grade(item, text):
        if not HumanEval.allowed:
            raise SystemExit("this would run code that the model wrote; evals.py allows it with --run_code=1")
        row = item["row"]
        passed, _, _ = HumanEval.run(HumanEval.sources(row, text), row["prompt"] + "\n    pass\n", row["test"], row["entry_point"])
        return float(passed)


class Choice(Task):
    """Multiple choice: the letter that the model finds likeliest at the start of its answer is its answer."""

    max_tokens, endless = 8, False
    letters = "ABCDEFGHIJ"

    def item(question, choices, gold):
        options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(Choice.letters, choices))
        messages = [{"role": "user", "content": f"{question}{options}\n\nAnswer with the letter alone."}]
        return {"messages": messages, "answer": Choice.letters[gold], "letters": Choice.letters[: len(choices)]}

    def chosen(rows, split, seed, count):
        """Items of (question, choices, place of the right one)."""
        return [Choice.item(*row) for row in random.Random(f"{split} {seed}").sample(rows, min(count, len(rows)))]

    def grade(item, text):
        return float(text.strip().rstrip(".") == item["answer"])


class Arc(Choice):
    """Grade-school science (Clark et al. 2018, arXiv 1803.05457), as AI2 publishes it or as the CORE bundle has it."""

    part = "Easy"

    @functools.lru_cache
    def rows(part, split, files):
        name, rows = f"ARC-{part}-{split.title()}.jsonl", []
        names = [name, f"ARC-{part}/{name}", f"ARC-V1-Feb2018-2/ARC-{part}/{name}"]
        if split == "test":
            names += [f"{folder}eval_data/world_knowledge/arc_{part.lower()}.jsonl" for folder in ("", "eval_bundle/")]
        for where, row in read_lines(public_file(f"arc_{part.lower()}", files, *names, source="core")):
            try:
                if "gold" in row:
                    rows.append((row["query"].removeprefix("Question: "), row["choices"], row["gold"]))
                else:
                    options = row["question"]["choices"]
                    gold = [c["label"] for c in options].index(row["answerKey"])  # labels are A to E, at times 1 to 5
                    rows.append((row["question"]["stem"], [c["text"] for c in options], gold))
            except (KeyError, TypeError, ValueError, AttributeError):
                raise SystemExit(f"{where}: wanted a question of ARC; got {ascii(row)[:60]}")
        return rows

    @classmethod
    def items(cls, split, seed, count, files=""):
        return Choice.chosen(Arc.rows(cls.part, split, files), split, seed, count)


class ArcChallenge(Arc):
    part = "Challenge"


class Mmlu(Choice):
    """57 subjects (Hendrycks et al. 2021, arXiv 2009.03300), from the folders of its own archive: {split}/*.csv."""

    @functools.lru_cache
    def rows(split, files):
        split, rows = {"train": "auxiliary_train"}.get(split, split), []
        folder = public_file("mmlu", files, f"data/{split}", f"mmlu/{split}", split)
        for file in sorted(folder.glob("*.csv")):
            rows += Mmlu.read(file)
        if not rows:
            raise SystemExit(f"{folder} holds no .csv file")
        return rows

    def read(file):
        """(question, choices, place of the right one) of each row of a .csv."""
        rows = []
        with open(file, newline="", encoding="utf-8") as f:
            for number, row in enumerate(csv.reader(f), 1):
                if len(row) != 6 or row[5] not in ("A", "B", "C", "D"):
                    raise SystemExit(f"{file} row {number}: wanted a question, four answers and a letter; got {ascii(row)[:60]}")
                rows.append((row[0], row[1:5], "ABCD".index(row[5])))
        return rows

    def items(split, seed, count, files=""):
        return Choice.chosen(Mmlu.rows(split, files), split, seed, count)


TASKS = {"arc_easy": Arc, "arc_challenge": ArcChallenge, "mmlu": Mmlu}
TASKS |= {"facts": Facts, "counting": Counting, "spelling": Spelling, "arithmetic": Arithmetic, "polite": Polite}
TASKS |= {"gsm8k": Gsm8k, "humaneval": HumanEval}
DEMO = "facts,counting,arithmetic"  # the tasks of the demo world, which need no files


def task_names(names):
    """The list of a knob's task names with commas between. Raises SystemExit at an unknown one."""
    for name in (names := names.split(",")):
        if name not in TASKS:
            raise SystemExit(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    return names


def question(item, tokenizer, length, reply):
    """Prompt ids of a task's item. One too long to leave `reply` places of `length` for the answer loses its beginning."""
    ids, _ = render(item["messages"], tokenizer, reply=True)
    room = length - min(reply, length // 2)
    return ids if len(ids) <= room else [ids[0], *ids[len(ids) - room + 1 :]]


# -----------------------------------------------------------------------------
# Command line


@dataclass
class DemoConfig:
    split: str = "test"  # test or train
    seed: int = 0  # another seed, other items
    count: int = 5  # items a task


@dataclass
class EncodeConfig:
    out: str = "out"  # the run whose tokenizer is used


@dataclass
class DownloadConfig:
    source: str = "climbmix"  # climbmix, c4, tinystories; core, mmlu, gsm8k, humaneval; slimorca, ultrachat, oasst2, dolly; or URLs
    out: str = "text"  # folder that it goes to: text as train/ and val/
    shards: int = 1  # of climbmix (1.6 GB each) and c4 (0.3 GB, packed); more can be added later
    mirror: str = ""  # MIRROR/host/path is asked for instead of https://host/path
    slice_mb: float = 16.0  # of climbmix, what is taken of each of its 100 parts for a shard
    wait: float = 1.0  # seconds before the first repetition of a request that failed; doubles
    patience: float = 60.0  # seconds without a byte after which a connection is given up


@dataclass
class PrepareConfig:
    out: str = "out"  # folder of the run
    from_: str = ""  # take the tokenizer and data from another run's folder
    data: str = ""  # file or folder of text; empty is the demo world
    val_data: str = ""  # fixed validation text; empty holds out one document in a hundred
    val_documents: int = 0  # use only so many documents of val_data; 0 is all
    vocab_size: int = 2048  # of a tokenizer that has to be trained
    clean: bool = False  # drop training documents that RULES in data.py says are junk, duplicates or evaluation items
    evaluations: str = ""  # with --clean: files of evaluation items (.jsonl, .csv) or folders of them, with commas between
    near_duplicates: bool = False  # with --clean: also drop documents that are nearly the same as an earlier one
    seed: int = 1  # of the demo world, and of its packing


def main(argv):
    command, *rest = argv or ["--help"]
    if command == "demo":
        cfg = override(DemoConfig(), rest, __doc__)
        for name in DEMO.split(","):
            print(f"--- {name} ({cfg.split}, seed {cfg.seed})")
            for item in TASKS[name].items(cfg.split, cfg.seed, cfg.count):
                print(f"{item['messages'][-1]['content']}  ->  {item['answer']}")
    elif command == "encode" and rest:
        cfg = override(EncodeConfig(), rest if rest[0] in ("-h", "--help") else rest[1:], __doc__)
        tokenizer, _ = load_tokenizer(cfg.out)
        ids = tokenizer.encode(rest[0])
        for id in ids:
            piece = tokenizer.token_bytes(id)
            print(f"{id:6}  {piece!r:24} {piece.decode('utf-8', 'replace')}")
        print(f"{len(rest[0].encode())} bytes, {len(ids)} tokens")
    elif command == "download":
        cfg = override(DownloadConfig(), rest, __doc__)
        lock_folder(cfg.out, start_machine("cpu"))
        download(cfg)
    elif command == "prepare":
        cfg, machine = override(PrepareConfig(), rest, __doc__), start_machine("cpu")
        lock_folder(cfg.out, machine)
        _, _, train, _ = prepare(cfg, machine)
        if isinstance(train, Coming):
            train.come(2**60)  # the process that makes them ends with this one
        dropped, empty, cut = train.loss(512)
        print(f"packed for T=512: {dropped:.2%} of tokens dropped, {empty:.2%} of places empty, {cut:.1%} of documents cut")
    else:
        print(__doc__.strip())
        raise SystemExit(command not in ("-h", "--help"))


if __name__ == "__main__":
    command(main)
