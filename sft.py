"""
Supervised fine-tuning: from a model that continues text to one that answers, uses its calculator and stops.

    python sft.py                                             # the base model in out/, the demo's conversations
    torchrun --nproc_per_node=8 sft.py
    python sft.py --out=more --from=out --init=sft            # go on from a fine-tuned model, in a folder of its own
    python sft.py --data=FILE.jsonl                           # your own conversations beside the demo's (--chats=0: alone)
    python sft.py --mix=FOLDER --chats=0 --steps=3000         # public conversations, as `data.py download` brings them
    python sft.py --data=gsm8k_train.jsonl --chats=0 --tasks=gsm8k --files=DIR
    python sft.py --stage=mid --mix=FOLDER --steps=1000       # before it, if it pays: texts and conversations mixed

Own conversations are .jsonl: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]} a line.

Writes out/sft/step_NNNNNN. It is pretraining with two differences: rows hold whole conversations, and only
what the assistant says is supervised (the calculator's output is not: the model reads it, it never writes it).
Mid-training is between the two: rows of the base's own text among rows of conversations, and every token supervised.
It writes out/mid, from which fine-tuning then starts.
Killed at any moment, the same command goes on, as in pretraining.
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from data import DEMO, adopt_tokenizer, batch, chat_set, conversations, load_tokenizer, mixture, prepare
from data import PrepareConfig, read_conversations, render, task_names
from evals import record, run_tasks, task_figures
from gpt import STAGES, Patience, command, compile_model, find_resume, latest, load_model, load_optimizer, lock_folder, log_metrics
from gpt import override, parent_hash, save_checkpoint, start_machine, trim_metrics
from optim import build
from sample import Engine, Params

# -----------------------------------------------------------------------------


@dataclass
class Config:
    # where things are
    out: str = "out"  # folder of the run
    from_: str = ""  # take tokenizer and earlier stages from another run's folder
    stage: str = "sft"  # sft; mid is what may come before it
    init: str = ""  # the stage to start from; empty is mid where there is one, else base
    fresh: bool = False  # start this stage over; to go on later, leave it out
    # data
    chats: int = 16000  # conversations of the demo world; 0 is none
    data: str = ""  # conversations of your own: .jsonl files or folders of them, with commas between
    mix: str = ""  # folder of downloaded conversations, mixed by the shares of MIXTURE in data.py
    mix_count: int = 100000  # conversations of that mixture
    text: float = 0.5  # mid: share of the rows that are the text which the base was trained on
    # optimisation
    steps: int = 240  # updates; suits the demo, and the first lines printed say how many epochs it is
    batch_rows: int = 16  # rows of an update, over all ranks
    micro_rows: int = 16  # rows of a forward pass; smaller needs less memory and computes the same
    lr_matrix: float = 0.01  # Muon, matrices
    lr_embed: float = 0.05  # AdamW, embeddings
    lr_unembed: float = 0.002  # AdamW, output layer
    weight_decay: float = 0.0  # of matrices
    warmdown: float = 1.0  # share of steps in which the rates fall to 0
    seed: int = 1  # of the conversations and their order
    # on the way
    log_every: int = 10  # steps between lines
    tasks: str = DEMO  # what is graded on held-out items, with commas between
    files: str = ""  # folder of the public tasks' own files, such as gsm8k_test.jsonl
    eval_every: int = 60  # steps between evaluations
    eval_count: int = 100  # items a task on the way
    final_count: int = 500  # items a task at the end
    sample_every: int = 60  # steps between samples
    save_every: int = 60  # steps between checkpoints
    keep: int = 2  # newest checkpoints that are kept
    prompts: str = "Who are you?|What is the capital of Poland?|How many letters \"m\" are in \"committee\"?"  # to answer in samples
    stop_after: int = 0  # end this call after so many steps; the same command goes on later
    # machine
    device: str = "auto"  # cuda, cpu
    dtype: str = "auto"  # bfloat16, float32
    threads: int = 0  # CPU threads; 0 shares all cores between the ranks
    compile: bool = False  # torch.compile the training forward
    deterministic: bool = False  # the same bits on CUDA too, slower


def lr_scale(step, cfg):
    """Full rate, then linear to zero over the last `warmdown` of the steps; `step` counts updates from 0."""
    return min(1, (cfg.steps - step) / max(1, round(cfg.warmdown * cfg.steps)))


def main(argv):
    cfg = override(Config(), argv, __doc__)
    names, chats = task_names(cfg.tasks), read_conversations(cfg.data) if cfg.data else []
    if cfg.mix:
        chats += mixture(cfg.mix, cfg.mix_count, cfg.seed)
    if cfg.chats + len(chats) == 0:
        raise SystemExit("there is nothing to learn from: name conversations with --data=FILE.jsonl, or leave --chats as it is")
    if cfg.stage not in ("sft", "mid") or not 0 <= cfg.text < 1:
        raise SystemExit(f"--stage is sft or mid, and --text a share from 0 to below 1; got {cfg.stage!r} and {cfg.text}")
    machine = start_machine(cfg.device, cfg.dtype, cfg.threads, cfg.deterministic)
    lock_folder(cfg.out, machine)
    folder, between = f"{cfg.out}/{cfg.stage}", [home for home in (cfg.out, cfg.from_) if home and latest(f"{home}/mid")]
    cfg.init = cfg.init or ("mid" if between and cfg.stage == "sft" else "base")
    here = cfg.init != cfg.stage and latest(f"{cfg.out}/{cfg.init}")  # a stage of this run's own comes first
    home = cfg.out if here or not cfg.from_ else cfg.from_
    adopt_tokenizer(cfg, machine)
    tokenizer, hash = load_tokenizer(cfg.out)

    parent = parent_hash(f"{home}/{cfg.init}")
    found = find_resume(folder, cfg, machine, parent)
    model, state = load_model(found or f"{home}/{cfg.init}", machine, hash)
    T = model.cfg.seq_len
    rates = (cfg.lr_matrix, cfg.lr_embed, cfg.lr_unembed, cfg.weight_decay)
    optimizer = build(model, *rates, rank=machine.rank, world=machine.world)
    start = state["step"] if found else 0
    if found and start >= cfg.steps:
        return machine.print(f"{found} is complete")
    if found:
        load_optimizer(found, optimizer)
    trim_metrics(cfg.out, cfg.stage, start, machine)
    run = compile_model(model, machine) if cfg.compile else model
    chats += conversations(cfg.seed, cfg.chats)
    train = chat_set(chats, tokenizer, T, everything=cfg.stage == "mid")
    sources = [(train, cfg.batch_rows)]  # and rows of a step
    if cfg.stage == "mid" and (texts := round(cfg.text * cfg.batch_rows)):
        read = json.loads((latest(f"{home}/{cfg.init}") / "state.json").read_text())["config"]
        if "vocab_size" not in read:
            raise SystemExit(f"{home}/{cfg.init} was not trained on text: name a base model with --init, or set --text=0")
        of_base = prepare(SimpleNamespace(**vars(PrepareConfig()) | read | {"out": home}), machine)[2]
        sources = [(of_base, texts), (train, cfg.batch_rows - texts)]
    rows = train.rows(T, cfg.seed)
    name = STAGES[cfg.stage].lower()
    machine.print(f"{name}: {len(chats):,} conversations in {rows:,} rows of {T} tokens, {machine.describe()}")
    epochs = cfg.steps * sources[-1][1] / rows
    mixed = f", {sources[0][1]} of them text" * (len(sources) - 1)
    begun = f"going on from step {start}" if found else f"from {home}/{cfg.init}"
    machine.print(f"  {cfg.steps} steps of {cfg.batch_rows} rows{mixed} ({epochs:.1f} epochs), {begun}")

    clock, seconds = time.time() - (state["seconds"] if found else 0), []
    patience = Patience()
    for step in range(start, cfg.steps + 1):
        last = step == cfg.steps
        if last or step % cfg.eval_every == 0:
            results = run_tasks(model, tokenizer, machine, names, cfg.final_count if last else cfg.eval_count, cfg.files)
            figures = task_figures(results)
            machine.print(f"step {step:5}  held-out: " + "  ".join(f"{name} {r[0]:.1%}" for name, r in results.items()))
            log_metrics(cfg.out, machine, stage=cfg.stage, step=step, seconds=time.time() - clock, **figures)
        if machine.first and (last or step % cfg.sample_every == 0):
            show_samples(model, tokenizer, cfg)
        if last:
            record(cfg.out, machine, cfg.stage, figures, time.time() - clock, {name: r[2] for name, r in results.items()})
        if step > start and (last or step % cfg.save_every == 0 or step == start + cfg.stop_after):
            state = {"stage": cfg.stage, "config": dataclasses.asdict(cfg), "tokenizer": hash, "seconds": time.time() - clock, "parent": parent}
            save_checkpoint(folder, step, model, optimizer, machine, state, cfg.keep)
        if last or (cfg.stop_after and step == start + cfg.stop_after):
            break

        # ---------------- training ----------------
        t0 = time.time()
        shares = [batch(source, count, T, cfg.seed, step, machine.rank, machine.world) for source, count in sources]
        ids, targets = map(torch.cat, zip(*shares))
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
            pace = sorted(seconds[-20:])[len(seconds[-20:]) // 2]
            speed, left = cfg.batch_rows * T / pace, pace * (cfg.steps - step - 1)
            rate = f"rate x{lr_scale(step, cfg):.2f}  {speed:,.0f} tokens/s"
            machine.print(f"step {step:5}/{cfg.steps}  loss {loss:.4f}  {rate}  {left / 60:.1f} min left")
            log_metrics(cfg.out, machine, stage=cfg.stage, step=step, seconds=time.time() - clock, loss=loss, norm=norm, tokens_per_second=speed)


def show_samples(model, tokenizer, cfg):
    """Answer the prompts, special tokens included, so that a person sees what the model really says."""
    questions = cfg.prompts.split("|")
    prompts = [render([{"role": "user", "content": q}], tokenizer, reply=True)[0] for q in questions]
    for question, request in zip(questions, Engine(model, tokenizer, len(prompts)).generate(prompts, Params(max_tokens=60))):
        print(f"   | {question} -> {tokenizer.decode(request.ids)}")


if __name__ == "__main__":
    command(main)
