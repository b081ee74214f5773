"""
Where text and tasks come from: documents, tokenizer, token shards, packed batches, the chat template,
tasks with their graders, and the demo world.

    python data.py demo --split=test --seed=7          # fresh items of every task of the demo world
    python data.py encode "Hello, 你好" --out=out       # how a text becomes pieces, ids and bytes
    python data.py prepare --data=FOLDER --out=out     # tokenizer and shards alone, without training
    python data.py prepare --help                      # each of the three has knobs of its own

Text is a file or folder of .txt, .jsonl or .json (field `text`), each also as .gz, or .parquet where pyarrow is
installed. Conversations are .jsonl with `messages`. Token shards have the layout that llm.c and modded-nanogpt
read: 256 int32 of header, then uint16 ids. Everything random is a pure function of a seed and a step, so that
nothing needs a cursor to be saved and resumed.

To add a special token, rename the next spare in SPECIALS. To split text in another way before merging, edit
SPLIT. To add a task, write a class with `items` and `grade` and name it in TASKS. To change what the chat model
of the demo is taught, edit `exchange`.
"""

import bisect
import functools
import gzip
import hashlib
import inspect
import json
import os
import random
import re
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tok import PATTERN, Tokenizer

from gpt import command, override, write_whole

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
    else:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as f:
            content = f.read()
        if kind == "json":
            try:
                items = json.loads(content)
            except json.JSONDecodeError as error:
                raise SystemExit(f"{file} is not JSON: {error}")
            for number, item in enumerate(items if isinstance(items, list) else [items]):
                yield text_field(item, f"{file} item {number}")
        else:
            yield from content.split("<|endoftext|>")


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


def write_shards(folder, split, tokenizer, hash, documents, most=SHARD_TOKENS):
    """Encode documents into folder/{split}_NNNN.bin, all of one length of at most `most`; return the number of tokens.

    A document that crosses from one shard to the next starts there behind a fresh <|bos|>.
    """
    bos = tokenizer.special("<|bos|>")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{split}_*"):  # of a preparation that was cut short
        old.unlink()
    spool = folder / f"{split}.part"
    with open(spool, "wb") as f:
        for ids in encode_documents(tokenizer, documents, bos):
            f.write(ids.tobytes())
    tokens = np.memmap(spool, np.uint16, "r")
    count = max(1, -(-len(tokens) // most))
    each = len(tokens) // count
    for i in range(count):
        part = tokens[i * each : (i + 1) * each]
        if part[0] != bos:
            part = np.concatenate([[bos], part[:-1]])
        write_shard(folder / f"{split}_{i:04d}.bin", part, hash)
    spool.unlink()
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
        self.arrays, self.bos, self.masks, self.cut, self.whole, self.paths = arrays, bos, masks, cut, whole, paths
        self.plans = {}

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
        shard = int(np.random.default_rng([seed, epoch]).permutation(len(self.arrays))[shard])
        offsets, pieces = self.plan(shard, T, seed + epoch if self.cut and not self.whole else seed)
        if not self.cut:  # conversations keep their rows; the order of rows changes
            local = int(np.random.default_rng([seed, epoch, 1]).permutation(per)[local])
        tokens, masks = [], []
        for start, length in pieces[offsets[local] : offsets[local + 1]]:
            body = self.arrays[shard][start : start + length].astype(np.int64)
            mask = np.ones(length, bool) if self.masks is None else self.masks[shard][start : start + length]
            if body[0] != self.bos:
                body, mask = np.append(self.bos, body), np.append(False, mask)
            tokens.append(body)
            masks.append(mask)
        return np.concatenate(tokens), np.concatenate(masks)

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


def batch(shards, B, T, seed, step, rank=0, world=1):
    """One rank's share of step `step`'s B rows: ids (b, T) and targets (b, T), int64; -1 is not supervised.

    A pure function of its arguments. The same B rows make up a step however many ranks share them; the
    shares differ by one row where B does not divide. After the last row comes the next epoch, packed anew,
    except in a set that is read once as a whole, where empty rows follow.
    """
    per_epoch = shards.rows(T, seed) * len(shards.arrays)
    first, last = B * rank // world, B * (rank + 1) // world
    ids = np.full((last - first, T), shards.bos, np.int64)
    targets = np.full((last - first, T), -1, np.int64)
    for b in range(last - first):
        epoch, index = divmod(step * B + first + b, per_epoch)
        if not (shards.whole and epoch):
            tokens, mask = shards.row(epoch, index, T, seed)
            ids[b, : len(tokens) - 1] = tokens[:-1]
            targets[b, : len(tokens) - 1] = np.where(mask[1:], tokens[1:], -1)
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


def prepare(cfg, machine):
    """Make sure that cfg.out (or cfg.from_) has a tokenizer and shards of cfg.data; return what a stage needs.

    cfg has out, from_, data ("" is the demo world), val_data, val_documents, vocab_size and seed.
    Returns (tokenizer, its hash, training TokenSet, validation TokenSet). Rank 0 does the work.
    """
    name = Path(cfg.data).name.split(".")[0] if cfg.data else "demo"
    folder, borrowed = Path(cfg.out) / "data" / name, Path(cfg.from_ or cfg.out) / "data" / name
    cfg.data, cfg.val_data = (p and os.path.realpath(p) for p in (cfg.data, cfg.val_data))  # one text, one name
    size = sum(f.stat().st_size for p in (cfg.data, cfg.val_data) if p for f in text_files(p))
    source = [cfg.data or f"demo, seed {cfg.seed}", cfg.val_data, cfg.val_documents, f"{size} bytes"]
    adopt_tokenizer(cfg, machine)
    if machine.first:
        if (borrowed / "meta.json").exists():
            folder = borrowed
        if not (Path(cfg.out) / "tokenizer" / "tokenizer.json").exists():
            start = time.time()
            if cfg.data:
                texts = read_documents(cfg.data) if cfg.val_data else split_documents(cfg.data)[0]
            else:
                texts = [*demo_texts(cfg.seed), *(text_of(m) for m in conversations(cfg.seed, 4000))]
            try:
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
        try:
            meta = json.loads((folder / "meta.json").read_text())
        except FileNotFoundError:
            meta = None
        except ValueError as error:
            raise SystemExit(f"{folder}/meta.json is damaged ({error}): delete that folder and run the same command again")
        if meta and meta["source"] != source:
            raise SystemExit(f"{folder} was made from {meta['source']}, not from {source}; choose another --out=DIR")
        if not meta:
            start = time.time()
            if not cfg.data:
                train, val = demo_texts(cfg.seed), demo_texts(cfg.seed, "val")
            elif cfg.val_data:
                train, val = read_documents(cfg.data), list(read_documents(cfg.val_data, cfg.val_documents))
            else:
                train, val = split_documents(cfg.data)
            count = write_shards(folder, "train", tokenizer, hash, train)
            held = write_shards(folder, "val", tokenizer, hash, val, most=2**40)
            meta = {"source": source, "tokens": count, "val_tokens": held, "tokenizer": hash}
            write_whole(folder / "meta.json", json.dumps(meta))
            machine.print(f"data: {count:,} tokens for training, {held:,} for validation, in {time.time() - start:.1f} s")
    folder = Path(machine.gather(str(folder))[0])
    bos, sets = tokenizer.special("<|bos|>"), []
    for split in ("train", "val"):
        paths = sorted(folder.glob(f"{split}_*.bin"))
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


def read_conversations(paths):
    """The conversations of .jsonl files or folders of them, also as .gz, with commas between: lists of messages.

    A line is {"messages": [{"role", "content"}, ...]} as `render` takes them, or {"question", "answer"} as in GSM8K.
    Raises SystemExit naming file and line.
    """
    chats = []
    for file in (f for path in paths.split(",") for f in text_files(path, ("jsonl",))):
        try:
            for where, item in read_lines(file):
                if isinstance(item, dict) and isinstance(item.get("question"), str) and isinstance(item.get("answer"), str):
                    reply = Gsm8k.parts(item["answer"])
                    item = {"messages": [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": reply}]}
                chats.append(checked(item, where))
        except BROKEN as error:
            raise unreadable(file, error)
    if not chats:
        raise SystemExit(f"{paths} holds no conversation at all")
    return chats


def checked(item, where):
    """The messages of a conversation from a file, or one line that says what is wrong with it."""

    def well_formed(content):
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            part["text"].encode()  # half a surrogate pair is valid JSON and no text
        return all(part["type"] in ("text", "python", "output") for part in parts)

    try:
        messages = item["messages"]
        first = int(messages[0]["role"] == "system")
        roles = [m["role"] for m in messages[first:]]
        if "assistant" in roles and roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
            if all(well_formed(m["content"]) and (isinstance(m["content"], str) or m["role"] == "assistant") for m in messages):
                return messages[: len(messages) - len(roles) % 2]  # a last question without an answer teaches nothing
    except (KeyError, TypeError, IndexError, AttributeError, UnicodeEncodeError):
        pass
    form = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}'
    raise SystemExit(f"{where}: wanted {form}, perhaps a system message first, users and assistants in turn; got {ascii(item)[:80]}")


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
            checked({"messages": [*messages, {"role": "assistant", "content": answer}]}, where)
        return {"messages": messages, "chosen": chosen, "rejected": rejected}
    except (KeyError, TypeError, ValueError, AttributeError, SystemExit):
        pass
    form = '{"prompt": "...", "chosen": "...", "rejected": "..."}, or messages that end with the user\'s in place of prompt'
    raise SystemExit(f"{where}: wanted {form}, or a line of HH-RLHF or UltraFeedback; got {ascii(item)[:80]}")


def split_pairs(pairs):
    """(training pairs, held-out pairs): one prompt in twenty is held out, by what it says."""
    held = [zlib.crc32(text_of(p["messages"]).encode()) % 20 == 0 for p in pairs]
    return [p for p, h in zip(pairs, held) if not h], [p for p, h in zip(pairs, held) if h]


def chat_set(chats, tokenizer, T):
    """Conversations as a TokenSet whose rows hold whole ones.

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
        ids += tokens
        masks += mask
    return TokenSet([np.array(ids, np.uint16)], bos, [np.array(masks, bool)], cut=False)


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


def exchange(rng):
    """One question and its answer, of what the chat model is taught."""
    kind = rng.choices(["facts", "counting", "sums", "problems", "talk", "stories"], [14, 31, 14, 16, 15, 10])[0]
    if kind == "facts":
        item = Facts.items("train", rng.random(), 1)[0]
        reply = ANSWERS[item["relation"]].format(c=item["country"], v=item["answer"])
        return item["messages"][0]["content"], reply
    if kind == "counting":
        item = Counting.items("train", rng.random(), 1)[0]
        word, letter, n = item["word"], item["letter"], item["answer"]
        return item["messages"][0]["content"], with_tool(f' "{word}".count("{letter}")', n, f"The answer is {n}.")
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
            messages, n = [{"role": "user", "content": Arithmetic.ask(rng, PROBLEMS[op].splitlines()[:PROBLEMS_SHOWN], a, b)}], reckon(a, b, op)
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
    """

    max_tokens = 64


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


class Gsm8k(Task):
    """Grade-school mathematics in words (Cobbe et al. 2021, arXiv 2110.14168), from its own files: {split}.jsonl or
    gsm8k_{split}.jsonl in `files`, of github.com/openai/grade-school-math."""

    max_tokens = 256

    @functools.lru_cache
    def rows(split, files):
        names = [Path(files) / name for name in (f"gsm8k_{split}.jsonl", f"gsm8k/{split}.jsonl", f"{split}.jsonl")]
        file = next((f for f in names if f.exists()), None)
        if file is None:
            home = "https://github.com/openai/grade-school-math"
            raise SystemExit(f"the task gsm8k needs {names[0]}, which {home} has; --files=DIR says where it lies")
        rows = []
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


TASKS = {"facts": Facts, "counting": Counting, "arithmetic": Arithmetic, "polite": Polite, "gsm8k": Gsm8k}
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
class PrepareConfig:
    out: str = "out"  # folder of the run
    from_: str = ""  # take the tokenizer and data from another run's folder
    data: str = ""  # file or folder of text; empty is the demo world
    val_data: str = ""  # fixed validation text; empty holds out one document in a hundred
    val_documents: int = 0  # use only so many documents of val_data; 0 is all
    vocab_size: int = 2048  # of a tokenizer that has to be trained
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
    elif command == "prepare":
        from gpt import lock_folder, start_machine

        cfg, machine = override(PrepareConfig(), rest, __doc__), start_machine("cpu")
        lock_folder(cfg.out, machine)
        _, _, train, _ = prepare(cfg, machine)
        dropped, empty, cut = train.loss(512)
        print(f"packed for T=512: {dropped:.2%} of tokens dropped, {empty:.2%} of places empty, {cut:.1%} of documents cut")
    else:
        print(__doc__.strip())
        raise SystemExit(command not in ("-h", "--help"))


if __name__ == "__main__":
    command(main)
