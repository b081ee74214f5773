"""
The model, the machine it runs on, and its checkpoints.

    python gpt.py                                 # the model of depth 4, step by step: shapes, parameters, FLOPs
    python gpt.py --depth=20 --vocab_size=65536   # or any other

A decoder-only transformer in the shape that small chat models have settled on:

    rotary positions                    Su et al. 2021, arXiv 2104.09864
    RMSNorm without parameters          Zhang & Sennrich 2019, arXiv 1910.07467
    queries and keys normalised         Henry et al. 2020, arXiv 2010.04245
    ReLU squared in the MLP             So et al. 2021, arXiv 2109.08668
    grouped-query attention             Ainslie et al. 2023, arXiv 2305.13245
    sliding-window layers               Beltagy et al. 2020, arXiv 2004.05150
    value embeddings                    Zhou et al. 2024, arXiv 2410.17897, in modded-nanogpt's form
    soft-capped logits                  Gemma 2, arXiv 2408.00118

Left out: biases, dropout, learned norms and tied embeddings, none of which pays at this size; and masks between the
documents of a row: what stands before a <|bos|> can be seen behind it.

Letters for shapes, here and in every other file:
    B batch    T time    C channels (width)    H heads    G key/value heads    D head size
    V vocabulary    L layers    S cache slots    N positions a cache slot holds

Five sections: config override, machine, model, checkpoints, and the table that `python gpt.py` prints.
"""

import copy
import dataclasses
import difflib
import errno
import fcntl
import functools
import hashlib
import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import textwrap
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# Config override: `--key=value` fills a dataclass, and its source is the help text


def override(cfg, argv, manual=""):
    """Fill the dataclass instance `cfg` from `--key=value` arguments and return it.

    >>> @dataclass
    ... class Config:
    ...     depth: int = 4
    >>> override(Config(), ["--depth=6"]).depth
    6

    `--help` prints `manual` and every knob with its default and its trailing comment. An unknown or
    ill-typed key ends the program with one line that names the nearest valid key. A field named after
    a Python keyword carries a trailing underscore: `--from=DIR` fills `from_`.
    """
    fields = {f.name.rstrip("_"): f for f in dataclasses.fields(cfg)}
    for arg in argv:
        if arg in ("-h", "--help"):
            print(manual.strip() + "\n\nknobs (--key=value):")
            source = textwrap.dedent(inspect.getsource(type(cfg)))
            print("\n".join(line for line in source.splitlines() if line.startswith("    ")))
            raise SystemExit(0)
        match = re.fullmatch(r"--([A-Za-z_]\w*)(?:=(.*))?", arg, re.DOTALL)
        if not match or match[1] not in fields:
            guess = difflib.get_close_matches(match[1] if match else arg.lstrip("-"), fields, 1, 0)
            raise SystemExit(f"unknown argument {arg!r}; the nearest knob is --{guess[0]}=... (--help lists all)")
        field, text = fields[match[1]], match[2]
        if field.type in (bool, "bool"):
            value = {None: True, "1": True, "true": True, "0": False, "false": False}.get(text and text.lower())
        else:
            kind = {"int": int, "float": float, "str": str}.get(field.type, field.type)
            try:
                value = None if text is None else kind(text)
            except ValueError:
                value = None
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            kind = getattr(field.type, "__name__", field.type)
            raise SystemExit(f"--{match[1]} wants a value of type {kind} (default {field.default!r}), got {text!r}")
        setattr(cfg, field.name, value)
    return cfg


def command(main):
    """Run a script's main(argv). What a person can mend, or did on purpose, ends it with one line, not a traceback.

    SIGTERM stops a run as Ctrl-C does. A full disk, or a folder that may not be written, is said plainly.
    """

    def stop(*_):
        signal.setitimer(signal.ITIMER_REAL, 1)  # an exception that comes within a destructor is swallowed: say it again
        raise KeyboardInterrupt

    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(sign, stop)
    try:
        main(sys.argv[1:])
        if dist.is_initialized():
            dist.destroy_process_group()  # or its threads may abort the process as it ends
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        first = os.environ.get("RANK", "0") == "0"  # of several processes, one says it
        raise SystemExit("\nstopped; what was saved stays, and the same command goes on from there" if first else 1)
    except BrokenPipeError:  # whoever read our output has left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1)
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"the GPU's memory is full ({str(error).splitlines()[0]}): a smaller --micro_rows computes the same in less")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            raise
        raise SystemExit(f"cannot go on: {error}; what was saved stays: mend this and run the same command again")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


# -----------------------------------------------------------------------------
# Machine: device, precision, process group


# published: dense bf16 in TFLOP/s, memory in GB
CARDS = {"H100": (989, 80), "H200": (989, 141), "B200": (2250, 180), "A100": (312, 80), "L40S": (362, 48), "4090": (165, 24)}


@dataclass
class Machine:
    device: torch.device
    dtype: torch.dtype  # of activations and matrix products; parameters, moments and losses are always fp32
    rank: int = 0
    world: int = 1
    threads: int = 1
    restarted: bool = False  # by torchrun, after a worker died

    @property
    def first(self):
        return self.rank == 0

    def print(self, *words):
        if self.first:
            print(*words, flush=True)

    def describe(self):
        return f"{self.world} x {self.device.type} in {str(self.dtype).removeprefix('torch.')}, {self.threads} threads"

    def sum(self, value):
        """Sum a number over all ranks."""
        if self.world == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(box)
        return box.item()

    def gather(self, item):
        """Every rank's item (anything picklable), as a list in rank order."""
        if self.world == 1:
            return [item]
        items = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def sync(self):
        """Wait for the device, so that a clock read next is honest."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def start_machine(device="auto", dtype="auto", threads=0, deterministic=False):
    """Find out what there is and set torch up for it. Under torchrun, joins the process group.

    bf16 is used where the hardware multiplies it natively (CUDA from Ampere on, CPUs with AVX512-BF16 or
    AMX), fp32 elsewhere. CPUs always run deterministic algorithms, CUDA where asked, at some cost in speed.
    Apple's GPU is left out: it has no fp64, which sampling uses.
    """
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cuda", "cpu") or (device == "cuda" and not torch.cuda.is_available()):
        raise SystemExit(f"--device={device} is not to be had here: auto, cpu, or cuda where torch finds a CUDA GPU")
    device = torch.device(device, local if device == "cuda" else None)
    if dtype == "auto":
        if device.type == "cuda":
            fast = torch.cuda.get_device_capability(device)[0] >= 8
        else:
            flags = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
            fast = re.search(r"avx512_bf16|amx_bf16", flags)
        dtype = "bfloat16" if fast else "float32"
    if dtype not in ("bfloat16", "float32"):
        raise SystemExit(f"--dtype={dtype} is not supported: bfloat16 or float32 (fp16 would need loss scaling)")
    if not threads and device.type == "cpu":
        # torchrun sets OMP_NUM_THREADS to 1; the cores are shared out between local ranks instead
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cpu" or deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    if device.type == "cuda":
        torch.cuda.set_device(device)
        hopper = torch.cuda.get_device_capability(device)[0] == 9
        if hopper and find_spec("flash_attn_interface") and hasattr(torch.nn.attention, "activate_flash_attention_impl"):
            torch.nn.attention.activate_flash_attention_impl("FA3")  # torch's own attention then goes through it
    if world > 1 and not dist.is_initialized():
        # rank 0 may prepare data for hours while the others wait at a barrier
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    machine = Machine(device, getattr(torch, dtype), rank, world, torch.get_num_threads())
    # only the node whose worker died counts a restart; all ranks have to know of it
    machine.restarted = machine.sum(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))) > 0
    return machine


# -----------------------------------------------------------------------------
# Model


@dataclass
class GPTConfig:
    vocab_size: int = 4096
    seq_len: int = 512  # longest sequence in tokens
    depth: int = 4  # layers
    width: int = 256  # C; 64 a layer by the dial, rounded up to whole heads
    heads: int = 4  # H
    kv_heads: int = 4  # G; H is standard attention, 1 is multi-query
    window_pattern: str = "L"  # one letter a layer, repeated: L sees everything, S half of seq_len; the last layer is L
    softcap: float = 15.0  # logits stay within plus and minus this

    def __post_init__(self):
        if self.width % self.heads or self.heads % self.kv_heads or set(self.window_pattern) - set("LS"):
            raise SystemExit(f"heads must divide width, kv_heads must divide heads, windows are S or L: {self}")

    @classmethod
    def from_depth(cls, depth, vocab_size, seq_len, kv_heads=0, window_pattern="L"):
        """The dial: width is 64 a layer, heads are of 64 below width 768 and of 128 from there."""
        D = 64 if depth * 64 < 768 else 128
        heads = math.ceil(depth * 64 / D)
        return cls(vocab_size, seq_len, depth, heads * D, heads, kv_heads or heads, window_pattern)

    def window(self, layer):
        """How many positions back, itself included, a query of this layer sees."""
        short = self.window_pattern[layer % len(self.window_pattern)] == "S" and layer < self.depth - 1
        return max(1, self.seq_len // 2) if short else self.seq_len


FLEX, TRITON = None, bool(find_spec("triton"))  # FlexAttention, compiled, and what it compiles with


@functools.lru_cache
def band(T, window, device):
    """For FlexAttention: which blocks of 128 x 128 scores hold something that a window sees; the others cost nothing.

    torch's own kernels know causal attention; a window would be a mask to them, on a slower kernel that skips nothing.
    """
    global FLEX
    from torch.nn.attention import flex_attention as flex  # slow to import

    FLEX = FLEX or torch.compile(flex.flex_attention, dynamic=False)
    return flex.create_block_mask(lambda b, h, i, j: (j <= i) & (j > i - window), None, None, T, T, device)


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Turn each pair of channels (i, i + D/2) by its position's angle. x (B, T, H, D), cos and sin (B or 1, T, 1, D).

    Of a pair (a, b), cos is that of the angle twice, and sin is (sin, -sin): (a cos + b sin, b cos - a sin).
    """
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


class BlockAttention(torch.autograd.Function):
    """Causal attention for CPUs, where the stock kernel's backward takes several times its arithmetic.

    A block of queries multiplies only with the keys that it can see, a few sequences at a time, so that scores stay
    in the cache; what is above the diagonal is computed inside the diagonal blocks alone. The probabilities (half of
    T x T numbers a head) are kept for the backward pass: with P = softmax(Q K' / sqrt(D)) and O = P V,

        dV = P' dO    dS = P * (dO V' - rowsum(dO * O))    dQ = dS K / sqrt(D)    dK = dS' Q / sqrt(D)
    """

    QUERIES, SEQUENCES = 128, 16  # a block's; sequences are counted per head

    @staticmethod
    def blocks(count, T, window):
        """(which sequences, which queries, which keys), as slices."""
        for n in range(0, count, BlockAttention.SEQUENCES):
            for start in range(0, T, BlockAttention.QUERIES):
                end = min(T, start + BlockAttention.QUERIES)
                yield slice(n, n + BlockAttention.SEQUENCES), slice(start, end), slice(max(0, start - window + 1), end)

    @staticmethod
    def forward(ctx, q, k, v, window):
        """q, k, v (N, T, D), N being batch times heads -> (N, T, D)."""
        N, T, D = q.shape
        q, out, kept = q * D**-0.5, torch.empty_like(q), []
        for n, i, j in BlockAttention.blocks(N, T, window):
            scores = torch.bmm(q[n, i], k[n, j].mT)  # (n, i, j)
            size = i.stop - i.start
            ahead = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)  # keys behind their query
            scores[..., -size:].masked_fill_(ahead, -math.inf)
            if i.stop - window > j.start:  # keys that the block's later queries see no more
                gone = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril(i.start - window - j.start)
                scores.masked_fill_(gone, -math.inf)
            kept.append(scores.softmax(-1))
            out[n, i] = torch.bmm(kept[-1], v[n, j])
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, *kept = ctx.saved_tensors
        N, T, D = q.shape
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad = grad.contiguous()
        mean = (grad * out).sum(-1, keepdim=True)  # (N, T, 1)
        for (n, i, j), p in zip(BlockAttention.blocks(N, T, ctx.window), kept):
            dv[n, j].baddbmm_(p.mT, grad[n, i])
            ds = torch.bmm(grad[n, i], v[n, j].mT).sub_(mean[n, i]).mul_(p)
            dq[n, i] = torch.bmm(ds, k[n, j])
            dk[n, j].baddbmm_(ds.mT, q[n, i])
        return dq.mul_(D**-0.5), dk, dv, None


class TokenLoss(torch.autograd.Function):
    """Cross-entropy of each token from the last hidden states, some rows of logits at a time.

    The logits of a whole batch (tokens times vocabulary) are the largest thing in training and are never held in fp32.
    What is kept of them is the loss's slope by each, softmax minus one-hot through the soft cap, in the activations' dtype.
    """

    @staticmethod
    def rows(x, weight):
        """Slices of so many rows that their logits fit a CPU's cache, or a small part of a GPU's memory."""
        size = max(1, (2**27 if x.is_cuda else 2**22) // len(weight))
        return [slice(i, i + size) for i in range(0, len(x), size)]

    @staticmethod
    def forward(ctx, x, weight, targets, softcap):
        """x (M, C), weight (V, C), targets (M,) with -1 for none -> losses (M,) in nats, fp32."""
        weight, learn = weight.to(x.dtype), any(ctx.needs_input_grad)
        losses = torch.empty(len(x), device=x.device)
        slopes = x.new_empty(len(x), len(weight)) if learn else None
        for rows in TokenLoss.rows(x, weight):
            supervised, y = targets[rows, None] >= 0, targets[rows, None].clamp(min=0)
            bent = (x[rows] @ weight.T).float().div_(softcap).tanh_()  # logits over the soft cap, (rows, V)
            logits = bent * softcap
            total = logits.logsumexp(-1, keepdim=True)
            losses[rows] = ((total - logits.gather(1, y)) * supervised)[:, 0]
            if learn:
                slope = logits.sub_(total).exp_()
                slope.scatter_add_(1, y, slope.new_full(y.shape, -1.0))
                slopes[rows] = slope.mul_(bent.square_().neg_().add_(1)).mul_(supervised)
        ctx.save_for_backward(x, weight, slopes)
        return losses

    @staticmethod
    def backward(ctx, grad):
        x, weight, slopes = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        for rows in TokenLoss.rows(x, weight):
            slope = slopes[rows] * grad[rows, None].to(x.dtype)
            dx[rows] = slope @ weight
            dw += slope.T @ x[rows]
        return dx, dw, None, None


class Linear(nn.Linear):
    """No bias; the fp32 weight is cast to the activations' dtype where it is used."""

    def __init__(self, fan_in, fan_out):
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class KVCache:
    """Keys and values of what has been read, in S static slots of N positions each.

    Row b of a forward pass reads and writes slot `rows[b]`, or slot b where `rows` is None. `span` is how
    many positions attention looks at (all N by default): a caller who knows how far its rows have come
    sets it, and short sequences stay cheap. What lies beyond a row's position is never read, so a slot
    needs no clearing between requests.

    Costs 2 * L * S * N * G * D numbers of `dtype`.
    """

    def __init__(self, cfg, slots, length=None, device="cpu", dtype=torch.float32):
        self.length = self.span = length or cfg.seq_len
        shape = (cfg.depth, slots, self.length, 2, cfg.kv_heads, cfg.width // cfg.heads)
        self.store = torch.zeros(shape, device=device, dtype=dtype)  # (L, S, N, 2, G, D), a key and a value at each position
        self.first = torch.arange(slots, device=device)
        self.rows = None

    def place(self, index):
        """Where positions index (B, T) lie in a layer's slots laid end to end, (B * T,)."""
        slots = self.first[: len(index)] if self.rows is None else self.rows
        return (slots[:, None] * self.length + index).flatten()

    def update(self, layer, k, v, place):
        """Store k, v (B, T, G, D) at `place` (B * T,); return what can be attended to, (B, G, span, D) each."""
        B, store = len(k), self.store[layer]
        store.flatten(0, 1).index_copy_(0, place, torch.stack((k, v), dim=2).flatten(0, 1).to(store.dtype))
        seen = store[:B, : self.span] if self.rows is None else store[self.rows, : self.span]  # (B, span, 2, G, D)
        return seen.permute(2, 0, 3, 1, 4).unbind()

    def copy(self, source, target, length):
        """Give slot `target` the first `length` positions of slot `source`."""
        self.store[:, target, :length] = self.store[:, source, :length]

    def swap(self, a, b, length):
        """Exchange the first `length` positions of two slots."""
        self.store[:, [a, b], :length] = self.store[:, [b, a], :length]


class Attention(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.layer, self.window = layer, cfg.window(layer)
        self.H, self.G, self.D = cfg.heads, cfg.kv_heads, cfg.width // cfg.heads
        self.q = Linear(cfg.width, self.H * self.D)
        self.k = Linear(cfg.width, self.G * self.D)
        self.v = Linear(cfg.width, self.G * self.D)
        self.out = Linear(self.H * self.D, cfg.width)
        # value embeddings on every other layer, counted so that the last has one; 32 channels are enough for a gate to read
        self.gate = Linear(32, self.G) if (cfg.depth - 1 - layer) % 2 == 0 else None
        self.joined = None

    def join(self):
        """The weights of q, k and v as one matrix: they are three to the optimizer, and one product to the machine."""
        return torch.cat((self.q.weight, self.k.weight, self.v.weight)) if self.joined is None else self.joined

    def forward(self, x, value, cos, sin, cache, place, masks):
        """x (B, T, C); value (B, T, G*D) or None; place (B * T,), where the cache stores, or None without one; masks, by
        window, what is added to a score, (T, T), or (B, 1, T, span) with a cache, or what else GPT.mask says."""
        B, T, C = x.shape
        qk, v = F.linear(x, self.join().to(x.dtype)).view(B, T, -1, self.D).split((self.H + self.G, self.G), 2)
        if value is not None:
            gate = torch.sigmoid(self.gate(x[..., :32])).unsqueeze(-1)  # (B, T, G, 1)
            v = torch.addcmul(v, gate, value.view(B, T, self.G, self.D), value=2)
        q, k = norm(rotate(qk, cos, sin)).split((self.H, self.G), 2)
        if cache is None and x.device.type == "cpu":
            k, v = (t.repeat_interleave(self.H // self.G, 2) if self.G < self.H else t for t in (k, v))
            q, k, v = (t.transpose(1, 2).reshape(B * self.H, T, self.D) for t in (q, k, v))
            y = BlockAttention.apply(q, k, v, self.window).view(B, self.H, T, self.D)
            return self.out(y.transpose(1, 2).reshape(B, T, C))
        if cache is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, G, T, D)
        else:
            k, v = cache.update(self.layer, k, v, place)  # (B, G, span, D)
        mask = masks[self.window]
        k, v = (t.repeat_interleave(self.H // self.G, 1) if self.G < self.H else t for t in (k, v))
        if mask is None or isinstance(mask, torch.Tensor):
            y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, is_causal=mask is None)  # (B, H, T, D)
        else:
            y = FLEX(q.transpose(1, 2), k, v, block_mask=mask)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.up = Linear(cfg.width, 4 * cfg.width)
        self.down = Linear(4 * cfg.width, cfg.width)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.attention = Attention(cfg, layer)
        self.mlp = MLP(cfg)

    def forward(self, x, value, cos, sin, cache, place, masks):
        x = x + self.attention(norm(x), value, cos, sin, cache, place, masks)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Built empty: call init(seed) or load a state dict before use."""

    def __init__(self, cfg, dtype=torch.float32):
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        padded = math.ceil(cfg.vocab_size / 64) * 64  # matrix kernels like multiples of 64
        self.embed = nn.Embedding(padded, cfg.width)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.depth))
        kv_width = cfg.kv_heads * (cfg.width // cfg.heads)
        self.values = nn.ModuleDict(
            {str(i): nn.Embedding(padded, kv_width) for i, b in enumerate(self.blocks) if b.attention.gate is not None}
        )
        self.unembed = Linear(cfg.width, padded)
        self.windows = sorted({cfg.window(i) for i in range(cfg.depth)})
        self.angles = None  # rotary tables, made on first use on the device in use

    @torch.no_grad()
    def init(self, seed):
        """Initial weights, the same on every device: drawn on the CPU, in a fixed order, from `seed`.

        Matrices that read the residual stream are uniform with variance 1/fan_in, value embeddings too; those that write
        into it start at zero, so that every block begins as the identity; logits begin near zero.
        """
        rng = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            w = torch.empty(p.shape)
            if name == "embed.weight":
                w.normal_(0, 1, generator=rng)
            elif name == "unembed.weight":
                w.normal_(0, 0.001, generator=rng)
            elif name.endswith(("out.weight", "down.weight", "gate.weight")):
                w.zero_()
            else:
                bound = math.sqrt(3 / self.cfg.width)
                w.uniform_(-bound, bound, generator=rng)
            p.copy_(w)
        return self

    def for_reading(self):
        """A model to read with, as long as nobody changes these weights: they are in the activations' precision and joined, so
        that nothing is left to do at each step. What is in that precision already is shared, not copied."""
        shared = {id(p): nn.Parameter(p.detach().to(self.dtype), requires_grad=False) for p in self.parameters()}
        reader = copy.deepcopy(self, shared)
        for block in reader.blocks:
            block.attention.joined = block.attention.join()
        return reader

    def rotary(self, device):
        """cos and sin of position times frequency as `rotate` wants them, (N, D) each, in the activations' precision."""
        if self.angles is None or self.angles[0].device != device:
            D = self.cfg.width // self.cfg.heads
            with torch.inference_mode(False):  # made while sampling, they must serve training too
                frequency = 10000.0 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
                angle = torch.outer(torch.arange(self.cfg.seq_len, dtype=torch.float64), frequency)
                cos, sin = torch.cat((angle.cos(), angle.cos()), 1), torch.cat((angle.sin(), -angle.sin()), 1)
                self.angles = (cos.to(device, self.dtype), sin.to(device, self.dtype))
        return self.angles

    def forward(self, ids, targets=None, cache=None, pos=None, fill=False):
        """One forward for training, prefill and decoding.

        ids      (B, T) token ids
        targets  (B, T) the token that follows each, -1 where nothing is supervised
        cache    KVCache to read and extend, with
        pos      (B,) the position of each row's first token
        fill     only fill the cache and return None: a prompt's logits are large, and nobody needs them

        Returns the logits (B, T, V) in fp32, or, given targets, the loss of each token in nats (B, T) in
        fp32, zero where nothing is supervised. Sums and means are the caller's: it alone knows the counts.
        """
        T = ids.size(1)
        cos, sin = self.rotary(ids.device)
        index = place = None
        if cache is None:
            cos, sin = cos[None, :T, None], sin[None, :T, None]  # (1, T, 1, D)
        else:
            index = pos[:, None] + torch.arange(T, device=ids.device)  # (B, T)
            place = cache.place(index)
            cos, sin = cos[index][:, :, None], sin[index][:, :, None]  # (B, T, 1, D)
        masks = {window: self.mask(window, T, cache, index) for window in self.windows}
        x = norm(self.embed(ids).to(self.dtype))  # (B, T, C)
        for i, block in enumerate(self.blocks):
            value = self.values[str(i)](ids).to(self.dtype) if str(i) in self.values else None  # (B, T, G*D)
            x = block(x, value, cos, sin, cache, place, masks)
        if fill:
            return None
        x = norm(x)
        if targets is not None:
            weight = self.unembed.weight[: self.cfg.vocab_size]  # padding is cut off
            return TokenLoss.apply(x.flatten(0, 1), weight, targets.flatten(), self.cfg.softcap).view_as(targets)
        logits = self.unembed(x)[..., : self.cfg.vocab_size].float()  # (B, T, V)
        return self.cfg.softcap * torch.tanh(logits / self.cfg.softcap)

    def mask(self, window, T, cache, index):
        """What is added to the scores of a window: 0 or -inf; None where attention is just causal, or masks by itself;
        what FlexAttention wants where a full row trains on a GPU (it compiles for each shape anew: few may come)."""
        device = self.embed.weight.device
        if cache is None and (window >= T or device.type == "cpu"):
            return None
        if cache is None and T == self.cfg.seq_len and T % 128 == 0 and TRITON and torch.is_grad_enabled():
            return band(T, window, device)
        i = torch.arange(T if cache is None else cache.span, device=device)
        at = i[:, None] if cache is None else index[:, None, :, None]  # the query's position
        seen = (i <= at) & (i > at - window) if window < len(i) else i <= at
        return torch.zeros(seen.shape, device=device, dtype=self.dtype).masked_fill_(~seen, -math.inf)

    def sizes(self):
        """Parameters by role, and floating-point operations per trained token, forward and backward."""
        count = {name: p.numel() for name, p in self.named_parameters()}
        sizes = {
            "embeddings": count["embed.weight"],
            "value embeddings": sum(n for name, n in count.items() if name.startswith("values.")),
            "matrices": sum(n for name, n in count.items() if name.startswith("blocks.")),
            "unembedding": count["unembed.weight"],
        }
        T, windows = self.cfg.seq_len, [self.cfg.window(i) for i in range(self.cfg.depth)]
        reach = sum(w - w * (w - 1) / (2 * T) for w in windows)  # positions that a query sees on average: early ones see few
        # 6 a weight that multiplies; attention: 2 products, 2 operations, 3 passes
        flops = 6 * (sizes["matrices"] + sizes["unembedding"]) + round(12 * reach * self.cfg.width)
        return sizes, flops


def compile_model(model, machine):
    """The model for training forwards, each block compiled, or the model itself where there is nothing to compile with.

    Like blocks share their code, so that twenty compile as fast as one; and between blocks, the backward pass can hand
    complete gradients to the optimizer.
    """
    if machine.device.type == "cpu" and not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        machine.print("note: no C++ compiler, running without torch.compile (apt-get install g++ python3-dev brings it)")
        return model
    compiled = copy.copy(model)  # another forward over the same parameters
    compiled._modules = {**model._modules, "blocks": nn.ModuleList(torch.compile(b, dynamic=False) for b in model.blocks)}
    return compiled


# -----------------------------------------------------------------------------
# Checkpoints: a folder appears whole or not at all, and nothing in it must be unpickled


def write_whole(path, data):
    """Write bytes or text so that the file is whole or absent: temporary name, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        f.write(data if isinstance(data, bytes) else data.encode())
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def lock_folder(out, machine):
    """Make `out` this run's own until the process ends; a second writer gets one line instead."""
    Path(out).mkdir(parents=True, exist_ok=True)
    if machine.first:
        handle = open(Path(out) / ".lock", "w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"another run is writing to {out}; wait for it, or choose another folder with --out=DIR")
        lock_folder.held = handle  # the lock lives as long as the file is open
    machine.barrier()


def code_hash():
    """Changes when any of the Python files beside this one does."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files if f.name != "test_all.py")).hexdigest()[:16]


def latest(folder):
    """The last complete checkpoint under `folder` (a Path), or None."""
    return max(Path(folder).glob("step_[0-9]*[0-9]"), default=None, key=lambda p: int(p.name[5:]))


STAGES = {"base": "Pretraining", "mid": "Mid-training", "sft": "Fine-tuning", "rl": "Reinforcement learning"}  # their folders, in order


def last_stage(out):
    """The furthest stage of which a run's folder holds a checkpoint; "base" where there is none."""
    return next((stage for stage in reversed(STAGES) if latest(f"{out}/{stage}")), "base")


@contextmanager
def reading(path):
    """What is wrong with a checkpoint's files becomes one line that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise SystemExit(f"{path} is damaged ({reason}); delete it to go on from the checkpoint before, or take --fresh to start over")


def read_state(path):
    with reading(path):
        return json.loads((path / "state.json").read_text())


def save_checkpoint(folder, step, model, optimizer, machine, state, keep=2):
    """Write folder/step_NNNNNN: model.pt, state.json and each rank's part of the optimizer's state.

    `state` is the stage's own JSON (its config, the tokenizer's hash, running figures). All ranks call it.
    Once it is complete, older ones go, so that `keep` remain.
    """
    final = Path(folder) / f"step_{step:06d}"
    part = final.with_name("part")  # not step_*: latest() must not see it
    if machine.first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        state = {
            **state,
            "step": step,
            "model": dataclasses.asdict(model.cfg),
            "world": machine.world,
            "threads": machine.threads,
            "dtype": str(machine.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "code": code_hash(),
        }
        (part / "state.json").write_text(json.dumps(state, indent=1))
        save_tensors(part / "model.pt", {name: p.detach().cpu() for name, p in model.state_dict().items()})
    machine.barrier()
    if optimizer:
        save_tensors(part / f"optimizer_{machine.rank:03d}.pt", optimizer.shard())
    machine.barrier()
    if machine.first:
        for file in part.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if final.exists():
            shutil.rmtree(final)
        os.rename(part, final)
        old = sorted(final.parent.glob("step_[0-9]*[0-9]"), key=lambda p: int(p.name[5:]))[: -max(1, keep)]
        for path in old:
            shutil.rmtree(path)
    machine.barrier()


def save_tensors(path, content):
    try:
        torch.save(content, path)
    except RuntimeError as error:  # torch's own writer does not say why
        raise OSError(errno.ENOSPC, f"{path} could not be written whole, is the disk full? ({str(error).splitlines()[0][:80]})")


def load_tensors(path):
    """What save_tensors wrote. Raises one of the errors that reading() explains; torch does not look at the checksums."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{path.name}: wrong checksum of {damaged}")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_model(path, machine, tokenizer_hash=None):
    """Model and state of a checkpoint folder, or of the last one in a stage's folder.

    Raises SystemExit with one line when there is none, or when it was made with another tokenizer.
    """
    path = Path(path)
    found = path if (path / "state.json").exists() else latest(path)
    if found is None:
        raise SystemExit(f"no checkpoint in {path}; `bash run.sh` makes one, or name another folder with --out=DIR")
    state = read_state(found)
    with reading(found):
        if tokenizer_hash and state["tokenizer"] != tokenizer_hash:
            hashes = f"hash {state['tokenizer'][:12]} against {tokenizer_hash[:12]}"
            raise SystemExit(f"{found} was trained with another tokenizer than the one in use ({hashes})")
        model = GPT(GPTConfig(**state["model"]), machine.dtype)
        model.load_state_dict(load_tensors(found / "model.pt"))
    return model.to(machine.device), state


def load_optimizer(path, optimizer):
    """Give the optimizer back its state, whatever the world size it was saved with."""
    with reading(path):
        files = [Path(path) / f"optimizer_{rank:03d}.pt" for rank in range(read_state(path)["world"])]
        optimizer.load([load_tensors(f) for f in files])


# knobs that say where and how a run goes and what it shows; a run may go on with others (precision is noted below)
FREE_KNOBS = {"out", "fresh", "device", "dtype", "threads", "compile", "deterministic", "micro_rows", "stop_after", "prompts", "hours", "plan"}
FREE_KNOBS |= {"log_every", "eval_every", "eval_rows", "eval_count", "final_count", "sample_every", "save_every", "keep", "tasks", "files"}


def parent_hash(folder):
    """Names the last checkpoint of an earlier stage, for the stage that starts from it."""
    found = latest(folder)
    return found and hashlib.sha256((found / "state.json").read_bytes()).hexdigest()[:16]


def find_resume(folder, cfg, machine, parent=None):
    """The checkpoint to go on from, or None for a fresh start.

    Stops when it was made with another config, or from another checkpoint of the stage before (`parent`).
    """
    if cfg.fresh and not machine.restarted:  # a restarted worker goes on from what its first life saved
        if machine.first:
            shutil.rmtree(folder, ignore_errors=True)
        machine.barrier()
    found = machine.gather(latest(folder))[0]  # rank 0 decides: a shared folder may show the others an older view
    if found is None:
        return None
    state = read_state(found)
    ours = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in FREE_KNOBS}
    before = dataclasses.asdict(type(cfg)()) | state["config"]  # a knob that did not exist then had its default's effect
    theirs = {k: v for k, v in before.items() if k not in FREE_KNOBS}
    changed = [k for k in sorted(ours | theirs) if ours.get(k) != theirs.get(k)]
    if changed:
        changed = "; ".join(f"{k}={theirs.get(k)!r} became {ours.get(k)!r}" for k in changed)
        raise SystemExit(f"{found} has another config ({changed}): --out=DIR for a new run, or --fresh to start this one over")
    if parent and state["parent"] != parent:
        raise SystemExit(f"{found} did not start from the {cfg.init} model there is now: --out=DIR, or --fresh to start over")
    if state["code"] != code_hash():
        machine.print("note: the code has changed since this run's last checkpoint; going on with the new code")
    dtype = str(machine.dtype).removeprefix("torch.")
    if (state["threads"], state["world"], state["dtype"]) != (machine.threads, machine.world, dtype):
        was, now = f"{state['world']} ranks of {state['threads']} threads", f"{machine.world} of {machine.threads}"
        machine.print(f"note: was {was} in {state['dtype']}, now {now} in {dtype}: sums round differently")
    return found


def trim_metrics(out, stage, step, machine):
    """Drop the lines of `stage` at `step` or later from metrics.jsonl: a resumed run writes them again."""
    path = Path(out) / "metrics.jsonl"
    if machine.first and path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = []
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # half a line, from a run that was killed while writing it
            if entry["stage"] != stage or entry["step"] < step:
                kept.append(line)
        write_whole(path, "".join(kept))


class Patience:
    """Counts updates that were skipped because the gradient was not finite, and ends the run after several in a row."""

    def __init__(self, most=5):
        self.most, self.skipped, self.row = most, 0, 0

    def see(self, norm, step, machine):
        bad = not math.isfinite(norm)
        self.skipped, self.row = self.skipped + bad, (self.row + 1) * bad
        if bad:
            machine.print(f"step {step:5}  skipped: the gradient is not finite ({self.skipped} so far)")
        if self.row == self.most:
            line = f"{self.most} updates in a row were skipped up to step {step}, for gradients that are not finite"
            raise SystemExit(f"{line}; the last checkpoint is from before: lower --lr_matrix or --lr_embed, or look at the data")


def log_metrics(out, machine, **entry):
    """Append one line to metrics.jsonl."""
    if machine.first:
        with open(Path(out) / "metrics.jsonl", "a") as f:
            f.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in entry.items()}) + "\n")


# -----------------------------------------------------------------------------
# The table: a real forward pass, watched (on the meta device, where tensors have shapes and no contents)


class Watch(torch.overrides.TorchFunctionMode):
    """Notes the steps of a forward pass as (module's name, operation, shape, parameters, FLOPs of all its tokens)."""

    NAMES = {F.embedding: "look up", F.rms_norm: "RMSNorm", F.linear: "matrix", torch.Tensor.roll: "rotate", torch.tanh: "soft cap"}
    NAMES |= {F.scaled_dot_product_attention: "attend", F.relu: "ReLU", torch.sigmoid: "sigmoid", torch.Tensor.square: "square"}

    def __init__(self, model):
        super().__init__()
        self.steps, self.inside = [], (inside := [])  # inside: the modules whose forward is running
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda module, _, name=name: inside.append((name, module)))
            module.register_forward_hook(lambda *_: inside.pop() and None)  # a hook that returns something replaces the output

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in self.NAMES and self.inside:
            (name, module), size, flops = self.inside[-1], 0, 0
            if func in (F.embedding, F.linear):
                size = args[1].numel()
            if func is F.linear:
                flops = 2 * out.numel() * args[0].size(-1)
            elif func is F.scaled_dot_product_attention:
                B, H, T, D = out.shape
                w = min(module.window, T)
                flops = 4 * B * H * D * (T * w - w * (w - 1) // 2)  # q times k and scores times v, where the mask is open
            joined = "q, k, v " * (func is F.linear and isinstance(module, Attention))
            self.steps.append((name, joined + self.NAMES[func], tuple(out.shape), size, flops))
        return out


def table(cfg):
    """Lines of text: each step from ids to logits with its shape, parameters and forward FLOPs a token."""
    with torch.device("meta"):
        model = GPT(cfg)
        ids = torch.zeros(1, cfg.seq_len, dtype=torch.long)
        with Watch(model) as watch:
            model(ids)
    layers = {}  # what happens in a layer: the layers in which just that happens
    for layer in range(cfg.depth):
        mine = tuple((n.removeprefix(f"blocks.{layer}"), *rest) for n, *rest in watch.steps if re.match(rf"(blocks|values)\.{layer}\b", n))
        layers.setdefault(tuple((n.replace(f"values.{layer}", "value embedding"), *rest) for n, *rest in mine), []).append(layer)
    outside = [step for step in watch.steps if not re.match(r"blocks\.|values\.", step[0])]
    first = next(i for i, step in enumerate(watch.steps) if re.match(r"blocks\.|values\.", step[0]))
    lines = [f"{'':34}{'result':>20}{'parameters':>14}{'FLOPs a token':>16}"]

    def show(steps, indent=""):
        for name, operation, shape, size, flops in steps:
            label = f"{indent}{(name.removeprefix('.') + ': ') if name else ''}{operation}"
            numbers = (f"{size:>14,}" if size else " " * 14) + (f"{flops / cfg.seq_len:>16,.0f}" if flops else "")
            lines.append(f"{label:34}{' x '.join(map(str, shape)):>20}{numbers}".rstrip())

    show(outside[:first])
    for steps, where in layers.items():
        lines.append(f"layer{'s' if where[1:] else ''} {', '.join(map(str, where))}" + (", each:" if where[1:] else ":"))
        show(steps, "  ")
    show(outside[first:])
    total, flops = sum(s[3] for s in watch.steps), sum(s[4] for s in watch.steps)
    lines.append(f"{'all layers together':54}{total:>14,}{flops / cfg.seq_len:>16,.0f}")
    lines.append(f"a trained token costs three times that, forward and backward: {model.sizes()[1]:,} FLOPs")
    return lines


def main(argv):
    @dataclass
    class Config:
        depth: int = 4  # layers; width and heads follow
        vocab_size: int = 4096
        seq_len: int = 512  # context in tokens
        kv_heads: int = 0  # 0 is as many as heads
        window_pattern: str = "L"  # L sees everything, S half

    args = override(Config(), argv, __doc__)
    cfg = GPTConfig.from_depth(args.depth, args.vocab_size, args.seq_len, args.kv_heads, args.window_pattern)
    print(f"depth {cfg.depth}: width {cfg.width}, {cfg.heads} heads, {cfg.kv_heads} key/value heads, one row of {cfg.seq_len} tokens")
    print("\n".join(table(cfg)))


if __name__ == "__main__":
    command(main)
