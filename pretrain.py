"""
Pretraining: from random weights to a model that continues text.

    python pretrain.py                                             # the demo world, on whatever this machine has
    python pretrain.py --data=FOLDER --val_data=FILE --depth=4     # your own text
    torchrun --nproc_per_node=8 pretrain.py --depth=20 --seq_len=2048 --vocab_size=65536 --data=FOLDER
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain.py --out=SHARED ...

Several nodes share one folder. Writes out/base/step_NNNNNN. Kill it at any moment and run the same command: it goes
on from the last checkpoint with the same data, and on CPU ends with the same bits. A run's length is fixed when it
starts: the schedule depends on it. `dial` below says what follows from --depth.
"""

import dataclasses
import math
import time
from dataclasses import dataclass

import torch

from data import CLIMBMIX_TOKENS, SPECIALS, batch, prepare
from evals import bits_per_byte, bytes_per_token, record
from gpt import CARDS, GPT, GPTConfig, Patience, command, compile_model, find_resume, load_model, load_optimizer, lock_folder, log_metrics
from gpt import override, save_checkpoint, start_machine, trim_metrics
from optim import build
from sample import Engine, Params

# -----------------------------------------------------------------------------


@dataclass
class Config:
    # where things are
    out: str = "out"  # folder of the run
    from_: str = ""  # take tokenizer and data from another run's folder
    fresh: bool = False  # start this stage over; to go on later, leave it out
    # data
    data: str = ""  # file or folder of .txt, .jsonl, .json (also .gz) or .parquet; empty is the demo world
    val_data: str = ""  # fixed validation text; empty holds out one document in a hundred
    val_documents: int = 0  # use only so many documents of val_data; 0 is all
    vocab_size: int = 2048  # of the tokenizer, where one has to be trained
    clean: bool = False  # drop training documents that RULES in data.py says are junk, duplicates or evaluation items
    evaluations: str = ""  # with --clean: files of evaluation items (.jsonl, .csv) or folders of them, with commas between
    near_duplicates: bool = False  # with --clean: also drop documents that are nearly the same as an earlier one
    # model
    depth: int = 4  # the dial: width, heads, batch, rates and horizon follow; 0 is what these GPUs train in `hours`
    hours: float = 2.5  # with --depth=0
    plan: str = ""  # say what the run would take, and end: `here`, or on other cards, as 8xH100
    seq_len: int = 512  # context in tokens, T
    kv_heads: int = 0  # key/value heads; 0 is as many as heads, 1 is multi-query
    window_pattern: str = "L"  # one letter a layer, repeated: L sees all, S half; for example SSSL
    # optimisation; 0 (or -1 for weight decay) takes what the dial says
    horizon: float = 16.0  # tokens to read for each weight that multiplies, where `steps` is not given
    steps: int = 0  # updates
    batch_tokens: int = 0  # tokens an update, over all ranks
    micro_rows: int = 0  # rows of a forward pass: smaller needs less memory and computes the same; 0 is 16, on a GPU what fits
    lr_matrix: float = 0.0  # Muon, matrices (and AdamW, gates)
    lr_embed: float = 0.0  # AdamW, embeddings; at width 768, others go with 1/sqrt(width)
    lr_unembed: float = 0.0  # AdamW, output layer; the same
    weight_decay: float = -1.0  # of matrices
    warmup: float = 0.02  # share of steps in which the rates rise from 0
    warmdown: float = 0.5  # share of steps in which they fall to final_lr
    final_lr: float = 0.02  # rates at the end, as a share
    seed: int = 1  # of weights and data
    # on the way
    log_every: int = 10  # steps between lines
    eval_every: int = 100  # steps between validations
    eval_rows: int = 0  # rows of validation on the way; 0 is all of them; the last one always takes all
    sample_every: int = 50  # steps between samples
    save_every: int = 100  # steps between checkpoints
    keep: int = 2  # newest checkpoints that are kept
    prompts: str = "Once upon a time|The capital of France|Anna has"  # to continue in samples
    stop_after: int = 0  # end this call after so many steps; the same command goes on later
    # machine
    device: str = "auto"  # cuda, cpu
    dtype: str = "auto"  # bfloat16, float32
    threads: int = 0  # CPU threads; 0 shares all cores between the ranks
    compile: bool = False  # torch.compile the training forward
    deterministic: bool = False  # the same bits on CUDA too, slower


def dial(cfg, model):
    """What follows from the depth, where the command line does not say otherwise.

    Batch and horizon grow with the model: `horizon` tokens for each weight that multiplies, in updates of
    16k tokens at depth 4 and 512k at depth 20. The rates were tried at depths 3 and 4; they should carry to others,
    since Muon's update does not depend on size and AdamW's rates go with 1/sqrt(width) (in optim.py).
    """
    sizes, _ = model.sizes()
    cfg.batch_tokens = cfg.batch_tokens or max(cfg.seq_len, 2 ** round(14 + 2.15 * torch.tensor(cfg.depth / 4).log2().item()))
    cfg.steps = cfg.steps or max(1, round(cfg.horizon * (sizes["matrices"] + sizes["unembedding"])) // cfg.batch_tokens)
    cfg.lr_matrix = cfg.lr_matrix or 0.04
    cfg.lr_embed = cfg.lr_embed or 0.5
    cfg.lr_unembed = cfg.lr_unembed or 0.008
    cfg.weight_decay = cfg.weight_decay if cfg.weight_decay >= 0 else 0.05
    return cfg


MFU = 0.45  # share of a card's published peak that a run is expected to reach


def shape_of(cfg, vocab_size):
    return GPTConfig.from_depth(cfg.depth, vocab_size, cfg.seq_len, cfg.kv_heads, cfg.window_pattern)


def estimate(cfg, cards):
    """What a run of cfg takes on cards (how many, published FLOP/s of one, bytes of one), by arithmetic: a dict.

    Bytes: 12 for each parameter (weight, gradient, direction), 8 more shared out between the ranks (moments), and for each
    token of a micro-batch 20 numbers of the width a layer that the backward pass needs, and its logits, in bf16.
    """
    world, peak, memory = cards
    with torch.device("meta"):
        model = GPT(shape_of(cfg, cfg.vocab_size))
    sizes, flops = model.sizes()
    cfg = dial(dataclasses.replace(cfg), model)
    token = 2 * (20 * cfg.depth * model.cfg.width + model.cfg.vocab_size) * (1 if cfg.compile else 2)
    left = 0.9 * memory - 3 * 2**30 - sum(sizes.values()) * (12 + 8 / world)  # 3 GiB for kernels' workspaces and pieces of logits
    rows = min(int(left / (token * cfg.seq_len)), cfg.batch_tokens // cfg.seq_len // world)
    rows = 2 ** (rows.bit_length() - 1) if rows > 0 else 0
    tokens = cfg.steps * cfg.batch_tokens
    hours = flops * tokens / (world * peak * MFU) / 3600
    return {"weights": sizes["matrices"] + sizes["unembedding"], "tokens": tokens, "flops": flops * tokens, "hours": hours, "rows": rows}


def fit(cfg, machine):
    """Choose what the machine decides: the depth where it is 0, and rows that fit. With --plan, say so and end."""
    if machine.device.type == "cuda" and cfg.plan in ("", "here"):
        card, count, memory = torch.cuda.get_device_name(), machine.world, torch.cuda.mem_get_info()[1]
        count = torch.cuda.device_count() if cfg.plan else count
    else:
        count, _, card = cfg.plan.partition("x")
        count, memory = int(count) if count.isdigit() else 0, None
    peak, published = next(((1e12 * rate, 1e9 * size) for name, (rate, size) in CARDS.items() if name in card), (None, None))
    memory = memory or published
    if (cfg.plan or not cfg.depth) and not (peak and count > 0):
        known = ", ".join(CARDS)
        raise SystemExit(f"--depth=0 and --plan are for GPUs of known speed ({known}): name a depth, or cards as in --plan=8xH100")
    if not cfg.depth:
        runs = {depth: estimate(dataclasses.replace(cfg, depth=depth), (count, peak, memory)) for depth in range(4, 42, 2)}
        cfg.depth = max((depth for depth, e in runs.items() if e["rows"] and e["hours"] <= cfg.hours), default=4)
    if cfg.plan:
        e = estimate(cfg, (count, peak, memory))
        print(f"depth {cfg.depth}: {e['weights'] / 1e6:,.0f} million weights that multiply, {e['tokens'] / 1e9:.2f} billion tokens", end="")
        print(f", {e['flops']:.1e} FLOPs")
        print(f"on {count} x {card}: {e['hours']:.1f} hours, {count * e['hours']:.0f} GPU-hours; micro-batches of {e['rows']} rows")
        print(f"computed, at {MFU:.0%} of the published peak; text: {math.ceil(e['tokens'] / CLIMBMIX_TOKENS)} shards")
        raise SystemExit
    if not cfg.micro_rows:
        cuda = machine.device.type == "cuda"
        cfg.micro_rows = max(1, estimate(cfg, (count, peak or 1, memory))["rows"]) if cuda else 16


def lr_scale(step, cfg):
    """Linear warm-up, a plateau, linear warm-down; `step` counts updates from 0."""
    up, down = max(1, round(cfg.warmup * cfg.steps)), max(1, round(cfg.warmdown * cfg.steps))
    return min((step + 1) / up, 1, cfg.final_lr + (1 - cfg.final_lr) * (cfg.steps - step) / down)


def main(argv):
    cfg = override(Config(), argv, __doc__)
    machine = start_machine(cfg.device, cfg.dtype, cfg.threads, cfg.deterministic)
    fit(cfg, machine)
    lock_folder(cfg.out, machine)
    tokenizer, hash, train, val = prepare(cfg, machine)
    model = GPT(shape_of(cfg, tokenizer.vocab_size), machine.dtype)
    cfg = dial(cfg, model)
    rows = cfg.batch_tokens // cfg.seq_len  # of an update, over all ranks
    if not rows:
        raise SystemExit(f"--batch_tokens={cfg.batch_tokens} is less than one row of --seq_len={cfg.seq_len} tokens")
    folder = f"{cfg.out}/base"

    found = find_resume(folder, cfg, machine)
    model, state = load_model(found, machine, hash) if found else (model.init(cfg.seed).to(machine.device), {})
    rates = (cfg.lr_matrix, cfg.lr_embed, cfg.lr_unembed, cfg.weight_decay)
    optimizer = build(model, *rates, rank=machine.rank, world=machine.world)
    start = state["step"] if found else 0
    if found and start >= cfg.steps:
        return machine.print(f"{found} is complete")
    if found:
        load_optimizer(found, optimizer)
    trim_metrics(cfg.out, "base", start, machine)
    run = compile_model(model, machine) if cfg.compile else model
    sizes, flops = model.sizes()
    dropped, _, cut = train.loss(cfg.seq_len, cfg.seed)
    machine.print(f"pretraining: {sum(sizes.values()):,} parameters, {machine.describe()}")
    machine.print(f"  {cfg.steps} steps of {rows} rows of {cfg.seq_len} tokens; packing drops {dropped:.2%} of them, cuts {cut:.0%} of documents")
    machine.print(f"  going on from step {start}" if found else "  from random weights")

    clock, seconds = time.time() - state.get("seconds", 0), []
    patience = Patience()
    for step in range(start, cfg.steps + 1):
        last = step == cfg.steps
        if last or (step and step % cfg.eval_every == 0):
            bpb = bits_per_byte(model, tokenizer, val, machine, cfg.micro_rows, 0 if last else cfg.eval_rows)
            machine.print(f"step {step:5}  validation {bpb:.4f} bits per byte")
            log_metrics(cfg.out, machine, stage="base", step=step, seconds=time.time() - clock, bpb=bpb)
        if machine.first and (last or step % cfg.sample_every == 0):
            show_samples(model, tokenizer, cfg)
        if last:
            record(cfg.out, machine, "base", {"bpb": bpb, "bytes_per_token": bytes_per_token(tokenizer, val)}, time.time() - clock)
        if step > start and (last or step % cfg.save_every == 0 or step == start + cfg.stop_after):
            state = {"stage": "base", "config": dataclasses.asdict(cfg), "tokenizer": hash, "seconds": time.time() - clock}
            save_checkpoint(folder, step, model, optimizer, machine, state, cfg.keep)
        if last or (cfg.stop_after and step == start + cfg.stop_after):
            break

        # ---------------- training ----------------
        t0 = time.time()
        ids, targets = batch(train, rows, cfg.seq_len, cfg.seed, step, machine.rank, machine.world)
        count = machine.sum(int((targets >= 0).sum()))
        nats = torch.zeros((), device=machine.device)
        for x, y in optimizer.passes(zip(ids.split(cfg.micro_rows), targets.split(cfg.micro_rows))):
            loss = run(x.to(machine.device), y.to(machine.device)).sum()
            (loss / max(1, count)).backward()
            nats += loss.detach()
        norm = optimizer.step(lr_scale(step, cfg))
        # ------------------------------------------

        patience.see(norm, step, machine)
        loss = machine.sum(nats.item()) / max(1, count)
        seconds.append(time.time() - t0)
        if step % cfg.log_every == 0 or step == cfg.steps - 1:
            pace = sorted(seconds[-20:])[len(seconds[-20:]) // 2]  # the median: one slow step says nothing
            speed, left = rows * cfg.seq_len / pace, pace * (cfg.steps - step - 1)
            rate = f"rate x{lr_scale(step, cfg):.2f}  {speed:,.0f} tokens/s"
            machine.print(f"step {step:5}/{cfg.steps}  loss {loss:.4f}  {rate}  {left / 60:.1f} min left")
            figures = {"loss": loss, "tokens_per_second": speed, "gflops": speed * flops / 1e9, "norm": norm, "skipped": patience.skipped}
            log_metrics(cfg.out, machine, stage="base", step=step, seconds=time.time() - clock, **figures)


def show_samples(model, tokenizer, cfg):
    """Continue the prompts, so that a person sees noise turn into language."""
    prompts = [[tokenizer.special("<|bos|>"), *tokenizer.encode(p)] for p in cfg.prompts.split("|")]
    engine = Engine(model, tokenizer, len(prompts))
    for request in engine.generate(prompts, Params(max_tokens=40, temperature=0.7, top_k=50, seed=cfg.seed)):
        ids = request.prompt[1:] + [i for i in request.ids if i < tokenizer.vocab_size - len(SPECIALS)]
        print("   | " + tokenizer.decode(ids).replace("\n", " "))


if __name__ == "__main__":
    command(main)
