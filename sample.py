"""
The inference engine: many requests at once, with a cache and a calculator; and a chat in the terminal.

    python sample.py                                   # chat with the last stage in out/ (rl, sft, mid, base)
    python sample.py -p "What is the capital of Peru?" # answer once
    python sample.py --stage=base -p "Once upon a time" --temperature=0.8

A request is a list of prompt ids with its parameters. Each step of the engine lets waiting requests into
free slots, reads on in their prompts, a bounded number of tokens so that nobody waits long, and then takes one
token for every running request in one batched forward. Finished requests leave at once and the last slot moves
into the gap, so that the running ones are always the first slots of the cache.

What a slot has read stays in it until the slot is needed, the least recently used first. A prompt that begins as
an earlier one takes its keys and values over: a chat's second turn does not pay for the first again, and many
samples of one prompt read it once.

Chance is keyed, not drawn: the one uniform number that picks a token is a hash of (seed, position). So a
request gives the same tokens whatever its neighbours, except where two candidates tie within rounding.

Left out: paging of the cache (a slot holds a whole context; at these sizes memory is not what runs out).
"""

import ast
import codecs
import math
import operator
import warnings
from collections import deque
from dataclasses import dataclass, field, replace

import torch

from data import fit, load_tokenizer, parse
from gpt import KVCache, command, last_stage, load_model, override, start_machine

# -----------------------------------------------------------------------------
# Calculator: what the model may compute between <|python_start|> and <|python_end|>

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
OPERATORS |= {ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}
OPERATORS |= {ast.USub: operator.neg, ast.UAdd: operator.pos}
LARGEST = 1e15  # no intermediate result may exceed this
warnings.filterwarnings("ignore", category=SyntaxWarning)  # what a model writes between the tokens is not our source


def calculate(expression):
    """The value of arithmetic on numbers, or of "text".count("x"), as text; "error" for anything else.

    >>> calculate("(3 + 4) * 2"), calculate('"strawberry".count("r")'), calculate("__import__('os')")
    ('14', '3', 'error')

    Walks the syntax tree and knows nothing but numbers and these operators; nothing is ever eval'ed.
    """
    try:
        if len(expression) > 200:
            return "error"
        value = evaluate(ast.parse(expression.strip(), mode="eval").body)
        if isinstance(value, float) and value == int(value):
            value = int(value)
        return str(value) if isinstance(value, int) else f"{value:.10g}"
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return "error"


def evaluate(node):
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](evaluate(node.operand))
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = evaluate(node.left), evaluate(node.right)
        if isinstance(node.op, ast.Pow) and (right < 0 or right * math.log(abs(left) + 2) > math.log(LARGEST)):
            raise ValueError("power too large")
        value = OPERATORS[type(node.op)](left, right)
    elif isinstance(node, ast.Call) and not node.keywords and len(node.args) == 1 and isinstance(node.func, ast.Attribute):
        text, part = node.func.value, node.args[0]
        if node.func.attr != "count" or not all(isinstance(n, ast.Constant) and isinstance(n.value, str) for n in (text, part)):
            raise ValueError("not a count")
        value = text.value.count(part.value)
    else:
        raise ValueError("not arithmetic")
    if isinstance(value, complex) or not abs(value) <= LARGEST:  # a NaN fails this too
        raise ValueError("too large")
    return value


# -----------------------------------------------------------------------------
# Engine


@dataclass
class Params:
    max_tokens: int = 256  # most tokens to generate
    temperature: float = 0.0  # 0 takes the likeliest token
    top_k: int = 0  # sample among so many; 0 is all
    top_p: float = 1.0  # sample among the likeliest that together have this probability
    seed: int = 0  # of this request's chance
    tools: bool = True  # run the calculator
    top_logprobs: int = 0  # record so many of the likeliest tokens at each place


@dataclass(eq=False)
class Request:
    prompt: list
    params: Params
    ids: list = field(default_factory=list)  # generated so far, stop token included
    logprobs: list = field(default_factory=list)  # of each id under the distribution sampled from, before top-k and top-p
    tops: list = field(default_factory=list)  # for each id, [(id, logprob)] of the likeliest, under the same distribution
    sampled: list = field(default_factory=list)  # False where the tool wrote the token
    forced: deque = field(default_factory=deque)  # the tool's tokens still to be read
    read: int = 0  # of prompt and ids together, so many are in the cache
    finish: str = ""  # "stop", "length" or "cancelled" once done


SHARED = 16  # a common beginning of fewer tokens is not worth a copy
CHUNK = 512  # tokens of prompts that are read between two decoding steps; on CUDA eight times as many
COLD = 1e-3  # a temperature up to this takes the likeliest token; dividing by less would overflow


def uniform(seed, position):
    """A number in [0, 1) from a 64-bit hash of both (splitmix64)."""
    x = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) % 2**64
    return ((x ^ (x >> 31)) >> 11) / 2**53


def common(a, b):
    """How many ids two lists have in common at their beginnings."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def likeliest(logprobs, count):
    """The `count` highest of each row of logprobs (B, V), as a list of [(id, logprob)] for each."""
    if not count:
        return [[]] * len(logprobs)
    values, ids = logprobs.topk(min(count, logprobs.size(1)), dim=-1)
    return [list(zip(*row)) for row in zip(ids.tolist(), values.tolist())]


def record(run):
    """Record the CUDA kernels that run() starts. Returns a function that starts them all at once, and where run's result is.

    A decoding step is hundreds of kernels of a few microseconds: starting each by itself would take longer than they do.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):  # libraries get their workspaces before the recording
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


class Engine:
    """Continuous batching over the slots of one cache.

    >>> engine = Engine(model, tokenizer, slots=8)
    >>> engine.generate([prompt_ids, other_ids], Params(max_tokens=20))[0].ids
    """

    def __init__(self, model, tokenizer, slots=16):
        self.model, self.tokenizer = model, tokenizer
        self.device = model.embed.weight.device
        self.cache = KVCache(model.cfg, slots, device=self.device, dtype=model.dtype)
        self.slots, self.waiting, self.running = slots, deque(), []
        self.held = [[] for _ in range(slots)]  # what each slot that does not run has read, for prompts that begin so
        self.used, self.clock, self.version = [0] * slots, 0, None  # when each slot was last given away
        self.reused = 0  # tokens of prompts that needed no reading
        self.records, self.recording = {}, self.device.type == "cuda"  # of decoding steps, by their shape
        self.chunk = CHUNK * (8 if self.device.type == "cuda" else 1)
        names = ("bos", "assistant_end", "python_start", "python_end", "output_start", "output_end")
        self.special = {name: tokenizer.special(f"<|{name}|>") for name in names}

    def submit(self, prompt, params):
        """Queue a prompt (ids). Raises ValueError when it is empty or leaves no room to answer."""
        if not prompt or len(prompt) >= self.cache.length:
            raise ValueError(f"a prompt of {len(prompt)} tokens; the model reads 1 to {self.cache.length - 1}")
        request = Request(list(prompt), params)
        self.waiting.append(request)
        return request

    def cancel(self, request):
        """Drop a request whose answer nobody waits for any more."""
        request.finish = request.finish or "cancelled"
        if request in self.waiting:
            self.waiting.remove(request)

    def generate(self, prompts, params):
        """Run prompts to their ends; `params` is one for all or a list. Returns the requests, in order."""
        params = params if isinstance(params, list) else [params] * len(prompts)
        requests = [self.submit(prompt, p) for prompt, p in zip(prompts, params)]
        while not all(r.finish for r in requests):
            self.step()
        return requests

    @torch.inference_mode()
    def step(self):
        """Let requests in, read on in their prompts, take one token for each that is through. True while there is work."""
        self.retire()
        self.admit()
        self.prefill()
        self.admit()  # those that waited for a prompt like theirs
        if any(r.read >= len(r.prompt) - 1 for r in self.running):
            self.decode()
        return bool(self.waiting or self.running)

    def retire(self):
        """Drop finished requests; the last running one moves into the gap, and what they have read behind it."""
        for i in reversed(range(len(self.running))):
            request = self.running[i]
            if request.finish:
                self.held[i] = (request.prompt + request.ids)[: request.read]
                last = self.running.pop()
                if i < len(self.running):
                    self.exchange(i, len(self.running), max(request.read, last.read))
                    self.running[i] = last

    def exchange(self, a, b, length):
        """Let two slots change places, of whose contents the longer has so many tokens."""
        self.cache.swap(a, b, length)
        for per_slot in (self.held, self.used):
            per_slot[a], per_slot[b] = per_slot[b], per_slot[a]

    def admit(self):
        """Give waiting requests a slot each, with what another slot holds of their beginnings."""
        weight = self.model.embed.weight
        if self.version != (id(self.model), weight._version):  # it counts changes in place
            # the model was trained on: what it read before is worth nothing
            self.held, self.version = [[] for _ in range(self.slots)], (id(self.model), weight._version)
            self.reader, self.records = self.model.for_reading(), {}
        while self.waiting and len(self.running) < self.slots:
            prompt, n = self.waiting[0].prompt[:-1], len(self.running)
            alike = [common(prompt, self.running[i].prompt if i < n else self.held[i]) for i in range(self.slots)]
            ready = [min(k, self.running[i].read) if i < n else k for i, k in enumerate(alike)]
            source = max(range(self.slots), key=ready.__getitem__)
            if max(alike) >= ready[source] + SHARED:
                return  # it is being read just now, which is worth the wait
            shared = ready[source] if ready[source] >= SHARED else 0
            place = source if shared and source >= n else min(range(n, self.slots), key=lambda i: (bool(self.held[i]), self.used[i]))
            if place > n:
                self.exchange(n, place, max(len(self.held[n]), len(self.held[place])))
            if shared and source < n:
                self.cache.copy(source, n, shared)
            self.clock, self.reused = self.clock + 1, self.reused + shared
            self.held[n], self.used[n] = [], self.clock
            self.running.append(self.waiting.popleft())
            self.running[n].read = shared

    def prefill(self):
        """Read on in prompts, but for their last tokens, which decode reads: in the oldest's and those of about its length."""
        left = {i: len(r.prompt) - 1 - r.read for i, r in enumerate(self.running) if r.read < len(r.prompt) - 1}
        if not left:
            return
        oldest = min(left, key=self.used.__getitem__)
        rows = sorted(left, key=lambda i: (i != oldest, abs(left[i] - left[oldest])))[: self.chunk // 64]
        width = min(max(left[i] for i in rows), self.chunk // len(rows))
        # near the cache's end a row begins earlier, and reads some tokens again
        start = [min(self.running[i].read, self.cache.length - width) for i in rows]
        # padding writes beyond a row's end, where later tokens overwrite it before anything reads it
        ids = [(self.running[i].prompt[at : at + width] + [0] * width)[:width] for i, at in zip(rows, start)]
        self.cache.rows, self.cache.span = torch.tensor(rows, device=self.device), max(start) + width
        self.reader(torch.tensor(ids, device=self.device), cache=self.cache, pos=torch.tensor(start, device=self.device), fill=True)
        for i, at in zip(rows, start):
            self.running[i].read = min(at + width, len(self.running[i].prompt) - 1)

    def decode(self):
        """One forward for all running requests, then one token for each whose prompt is read; others read one more of it."""
        at = [r.read for r in self.running]
        last = [r.prompt[r.read] if r.read < len(r.prompt) else r.ids[r.read - len(r.prompt)] for r in self.running]
        logits = self.read(last, at)  # (B, V)
        ready = [i for i, r in enumerate(self.running) if r.read == len(r.prompt) + len(r.ids) - 1]
        for request in self.running:
            request.read += 1
        requests = [self.running[i] for i in ready]
        logits = logits if len(ready) == len(at) else logits[ready]
        picked = self.pick(logits, [r.params for r in requests], [at[i] for i in ready])
        for request, token, logprob, top in zip(requests, *picked):
            self.accept(request, token, logprob, top)

    def read(self, last, at):
        """Logits (B, V) after one more token for each running request: `last`, at positions `at`.

        A recording has fixed shapes: rows come in powers of two, spans in steps of 256. Rows that are there only for
        this write to the last position of their slot, which never holds anything: the last token is not read.
        """
        rows, span = len(at), max(at) + 1
        if self.recording:
            rows, span = min(self.slots, 2 ** (rows - 1).bit_length()), min(self.cache.length, -(-span // 256) * 256)
        idle = rows - len(at)
        ids = torch.tensor(last + [0] * idle, device=self.device)[:, None]
        pos = torch.tensor(at + [self.cache.length - 1] * idle, device=self.device)
        self.cache.rows, self.cache.span = None, span
        if not self.recording:
            return self.reader(ids, cache=self.cache, pos=pos)[:, -1]
        if (rows, span) not in self.records:
            inputs = torch.zeros_like(ids), torch.full_like(pos, self.cache.length - 1)
            self.records[rows, span] = *inputs, *record(lambda: self.reader(inputs[0], cache=self.cache, pos=inputs[1])[:, -1])
        static_ids, static_pos, replay, logits = self.records[rows, span]
        static_ids.copy_(ids), static_pos.copy_(pos)
        replay()
        return logits[: len(at)]

    def pick(self, logits, params, at):
        """For each row of logits (B, V), at position `at`: a token, its log-probability, and the likeliest, as many as asked for."""
        warm = [p.temperature > COLD for p in params]
        heat = torch.tensor([p.temperature if w else 1.0 for p, w in zip(params, warm)], device=self.device)[:, None]
        logprobs = torch.log_softmax(logits / heat, dim=-1)
        tokens = logits.argmax(dim=-1)
        if any(warm):
            p = logprobs.exp()  # added up in fp64, or the last ids of a large vocabulary would lose their share
            if any(q.top_k or q.top_p < 1 for q in params):
                order = p.sort(dim=-1, descending=True)
                before = order.values.cumsum(-1, dtype=torch.double) - order.values  # probability of all likelier ones
                k = torch.tensor([q.top_k or p.size(1) for q in params], device=self.device)[:, None]
                top_p = torch.tensor([q.top_p for q in params], device=self.device, dtype=torch.double)[:, None]
                keep = (torch.arange(p.size(1), device=self.device) < k) & ((before < top_p) | (before == 0))
                p = torch.zeros_like(p).scatter(1, order.indices, order.values * keep)
            total = p.cumsum(-1, dtype=torch.double)
            u = torch.tensor([uniform(q.seed, i) for q, i in zip(params, at)], device=self.device, dtype=torch.double)
            drawn = torch.searchsorted(total, u[:, None] * total[:, -1:], right=True)[:, 0].clamp(max=p.size(1) - 1)
            tokens = torch.where(torch.tensor(warm, device=self.device), drawn, tokens)
        tops = likeliest(logprobs, max(q.top_logprobs for q in params))
        tops = [top[: q.top_logprobs] for q, top in zip(params, tops)]
        return tokens.tolist(), logprobs.gather(1, tokens[:, None])[:, 0].tolist(), tops

    @torch.inference_mode()
    def score(self, ids, top=0):
        """How likely a text is: for each id its log-probability given those before it (None for the first), and the `top`
        likeliest [(id, logprob)] at its place. One uncached forward, which leaves the running requests as they are."""
        if not 0 < len(ids) <= self.cache.length:
            raise ValueError(f"a text of {len(ids)} tokens; the model reads 1 to {self.cache.length}")
        if len(ids) == 1:
            return [None], [[]]
        ids = torch.tensor(ids, device=self.device)
        logprobs = torch.log_softmax(self.model(ids[None, :-1])[0], dim=-1)  # (T - 1, V)
        return [None, *logprobs.gather(1, ids[1:, None])[:, 0].tolist()], [[], *likeliest(logprobs, top)]

    def accept(self, request, token, logprob, top):
        """Append a token, or the tool's next one in its place; run the tool; see whether the request ends."""
        sampled = not request.forced
        if not sampled:
            token, logprob, top = request.forced.popleft(), 0.0, []
        request.ids.append(token)
        request.logprobs.append(logprob)
        request.tops.append(top)
        request.sampled.append(sampled)
        if sampled and token in (self.special["assistant_end"], self.special["bos"]):
            request.finish = "stop"
        elif len(request.ids) >= request.params.max_tokens or len(request.prompt) + len(request.ids) >= self.cache.length:
            request.finish = "length"
        elif sampled and token == self.special["python_end"] and request.params.tools:
            if self.special["python_start"] in request.ids:
                start = len(request.ids) - request.ids[::-1].index(self.special["python_start"])
                result = calculate(self.tokenizer.decode(request.ids[start:-1]))
                output = [self.special["output_start"], *self.tokenizer.encode(result), self.special["output_end"]]
                request.forced.extend(output)


# -----------------------------------------------------------------------------
# Text of a running request


class Stream:
    """Turns the ids of a request into text as they come, never showing half a character.

    Each call of new(ids) returns what is new as [(kind, text)], kind being "text", "python" or "output"; with
    end=True the bytes of a character that was never completed come out as U+FFFD. A `raw` stream is all text, its special
    tokens by name.
    """

    def __init__(self, tokenizer, raw=False):
        self.tokenizer, self.raw, self.seen, self.kind = tokenizer, raw, 0, "text"
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.kinds = {tokenizer.special(f"<|{k}_start|>"): k for k in ("python", "output")}
        self.kinds |= {tokenizer.special(f"<|{k}_end|>"): "text" for k in ("python", "output")}
        self.first_special = tokenizer.vocab_size - len(tokenizer.special_tokens)

    def new(self, ids, end=False):
        pieces = [self.piece(id) for id in ids[self.seen :]]
        self.seen = len(ids)
        if end:
            pieces.append(self.end())
        return [(kind, text) for kind, text in pieces if text]

    def piece(self, id):
        """(kind, text) of one more id; the text is empty while a character is not complete."""
        if id in self.kinds and not self.raw:
            self.kind = self.kinds[id]
        elif id < self.first_special or self.raw:
            return self.kind, self.decoder.decode(self.tokenizer.token_bytes(id))
        return self.kind, ""

    def end(self):
        return self.kind, self.decoder.decode(b"", True)


# -----------------------------------------------------------------------------
# Terminal


@dataclass
class Config:
    out: str = "out"  # folder of the run
    stage: str = ""  # base, mid, sft or rl; empty is the last there is
    prompt: str = ""  # answer this and end (also: -p "...")
    system: str = ""  # a system message
    temperature: float = 0.6  # 0 is greedy
    top_k: int = 50  # sample among so many; 0 is all
    max_tokens: int = 256  # longest answer
    seed: int = 0  # of the sampling
    device: str = "auto"  # cuda, cpu
    dtype: str = "auto"  # bfloat16, float32
    threads: int = 0  # CPU threads; 0 is all cores


def load_engine(cfg, machine, slots):
    """Engine over the checkpoint that cfg.out and cfg.stage name, and the name of its stage."""
    tokenizer, hash = load_tokenizer(cfg.out)
    if cfg.dtype == "auto" and machine.device.type == "cpu":
        machine = replace(machine, dtype=torch.float32)  # for a few rows, a product in bf16 takes longer to begin than one in fp32 in all
    stage = cfg.stage or last_stage(cfg.out)
    model, _ = load_model(f"{cfg.out}/{stage}", machine, hash)
    return Engine(model.to(machine.dtype).eval(), tokenizer, slots), stage


def answer(engine, prompt, cfg, seed):
    """Print a reply as it comes; returns its parts."""
    request = engine.submit(prompt, Params(cfg.max_tokens, cfg.temperature, cfg.top_k, seed=seed))
    stream, kind = Stream(engine.tokenizer), "text"
    while not request.finish:
        engine.step()
        for new_kind, text in stream.new(request.ids, bool(request.finish)):
            if new_kind != kind:
                text = {"python": "[", "output": " = ", "text": "] "}[new_kind] + text.lstrip()
            kind = new_kind
            print(text, end="", flush=True)
    print()
    return parse(request.ids, engine.tokenizer)


def main(argv):
    if "-p" in argv[:-1]:
        i = argv.index("-p")
        argv[i : i + 2] = [f"--prompt={argv[i + 1]}"]
    cfg = override(Config(), argv, __doc__)
    engine, stage = load_engine(cfg, start_machine(cfg.device, cfg.dtype, cfg.threads), 1)
    tokenizer = engine.tokenizer
    if stage == "base":
        if not cfg.prompt:
            raise SystemExit("the base model continues text: give it some with -p, or chat with a later stage")
        print(cfg.prompt, end="")
        try:
            answer(engine, [tokenizer.special("<|bos|>"), *tokenizer.encode(cfg.prompt)], cfg, cfg.seed)
        except ValueError as error:
            raise SystemExit(str(error))
        return
    messages = [{"role": "system", "content": cfg.system}] if cfg.system else []
    if not cfg.prompt:
        print(f"Chatting with {cfg.out}/{stage}. An empty line starts over, Ctrl-D ends.")
    while True:
        try:
            line = cfg.prompt or input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            messages = messages[:1] if cfg.system else []
            print("(a new conversation)")
            continue
        messages.append({"role": "user", "content": line})
        prompt = fit(messages, tokenizer, engine.cache.length - min(cfg.max_tokens, engine.cache.length // 4))
        try:
            parts = answer(engine, prompt, cfg, cfg.seed + len(messages))
        except ValueError as error:
            if cfg.prompt:
                raise SystemExit(str(error))
            print(f"({error})")
            messages.pop()
            continue
        if cfg.prompt:
            return
        messages.append({"role": "assistant", "content": parts})


if __name__ == "__main__":
    command(main)
