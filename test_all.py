"""
Every test of the system, and its benchmarks.

    python -m pytest -q test_all.py             # all of them, a few minutes on two cores
    python -m pytest -q test_all.py -k muon     # some of them
    python test_all.py                          # the same as the first
    python test_all.py bench tok                # or train, decode, serve, rl: prints a table

Libraries are tested by import, stages as people run them: as processes of their own, on a tiny model. In reading
order: tokenizer, model, optimizer, data, engine, evaluations, stages, server.
"""

import base64
import collections
import contextlib
import copy
import dataclasses
import fcntl
import functools
import gzip
import hashlib
import http.server
import itertools
import json
import math
import multiprocessing
import os
import queue
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import torch
import torch.nn.functional as F

import data
import evals
import gpt
import optim
import sample
import serve
import tok
from data import SPECIALS
from gpt import GPT, GPTConfig, KVCache, Machine
from sample import Config, Engine, Params, Stream, calculate, load_engine, uniform
from tok import Tokenizer

HERE = Path(__file__).parent
CPU = Machine(torch.device("cpu"), torch.float32)
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def start(script, *args, printed, limit=0):
    """Start one of the scripts as a process of its own, whose output goes to the file `printed`.

    It is forked from a server that has torch imported, which saves seconds each time. `limit` above 0 is the largest
    file it may write, in bytes: what a full disk does, without filling one.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "numpy", "requests", "sample", "evals", "optim"])
    process = server.Process(target=as_main, args=(script, [*map(str, args)], str(printed), limit))
    process.start()
    return process


def as_main(script, argv, printed, limit):
    os.setsid()
    os.chdir(HERE)
    with open(printed, "w") as f:
        os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = [script, *argv]
    runpy.run_path(str(HERE / script), run_name="__main__")


def run(script, *args, check=True, ranks=1, limit=0):
    """Run one of the scripts to its end and return (exit code, what it printed)."""
    if ranks > 1:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        done = subprocess.run([*launch, script, *map(str, args)], cwd=HERE, capture_output=True, text=True, timeout=280)
        code, text = done.returncode, done.stdout + done.stderr
    else:
        with tempfile.NamedTemporaryFile("r") as printed:
            process = start(script, *args, printed=printed.name, limit=limit)
            process.join(280)
            code, text = process.exitcode, printed.read()
            process.kill()
    if check:
        assert code == 0, text
    return code, text


# a base run, an SFT and an RL so small that each takes seconds
TINY = ["--depth=1", "--seq_len=64", "--vocab_size=600", "--batch_tokens=512", "--micro_rows=4", "--steps=8", "--device=cpu", "--threads=1"]
TINY += ["--dtype=float32", "--eval_rows=8", "--eval_every=100", "--sample_every=100", "--save_every=2", "--log_every=1"]
TINY_SFT = ["--chats=200", "--steps=6", "--batch_rows=4", "--micro_rows=2", "--eval_every=100", "--eval_count=4", "--final_count=4"]
TINY_SFT += ["--sample_every=100", "--save_every=2", "--log_every=1", "--device=cpu", "--threads=1", "--dtype=float32"]
TINY_RL = ["--steps=4", "--problems=3", "--samples=4", "--max_tokens=8", "--micro_rows=4", "--eval_every=100", "--eval_count=4"]
TINY_RL += ["--final_count=4", "--save_every=1", "--log_every=1", "--device=cpu", "--threads=1", "--dtype=float32"]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A folder in which all three stages have run; what they printed is in printed.txt."""
    out = tmp_path_factory.mktemp("tiny")
    printed = run("pretrain.py", f"--out={out}", *TINY)[1]
    printed += run("sft.py", f"--out={out}", *TINY_SFT)[1]
    printed += run("rl.py", f"--out={out}", *TINY_RL)[1]
    (out / "printed.txt").write_text(printed)
    return out


def weights(folder):
    """The last checkpoint's weights under a stage's folder."""
    return torch.load(gpt.latest(folder) / "model.pt", weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(data.demo_texts(1)[:3000] + ["naïve 你好 café"], 700, SPECIALS)


def small(**changes):
    """A small model with weights that make its output depend on everything."""
    cfg = GPTConfig(**{"vocab_size": 300, "seq_len": 64, "depth": 3, "width": 64, "heads": 4, "kv_heads": 2, "window_pattern": "SL", **changes})
    model = GPT(cfg).init(1)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * 0.1)
    return model


# -----------------------------------------------------------------------------
# Tokenizer

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {"default": tok.PATTERN, "gpt2": GPT2, "cl100k": CL100K, "llama3": LLAMA3}
CORPUS = [
    "the cat sat on the mat, the cat's hat; that's that. " * 3,
    "Naïve café façade — über die Brücke. 12 345 6789",
    "今日は東京で日本語を話します。今日は東京です。",
    "ราคาไม่แพงราคาถูก สวัสดีครับ สวัสดีค่ะ",
    "السلام عليكم السلام\r\n\r\nعليكم  \t x\n\n\n",
    "👩‍👩‍👧‍👦👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301e\u0301e\u0301 aaaaaaaaaaaa abababab",
]
NASTY = [
    "",
    " ",
    "中文分词不用空格，日本語もそうです。한국어는 씁니다.",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ กำ น้ำ",
    "اللُّغَةُ العَرَبِيَّة ٠١٢٣٤ ۰۱۲۳ १२३४ ๑๒๓ Ⅷ ½ ² ①",
    "👨‍👩‍👧‍👦 🇩🇪🇫🇷 👍🏽 ❤️‍🔥 1️⃣",
    "e\u0301 a\u0308\u0304 \u0301alone n\u0303o z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍",
    "a\u00a0b\u2003c\u3000d\u1680e\u2028f\u2029g\u0085h\u200bi\ufeffj\u180ek\x1cl\x1fm",
    "   three   gaps  \t\t tabs \u00a0\u00a0 x   ",
    "\r\n\r\n\n\r \r \n x\r\n  \r\n\t\n y \n\n  ",
    "!?\r\n\n... \r\n ,,\n a!b\n!c",
    "I'm you're he's WE'VE I'LL don'T 'Sblood ''ll 'v 'ſ 'ſt d'\u212a l'été '' '",
    "\x00\x01\x02\x7f\x1b[0m\x00a\x00\u0600\ue000\U0010ffff",
    "1 12 123 1234 12345 1,234.5 a1b22c333 ٣٣٣٣٣",
    "x" * 300 + " " * 300 + "9" * 301 + "!" * 300 + "\n" * 300 + "\t" * 300 + "é" * 300,
    "<|bos|> <|endoftext|> <|user_start|>hi<|user_end|>",
    "def f(x):\n    return x**2  # ok\n\n\nif __name__ == '__main__':\n\tprint(f(3))\n",
]


def train(texts=CORPUS, vocab=400, specials=("<|bos|>", "<|end|>"), **kw):
    return Tokenizer.train(texts, vocab, list(specials), **kw)


def char_class(test):
    """A class for `re`, which has no \\p{L}: the code points that pass, as ranges."""
    points = [c for c in range(sys.maxunicode + 1) if test(unicodedata.category(chr(c)))]
    starts = [c for i, c in enumerate(points) if i == 0 or points[i - 1] != c - 1]
    ends = [c for i, c in enumerate(points) if i == len(points) - 1 or points[i + 1] != c + 1]
    return "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in zip(starts, ends))


L, N = char_class(lambda c: c[0] == "L"), char_class(lambda c: c[0] == "N")
S = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space
REFERENCE_SPLIT = re.compile(
    f"'(?i:[sdmt]|ll|ve|re)|[^\\r\\n{L}{N}]?[{L}]+|[{N}]{{1,2}}| ?[^{S}{L}{N}]+[\\r\\n]*"
    f"|[{S}]*[\\r\\n]|[{S}]+(?![^{S}])|[{S}]+"
)


def reference_merge(word, pair, new):
    """reference_merge([1, 1, 1, 2], (1, 1), 9) == [9, 1, 2]"""
    out, i = [], 0
    while i < len(word):
        hit = tuple(word[i : i + 2]) == pair
        out.append(new if hit else word[i])
        i += 2 if hit else 1
    return out


def reference_train(counts, merges):
    """BPE by the book: recount all pairs, merge the best everywhere. counts: {piece: count} -> token bytes"""
    words = {piece: list(piece.encode()) for piece in counts}
    tokens = [bytes([b]) for b in range(256)]
    for _ in range(merges):
        pairs = collections.Counter()
        for piece, word in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += counts[piece]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = {p: reference_merge(w, best, len(tokens)) for p, w in words.items()}
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def reference_encode(piece, ranks):
    parts = [bytes([b]) for b in piece.encode()]
    while True:
        joined = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
        if not joined:
            return [ranks[part] for part in parts]
        i = min(joined)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def ranks_of(t):
    return {t.token_bytes(i): i for i in range(t.vocab_size - len(t.special_tokens))}


def random_text(rng, n):
    pools = ["ab", "the cat's", " \n\r\t\u00a0\u3000", "0123٣½", "'sSlLdmtTvVeErRſ", "!?.,-", "éß漢字かไทย", "👩\u200d👧\u0301"]
    return "".join(rng.choice(rng.choice(pools)) for _ in range(n))


def test_split_equals_python_re():
    t, rng = train(vocab=258), random.Random(0)
    for text in NASTY + CORPUS + [random_text(rng, 60) for _ in range(2000)]:
        assert t.split(text) == REFERENCE_SPLIT.findall(text)


def test_split_of_every_pair_of_ascii_characters():
    """Two bytes decide how most pieces are measured: all pairs, before each kind of character or the end of the text."""
    t = train(vocab=258)
    pairs = [chr(a) + chr(b) for a in range(128) for b in range(128)]
    for text in (pair + after for pair in pairs for after in ["", "x", "é", " ", "\n", "7", "!"]):
        assert t.split(text) == REFERENCE_SPLIT.findall(text)


def test_split_of_words_of_every_length():
    t = train(vocab=258)
    for n, first, after in itertools.product(range(40), ["", " ", "(", "'", "\u00a0"], ["", " ", ".", "é", "\u0301", "7", "\n", "'s"]):
        assert t.split(first + "Ab"[n % 2] * n + after) == REFERENCE_SPLIT.findall(first + "Ab"[n % 2] * n + after)


def test_split_by_hand_equals_regex():
    by_hand, by_regex = train(vocab=258), train(vocab=258, pattern=f"(?:{tok.PATTERN})")
    rng = random.Random(1)
    anything = ["".join(map(chr, rng.choices([*range(0xD800), *range(0xE000, 0x20000)], k=50))) for _ in range(500)]
    for text in NASTY + anything + [random_text(rng, 60) for _ in range(2000)]:
        assert by_hand.split(text) == by_regex.split(text)


@pytest.mark.parametrize("seed", range(8))
def test_merges_equal_reference(seed):
    rng = random.Random(seed)
    alphabet = ["ab", "abc ", "aaab\n", "the quick", "漢字かな ", "xyz0123 '!"][seed % 6]
    texts = ["".join(rng.choices(alphabet, k=rng.randint(0, 80))) for _ in range(12)] + ["a" * 13, "abab" * 5]
    counts = collections.Counter(piece for text in texts for piece in REFERENCE_SPLIT.findall(text))
    tokens = reference_train(counts, 60)
    t = Tokenizer.train(iter(texts), len(tokens) + 1, ["<|bos|>"])
    assert [t.token_bytes(i) for i in range(len(tokens))] == tokens


@pytest.mark.parametrize("text", ["a", "abab", "ababababab", "aaaaaaaaaaa", "abcabcab cab", "mississippi"])
def test_merges_end_where_the_reference_ends(text):
    pieces = collections.Counter(REFERENCE_SPLIT.findall(text))
    n = len(reference_train(pieces, 99))
    assert Tokenizer.train([text], n, []).vocab_size == n
    with pytest.raises(ValueError, match=f"gives only {n - 256} merges.*{n} at most"):
        Tokenizer.train([text], n + 1, [])


def test_example_in_the_manual():
    t = Tokenizer.train(["abab abac"], 258, [])
    assert (t.token_bytes(256), t.token_bytes(257), t.encode("abac")) == (b"ab", b" ab", [256, 97, 99])


def test_ties_go_to_the_smallest_pair():
    t = Tokenizer.train(["dc", "ba", "ab", "cd"], 256 + 4, [])
    assert [t.token_bytes(i) for i in range(256, 260)] == [b"ab", b"ba", b"cd", b"dc"]


def test_counts_beyond_32_bits():
    counts = {"ab": 2**32 + 1, "cd": 2**32 - 1, "ef": 2**33, "cdcd": 3}
    t = Tokenizer._train_counts(counts, 4)
    assert [t.token_bytes(i) for i in range(256, 260)] == reference_train(counts, 4)[256:]


def test_encode_equals_reference():
    t = train(vocab=420)
    ranks, rng = ranks_of(t), random.Random(2)
    for text in NASTY + CORPUS + [random_text(rng, 40) for _ in range(300)]:
        expected = [i for piece in REFERENCE_SPLIT.findall(text) for i in reference_encode(piece, ranks)]
        assert t.encode(text) == expected
        assert t.decode(expected) == text


def tiktoken_of(ranks, pattern):
    return pytest.importorskip("tiktoken").Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_encode_equals_tiktoken(pattern):
    t = train(vocab=420, pattern=pattern)
    theirs = tiktoken_of(ranks_of(t), pattern)
    rng = random.Random(3)
    for text in NASTY + CORPUS + [random_text(rng, 500) for _ in range(50)]:
        assert t.encode(text) == theirs.encode_ordinary(text)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_ranks_made_elsewhere_equal_tiktoken(tmp_path, pattern):
    """A vocabulary with its bytes in another order and with gaps, as GPT-2's and Llama-3's files have them."""
    rng = random.Random(8)
    tokens = list(ranks_of(train(vocab=430, specials=[], pattern=pattern)))
    ids = sorted(rng.sample(range(700), len(tokens)))
    ranks = dict(zip(rng.sample(tokens[:256], 256) + tokens[256:], ids))
    write_ranks(tmp_path, ranks, 750, ["<|x|>"], pattern)
    t, theirs = Tokenizer.load(tmp_path), tiktoken_of(ranks, pattern)
    for text in NASTY + CORPUS + [random_text(rng, 300) for _ in range(50)]:
        assert t.encode(text) == theirs.encode_ordinary(text) and t.decode(t.encode(text)) == text


def test_pieces_met_before_encode_as_the_first_time():
    """More distinct pieces than a thread remembers, of lengths around the longest that it does, some of many ids, twice."""
    t = train(vocab=300)
    rng = random.Random(9)
    words = ["".join(rng.choices("abcdeé", k=rng.randint(1, 18))) for _ in range(160_000)]
    theirs = tiktoken_of(ranks_of(t), tok.PATTERN).encode_ordinary(" ".join(words))
    for _ in range(2):
        assert t.encode(" ".join(words)) == theirs


def test_pieces_that_differ_only_in_zero_bytes():
    t = train(["a b ab"], 258, pattern=r"\S+|\s")
    pieces = [c + "\0" * n for n in range(20) for c in ("a", "ab", "")][:-1]
    for text in [" ".join(pieces)] * 2:
        assert t.decode(t.encode(text)) == text
        assert t.encode(text) == [i for piece in t.split(text) for i in reference_encode(piece, ranks_of(t))]


def test_threads_of_python_share_a_tokenizer():
    t = train()
    texts = (NASTY + CORPUS) * 20
    expected = [t.encode(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert all(list(result) == expected for result in pool.map(lambda _: map(t.encode, texts), range(8)))


def test_merges_equal_rustbpe():
    theirs = pytest.importorskip("rustbpe").Tokenizer()
    texts = data.demo_texts(1)[:4000]
    theirs.train_from_iterator(iter(texts), 1500, pattern=tok.PATTERN)
    assert ranks_of(Tokenizer.train(texts, 1500, [])) == {bytes(token): rank for token, rank in theirs.get_mergeable_ranks()}


def write_ranks(folder, tokens, vocab_size, specials, pattern=tok.PATTERN):
    folder.mkdir(exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in tokens.items()]
    (folder / "ranks.tiktoken").write_text("".join(lines))
    meta = {"pattern": pattern, "vocab_size": vocab_size, "special_tokens": specials}
    (folder / "tokenizer.json").write_text(json.dumps(meta))


def test_foreign_ranks_with_gaps(tmp_path):
    """Ids of bytes in another order, gaps, and ranks that no training would give: as tiktoken merges them."""
    rng = random.Random(4)
    tokens = {bytes([b]) for b in range(256)}
    tokens |= {bytes(rng.choices(b"abc", k=rng.randint(2, 6))) for _ in range(120)}
    ranks = dict(zip(sorted(tokens), rng.sample(range(700), len(tokens))))
    write_ranks(tmp_path, ranks, 702, ["<|x|>", "<|y|>"])
    t = Tokenizer.load(tmp_path)
    assert t.special_tokens == ["<|x|>", "<|y|>"] and t.special("<|y|>") == 701
    for n in [1, 5, 20, 63, 64, 65, 66, 200, 400] * 10:
        text = "".join(rng.choices("abc", k=n))
        whole = text.encode() in ranks  # a piece that is a token is that token, as in tiktoken
        assert t.encode(text) == ([ranks[text.encode()]] if whole else reference_encode(text, ranks))
    gap = next(i for i in range(700) if i not in ranks.values())
    with pytest.raises(ValueError, match=f"id {gap} is in a gap"):
        t.decode([gap])


def test_text_never_encodes_to_a_special_token():
    t = train()
    for name in t.special_tokens:
        ids = t.encode(name)
        assert max(ids) < t.special("<|bos|>") and t.decode(ids) == name
    assert [t.special(name) for name in t.special_tokens] == [t.vocab_size - 2, t.vocab_size - 1]
    assert t.decode([t.special("<|end|>"), 255, 65]) == "<|end|>\ufffdA"
    with pytest.raises(KeyError, match=r"no special token <\|eos\|>.*<\|bos\|> <\|end\|>"):
        t.special("<|eos|>")


@pytest.mark.parametrize("pattern", [tok.PATTERN, GPT2])
def test_save_and_load(tmp_path, pattern):
    t = train(pattern=pattern)
    t.save(tmp_path / "new" / "folder")
    u = Tokenizer.load(str(tmp_path / "new" / "folder"))
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["ranks.tiktoken", "tokenizer.json"]
    assert (u.pattern, u.vocab_size, u.special_tokens) == (pattern, 400, ["<|bos|>", "<|end|>"])
    assert all(u.token_bytes(i) == t.token_bytes(i) for i in range(400))
    assert all(u.encode(text) == t.encode(text) for text in NASTY + CORPUS)


def test_load_renames_special_tokens(tmp_path):
    train(specials=["z", "a"]).save(tmp_path)
    t = Tokenizer.load(tmp_path, special_tokens=["<|1|>", "<|2|>"])
    assert t.special_tokens == ["<|1|>", "<|2|>"] and t.decode([399]) == "<|2|>"
    with pytest.raises(ValueError, match="1 names"):
        Tokenizer.load(tmp_path, special_tokens=["<|1|>"])
    with pytest.raises(ValueError, match="distinct"):
        Tokenizer.load(tmp_path, special_tokens=["same", "same"])


def damage_line(n, line):
    return lambda lines: lines[: n - 1] + [line] + lines[n:]


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_line(300, "not base64! 299"), "line 300"),
        (damage_line(300, "YWI="), "line 300"),
        (damage_line(300, "YWI= -1"), "line 300"),
        (damage_line(300, "YWI= 4294967999"), "line 300: rank 4294967999"),
        (damage_line(300, " 299"), "line 300"),
        (damage_line(300, "\u00ff\u00fe 299"), "line 300"),
        (damage_line(300, "YQ== 299"), "line 300: this token has rank 97"),
        (damage_line(300, "enp6enp6 298"), "line 300: rank 298 stands"),
        (damage_line(300, "enp6enp6 399"), "id 399: the id is taken"),
        (lambda lines: lines[:350], "line 350: the file ends here"),
        (lambda lines: lines[1:], "ranks.tiktoken"),
    ],
)
def test_damaged_ranks_are_refused(tmp_path, damage, message):
    train().save(tmp_path)
    path = tmp_path / "ranks.tiktoken"
    path.write_text("".join(line + "\n" for line in damage(path.read_text().splitlines())))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text[:40], "line"),
        (lambda text: text.replace('"vocab_size": 400', '"vocab_size": 300'), "line 301: rank 300"),
        (lambda text: text.replace('"vocab_size": 400', '"vocab_size": 4000000000'), "vocab_size"),
        (lambda text: text.replace('"pattern"', '"pat"'), "pattern"),
        (lambda text: text.replace(r"\\p{L}", r"\\p{L"), "pattern"),
        (lambda text: text.replace(": 398,\n    ", ": 5,\n    "), "id 5: the id is taken"),
        (lambda text: text.replace("399", '"x"'), "special_tokens"),
    ],
)
def test_damaged_meta_is_refused(tmp_path, change, message):
    train().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)
    train().save(tmp_path)
    (tmp_path / "ranks.tiktoken").unlink()
    with pytest.raises(FileNotFoundError, match="ranks.tiktoken"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("threads", [0, 1, 3, 10**9])
def test_encode_batch_equals_encode(threads):
    t = train()
    texts = (NASTY + CORPUS) * 20
    ids, offsets = t.encode_batch(iter(texts), num_threads=threads)
    ids, offsets = np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64)
    assert len(offsets) == len(texts) + 1 and offsets[0] == 0 and offsets[-1] == len(ids)
    for i, text in enumerate(texts):
        assert ids[offsets[i] : offsets[i + 1]].tolist() == t.encode(text)
    ids, offsets = t.encode_batch([], threads)
    assert len(ids) == 0 and bytes(offsets) == bytes(8)


WORST = {
    "one letter": "a" * 10**6,
    "random letters": "".join(random.Random(5).choices("abcdefghijklmnopqrstuvwxyz", k=10**6)),
    "spaces": " " * 10**6 + "x",
    "line ends": "\r\n" * (5 * 10**5),
    "digits": "7" * 10**6,
    "punctuation": "!" * 10**6,
    "contractions": "'s" * (5 * 10**5),
}


@pytest.fixture(scope="module", params=[tok.PATTERN, GPT2], ids=["default", "gpt2"])
def realistic(request):
    """A vocabulary in which long runs merge many times over."""
    words = "".join(random.Random(6).choices("abcdefghijklmnopqrstuvwxyz", k=30000))
    runs = [c * 600 for c in "a !7"] + ["\r\n" * 300]
    return Tokenizer.train([words] + runs * 9, 4096, [], request.param)


@pytest.mark.parametrize("name", WORST)
def test_worst_cases_take_no_quadratic_time(realistic, name):
    start = time.process_time()  # of the CPU: a busy machine must not fail this
    ids = realistic.encode(WORST[name])
    seconds = time.process_time() - start
    assert realistic.decode(ids) == WORST[name]
    assert seconds < 0.5  # about 0.1 s; a quadratic way takes minutes


def test_a_run_longer_than_the_regex_stack():
    t = train(pattern=GPT2)
    text = " " * 1_500_000 + "x"
    assert t.decode(t.encode(text)) == text


def test_pattern_that_skips_text_loses_none():
    t = Tokenizer.train(["a-b"], 256, [], pattern=r"[a-z]|x*")
    assert "".join(t.split("a--b é c")) == "a--b é c" and t.decode(t.encode("a--b é c")) == "a--b é c"


def test_fuzz_roundtrip():
    t, rng = train(vocab=420), random.Random(7)
    points = [*range(0x100), *range(0x300, 0x3000, 7), *range(0x4E00, 0x4E80), *range(0x1F300, 0x1F700), 0x10FFFF]
    for _ in range(3000):
        text = "".join(map(chr, rng.choices(points, k=rng.randint(0, 40)))) + random_text(rng, rng.randint(0, 20))
        assert t.decode(t.encode(text)) == text


def test_lone_surrogates_are_refused():
    t = train()
    with pytest.raises(ValueError, match="surrogates"):
        t.encode("a\ud800b")
    with pytest.raises(ValueError, match="item 1.*surrogates"):
        t.encode_batch(["fine", "a\udc80"])
    with pytest.raises(ValueError, match="item 1.*surrogates"):
        train(["fine", "a\udc80"])


def test_bad_training_arguments():
    for vocab in (-1, 0, 256, 257, 2**40):
        with pytest.raises(ValueError, match=f"vocab_size is {vocab}"):
            train(vocab=vocab)
    with pytest.raises(ValueError, match="gives only 0 merges.*258 at most"):
        train([], 259)
    assert train([], 258).encode("hi") == [104, 105]
    with pytest.raises(ValueError, match="gives only 2 merges.*260 at most"):
        train(["abc"], 300)
    with pytest.raises(ValueError, match="distinct"):
        train(specials=["<|a|>", "<|a|>"])
    with pytest.raises(ValueError, match="pattern"):
        train(pattern="(")


def test_items_that_are_not_text():
    t = train()
    for call in (train, t.encode_batch):
        with pytest.raises(TypeError, match="item 1 .*int"):
            call(["fine", 7])
        with pytest.raises(TypeError, match="not one"):
            call("a string by mistake")
        with pytest.raises(TypeError):
            call(7)
    with pytest.raises(TypeError):
        t.encode(b"bytes")


@pytest.mark.parametrize("text", ["no end of text " * 10000, ""])
def test_training_can_be_interrupted(text):
    def stop(signum, frame):
        raise TimeoutError

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(TimeoutError):
            train(itertools.repeat(text))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_training_streams():
    """160 MB of text in a process that may grow by 60: what is kept is one batch and the distinct pieces."""
    code = """
import resource, tok
text = " ".join(str(i) for i in range(160_000))
def texts():
    for i in range(160):
        yield text[i:] + text[:i]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
tok.Tokenizer.train(texts(), 300, [])
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60


def test_training_reports_progress():
    seen = []
    t = train(["".join(random.Random(1).choices("abcdefgh", k=20000))], 600, progress=lambda *at: seen.append(at))
    assert t.vocab_size == 600 and len(seen) > 3 and seen == sorted(set(seen))
    assert all(0 <= done < merges == 342 for done, merges in seen)

    def stop(done, merges):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(["".join(random.Random(1).choices("abcdefgh", k=20000))], 600, progress=stop)


def test_an_error_in_the_iterator_comes_through():
    def texts():
        yield "fine"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(texts())


def test_ids_out_of_range():
    t = train()
    for bad in (-1, 400, 2**32, 2**70):
        with pytest.raises(ValueError, match=f"id {bad} is outside the vocabulary of 400"):
            t.decode([65, bad])
        with pytest.raises(ValueError, match="outside"):
            t.token_bytes(bad)
    with pytest.raises(TypeError):
        t.decode(["65"])
    assert t.decode(np.array([72, 105], np.uint16)) == "Hi"
    assert t.decode([0xE4, 0xB8]) == "\ufffd"  # a cut character


# -----------------------------------------------------------------------------
# Config override


@dataclasses.dataclass
class Knobs:
    depth: int = 4  # how deep
    rate: float = 0.1  # how fast
    name: str = ""  # what it is called
    fresh: bool = False  # start over
    from_: str = ""  # where from


def test_override_fills_types():
    cfg = gpt.override(Knobs(), ["--depth=6", "--rate=1e-3", "--name=a=b", "--fresh", "--from=x"])
    assert (cfg.depth, cfg.rate, cfg.name, cfg.fresh, cfg.from_) == (6, 1e-3, "a=b", True, "x")


@pytest.mark.parametrize("arg", ["--dept=6", "--depth=six", "--depth", "--rate=nan", "--fresh=maybe", "depth=6", "--depth=1.5"])
def test_override_refuses_and_names_the_knob(arg):
    with pytest.raises(SystemExit) as error:
        gpt.override(Knobs(), [arg])
    assert re.search("depth|rate|fresh", str(error.value)) and "\n" not in str(error.value)


def test_help_prints_every_knob(capsys):
    with pytest.raises(SystemExit) as error:
        gpt.override(Knobs(), ["--help"], "the manual")
    printed = capsys.readouterr().out
    assert error.value.code == 0 and "the manual" in printed and "depth: int = 4  # how deep" in printed


# -----------------------------------------------------------------------------
# Model


def plain_attention(q, k, v, window):
    """Causal windowed attention spelt out. q (B, H, T, D), k and v (B, G, T, D)."""
    B, H, T, D = q.shape
    y = torch.zeros_like(q)
    for h in range(H):
        g = h // (H // k.size(1))
        for t in range(T):
            past = slice(max(0, t - window + 1), t + 1)
            p = torch.softmax(torch.einsum("bd,bsd->bs", q[:, h, t], k[:, g, past]) / D**0.5, -1)
            y[:, h, t] = torch.einsum("bs,bsd->bd", p, v[:, g, past])
    return y


@pytest.mark.parametrize("window", ["S", "L"])
def test_attention_equals_plain_reference(window, monkeypatch):
    model = small(window_pattern=window)
    ids = torch.randint(300, (2, 64))
    want = model(ids)

    def plain(q, k, v, mask=None, is_causal=False):
        return plain_attention(q, k, v, 32 if mask is not None else 64)

    monkeypatch.setattr(F, "scaled_dot_product_attention", plain)
    assert (model(ids) - want).abs().max() < 1e-4


def test_model_is_causal():
    model = small()
    a = torch.randint(300, (1, 64))
    b = a.clone()
    b[0, 40:] = torch.randint(300, (24,))
    assert torch.equal(model(a)[:, :40], model(b)[:, :40]) and not torch.equal(model(a)[:, 40:], model(b)[:, 40:])


def test_init_on_meta_equals_direct():
    cfg = GPTConfig(300, 64, 2, 64, 4, 4)
    with torch.device("meta"):
        model = GPT(cfg)
    model = model.to_empty(device="cpu").init(3)
    assert same(model.state_dict(), GPT(cfg).init(3).state_dict())
    ids, direct = torch.randint(300, (1, 64)), GPT(cfg).init(3)
    with torch.no_grad():
        for p in [*model.parameters(), *direct.parameters()]:
            p.add_(0.02)  # matrices that begin as zero would hide whatever is before them
    assert torch.equal(model(ids), direct(ids))


def test_loss_is_cross_entropy_and_ignores_the_unsupervised():
    model = small()
    ids, targets = torch.randint(300, (2, 10)), torch.randint(300, (2, 10))
    targets[0, :4] = -1
    loss = model(ids, targets)
    want = -torch.log_softmax(model(ids), -1).gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    assert (loss - want).abs().max() < 1e-5 and loss[0, :4].eq(0).all()


@pytest.mark.parametrize("T, window", [(300, 300), (300, 130), (257, 64), (5, 5)])
def test_block_attention_and_its_gradient_equal_plain(T, window):
    """Beyond one block of queries, with windows that begin inside a block, over more sequences than one group."""
    rng = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(20, T, 8, dtype=torch.float64, generator=rng) for _ in range(4))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    i = torch.arange(T)
    scores = (q @ k.mT / 8**0.5).masked_fill((i > i[:, None]) | (i <= i[:, None] - window), -math.inf)
    plain, ours = scores.softmax(-1) @ v, gpt.BlockAttention.apply(q, k, v, window)
    assert (plain - ours).abs().max() < 1e-12
    for a, b in zip(torch.autograd.grad(plain, inputs, grad), torch.autograd.grad(ours, inputs, grad)):
        assert (a - b).abs().max() < 1e-12


def test_token_loss_and_its_gradient_equal_plain(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 16, generator=rng, requires_grad=True), torch.randn(300, 16, generator=rng, requires_grad=True)
    targets, grad = torch.randint(-1, 300, (50,), generator=rng), torch.randn(50, generator=rng)
    logits = 15 * torch.tanh(x @ weight.T / 15)
    plain = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    for rows in (7, 50):
        monkeypatch.setattr(gpt.TokenLoss, "rows", lambda x, weight: [slice(i, i + rows) for i in range(0, 50, rows)])
        ours = gpt.TokenLoss.apply(x, weight, targets, 15.0)
        assert (plain - ours).abs().max() < 1e-5
        for a, b in zip(torch.autograd.grad(plain, (x, weight), grad, retain_graph=True), torch.autograd.grad(ours, (x, weight), grad)):
            assert (a - b).abs().max() < 1e-5


LOSS_MEMORY = """
import resource, torch, gpt
x = torch.randn(16384, 64).bfloat16().requires_grad_()
weight = torch.randn(32768, 64, requires_grad=True)
targets = torch.randint(32768, (16384,))
gpt.TokenLoss.apply(x[:10], weight, targets[:10], 15.0).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
gpt.TokenLoss.apply(x, weight, targets, 15.0).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20, "GiB")
"""


def test_loss_of_a_large_vocabulary_fits_in_2_gb():
    printed = subprocess.run([sys.executable, "-c", LOSS_MEMORY], cwd=HERE, capture_output=True, text=True, check=True).stdout
    assert 0.5 < float(printed.split()[0]) < 2 * 1e9 / 2**30


def test_nothing_supervised_is_zero_not_nan():
    model = small()
    loss = model(torch.randint(300, (2, 10)), torch.full((2, 10), -1)).sum()
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())


@pytest.mark.parametrize("shape", [{}, {"kv_heads": 1}, {"window_pattern": "SSL", "depth": 5}, {"vocab_size": 333, "seq_len": 63}])
def test_table_adds_up(shape):
    """What a watched forward pass multiplies and holds is what the formulas of sizes() say."""
    cfg = GPTConfig(**{"vocab_size": 300, "seq_len": 64, "depth": 3, "width": 64, "heads": 4, "kv_heads": 2, **shape})
    sizes, flops = GPT(cfg).sizes()
    *lines, total, trained = gpt.table(cfg)
    assert int(total.split()[-2].replace(",", "")) == sum(sizes.values())
    assert abs(int(total.split()[-1].replace(",", "")) * 3 - flops) < 5 and f"{flops:,}" in trained
    text = "\n".join(lines)
    for step in ("embed: look up", "RMSNorm", "attention: q, k, v matrix", "attention: rotate", "attention: attend", "mlp.up: matrix", "unembed: matrix"):
        assert step in text
    assert not lines[1].startswith("rotate")  # the tables of angles are no step


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [1, 100, 128, 512])
def test_flex_attention_sees_the_window(window, monkeypatch):
    """What trains windows on a GPU, here without its compiler: the forward pass equals the one of this machine."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(gpt, "FLEX", None)
    rng = torch.Generator().manual_seed(5)
    q, k, v = torch.randn(3, 2, 3, 512, 32, generator=rng)
    mask = gpt.band.__wrapped__(512, window, torch.device("cpu"))
    y = gpt.FLEX(q, k, v, block_mask=mask)
    want = gpt.BlockAttention.apply(*(t.flatten(0, 1) for t in (q, k, v)), window).view_as(q)
    assert (y - want).abs().max() < 1e-5 and (mask.sparsity() > 50) == (window < 512)  # blocks are skipped


def test_nothing_is_compiled_again_after_the_second_step(monkeypatch):
    """Also with an uneven last micro-batch, and with sampling in between."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    model = small()
    forward, optimizer = gpt.compile_model(model, CPU), optim.build(model, 0.02, 0.3, 0.004)
    compiled = []
    for step in range(5):
        for x in torch.arange(5 * 33).view(5, 33).split(2):
            forward(x[:, :-1], x[:, 1:]).sum().backward()
        optimizer.step()
        with torch.inference_mode():
            model(x[:, :9])
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < compiled[1] == compiled[-1]


def test_padding_is_never_sampled():
    assert small(vocab_size=290)(torch.randint(290, (1, 4))).size(-1) == 290


def test_dial():
    small_, large = GPTConfig.from_depth(4, 100, 64), GPTConfig.from_depth(20, 100, 64)
    assert (small_.width, small_.heads, large.width, large.heads) == (256, 4, 1280, 10)
    assert GPTConfig.from_depth(13, 100, 64).width == 896  # a multiple of the head size
    assert GPTConfig.from_depth(4, 100, 64, kv_heads=1).kv_heads == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cached_equals_uncached_beyond_the_window(device, kv_heads):
    model = small(kv_heads=kv_heads).to(device)
    ids = torch.randint(300, (2, 64), device=device)
    cache, got = KVCache(model.cfg, 2, device=device), []
    with torch.inference_mode():
        for t in [0, 7, 8, 9, 40, *range(41, 64)]:  # prefill in uneven chunks, then token by token
            stop = {0: 7, 7: 8, 8: 9, 9: 40}.get(t, t + 1)
            cache.span = stop
            got.append(model(ids[:, t:stop], cache=cache, pos=torch.tensor([t, t], device=device)))
        assert (torch.cat(got, 1) - model(ids)).abs().max() < 1e-4


def test_ragged_batch_equals_singles():
    model = small()
    rows = [torch.randint(300, (n,)) for n in (5, 30, 17)]
    cache = KVCache(model.cfg, 4)
    cache.rows = torch.tensor([2, 0, 3])
    with torch.inference_mode():
        padded = torch.stack([F.pad(r, (0, 30 - len(r))) for r in rows])
        model(padded, cache=cache, pos=torch.zeros(3, dtype=torch.long))
        new = torch.randint(300, (3, 1))
        both = model(new, cache=cache, pos=torch.tensor([5, 30, 17]))
        for i, row in enumerate(rows):
            alone = model(torch.cat([row, new[i]])[None])[0, -1]
            assert (both[i, 0] - alone).abs().max() < 1e-4


@pytest.mark.parametrize("cuts", [[4], [2, 2], [1, 1, 1, 1]])
def test_micro_batches_give_the_same_gradient(cuts):
    ids, targets = torch.randint(300, (4, 20)), torch.randint(300, (4, 20))
    for i in range(4):
        targets[i, : 5 * i] = -1  # uneven masks
    count, grads = (targets >= 0).sum(), []
    for split in ([4], cuts):
        model = small()
        for x, y in zip(ids.split(split), targets.split(split)):
            (model(x, y).sum() / count).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (grads[0] - grads[1]).abs().max() < 1e-6


# -----------------------------------------------------------------------------
# Optimizer


def adam_group(params, **changes):
    return {"kind": "adamw", "params": params, "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-2, "weight_decay": 0.01, **changes}


def test_adamw_equals_torch():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Parameter(torch.randn(7, 3)), torch.nn.Parameter(torch.empty(7, 3))
    theirs.data.copy_(ours.data)
    a, b = optim.MuonAdamW([adam_group([ours])]), torch.optim.AdamW([theirs], 0.1, (0.9, 0.99), 1e-2, 0.01)
    for _ in range(10):
        ours.grad = torch.randn(7, 3)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8), (1, 5), (5, 1)])
def test_muon_orthogonalises(shape):
    g = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    U, S, V = torch.linalg.svd(g, full_matrices=False)
    x = optim.orthogonalise(g)
    assert (torch.linalg.svdvals(x) - 1).abs().max() < 0.15
    assert torch.cosine_similarity(x.flatten(1), (U @ V).flatten(1)).min() > 0.98  # near the true polar factor
    assert torch.equal(optim.orthogonalise(torch.zeros(1, *shape)), torch.zeros(1, *shape))


def test_small_updates_are_not_swallowed():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = optim.MuonAdamW([adam_group([p], lr=1e-6, weight_decay=0.0)])
    for _ in range(1000):
        p.grad = torch.ones(4)
        optimizer.step()
    assert ((1 - p) > 5e-4).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    model = small()
    optimizer = optim.build(model, 0.02, 0.3, 0.004)

    def step(spoil):
        model(torch.arange(33).view(1, 33)[:, :-1], torch.arange(33).view(1, 33)[:, 1:]).sum().backward()
        if spoil:
            model.blocks[1].mlp.up.weight.grad[3, 4] = bad
        return optimizer.step()

    assert math.isfinite(step(False))
    weights, shard = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.shard())
    assert not math.isfinite(step(True))
    assert same(model.state_dict(), weights) and optimizer.shard()["steps"] == shard["steps"] == 1
    assert all(same(a, b) for a, b in zip(optimizer.shard()["bundles"], shard["bundles"]))
    assert math.isfinite(step(False)) and not same(model.state_dict(), weights)


def test_a_run_of_bad_gradients_ends_it():
    patience = gpt.Patience(most=3)
    for step, norm in enumerate([1.0, math.nan, math.inf, 1.0, math.nan, math.nan]):
        patience.see(norm, step, CPU)
    assert patience.skipped == 4
    with pytest.raises(SystemExit, match="3 updates in a row were skipped up to step 6"):
        patience.see(math.inf, 6, CPU)


def test_rate_set_after_load_holds():
    p = torch.nn.Parameter(torch.zeros(4))
    first = optim.MuonAdamW([adam_group([p])])
    p.grad = torch.ones(4)
    first.step()
    second = optim.MuonAdamW([adam_group([p], lr=0.0, weight_decay=0.0)])
    second.load([first.shard()])
    before = p.detach().clone()
    second.step()
    assert torch.equal(p, before) and second.steps == 2


SHARDED = """
import sys, torch, torch.distributed as dist
import optim
from gpt import start_machine
machine = start_machine("cpu", threads=1)
torch.manual_seed(0)
shapes = [(1,), (7,), (5, 3)], [(6, 4)] * 3 + [(4, 6)]
vectors, matrices = ([torch.nn.Parameter(torch.randn(s)) for s in group] for group in shapes)
adam = dict(kind="adamw", params=vectors, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.01)
make = lambda: optim.MuonAdamW([adam, dict(kind="muon", params=matrices, lr=0.1, momentum=0.9, dtype=torch.float32, weight_decay=0.01)], machine.rank, machine.world)
optimizer = make()
for step in range(6):
    if step == 3:  # through a save and a load
        shards = machine.gather(optimizer.shard())
        optimizer = make()
        optimizer.load(shards)
    torch.manual_seed(step)
    params = vectors + matrices
    totals = [torch.randn(p.shape) for p in params]  # what the sum over ranks has to be
    parts = [torch.randn(WORLD, *p.shape) for p in params]
    for t, part in zip(totals, parts):
        part[1] *= step != 4  # a rank without rows, which runs no backward pass
        part[0] = t - part[1:].sum(0)
    mine = totals if machine.world == 1 else [part[machine.rank] for part in parts]
    chosen = [(p, g) for p, g in zip(params, mine) if machine.world == 1 or g.any()]
    for share in optimizer.passes([0.3, 0.7] if chosen else []):  # unlike ranks, unlike orders of arrival
        sum((p * g).sum() * share for p, g in (chosen if machine.rank else chosen[::-1])).backward()
    optimizer.step()
torch.save([p.data for p in vectors + matrices], sys.argv[1] + str(machine.rank))
if machine.world > 1:
    dist.destroy_process_group()  # or its threads may abort the process as it ends
"""


@pytest.mark.parametrize("world", [2, 3])
def test_sharded_optimizer_equals_one_process(world, tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED.replace("WORLD", str(world)))
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    subprocess.run([sys.executable, script, tmp_path / "one"], check=True, env=env)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", script]
    done = subprocess.run([*launch, tmp_path / "many"], env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    want = torch.load(tmp_path / "one0")
    for rank in range(world):
        for a, b in zip(want, torch.load(tmp_path / f"many{rank}")):
            assert (a - b).abs().max() < 1e-5


OVERLAP = """
import torch, torch.distributed as dist
import optim
from gpt import GPT, GPTConfig, start_machine
machine = start_machine("cpu", threads=1)
model = GPT(GPTConfig(vocab_size=64, seq_len=8, depth=4, width=64, heads=1, kv_heads=1)).init(1)
optimizer = optim.build(model, 0.02, 0.3, 0.004, rank=machine.rank, world=machine.world)
events, scatter = [], dist.reduce_scatter_tensor
dist.reduce_scatter_tensor = lambda *args, **kw: (events.append("send"), scatter(*args, **kw))[1]
for i, block in enumerate(model.blocks):
    block.register_full_backward_pre_hook(lambda *_, i=i: events.append(f"block {i}"))
x = torch.arange(16).view(2, 8)
for _ in optimizer.passes(range(2)):
    events.append("backward")
    model(x, x).sum().backward()
before = events[:]
optimizer.step()
if machine.first:
    print(*before[before.index("backward", 1) :], len(events) - len(before), sep=",")
dist.destroy_process_group()
"""


def test_gradients_leave_while_the_backward_pass_runs(tmp_path):
    script = tmp_path / "overlap.py"
    script.write_text(OVERLAP)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    done = subprocess.run(launch, env={**os.environ, "PYTHONPATH": str(HERE)}, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    *during, after = done.stdout.strip().split(",")
    # of the last pass alone; each layer's gradients are sent before the layer below begins, and nothing is left to the end
    assert during.index("send") == 1 and after == "0"
    order = [event for event, _ in itertools.groupby(during)]
    assert order == ["backward", "send", *itertools.chain(*([f"block {i}", "send"] for i in (3, 2, 1, 0)))]


# -----------------------------------------------------------------------------
# Data


def documents_of(lengths, bos=999):
    """An array of documents of these lengths, bos included, whose other tokens count upwards."""
    parts, n = [], 0
    for length in lengths:
        parts.append(np.concatenate([[bos], np.arange(n, n + length - 1)]))
        n += length - 1
    return np.concatenate(parts).astype(np.int64)


def test_packing_loses_little_and_cuts_few():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(2, 120, 3000), rng.integers(200, 3000, 60)])
    tokens = documents_of(lengths, bos=10**6)
    shards = data.TokenSet([tokens], 10**6)
    dropped, empty, cut = shards.loss(256)
    assert dropped < 0.01 and empty < 0.001 and cut < 0.15
    seen = np.concatenate([shards.row(0, i, 256, 0)[0] for i in range(shards.rows(256, 0))])
    body = seen[seen != 10**6]
    assert len(np.unique(body)) == len(body) and len(body) > 0.99 * (tokens != 10**6).sum()  # nothing twice
    assert all(shards.row(0, i, 256, 0)[0][0] == 10**6 for i in range(50))  # rows start at bos


def test_validation_predicts_every_token_once():
    tokens = documents_of([3, 500, 40, 64, 65, 2, 1000], bos=9999)
    val = data.TokenSet([tokens], 9999, whole=True)
    rows = val.rows(64, 0)
    _, targets = data.batch(val, rows + 3, 64, 0, 0)
    got = targets[(targets >= 0) & (targets != 9999)].numpy()
    assert sorted(got) == sorted(tokens[tokens != 9999])


def test_batches_are_a_pure_function_and_ranks_share_them():
    shards = data.TokenSet([documents_of(np.random.default_rng(1).integers(2, 90, 300), 5000)] * 2, 5000)
    whole = data.batch(shards, 8, 64, 3, 11)
    assert all(torch.equal(a, b) for a, b in zip(whole, data.batch(shards, 8, 64, 3, 11)))
    for world in (2, 3):
        parts = [data.batch(shards, 8, 64, 3, 11, r, world) for r in range(world)]
        assert torch.equal(torch.cat([p[0] for p in parts]), whole[0]) and torch.equal(torch.cat([p[1] for p in parts]), whole[1])
    assert not torch.equal(whole[0], data.batch(shards, 8, 64, 4, 11)[0])  # another seed


def test_three_epochs_of_a_tiny_file():
    shards = data.TokenSet([documents_of([5, 9, 30, 4], 5000)], 5000)
    rows = [data.batch(shards, 1, 16, 0, step)[0] for step in range(9)]
    assert len(rows) == 9 and shards.rows(16, 0) == 2
    lone = data.TokenSet([documents_of([3], 5000)], 5000)
    assert data.batch(lone, 2, 16, 0, 5)[1].ge(0).sum() == 4  # two rows with two targets each


def test_training_shards_do_not_move_validation(tmp_path, tokenizer, monkeypatch):
    """A file of validation text gives the same batches beside whatever training text; held-out documents stay held out."""
    monkeypatch.setattr(data.write_shards, "__defaults__", (3000, False))  # so that there are many shards
    texts, more, val = data.demo_texts(1)[:1500], data.demo_texts(2)[:700], data.demo_texts(3, "val")[:50]
    tokenizer.save(str(tmp_path / "from" / "tokenizer"))
    (tmp_path / "few").mkdir()
    for name, content in (("few/b.json", texts), ("val.json", val)):
        (tmp_path / name).write_text(json.dumps([{"text": t} for t in content]))
    shutil.copytree(tmp_path / "few", tmp_path / "many")
    (tmp_path / "many" / "a.json").write_text(json.dumps([{"text": t} for t in more]))
    (train, held), (train_more, held_more) = (map(set, data.split_documents(tmp_path / name)) for name in ("few", "many"))
    assert 3 < len(held) < 50 and not train & held and train | held == set(texts)
    assert held <= held_more and train <= train_more and not train_more & held_more
    batches, shards = [], []
    for name in ("few", "many"):
        cfg = data.PrepareConfig(str(tmp_path / f"out_{name}"), str(tmp_path / "from"), str(tmp_path / name), str(tmp_path / "val.json"))
        _, _, train, val = data.prepare(cfg, CPU)
        shards.append(len(train.arrays))
        batches.append(data.batch(val, val.rows(64, 0), 64, 0, 0))
    assert 3 < shards[0] < shards[1] and all(torch.equal(a, b) for a, b in zip(*batches))


def test_shards_hold_equal_numbers_and_refuse_strangers(tmp_path, tokenizer):
    texts = data.demo_texts(1)[:400]
    data.write_shards(tmp_path, "train", tokenizer, "ab" * 32, [texts], most=3000)
    paths = sorted(tmp_path.glob("train_*.bin"))
    shards = [data.open_shard(p, "ab" * 32) for p in paths]
    bos = tokenizer.special("<|bos|>")
    assert len(paths) > 3 and len({len(s) for s in shards}) == 1 and all(s[0] == bos for s in shards)
    want = sum(len(tokenizer.encode(t)) for t in texts)
    assert abs(sum((s != bos).sum() for s in shards) - want) < 3 * len(paths)
    with pytest.raises(SystemExit, match="another tokenizer"):
        data.open_shard(paths[0], "cd" * 32)
    paths[1].write_bytes(paths[1].read_bytes()[:-7])
    with pytest.raises(SystemExit, match="damaged"):
        data.open_shard(paths[1], "ab" * 32)


def test_reading_documents(tmp_path):
    import gzip

    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"text": "four"}\n')
    (tmp_path / "c.json").write_text('[{"text": "five"}]')
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as f:
        f.write('{"text": "six"}\n')
    (tmp_path / "e.md").write_text("not this")
    assert sorted(data.read_documents(tmp_path)) == ["five", "four", "one", "six", "three", "two"]
    assert len(list(data.read_documents(tmp_path, limit=3))) == 3


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', "line 2.*`text`"),
        ("a.jsonl", b'{"text": "x"\n', "line 1"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1"),
        ("a.json", b"[1", "not JSON"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.txt", b"", "no text"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.md", b"hello", "no .txt"),
    ],
)
def test_bad_documents_get_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        list(data.read_documents(tmp_path))


def test_a_single_document_serves_for_both(tmp_path):
    text = next(t for t in (f"text {i}" for i in range(1000)) if data.is_held_out(t))
    for content in (text, text + "?"):
        (tmp_path / "a.txt").write_text(content)
        train, val = data.split_documents(tmp_path / "a.txt")
        assert "".join([*train, *val]) == content and val[0]


def test_parquet_where_pyarrow_is_there(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["one", "two 你好", ""], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert list(data.read_documents(tmp_path)) == ["one", "two 你好"]
    parquet.write_table(arrow.table({"n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(SystemExit, match="a.parquet is damaged or has no column `text`"):
        list(data.read_documents(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(SystemExit, match="a.parquet is damaged"):
        list(data.read_documents(tmp_path))


def test_parquet_without_pyarrow_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(SystemExit, match="pip install pyarrow"):
        list(data.read_documents(tmp_path))


def test_a_damaged_plan_is_made_anew(tmp_path, tokenizer):
    data.write_shards(tmp_path, "train", tokenizer, "00" * 32, [data.demo_texts(1)[:50]])
    paths = sorted(tmp_path.glob("*.bin"))

    def first_batch():
        shards = data.TokenSet([data.open_shard(p, "00" * 32) for p in paths], tokenizer.special("<|bos|>"), paths=paths)
        return data.batch(shards, 2, 32, 1, 0)[0]

    want = first_batch()
    (cache,) = tmp_path.glob("*.npz")
    for content in (b"", cache.read_bytes()[:100], b"PK\x03\x04 nonsense"):
        cache.write_bytes(content)
        assert torch.equal(first_batch(), want)


def test_a_large_set_starts_at_once(tmp_path):
    """Sparse files of 1.7 billion tokens: the first batch takes under 2 seconds, and only shards that are used are planned."""
    hash, header = "ab" * 32, np.zeros(data.HEADER, np.int32)
    header[:3], header[4:12] = (data.MAGIC, 1, 2**24), np.frombuffer(bytes.fromhex(hash), np.int32)
    for i in range(100):
        with open(tmp_path / f"train_{i:04}.bin", "wb") as f:
            f.write(header.tobytes() + np.uint16(999).tobytes())  # a <|bos|>, then one long document of zeros
            f.truncate(4 * data.HEADER + 2 * 2**24)
    begin = time.time()
    paths = sorted(tmp_path.glob("train_*.bin"))
    shards = data.TokenSet([data.open_shard(p, hash) for p in paths], 999, paths=paths)
    ids, _ = data.batch(shards, 8, 2048, 1, 0)
    assert time.time() - begin < 2 and (ids[:, 0] == 999).all()
    assert len(list(tmp_path.glob("*.npz"))) == 1
    far = data.batch(shards, 8, 2048, 1, 99 * shards.rows(2048, 1) // 8)[0]  # a shard far on
    assert (far[:, 0] == 999).all() and len(list(tmp_path.glob("*.npz"))) <= 3


QUESTION = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello!"}


def test_conversations_from_files(tmp_path, tokenizer):
    lines = [
        {"messages": [QUESTION, REPLY], "more": 1},
        {"messages": [{"role": "system", "content": "Be brief."}, QUESTION, REPLY, QUESTION]},
        {"question": "What is 2+3?", "answer": "It is 2+3 = <<2+3=5>>5.\n#### 5"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines[:2])) + "\n\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as f:
        f.write(json.dumps(lines[2]))
    chats = data.read_conversations(str(tmp_path))
    assert chats == data.read_conversations(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl.gz")
    assert chats[0] == [QUESTION, REPLY] and [m["role"] for m in chats[1]] == ["system", "user", "assistant"]
    assert "<|python_start|>2+3<|python_end|><|output_start|>5<|output_end|>5.\n#### 5<|assistant_end|>" in tokenizer.decode(data.render(chats[2], tokenizer)[0])


BAD_CHATS = {
    b"": "no conversation at all",
    b'{"messages": [': "line 1 is not JSON",
    b'{"text": "Hi"}': "line 1: wanted",
    b"[]": "line 1: wanted",
    b'{"messages": []}': "line 1: wanted",
    json.dumps({"messages": [REPLY, QUESTION]}).encode(): "in turn",
    json.dumps({"messages": [QUESTION, QUESTION, REPLY]}).encode(): "in turn",
    json.dumps({"messages": [QUESTION]}).encode(): "in turn",
    json.dumps({"messages": [QUESTION, {"role": "assistant"}]}).encode(): "line 1: wanted",
    json.dumps({"messages": [QUESTION, {"role": "assistant", "content": 5}]}).encode(): "line 1: wanted",
    json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, REPLY]}).encode(): "line 1: wanted",
    json.dumps({"messages": [QUESTION, {"role": "assistant", "content": [{"type": "image", "text": ""}]}]}).encode(): "line 1: wanted",
    json.dumps({"messages": [QUESTION, {"role": "assistant", "content": "\ud800"}]}).encode(): "line 1: wanted",
    b'{"messages": [{"role": "user", "content": "\xff"}]}': "cannot be read as UTF-8",
}


@pytest.mark.parametrize("content", BAD_CHATS)
def test_bad_conversations_get_one_line(tmp_path, content):
    good = json.dumps({"messages": [QUESTION, REPLY]}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match=re.escape(BAD_CHATS[content])) as caught:
        data.read_conversations(str(tmp_path / "a.jsonl"))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    if b"{" in content:
        (tmp_path / "a.jsonl").write_bytes(good + content)
        with pytest.raises(SystemExit, match="UTF-8|line 2"):
            data.read_conversations(str(tmp_path / "a.jsonl"))


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": [{"type": "python", "text": "1+1"}, {"type": "output", "text": "2"}, {"type": "text", "text": "Two."}]},
]


def write_public_conversations(folder, count=30):
    """Each public source in the form it is published in, under the names that a download gives."""
    turn = lambda role, text, *replies, **more: {"role": role, "text": text, "lang": "en", "replies": list(replies), **more}
    rows = {
        "slimorca.jsonl": lambda i: {"conversations": [{"from": f, "value": f"orca {f} {i}"} for f in ("system", "human", "gpt")]},
        "ultrachat_3.jsonl": lambda i: {"id": str(i), "data": [f"ultra {i}.{j}" for j in range(5)]},
        "dolly.jsonl": lambda i: {"instruction": f"dolly {i}", "context": "above" if i % 2 else "", "response": "so", "category": "qa"},
        "gsm8k_train.jsonl": lambda i: {"question": f"gsm {i}", "answer": "48/2 = <<48/2=24>>24\n#### 24"},
    }
    for name, row in rows.items():
        (folder / name).write_bytes(jsonl(row(i) for i in range(count)))
    worse = turn("assistant", "worse", rank=1)
    best = turn("assistant", "best", turn("prompter", "why?", turn("assistant", "so", rank=None)), rank=0)
    foreign = turn("assistant", "besser", rank=0) | {"lang": "de"}
    trees = [{"message_tree_id": i, "prompt": turn("prompter", f"tree {i}", worse, foreign, best)} for i in range(count)]
    trees += [{"prompt": turn("prompter", "hallo", best) | {"lang": "de"}}, {"prompt": turn("prompter", "nobody answers")}]
    (folder / "oasst2.jsonl.gz").write_bytes(gzip.compress(jsonl(trees)))
    (folder / "data" / "auxiliary_train").mkdir(parents=True)
    (folder / "data" / "auxiliary_train" / "law.csv").write_text("".join(f"mmlu {i},u,v,w,x,C\n" for i in range(count)))


def test_public_conversations_are_read_and_mixed(tmp_path, tokenizer, capsys):
    write_public_conversations(tmp_path)
    said = {}
    for messages in data.mixture(tmp_path, 400, 1):
        data.render(messages, tokenizer)
        contents = [m["content"] for m in messages]
        said.setdefault(contents[0].split()[0], []).append((len(messages), contents[-1]))
    ends = [("orca", 0.3, "orca gpt"), ("ultra", 0.3, ".3"), ("dolly", 0.05, "so"), ("tree", 0.05, "so"), ("mmlu", 0.12, "C")]
    for word, share, last in ends:
        assert len(said[word]) == round(400 * share) and all(last in content for _, content in said[word]), word
    assert {n for n, _ in said["orca"]} == {3} and {n for n, _ in said["ultra"]} == {4} and {n for n, _ in said["tree"]} == {4}
    assert len(said["gsm"]) == 32 and {"type": "python", "text": "48/2"} in said["gsm"][0][1]
    assert said["Spell"] and all(re.fullmatch("[a-z](-[a-z])+", content) for _, content in said["Spell"])
    assert data.mixture(tmp_path, 400, 1) == data.mixture(tmp_path, 400, 1) != data.mixture(tmp_path, 400, 2)
    assert "note" not in capsys.readouterr().out
    (tmp_path / "dolly.jsonl").rename(tmp_path / "away")
    assert len(data.mixture(tmp_path, 400, 1)) == 380 and "has no dolly" in capsys.readouterr().out
    assert len(data.read_conversations(f"{tmp_path}/slimorca.jsonl,{tmp_path}/oasst2.jsonl.gz")) == 60
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="has none of slimorca.*data.py download"):
        data.mixture(tmp_path / "none", 400, 1)


def test_a_stage_learns_from_the_mixture(tiny_run, tmp_path):
    write_public_conversations(tmp_path)
    out = f"--out={tmp_path / 'out'}"
    printed = run("sft.py", out, f"--from={tiny_run}", f"--mix={tmp_path}", "--mix_count=200", *TINY_SFT, "--chats=0", "--steps=2")[1]
    assert "fine-tuning: 200 conversations" in printed
    assert "there is nothing to learn from" in run("sft.py", out + "2", f"--from={tiny_run}", "--chats=0", check=False)[1]


def test_chat_template(tokenizer):
    ids, mask = data.render(CHAT, tokenizer)
    own = {tokenizer.special(name) for name in SPECIALS[9:]}  # tokens of an experiment may come in between
    ids, mask = zip(*((i, m) for i, m in zip(ids, mask) if i not in own))
    assert tokenizer.decode(ids) == (
        "<|bos|><|user_start|>Be brief.\n\nHi<|user_end|><|assistant_start|><|python_start|>1+1<|python_end|>"
        "<|output_start|>2<|output_end|>Two.<|assistant_end|>"
    )
    learnt = tokenizer.decode([i for i, m in zip(ids, mask) if m])
    assert learnt == "<|python_start|>1+1<|python_end|>Two.<|assistant_end|>"
    start = ids.index(tokenizer.special("<|assistant_start|>")) + 1
    assert data.parse(ids[start:], tokenizer) == CHAT[2]["content"] and data.visible(CHAT[2]["content"]) == "Two."
    assert data.render(CHAT[:2], tokenizer, reply=True)[0] == list(ids[:start])


def test_users_cannot_spell_special_tokens(tokenizer):
    text = "".join(SPECIALS)
    ids, _ = data.render([{"role": "user", "content": text}], tokenizer, reply=True)
    assert sum(i >= tokenizer.vocab_size - 16 for i in ids) == 4 and text in tokenizer.decode(ids)


def test_mask_keeps_user_tokens_out_of_the_loss(tokenizer):
    chats = data.conversations(1, 20)
    shards = data.chat_set(chats, tokenizer, 128)
    _, targets = data.batch(shards, 4, 128, 0, 0)
    text = tokenizer.decode([t for t in targets.flatten().tolist() if t >= 0])
    asked = [m["content"] for c in chats for m in c if m["role"] == "user"]
    assert not any(q in text for q in asked if len(q) > 12) and "<|user_" not in text and "<|output_" not in text
    assert "<|assistant_end|>" in text


def test_long_conversations_do_not_clog_the_packer(tokenizer):
    long = [{"role": "user", "content": "why " * 500}, {"role": "assistant", "content": "so " * 500}] * 2
    shards = data.chat_set([long, CHAT, long], tokenizer, 64)
    for step in range(3 * shards.rows(64, 0)):
        ids, targets = data.batch(shards, 1, 64, 0, step)
        assert (targets >= 0).any() and ids[0, 0] == tokenizer.special("<|bos|>")


def test_a_long_conversation_keeps_its_system_message(tokenizer):
    turns = [{"role": "user", "content": "why " * 20}, {"role": "assistant", "content": "so " * 20}] * 4
    shards = data.chat_set([[{"role": "system", "content": "Be brief."}, *turns]], tokenizer, 128)
    text = tokenizer.decode(data.batch(shards, 1, 128, 0, 0)[0][0].tolist())
    assert text.startswith("<|bos|><|user_start|>Be brief.") and 1 <= text.count("<|assistant_start|>") < 4


def test_adding_a_special_token_moves_no_id(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(str(tmp_path / "tokenizer"))
    before, hash = data.load_tokenizer(tmp_path)
    spare = next(i for i, name in enumerate(SPECIALS) if "spare" in name)
    monkeypatch.setattr(data, "SPECIALS", [*SPECIALS[:spare], "<|new|>", *SPECIALS[spare + 1 :]])
    after, hash_after = data.load_tokenizer(tmp_path)
    assert hash == hash_after and after.special("<|new|>") == before.special(SPECIALS[spare])
    assert all(after.special(n) == before.special(n) for n in SPECIALS if n != SPECIALS[spare])


def test_held_out_means_held_out():
    """Tested countries are never asked about in training, tested words and pairs of numbers never occur."""
    import rl
    import sft

    def words(texts):
        return set(re.findall(r"[A-Za-z]+", " ".join(texts)))

    texts, chats = data.demo_texts(1), data.conversations(1, sft.Config().chats)
    asked = [m["content"] for c in chats for m in c if m["role"] == "user"]
    answers = [data.text_of([m]) for c in chats for m in c if m["role"] == "assistant"]
    steps, count = rl.Config().steps, rl.Config().problems
    problems = [i["messages"][0]["content"] for step in range(steps) for i in data.Arithmetic.items("train", f"rl 1 {step}", count)]
    taught, everything = words(asked + answers), words([*texts, *asked, *answers, *problems])
    pairs = set()
    for text in [*texts, *asked, *problems]:
        numbers = map(int, re.findall(r"\d+", text.split("?")[0]))  # after the question, a text may name them again
        pairs |= {tuple(sorted(pair)) for pair in itertools.combinations(numbers, 2)}
    for seed in range(3):
        for item in data.Facts.items("test", seed, 300):
            assert item["country"] not in taught, item
        for item in data.Counting.items("test", seed, 300):
            assert item["word"] not in everything, item
        for item in data.Arithmetic.items("test", seed, 300):
            a, b = map(int, re.findall(r"\d+", item["messages"][0]["content"]))
            assert tuple(sorted((a, b))) not in pairs, item
    assert not words(text for text in texts if "?" in text) & set(data.TESTED)
    stated = " ".join(texts)
    for (country, relation), value in data.FACTS.items():
        assert country in stated and value in stated


@pytest.mark.parametrize("name", data.DEMO.split(","))
def test_graders_take_right_answers_only(name):
    task = data.TASKS[name]
    for item in task.items("train", 5, 50):
        assert task.grade(item, f"The answer is {item['answer']}.") == 1
        assert task.grade(item, "") == 0 and task.grade(item, "I do not know.") == 0
        wrong = item["answer"] + 1 if isinstance(item["answer"], int) else "Atlantis"
        assert task.grade(item, f"The answer is {wrong}.") == 0
    assert task.items("train", 5, 9) == task.items("train", 5, 9) != task.items("train", 6, 9)


def test_a_list_of_all_values_is_no_answer():
    item = data.Facts.items("test", 0, 1)[0]
    values = {v for (_, r), v in data.FACTS.items() if r == item["relation"]}
    assert data.Facts.grade(item, ", ".join(sorted(values))) == 0


def test_gsm8k_becomes_tool_calls_and_back():
    answer = "She sold 48/2 = <<48/2=24>>24 clips.\nThat is $<<24*.5=12>>12, or 1/2.\n#### 1,012"
    parts = data.Gsm8k.parts(answer)
    assert [p["type"] for p in parts] == ["text", "python", "output", "text", "python", "output", "text"]
    assert data.visible(parts) == re.sub("<<.*?>>", "", answer)
    assert (parts[1]["text"], parts[2]["text"], parts[4]["text"]) == ("48/2", "24", "24*.5")
    assert data.Gsm8k.parts("<<1+1=2>>2\n#### 2")[0] == {"type": "python", "text": "1+1"}
    assert data.Gsm8k.number(answer) == 1012 and data.Gsm8k.number("#### -3.50") == -3.5 and data.Gsm8k.number("It is 5.") is None
    item = {"answer": 1012.0}
    assert data.Gsm8k.grade(item, "so\n#### 1012") == data.Gsm8k.grade(item, "#### $1,012.00") == 1
    assert data.Gsm8k.grade(item, "1012") == data.Gsm8k.grade(item, "#### 10121") == data.Gsm8k.grade(item, "") == 0


def write_gsm8k(folder, count=20):
    """Files like GSM8K's, with sums."""
    for split, first in (("train", 0), ("test", 1000)):
        lines = ({"question": f"What is {i}+1?", "answer": f"{i}+1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(first, first + count))
        (folder / f"gsm8k_{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_gsm8k_items_and_missing_files(tmp_path):
    write_gsm8k(tmp_path)
    items = data.Gsm8k.items("test", 0, 15, str(tmp_path))
    assert items == data.Gsm8k.items("test", 0, 15, str(tmp_path)) != data.Gsm8k.items("test", 1, 15, str(tmp_path))
    assert len({i["answer"] for i in items}) == 15 and len(data.Gsm8k.items("test", 0, 100, str(tmp_path))) == 20
    with pytest.raises(SystemExit, match="--files=DIR"):
        data.Gsm8k.items("test", 0, 5, str(tmp_path / "nowhere"))
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "?", "answer": "no mark"}')
    (tmp_path / "gsm8k_test.jsonl").unlink()
    data.Gsm8k.rows.cache_clear()
    with pytest.raises(SystemExit, match="test.jsonl line 1: wanted"):
        data.Gsm8k.items("test", 0, 5, str(tmp_path))


def test_a_question_too_long_loses_its_beginning(tokenizer):
    item = {"messages": [{"role": "user", "content": "why " * 500 + "end"}]}
    ids = data.question(item, tokenizer, 64, 16)
    full, _ = data.render(item["messages"], tokenizer, reply=True)
    assert len(ids) == 48 and ids[0] == full[0] and ids[1:] == full[-47:]
    assert data.question(item, tokenizer, 64, 900)[-5:] == full[-5:] and len(data.question(item, tokenizer, 64, 900)) == 32


# -----------------------------------------------------------------------------
# Downloads, from a server here that misbehaves on demand


class Host(http.server.BaseHTTPRequestHandler):
    """Serves `files` (path: bytes) with byte ranges; `faults` is a list of (what, path's part) that are used up in turn."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def say(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        host, path = self.server, self.path.partition("?")[0]
        with host.lock:
            fault = next((f for f in host.faults if f[1] in self.path), ("", ""))
            if fault[0] and fault in host.once:
                host.faults.remove(fault)
            host.asked.append((self.path, self.headers.get("Range"), time.time()))
        match fault[0]:
            case "wait":
                return self.say(429, Retry_After="1")
            case "busy":
                return self.say(503)
            case "page":
                return self.say(200, b"<!doctype html><p>sign in", Content_Type="text/html")
            case "plain page":
                return self.say(200, b"<!doctype html><p>sign in", Content_Type="application/octet-stream")
        if host.signed and "signature" not in self.path:
            host.signatures += 1
            return self.say(302, Location=f"{self.path}?signature={host.signatures}")
        if host.signed and int(self.path.rpartition("=")[2]) < host.valid_from:
            return self.say(403)
        if path not in host.files:
            return self.say(404)
        body, total, status, headers = host.files[path], len(host.files[path]), 200, {}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span and fault[0] != "no ranges":
            first, last = int(span[1]), min(total - 1, int(span[2] or total))
            if first >= total:
                return self.say(416, Content_Range=f"bytes */{total}")
            body, status, headers = body[first : last + 1], 206, {"Content-Range": f"bytes {first}-{last}/{total}"}
            if fault[0] == "other bytes":
                headers = {"Content-Range": f"bytes {first + 7}-{last}/{total}"}
        if fault[0] == "short":  # announces less than there is
            body = body[: len(body) // 2]
        if fault[0] == "flipped":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault[0] == "unsaid":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) + 9 * (fault[0] == "long")))
        self.end_headers()
        if fault[0] in ("drop", "hang", "long"):
            self.wfile.write(body[: (len(body) + 1) // 2] if fault[0] != "long" else body)
            self.wfile.flush()
            time.sleep(3 * (fault[0] == "hang"))
            self.close_connection = True
        elif fault[0] == "slow":
            for i in range(0, len(body), 1000):
                self.wfile.write(body[i : i + 1000])
                time.sleep(0.004)
        elif fault[0] == "gate" and not host.gate.wait(100):
            self.close_connection = True
        else:
            self.wfile.write(body)


@pytest.fixture
def host():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        server.files, server.faults, server.once, server.asked, server.lock = {}, [], [], [], threading.Lock()
        server.signed, server.signatures, server.valid_from, server.daemon_threads, server.gate = False, 0, 0, True, threading.Event()
        server.handle_error = lambda *_: None  # clients that leave are no news
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.gate.set()
        server.shutdown()


def fetch(host, source, out, **knobs):
    mirror = f"http://127.0.0.1:{host.server_address[1]}"
    data.download(data.DownloadConfig(source, str(out), mirror=mirror, **{"wait": 0.002, "patience": 1, "slice_mb": 0.02, **knobs}))


def jsonl(rows):
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


@pytest.fixture(scope="session")
def climbmix():
    """100 parts in the layout of ClimbMix: sorted by topic, of unequal length, each document unlike every other."""
    rng, parts = random.Random(1), {}
    for p in range(100):
        texts = [f"part {p} row {i}: " + "é" * rng.randrange(40) for i in range(rng.randint(180, 260))]
        rows = ({"text": text, "cluster_id": i // 20, "token_count": 7} for i, text in enumerate(texts))
        parts[data.CLIMBMIX[p].replace("https:/", "")] = jsonl(rows)
    return parts


def read_texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_climbmix_shards_are_fair_mixtures(host, climbmix, tmp_path, capsys):
    host.files, host.signed = climbmix, True
    fetch(host, "climbmix", tmp_path, shards=2)
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["source.json", "train/climbmix_00000.jsonl", "train/climbmix_00001.jsonl", "val/climbmix.jsonl"]
    sets = [read_texts(tmp_path / f) for f in files[1:]]
    everything = {row["text"] for body in climbmix.values() for row in map(json.loads, body.splitlines())}
    assert not set(sets[0]) & set(sets[1]) and not set(sets[2]) & set(sets[0] + sets[1])
    for texts in sets[:2]:
        parts = [int(t.split()[1]) for t in texts]
        assert set(texts) <= everything and len(set(texts)) == len(texts) and len(set(parts)) > 95
        assert sum(a <= b for a, b in zip(parts, parts[1:])) < 0.7 * len(parts)  # not part after part
    paths = [path for path, _, _ in host.asked if "signature" not in path]
    assert len(paths) == 100  # the link that a part led to served its other slices too
    spans = [span for path, span, _ in host.asked if "part_7.jsonl?" in path]
    assert spans == ["bytes=0-326", "bytes=327-21298", "bytes=21299-42270"]
    fetch(host, "climbmix", tmp_path, shards=2)
    assert len(host.asked) == 400  # 100 of them led elsewhere; nothing is asked for twice
    host.valid_from = 10**6  # every link is refused now
    with pytest.raises(SystemExit, match="403"):
        fetch(host, "climbmix", tmp_path, shards=3, slice_mb=0.02)
    with pytest.raises(SystemExit, match="another --out=DIR"):
        fetch(host, "climbmix", tmp_path, shards=2, slice_mb=1)


def test_a_refused_link_is_asked_for_anew(host, climbmix, tmp_path):
    host.files, host.signed = climbmix, True
    fetcher = data.Fetcher(f"http://127.0.0.1:{host.server_address[1]}", 0.01, 1)
    for n in range(3):
        fetcher.fetch(data.CLIMBMIX[n // 2], tmp_path / str(n), 0, 99)
        host.valid_from = host.signatures + (n == 0)
    assert [path.partition("?")[2] for path, *_ in host.asked] == ["", "signature=1", "signature=1", "", "signature=2", "", "signature=3"]


FAULTS = ["drop", "wait", "busy", "page", "plain page", "short", "long", "other bytes", "unsaid", "flipped", "hang"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_misbehaving_host_leaves_files_whole_or_absent(fault, host, tmp_path):
    """Each fault once: the file comes all the same. For ever: one line, and no file."""
    body = gzip.compress(jsonl({"text": f"document {i}"} for i in range(2000)))
    host.files = {"/host/a.jsonl.gz": body, "/host/b.jsonl.gz": body}
    host.faults = [(fault, "a.jsonl")]
    host.once = host.faults[:]
    start = time.time()
    fetch(host, "https://host/a.jsonl.gz", tmp_path)
    assert (tmp_path / "train" / "a.jsonl.gz").read_bytes() == body and not host.faults
    assert fault != "wait" or time.time() - start > 1  # Retry-After was honoured
    if fault not in ("hang", "wait"):
        host.faults = [(fault, "b.jsonl")]
        if fault == "drop":  # each time half of the rest: that is progress, and comes to its end
            fetch(host, "https://host/b.jsonl.gz", tmp_path)
            assert (tmp_path / "train" / "b.jsonl.gz").read_bytes() == body
        else:
            with pytest.raises(SystemExit, match="https://host/b.jsonl.gz: .*goes on from there"):
                fetch(host, "https://host/b.jsonl.gz", tmp_path)
            assert not (tmp_path / "train" / "b.jsonl.gz").exists()


def test_a_hash_that_is_known_is_checked(host, tmp_path, monkeypatch):
    rows = jsonl([{"question": "1+1?", "answer": "#### 2"}])
    for name, url, _ in data.PUBLIC["gsm8k"]:
        host.files[url.replace("https:/", "")] = rows
    with pytest.raises(SystemExit, match="its sha256 is"):
        fetch(host, "gsm8k", tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))
    files = [(name, url, hashlib.sha256(rows).hexdigest()) for name, url, _ in data.PUBLIC["gsm8k"]]
    monkeypatch.setitem(data.PUBLIC, "gsm8k", files)
    fetch(host, "gsm8k", tmp_path)
    assert data.Gsm8k.items("test", 0, 5, str(tmp_path))[0]["answer"] == 2


@pytest.mark.parametrize("fault", ["no ranges", "page", "missing"])
def test_climbmix_that_is_not_as_thought_becomes_c4(fault, host, climbmix, tmp_path, capsys):
    body = gzip.compress(jsonl({"text": f"document {i}", "url": ""} for i in range(50)))
    c4 = {data.C4.format(*args).replace("https:/", ""): body for args in (("validation", 0, 8), ("train", 0, 1024), ("train", 1, 1024))}
    host.files = c4 | (climbmix if fault != "missing" else {})
    host.faults = [(fault, "ClimbMix")]
    for shards in (1, 2):
        fetch(host, "climbmix", tmp_path, shards=shards)
        printed = capsys.readouterr().out
        assert ("ClimbMix cannot be had" in printed and "taking C4 instead" in printed) == (shards == 1)
    assert sorted(p.name for p in tmp_path.rglob("*.gz")) == ["c4.jsonl.gz", "c4_00000.jsonl.gz", "c4_00001.jsonl.gz"]
    assert len(list(data.read_documents(tmp_path / "train"))) == 100


def test_a_killed_download_goes_on(host, climbmix, tmp_path):
    """SIGKILL in the middle: what is there stays, is asked for no more, and the end is as if nothing had happened."""
    host.files = climbmix
    fetch(host, "climbmix", tmp_path / "whole")
    asked, host.asked = len(host.asked), []
    mirror = f"--mirror=http://127.0.0.1:{host.server_address[1]}"
    host.faults = [("slow", "part_")]
    process = start("data.py", "download", mirror, f"--out={tmp_path / 'killed'}", "--slice_mb=0.02", printed=tmp_path / "printed")
    while len(host.asked) < 130 and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "killed" / "train" / "climbmix_00000.jsonl").exists()
    # as when it dies between a slice's file and the removal of what it was made of
    done = next(path for path in sorted((tmp_path / "killed").glob("*_train.slices/*")) if path.name.isdigit())
    done.with_name(f"{done.name}.bytes").write_bytes(done.read_bytes())
    host.faults = []
    fetch(host, "climbmix", tmp_path / "killed")
    for name in ("train/climbmix_00000.jsonl", "val/climbmix.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(host.asked) <= asked + data.FETCHERS and not [p for p in tmp_path.rglob("*") if ".part" in p.name or ".slices" in p.name]


def test_tinystories_and_the_right_words(host, tmp_path):
    for name, url, _ in data.PUBLIC["tinystories"]:
        host.files[url.replace("https:/", "")] = b"One day.\n<|endoftext|>\nAnother day.\n<|endoftext|>\n"
    fetch(host, "tinystories", tmp_path)
    assert [t.strip() for t in data.read_documents(tmp_path / "val")] == ["One day.", "Another day."]
    twice = ("https://a/x.txt,https://b/x.txt", "names of their own")
    for source, message in (("climbmax", "there is no source"), ("https://a/x.exe", "have to end in"), twice):
        with pytest.raises(SystemExit, match=message):
            fetch(host, source, tmp_path / "other")
    with pytest.raises(SystemExit, match="data.py download --source=tinystories"):
        list(data.read_documents("tinystories"))


def c4_of(texts, count):
    """`files` of a host that has C4, whose first shards are these texts in `count` parts, the first a little the shortest."""
    cuts = [0, *(len(texts) * i // count - count + i for i in range(1, count)), len(texts)]
    parts = [gzip.compress(jsonl({"text": t} for t in texts[a:b])) for a, b in itertools.pairwise(cuts)]
    val = gzip.compress(jsonl({"text": t} for t in data.demo_texts(3, "val")[:20]))
    files = {data.C4.format("train", i, 1024): part for i, part in enumerate(parts)} | {data.C4.format("validation", 0, 8): val}
    return {url.replace("https:/", ""): body for url, body in files.items()}


def until(true, seconds=60):
    end = time.time() + seconds
    while not true():
        assert time.time() < end
        time.sleep(0.02)


def test_training_starts_while_text_is_coming(host, tmp_path):
    """The first of three shards suffices to start; SIGKILL while it waits for the next; the end is as if all had been there."""
    host.files = c4_of(data.demo_texts(1)[:240], 3)
    fetch(host, "c4", tmp_path / "all", shards=3)
    knobs = [*TINY, "--steps=14", "--save_every=1"]
    of = lambda name: [f"--out={tmp_path / name}", f"--data={tmp_path / name / 'train'}", f"--val_data={tmp_path / name / 'val'}"]
    printed = run("pretrain.py", *of("all"), *knobs)[1]
    assert "waiting" not in printed and len(list((tmp_path / "all" / "data" / "train").glob("train_*.bin"))) == 3
    host.faults = [("gate", "c4-train.00001"), ("gate", "c4-train.00002")]
    mirror, text, log = f"--mirror=http://127.0.0.1:{host.server_address[1]}", tmp_path / "text", tmp_path / "log"
    download = start("data.py", "download", "--source=c4", "--shards=3", mirror, f"--out={text}", "--patience=200", printed=tmp_path / "get")
    until((text / "source.json").exists)
    train = [f"--out={tmp_path / 'out'}", f"--data={text / 'train'}", f"--val_data={text / 'val'}", *knobs]
    process = start("pretrain.py", *train, printed=log)
    until(lambda: log.exists() and "waiting for" in log.read_text() and gpt.latest(tmp_path / "out" / "base"))
    until(lambda: f"waiting for {tmp_path / 'out' / 'data' / 'train' / 'train_0001.bin'}" in log.read_text())
    assert 0 < int(gpt.latest(tmp_path / "out" / "base").name[5:]) < 14 and [p.name for p in (text / "train").glob("*.gz")] == ["c4_00000.jsonl.gz"]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    until(lambda: not data.is_locked(tmp_path / "out" / "data" / "train"), 5)  # the process beside it has ended too
    process = start("pretrain.py", *train, printed=(log := tmp_path / "log of the second"))
    until(lambda: log.exists() and "waiting for" in log.read_text())
    host.gate.set()
    process.join(100)
    download.join(10)
    assert process.exitcode == 0 and download.exitcode == 0 and "going on from step" in log.read_text(), log.read_text()
    assert same(weights(tmp_path / "out" / "base"), weights(tmp_path / "all" / "base"))
    assert losses(tmp_path / "out") == losses(tmp_path / "all")


def test_rows_do_not_depend_on_when_their_shards_come(tmp_path, tokenizer):
    """Shards that come while rows are drawn, over two epochs and on two ranks: the rows of a set that was complete."""
    bos, hash = tokenizer.special("<|bos|>"), "ab" * 32
    groups = [data.demo_texts(seed)[:40] for seed in (1, 2, 3)]
    count = data.write_shards(tmp_path / "all", "train", tokenizer, hash, groups, 1000)
    paths = sorted((tmp_path / "all").glob("*.bin"))
    sizes = [sum(len(tokenizer.encode(t)) + 1 for t in group) for group in groups]
    each = sizes[0] // -(-sizes[0] // 1000)
    assert len(paths) == sum(sizes) // each > 5 and count == each * len(paths)  # what is dropped is less than a shard
    (tmp_path / "all" / "meta.json").write_text('{"tokens": 1}')
    (tmp_path / "slow").mkdir()
    shutil.copy(paths[0], tmp_path / "slow")

    def bring():
        for path in [*paths[1:], tmp_path / "all" / "meta.json"]:
            time.sleep(0.05)
            data.write_whole(tmp_path / "slow" / path.name, path.read_bytes())

    whole, said = data.Coming(tmp_path / "all", hash, bos, None), []
    rows = whole.rows(32, 0)
    with open(tmp_path / "slow" / ".lock", "w") as held, ThreadPoolExecutor() as pool:
        fcntl.flock(held, fcntl.LOCK_EX)
        brought = pool.submit(bring)
        slow = [data.Coming(tmp_path / "slow", hash, bos, said.append) for _ in range(2)]
        for step in range(2 * rows * len(paths) // 8 + 3):
            want = data.batch(whole, 8, 32, 0, step)[0]
            assert torch.equal(torch.cat([data.batch(slow[r], 8, 32, 0, step, r, 2)[0] for r in range(2)]), want)
        brought.result()
    assert said and all(re.search("waiting for .*/slow/train_000.[.]bin", line) for line in said)
    assert whole.place(rows * len(paths) + 1, 32, 0) == (1, 1)
    first = [whole.row(0, i * rows, 32, 0)[0].tolist() for i in range(len(paths))]
    tokens = [np.asarray(data.open_shard(path, hash)).tolist() for path in paths]
    contains = lambda all, part: any(all[i : i + len(part)] == part for i in range(len(all)))
    assert all(contains(t, row[1 : row.index(bos, 1) if bos in row[1:] else None]) for t, row in zip(tokens, first))  # in order


def test_little_is_left_of_several_files(tmp_path, tokenizer):
    """The second file is a little shorter than the first, and no shard of the first's length can be made of it."""
    text = "one two three four five six seven. " * 1000
    size = len(tokenizer.encode(text)) + 1
    groups = [[text] * (450_000 // size), [text] * (440_000 // size)]
    count = data.write_shards(tmp_path, "train", tokenizer, "00" * 32, groups, several=True)
    total = sum(len(g) for g in groups) * size
    assert total - 131_072 < count <= total and len({p.stat().st_size for p in tmp_path.glob("train_*.bin")}) == 1
    assert len(list(tmp_path.glob("train_*.bin"))) > 4


def test_what_never_comes_is_given_up(host, tmp_path, monkeypatch):
    """A download that has died is told of, with the command that goes on; one that is at work is waited for, however long."""
    monkeypatch.setattr(data, "ABSENT", 0.3)
    host.files = {path: body for path, body in c4_of(data.demo_texts(1)[:90], 3).items() if "train.00001" not in path}
    with pytest.raises(SystemExit, match="c4-train.00001-of-01024.json.gz answers 404"):
        fetch(host, "c4", tmp_path, shards=3)
    cfg = data.PrepareConfig(str(tmp_path / "out"), data=str(tmp_path / "train"), vocab_size=400)
    command = f"python data.py download --source=c4 --shards=3 --out={tmp_path}"
    assert [f.name for f in data.planned(tmp_path / "train")] == [f"c4_{i:05}.jsonl.gz" for i in range(3)]
    with pytest.raises(SystemExit, match=f"all text, to hold out .* is not there.*{command}"):
        data.prepare(cfg, CPU)
    file, start = tmp_path / "train" / "c4_00001.jsonl.gz", time.time()
    with pytest.raises(SystemExit, match=f"{file} is not there, and nobody has worked on it for 0.3 s: `{command}"):
        data.wait_for_download(tmp_path / "train", file.exists, file)
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        threading.Timer(1, lambda: file.write_bytes(b"")).start()
        data.wait_for_download(tmp_path / "train", file.exists, file)
    assert 1.2 < time.time() - start < 5
    assert data.planned(tmp_path) == data.planned(file) == []
    (tmp_path / "train" / "d4.jsonl.part").touch()
    (tmp_path / "train" / "by_hand.txt").touch()
    assert [f.name for f in data.planned(tmp_path / "train")] == ["by_hand.txt", *(f"c4_{i:05}.jsonl.gz" for i in range(3))]


def empty_recipe(folder, stages, gpus=0):
    """run.sh in a folder where the packages and the stages are words, all but those given."""
    shutil.copy(HERE / "run.sh", folder)
    files = {name: "" for name in ("tok.rs", "Cargo.toml", "Cargo.lock", "pyproject.toml", "numpy.py", "requests.py", "pytest.py")}
    files |= {f"{name}.py": f"import sys\nprint('{name}', *sys.argv[1:])" for name in ("data", "pretrain", "evals", "sft", "rl")}
    files |= {"torch.py": f"class cuda: device_count = lambda: {gpus}", ".venv/bin/activate": f"PATH={folder}/.venv/bin:$PATH"}
    files |= {".venv/bin/pip": "#!/bin/sh", ".venv/bin/python": f'#!/bin/sh\nexec "{sys.executable}" "$@"'}
    files[".venv/tok.sum"] = subprocess.run(["cksum"], input="", capture_output=True, text=True).stdout
    for name, text in (files | stages).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name in ("pip", "python"):
        (folder / ".venv/bin" / name).chmod(0o755)


def test_run_sh_sizes_the_model_by_what_there_is_to_read(tmp_path):
    """The speedrun's depth and horizon are for its own text; a text of one's own may be small, and takes a depth that is named."""
    speedrun = "print('pretrain', *sys.argv[1:])\nif '--plan=here' in sys.argv: print('computed; text: 7 shards')"
    coming = "p = pathlib.Path('out/text'); p.mkdir(parents=True, exist_ok=True); p.joinpath('source.json').write_text('{}')"
    empty_recipe(tmp_path, {"pretrain.py": f"import sys\n{speedrun}", "data.py": f"import pathlib, sys\nprint(*sys.argv[1:])\n{coming}"}, gpus=1)
    (tmp_path / "mine.txt").write_text("text")

    def trained(**environment):
        done = subprocess.run(["bash", "run.sh"], cwd=tmp_path, env={**os.environ, "OUT": "out", **environment}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith("pretrain") and "--plan" not in line][0]

    own = trained(DATA="mine.txt")
    assert f"--data={tmp_path}/mine.txt" in own and "--depth=12" in own and "--horizon" not in own
    assert "--depth=0 --hours=1" in trained(HOURS="1")
    assert "--shards=7" in (tmp_path / "out" / "download.log").read_text()
    assert "--depth=24" in trained(DATA="c4", DEPTH="24")
    assert "--shards=14" in (tmp_path / "out" / "download.log").read_text()
    assert "--depth=3" in trained(DATA="demo")


@pytest.mark.parametrize("end", ["done", "needless", "failed later", "failed at once", "interrupted"])
def test_run_sh_joins_the_download(end, tmp_path):
    """run.sh itself, with words in place of the stages: training begins beside the download, and neither outlives the other's use."""
    stages = {}
    ends = {"done": "print('all there')", "needless": "time.sleep(60)", "interrupted": "time.sleep(60)"}.get(end, "sys.exit('the host is gone')")
    stages["data.py"] = f"""
import os, pathlib, sys, time
print("fetching", sys.argv, flush=True)
if {end!r} == "failed at once":
    {ends}
time.sleep(1)
pathlib.Path("out/text").mkdir(parents=True)
pathlib.Path("out/text/source.json").write_text("{{}}")
pathlib.Path("loader").write_text(str(os.getpid()))
while not os.path.exists("training"):
    time.sleep(0.05)
{ends}"""
    stages["pretrain.py"] = f"""
import os, sys, time
open("training", "w")
print("training", *sys.argv[1:], flush=True)
time.sleep({30 if end == "interrupted" else 1})"""
    empty_recipe(tmp_path, stages)
    environment = {**os.environ, "DATA": "c4", "SHARDS": "3", "OUT": "out", "MIRROR": "http://here"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background inherit that Ctrl-C is ignored
    process = subprocess.Popen(["bash", tmp_path / "run.sh"], env=environment, preexec_fn=listen, **pipes)
    if end == "interrupted":
        until((tmp_path / "training").exists)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    printed, log = process.communicate(timeout=25)[0], (tmp_path / "out" / "download.log").read_text()
    assert "fetching ['data.py', 'download', '--source=c4', '--shards=3', '--mirror=http://here', '--out=out/text']" in log
    assert (process.returncode == 0) == ("done: the report" in printed) == (end not in ("failed at once", "interrupted"))
    assert ("training --out=out --data=out/text/train --val_data=out/text/val" in printed) == (end != "failed at once")
    assert ("the download is not complete" in printed) == (end != "done") and ("host is gone" in printed) == ("failed" in end), printed
    if end != "failed at once":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "loader").read_text()), 0)


def test_documents_in_a_text_longer_than_a_block(tmp_path):
    texts = ["a" * 5_000_000, "b\n" * 3_000_000, "c", "d" * 100 + "\n"]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    assert list(data.read_documents(tmp_path)) == texts


def test_cleaning_finds_what_was_planted(tmp_path, tokenizer, capsys):
    """A duplicate, an evaluation item in other clothes, and junk of each kind; what is dropped is counted and shown."""
    rng = random.Random(4)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(3000)]
    written = lambda n: " ".join(rng.choices(vocabulary, k=n)) + "."
    good = [written(rng.randint(40, 200)) for _ in range(300)]
    item, other = written(20), written(20)
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "a.jsonl").write_bytes(jsonl([{"query": item, "choices": ["a", "b"]}]))
    (tmp_path / "task" / "b.csv").write_text(f'{other},"x",y\n')
    loud = ", ".join(item.upper().split()[2:15])
    planted = {
        "evaluation": [f"{written(60)} {loud} {written(60)}", f"{written(50)} {other}"],
        "duplicate": [good[7], good[200]],
        "repetition": ["buy it now and here " * 50, "\n".join([written(9), written(30)] * 3)],
        "symbols": ["<%$#@!> " * 40 + written(20)],
        "length": ["too short", "long " * 300_000],
    }
    almost = [f"{written(40)} {' '.join(item.split()[2:14])} {written(40)}", f"{good[7]} "]  # 12 words; another text
    documents = good + almost + [text for texts in planted.values() for text in texts]
    cleaner = data.Cleaner(str(tmp_path / "task"))
    for size in (10**4, 10**9):
        cleaner = data.Cleaner(str(tmp_path / "task"))
        assert sorted(cleaner.clean(iter(documents), size)) == sorted(good + almost)
        assert cleaner.dropped == {rule: len(planted[rule]) for rule in data.RULES if rule != "near"} | {"near": 0} and cleaner.kept == 302
    (tmp_path / "text.jsonl").write_bytes(jsonl({"text": text} for text in documents))
    (tmp_path / "val.txt").write_text(good[0])
    tokenizer.save(str(tmp_path / "out" / "tokenizer"))
    cfg = data.PrepareConfig(str(tmp_path / "out"), data=str(tmp_path / "text.jsonl"), val_data=str(tmp_path / "val.txt"))
    cfg.clean, cfg.evaluations = True, str(tmp_path / "task")
    train = data.prepare(cfg, CPU)[2]
    assert (np.concatenate(train.arrays) == tokenizer.special("<|bos|>")).sum() == 302
    evals.record(tmp_path / "out", CPU, "base", {"bpb": 1.0})
    page, printed = (tmp_path / "out" / "report.html").read_text(), capsys.readouterr().out
    assert "302 documents kept" in page and "&lt;%$#@!&gt;" in page and "302 of 311 documents kept" in printed and "| too short" in printed
    assert all(re.search(rf"{rule} +{len(texts)} dropped", printed) for rule, texts in planted.items())
    cfg.near_duplicates = True
    with pytest.raises(SystemExit, match="choose another --out=DIR"):
        data.prepare(cfg, CPU)
    cfg.clean = False
    with pytest.raises(SystemExit, match="add --clean=1"):
        data.prepare(cfg, CPU)
    cfg.evaluations, cfg.near_duplicates = "", False
    with pytest.raises(SystemExit, match="choose another --out=DIR"):
        data.prepare(cfg, CPU)


def sets_of_similarity(rng, share, size, pairs):
    """(numbers, owner) of `pairs` sets, and of another for each that has this Jaccard similarity with it."""
    common = round(size * 2 * share / (1 + share))
    pool = rng.integers(0, 2**63, (pairs, 2 * size), dtype=np.uint64)
    twins = np.concatenate([pool[:, :size], pool[:, size - common : 2 * size - common]])
    return twins.ravel(), np.repeat(np.arange(2 * pairs), size), common / (2 * size - common)


@pytest.mark.parametrize("size", [15, 90, 3000])
def test_sketches_agree_as_the_sets_do(size):
    """The mean is the similarity, and the error is that of 128 hashes (or less), however few numbers a set has."""
    for share in (0.3, 0.8):
        runs, owner, similarity = sets_of_similarity(np.random.default_rng(size), share, size, 200)
        sketches = data.sketch(runs, owner, 400)
        agree = (sketches[:200] == sketches[200:]).mean(1)
        spread = math.sqrt(similarity * (1 - similarity) / 128)
        assert abs(agree.mean() - similarity) < 4 * spread / math.sqrt(200) + 0.004 and agree.std() < 1.25 * spread


def test_near_duplicates_are_found_as_often_as_said():
    for share, least, most in ((0.7, 0, 0.02), (0.8, 0.4, 0.6), (0.85, 0.88, 0.97), (0.9, 0.99, 1)):
        runs, owner, similarity = sets_of_similarity(np.random.default_rng(3), share, 1000, 400)
        near = data.Recent().add(data.sketch(runs, owner, 800))
        assert abs(similarity - share) < 0.002 and not near[:400].any() and least <= near[400:].mean() <= most


def test_the_window_of_near_duplicates_is_bounded(monkeypatch):
    """What lies further back than the window is forgotten; how documents are cut into calls makes no difference."""
    assert sum(a.nbytes for a in (data.Recent().sketches, data.Recent().last)) < 257 * 2**20
    monkeypatch.setattr(data.Recent, "WINDOW", 50)
    monkeypatch.setattr(data.Recent, "PART", 16)
    sketches = np.random.default_rng(0).integers(0, 256, (400, 128), dtype=np.uint8)
    sketches[200:220] = sketches[150:170]  # 50 back
    sketches[265:275] = sketches[220:230]  # 45 back
    sketches[351:] = sketches[300:349]  # 51 back
    sketches[7] = sketches[6]
    for cuts in ([], range(400), [3, 140, 200, 260]):
        recent = data.Recent()
        near = np.concatenate([recent.add(part) for part in np.split(sketches, cuts)])
        assert near.nonzero()[0].tolist() == [7, *range(200, 220), *range(265, 275)]


def test_near_duplicates_are_dropped_where_asked(tmp_path):
    rng = random.Random(5)
    words = lambda n: [f"{rng.choice('bcdfgk')}{rng.choice('aeiou')}{rng.randrange(9999)}" for _ in range(n)]
    texts = [words(20 if i < 10 else rng.randint(20, 400)) for i in range(300)]
    long = words(300)
    other = long[:50] + words(20) + long[50:]  # of similarity 0.91
    short = [*texts[0][:10], "so", *texts[0][11:]]  # one word in 20, and 5 of 16 runs are others
    wordless = ["".join(rng.choices("abcdefghijklmnop", k=200)) for _ in range(2)]
    documents = [" ".join(t) for t in [*texts, long, short, other]]
    documents += [", ".join(texts[7]).upper(), *wordless]
    for size in (2000, 10**7):
        cleaner = data.Cleaner(near=True)
        assert list(cleaner.clean(documents, size)) == [d for i, d in enumerate(documents) if i not in (302, 303)]
        assert cleaner.dropped["near"] == 2 and [e[:20] for e in cleaner.examples["near"]] == [documents[i][:20] for i in (302, 303)]
    assert list(data.Cleaner().clean(documents)) == documents
    (tmp_path / "item.jsonl").write_bytes(jsonl([" ".join(long[100:113])]))
    almost = " ".join([*long[:106], "so", *long[107:]])  # what was dropped itself drops nothing else
    assert list(data.Cleaner(str(tmp_path), near=True).clean([" ".join(long), almost])) == [almost]
    assert data.word_numbers([b"One two", b"", b"TWO"])[0].tolist() == [zlib.crc32(w) for w in (b"one", b"two", b"two")]  # in any process


def test_a_set_of_numbers_takes_16_bytes_each():
    rng, seen, known = np.random.default_rng(0), data.Seen(), set()
    for n in [1, 1, 1000, 3, 70_000, 5000, 5000, 200_000, 7]:
        numbers = rng.integers(0, 150_000, n, dtype=np.uint64)
        want = [not (x in known or known.add(x)) for x in numbers.tolist()]
        assert seen.add(numbers).tolist() == want
        assert sum(level.nbytes for level in seen.levels) == 8 * len(known)
    assert len(seen.levels) < 20
    many = data.Seen()
    tracemalloc.start()
    for i in range(64):
        many.add(rng.integers(0, 2**63, 2**14, dtype=np.uint64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20 + 2**20  # and what one batch needs


# -----------------------------------------------------------------------------
# Engine


@pytest.fixture(scope="session")
def chatty(tokenizer):
    """A model over the tests' tokenizer whose next token depends on the whole text before it."""
    return small(vocab_size=tokenizer.vocab_size, seq_len=96)


def uncached(model, request):
    """The greedy continuation of a request by full forward passes."""
    ids = list(request.prompt)
    for _ in request.ids:
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(request.prompt) :]


@torch.inference_mode()
def test_engine_equals_uncached(chatty, tokenizer):
    engine = Engine(chatty, tokenizer, 3)  # fewer slots than requests: some wait, and slots are used again
    prompts = [torch.randint(600, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 2, 40, 7, 23, 7)]
    for request in engine.generate(prompts, Params(max_tokens=20, tools=False)):
        assert request.ids == uncached(chatty, request) and len(request.logprobs) == len(request.ids)


def tokens_filled(engine):
    """A list that grows by the size of each forward that reads prompts."""
    engine.admit()
    filled, forward = [], engine.reader.forward

    def counted(ids, *args, fill=False, **kwargs):
        if fill:
            filled.append(ids.numel())
        return forward(ids, *args, fill=fill, **kwargs)

    engine.reader.forward = counted
    return filled


def test_engine_reads_a_common_beginning_once(chatty, tokenizer):
    rng = torch.Generator().manual_seed(5)
    first, second, other = (torch.randint(600, (n,), generator=rng).tolist() for n in (60, 50, 40))
    engine, params = Engine(chatty, tokenizer, 3), Params(max_tokens=8, tools=False)
    filled = tokens_filled(engine)
    request = engine.generate([first], params)[0]
    assert sum(filled) == 59
    engine.generate([other, second], params)  # do not cost the first its place
    filled.clear()
    turn = engine.generate([first + request.ids + [7, 8, 9]], params)[0]  # a chat's second turn
    assert sum(filled) <= 4
    filled.clear()
    fork = engine.generate([first[:30] + other], params)[0]  # goes on differently
    assert sum(filled) <= 40
    filled.clear()
    fresh = torch.randint(600, (64,), generator=rng).tolist()
    alike = engine.generate([fresh, fresh, fresh[:50] + [1, 2]], params)  # at the same time
    assert sum(filled) <= 66
    for request in (request, turn, fork, *alike):
        assert request.ids == uncached(chatty, request)


def test_engine_forgets_what_it_read_when_the_model_learns(chatty, tokenizer):
    model, params, prompt = copy.deepcopy(chatty), Params(max_tokens=8, tools=False), list(range(40, 80))
    engine = Engine(model, tokenizer, 2)
    engine.generate([prompt], params)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    request = engine.generate([prompt], params)[0]
    assert request.ids == uncached(model, request)


def test_engine_converts_the_weights_of_a_model_in_training(tokenizer):
    """fp32 weights that multiply in bf16: what the engine reads with is the model of that moment, bit for bit."""
    model, ids = small(vocab_size=tokenizer.vocab_size), torch.arange(20).view(1, 20)
    model.dtype = torch.bfloat16
    engine = Engine(model, tokenizer, 2)
    for _ in range(2):
        engine.generate([list(range(30))], Params(max_tokens=2))
        assert engine.reader.embed.weight.dtype == torch.bfloat16 and model.embed.weight.dtype == torch.float32
        with torch.no_grad():
            assert torch.equal(engine.reader(ids), model(ids))
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
            assert not torch.equal(engine.reader(ids), model(ids))


def test_recorded_steps_give_the_same_tokens(chatty, tokenizer, monkeypatch):
    """What CUDA graphs demand, here with a recording that only repeats the call: inputs and results that stay in place,
    few shapes, idle rows that harm nobody's cache, and nothing of old weights."""
    shapes, model = [], copy.deepcopy(chatty)

    def record(run):
        shapes.append((engine.cache.span, len(run())))
        result = run()
        return lambda: result.copy_(run()), result

    monkeypatch.setattr(sample, "record", record)
    rng = random.Random(3)
    prompts = [[rng.randrange(600) for _ in range(n)] for n in (50, 40, 30, 20, 15, 25, 35)]
    engine, params = Engine(model, tokenizer, 4), Params(max_tokens=12, tools=False)
    engine.recording = True
    for _ in range(2):
        requests = engine.generate(prompts[:4], params)
        requests += [engine.submit(p, params) for p in prompts[4:]]  # three run, and beside them lies an idle slot
        for _ in range(4):
            engine.step()
        kept = next(r.prompt for r in requests if r.prompt + r.ids[:-1] == engine.held[3])
        requests.append(engine.generate([kept + [1, 2, 3]], params)[0])
        assert engine.reused >= len(kept) and all(r.finish for r in requests)
        for request in requests:
            assert request.ids == uncached(model, request)
        assert len(shapes) == len(set(shapes)) and {rows for _, rows in shapes} <= {1, 2, 4}
        shapes.clear()
        engine.reused = 0
        with torch.no_grad():
            model.unembed.weight.add_(0.05 * torch.randn(model.unembed.weight.shape, generator=torch.Generator().manual_seed(1)))
            model.embed.weight.mul_(1)  # what tells the engine


def test_engine_reads_long_prompts_between_the_steps_of_others(chatty, tokenizer):
    engine, rng = Engine(chatty, tokenizer, 4), torch.Generator().manual_seed(6)
    engine.chunk, length = 128, engine.cache.length
    short, long = engine.submit([3, 4, 5], Params(max_tokens=40, tools=False)), []
    engine.step()
    filled = tokens_filled(engine)
    for batch in ((1, 1), (3,), (40, 5, 9)):
        long += [engine.submit(torch.randint(600, (length - left,), generator=rng).tolist(), Params(tools=False)) for left in batch]
        before = len(short.ids)
        engine.step()
        assert len(short.ids) == before + 1  # never kept waiting
        if batch == (1, 1):
            engine.cancel(long.pop())  # the next one to read has far to go, and the one before little
    assert max(filled) == 128
    while not all(r.finish for r in (short, *long)):
        engine.step()
    assert max(filled) <= 128
    for request in (short, *long):
        assert request.ids == uncached(chatty, request)


def test_a_request_does_not_depend_on_its_neighbours(chatty, tokenizer):
    prompts = [list(range(5 + 3 * i)) for i in range(5)]
    params = [Params(max_tokens=15 + i, temperature=1.0, top_k=20 * (i % 2), top_p=0.9 if i % 3 else 1.0, seed=i) for i in range(5)]
    together = Engine(chatty, tokenizer, 4).generate(prompts, params)
    for prompt, p, request in zip(prompts, params, together):
        assert Engine(chatty, tokenizer, 1).generate([prompt], p)[0].ids == request.ids


def test_samples_of_one_prompt_differ_and_follow_the_distribution(chatty, tokenizer):
    flat = [Params(max_tokens=1, temperature=1.0, seed=s) for s in range(64)]
    assert len({r.ids[0] for r in Engine(chatty, tokenizer, 64).generate([[1, 2, 3]] * 64, flat)}) > 1
    draws = [uniform(seed, 7) for seed in range(4000)]
    assert abs(np.mean(draws) - 0.5) < 0.02 and abs(np.mean(np.array(draws) < 0.1) - 0.1) < 0.02
    assert abs(np.corrcoef(draws, [uniform(seed, 8) for seed in range(4000)])[0, 1]) < 0.06


def test_top_k_and_top_p(chatty, tokenizer):
    with torch.inference_mode():
        order = chatty(torch.tensor([[1, 2, 3]]))[0, -1].argsort(descending=True).tolist()
    engine = Engine(chatty, tokenizer, 32)
    for params, allowed in ((dict(top_k=3), order[:3]), (dict(top_p=1e-9), order[:1])):
        params = [Params(max_tokens=1, temperature=2.0, seed=s, **params) for s in range(32)]
        assert {r.ids[0] for r in engine.generate([[1, 2, 3]] * 32, params)} <= set(allowed)


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.7, 20)])
def test_recorded_logprob_equals_scored(chatty, tokenizer, temperature, top_k):
    params = Params(max_tokens=12, temperature=temperature, top_k=top_k, seed=3, tools=False)
    request = Engine(chatty, tokenizer, 2).generate([[5, 6, 7]], params)[0]
    ids = torch.tensor(request.prompt + request.ids)
    scored = torch.log_softmax(chatty(ids[None, :-1])[0, 2:] / temperature, -1).gather(1, ids[3:, None])[:, 0]
    assert (scored - torch.tensor(request.logprobs)).abs().max() < 1e-4


def test_likeliest_tokens_and_score(chatty, tokenizer):
    engine = Engine(chatty, tokenizer, 2)
    greedy, sampled = (Params(max_tokens=8, temperature=t, seed=3, top_logprobs=n, tools=False) for t, n in ((0.0, 3), (1.0, 1)))
    for request in engine.generate([[5, 6, 7], [8]], [greedy, sampled]):
        logprobs, tops = engine.score(request.prompt + request.ids, 3)
        assert logprobs[0] is None and tops[0] == []
        for id, logprob, top, scored, ranked in zip(*(x[::-1] for x in (request.ids, request.logprobs, request.tops, logprobs, tops))):
            assert abs(logprob - scored) < 1e-4 and [i for i, _ in top] == [i for i, _ in ranked][: request.params.top_logprobs]
            assert request.params.temperature or top[0] == (id, logprob)
    for ids in ([], [1] * 97):
        with pytest.raises(ValueError):
            engine.score(ids)


class Scripted(torch.nn.Module):
    """Stands in for a model: says what the script says, whatever it reads."""

    def __init__(self, cfg, script, prompt):
        super().__init__()
        self.cfg, self.dtype, self.script, self.prompt = cfg, torch.float32, script, prompt
        self.embed = torch.nn.Embedding(1, 1)

    def for_reading(self):
        return self

    def forward(self, ids, cache=None, pos=None, fill=False):
        logits = torch.zeros(*ids.shape, self.cfg.vocab_size)
        for b, p in enumerate(pos.tolist()):
            at = p + ids.size(1) - self.prompt
            logits[b, -1, self.script[at] if 0 <= at < len(self.script) else 0] = 9.0
        return logits


def test_tool_call_is_run_and_read(tokenizer):
    s = tokenizer.special
    tail = [*tokenizer.encode("Three."), s("<|assistant_end|>")]
    call = [s("<|python_start|>"), *tokenizer.encode(' "strawberry".count("r")'), s("<|python_end|>")]
    script = call + [0, 0, 0] + tail  # the three tokens of the output are forced, whatever the model would say
    cfg = GPTConfig(tokenizer.vocab_size, 96, 1, 64, 1, 1)
    request = Engine(Scripted(cfg, script, 2), tokenizer, 2).generate([[1, 2]], Params(max_tokens=60))[0]
    assert data.parse(request.ids, tokenizer)[1] == {"type": "output", "text": "3"} and request.finish == "stop"
    assert data.visible(data.parse(request.ids, tokenizer)) == "Three."
    assert request.sampled == [True] * len(call) + [False] * 3 + [True] * len(tail)
    assert "".join(t for k, t in Stream(tokenizer).new(request.ids) if k == "text") == "Three."


def test_stream_never_shows_half_a_character(tokenizer):
    stream, shown, ids = Stream(tokenizer), [], []
    for id in tokenizer.encode("né 你好"):
        ids.append(id)
        shown += [t for _, t in stream.new(ids)]
    assert "".join(shown) == "né 你好" and "\ufffd" not in "".join(shown)


@pytest.mark.parametrize(
    "expression, value",
    [("1+2*3", "7"), ("84/12", "7"), ("7/2", "3.5"), ("2**10", "1024"), ("-(3-5)", "2"), ("7//2 + 7%2", "4")]
    + [('"aabb".count("b")', "2"), (" 6*7", "42")],
)
def test_calculator(expression, value):
    assert calculate(expression) == value


ESCAPES = """__import__('os').system('true')|().__class__.__bases__[0]|"a".__class__|open("/etc/passwd")|9**9**9|2**100000|(-8)**0.5
"a"*999999999|"{0.__class__}".format(1)|"a".count("a", 0)|"a".count(x="a")|[1][0]|lambda: 1|x|1 if 1 else 2|f"{1}"|10**15*10**15|1/0
"abc".count(1)|1 .count("a")|1e308*10|True+1|"a".join("b")|exec("1")|0**-1|1<2|~1|1j*1j|(1).__add__(2)||""".replace("\n", "|").split("|")


def test_calculator_refuses_escapes_fast():
    start = time.time()
    for expression in [*ESCAPES, "(" * 150 + "1" + ")" * 150, "-" * 190 + "1" + "+1" * 200, "9" * 201, "((((" * 40]:
        assert calculate(expression) == "error", expression
    assert time.time() - start < 1


def test_calculator_runs_in_threads():
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(calculate, ["6*7", "1/0"] * 20)) == ["42", "error"] * 20


def test_engine_refuses_what_it_cannot_read(chatty, tokenizer):
    engine = Engine(chatty, tokenizer, 1)
    for prompt in ([], [1] * 96):
        with pytest.raises(ValueError):
            engine.submit(prompt, Params())
    full = engine.generate([[1] * 95], Params(max_tokens=50))[0]
    assert full.finish in ("length", "stop") and len(full.ids) == 1
    request = engine.submit([1, 2], Params(max_tokens=50))
    engine.step()
    engine.cancel(request)
    assert engine.step() is False


# -----------------------------------------------------------------------------
# Evaluations


def test_bits_per_byte_counts_bytes_not_tokens(tokenizer):
    model = GPT(GPTConfig(tokenizer.vocab_size, 64, 1, 64, 1, 1)).init(1)
    with torch.no_grad():
        model.unembed.weight.zero_()  # every token equally likely: log2(V) bits each
    texts = ["Hello there, 你好.", "one two three " * 40]
    ids = np.concatenate([[tokenizer.special("<|bos|>"), *tokenizer.encode(t)] for t in texts])
    val = data.TokenSet([ids], tokenizer.special("<|bos|>"), whole=True)
    tokens, size = sum(len(tokenizer.encode(t)) for t in texts), sum(len(t.encode()) for t in texts)
    want = tokens * math.log2(tokenizer.vocab_size) / size
    assert abs(evals.bits_per_byte(model, tokenizer, val, CPU) - want) < 1e-4
    assert abs(evals.bits_per_byte(model, tokenizer, val, CPU, micro_rows=3) - want) < 1e-4
    gradients = []  # whoever validates while training must not pay for activations
    model.register_forward_hook(lambda module, inputs, output: gradients.append(output.requires_grad))
    evals.bits_per_byte(model, tokenizer, val, CPU)
    assert gradients and not any(gradients)


def test_report_escapes_and_stands_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"stage": "base", "step": i, "seconds": i, "loss": 5 - i}) + "\n" for i in range(4)))
    evals.record(tmp_path, CPU, "base", {"bpb": 1.25, "accuracy/facts": 0.5, "n/facts": 10}, 60, {"facts": [("<script>?", "<b>", "x", 1.0)]})
    page, report = (tmp_path / "report.html").read_text(), json.loads((tmp_path / "report.json").read_text())
    assert "<script" not in page and "&lt;script&gt;?" in page and "<polyline" in page and "http" not in page
    assert report["stages"]["base"] == {"bpb": 1.25, "accuracy/facts": 0.5, "n/facts": 10} and report["seconds"]["base"] == 60


def write_run(folder, share, n, lr, name="<i>"):
    """A run's folder as the stages leave it, without weights: (folder)."""
    (folder / "sft" / "step_000002").mkdir(parents=True)
    (folder / "sft" / "step_000002" / "state.json").write_text(json.dumps({"config": {"lr": lr, "out": str(folder)}, "model": {"depth": 2}}))
    lines = ({"stage": "sft", "step": i, "seconds": i, "loss": 5 - i * lr, f"accuracy/{name}": i / 9} for i in range(4))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    machine = dataclasses.replace(CPU, world=2, threads=3)
    evals.record(folder, machine, "sft", {f"accuracy/{name}": share, f"n/{name}": n, "CORE": 0.2, "ci/CORE": 0.05, "bpb": 1.5}, 1800)
    return str(folder)


def test_report_shows_intervals_and_cost(tmp_path):
    page = Path(write_run(tmp_path, 0.9, 10, 1.0), "report.html").read_text()
    assert "90.0% <small>59.6% to 98.2% of 10</small>" in page and "0.2 <small>0.1500 to 0.2500</small>" in page and "1.5 <small></small>" in page
    assert "3 CPU-hours" in page and ">ci/CORE<" not in page  # half an hour of two processes with three cores each


def test_runs_are_compared(tmp_path, capsys):
    runs = [write_run(tmp_path / "a", 0.7, 100, 0.5), write_run(tmp_path / "b<c", 0.8, 80, 1.0), write_run(tmp_path / "c", 0.9, 10, 1.0)]
    page = tmp_path / "page.html"
    evals.main(["compare", *runs[:2], f"--out={page}"])
    printed, text = capsys.readouterr().out, page.read_text()
    low, high = evals.wilson(0.8, 80)
    assert f"80.0% ({low:.1%} to {high:.1%}, n=80)" in printed and "3 CPU-hours" in printed
    gap, below, above = evals.difference({"accuracy/x": 56 / 70, "n/x": 70}, {"accuracy/x": 48 / 80, "n/x": 80}, "accuracy/x")
    assert (-gap, -above, -below) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)  # the example in Newcombe's paper
    found = evals.difference({"accuracy/x": 0.7, "n/x": 100}, {"accuracy/x": 0.8, "n/x": 80}, "accuracy/x")
    assert "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * v for v in found)) in printed and "+0.0000 (-0.0707 to +0.0707)" in printed
    assert re.search(r"sft lr +0\.5 +1\.0\n", printed) and "sft out" not in printed and "sft depth" not in printed
    assert "<i>" not in text and "b<c" not in text and "b&lt;c" in text and "http" not in text and "<script" not in text
    figure = re.search(r"<svg.*?loss \(nats", text, re.DOTALL)[0]
    (one, other), colors = re.findall('points="(.*?)"', figure), re.findall("stroke:(#.*?)\"", figure)
    assert one != other and len(set(colors)) == 2 and one.split()[0] == other.split()[0]  # both begin at the same loss, on one scale
    assert all(f"color:{color}" in text.split("<h2>")[0] for color in colors)  # the legend
    evals.main(["compare", *runs, f"--out={page}"])
    assert "difference" not in capsys.readouterr().out.split("95%")[0] and page.read_text().count("<polyline") == 6
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "report.json").write_text("[]")
    for folders, message in (([], "two or more"), (runs[:1], "two or more"), ([runs[0], "nowhere"], "no nowhere"), ([runs[0], tmp_path / "empty"], "empty holds no run"), ([runs[0], tmp_path / "odd"], "is no report")):
        with pytest.raises(SystemExit, match=message):
            evals.main(["compare", *map(str, folders)])


def test_multiple_choice_from_its_files(tmp_path):
    own = {"id": "1", "question": {"stem": "Why?", "choices": [{"text": t, "label": n} for t, n in zip("uvw", "123")]}, "answerKey": "2"}
    (tmp_path / "ARC-Challenge-Test.jsonl").write_bytes(jsonl([own]))
    (tmp_path / "eval_data" / "world_knowledge").mkdir(parents=True)
    bundled = {"query": "Question: Why?", "choices": ["u", "v", "w"], "gold": 1}
    (tmp_path / "eval_data" / "world_knowledge" / "arc_easy.jsonl").write_bytes(jsonl([bundled]))
    (tmp_path / "data" / "test").mkdir(parents=True)
    (tmp_path / "data" / "test" / "law_test.csv").write_text('Why?,u,v,w,"x, y",B\n"a ""b"" c",1,2,3,4,D\n')
    (challenge,), (easy,) = (data.TASKS[name].items("test", 0, 9, str(tmp_path)) for name in ("arc_challenge", "arc_easy"))
    assert challenge == easy and easy["answer"] == "B" and easy["letters"] == "ABC"
    assert easy["messages"][0]["content"].startswith("Why?\nA. u\nB. v\nC. w\n")
    law = sorted(data.Mmlu.items("test", 0, 9, str(tmp_path)), key=lambda item: item["answer"])
    assert [item["answer"] for item in law] == ["B", "D"] and "D. x, y" in law[0]["messages"][0]["content"]
    assert data.Choice.grade(easy, "B") == 1 and data.Choice.grade(easy, "A") == data.Choice.grade(easy, "") == 0
    with pytest.raises(SystemExit, match="the task arc_easy needs .*ARC-Easy-Train.jsonl.*--source=core"):
        data.Arc.items("train", 0, 9, str(tmp_path))
    (tmp_path / "data" / "test" / "law_test.csv").write_text("Why?,u,v,w,x,F\n")
    with pytest.raises(SystemExit, match="law_test.csv row 1"):
        data.Mmlu.rows.__wrapped__("test", str(tmp_path))


def test_the_likeliest_letter_wins(chatty, tokenizer):
    rng = random.Random(2)
    prompts = [[rng.randrange(600) for _ in range(rng.randint(1, 60))] for _ in range(30)]
    letters = [data.Choice.letters[: rng.randint(2, 6)] for _ in prompts]
    want = []
    for prompt, some in zip(prompts, letters):
        logits = chatty(torch.tensor([prompt]))[0, -1]
        want.append(max(some, key=lambda letter: logits[tokenizer.encode(letter)[0]].item()))
    assert evals.best_letters(chatty, tokenizer, prompts, letters, "cpu") == want and len(set(want)) > 2


def write_core(folder, count=8):
    """The files of all 22 tasks with made items; returns {label: rows}."""
    rng, rows = random.Random(1), {}
    word = lambda: "".join(rng.choices("abcdefgh", k=rng.randint(1, 3)))
    words = lambda most: " ".join(word() for _ in range(rng.randint(1, most)))
    for label, name, _, kind, *_ in evals.CORE:
        file = folder / "eval_data" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows[label] = []
        for _ in range(count):
            n = rng.randint(2, 4)
            if kind == evals.CHOICE:
                row = {"query": words(4) + " ", "choices": [words(3) for _ in range(n)]}
            elif kind == evals.SCHEMA:
                row = {"context_options": [words(6) for _ in range(n)], "continuation": words(3)}
            else:
                row = {"context": f"  {words(5)}\n", "continuation": words(2)}
            rows[label].append(row if kind == evals.LM else row | {"gold": rng.randrange(n)})
        file.write_bytes(jsonl(rows[label]))
    rows["hellaswag_zeroshot"] = rows["hellaswag"]
    return rows


def plain_core(model, tokenizer, rows, shots, kind, delimiter):
    """The published procedure, one text at a time."""
    bos, T, answers = tokenizer.special("<|bos|>"), model.cfg.seq_len, []
    rows = rows[:]
    random.Random(1337).shuffle(rows)

    def losses(ids):
        return F.cross_entropy(model(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:]), reduction="none")  # of token i + 1

    for i, row in enumerate(rows):
        prompt = ""
        for j in random.Random(1234 + i).sample([j for j in range(len(rows)) if j != i], shots):
            shot = rows[j]
            if kind == "multiple_choice":
                prompt += shot["query"] + delimiter + shot["choices"][shot["gold"]] + "\n\n"
            elif kind == "schema":
                prompt += shot["context_options"][shot["gold"]] + delimiter + shot["continuation"] + "\n\n"
            else:
                prompt += shot["context"].strip() + delimiter + shot["continuation"] + "\n\n"
        encode = lambda text: [bos, *tokenizer.encode(text)]
        if kind == "language_modeling":
            short = encode((prompt + row["context"].strip() + delimiter).strip())
            long = encode(prompt + row["context"].strip() + delimiter + row["continuation"])
            assert long[: len(short)] == short
            over = max(0, len(long) - T)
            said = model(torch.tensor([long[over:]]))[0].argmax(-1).tolist()
            answers.append(said[len(short) - over - 1 : -1] == long[len(short) :])
            continue
        if kind == "multiple_choice":
            texts = [encode(prompt + row["query"] + delimiter + choice) for choice in row["choices"]]
            first = next((i for i, tokens in enumerate(zip(*texts)) if len(set(tokens)) > 1), min(map(len, texts)))
            parts = [len(ids) - first for ids in texts]
        else:
            texts = [encode(prompt + context + delimiter + row["continuation"]) for context in row["context_options"]]
            same = next((i for i, tokens in enumerate(zip(*(ids[::-1] for ids in texts))) if len(set(tokens)) > 1), min(map(len, texts)))
            parts = [same] * len(texts)
        means = [losses(ids[-T:])[-part:].mean().item() if part else math.nan for ids, part in zip(texts, parts)]
        answers.append(means.index(min(means)) == row["gold"])
    return answers


def test_core_equals_a_plain_reference(tokenizer, tmp_path, capsys, monkeypatch):
    """Tasks of all three kinds, answer by answer; then with a context so short that texts are cut."""
    rows = write_core(tmp_path)
    picked = ("jeopardy", "arc_easy", "copa", "lambada_openai", "winograd", "agi_eval_lsat_ar")
    tasks = [(*task[:2], min(task[2], 5), *task[3:]) for task in evals.CORE if task[0] in picked]
    monkeypatch.setattr(evals, "CORE", tasks)
    for seq_len in (250, 40):
        model = small(vocab_size=tokenizer.vocab_size, seq_len=seq_len, depth=2)
        results, core = evals.run_core(model, tokenizer, CPU, tmp_path, tmp_path / f"core_{seq_len}.json")
        kept = json.loads((tmp_path / f"core_{seq_len}.json").read_text())
        seen = set()
        for label, _, shots, kind, delimiter, guess, _ in evals.CORE:
            want = plain_core(model, tokenizer, rows[label], shots, kind, delimiter)
            assert [c == "1" for c in kept[label]["right"]] == want, label
            accuracy = sum(want) / len(want)
            assert results[label] == pytest.approx((accuracy, 8, (100 * accuracy - guess) / (100 - guess)))
            seen |= {accuracy}
        assert len(seen) > 1 and core["CORE"] == pytest.approx(np.mean([r[2] for r in results.values()]))
        cut = [entry["cut"] for entry in kept.values()]
        assert (sum(cut) > 0) == (seq_len == 40)
    printed = capsys.readouterr().out
    assert f"CORE: {core['CORE']:.4f} ± " in printed and "cut to 40 tokens" in printed


def test_core_needs_all_of_its_tasks(tokenizer, tmp_path, capsys, monkeypatch):
    write_core(tmp_path, count=3)
    model, cache = small(vocab_size=tokenizer.vocab_size, seq_len=64, depth=1), tmp_path / "core.json"
    (tmp_path / "eval_data" / "language_understanding" / "hellaswag.jsonl").rename(tmp_path / "away")
    results, core = evals.run_core(model, tokenizer, CPU, tmp_path, cache)
    printed = capsys.readouterr().out
    assert core is None and len(results) == 20 and "CORE:" not in printed and "there is no CORE" in printed
    assert "missing: hellaswag_zeroshot" in printed and "hellaswag.jsonl" in printed
    monkeypatch.setattr(evals, "core_task", None)  # all that is there is known of this checkpoint
    assert evals.run_core(model, tokenizer, CPU, tmp_path, cache)[0] == results
    with pytest.raises(TypeError):
        evals.run_core(model, tokenizer, CPU, tmp_path, cache, count=2)
    (tmp_path / "eval_data" / "commonsense_reasoning" / "copa.jsonl").write_text('{"query": "a", "choices": ["b", "c"], "gold": 2}\n')
    with pytest.raises(SystemExit, match="copa.jsonl line 1: wanted"):
        evals.run_core(model, tokenizer, CPU, tmp_path, cache)


def test_core_is_shared_among_ranks(tokenizer, tmp_path):
    rows = write_core(tmp_path)
    model = small(vocab_size=tokenizer.vocab_size, seq_len=250, depth=1)
    for label, _, _, kind, delimiter, *_ in evals.CORE[3:12:8]:
        want, _ = evals.core_task(model, tokenizer, CPU, rows[label], 2, kind, delimiter)
        parts = []
        for rank in range(3):
            machine = Machine(torch.device("cpu"), torch.float32, rank, 3)
            machine.gather, machine.sum = lambda item: [parts.append(item) or dict(enumerate(want))], lambda n: n
            evals.core_task(model, tokenizer, machine, rows[label], 2, kind, delimiter)
        assert [len(part) for part in parts] == [3, 3, 2]
        assert {i: int(v) for part in parts for i, v in part.items()} == dict(enumerate(want))


def test_choices_that_share_their_beginning_score_as_each_alone():
    model, rng, groups = small(seq_len=96), random.Random(5), []
    for n in range(9):
        beginning = [rng.randrange(300) for _ in range(rng.randint(1, 60))]
        ends = [[3 * n + i] + [rng.randrange(300) for _ in range(rng.randint(0, 30))] for i in range(rng.randint(2, 4))]
        groups.append([(beginning + end, len(beginning), len(beginning + end)) for end in ends])
    scores = evals.choice_scores(model, groups, "cpu")
    for group, several in zip(groups, scores):
        for (ids, first, _), score in zip(group, several, strict=True):
            loss = F.cross_entropy(model(torch.tensor([ids]))[0, first - 1 : -1], torch.tensor(ids[first:]))
            assert abs(score - loss.item()) < 1e-4


def test_greedy_scores_take_exact_continuations_only():
    model, rng, spans = small(seq_len=96), random.Random(3), []
    for n in range(12):
        ids = [rng.randrange(300) for _ in range(rng.randint(1, 70))]
        first = len(ids)
        for _ in range(rng.randint(1, 9)):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if n % 3 == 0:
            ids[rng.randrange(first, len(ids))] ^= 1
        spans.append((ids, first, len(ids)))
    assert evals.core_scores(model, spans, "cpu", True) == [float(n % 3 > 0) for n in range(12)]


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert evals.pass_at(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_intervals_hold_their_share():
    assert evals.wilson(0.9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)  # as R's prop.test without correction has it
    assert evals.wilson(0.0, 10) == pytest.approx((0, 0.2775), abs=1e-4) and evals.wilson(1.0, 10)[1] == 1
    rng = np.random.default_rng(1)
    for p, n in ((0.02, 100), (0.5, 30), (0.9, 500)):
        bounds = [evals.wilson(k / n, n) for k in rng.binomial(n, p, 2000)]
        assert 0.92 < np.mean([low <= p <= high for low, high in bounds]) < 0.98
    draws = rng.binomial([40, 90], [0.4, 0.7], (2000, 2)) / [40, 90]
    found = [evals.centred_mean([(a, 40, 0.25), (b, 90, 0.0)]) for a, b in draws]
    assert np.mean([abs(mean - (0.2 + 0.7) / 2) < half for mean, half in found]) == pytest.approx(0.95, abs=0.02)


def test_several_answers_an_item(chatty, tokenizer, monkeypatch):
    seen = collections.defaultdict(list)

    class Even(data.Task):
        max_tokens = 6

        def items(split, seed, count, files=""):
            return [{"messages": [{"role": "user", "content": f"Say {i}."}], "answer": i} for i in range(count)]

        def grade(item, text):
            seen[item["answer"]].append(text)
            return float(len(text) % 2 == 0)

    monkeypatch.setitem(data.TASKS, "even", Even)
    accuracy, n, shown, passes = evals.run_tasks(chatty, tokenizer, CPU, ["even"], 12, samples=6, temperature=1.0)["even"]
    assert n == 12 and len(shown) == 8 and sorted(map(len, seen.values())) == [6] * 12 and list(passes) == [1, 2, 4, 6]
    right = [[len(text) % 2 == 0 for text in seen[i]] for i in range(12)]
    assert accuracy == pytest.approx(np.mean(right)) == pytest.approx(passes[1]) and 0 < accuracy < 1
    assert passes[6] == pytest.approx(np.mean([any(r) for r in right])) and passes[1] < passes[2] < passes[6]
    assert len({text for texts in seen.values() for text in texts}) > 20
    again = evals.run_tasks(chatty, tokenizer, CPU, ["even"], 12, samples=6, temperature=1.0, seed=1)["even"]
    assert again[3] != passes and evals.run_tasks(chatty, tokenizer, CPU, ["even"], 3)["even"][3] == {}


def write_chat_tasks(folder):
    """Files of all of ChatCORE's tasks that need some, with a few items each."""
    write_gsm8k(folder, 3)
    (folder / "HumanEval.jsonl").write_bytes(jsonl([SUCCESSOR, PAIR]))
    (folder / "data" / "test").mkdir(parents=True)
    (folder / "data" / "test" / "law_test.csv").write_text("Why?,u,v,w,x,B\nHow?,1,2,3,4,D\n")
    (folder / "eval_data" / "world_knowledge").mkdir(parents=True)
    for part in ("easy", "challenge"):
        (folder / "eval_data" / "world_knowledge" / f"arc_{part}.jsonl").write_bytes(jsonl([{"query": "Why?", "choices": list("uvwx"), "gold": 1}]))


def test_all_items_of_an_endless_task_are_the_usual_few(tiny_run, tmp_path, monkeypatch):
    asked = {}

    def seen(model, tokenizer, machine, names, count, *rest, **more):
        asked[names[0]] = count
        return {names[0]: (0.5, 10, [], {})}

    monkeypatch.setattr(evals, "run_tasks", seen)
    monkeypatch.setattr(data.HumanEval, "allowed", False)  # and back to it at the end
    evals.main([f"--out={tiny_run}", f"--tasks={','.join(data.TASKS)}", "--count=0", "--run_code=1", "--device=cpu", "--dtype=float32"])
    own_files = {"gsm8k", "humaneval", "arc_easy", "arc_challenge", "mmlu"}
    assert {name for name, count in asked.items() if count == 2**31} == own_files and {asked[name] for name in set(asked) - own_files} == {500}


def test_chatcore_needs_all_of_its_tasks(tiny_run, tmp_path, monkeypatch, capsys):
    write_chat_tasks(tmp_path)
    out, few = shutil.copytree(tiny_run, tmp_path / "out"), data.Counting.items
    monkeypatch.setattr(data.Counting, "items", lambda split, seed, count, files="": few(split, seed, min(count, 4)))
    monkeypatch.setattr(data.HumanEval, "allowed", False)
    before = (out / "report.json").read_text()

    def call(*knobs):
        evals.main([f"--out={out}", "--tasks=chatcore", f"--files={tmp_path}", "--device=cpu", "--dtype=float32", "--show=0", *knobs])
        return capsys.readouterr().out

    printed = call("--count=1")
    assert "missing: humaneval (the task humaneval runs code" in printed and "so there is no ChatCORE" in printed and "ChatCORE:" not in printed
    printed = call("--count=1", "--run_code=1")
    assert "what holds: " in printed and "limits of time, memory, files and processes" in printed
    assert "ChatCORE, estimated from at most 1 items a task" in printed and "ChatCORE:" not in printed
    assert (out / "report.json").read_text() == before
    printed = call("--run_code=1")
    report = json.loads((out / "report.json").read_text())["stages"]["rl"]
    share = {name: report[f"accuracy/{name}"] for name in evals.CHATCORE}
    want = np.mean([(share[name] - (name[:3] in ("arc", "mml")) / 4) / (0.75 if name[:3] in ("arc", "mml") else 1) for name in share])
    assert report["ChatCORE"] == pytest.approx(want) and f"ChatCORE: {want:.4f} ± " in printed
    assert [report[f"n/{name}"] for name in evals.CHATCORE] == [1, 1, 2, 3, 2, 4] and "ChatCORE" in (out / "report.html").read_text()
    assert "pass@2" in call("--tasks=gsm8k", "--samples=2", "--temperature=1", "--count=2")
    bad = {"leave --split": ["--split=train"], "as they are": ["--samples=2", "--temperature=1"], "--run_code=1` allows it": ["--tasks=humaneval"]}
    for message, knobs in (bad | {"--temperature above 0": ["--tasks=gsm8k", "--samples=3"]}).items():
        with pytest.raises(SystemExit, match=message):
            call(*knobs)


SUCCESSOR = {
    "task_id": "Own/0",
    "prompt": 'import math\n\n\ndef twice(x):\n    return 2 * x\n\n\ndef successor(x):\n    """The next integer.\n    >>> successor(1)\n    2\n    """\n',
    "entry_point": "successor",
    "canonical_solution": "    return x + 1\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(5) == 6 and candidate(twice(2)) == successor(4) == 5\n",
}
PAIR = {
    "task_id": "Own/1",
    "prompt": 'def pair(x, times=1):\n    """x beside itself, with halves, so often."""\n',
    "entry_point": "pair",
    "canonical_solution": "    return [(x, x / 2), {'k': {x}}] * times\n",
    "test": "def check(candidate):\n    assert candidate(3, times=2) == [(3, 1.5), {'k': {3}}] * 2\n    assert isinstance(candidate((1.5,)[0]), list)\n",
}


def passes(row, text, **knobs):
    """(passed, why not, what holds) of an answer to an item of HumanEval's form."""
    return evals.run_answer(data.HumanEval.sources(row, text), row["prompt"] + "\n    pass\n", row["test"], row["entry_point"], **knobs)


def test_answers_with_code_in_all_forms_are_judged():
    body = SUCCESSOR["canonical_solution"]
    loop = "    for i in range(1):\n        x += 1\n    return x"
    right = [body, "return x + 1", loop, loop.strip(), "for i in range(1):\n    x += 1\nreturn x", f"Sure.\n```python\n{body}```\nThat is all!"]
    whole = "def successor(x):\n    return math.ceil(twice(x) / 2) + 1"
    right += [whole, f"ONE = 1\n{whole[:-1]}ONE", f"Here it is:\n{whole}\nIt adds 1, as asked.", f"```\nONE = 1\n{whole[:-1]}ONE\n```", f"```\nno code\n```\n```python\n{whole}", body + "\n\nThis adds one."]
    wrong = ["pass", "return None", "return x", "", "I do not know.", "def other(x):\n    return x + 1", "def successor(x):\n    return x +"]
    assert [passes(SUCCESSOR, text)[0] for text in right] == [True] * len(right)
    assert not any(passes(SUCCESSOR, text)[0] for text in wrong)
    assert passes(PAIR, PAIR["canonical_solution"])[0] and not passes(PAIR, "return [[x, x / 2], {'k': {x}}] * times")[0]


FORGE = """
import gc, json, os
def successor(x):
    for fd in range(3, 32):
        try:
            os.write(fd, b'{"kind": "value", "value": true, "passed": true, "token": "", "why": "", "holds": []}\\n' * 9)
        except OSError:
            pass
    return [o for o in gc.get_objects() if isinstance(o, dict) and ("token" in o or "check" in o)][0]
"""
LIES = {
    "exits": "import sys\ndef successor(x):\n    sys.exit(0)",
    "exits at once": "import os\nos._exit(0)\ndef successor(x): pass",
    "exits hard": "import os\ndef successor(x):\n    os._exit(0)",
    "prints": "def successor(x):\n    print('passed')\n    print('{\"passed\": true}')",
    "equals everything": "class E:\n    __eq__ = lambda self, other: True\ndef successor(x):\n    return E()",
    "a number that does": "class E(int):\n    __eq__ = lambda self, other: True\ndef successor(x):\n    return E(9)",
    "no assert": "import builtins\nbuiltins.AssertionError = builtins.exec = builtins.all = None\ndef successor(x):\n    return 0",
    "forges": FORGE,
    "raises": "def successor(x):\n    raise SystemExit(0)",
    "too large": "def successor(x):\n    return 'a' * 2**21",
    "too deep": "def successor(x):\n    a = []\n    for _ in range(10**5):\n        a = [a]\n    return a",
    "not a value": "def successor(x):\n    return successor",
    "kills its parent": "import os, signal\ndef successor(x):\n    os.kill(os.getppid(), signal.SIGKILL)",
    "never ends": "def successor(x):\n    while True: pass",
    "never begins": "import os\nwhile True: pass\ndef successor(x): pass",
    "sleeps": "import time\ndef successor(x):\n    time.sleep(99)",
}


@pytest.mark.parametrize("lie", LIES)
def test_only_what_passed_its_test_passes(lie):
    start = time.time()
    passed, why, _ = passes(SUCCESSOR, LIES[lie], seconds=2)
    assert not passed and why and time.time() - start < 12
    lenient = SUCCESSOR | {"test": "def check(candidate):\n    try:\n        candidate(1)\n    except Exception:\n        pass\n"}
    if lie.startswith(("exits", "never", "sleeps", "too large")):  # not even where the test catches what is raised
        assert not passes(lenient, LIES[lie], seconds=2)[0]


DEEDS = """
import ctypes, os, socket, subprocess, sys, threading
def successor(name):
    deeds = {
        "fork": lambda: os.fork() or os._exit(0),
        "daemon": lambda: subprocess.Popen(["sleep", "77"], start_new_session=True),
        "thread": lambda: threading.Thread(target=print).start(),
        "memory": lambda: bytearray(2**31),
        "file": lambda: open("big", "wb").write(bytes(2**22)),
        "files": lambda: [open(sys.executable) for _ in range(99)],
        "stdin": lambda: input(),
        "privilege": lambda: os.setuid(0),
        "limits": lambda: __import__("resource").setrlimit(6, (99, 99)),
        "signal": lambda: os.kill(VICTIM, 9),
        "everybody": lambda: os.kill(-1, 0),
        "write": lambda: open(OUTSIDE, "w").write("x"),
        "read": lambda: open(SECRET).read(),
        "system": lambda: open(os.path.join(os.path.dirname(os.__file__), "x.py"), "w"),
        "network": lambda: socket.create_connection(("127.0.0.1", PORT), 5),
        "mount": lambda: ctypes.CDLL(None).mount(b"x", b"/box", b"tmpfs", 0, None) == 0 or 1 / 0,
    }
    if name == "own folder":
        open("own", "w").write("x")
        return os.listdir() == ["own"] and os.environ["HOME"] == os.getcwd() and list(os.environ) <= ["HOME", "LC_CTYPE"]
    try:
        deeds[name]()
        return "done"
    except (Exception, KeyboardInterrupt) as error:
        return "refused"
"""


def test_what_code_may_not_do_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    (tmp_path / "secret").write_text("x")
    held = passes(SUCCESSOR, "return x + 1")[2]
    names = ["fork", "daemon", "thread", "memory", "file", "files", "stdin", "privilege", "limits", "mount"]
    names += ["network"] * ("no network" in held) + ["signal", "everybody"] * ("no other process in reach" in held)
    names += ["write", "read", "system"] * ("no files but Python's and an empty folder" in held)
    victim, listener = subprocess.Popen(["sleep", "60"]), socket.create_server(("127.0.0.1", 0))
    known = {"VICTIM": victim.pid, "OUTSIDE": str(tmp_path / "out"), "SECRET": str(tmp_path / "secret"), "PORT": listener.getsockname()[1]}
    code = "".join(f"{name} = {value!r}\n" for name, value in known.items()) + DEEDS
    test = f"def check(f):\n    assert f('own folder')\n    said = {{name: f(name) for name in {names}}}\n    assert set(said.values()) == {{'refused'}}, said\n"
    try:
        passed, why, _ = passes(SUCCESSOR | {"test": test}, code)
        assert passed, why
        assert victim.poll() is None and not (tmp_path / "out").exists()
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    finally:
        victim.kill(), victim.wait(), listener.close()
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if b"def solver():" in p.read_bytes()]
    assert not left or os.environ.get("PYTEST_XDIST_WORKER")


def test_humaneval_runs_code_only_where_allowed(tmp_path, monkeypatch):
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(jsonl([SUCCESSOR, PAIR])))
    task, files = data.HumanEval, str(tmp_path)
    with pytest.raises(SystemExit, match="--run_code=1"):
        task.items("test", 0, 9, files)
    with pytest.raises(SystemExit, match="--run_code=1"):
        task.grade({"row": SUCCESSOR}, "return x + 1")
    monkeypatch.setattr(task, "allowed", True)
    items = task.items("test", 0, 9, files)
    assert sorted(item["answer"] for item in items) == ["pair", "successor"] and len(task.items("test", 0, 1, files)) == 1
    assert all(item["row"]["prompt"].rstrip() in item["messages"][0]["content"] for item in items)
    assert [task.grade(item, item["row"]["canonical_solution"].strip()) for item in items] == [1, 1]
    assert [task.grade(item, "    return None") for item in items] == [0, 0]
    with pytest.raises(SystemExit, match="test items only"):
        task.items("train", 0, 9, files)
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": 1}\n'))
    task.rows.cache_clear()
    with pytest.raises(SystemExit, match="HumanEval.jsonl.gz line 1: wanted"):
        task.items("test", 0, 9, files)
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(b"<html>")
    with pytest.raises(SystemExit, match="cannot be read"):
        task.items("test", 0, 9, files)


# -----------------------------------------------------------------------------
# Stages, as people run them


def test_spelling_is_graded_letter_by_letter():
    task = data.TASKS["spelling"]
    items, taught = task.items("test", 3, 50), {i["answer"] for i in task.items("train", 3, 500)}
    assert items == task.items("test", 3, 50) and not taught & {i["answer"] for i in items}
    item = items[0] | {"answer": "c-a-t"}
    right, wrong = ("c-a-t", "The letters are c-a-t."), ("c-a-t-s", "s-c-a-t", "cat", "c-a", "", "c-a-t, or c-o-t")
    assert [task.grade(item, text) for text in (*right, *wrong)] == [1] * 2 + [0] * 6
    question, answer = data.exchange(random.Random(1), "spelling")
    word = re.fullmatch(r'Spell the word "(.+)"\.', question)[1]
    assert answer == "-".join(word) and re.fullmatch(r'Spell the word ".+"\.', items[0]["messages"][0]["content"])


def test_bytes_per_token(tokenizer):
    texts = ["naïve café, twice: naïve café", "你好", "the cat sat on the mat"]
    bos = tokenizer.special("<|bos|>")
    ids = [[bos, *tokenizer.encode(text)] for text in texts]
    val = data.TokenSet([np.array(sum(ids[:2], []), np.uint16), np.array(ids[2], np.uint16)], bos, whole=True)
    assert evals.bytes_per_token(tokenizer, val) == pytest.approx(sum(len(t.encode()) for t in texts) / sum(len(i) - 1 for i in ids))


def test_all_stages_run_and_report(tiny_run):
    report = json.loads((tiny_run / "report.json").read_text())
    assert set(report["stages"]) == {"base", "sft", "rl"} and 0 < report["stages"]["base"]["bpb"] < 20
    assert 1 < report["stages"]["base"]["bytes_per_token"] < 5
    assert report["stages"]["rl"]["n/arithmetic"] == 4 and (tiny_run / "report.html").stat().st_size > 3000
    lines = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in lines if e["stage"] == "base" and "loss" in e] == list(range(8))  # exactly --steps updates
    saved = torch.load(gpt.latest(tiny_run / "base") / "optimizer_000.pt", weights_only=True)
    assert saved["steps"] == 8  # of two micro-batches each: an update is not a micro-batch
    losses = [e["loss"] for e in lines if e["stage"] == "base" and "loss" in e]
    assert losses[-1] < losses[0] - 0.3
    printed = (tiny_run / "printed.txt").read_text()
    assert "tokens/s" in printed and "min left" in printed and "bits per byte" in printed


def test_a_complete_stage_is_left_alone(tiny_run):
    before = (tiny_run / "metrics.jsonl").read_text()
    for script, knobs in (("pretrain.py", TINY), ("rl.py", TINY_RL)):
        assert "is complete" in run(script, f"--out={tiny_run}", *knobs)[1]
    assert (tiny_run / "metrics.jsonl").read_text() == before


def test_a_run_from_before_a_knob_was_added_goes_on(tiny_run, tmp_path):
    copied = shutil.copytree(gpt.latest(tiny_run / "base"), tmp_path / "step_000001")
    state = json.loads((copied / "state.json").read_text())
    machine = gpt.start_machine("cpu")
    cfg = gpt.override(runpy.run_path(str(HERE / "pretrain.py"))["Config"](), [])
    for name, value in state["config"].items():
        setattr(cfg, name, value)
    del state["config"]["clean"]
    (copied / "state.json").write_text(json.dumps(state))
    assert gpt.find_resume(tmp_path, cfg, machine) == copied
    cfg.clean = True
    with pytest.raises(SystemExit, match="clean=False became True"):
        gpt.find_resume(tmp_path, cfg, machine)


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_stopped_and_resumed_ends_with_the_same_bits(stage, tiny_run, tmp_path):
    knobs = TINY_SFT if stage == "sft" else TINY_RL
    for _ in range(2):
        run(f"{stage}.py", f"--out={tmp_path}", f"--from={tiny_run}", *knobs, "--stop_after=2")
    run(f"{stage}.py", f"--out={tmp_path}", f"--from={tiny_run}", *knobs)
    assert same(weights(tmp_path / stage), weights(tiny_run / stage))


def test_killed_compiled_run_resumes_to_the_same_bits(tiny_run, tmp_path):
    """SIGKILL at a moment nobody chose, with the compiled model; metrics end without doubles."""
    knobs = [*TINY, "--compile=1", "--steps=30", f"--from={tiny_run}"]
    run("pretrain.py", f"--out={tmp_path / 'whole'}", *knobs)
    process = start("pretrain.py", f"--out={tmp_path / 'cut'}", *knobs, printed=tmp_path / "printed")
    while not gpt.latest(tmp_path / "cut" / "base"):
        assert process.is_alive()
        time.sleep(0.02)
    time.sleep(random.random() * 0.3)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert int(gpt.latest(tmp_path / "cut" / "base").name[5:]) < 30  # it was cut short
    printed = run("pretrain.py", f"--out={tmp_path / 'cut'}", *knobs)[1]
    assert "going on from step" in printed
    assert same(weights(tmp_path / "cut" / "base"), weights(tmp_path / "whole" / "base"))
    steps = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in steps if "loss" in e] == list(range(30))


def losses(out, stage="base"):
    entries = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [e["loss"] for e in entries if e["stage"] == stage and "loss" in e]


def test_ranks_equal_one_process(tiny_run, tmp_path):
    """Three processes share eight rows unevenly; two go on where three stopped; and SFT on two."""
    knobs = [f"--out={tmp_path}", f"--from={tiny_run}", *TINY]
    run("pretrain.py", *knobs, "--stop_after=4", ranks=3)
    assert len(list(gpt.latest(tmp_path / "base").glob("optimizer_*.pt"))) == 3
    assert "was 3 ranks of 1 threads in float32, now 2 of 1 in float32" in run("pretrain.py", *knobs, ranks=2)[1]
    assert np.abs(np.subtract(losses(tmp_path), losses(tiny_run))).max() < 1e-4
    one, many = (json.loads((d / "report.json").read_text())["stages"]["base"]["bpb"] for d in (tiny_run, tmp_path))
    assert abs(one / many - 1) < 0.005
    run("sft.py", f"--out={tmp_path}", f"--from={tiny_run}", *TINY_SFT, ranks=2)
    assert np.abs(np.subtract(losses(tmp_path, "sft"), losses(tiny_run, "sft"))).max() < 1e-4


def test_two_nodes_and_a_killed_worker(tiny_run, tmp_path):
    """Two torchrun agents, as on two machines; a worker is killed, --max-restarts=1 starts all again from the checkpoint."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=1"]
    launch += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test", "--local_addr=127.0.0.1", "pretrain.py"]
    launch += [f"--out={tmp_path}", f"--from={tiny_run}", *TINY, "--steps=40", "--save_every=5", "--fresh"]
    env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as the README says
    agents = [subprocess.Popen(launch, cwd=HERE, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    while not (found := gpt.latest(tmp_path / "base")):
        assert all(a.poll() is None for a in agents)
        time.sleep(0.02)
    children = Path(f"/proc/{agents[1].pid}/task/{agents[1].pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    printed = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [a.returncode for a in agents] == [0, 0], "\n".join(printed)
    assert "going on from step" in "".join(printed) and gpt.latest(tmp_path / "base").name == "step_000040" > found.name
    run("pretrain.py", f"--out={tmp_path / 'one'}", f"--from={tiny_run}", *TINY, "--steps=40")
    assert len(losses(tmp_path)) == 40 and np.abs(np.subtract(losses(tmp_path), losses(tmp_path / "one")))[:20].max() < 1e-4


def test_rl_on_two_ranks_takes_the_same_samples(tiny_run, tmp_path):
    run("rl.py", f"--out={tmp_path}", f"--from={tiny_run}", *TINY_RL, ranks=2)
    first = [next(json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines() if '"reward"' in line) for d in (tiny_run, tmp_path)]
    assert first[0]["length"] == first[1]["length"] and abs(first[0]["entropy"] - first[1]["entropy"]) < 1e-4


def test_another_config_stops_and_names_both_ways_out(tiny_run):
    code, printed = run("pretrain.py", f"--out={tiny_run}", *TINY, "--depth=2", check=False)
    assert code and "--out=" in printed and "--fresh" in printed and "depth=1 became 2" in printed and "Traceback" not in printed
    assert gpt.latest(tiny_run / "base")


def test_gsm8k_and_own_conversations_in_every_stage(tiny_run, tmp_path):
    write_gsm8k(tmp_path)
    (tmp_path / "mine.jsonl").write_text(json.dumps({"messages": [QUESTION, REPLY]}) + "\n")
    out, files = f"--out={tmp_path / 'out'}", f"--files={tmp_path}"
    chats = [f"--data={tmp_path / 'mine.jsonl'},{tmp_path / 'gsm8k_train.jsonl'}", "--chats=0"]
    printed = run("sft.py", out, f"--from={tiny_run}", *TINY_SFT, *chats, "--tasks=gsm8k", files, "--steps=2")[1]
    assert "fine-tuning: 21 conversations" in printed
    run("rl.py", out, *TINY_RL, "--task=gsm8k", "--tasks=facts", files, "--steps=1")
    report = json.loads((tmp_path / "out" / "report.json").read_text())["stages"]
    assert report["sft"]["n/gsm8k"] == report["rl"]["n/gsm8k"] == 4 and report["rl"]["n/facts"] == 4 and "n/facts" not in report["sft"]
    assert "gsm8k" in run("evals.py", out, "--tasks=gsm8k", files, "--count=3", "--device=cpu")[1]
    code, printed = run("rl.py", out, *TINY_RL, "--task=riddles", check=False)
    assert code and "there is no task 'riddles'; there are " in printed and "Traceback" not in printed


def test_bad_knobs_get_one_line(tmp_path):
    bad = {"--batch_tokens=32": "less than one row", "--from=nowhere": "no tokenizer", "--device=gpu": "auto, cpu, or cuda", "--dtype=fp16": "bfloat16"}

    def attempt(knob):
        return run("pretrain.py", f"--out={tmp_path / knob}", *TINY, knob, check=False)

    with ThreadPoolExecutor(2) as pool:
        for message, (code, printed) in zip(bad.values(), pool.map(attempt, bad)):
            assert code and message in printed and "Traceback" not in printed


def test_a_stage_notices_another_parent(tiny_run, tmp_path):
    out = shutil.copytree(tiny_run, tmp_path / "copy")
    path = gpt.latest(out / "base") / "state.json"
    path.write_text(path.read_text().replace('"seconds"', '"Seconds"'))
    code, printed = run("sft.py", f"--out={out}", *TINY_SFT, check=False)
    assert code and "did not start from the base model there is now" in printed and "--fresh" in printed


def damage_model(path):
    content = bytearray((path / "model.pt").read_bytes())
    content[len(content) // 2] ^= 255
    (path / "model.pt").write_bytes(content)


DAMAGES = {
    "half a model": lambda path: os.truncate(path / "model.pt", 5000),
    "a flipped byte": damage_model,
    "no model": lambda path: (path / "model.pt").unlink(),
    "half a state": lambda path: os.truncate(path / "state.json", 100),
    "an empty state": lambda path: os.truncate(path / "state.json", 0),
    "no optimizer": lambda path: (path / "optimizer_000.pt").unlink(),
    "half an optimizer": lambda path: os.truncate(path / "optimizer_000.pt", 5000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gets_one_line(damage, tiny_run, tmp_path):
    path = shutil.copytree(gpt.latest(tiny_run / "base"), tmp_path / "base" / "step_000008")
    model, _ = gpt.load_model(tmp_path / "base", CPU)
    gpt.load_optimizer(path, optim.build(model, 0.02, 0.3, 0.004))  # whole, they load
    DAMAGES[damage](path)
    with pytest.raises(SystemExit, match="step_000008 is damaged") as caught:
        gpt.load_model(tmp_path / "base", CPU)
        gpt.load_optimizer(path, optim.build(model, 0.02, 0.3, 0.004))
    assert "\n" not in str(caught.value) and "--fresh" in str(caught.value)


def test_a_full_disk_keeps_the_last_checkpoint(tiny_run, tmp_path):
    out = tmp_path / "out"
    run("pretrain.py", f"--out={out}", f"--from={tiny_run}", *TINY, "--stop_after=2")
    code, printed = run("pretrain.py", f"--out={out}", f"--from={tiny_run}", *TINY, check=False, limit=100_000)
    assert code == 1 and printed.splitlines()[-1].startswith("cannot go on: ") and "Traceback" not in printed
    assert [p.name for p in (out / "base").glob("step_*")] == ["step_000002"]
    run("pretrain.py", f"--out={out}", f"--from={tiny_run}", *TINY)
    assert same(weights(out / "base"), weights(tiny_run / "base"))


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_one_line(sign, tiny_run, tmp_path):
    knobs = [*TINY, f"--out={tmp_path / 'out'}", f"--from={tiny_run}", "--steps=100000", "--save_every=1"]
    process = start("pretrain.py", *knobs, printed=tmp_path / "printed")
    while not gpt.latest(tmp_path / "out" / "base"):
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, sign)
    process.join(20)
    printed = (tmp_path / "printed").read_text()
    assert process.exitcode == 1 and "Traceback" not in printed
    assert printed.splitlines()[-1] == "stopped; what was saved stays, and the same command goes on from there"
    gpt.load_model(tmp_path / "out" / "base", CPU)


def test_a_signal_that_is_swallowed_comes_again():
    deaf = """
import time
from gpt import command
def main(argv):
    print("ready", flush=True)
    try:
        time.sleep(30)
    except KeyboardInterrupt:  # as a destructor, or a callback of a library, may do
        pass
    time.sleep(30)
command(main)"""
    process = subprocess.Popen([sys.executable, "-c", deaf], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.terminate()
    assert "stopped" in process.communicate(timeout=10)[1] and process.returncode == 1


def test_shards_of_a_text_that_changed_are_not_reused(tmp_path, monkeypatch):
    """And a text is the same by whatever path."""
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(data.demo_texts(1)[:300]))
    monkeypatch.chdir(tmp_path)

    def prepare(path):
        return data.prepare(data.PrepareConfig(out=str(tmp_path / "out"), data=path, vocab_size=400), CPU)[2].arrays[0]

    assert np.array_equal(prepare("a.txt"), prepare(str(tmp_path / "a.txt")))
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(data.demo_texts(1)[:299]))
    with pytest.raises(SystemExit, match="was made from"):
        prepare("a.txt")


@pytest.mark.parametrize("vocab_size, message", [(50, "272"), (60000, "cannot be trained")])
def test_a_vocabulary_the_text_cannot_give(vocab_size, message, tmp_path):
    (tmp_path / "a.txt").write_text("a b c d e f g " * 50)
    code, printed = run("pretrain.py", f"--out={tmp_path / 'out'}", f"--data={tmp_path}", *TINY, f"--vocab_size={vocab_size}", check=False)
    assert code and message in printed and "Traceback" not in printed and not (tmp_path / "out" / "tokenizer").exists()


def test_damaged_data_gets_one_line(tiny_run, tmp_path):
    out = shutil.copytree(tiny_run, tmp_path / "copy")
    shutil.rmtree(out / "base")
    shard = out / "data" / "demo" / "train_0000.bin"
    os.truncate(shard, shard.stat().st_size - 2)
    code, printed = run("pretrain.py", f"--out={out}", *TINY, check=False)
    assert code and "train_0000.bin is damaged" in printed and "Traceback" not in printed
    os.truncate(out / "data" / "demo" / "meta.json", 3)
    code, printed = run("pretrain.py", f"--out={out}", *TINY, check=False)
    assert code and "meta.json is damaged" in printed and "Traceback" not in printed


def test_a_reader_that_leaves_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` has done once it has seen enough
    process = subprocess.Popen([sys.executable, "data.py", "demo", "--count=5000"], cwd=HERE, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert process.communicate(timeout=60)[1] == ""


def test_one_writer_a_folder(tiny_run):
    with open(tiny_run / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        code, printed = run("sft.py", f"--out={tiny_run}", *TINY_SFT, check=False)
    assert code and "another run is writing" in printed and "Traceback" not in printed


def test_stages_without_their_beginning_say_so(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        scripts = ("sft.py", "rl.py", "sample.py", "evals.py")
        for code, printed in pool.map(lambda s: run(s, f"--out={tmp_path / s}", check=False), scripts):
            assert code and "run.sh" in printed and "Traceback" not in printed


def test_own_text(tmp_path):
    (tmp_path / "book.txt").write_text("\n".join(data.demo_texts(5, count=3000)))
    run("pretrain.py", f"--out={tmp_path / 'out'}", f"--data={tmp_path / 'book.txt'}", *TINY, "--steps=3")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["stages"]["base"]["bpb"] > 0


def test_terminal_answers_once(tiny_run):
    assert run("sample.py", f"--out={tiny_run}", "-p", "Hello!", "--max_tokens=5", "--device=cpu")[0] == 0
    assert run("evals.py", f"--out={tiny_run}", "--count=2", "--device=cpu")[0] == 0
    assert " bits per byte" in run("evals.py", f"--out={tiny_run}", f"--text={tiny_run / 'printed.txt'}", "--device=cpu")[1]


def test_learning_rates_go_up_and_down():
    import pretrain
    import sft

    cfg = dataclasses.replace(pretrain.Config(), steps=100)
    scales = [pretrain.lr_scale(s, cfg) for s in range(100)]
    assert all(0 < s <= 1 for s in scales) and max(scales) == 1 and scales[-1] < scales[0] and scales[-1] < 0.1
    scales = [sft.lr_scale(s, dataclasses.replace(sft.Config(), steps=100)) for s in range(100)]
    assert all(0 < s <= 1 for s in scales) and scales == sorted(scales, reverse=True) and scales[-1] < 0.05


def watch_updates(stage, monkeypatch):
    """Two lists that fill while the stage's main runs here: its first model, and each update's multiplier and gradients."""
    first, updates = [], []

    def build(model, *rates, **knobs):
        first.append(copy.deepcopy(model))
        optimizer = optim.build(model, *rates, **knobs)
        step = optimizer.step

        def watched(lr_scale):
            updates.append((lr_scale, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
            return step(lr_scale)

        optimizer.step = watched
        return optimizer

    monkeypatch.setattr(stage, "build", build)
    return first, updates


@pytest.mark.parametrize("micro_rows", [1, 3])
@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_a_stage_takes_the_gradient_of_the_mean(name, micro_rows, tiny_run, tmp_path, monkeypatch):
    """Eight rows, unevenly supervised and one not at all, make one update, however they are split. A step with nothing
    supervised has no gradient and no NaN. Multipliers count updates, not micro-batches."""
    stage, batches = __import__(name), []
    first, updates = watch_updates(stage, monkeypatch)

    def uneven(*args):
        ids, targets = data.batch(*args)
        for i, row in enumerate(targets):
            row[: 64 - 9 * i if not batches else 64 * (len(batches) == 1)] = -1
        batches.append((ids, targets))
        return ids, targets

    monkeypatch.setattr(stage, "batch", uneven)
    knobs = TINY if name == "pretrain" else [*TINY_SFT, "--batch_rows=8"]
    stage.main([f"--out={tmp_path}", f"--from={tiny_run}", *knobs, f"--micro_rows={micro_rows}", "--steps=4"])
    ids, targets = batches[0]
    loss = F.cross_entropy(first[0](ids).flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss.backward()
    for key, p in first[0].named_parameters():
        assert (updates[0][1][key] - p.grad).abs().max() < 1e-6, key
    assert all(g.eq(0).all() for g in updates[1][1].values())
    said = losses(tmp_path, "base" if name == "pretrain" else "sft")
    assert abs(said[0] - loss.item()) < 1e-4 and said[1] == 0
    scales = [scale for scale, _ in updates]
    assert len(scales) == 4 and all(0 <= s <= 1 for s in scales) and scales[-1] < scales[0]


def test_a_plan_is_plain_arithmetic(capsys):
    import pretrain

    def plan(*knobs):
        with pytest.raises(SystemExit) as end:
            pretrain.main(["--seq_len=2048", "--vocab_size=32768", "--compile=1", "--horizon=8", *knobs])
        assert end.value.code is None
        words = capsys.readouterr().out.replace(",", "").split()
        return int(words[1].rstrip(":")), float(words[words.index("hours") - 1]), int(words[words.index("rows") - 1])

    cfg = pretrain.Config(depth=24, seq_len=2048, vocab_size=32768, compile=True, horizon=8.0)
    weights = 24 * 12 * 1536**2 + 12 * 32 * 12 + 32768 * 1536  # matrices, gates (12 heads of 128), unembedding
    a = pretrain.estimate(cfg, (8, 989e12, 80e9))
    assert a["weights"] == weights and 0 <= 8 * weights - a["tokens"] < 2**20 and a["tokens"] % 2**20 == 0
    reach = 12 * 1024.5 * 1536 * 24  # attention: a query sees half of the row
    assert abs(a["flops"] / a["tokens"] / (6 * weights + reach) - 1) < 1e-6
    assert abs(a["hours"] - a["flops"] / (8 * 989e12 * 0.45 * 3600)) < 1e-9
    assert a["rows"] == 16 > pretrain.estimate(cfg, (8, 989e12, 48e9))["rows"] and pretrain.estimate(cfg, (1, 1e12, 1e9))["rows"] == 0
    depth, hours, rows = plan("--depth=24", "--plan=8xH100")
    assert (depth, rows) == (24, 16) and abs(hours - a["hours"]) < 0.05
    depths = [plan("--depth=0", f"--plan={n}xH100", f"--hours={h}") for n, h in ((1, 0.5), (1, 2), (8, 2), (8, 20))]
    assert [d for d, _, _ in depths] == sorted({d for d, _, _ in depths}) and all(h <= most for (_, h, _), most in zip(depths, (0.5, 2, 2, 20)))
    assert plan("--depth=0", "--plan=1x4090", "--hours=9999")[0] < 40  # memory is a bound too
    for knobs in (["--plan=8xpears"], ["--plan=0xH100"], ["--plan=H100"], ["--depth=0"] * (not torch.cuda.is_available())):
        with pytest.raises(SystemExit, match="GPUs of known speed"):
            pretrain.main(knobs or ["--plan=x"])


def test_a_full_gpu_is_said_in_one_line():
    def main(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")

    with pytest.raises(SystemExit, match=r"memory is full \(CUDA out of memory.*9 GiB\): a smaller --micro_rows"):
        gpt.command(main)


def test_mid_training_mixes_text_and_conversations(tiny_run, tmp_path, monkeypatch, capsys):
    """Rows of the base's own text, and conversations of which everything is supervised; fine-tuning then starts from it."""
    import sft

    steps = []
    monkeypatch.setattr(sft, "batch", lambda source, *args: (steps.append((source, args[0])), data.batch(source, *args))[1])
    sft.main([f"--out={tmp_path / 'a'}", f"--from={tiny_run}", *TINY_SFT, "--stage=mid", "--batch_rows=5"])
    assert "5 rows, 2 of them text" in capsys.readouterr().out and {n for _, n in steps} == {2, 3}
    (texts, _), (chats, _) = steps[:2]
    _, hash, train, _ = data.prepare(pretrain_config(tiny_run), CPU)
    assert [np.array_equal(a, b) for a, b in zip(texts.arrays, train.arrays)] == [True] * len(train.arrays)
    assert chats.masks and all(mask.all() for mask in chats.masks)
    assert gpt.load_model(tmp_path / "a" / "mid", CPU)[1]["stage"] == "mid" and not (tmp_path / "a" / "sft").exists()
    assert "Mid-training" in (tmp_path / "a" / "report.html").read_text()
    del steps[:]
    knobs = [f"--from={tmp_path / 'a'}", *TINY_SFT]
    sft.main([f"--out={tmp_path / 'b'}", *knobs])
    assert f"from {tmp_path}/a/mid" in capsys.readouterr().out and {n for _, n in steps} == {4}
    assert not all(mask.all() for mask in steps[0][0].masks)
    for knob, message in (("--stage=end", "sft or mid"), ("--text=1", "share"), ("--init=mid", "not trained on text")):
        with pytest.raises(SystemExit, match=message):
            sft.main([*knobs, f"--out={tmp_path / 'c'}", "--stage=mid", knob])


def pretrain_config(out):
    """The knobs that the base in folder `out` was trained with."""
    return SimpleNamespace(**json.loads((gpt.latest(out / "base") / "state.json").read_text())["config"])


def test_weights_and_moments_are_fp32_in_a_bf16_run(tiny_run, tmp_path):
    """Also through a checkpoint, and nothing is rounded to bf16 on the way."""
    for _ in range(2):
        run("pretrain.py", f"--out={tmp_path}", f"--from={tiny_run}", *TINY, "--dtype=bfloat16", "--steps=3", "--stop_after=2")
    moments = torch.load(gpt.latest(tmp_path / "base") / "optimizer_000.pt", weights_only=True)["bundles"]
    for name, t in [*weights(tmp_path / "base").items(), *(item for block in moments for item in block.items())]:
        assert t.dtype == torch.float32 and not torch.equal(t, t.bfloat16().float()), name
    loaded, _ = gpt.load_model(tmp_path / "base", dataclasses.replace(CPU, dtype=torch.bfloat16))
    assert same(loaded.state_dict(), weights(tmp_path / "base"))


def graded_by_length(monkeypatch):
    """A reward that a model which says anything at all gets now and then."""
    monkeypatch.setattr(data.Arithmetic, "grade", lambda item, text: float(len(text) % 2))


def rl_updates(tiny_run, tmp_path, monkeypatch, micro_rows, extra=()):
    """Run tiny steps here: the first model, each step's graded answers, each update's multiplier and gradients, the end's id."""
    import rl

    shutil.copytree(tiny_run / "sft", tmp_path / "sft")
    tokenizer, trained = data.load_tokenizer(tiny_run)[0], weights(tmp_path / "sft")
    end, often = tokenizer.special("<|assistant_end|>"), tokenizer.encode(".")[0]
    trained["unembed.weight"][[end, often]] = trained["unembed.weight"][[often, end]]  # so that answers end now and then
    torch.save(trained, gpt.latest(tmp_path / "sft") / "model.pt")
    seen, graded = [], rl.graded
    monkeypatch.setattr(rl, "graded", lambda *args: seen.append(graded(*args)) or seen[-1])
    graded_by_length(monkeypatch)
    first, updates = watch_updates(rl, monkeypatch)
    knobs = [*TINY_RL, "--problems=4", "--samples=8", "--max_tokens=30", f"--micro_rows={micro_rows}", "--steps=2", *extra]
    rl.main([f"--out={tmp_path}", f"--from={tiny_run}", *knobs])
    return first[0], seen, updates, end


def plain_logprobs(model, answer):
    """Of an answer's tokens that the model chose, from the logits of a forward pass of its own; and the recorded ones."""
    ids, learnt = torch.tensor(answer.prompt + answer.ids), torch.tensor(answer.learnt)
    scored = torch.log_softmax(model(ids[None, :-1])[0], -1).gather(1, ids[1:, None])[-len(answer.ids) :, 0]
    return scored[learnt], torch.tensor(answer.logprobs)[learnt]


@pytest.mark.parametrize("micro_rows", [1, 5])
def test_rl_takes_the_gradient_of_its_formula(micro_rows, tiny_run, tmp_path, monkeypatch):
    """Against the sum over all answers one by one: none is dropped, tokens weigh the same in every batch, the end of an
    answer counts, and what was sampled from is what is scored."""
    model, seen, updates, end = rl_updates(tiny_run, tmp_path, monkeypatch, micro_rows)
    answers, total, count = seen[0][0], 0, 0
    assert len(answers) == 32 and sum(a.advantage != 0 for a in answers) % 5 and any(a.ids[-1] == end and a.advantage for a in answers)
    for i, answer in enumerate(answers):
        group = answers[i - i % 8 :][:8]
        assert len({a.ids[0] for a in group}) > 1
        assert abs(answer.advantage - answer.reward + sum(a.reward for a in group) / 8) < 1e-6
        logprobs, recorded = plain_logprobs(model, answer)
        assert (logprobs - recorded).abs().max() < 1e-4
        total, count = total - answer.advantage * logprobs.sum(), count + len(logprobs)
    (total / count).backward()
    for key, p in model.named_parameters():
        assert (updates[0][1][key] - p.grad).abs().max() < 1e-6, key
    assert [scale for scale, _ in updates] == [1, 0.5]


def test_rl_clips_the_ratio_and_pulls_back_to_its_start(tiny_run, tmp_path, monkeypatch):
    """The second update from the same answers against PPO's formula, whose ratio is not one any more, with GRPO's KL."""
    saved, step = [], optim.MuonAdamW.step
    monkeypatch.setattr(optim.MuonAdamW, "step", lambda self, scale: (step(self, scale), saved.append(copy.deepcopy(models[0])))[0])
    models, load = [], gpt.load_model

    def load_and_keep(*args):
        models.append(load(*args)[0])
        return models[-1], {"seconds": 0}

    import rl

    monkeypatch.setattr(rl, "load_model", load_and_keep)
    knobs = ["--updates=2", "--kl=0.5", "--clip=0.01", "--steps=1", "--lr_matrix=0.02"]
    start, seen, updates, _ = rl_updates(tiny_run, tmp_path, monkeypatch, 5, knobs)
    model, answers, total, count, clipped = saved[0], seen[0][0], 0, 0, 0
    for answer in answers:
        logprobs, recorded = plain_logprobs(model, answer)
        with torch.no_grad():
            before = plain_logprobs(start, answer)[0]
        ratio, back = (logprobs - recorded).exp(), (before - logprobs).exp()
        objective = torch.minimum(ratio * answer.advantage, ratio.clamp(0.99, 1.01) * answer.advantage)
        total = total - (objective - 0.5 * (back - back.log() - 1)).sum()
        count, clipped = count + len(logprobs), clipped + ((ratio - 1).abs() > 0.01).sum()
    model.zero_grad()
    (total / count).backward()
    assert len(updates) == 2 and 0 < clipped < count
    for key, p in model.named_parameters():
        assert (updates[1][1][key] - p.grad).abs().max() < 1e-5, key


def test_rl_that_learns_resumes_to_the_same_bits(tiny_run, tmp_path, monkeypatch):
    import rl

    graded_by_length(monkeypatch)
    for folder, stop in (("whole", 0), ("cut", 2), ("cut", 0)):
        rl.main([f"--out={tmp_path / folder}", f"--from={tiny_run}", *TINY_RL, f"--stop_after={stop}"])
        gpt.lock_folder.held.close()  # as the end of a process does
    assert same(weights(tmp_path / "cut" / "rl"), weights(tmp_path / "whole" / "rl"))
    assert not same(weights(tmp_path / "whole" / "rl"), weights(tiny_run / "sft"))  # it did learn


def test_rl_rows_supervise_what_was_sampled_only(tokenizer):
    import rl

    answer = rl.Answer([1, 2, 3], [4, 5, 6], [True, False, True], logprobs=[-1.0, 0.0, -2.0])
    ids, targets = rl.rows_of([answer], "cpu")
    assert ids.tolist() == [[1, 2, 3, 4, 5]] and targets.tolist() == [[-1, -1, 4, -1, 6]]
    assert rl.at_tokens([answer], "logprobs", ids).tolist() == [[0, 0, -1, 0, -2]]


def test_stopping_is_trained(chatty, tokenizer):
    """An answer that is nothing but its end, and was good, makes that end likelier."""
    import rl

    stop = tokenizer.special("<|assistant_end|>")
    answers = [rl.Answer([1, 2], [stop], [True], 1.0, 1.0)]
    ids, targets = rl.rows_of(answers, "cpu")
    chatty.zero_grad()
    rl.policy_loss(chatty(ids, targets), targets, answers, rl.Config())[0].backward()
    grads = chatty.unembed.weight.grad.norm(dim=1)
    chatty.zero_grad()
    assert grads[stop] == grads.max() > 0


def test_rl_gradient_does_not_depend_on_micro_batches(chatty):
    import rl

    rng = random.Random(0)
    answers = []
    for i in range(10):  # 10 in batches of 4 must be all 10
        ids = [rng.randrange(600) for _ in range(3 + i)]
        answers.append(rl.Answer([1, 2], ids, [True] * len(ids), 0.0, rng.uniform(-1, 1)))
    grads = []
    for size in (10, 4, 1):
        chatty.zero_grad()
        for rows in rl.batches([[a] for a in answers], size):
            ids, targets = rl.rows_of(rows, "cpu")
            rl.policy_loss(chatty(ids, targets), targets, rows, rl.Config())[0].backward()
        grads.append(chatty.unembed.weight.grad.clone())
    chatty.zero_grad()
    assert (grads[0] - grads[1]).abs().max() < 1e-4 and (grads[0] - grads[2]).abs().max() < 1e-4


# DPO: pairs, their loss, and the stage as people run it

TURNS = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Who are you?\n\nAssistant: "
RATED = [("bad", ("1", "2")), ("best", ("5", "N/A")), ("good", ("4", "5"))]
PAIRS = {  # a line of a file: the number of messages, the chosen answer and the rejected one; None is left out
    json.dumps({"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}): (1, "Hello!", "Go away."),
    json.dumps({"messages": [QUESTION, REPLY, QUESTION], "chosen": "Yes.", "rejected": "No."}): (3, "Yes.", "No."),
    json.dumps({"chosen": TURNS + "A program.", "rejected": TURNS + "A parrot.\n\nHuman: Oh"}): (3, "A program.", "A parrot."),
    json.dumps(
        {
            "instruction": "Hi",
            "completions": [
                {"response": r, "annotations": {"helpfulness": {"Rating": a}, "honesty": {"Rating": b, "Rationale": ""}}} for r, (a, b) in RATED
            ],
        }
    ): (1, "best", "bad"),
    json.dumps({"prompt": "Hi", "chosen": "Hello!", "rejected": "Hello!"}): None,
    json.dumps({"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": "\n\nHuman: a\n\nHuman: b\n\nAssistant: d"}): None,
    json.dumps({"instruction": "Hi", "completions": []}): None,
}


def test_pairs_from_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(PAIRS))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as f:
        f.write("\n".join(PAIRS))
    pairs = data.read_pairs(str(tmp_path))
    assert [(len(p["messages"]), p["chosen"], p["rejected"]) for p in pairs] == [p for p in PAIRS.values() if p] * 2
    assert pairs[2]["messages"][1] == {"role": "assistant", "content": "Hello!"}
    many = [{"messages": [{"role": "user", "content": f"{i % 500}?"}], "chosen": str(i), "rejected": ""} for i in range(1000)]
    train, held = data.split_pairs(many)
    assert len(train) + len(held) == 1000 and 20 < len(held) < 100
    assert not {p["messages"][0]["content"] for p in train} & {p["messages"][0]["content"] for p in held}


BAD_PAIRS = ['{"prompt": "Hi"', '{"prompt": "Hi", "chosen": "Hello!"}', "[]", '{"prompt": 5, "chosen": "a", "rejected": "b"}', '{"text": "Hi"}']
BAD_PAIRS += ['{"chosen": "a", "rejected": "b"}', json.dumps({"messages": [QUESTION, REPLY], "chosen": "a", "rejected": "b"})]
BAD_PAIRS += ['{"prompt": "Hi", "chosen": "a", "rejected": null}', '{"instruction": "Hi", "completions": [{"response": "a"}]}']


@pytest.mark.parametrize("bad", BAD_PAIRS)
def test_bad_pairs_get_one_line(tmp_path, bad):
    (tmp_path / "a.jsonl").write_text(next(iter(PAIRS)) + "\n" + bad)
    with pytest.raises(SystemExit, match="line 2") as caught:
        data.read_pairs(str(tmp_path / "a.jsonl"))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    (tmp_path / "a.jsonl").write_text(list(PAIRS)[4])
    with pytest.raises(SystemExit, match="no pair"):
        data.read_pairs(str(tmp_path / "a.jsonl"))


def test_preferred_answers_are_right_and_held_out():
    seen = {p["messages"][0]["content"] for p in data.preferences(1, 300)}
    held = data.preferences(1, 100, "test")
    assert not seen & {p["messages"][0]["content"] for p in held}
    items = data.TASKS["polite"].items("test", 0, 20)
    for pair in held:
        chosen, rejected = (data.visible(pair[k]) for k in ("chosen", "rejected"))
        facts = {"messages": pair["messages"], "task": "arithmetic", "answer": data.last_number(chosen)}
        assert pair["chosen"][:-1] == pair["rejected"][:-1]  # they differ in manners alone
        if facts["answer"] is not None:
            assert data.Polite.grade(facts, chosen) == 1 and data.Polite.grade(facts, rejected) == 0
    assert len({i["task"] for i in items}) == 3 and all(data.Polite.grade(i, str(i["answer"])) == 0 for i in items)


def test_each_epoch_shows_every_pair_once(tmp_path, tokenizer):
    import rl

    lines = [{"prompt": f"What is {i}?", "chosen": "That " * i, "rejected": "No. " * 90} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    n = len(data.split_pairs(data.read_pairs(str(tmp_path)))[0])
    train, held = rl.load_pairs(rl.Config(data=str(tmp_path), steps=n, pairs=2), tokenizer, 64)
    epochs = [[id(pair) for pair in train[:n]], [id(pair) for pair in train[n:]]]
    assert len(set(epochs[0])) == n < 60 and sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1] and len(held) == 60 - n
    for chosen, rejected in train:  # cut to a row of 64 where it must be, and the prompt the same for both
        assert chosen.prompt == rejected.prompt and len(rejected.prompt + rejected.ids) == 65 and all(rejected.learnt)


def test_dpo_loss_is_its_formula():
    """On given log-probabilities, by plain arithmetic; and its slope, which weighs pairs that are ranked wrong most."""
    import rl

    rng = np.random.default_rng(3)
    logprobs, starts = -rng.uniform(0, 4, (6, 5)), -rng.uniform(0, 20, 6)
    answers = [rl.Answer([1], [2] * 5, [True] * 5, reference=s) for s in starts]
    nats = torch.tensor(-logprobs, requires_grad=True)
    loss, figures = rl.dpo_loss(nats, torch.ones(6, 5), answers, rl.Config(beta=0.3))
    gains = logprobs.sum(1) - starts
    margins = 0.3 * (gains[[0, 2, 4]] - gains[[1, 3, 5]])
    assert abs(loss.item() - np.log1p(np.exp(-margins)).sum()) < 1e-6 and min(margins) < 0 < max(margins)
    assert abs(figures["margin"].item() - margins.sum()) < 1e-6 and figures["ranked_right"] == (margins > 0).sum()
    assert abs(figures["chosen_logprob"].item() - logprobs[0::2].sum()) < 1e-6
    loss.backward()
    assert np.abs(nats.grad[0::2, 0].numpy() - 0.3 / (1 + np.exp(margins))).max() < 1e-6
    assert (nats.grad[1::2] == -nats.grad[0::2]).all()
    more = rl.dpo_loss(nats, torch.ones(6, 5), answers, rl.Config(beta=0.3, nll=0.5))[0] - loss
    assert abs(more.item() + 0.5 * logprobs[0::2].mean(1).sum()) < 1e-6


def test_dpo_takes_the_gradient_of_its_formula(tiny_run, tmp_path, monkeypatch):
    """Against plain passes over each answer alone: prompts and what the calculator wrote do not count, ends do."""
    import rl

    first, updates = watch_updates(rl, monkeypatch)
    tokenizer = data.load_tokenizer(tiny_run)[0]
    call = [{"type": "python", "text": "1+1"}, {"type": "output", "text": "2"}, {"type": "text", "text": "Two."}]
    pairs = [{"messages": [{"role": "user", "content": "Hi! " * i}], "chosen": call, "rejected": "I say " + "no" * i} for i in range(1, 6)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    files = [f"--data={tmp_path / 'pairs.jsonl'}", f"--val_data={tmp_path / 'pairs.jsonl'}"]
    rl.main([f"--out={tmp_path}", f"--from={tiny_run}", *TINY_RL, "--method=dpo", "--pairs=5", "--steps=1", *files])
    total, start = 0, first[0]
    for pair in pairs:
        logprobs = []
        for kind in ("chosen", "rejected"):
            ids, mask = data.render([*pair["messages"], {"role": "assistant", "content": pair[kind]}], tokenizer)
            assert len(ids) <= 65  # nothing is cut
            ids = torch.tensor(ids)
            scored = torch.log_softmax(start(ids[None, :-1])[0], -1).gather(1, ids[1:, None])[:, 0]
            logprobs.append(scored[torch.tensor(mask[1:])].sum())
        margin = 0.1 * (logprobs[0] - logprobs[1] - (logprobs[0] - logprobs[1]).detach())
        total = total - F.logsigmoid(margin)
    (total / 5).backward()
    for key, p in start.named_parameters():
        assert (updates[0][1][key] - p.grad).abs().max() < 1e-6, key


def test_dpo_ranks_resumes_and_shares(tiny_run, tmp_path):
    """It learns the demo's preference; cut short, it ends with the same bits, and does not score the pairs again; two ranks agree."""
    knobs = [f"--from={tiny_run}", *TINY_RL, "--method=dpo", "--pairs=4", "--tasks=facts", "--final_count=20"]
    knobs += ["--lr_matrix=0.02", "--lr_embed=0.02"]
    run("rl.py", f"--out={tmp_path / 'whole'}", *knobs)
    run("rl.py", f"--out={tmp_path / 'cut'}", *knobs, "--stop_after=2")
    kept = (tmp_path / "cut" / "rl" / "reference_train.json").stat().st_mtime_ns
    run("rl.py", f"--out={tmp_path / 'cut'}", *knobs)
    assert same(weights(tmp_path / "cut" / "rl"), weights(tmp_path / "whole" / "rl"))
    assert (tmp_path / "cut" / "rl" / "reference_train.json").stat().st_mtime_ns == kept
    run("rl.py", f"--out={tmp_path / 'two'}", *knobs, ranks=2)
    assert len(losses(tmp_path / "whole", "rl")) == 4
    assert np.abs(np.subtract(losses(tmp_path / "two", "rl"), losses(tmp_path / "whole", "rl"))).max() < 1e-4
    figures = [json.loads((tmp_path / f / "report.json").read_text())["stages"]["rl"] for f in ("whole", "two")]
    assert figures[0]["n/pairs"] == 20 and figures[0]["accuracy/pairs"] == figures[1]["accuracy/pairs"] > 0.6


@pytest.mark.parametrize("knob, message", [("--method=ppo", "policy learns from"), ("--data=pairs.jsonl", "belongs to"), ("--updates=0", "or more")])
def test_knobs_of_the_other_method_get_one_line(knob, message):
    import rl

    with pytest.raises(SystemExit, match=message):
        rl.main([knob])


# -----------------------------------------------------------------------------
# Server


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A folder with a tokenizer and an `sft` checkpoint of a small random model, which says anything at all."""
    folder = tmp_path_factory.mktemp("untrained")
    texts = ["Who are you? I am a small model.", "What is the capital of Sweden? It is Stockholm.", "12 times 34 is 408."] * 3
    tokenizer = Tokenizer.train(texts, 320, SPECIALS)
    tokenizer.save(str(folder / "tokenizer"))
    model = GPT(GPTConfig.from_depth(1, tokenizer.vocab_size, 128)).init(1)
    state = {"stage": "sft", "config": {}, "tokenizer": data.tokenizer_hash(folder)}
    gpt.save_checkpoint(f"{folder}/sft", 0, model, None, CPU, state)
    return folder


@pytest.fixture(scope="module")
def server(untrained):
    """The address of a server with two slots and two places to wait; stopped by SIGTERM."""
    knobs = "--port=0 --slots=2 --queue=2 --max_body=20000 --device=cpu --dtype=float32 --threads=1".split()
    command = [sys.executable, "serve.py", f"--out={untrained}", *knobs]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = re.match(r"(http://\S+)/ serves", process.stdout.readline())[1]
        yield url, process
        request = long_request(url)
        with connect(url) as client:
            client.sendall(request)
            client.recv(1000)
            process.terminate()
            assert b"data: [DONE]" in read_all(client)
        assert process.wait(20) == 0
        assert "Traceback" not in process.stdout.read()
    finally:
        process.kill()


HELLO = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 24, "seed": 5}


def chat(url, **changes):
    return requests.post(f"{url}/v1/chat/completions", json=HELLO | changes, timeout=20)


def long_request(url):
    """The bytes of a streamed request whose answer the model does not end by itself."""
    long = HELLO | {"temperature": 2, "max_tokens": 100}
    long["seed"] = next(s for s in range(99) if chat(url, **long | {"seed": s}).json()["usage"]["completion_tokens"] == 100)
    body = json.dumps(long | {"stream": True}).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def read_all(client):
    return b"".join(iter(lambda: client.recv(100_000), b""))


def chat_streamed(url, **changes):
    """(visible text, what the calculator did, finish reason, usage) put together from the events."""
    response = chat(url, stream=True, stream_options={"include_usage": True}, **changes)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    events = response.content.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    *chunks, last = [json.loads(e.removeprefix("data: ")) for e in events[:-2]]
    choices = [c["choices"][0] for c in chunks]
    text = "".join(c["delta"].get("content", "") for c in choices)
    tool = "".join(c["delta"]["tool"]["text"] for c in choices if "tool" in c["delta"])
    return text, tool, choices[-1]["finish_reason"], last["usage"]


def test_serve_answers(server, untrained):
    """Streamed, not streamed and the engine itself give the same text; counts are right; choices differ."""
    url, _ = server
    health = requests.get(f"{url}/health").json()
    assert (health["status"], health["stage"], health["step"]) == ("ok", "sft", 0)
    assert requests.get(f"{url}/v1/models").json()["data"][0]["id"] == "onesitting-sft"
    page = requests.get(f"{url}/")
    assert "<!doctype html>" in page.text and not re.search("(src|href)=.?(http|//)", page.text)

    config = Config(out=str(untrained))
    engine, _ = load_engine(config, gpt.start_machine("cpu", "float32", 1), 1)
    prompt = data.render(HELLO["messages"], engine.tokenizer, reply=True)[0]
    for temperature, top_k, top_p, seed in [(0, 0, 1, 0), (1.0, 0, 1, 5), (0.8, 20, 0.9, -7)]:
        knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        request = engine.generate([prompt], Params(max_tokens=24, **knobs))[0]
        pieces = Stream(engine.tokenizer).new(request.ids, end=True)
        expected = "".join(text for kind, text in pieces if kind == "text")
        whole = chat(url, **knobs).json()
        choice = whole["choices"][0]
        assert choice["message"]["content"] == expected
        assert "".join(p["text"] for p in choice["message"]["parts"]) == "".join(text for _, text in pieces)
        assert choice["finish_reason"] == request.finish
        sizes = {"prompt_tokens": len(prompt), "completion_tokens": len(request.ids)}
        assert whole["usage"] == sizes | {"total_tokens": len(prompt) + len(request.ids)}
        tool = "".join(text for kind, text in pieces if kind != "text")
        assert chat_streamed(url, **knobs) == (expected, tool, request.finish, whole["usage"])

    both = [c["message"] for c in chat(url, n=2).json()["choices"]]
    assert both == [chat(url, seed=seed).json()["choices"][0]["message"] for seed in (5, 6)]


def test_serve_finishes_running_answers_at_sigterm(untrained):
    """Also one whose connection the main thread is still handing over: the signal once closed it."""
    slow = """
import sys, time, serve
hand_over = serve.Server.process_request
serve.Server.process_request = lambda *args: (hand_over(*args), [time.sleep(0.01) for _ in range(100)])
serve.main(sys.argv[1:])"""
    command = [sys.executable, "-c", slow, f"--out={untrained}", *"--port=0 --device=cpu --dtype=float32 --threads=1".split()]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = re.match(r"(http://\S+)/ serves", process.stdout.readline())[1]
        request = long_request(url)
        with connect(url) as client:
            client.sendall(request)
            client.recv(1000)
            process.terminate()
            assert b"data: [DONE]" in read_all(client)
        assert process.wait(20) == 0
        assert "Traceback" not in process.stdout.read()
    finally:
        process.kill()


def test_serve_stop_strings(server):
    """Also where the stop string begins in one token and ends in another."""
    url, _ = server
    answers = ((seed, chat(url, seed=seed).json()["choices"][0]["message"]) for seed in range(50))
    seed, full = next((s, m["content"]) for s, m in answers if len(m["parts"]) == 1 and len(m["content"]) > 12)
    for stop in (full[6:7], full[6:10], full[8:14]):
        for stops in (stop, ["never said", stop]):
            choice = chat(url, seed=seed, stop=stops).json()["choices"][0]
            assert choice["message"]["content"] == full[: full.index(stop)]
            assert choice["finish_reason"] == "stop"
            assert chat_streamed(url, seed=seed, stop=stops)[0] == full[: full.index(stop)]


def test_serve_forgets_oldest(server):
    """A conversation that is too long loses its oldest exchanges, but not its system message."""
    url, _ = server
    system = [{"role": "system", "content": "Be brief."}]
    past = [{"role": "user", "content": "What is the capital?"}, {"role": "assistant", "content": "It is Stockholm."}]
    lengths = [chat(url, messages=system + past * n + HELLO["messages"]).json()["usage"]["prompt_tokens"] for n in range(9)]
    cost = lengths[1] - lengths[0]
    kept = (128 - 24 - lengths[0]) // cost  # 24 tokens are kept free for the answer
    assert lengths == [lengths[0] + cost * min(n, kept) for n in range(9)]
    assert lengths[0] > chat(url).json()["usage"]["prompt_tokens"]
    spoken = [past[0], past[1] | {"parts": [{"type": "python", "text": "1+1"}, {"type": "output", "text": "2"}]}]
    assert chat(url, messages=spoken + HELLO["messages"]).status_code == 200


def test_serve_errors(server):
    url, _ = server
    user = HELLO["messages"]
    bad = [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": user * 2}, "messages[1].role"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "long " * 200}]}, "messages"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 3}, "n"),
        ({"stop": [1]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"tools": [{}]}, "tools"),
        ({"echo": True}, "echo"),
        ({"temprature": 1}, "temprature"),
    ]
    path = f"{url}/v1/chat/completions"
    for change, param in bad:
        response = requests.post(path, data=json.dumps(HELLO | change), timeout=20)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), change
    for body in (b"", b"{", b"[1]", b"\xff\xfe", b"[" * 10000, b'{"n": ' + b"9" * 5000 + b"}"):
        assert requests.post(path, data=body, timeout=20).status_code == 400
    others = [
        (requests.post(path, data=b"x" * 5_000_000, timeout=20), 413),
        (requests.get(path, timeout=20), 405),
        (requests.delete(f"{url}/health", timeout=20), 405),
        (requests.request("BREW", f"{url}/health", timeout=20), 405),
        (requests.post(f"{url}/v2/", json={}, timeout=20), 404),
        (requests.post(path, data=iter([b"{}"]), timeout=20), 411),
    ]
    for response, status in others:
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    for raw in (b"garbage\r\n\r\n", b"GET /" + b"a" * 70000, b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n"):
        with connect(url) as client:
            client.sendall(raw)
            assert b'"error"' in read_all(client)
    session = requests.Session()  # on one connection, an error leaves the next request whole
    assert [session.post(path, json=HELLO | c, timeout=20).status_code for c in ({}, {"n": 0}, {})] == [200, 400, 200]


def complete(url, **changes):
    return requests.post(f"{url}/v1/completions", json={"max_tokens": 12, "seed": 5} | changes, timeout=20)


@pytest.fixture(scope="module")
def direct(untrained):
    """The server's model without the server."""
    return load_engine(Config(out=str(untrained)), gpt.start_machine("cpu", "float32", 1), 1)[0]


def test_serve_completions(server, direct):
    """Text, ids, echo and log-probabilities are those of the engine and of a direct forward pass, streamed or not."""
    url, _ = server
    tokenizer, text = direct.tokenizer, "The capital of Sweden né"
    ids = tokenizer.encode(text)
    bos = tokenizer.special("<|bos|>")
    for prompt, read in ((text, [bos, *ids]), (ids, ids), ([bos, *ids], [bos, *ids])):
        request = direct.generate([read], Params(max_tokens=12, temperature=1.0, seed=5, top_logprobs=3))[0]
        said = read if isinstance(prompt, list) else ids
        choice = complete(url, prompt=prompt, echo=True, logprobs=3).json()["choices"][0]
        written = request.ids[:-1] if request.finish == "stop" else request.ids
        assert choice["text"] == tokenizer.decode(said + written) and choice["finish_reason"] == request.finish
        form = choice["logprobs"]
        with torch.inference_mode():
            rows = torch.log_softmax(direct.model(torch.tensor([read + request.ids[:-1]]))[0], -1)
        expected = rows.gather(1, torch.tensor(read[1:] + request.ids)[:, None])[:, 0].tolist()
        expected = [None, *expected][-len(said + request.ids) :]
        assert [p is None for p in form["token_logprobs"]] == [p is None for p in expected]
        assert all(abs(a - b) < 1e-4 for a, b in zip(form["token_logprobs"], expected) if b is not None)
        for token, logprob, top, row in zip(form["tokens"][::-1], form["token_logprobs"][::-1], form["top_logprobs"][::-1], rows.flip(0)):
            assert top[token] == logprob and len(top) in (3, 4) and abs(max(top.values()) - row.max().item()) < 1e-4
        for id, token, at in zip(said + written, form["tokens"], form["text_offset"]):
            if token.startswith("bytes:"):
                assert bytes.fromhex(token[6:].replace("\\x", "")) == tokenizer.token_bytes(id)
            else:
                assert choice["text"][at:].startswith(token) and token.encode() == tokenizer.token_bytes(id)
        response = complete(url, prompt=prompt, echo=True, logprobs=3, stream=True)
        chunks = [json.loads(e.removeprefix("data: ")) for e in response.content.decode().split("\n\n")[:-2]]
        chunks = [chunk["choices"][0] for chunk in chunks]
        assert "".join(c["text"] for c in chunks) == choice["text"] and chunks[-1]["finish_reason"] == request.finish
        for key in form:
            assert [x for c in chunks if c["logprobs"] for x in c["logprobs"][key]] == form[key]

    scored = complete(url, prompt=[ids, ids[:3]], echo=True, logprobs=0, max_tokens=0).json()
    assert [c["text"] for c in scored["choices"]] == [text, tokenizer.decode(ids[:3])]
    assert scored["usage"] == {"prompt_tokens": len(ids) + 3, "completion_tokens": 0, "total_tokens": len(ids) + 3}
    assert len(scored["choices"][0]["logprobs"]["tokens"]) == len(ids) and scored["choices"][1]["finish_reason"] == "length"
    assert complete(url, prompt=[1] * 128, echo=True, logprobs=1, max_tokens=0).status_code == 200  # a whole context

    whole = complete(url, prompt=[text, "Who"], n=2).json()
    alone = [complete(url, prompt=prompt, seed=seed).json()["choices"][0]["text"] for prompt in (text, "Who") for seed in (5, 6)]
    assert [c["text"] for c in whole["choices"]] == alone and [c["index"] for c in whole["choices"]] == [0, 1, 2, 3]
    stop = alone[0][3:5]
    assert complete(url, prompt=text, stop=[text[:4], stop], echo=True).json()["choices"][0]["text"] == text + alone[0][: alone[0].index(stop)]

    bad = [({"prompt": p}, "prompt") for p in (None, [], [[]], 7, [1, "a"], [[1], "a", 2], [-1], [10**9], [True], {}, ["\ud800"], "a" * 9000)]
    bad += [({"max_tokens": 0}, "max_tokens"), ({"logprobs": 6}, "logprobs"), ({"logprobs": True}, "logprobs"), ({"echo": 1}, "echo")]
    bad += [({"prompt": ["a"] * 5}, "prompt"), ({"messages": []}, "messages"), ({"suffix": "x"}, "suffix")]
    for change, param in bad:
        body = json.dumps({"prompt": "a"} | change)
        response = requests.post(f"{url}/v1/completions", data=body, timeout=20)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), change


def test_serve_chat_logprobs(server, direct):
    url, _ = server
    prompt = data.render(HELLO["messages"], direct.tokenizer, reply=True)[0]
    request = direct.generate([prompt], Params(max_tokens=24, temperature=0.9, seed=5, top_logprobs=2))[0]
    wanted = {"temperature": 0.9, "logprobs": True, "top_logprobs": 2}
    message, logprobs = (chat(url, **wanted).json()["choices"][0][key] for key in ("message", "logprobs"))
    plain = b"".join(bytes(token["bytes"]) for token in logprobs["content"])
    assert plain.decode(errors="replace") == message["content"]
    shown = iter(zip(request.ids, request.logprobs, request.tops))
    for token in logprobs["content"]:  # all those of the content, in the engine's order
        id, logprob, top = next(s for s in shown if list(direct.tokenizer.token_bytes(s[0])) == token["bytes"])
        assert abs(token["logprob"] - logprob) < 1e-4 and len(token["top_logprobs"]) == 2
        assert token["top_logprobs"][0]["bytes"] == list(direct.tokenizer.token_bytes(top[0][0]))
    response = chat(url, stream=True, **wanted)
    chunks = [json.loads(e.removeprefix("data: "))["choices"][0] for e in response.content.decode().split("\n\n")[:-2]]
    assert [t for c in chunks if c["logprobs"] for t in c["logprobs"]["content"]] == logprobs["content"]
    assert chat(url).json()["choices"][0]["logprobs"] is None
    for change in ({"top_logprobs": 2}, {"logprobs": 3}, {"logprobs": True, "top_logprobs": 21}):
        assert chat(url, **change).status_code == 400


@pytest.mark.parametrize(
    "stop, content, seen",
    [
        ([], "It is 42, so.", True),
        (["42, s"], "It is ", True),  # begins after the calculation
        (["so"], "It is 42, ", True),
        (["is 42"], "It ", False),  # the calculation lies within it
        (["6*7", "<|python"], "It is 42, so.", True),  # what the calculator was told is no content
    ],
)
def test_serve_stop_strings_around_a_calculation(tokenizer, stop, content, seen):
    s = tokenizer.special
    call = [s("<|python_start|>"), *tokenizer.encode("6*7"), s("<|python_end|>")]
    script = tokenizer.encode("It is ") + call + [0] * (2 + len(tokenizer.encode("42")))  # the calculator's tokens are forced
    script += [*tokenizer.encode("42, so."), s("<|assistant_end|>")]
    cfg = GPTConfig(tokenizer.vocab_size, 96, 1, 64, 1, 1)
    for live in (False, True):
        engine = Engine(Scripted(cfg, script, 2), tokenizer, 1)
        answer = serve.Answer(0, [1, 2], Params(max_tokens=60), stop, queue.SimpleQueue(), live=live, logprobs=True)
        answer.begin(engine)
        for now in range(60):
            if not answer.finish:
                engine.step()
                answer.advance(engine, float(now), 0.0, deadline=1e12)
        events = [answer.events.get() for _ in range(answer.events.qsize())]
        pieces = [piece for event in events for piece in event[1]]
        assert "".join(text for kind, text in pieces if kind == "text") == content and answer.finish == "stop"
        assert "".join(text for kind, text in pieces if kind != "text") == ("6*742" if seen else "")
        listed = b"".join(tokenizer.token_bytes(t[1]) for event in events for t in event[2]).decode()
        assert listed.startswith(content) and (stop or listed == content)


def test_serve_lists_the_token_that_ends_a_completion(tokenizer):
    """lm-eval takes the last token off the list as the one generated, also where the answer ends at once."""
    engine = Engine(Scripted(GPTConfig(tokenizer.vocab_size, 96, 1, 64, 1, 1), [tokenizer.special("<|bos|>")], 2), tokenizer, 1)
    answer = serve.Answer(0, [1, 2], Params(max_tokens=1), [], queue.SimpleQueue(), logprobs=True, raw=True)
    answer.begin(engine)
    engine.step()
    answer.advance(engine, 0.0, 0.0, deadline=1e12)
    _, pieces, tokens, finish = answer.events.get()
    assert (pieces, finish) == ([], "stop") and [(at, id) for at, id, _, _ in tokens] == [(0, tokenizer.special("<|bos|>"))]


def test_serve_tokenizes(server, direct):
    """In the form that lm-eval's remote tokenizer asks for."""
    url, _ = server
    text, tokenizer = "né <|bos|> x", direct.tokenizer
    ask = functools.partial(requests.post, timeout=20)
    ids = ask(f"{url}/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert ids == tokenizer.encode(text) and ask(f"{url}/detokenize", json={"tokens": ids}).json() == {"prompt": text}
    info = requests.get(f"{url}/tokenizer_info", timeout=20).json()
    bos = ask(f"{url}/tokenize", json={"prompt": info["bos_token"], "add_special_tokens": False}).json()
    assert bos == {"tokens": [tokenizer.special("<|bos|>")], "count": 1, "max_model_len": 128}
    assert ask(f"{url}/tokenize", json={"prompt": text}).json()["tokens"] == bos["tokens"] + ids
    for path, body in (("tokenize", {}), ("tokenize", {"prompt": "\udc00"}), ("detokenize", {"tokens": [1 << 40]}), ("detokenize", {"tokens": 3})):
        assert ask(f"{url}/{path}", data=json.dumps(body)).status_code == 400


def test_serve_metrics(server):
    url, _ = server

    def figures():
        lines = [line for line in requests.get(f"{url}/metrics", timeout=20).text.splitlines() if not line.startswith("# ")]
        assert all(re.fullmatch(r'[a-z_]+({[a-z]+="[^"]*"(,[a-z]+="[^"]*")*})? [0-9.]+', line) for line in lines)
        return collections.Counter({name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)})

    before = figures()
    asked = [{"role": "user", "content": "Which of these words is the longest, and how many letters does it have?"}]
    sizes = [chat(url, messages=asked, seed=seed).json()["usage"] for seed in (1, 2, 3)]
    chat(url, n=0)
    requests.get(f"{url}/" + "x" * 50, timeout=20)
    change = figures() - before
    path = 'route="/v1/chat/completions"'
    assert change[f'onesitting_requests_total{{{path},status="200"}}'] == 3 and change[f'onesitting_requests_total{{{path},status="400"}}'] == 1
    assert change['onesitting_requests_total{route="other",status="404"}'] == 1
    assert change["onesitting_prompt_tokens_total"] == sum(s["prompt_tokens"] for s in sizes)
    assert change["onesitting_reused_tokens_total"] >= 2 * (sizes[0]["prompt_tokens"] - 1)  # the same question twice more
    assert change["onesitting_generated_tokens_total"] == sum(s["completion_tokens"] for s in sizes)
    for name in ("time_to_first_token_seconds", "answer_seconds"):
        assert change[f"onesitting_{name}_count"] == change[f'onesitting_{name}_bucket{{le="+Inf"}}'] == 3
    assert 0 < change["onesitting_time_to_first_token_seconds_sum"] < change["onesitting_answer_seconds_sum"]


@contextlib.contextmanager
def serving(untrained, **knobs):
    """A server within this process: (address, server)."""
    knobs = dict(port=0, slots=2, queue=2, device="cpu", dtype="float32", threads=1) | knobs
    server = serve.Server(serve.Config(out=str(untrained), **knobs))
    server.start()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server
    finally:
        server.shutdown()
        thread.join()
        server.stop()


def test_serve_bounds(untrained):
    """An API key, the time an answer may take, and how many connections stay open."""
    with serving(untrained, api_key="sésame", connections=4) as (url, server):
        for path, status in (("/v1/models", 401), ("/metrics", 401), ("/nowhere", 401), ("/health", 200), ("/", 200)):
            for key in (None, "Bearer wrong", "Bearer ", "Bearer sésame2", "sésame", "Basic é"):
                headers = {"Authorization": key.encode()} if key else {}
                response = requests.get(url + path, headers=headers, timeout=20)
                assert response.status_code == status
                assert status == 200 or response.json()["error"]["code"] == "invalid_api_key"
        headers = {"Authorization": "Bearer sésame".encode()}
        ask = functools.partial(requests.post, f"{url}/v1/chat/completions", json=HELLO | {"temperature": 0}, headers=headers, timeout=20)
        idle = [connect(url) for _ in range(12)]  # they keep nobody out, and the oldest are closed
        assert ask().status_code == 200
        idle[0].settimeout(5)
        assert idle[0].recv(1) == b"" and len(server.idle) <= 4

        server.worker.deadline = 0.0  # the time is up after the first step, or before it
        late = ask()
        assert late.status_code == 503 or late.json()["choices"][0]["finish_reason"] == "length"
        assert late.status_code == 503 or late.json()["usage"]["completion_tokens"] == 1
        server.worker.deadline = 600.0
        assert ask().json()["usage"]["completion_tokens"] > 1


def malformed(rng):
    """The bytes of a request with something wrong with it, mostly."""
    paths = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/models", "/metrics", "/", "/%00", "//", "*", "/é", "http://["]
    odd = [None, True, -1, 0, 1e308, 2**70, "", "\ud800", "a" * 3000, [], [[]], {}, [None], [1, [2]], [[1, 2], [3]], "<|bos|>", [{"role": "user"}]]
    keys = [*serve.CHAT_OPTIONS, *serve.COMPLETION_OPTIONS, "tokens", "add_special_tokens", "\udc00", ""]
    body = {"messages": HELLO["messages"], "prompt": "Hi", "max_tokens": 2}
    if rng.random() < 0.6:  # one of the two, so that it may get further
        body.pop(rng.choice(["messages", "prompt"]))
    for _ in range(rng.randrange(1, 4)):
        body[rng.choice(keys)] = rng.choice(odd)
    raw = json.dumps(body).encode()
    if rng.random() < 0.2:
        raw = rng.choice([b"", b"\xff" + raw, raw[:-5], b"[" * 3000, b"NaN", b"\x00" * 10, rng.randbytes(50)])
    method = rng.choice(["POST"] * 8 + ["GET", "HEAD", "PUT", "BREW", "", "P\u00d6ST"])
    length = str(len(raw)) if rng.random() < 0.8 else rng.choice(["-1", "1e9", "99999999999", str(len(raw) + 7), "0", "٣", "5, 5", ""])
    version = rng.choice(["HTTP/1.1"] * 8 + ["HTTP/1.0", "HTTP/0.9", "HTTP/9.9", "HTTP/x", ""])
    headers = f"Host: x\r\nContent-Length: {length}\r\n"
    if rng.random() < 0.2:
        more = ["Transfer-Encoding: chunked", "Expect: 100-continue", "Connection: \x00", "X: " + "y" * 70000, ": nothing", "no colon", " folded: é"]
        headers += rng.choice(more) + "\r\n"
    whole = f"{method} {rng.choice(paths[:4] * 6 + paths)} {version}\r\n{headers}\r\n".encode() + raw
    if rng.random() < 0.1:
        whole = whole[: rng.randrange(len(whole))]
    return whole if rng.random() > 0.05 else rng.randbytes(200)


def test_serve_survives_malformed_requests(server):
    """A thousand of them: an honest client beside them reads the right answers all the while, and none is left without an end."""
    url, process = server
    expected, answers, over = chat(url, temperature=0).json()["choices"], [], threading.Event()
    assert len(expected[0]["message"]["content"]) > 20

    def honest():
        while not over.is_set():
            response = chat(url, temperature=0)
            answers.append(response.status_code == 429 or response.json()["choices"] == expected)
            time.sleep(0.01)

    def send(seed):
        with connect(url) as client:
            try:
                client.sendall(malformed(random.Random(seed)))
                client.shutdown(socket.SHUT_WR)
                return read_all(client)[:12]
            except ConnectionError:
                return b""  # the server had heard enough

    with ThreadPoolExecutor(5) as pool:
        client = pool.submit(honest)
        starts = collections.Counter(pool.map(send, range(1000)))
        over.set()
        client.result()
    assert len(answers) > 5 and all(answers), answers
    statuses = {int(start[9:]) for start in starts if start.startswith(b"HTTP/1.1 ")}
    assert statuses >= {200, 400, 404, 405} and 500 not in statuses, starts
    assert process.poll() is None and requests.get(f"{url}/health", timeout=20).json()["running"] == 0


def test_serve_busy_and_vanishing_clients(server):
    """Who finds no place gets 429, and a client that leaves makes room at once."""
    url, process = server
    request = long_request(url)
    process.send_signal(signal.SIGSTOP)  # so that all arrive at once, however fast the machine
    clients = [connect(url) for _ in range(8)]
    for client in clients:
        client.sendall(request)
    process.send_signal(signal.SIGCONT)
    firsts = [client.recv(1000) for client in clients]
    refused = [first for first in firsts if b" 429 " in first]
    assert 0 < len(refused) <= 4 and b"Retry-After" in refused[0]
    for client in clients:
        client.close()
    for _ in range(100):
        health = requests.get(f"{url}/health", timeout=20).json()
        if health["running"] + health["waiting"] == 0:
            break
        time.sleep(0.02)
    assert health["running"] + health["waiting"] == 0
    assert chat(url).status_code == 200


def test_serve_port_in_use(server, untrained):
    url, _ = server
    port = url.split(":")[-1]
    done = subprocess.run([sys.executable, "serve.py", f"--out={untrained}", f"--port={port}"], cwd=HERE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and f"127.0.0.1:{port}" in done.stderr


class Browser:
    """A headless Chromium, driven through chromedriver's HTTP interface (W3C WebDriver)."""

    def __enter__(self):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        port = next(found[1] for line in self.driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))
        self.base = f"http://127.0.0.1:{port}/session"
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}, "unhandledPromptBehavior": "ignore"}
        try:
            self.base += "/" + self.call("", capabilities={"alwaysMatch": wanted})["sessionId"]
        except BaseException:  # without a session, nobody else will end it
            self.driver.kill()
            raise
        return self

    def __exit__(self, *_):
        requests.delete(self.base, timeout=20)
        self.driver.terminate()
        self.driver.wait()

    def call(self, path, **body):
        response = requests.post(self.base + path, json=body, timeout=30).json()
        assert not isinstance(response["value"], dict) or "error" not in response["value"], response
        return response["value"]

    def js(self, script, *args):
        return self.call("/execute/sync", script=script, args=args)

    def wait(self, condition, seconds=10):
        end = time.monotonic() + seconds
        while not (value := self.js(f"return {condition}")):
            assert time.monotonic() < end, (condition, self.js("return document.body.innerText"))
            time.sleep(0.03)
        return value

    def element(self, css):
        return "/element/" + [*self.call("/element", using="css selector", value=css).values()][0]

    def click(self, css):
        self.call(self.element(css) + "/click")

    def type(self, css, text):
        self.call(self.element(css) + "/value", text=text)

    def media(self, width, height, scheme="light"):
        for cmd, params in (
            ("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}),
            ("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}),
        ):
            self.call("/goog/cdp/execute", cmd=cmd, params=params)


class Chained(torch.nn.Module):
    """Stands in for a model: the next token follows from the last one alone, up to the turn's end."""

    def __init__(self, cfg, ids):
        super().__init__()
        self.cfg, self.dtype, self.embed, self.delay = cfg, torch.float32, torch.nn.Embedding(1, 1), 0.0
        self.next = dict(zip(ids, ids[1:]))

    def for_reading(self):
        return self

    def forward(self, ids, cache=None, pos=None, fill=False):
        time.sleep(self.delay)
        logits = torch.zeros(*ids.shape, self.cfg.vocab_size)
        for row, last in zip(logits, ids[:, -1].tolist()):
            row[-1, self.next.get(last, 0)] = 99.0
        return logits


ENTER = "\ue007"


@pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")), reason="no chromium with chromedriver on this machine")
def test_page_in_a_browser(untrained):
    with serving(untrained, api_key="sesame") as (url, server), Browser() as browser:
        engine, asked = server.worker.engine, []
        s = engine.tokenizer.special
        call = [s("<|python_start|>"), *b"6*7", s("<|python_end|>"), s("<|output_start|>"), *b"42", s("<|output_end|>")]
        engine.model = model = Chained(engine.model.cfg, [s("<|assistant_start|>"), *b"<b>It", *call, *b" done.", s("<|assistant_end|>")])
        begin = server.worker.begin
        server.worker.begin = lambda answers: (asked.extend(answers), begin(answers))
        notes = "[...document.querySelectorAll('.note')].map(note => note.textContent)"
        articles = "[...document.querySelectorAll('article')].map(a => a.className + ':' + [...a.querySelectorAll('p')].map(p => p.textContent))"
        reply = "assistant:<b>It,done."

        browser.call("/url", url=url)
        browser.type("#input", "Hi & <i>you</i>" + ENTER)  # the server asks for its key, once
        browser.call("/alert/text", text="sesame")
        browser.call("/alert/accept")
        browser.wait(f"/^21 tokens, [0-9.]+ tokens.s$/.test({notes}.at(-1))")
        assert browser.js(f"return {articles}") == ["user:Hi & <i>you</i>", reply]
        assert browser.js("return document.querySelector('.tool').textContent") == "Calculator6*7 = 42"
        assert browser.js("return document.querySelectorAll('#log p *, #log i').length") == 0  # text never becomes markup
        assert "Cancel" not in browser.js("return document.body.innerText")

        browser.click("[aria-label='Copy this message']")
        browser.wait("document.querySelector('.acts button').textContent === 'Copied'")
        browser.click("[aria-label='Answer again']")
        browser.wait(f"{notes}.length == 1 && !document.querySelector('[aria-busy]')")
        browser.click("[aria-label^='Edit this']")
        assert browser.js("return document.getElementById('input').value") == "Hi & <i>you</i>"
        browser.js("document.getElementById('input').value = ''")
        browser.type("#input", "Again" + ENTER)
        browser.wait(f"{notes}.length == 1 && !document.querySelector('[aria-busy]')")
        assert browser.js(f"return {articles}") == ["user:Again", reply]

        browser.click("summary")
        for name, value in (("temperature", "0"), ("seed", "7"), ("top_k", "5"), ("top_p", "0.5"), ("max_tokens", "9")):
            browser.js(f"document.querySelector('[name={name}]').value = ''")
            browser.type(f"[name={name}]", value)
        browser.type("#input", "More" + ENTER)
        browser.wait(f"{notes}.at(-1).startsWith('9 tokens') && {notes}.at(-1).includes('cut off')")
        assert asked[-1].params == Params(max_tokens=9, temperature=0, top_k=5, top_p=0.5, seed=7)
        assert len({answer.params.seed for answer in asked[:3]}) == 3  # an empty seed is random

        browser.call("/refresh")  # all is still there
        assert len(browser.js(f"return {articles}")) == 4 and browser.js("return document.querySelector('[name=seed]').value") == "7"
        browser.click("#fresh")
        assert browser.js(f"return {articles}") == []
        model.delay = 0.5  # or a busy machine has it finished before the click
        browser.type("#input", "Stop" + ENTER)
        browser.wait("document.querySelector('.assistant p')")
        browser.click("#stop")
        browser.wait(f"{notes}.includes('stopped')")
        model.delay = 0.0
        assert browser.js("return document.getElementById('chats').length") == 2
        browser.click("#delete")
        assert len(browser.js(f"return {articles}")) == 4 and browser.js("return document.getElementById('chats').length") == 1

        for width in (360, 1280):
            browser.media(width, 700)
            assert browser.js("return document.documentElement.scrollWidth") <= width
        nameless = "e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)"
        assert browser.js(f"return [...document.querySelectorAll('button, input, select, textarea')].filter({nameless}).length") == 0
        severe = [line["message"] for line in browser.call("/se/log", type="browser") if line["level"] == "SEVERE"]
        assert all(" 401 " in line for line in severe), severe  # the one that made it ask for the key


# -----------------------------------------------------------------------------
# Benchmarks: `python test_all.py bench NAME`


def best(f, times=3):
    """Seconds of the fastest of some runs."""
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        f()
        spent.append(time.perf_counter() - start)
    return min(spent)


def bench_tok():
    """Training and encoding beside the peers that are installed: 4,096 tokens of the demo's text, or with TEXT=folder
    in the environment, 32,768 of the text there."""
    texts = list(data.read_documents(os.environ["TEXT"])) if "TEXT" in os.environ else data.demo_texts(1, count=60000)
    vocab = 32768 if "TEXT" in os.environ else 4096
    size = sum(len(t.encode()) for t in texts) / 1e6

    def row(name, load, times=3):
        """`load` imports a peer, and returns how it trains and how it encodes, on one thread and then on two."""
        try:
            train, *encoders = load()
        except ImportError:
            return print(f"{name:12} is not installed")
        spent = f"{best(train, 1):8.2f} s" if train else " " * 10
        rates = "".join(f"{size / best(encode, times):11.1f} MB/s" for encode in encoders)
        print(f"{name:12}{spent}{rates}", flush=True)

    print(f"{size:.1f} MB, vocabulary {vocab:,}\n{'':12}     train   encode, 1 thread  on 2 threads")
    ours = Tokenizer.train(texts, vocab, SPECIALS)

    def load_tok():
        return lambda: Tokenizer.train(texts, vocab, SPECIALS), lambda: ours.encode_batch(texts, 1), lambda: ours.encode_batch(texts, 2)

    def load_tok_lists():
        return None, lambda: [ours.encode(t) for t in texts]

    def load_tiktoken():
        import tiktoken

        theirs = tiktoken.Encoding("ours", pat_str=tok.PATTERN, mergeable_ranks=ranks_of(ours), special_tokens={})
        return None, lambda: [theirs.encode_ordinary(t) for t in texts], lambda: theirs.encode_ordinary_batch(texts, num_threads=2)

    def load_rustbpe():
        import rustbpe

        theirs = rustbpe.Tokenizer()

        def train():
            theirs.train_from_iterator(iter(texts), vocab - len(SPECIALS), pattern=tok.PATTERN)

        return train, lambda: [theirs.encode(t) for t in texts]

    def load_gigabpe():  # GPT-2's simpler pattern, from one file; it has no encoder
        import gigabpe

        file = Path(folder) / "texts"
        file.write_text("\n".join(texts))
        return (lambda: gigabpe.train_bpe([str(file)], vocab),)

    def load_tokenizers():
        import tokenizers

        theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(tok.PATTERN), "isolated")
        level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=level.alphabet(), show_progress=False)
        return lambda: theirs.train_from_iterator(iter(texts), trainer), lambda: [theirs.encode(t) for t in texts]

    with tempfile.TemporaryDirectory() as folder:
        row("tok", load_tok)
        row("tok, lists", load_tok_lists)
        row("tiktoken", load_tiktoken)
        row("gigabpe", load_gigabpe)
        row("rustbpe", load_rustbpe, 1)
        row("tokenizers", load_tokenizers, 1)
    for name in ("one letter", "random letters", "spaces"):
        print(f"1 MB of {name:15}{best(lambda: ours.encode(WORST[name])):7.3f} s")


def bench_train(depths=(4, 12, 20) if torch.cuda.is_available() else (2, 3, 4)):
    """Training steps as the stages take them: where the time goes, memory, and the share of plain matmul's rate.

    On a CPU, depth 4 is the shape of the protocol in the README.
    """
    machine = gpt.start_machine()
    cuda = machine.device.type == "cuda"
    T, V, rows = (2048, 32768, 16) if cuda else (512, 4096, 16)
    name = torch.cuda.get_device_name() if cuda else f"{machine.threads} CPU threads"
    peak = next((peak * 1e12 for key, (peak, _) in gpt.CARDS.items() if key in name), None)
    print(f"{name}, {machine.dtype}, T {T}, {rows} rows a step")
    documents = np.concatenate([[V - 1, *range(n)] for n in np.random.default_rng(1).integers(50, 2000, 3000)])
    shards = data.TokenSet([documents], V - 1)

    def timed(f, times=5):
        """Seconds of the fastest of some runs, the device's work included."""
        machine.sync()
        return best(lambda: (f(), machine.sync()), times)

    for depth in depths:
        model = GPT(GPTConfig.from_depth(depth, V, T), machine.dtype).init(1).to(machine.device)
        optimizer = optim.build(model, 0.02, 0.3, 0.004)
        forward = gpt.compile_model(model, machine) if cuda else model
        C = model.cfg.width
        a, b = (torch.randn(*shape, device=machine.device, dtype=machine.dtype) for shape in ((rows * T, C), (C, 4 * C)))
        rate = 2 * rows * T * C * 4 * C / timed(lambda: a @ b, 20)  # of the MLP's first product
        ids, targets = (t.to(machine.device) for t in data.batch(shards, rows, T, 1, 0))

        def train():
            (forward(ids, targets).sum() / ids.numel()).backward()

        def learn():
            train()
            optimizer.step()

        learn(), learn()
        step, model_time = timed(learn), timed(train)
        loader = timed(lambda: data.batch(shards, rows, T, 1, 1))
        flops = model.sizes()[1] * rows * T / step
        used = torch.cuda.max_memory_allocated() / 2**30 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        shares = f"{flops / rate:.0%} of matmul" + (f", {flops / peak:.0%} of the published peak" if peak else "")
        print(f"depth {depth:2}: {rows * T / step:10,.0f} tokens/s, {flops / 1e12:.3f} TFLOP/s = {shares} ({rate / 1e12:.3f})")
        parts = f"forward and backward {model_time / step:.0%}, optimizer {1 - model_time / step:.0%}, loader {loader / step:.1%} of a step"
        print(f"          {parts}; {used:.1f} GiB at most")


def bench_decode():
    """Tokens a second of the engine, depth 4 (20 on CUDA): samples of one prompt, and prompts of different lengths."""
    machine = gpt.start_machine(dtype="auto" if torch.cuda.is_available() else "float32")  # as `load_engine` does
    depth = 20 if machine.device.type == "cuda" else 4
    tokenizer = Tokenizer.train(data.demo_texts(1), 2048, SPECIALS)
    model = GPT(GPTConfig.from_depth(depth, 4096, 512), machine.dtype).init(1).to(machine.device, machine.dtype)
    rng = random.Random(1)
    for concurrent, lengths in ((1, (20, 20)), (16, (20, 20)), (64, (20, 20)), (16, (10, 400))):
        low, high = lengths
        if low == high:
            prompts = [[rng.randrange(4096) for _ in range(low)]] * concurrent
        else:
            steps = [low + (high - low) * i // (concurrent - 1) for i in range(concurrent)]
            prompts = [[rng.randrange(4096) for _ in range(n)] for n in steps]
        params = [Params(max_tokens=100, temperature=1.0, seed=i) for i in range(concurrent)]

        engine = Engine(model, tokenizer, concurrent)

        def generate():
            engine.held = [[] for _ in range(concurrent)]  # or the prompts would be known already
            return engine.generate(prompts, params)

        count = sum(len(r.ids) for r in generate())  # chance is keyed: every run gives the same tokens
        what = f"of {low} tokens" if low == high else f"of {low} to {high} tokens, all different"
        print(f"depth {depth}, {concurrent:2} prompts {what}: {count / best(generate, 5):10,.0f} tokens/s", flush=True)


def stream_from(url, i, tokens):
    """One client of bench_serve: (seconds to the first token, seconds to the last, tokens received)."""
    body = {"prompt": [[i % 256] * 20], "max_tokens": tokens, "seed": i, "stream": True, "stream_options": {"include_usage": True}}
    body, start, first, last = json.dumps(body).encode(), time.perf_counter(), 0.0, b""
    with connect(url) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        while b"data: [DONE]" not in last:
            last = last[-500:] + client.recv(1 << 16)
            if not first and b"data: " in last:
                first = time.perf_counter() - start
    return first, time.perf_counter() - start, int(re.search(rb'"completion_tokens": (\d+)', last)[1])


def bench_serve(clients=32, tokens=100):
    """Tokens a second of many clients that stream through HTTP, beside the engine's own; time to the first token."""
    threads = max(1, os.cpu_count() // 2)  # the rest is for the clients, which would be on other machines
    machine = gpt.start_machine(threads=threads)
    depth = 20 if machine.device.type == "cuda" else 4
    tokenizer = Tokenizer.train(data.demo_texts(1), 2048, SPECIALS)
    model = GPT(GPTConfig.from_depth(depth, tokenizer.vocab_size, 512), machine.dtype).init(1)
    with tempfile.TemporaryDirectory() as out:
        tokenizer.save(f"{out}/tokenizer")
        gpt.save_checkpoint(f"{out}/base", 0, model, None, machine, {"stage": "base", "config": {}, "tokenizer": data.tokenizer_hash(out)})
        engine = load_engine(Config(out=out), machine, clients)[0]
        prompts = [[i % 256] * 20 for i in range(clients)]
        params = [Params(max_tokens=tokens, temperature=1.0, seed=i) for i in range(clients)]
        count, engine_time, best_round = sum(len(r.ids) for r in engine.generate(prompts, params)), math.inf, (math.inf, [])
        command = [sys.executable, "serve.py", f"--out={out}", "--port=0", f"--slots={clients}", f"--threads={threads}"]
        with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) as process, ThreadPoolExecutor(clients) as pool:
            url = next(found[1] for line in process.stdout if (found := re.match(r"(http://\S+)/ serves", line)))
            for _ in range(5):  # in turns, so that both meet the same machine; the fastest of each counts
                engine_time = min(engine_time, best(lambda: engine.generate(prompts, params), 1))
                start = time.perf_counter()
                runs = list(pool.map(lambda i: stream_from(url, i, tokens), range(clients)))
                best_round = min(best_round, (time.perf_counter() - start, runs))
                assert sum(n for _, _, n in runs) == count  # chance is keyed: the server gives the same tokens
            process.terminate()
    spent, runs = best_round
    firsts = sorted(first for first, _, _ in runs)
    rates = [(n - 1) / (last - first) for first, last, n in runs if n > tokens / 2]  # who ends early has little to measure
    print(f"depth {depth}, {clients} clients: {count / spent:,.0f} tokens/s, {engine_time / spent:.0%} of the engine's {count / engine_time:,.0f}")
    print(f"first token after {firsts[len(firsts) // 2] * 1000:.0f} ms at the median, {firsts[-1] * 1000:.0f} ms at worst")
    print(f"each client gets from {min(rates):.0f} to {max(rates):.0f} tokens/s")


def bench_rl(problems=16, samples=16):
    """Rollouts of a step all at once beside one problem at a time, on the fine-tuned model of OUT=folder (out)."""
    machine, out = gpt.start_machine(), os.environ.get("OUT", "out")
    tokenizer, hash = data.load_tokenizer(out)
    model, _ = gpt.load_model(f"{out}/sft", machine, hash)
    items = data.TASKS["arithmetic"].items("train", 1, problems)
    prompts = [data.question(item, tokenizer, model.cfg.seq_len, 48) for item in items for _ in range(samples)]
    params = [Params(48, temperature=1.0, seed=seed) for seed in range(len(prompts))]
    engines = {size: Engine(model, tokenizer, size) for size in (samples, len(prompts))}
    spent = {size: math.inf for size in engines}
    for _ in range(4):  # in turns, so that a busy machine slows both; the first turn warms up
        for size, engine in engines.items():
            start = time.perf_counter()
            done = [r for i in range(0, len(prompts), size) for r in engine.generate(prompts[i : i + size], params[i : i + size])]
            spent[size] = min(spent[size], time.perf_counter() - start)
    rates = [sum(len(r.ids) for r in done) / seconds for seconds in spent.values()]
    print(f"{problems} problems x {samples} answers: one problem at a time {rates[0]:,.0f} tokens/s, together {rates[1]:,.0f}: {rates[1] / rates[0]:.1f} times")


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        benches = {name.removeprefix("bench_"): f for name, f in globals().items() if name.startswith("bench_")}
        if len(sys.argv) != 3 or sys.argv[2] not in benches:
            raise SystemExit(f"python test_all.py bench NAME, with NAME one of {', '.join(benches)}")
        benches[sys.argv[2]]()
    else:
        raise SystemExit(pytest.main(["-q", __file__, *sys.argv[1:]]))
