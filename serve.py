"""
The chat page and an HTTP API in OpenAI's form, on the standard library's http.server.

    python serve.py                                    # the last stage in out/, at http://127.0.0.1:8000
    python serve.py --stage=sft --port=8080
    ONESITTING_API_KEY=... python serve.py --host=0.0.0.0   # for the whole network, to those who have the key

    curl http://127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Who are you?"}]}'
    curl -N http://127.0.0.1:8000/v1/chat/completions -d '{"stream": true, "messages": [{"role": "user", "content": "Hi"}]}'

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    messages = [{"role": "user", "content": "What is 12 * 34?"}]
    print(client.chat.completions.create(model="any", messages=messages).choices[0].message.content)

    GET  /                      the page
    POST /v1/chat/completions   messages, stream, stream_options, n, temperature, top_p, top_k, seed, stop,
                                max_tokens or max_completion_tokens, logprobs, top_logprobs
    POST /v1/completions        prompt (a string, a list of strings, a list of ids or of lists of ids), echo, logprobs (0 to 5),
                                max_tokens (0 with echo, to score a text), and the rest as above
    GET  /v1/models             the one model there is; a request may name any
    POST /tokenize, /detokenize and GET /tokenizer_info, in vLLM's form
    GET  /health                what is served, and how many answers run and wait
    GET  /metrics               the same and more for Prometheus

    lm_eval run --model local-completions --tasks arc_easy --batch_size 8 --model_args \
        model=any,base_url=http://127.0.0.1:8000/v1/completions,tokenizer_backend=remote,max_length=512   # context: /health

One thread, the worker, owns the engine. Each connection has a thread of its own, which reads the request,
hands its answers to the worker and writes out what comes back on a queue; so every running answer advances
in the same batched step, and a client that reads slowly, or sends half a request, holds up nobody else. Under load
a streamed event brings several tokens. An echo with logprobs takes one uncached forward pass, between two steps.

Beyond OpenAI's form: `top_k`; what the calculator did, as `parts` of a message ([{"type": "text" | "python" |
"output", "text"}]) and, streamed, as `tool` ({"type", "text"}) beside an empty `content`. A message sent back
with its `parts` is read with them. A conversation that outgrows the context loses its oldest exchanges, never
its system message. max_tokens is an upper limit: one that the context cannot hold is cut down to what it can.

A chat's stop strings and logprobs concern its `content`: a calculation is no part of it, so a stop string may begin
before one and end after it, and ends nothing within it. A completion is raw text, special tokens by name, the
calculator's too; the token that ends it is listed among the logprobs but is no text. Text as a prompt gets <|bos|>
before it, ids are taken as they are. Logprobs are those of the distribution sampled from, at the request's temperature
(0 counts as 1) and before top_k and top_p; those of an echo are at temperature 1.

With an API key all but the page and /health want it, as OpenAI's clients send it; the page asks for it once. An answer
that outlasts --deadline ends as "length", one that could not begin by then gets 503.

Left out: TLS (put a proxy in front), penalties and logit_bias, a chat template for remote tokenizers (text never
becomes special tokens here: use the chat API), and tools other than the model's own calculator.
"""

import hmac
import json
import os
import queue
import re
import secrets
import select
import signal
import socket
import sys
import threading
import time
import traceback
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate, groupby, islice, repeat

from data import fit
from gpt import command, latest, override, start_machine
from sample import Params, Request, Stream, load_engine

# -----------------------------------------------------------------------------


@dataclass
class Config:
    # what is served
    out: str = "out"  # folder of the run
    stage: str = ""  # base, mid, sft or rl; empty is the last there is
    # where
    host: str = "127.0.0.1"  # 0.0.0.0 lets the whole network in
    port: int = 8000  # 0 takes any free one
    api_key: str = ""  # asked of every client; ONESITTING_API_KEY in the environment does the same, and `ps` does not show it
    # bounds
    slots: int = 16  # answers that run at once
    queue: int = 64  # answers that wait for a slot; more are refused with 429
    max_tokens: int = 1024  # longest answer that may be asked for
    max_messages: int = 256  # of a conversation
    max_choices: int = 64  # answers to one request: prompts times n
    max_body: int = 1_000_000  # bytes of a request
    connections: int = 512  # open at once; past that, the one that has asked nothing for longest is closed
    timeout: float = 30.0  # seconds a connection may stand still, reading or writing
    deadline: float = 600.0  # seconds an answer may take, waiting included
    grace: float = 5.0  # seconds that running answers have to end when the server is stopped
    # machine
    device: str = "auto"  # cuda, cpu
    dtype: str = "auto"  # bfloat16, float32
    threads: int = 0  # CPU threads; 0 is all cores


# -----------------------------------------------------------------------------
# Worker: the one thread that touches the model


class Refusal(Exception):
    """A request that gets an error in OpenAI's form in place of an answer."""

    def __init__(self, status, message, param=None, code=None, headers=()):
        super().__init__(message)
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        self.form = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.status, self.headers = status, headers


@dataclass(eq=False)
class Answer:
    """One choice of a request: what comes of it goes to `events` as (answer, [(kind, text)], [token], finish).

    A token is (the character of the text at which it begins, id, logprob or None, [(id, logprob)] of the likeliest).
    """

    index: int
    prompt: list
    params: Params
    stop: list  # strings that end it; looked for in the text as the client sees it, so across a chat's calculations
    events: queue.SimpleQueue
    live: bool = False  # send on what there is as it comes
    logprobs: bool = False  # send the tokens too
    raw: bool = False  # all is text, special tokens by name
    echo: list = ()  # ids of the prompt to be said before what is new
    dropped: bool = False  # set by the connection's thread when nobody waits any more
    finish: str = ""  # "stop", "length", "cancelled", "late" or "error" once done
    born: float = field(default_factory=time.monotonic)
    # the worker's own
    request: Request = None
    stream: Stream = None
    begun: bool = False  # the first token has come
    seen: int = 0  # ids of the request that were taken in
    held: list = field(default_factory=list)  # pieces not sent: their text may be the beginning of a stop string
    tokens: list = field(default_factory=list)  # tokens not sent
    length: int = 0  # characters of text taken in
    sent: int = 0  # and sent
    echoed: int = 0  # and of the echo, in which no stop string counts
    due: float = 0.0  # when to look at it again

    def begin(self, engine):
        """Hand the prompt to the engine. True where that took a forward pass of its own."""
        self.stream = Stream(engine.tokenizer, self.raw)
        scored = bool(self.echo) and self.logprobs
        scores = zip(*engine.score(self.prompt, self.params.top_logprobs)) if scored else repeat((None, []))
        for id, (logprob, top) in zip(self.echo, islice(scores, len(self.prompt) - len(self.echo), None)):
            self.take(id, logprob, top)
        self.echoed = self.length
        if self.params.max_tokens:
            self.request = engine.submit(self.prompt, self.params)
        else:
            self.request = Request(self.prompt, self.params, finish="length")
        return scored

    def take(self, id, logprob, top):
        kind, text = self.stream.piece(id)
        if self.logprobs and (self.raw or kind == "text" and id < self.stream.first_special):
            self.tokens.append((self.length, id, logprob, top))
        self.held.append((kind, text))
        self.length += len(text) * (kind == "text")

    def advance(self, engine, now, pace, deadline):
        """Send on what has come; end where a stop string begins, the time is up or the client has gone.

        Sends once in `pace` seconds at most, so that waking the connections' threads does not hold up the model.
        """
        request, late = self.request, now > self.born + deadline
        if not (self.live and now >= self.due or self.stop or request.finish or self.dropped or late):
            return
        end = len(request.ids) - (request.finish == "stop")  # the token that ends the turn is no text
        for i in range(self.seen, end):
            self.take(request.ids[i], request.logprobs[i] if request.sampled[i] else None, request.tops[i])
        if end < len(request.ids) and self.raw and self.logprobs:  # but it counts as a token: lm-eval relies on it
            self.tokens.append((self.length, request.ids[-1], request.logprobs[-1], request.tops[-1]))
        self.seen = max(self.seen, end)
        ended = request.finish or (self.dropped and "cancelled") or (late and ("length" if request.ids else "late")) or ""
        if ended:
            self.held.append(self.stream.end())
        self.held = merge(self.held)
        text = "".join(text for kind, text in self.held if kind == "text")
        found = [at for at in (text.find(s, max(0, self.echoed - self.sent)) for s in self.stop) if at >= 0]
        self.finish = "stop" if found else ended
        if not (self.live or self.finish):
            return
        keep = 0 if self.finish else max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        shown = min(found, default=len(text) - keep)
        pieces, self.held = split(self.held, shown)
        self.sent += shown
        tokens = [t for t in self.tokens if t[0] < self.sent or ended and not found]
        self.tokens = self.tokens[len(tokens) :]
        if self.finish:
            engine.cancel(request)  # changes nothing where the engine has finished by itself
        if pieces or tokens or self.finish:
            self.events.put((self, pieces, tokens, self.finish))
            self.due = now + pace


def split(pieces, n):
    """[(kind, text)] up to the n-th character of text, with the calculations before it, and from there on."""
    for i, (kind, text) in enumerate(pieces):
        if kind == "text" and len(text) > n:
            return merge([*pieces[:i], (kind, text[:n])]), [(kind, text[n:]), *pieces[i + 1 :]]
        n -= len(text) * (kind == "text")
    return pieces, []


def merge(pieces):
    """The same pieces, with neighbours of one kind made one and none empty."""
    groups = groupby((piece for piece in pieces if piece[1]), key=lambda piece: piece[0])
    return [(kind, "".join(text for _, text in group)) for kind, group in groups]


class Times:
    """How many of some times were short and long, in the form of a Prometheus histogram."""

    BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # seconds

    def __init__(self):
        self.counts, self.sum = [0] * (len(self.BOUNDS) + 1), 0.0

    def add(self, seconds):
        self.counts[bisect_left(self.BOUNDS, seconds)] += 1
        self.sum += seconds

    def lines(self, name):
        upto = list(accumulate(self.counts))
        lines = [f'{name}_bucket{{le="{bound}"}} {n}' for bound, n in zip([*self.BOUNDS, "+Inf"], upto)]
        return [*lines, f"{name}_sum {self.sum:.6f}", f"{name}_count {upto[-1]}"]


class Worker(threading.Thread):
    def __init__(self, engine, places, deadline):
        super().__init__(daemon=True)
        self.engine, self.places, self.deadline = engine, places, deadline
        self.inbox = queue.SimpleQueue()  # answers to begin; None to end
        self.answers = []  # begun and not finished; this thread's own
        self.lock, self.taken = threading.Lock(), 0  # places in use, by answers running or waiting
        self.read, self.written, self.first, self.whole = 0, 0, Times(), Times()  # what /metrics says

    def begin(self, answers):
        """Called by the connections' threads. Raises Refusal when there is no place for all of them."""
        with self.lock:
            if self.taken + len(answers) > self.places:
                message, headers = "too many requests are waiting; try again in a few seconds", [("Retry-After", "2")]
                raise Refusal(429, message, code="rate_limit_exceeded", headers=headers)
            self.taken += len(answers)
        for answer in answers:
            self.inbox.put(answer)

    def run(self):
        going = True
        while going:
            try:
                going = self.receive()
                self.engine.step()
                self.advance()
            except Exception:  # whatever it was (out of memory, say) ends these answers, not the server
                traceback.print_exc()
                self.fail()
            finished = sum(bool(a.finish) for a in self.answers)
            self.answers = [a for a in self.answers if not a.finish]
            with self.lock:
                self.taken -= finished
        self.fail()

    def receive(self):
        """Give the engine what has arrived, waiting where there is nothing else to do. False when told to end."""
        scored = False
        while not scored:  # a prompt that is scored costs a forward pass: one between two steps
            try:
                answer = self.inbox.get(block=not self.answers)
            except queue.Empty:
                break
            if answer is None:
                return False
            self.answers.append(answer)
            scored = answer.begin(self.engine)
            self.read += len(answer.prompt)
        return True

    def advance(self):
        now = time.monotonic()
        pace = 0.001 * len(self.answers)  # a thousand events a second, shared
        for answer in self.answers:
            if answer.request.ids and not answer.begun:
                answer.begun = True
                self.first.add(now - answer.born)
            answer.advance(self.engine, now, pace, self.deadline)
            if answer.finish:
                self.whole.add(now - answer.born)
                self.written += len(answer.request.ids)

    def fail(self):
        """End all answers in an error and leave the engine empty."""
        self.engine.waiting.clear()
        self.engine.running.clear()
        for answer in self.answers:
            answer.finish = "error"
            answer.events.put((answer, [], [], "error"))


# -----------------------------------------------------------------------------
# Request: from JSON to prompt and parameters; everything wrong with it is a Refusal that names the field

OPTIONS = "stream stream_options n temperature top_p top_k seed stop max_tokens logprobs".split()
OPTIONS += "model user metadata store service_tier safety_identifier prompt_cache_key".split()  # say nothing about the answer
CHAT_OPTIONS = [*OPTIONS, "messages", "max_completion_tokens", "top_logprobs"]
COMPLETION_OPTIONS = [*OPTIONS, "prompt", "echo"]
# what other servers do and this one does not: taken where it asks for nothing
NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "suffix": ""}
NEUTRAL |= {"tools": [], "tool_choice": "none", "functions": [], "response_format": {"type": "text"}}


def read_json(data, options):
    try:
        body = json.loads(data.decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise Refusal(400, f"the body is not JSON in UTF-8: {error}")
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object")
    for key, value in body.items():
        if key in NEUTRAL and value is not None and value != NEUTRAL[key]:
            raise Refusal(400, f"{key} is not supported", key, "unsupported_parameter")
        if key not in NEUTRAL and key not in options:
            raise Refusal(400, f"Unrecognized request argument: {key[:50]}", key[:50], "unknown_parameter")
    return body


def number(body, key, default, low, high, kind=float):
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not low <= value <= high:
        raise Refusal(400, f"{key} must be a {'whole ' if kind is int else ''}number from {low} to {high}", key)
    return kind(value)


def flag(body, key, default=False):
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise Refusal(400, f"{key} must be true or false", key)
    return default if value is None else value


def check_text(text, name):
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise Refusal(400, f"{name} has half a surrogate pair, which is no character", name)


def read_messages(body, most):
    """The conversation, checked: [{"role", "content"}] for data.render."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= most:
        raise Refusal(400, f"messages must be a list of 1 to {most} messages", "messages")
    checked = []
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        if not isinstance(message, dict):
            raise Refusal(400, f"{at} must be an object with role and content", at)
        system = checked[:1] and checked[0]["role"] == "system"
        expected = ("user", "assistant")[(i - bool(system)) % 2]
        role = message.get("role")
        if role != expected and not (i == 0 and role == "system"):
            order = "a system message, if any, comes first; then user and assistant take turns"
            raise Refusal(400, f"{at}.role must be {expected!r}: {order}", f"{at}.role")
        content, kinds, name = message.get("content"), ("text",), f"{at}.content"
        if role == "assistant" and message.get("parts"):
            content, kinds, name = message["parts"], ("text", "python", "output"), f"{at}.parts"
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise Refusal(400, f"{name} must be a string or a list of parts", name)
        for part in parts:
            if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
                raise Refusal(400, f"{name} may hold parts of type {' or '.join(kinds)} with a text, and nothing else", name)
            check_text(part["text"], name)
        checked.append({"role": role, "content": parts if role == "assistant" else "".join(p["text"] for p in parts)})
    if checked[-1]["role"] != "user":
        raise Refusal(400, "the last message must be the user's", "messages")
    return checked


def are_ids(value, tokenizer):
    return isinstance(value, list) and all(type(id) is int and 0 <= id < tokenizer.vocab_size for id in value)


def read_prompts(body, tokenizer):
    """[(ids of a prompt, ids of it that an echo says)]. Text begins a document, so <|bos|> goes before it; ids are taken as they are."""
    given = body.get("prompt")
    prompts = [given] if isinstance(given, str) or given and are_ids(given, tokenizer) else given
    if not isinstance(prompts, list) or not prompts:
        raise Refusal(400, "prompt must be a string, a list of strings, a list of ids or a list of lists of ids", "prompt")
    checked = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            check_text(prompt, "prompt")
            ids = tokenizer.encode(prompt)
            checked.append(([tokenizer.special("<|bos|>"), *ids], ids))
        elif prompt and are_ids(prompt, tokenizer):
            checked.append((prompt, prompt))
        else:
            raise Refusal(400, f"prompt[{i}] must be a string or a list of ids, each from 0 to {tokenizer.vocab_size - 1}", "prompt")
    return checked


def read_answers(body, cfg, engine, prompts, wanted, **how):
    """An Answer for each of the n choices of each prompt; prompts are [(ids, ids to echo)], `how` fields of Answer."""
    context = engine.cache.length
    longest = max(len(prompt) for prompt, _ in prompts)
    if longest + bool(wanted) > context:
        message = f"the prompt has {longest} tokens; the model reads {context - bool(wanted)}"
        raise Refusal(400, message, "messages" if "messages" in body else "prompt", "context_length_exceeded")
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(s, str) and 0 < len(s) <= 100 for s in stop):
        raise Refusal(400, "stop must be a string or a list of up to 16, each of 1 to 100 characters", "stop")
    most = min(cfg.max_choices, cfg.slots + cfg.queue)
    count = number(body, "n", 1, 1, min(cfg.slots, most), int)
    if len(prompts) * count > most:
        raise Refusal(400, f"{len(prompts)} prompts with {count} choices each; a request may have {most} in all", "prompt")
    params = Params(
        temperature=number(body, "temperature", 1.0, 0, 2),
        top_k=number(body, "top_k", 0, 0, 2**31, int),
        top_p=number(body, "top_p", 1.0, 0, 1),
        seed=number(body, "seed", secrets.randbits(32), -(2**63), 2**63 - 1, int),
        top_logprobs=how.pop("tops"),
    )
    answers, events = [], queue.SimpleQueue()
    for prompt, echo in prompts:
        for i in range(count):
            own = replace(params, seed=params.seed + i, max_tokens=min(wanted, context - len(prompt)))
            answers.append(Answer(len(answers), prompt, own, stop, events, echo=echo, **how))
    return answers


def read_chat(body, cfg, engine, **how):
    messages = read_messages(body, cfg.max_messages)
    wanted, context = min(256, cfg.max_tokens), engine.cache.length
    for key in ("max_tokens", "max_completion_tokens"):
        wanted = min(number(body, key, wanted, 1, 2**31, int), cfg.max_tokens)
    how["logprobs"] = flag(body, "logprobs")
    how["tops"] = number(body, "top_logprobs", 0, 0, 20, int)
    if how["tops"] and not how["logprobs"]:
        raise Refusal(400, "top_logprobs goes with logprobs", "top_logprobs")
    prompt = fit(messages, engine.tokenizer, context - min(wanted, context // 4))
    return read_answers(body, cfg, engine, [(prompt, [])], wanted, **how)


def read_completion(body, cfg, engine, **how):
    prompts, echo = read_prompts(body, engine.tokenizer), flag(body, "echo")
    tops = number(body, "logprobs", None, 0, 5, int)
    wanted = min(number(body, "max_tokens", 16, 0 if echo else 1, 2**31, int), cfg.max_tokens)
    prompts = [(ids, said if echo else []) for ids, said in prompts]
    return read_answers(body, cfg, engine, prompts, wanted, logprobs=tops is not None, tops=tops or 0, raw=True, **how)


# -----------------------------------------------------------------------------
# Forms of an answer: OpenAI's, for chats and for plain completions


def token_text(tokenizer, id):
    """A token as a string, spelt "bytes:\\xNN" where it is no text of its own."""
    token = tokenizer.token_bytes(id)
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def finite(logprob):
    return max(logprob, -9999.0)  # JSON has no infinity


class Chat:
    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"
    opening, closing = [{"delta": {"role": "assistant", "content": ""}}], {"delta": {}}

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def token(self, id, logprob):
        return {"token": token_text(self.tokenizer, id), "logprob": finite(logprob), "bytes": [*self.tokenizer.token_bytes(id)]}

    def logprobs(self, tokens):
        content = [self.token(id, logprob) | {"top_logprobs": [self.token(*t) for t in top]} for _, id, logprob, top in tokens]
        return {"content": content, "refusal": None}

    def choice(self, pieces, logprobs):
        content = "".join(text for kind, text in pieces if kind == "text")
        parts = [{"type": kind, "text": text} for kind, text in pieces]
        return {"message": {"role": "assistant", "content": content, "parts": parts}, "logprobs": logprobs}

    def chunks(self, pieces, logprobs):
        deltas = [{"content": t} if kind == "text" else {"content": "", "tool": {"type": kind, "text": t}} for kind, t in pieces]
        return [{"delta": delta, "logprobs": None if i else logprobs} for i, delta in enumerate(deltas or [{}])]


class Completion:
    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"
    opening, closing = [], {"text": ""}

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def logprobs(self, tokens):
        form = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for at, id, logprob, top in tokens:  # no logprob: the first of an echo, or the calculator's
            form["text_offset"].append(at)
            form["token_logprobs"].append(None if logprob is None else finite(logprob))
            form["tokens"].append(token_text(self.tokenizer, id))
            top = [*top, (id, logprob)]
            form["top_logprobs"].append(None if logprob is None else {token_text(self.tokenizer, i): finite(p) for i, p in top})
        return form

    def choice(self, pieces, logprobs):
        return {"text": "".join(text for _, text in pieces), "logprobs": logprobs}

    def chunks(self, pieces, logprobs):
        return [self.choice(pieces, logprobs)]


# -----------------------------------------------------------------------------
# HTTP


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # connections that the kernel keeps until they are accepted

    def __init__(self, cfg):
        super().__init__((cfg.host, cfg.port), Handler)
        self.cfg, self.worker, self.about, self.stopping = cfg, None, {}, False
        self.key = (cfg.api_key or os.environ.get("ONESITTING_API_KEY", "")).encode(errors="surrogateescape")
        self.lock = threading.Lock()
        self.busy, self.idle = 0, {}  # requests being answered; connections without one, longest idle first
        self.counts = Counter()  # requests by (route, status)

    def start(self):
        """Load the model and start the worker."""
        cfg = self.cfg
        machine = start_machine(cfg.device, cfg.dtype, cfg.threads)
        engine, stage = load_engine(cfg, machine, cfg.slots)
        folder = latest(f"{cfg.out}/{stage}")
        step, self.created = int(folder.name.removeprefix("step_")), int(folder.stat().st_mtime)
        self.about = {"stage": stage, "step": step, "model": f"onesitting-{stage}", "context": engine.cache.length, "slots": cfg.slots}
        self.worker = Worker(engine, cfg.slots + cfg.queue, cfg.deadline)
        self.worker.start()
        if stage == "base":
            print("note: a base model continues text; it learns to chat in sft.py")
        print(f"http://{cfg.host}:{self.server_port}/ serves {cfg.out}/{stage}, step {step}, on {machine.device}; Ctrl-C stops", flush=True)

    def stop(self):
        """Take no more, let running answers end for a while, and end what is left with an error."""
        self.stopping = True
        self.server_close()
        self.wait(self.cfg.grace)
        if self.worker:
            self.worker.inbox.put(None)
            self.worker.join(5)
            self.wait(1)

    def card(self):
        return {"id": self.about["model"], "object": "model", "created": self.created, "owned_by": "onesitting"}

    def wait(self, seconds):
        end = time.monotonic() + seconds
        while self.busy and time.monotonic() < end:
            time.sleep(0.02)

    def process_request(self, request, client_address):
        """Give a connection its thread. Where there are too many, the one that has asked nothing for longest makes room."""
        with self.lock:
            self.idle[request] = True
            oldest = next(iter(self.idle)) if len(self.idle) + self.busy > self.cfg.connections else None
            self.idle.pop(oldest, None)
        if oldest:
            try:
                oldest.shutdown(socket.SHUT_RDWR)  # its thread reads an end and goes
            except OSError:
                pass  # it has left by itself
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        with self.lock:
            self.idle.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients may leave when they like
            traceback.print_exc()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # each token leaves at once

    def version_string(self):
        return "onesitting"

    def setup(self):
        self.timeout = self.server.cfg.timeout  # of each read and write on this connection
        self.name = "other"  # of the route, for the metrics: a bounded set, whatever people ask for
        self.routes = {
            "/": ("GET", self.page),
            "/health": ("GET", self.health),
            "/metrics": ("GET", self.metrics),
            "/v1/models": ("GET", self.models),
            "/v1/chat/completions": ("POST", self.chat),
            "/v1/completions": ("POST", self.completions),
            "/tokenize": ("POST", self.tokenize),
            "/detokenize": ("POST", self.detokenize),
            "/tokenizer_info": ("GET", self.tokenizer_info),
        }
        super().setup()

    def log_message(self, *args):
        pass

    def log_request(self, code="-", size="-"):
        with self.server.lock:
            self.server.counts[self.name, int(code)] += 1

    def route(self):
        path = self.path.partition("?")[0]
        method, handler = self.routes.get(path, (None, None))
        self.name = path if handler else "other"
        if path == f"/v1/models/{self.server.about['model']}":
            method, handler, self.name = "GET", self.model, "/v1/models"
        self.started = False
        if self.request_version == "HTTP/1.0":
            self.close_connection = True
        try:
            body = self.read_body()
        except Refusal as refusal:
            return self.refuse(refusal)
        with self.server.lock:
            self.server.busy += 1
            self.server.idle.pop(self.connection, None)
        try:
            if handler is None:
                raise Refusal(404, f"there is no {self.path[:200]}; there are {', '.join(self.routes)}", code="unknown_url")
            if self.command != method and (self.command, method) != ("HEAD", "GET"):
                message, headers = f"{self.path[:200]} wants {method}, not {self.command}", [("Allow", method)]
                raise Refusal(405, message, code="method_not_allowed", headers=headers)
            if self.server.stopping:
                self.close_connection = True
                raise Refusal(503, "the server is stopping")
            handler(body)
        except Refusal as refusal:
            self.refuse(refusal)
        except OSError:  # the client left, or stood still for too long
            self.close_connection = True
        except Exception:
            traceback.print_exc()
            self.close_connection = True
            if not self.started:
                self.refuse(Refusal(500, "the server made a mistake, which is in its log"))
        finally:
            with self.server.lock:
                self.server.busy -= 1
                self.server.idle[self.connection] = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = route

    def read_body(self):
        """The bytes of the request. All methods read it, or it would be taken for the connection's next request."""
        kept_open, self.close_connection = self.close_connection, True  # what goes wrong here leaves unread bytes behind
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        if self.server.key and self.name not in ("/", "/health") and not hmac.compare_digest(given, b"Bearer " + self.server.key):
            message = "no API key, or a wrong one: send the header Authorization: Bearer KEY"
            raise Refusal(401, message, code="invalid_api_key", headers=[("WWW-Authenticate", "Bearer")])
        if "Transfer-Encoding" in self.headers:
            raise Refusal(411, "send the body with a Content-Length")
        lengths = self.headers.get_all("Content-Length", ["0"])
        if len(lengths) != 1 or not re.fullmatch("[0-9]{1,15}", lengths[0]):
            raise Refusal(400, "Content-Length must be one number")
        if int(lengths[0]) > self.server.cfg.max_body:
            raise Refusal(413, f"the body has {lengths[0]} bytes; at most {self.server.cfg.max_body} are read", code="body_too_large")
        body = self.rfile.read(int(lengths[0]))
        if len(body) < int(lengths[0]):
            raise Refusal(400, "the body is shorter than its Content-Length")
        self.close_connection = kept_open
        return body

    def send(self, status, kind, body, headers=()):
        self.started = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in headers:
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, form, status=200, headers=()):
        self.send(status, "application/json", json.dumps(form).encode(), headers)

    def refuse(self, refusal):
        try:
            self.send_json(refusal.form, refusal.status, refusal.headers)
            if self.close_connection:
                # closing on unread bytes would reset the connection and lose our answer: forget them for a moment first
                self.connection.shutdown(socket.SHUT_WR)
                self.connection.settimeout(0.5)
                end = time.monotonic() + 2
                while time.monotonic() < end and self.connection.recv(65536):
                    pass
        except OSError:
            self.close_connection = True

    def send_error(self, code, message=None, explain=None):
        """What http.server itself finds wrong with a request, in our form."""
        self.name = "other"
        self.close_connection = True
        self.refuse(Refusal(405 if code == 501 else code, message or "bad request"))

    def page(self, body):
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
        policy += "; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
        self.send(200, "text/html; charset=utf-8", PAGE.encode(), [("Content-Security-Policy", policy), ("Cache-Control", "no-cache")])

    def health(self, body):
        taken, slots = self.server.worker.taken, self.server.cfg.slots
        self.send_json({"status": "ok", **self.server.about, "running": min(taken, slots), "waiting": max(0, taken - slots)})

    def models(self, body):
        self.send_json({"object": "list", "data": [self.server.card()]})

    def model(self, body):
        self.send_json(self.server.card())

    def metrics(self, body):
        server, worker = self.server, self.server.worker
        with server.lock:
            counts, connections = sorted(server.counts.items()), len(server.idle) + server.busy
        running = min(worker.taken, server.cfg.slots)
        single = [("running", "gauge", running), ("waiting", "gauge", worker.taken - running), ("connections", "gauge", connections)]
        single += [("prompt_tokens_total", "counter", worker.read), ("generated_tokens_total", "counter", worker.written)]
        single += [("reused_tokens_total", "counter", worker.engine.reused)]  # of prompts, whose beginnings a slot still held
        lines = ["# TYPE onesitting_requests_total counter"]
        lines += [f'onesitting_requests_total{{route="{route}",status="{status}"}} {n}' for (route, status), n in counts]
        for name, kind, value in single:
            lines += [f"# TYPE onesitting_{name} {kind}", f"onesitting_{name} {value}"]
        for name, times in (("time_to_first_token_seconds", worker.first), ("answer_seconds", worker.whole)):
            lines += [f"# TYPE onesitting_{name} histogram", *times.lines(f"onesitting_{name}")]
        self.send(200, "text/plain; version=0.0.4; charset=utf-8", "".join(line + "\n" for line in lines).encode())

    def tokenize(self, body):
        """vLLM's form, which lm-eval asks for. A prompt that is nothing but a special token's name gives that token: lm-eval
        learns the ids of bos and eos so. Within a longer text such a name is text."""
        body, tokenizer = read_json(body, ["model", "prompt", "add_special_tokens"]), self.server.worker.engine.tokenizer
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            raise Refusal(400, "prompt must be a string", "prompt")
        check_text(prompt, "prompt")
        first = [tokenizer.special("<|bos|>")] if flag(body, "add_special_tokens", True) else []
        tokens = [tokenizer.special(prompt)] if prompt in tokenizer.special_tokens else [*first, *tokenizer.encode(prompt)]
        self.send_json({"tokens": tokens, "count": len(tokens), "max_model_len": self.server.about["context"]})

    def detokenize(self, body):
        body, tokenizer = read_json(body, ["model", "tokens"]), self.server.worker.engine.tokenizer
        if not are_ids(body.get("tokens"), tokenizer):
            raise Refusal(400, f"tokens must be a list of ids, each from 0 to {tokenizer.vocab_size - 1}", "tokens")
        self.send_json({"prompt": tokenizer.decode(body["tokens"])})

    def tokenizer_info(self, body):
        tokenizer = self.server.worker.engine.tokenizer
        form = {"tokenizer_class": "onesitting", "bos_token": "<|bos|>", "eos_token": "<|assistant_end|>", "pad_token": None}
        form |= {"vocab_size": tokenizer.vocab_size, "model_max_length": self.server.about["context"]}
        self.send_json(form | {"additional_special_tokens": tokenizer.special_tokens, "chat_template": None})

    def chat(self, body):
        self.reply(Chat, read_json(body, CHAT_OPTIONS), read_chat)

    def completions(self, body):
        self.reply(Completion, read_json(body, COMPLETION_OPTIONS), read_completion)

    def reply(self, form, body, read):
        engine, stream, usage_wanted = self.server.worker.engine, flag(body, "stream"), False
        if body.get("stream_options") is not None:
            if not stream or not isinstance(body["stream_options"], dict):
                raise Refusal(400, "stream_options must be an object, and goes with stream", "stream_options")
            usage_wanted = flag(body["stream_options"], "include_usage")
        answers, form = read(body, self.server.cfg, engine, live=stream), form(engine.tokenizer)
        self.server.worker.begin(answers)
        head = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.server.about["model"]}
        try:
            if stream:
                self.reply_stream(form, head | {"object": form.chunk}, answers, usage_wanted)
            else:
                self.reply_whole(form, head | {"object": form.whole}, answers)
        finally:
            for answer in answers:
                answer.dropped = True

    def reply_whole(self, form, head, answers):
        said = {answer: (pieces, tokens) for answer, pieces, tokens, _ in self.follow(answers)}  # each comes once, whole
        choices = []
        for answer in answers:
            pieces, tokens = said[answer]
            logprobs = form.logprobs(tokens) if answer.logprobs else None
            choices.append({"index": answer.index, **form.choice(pieces, logprobs), "finish_reason": answer.finish})
        self.send_json(head | {"choices": choices, "usage": usage(answers)})

    def reply_stream(self, form, head, answers, usage_wanted):
        self.started = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        chunked = self.request_version != "HTTP/1.0"
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Connection", "close")))
        self.end_headers()

        def event(form):
            data = f"data: {form if isinstance(form, str) else json.dumps(form)}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)

        def choice(answer, change, finish=None):
            event(head | {"choices": [{"index": answer.index, "logprobs": None, **change, "finish_reason": finish}]})

        for answer in answers:
            for change in form.opening:
                choice(answer, change)
        try:
            for answer, pieces, tokens, finish in self.follow(answers):
                if pieces or tokens:
                    for change in form.chunks(pieces, form.logprobs(tokens) if tokens else None):
                        choice(answer, change)
                if finish:
                    choice(answer, form.closing, finish)
            if usage_wanted:
                event(head | {"choices": [], "usage": usage(answers)})
            event("[DONE]")
        except Refusal as refusal:  # too late for a status: the error is the stream's last event
            event(refusal.form)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def follow(self, answers):
        """Events of these answers until all are finished. Raises ConnectionError as soon as the client has left."""
        events, unfinished = answers[0].events, len(answers)
        end = answers[0].born + self.server.cfg.deadline + self.server.cfg.timeout  # for a client that reads too slowly
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        while unfinished:
            try:
                event = events.get(timeout=0.25)
            except queue.Empty:
                event = None
            if poll.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionAbortedError("the client has left")
            if time.monotonic() > end:
                raise ConnectionAbortedError("the client reads too slowly")
            if event is None:
                continue
            finish = event[-1]
            if finish == "error":
                raise Refusal(500, "the answer could not be finished; the server's log says why")
            if finish == "late":
                headers = [("Retry-After", "10")]
                raise Refusal(503, f"no place came free within {self.server.cfg.deadline:g} seconds", headers=headers)
            unfinished -= bool(finish)
            yield event


def usage(answers):
    """Tokens read, each prompt once, and written; the calculator's output and the end of the turn count as written."""
    read = sum(len(next(same).prompt) for _, same in groupby(answers, key=lambda answer: id(answer.prompt)))
    written = sum(len(a.request.ids) for a in answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


# -----------------------------------------------------------------------------
# Page: whatever a person or the model wrote enters it through textContent alone

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>onesitting</title>
<style>
  :root {
    color-scheme: light dark;
    --back: #fbfaf8; --panel: #fff; --text: #23211e; --faint: #6d6860;
    --line: #dedad2; --mine: #e8f0ea; --accent: #24684a; --on: #fff;
  }
  @media (prefers-color-scheme: dark) { :root {
    --back: #191a1a; --panel: #222424; --text: #e9e7e3; --faint: #a09c94;
    --line: #3a3c3b; --mine: #263b31; --accent: #7cc7a0; --on: #10231a;
  } }
  * { box-sizing: border-box }
  [hidden] { display: none !important }
  body { margin: 0; height: 100dvh; display: grid; grid-template: auto minmax(0, 1fr) auto / minmax(0, 1fr) }
  body { background: var(--back); color: var(--text); font: 16px/1.55 system-ui, sans-serif }
  header, #log, form { padding: .7rem max(1rem, 50% - 23rem) }
  header, .row, .acts { display: flex; gap: .5rem; align-items: center }
  h1 { font-size: 1.05rem; margin: 0 auto 0 0 }
  p { margin: 0 }
  button, select, textarea, input { font: inherit; color: inherit; background: var(--panel) }
  button, select, textarea, input { border: 1px solid var(--line); border-radius: .6rem; padding: .5rem .8rem }
  button { cursor: pointer; white-space: nowrap }
  button:hover, select:hover { border-color: var(--accent) }
  :focus-visible { outline: 2px solid var(--accent); outline-offset: -1px }
  select { width: 12rem; min-width: 0; text-overflow: ellipsis }
  @media (max-width: 30rem) { h1 { display: none } select { flex: 1 } }
  main { position: relative }
  #log { height: 100%; overflow-y: auto; border-block: 1px solid var(--line) }
  article { margin-bottom: 1.1rem; white-space: pre-wrap; overflow-wrap: anywhere }
  article h2 { margin: 0 0 .1rem; font-size: .8rem; color: var(--faint) }
  .user p { background: var(--mine); border-radius: .8rem; padding: .5rem .9rem; width: fit-content }
  .tool { width: fit-content; margin: .25rem 0 .4rem; padding: .3rem .7rem; font: .88rem/1.5 ui-monospace, monospace }
  .tool { background: var(--panel); border: 1px solid var(--line); border-left: 3px solid var(--accent); border-radius: .4rem }
  .tool b { font: 600 .8rem/1 system-ui, sans-serif; color: var(--faint); margin-right: .6rem }
  .note, label, summary, #editing, .acts button { color: var(--faint); font-size: .84rem }
  .acts { gap: .2rem; flex-wrap: wrap; margin-top: .2rem }
  .acts button { background: none; border-color: transparent; padding: .15rem .5rem }
  .acts button:first-child { margin-left: -.5rem }
  .acts button:hover { border-color: var(--line); color: var(--text) }
  [aria-busy=true] .acts { display: none }
  [aria-busy=true] > :nth-last-child(2)::after { content: "▍"; color: var(--accent) }
  #welcome { position: absolute; inset: 12vh 1rem auto; text-align: center; color: var(--faint) }
  #welcome button { margin: .8rem .15rem 0; border-radius: 1.4rem; color: var(--text); white-space: normal }
  #log:not(:empty) + #welcome { display: none }
  textarea { flex: 1; resize: none; max-height: 35vh }
  #send { background: var(--accent); border-color: var(--accent); color: var(--on); font-weight: 600 }
  details { margin-top: .45rem }
  summary { cursor: pointer; width: fit-content }
  #knobs { display: grid; grid-template-columns: repeat(auto-fit, minmax(6.3rem, 1fr)); gap: .6rem; margin-top: .4rem }
  #knobs input { display: block; width: 100%; padding: .3rem .6rem; color: var(--text) }
  #editing { margin-bottom: .4rem }
</style>
</head>
<body>
<header>
  <h1>onesitting</h1>
  <select id="chats" aria-label="Conversations"></select>
  <button id="fresh">New chat</button>
  <button id="delete" aria-label="Delete this chat">Delete</button>
</header>
<main>
  <div id="log" role="log" aria-label="Messages" tabindex="0"></div>
  <div id="welcome">
    <p>Ask something, or try one of these.</p>
    <button>Who are you?</button>
    <button>What is the capital of Poland?</button>
    <button>How many letters "r" are in "strawberry"?</button>
    <button>Tell me a story about a fox.</button>
  </div>
</main>
<form id="form">
  <div id="editing" class="row" hidden><span>Sending this replaces what follows the message.</span>
    <button id="keep" type="button" aria-label="Do not edit">Cancel</button></div>
  <div class="row">
    <textarea id="input" rows="1" aria-label="Your message" placeholder="Write a message" enterkeyhint="send"></textarea>
    <button id="send">Send</button>
    <button id="stop" type="button" hidden>Stop</button>
  </div>
  <details>
    <summary>Settings</summary>
    <div id="knobs">
      <label>Temperature <input name="temperature" type="number" min="0" max="2" step="0.1" value="0.6"></label>
      <label>Top-k, 0 is all <input name="top_k" type="number" min="0" step="1" value="0"></label>
      <label>Top-p <input name="top_p" type="number" min="0" max="1" step="0.05" value="1"></label>
      <label>Longest answer <input name="max_tokens" type="number" min="1" step="1" value="256"></label>
      <label>Seed <input name="seed" type="number" step="1" placeholder="random"></label>
    </div>
  </details>
</form>
<script>
"use strict";
const $ = id => document.getElementById(id);
let disk = {};
try { disk = localStorage } catch { }  // where the browser forbids it, a chat lasts as long as the page
let chat = null;  // {key, messages}: the conversation on screen; a key each on the disk, so that two tabs do not collide
let running = null;  // AbortController of the answer under way
let edited = -1;  // place of the message that is being written anew

function element(tag, kind, text) {
  const made = document.createElement(tag);
  made.className = kind;
  made.textContent = text;
  return made;
}

function read(key) {
  return {key, messages: JSON.parse(disk[key] || "[]")};
}

function open(key) {
  running?.abort();
  if (edited >= 0) edit(-1, "");
  chat = read(key || `onesitting chat ${Date.now()}`);
  disk["onesitting open"] = chat.key;
  if (chat.messages.at(-1)?.role === "user") $("input").value = chat.messages.pop().content;  // left before its answer came
  redraw();
}

function redraw() {
  $("log").replaceChildren();
  chat.messages.forEach(show);
  update();
}

function edit(place, text) {
  edited = place;
  $("editing").hidden = place < 0;
  $("input").value = text;
  grow();
  if (place >= 0) $("input").focus();
}

function save(chat) {
  try { if (!chat.gone) disk[chat.key] = JSON.stringify(chat.messages) } catch { }  // a full disk must not end the conversation
  update();
}

function update() {
  const keys = Object.keys(disk).filter(key => key.startsWith("onesitting chat ")).sort().reverse();
  for (const old of keys.splice(50)) delete disk[old];
  if (!keys.includes(chat.key)) keys.unshift(chat.key);
  $("chats").replaceChildren(...keys.map(key => new Option((read(key).messages[0]?.content || "(new)").slice(0, 60), key)));
  $("chats").value = chat.key;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("log").scrollTop = $("log").scrollHeight;
  if (matchMedia("(hover: hover)").matches) $("input").focus();  // a phone would raise its keyboard over the answer
}

function show(message) {
  const item = element("article", message.role, "");
  $("log").append(item);
  fill(item, message);
  return item;
}

function act(name, label, action) {
  const button = element("button", "", name);
  button.setAttribute("aria-label", label);
  button.onclick = () => action(button);
  return button;
}

async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {  // browsers give the clipboard to localhost and https alone
    getSelection().selectAllChildren(button.closest("article"));
    button.textContent = document.execCommand("copy") ? "Copied" : "Not allowed";
  }
  setTimeout(() => button.textContent = "Copy", 1500);
}

function fill(item, message) {
  const {role, content, parts, note} = message;
  const shown = [element("h2", "", role === "user" ? "You" : "onesitting")];
  for (const {type, text} of parts || [{type: "text", text: content}]) {
    if (type === "text") shown.push(element("p", "", text.trim()));
    if (type === "python") {
      shown.push(element("div", "tool", ""));
      shown.at(-1).append(element("b", "", "Calculator"), text.trim());
    }
    if (type === "output") shown.at(-1).append(` = ${text.trim()}`);
  }
  const acts = element("div", "acts", ""), place = () => chat.messages.indexOf(message);
  acts.append(act("Copy", "Copy this message", button => copy(button, content.trim())));
  if (role === "user") acts.append(act("Edit", "Edit this message and send it again", () => running || edit(place(), content)));
  else acts.append(act("Regenerate", "Answer again", () => running || again(place() - 1)));
  if (note) acts.append(element("span", "note", note));
  item.replaceChildren(...shown, acts);
}

function again(place) {
  const text = chat.messages[place]?.content ?? $("input").value.trim();  // a question without an answer went back there
  if (place >= 0) chat.messages.splice(place);
  redraw();
  send(text);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  while (true) {
    const {value, done} = await reader.read();
    if (done) throw Error("the connection ended early");
    const whole = (text + value).split("\n\n");
    text = whole.pop();
    for (const event of whole) {
      if (event === "data: [DONE]") return;
      yield JSON.parse(event.slice("data: ".length));
    }
  }
}

async function ask(body, signal) {
  const headers = {"Content-Type": "application/json"};
  if (disk["onesitting key"]) headers.Authorization = `Bearer ${disk["onesitting key"]}`;
  const response = await fetch("/v1/chat/completions", {method: "POST", headers, body, signal});
  if (response.status !== 401) return response;
  const key = prompt("This server asks for its API key. The browser keeps it.");
  if (!key) return response;
  disk["onesitting key"] = key;
  return ask(body, signal);
}

async function send(text) {
  if (running || !text) return;
  if (edited >= 0) {
    chat.messages.splice(edited);
    edit(-1, "");
    redraw();
  }
  const mine = chat, here = running = new AbortController();  // another chat may be on screen before this one's answer ends
  mine.messages.push({role: "user", content: text});
  show(mine.messages.at(-1));
  $("input").value = "";
  grow();
  const given = [...document.querySelectorAll("#knobs input")].filter(knob => knob.value !== "");  // an empty seed is random
  const knobs = Object.fromEntries(given.map(knob => [knob.name, Number(knob.value)]));
  const body = JSON.stringify({messages: mine.messages.slice(-99), stream: true, stream_options: {include_usage: true}, ...knobs});
  const start = performance.now();
  const reply = {role: "assistant", content: "", parts: []}, item = show(reply);
  item.setAttribute("aria-busy", "true");  // so that it is read aloud when it is whole
  save(mine);
  try {
    const response = await ask(body, here.signal);
    if (!response.ok) throw Error((await response.json()).error.message);
    let cut = "";
    for await (const {error, choices, usage} of events(response)) {
      if (error) throw Error(error.message);
      if (usage) {
        const count = usage.completion_tokens, rate = count / (performance.now() - start) * 1000;
        reply.note = `${count} tokens, ${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s${cut}`;
        continue;
      }
      const {delta, finish_reason} = choices[0];
      const piece = delta.tool || {type: "text", text: delta.content || ""};
      if (piece.text && reply.parts.at(-1)?.type !== piece.type) reply.parts.push({type: piece.type, text: ""});
      if (piece.text) reply.parts.at(-1).text += piece.text;
      reply.content += delta.content || "";
      if (finish_reason === "length") cut = ", cut off at the longest answer";
      const atEnd = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 60;
      fill(item, reply);
      if (atEnd) $("log").scrollTop = $("log").scrollHeight;  // who has scrolled up to read stays there
    }
    if (!reply.parts.length) reply.note = "an empty answer";
  } catch (error) {
    reply.note = here.signal.aborted ? "stopped" : `no answer: ${error.message}`;
    if (!here.signal.aborted && !reply.parts.length) {  // the question goes back to where it was written
      mine.messages.pop();
      if (mine === chat && !$("input").value) $("input").value = text;
    }
  }
  item.removeAttribute("aria-busy");
  fill(item, reply);
  if (mine.messages.at(-1)?.role === "user") mine.messages.push(reply);
  if (running === here) running = null;
  save(mine);
}

function grow() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight + 2}px`;
}

$("input").oninput = onresize = grow;
$("input").onkeydown = event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send($("input").value.trim());
};
$("form").onsubmit = event => { event.preventDefault(); send($("input").value.trim()) };
$("stop").onclick = () => running.abort();
$("keep").onclick = () => edit(-1, "");
$("fresh").onclick = () => open("");
$("delete").onclick = () => {
  chat.gone = true;  // also for an answer under way, which would save it again
  delete disk[chat.key];
  open(Object.keys(disk).filter(key => key.startsWith("onesitting chat ")).sort().at(-1));
};
$("chats").onchange = () => open($("chats").value);
document.onkeydown = event => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else if (edited >= 0) edit(-1, "");
};
for (const button of document.querySelectorAll("#welcome button")) button.onclick = () => send(button.textContent);
for (const knob of document.querySelectorAll("#knobs input")) {
  knob.value = disk[`onesitting ${knob.name}`] ?? knob.value;
  knob.onchange = () => { disk[`onesitting ${knob.name}`] = knob.value };
}
open(disk["onesitting open"]);
</script>
</body>
</html>
"""


def main(argv):
    cfg = override(Config(), argv, __doc__)
    try:
        server = Server(cfg)  # before the model is loaded, so that a port in use shows at once
    except (OSError, OverflowError) as error:
        raise SystemExit(f"cannot listen on {cfg.host}:{cfg.port}: {error}; choose another with --port=N")

    def end(*_):
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_DFL)  # ends it at once
        print("stopping", flush=True)
        # an exception would come wherever this thread is: while it hands over a connection, it would close that one
        threading.Thread(target=server.shutdown).start()

    server.start()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, end)
    server.serve_forever(poll_interval=0.1)
    server.stop()


if __name__ == "__main__":
    command(main)
