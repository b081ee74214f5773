"""
Reinforcement learning: from a model that imitates to one that is right more often.

    python rl.py                                    # the fine-tuned model in out/, arithmetic in words
    python rl.py --task=counting --out=other --from=out
    python rl.py --task=gsm8k --files=DIR --max_tokens=200
    torchrun --nproc_per_node=8 rl.py

Writes out/rl/step_NNNNNN. Each step takes fresh problems, has the model answer each of them several times
at temperature 1, grades the answers, and makes answers that beat their group's mean likelier, the others less:

    loss = - sum over sampled tokens of  (reward - mean reward of the problem's group) * log p(token)
           / number of sampled tokens of the step, over all ranks

This is REINFORCE (Williams 1992) with the group mean as its baseline, the part of GRPO (Shao et al. 2024, arXiv
2402.03300) that does the work here. Left out, and why:
    importance ratio and clipping (PPO)    one update per batch of answers: the ratio is always one
    KL to a reference model                short runs from a good start, graded by exact answers, do not drift far
    dividing by the group's deviation      it weighs too easy and too hard problems most (Liu et al. 2025, arXiv 2503.20783)
    top-k, top-p and other temperatures    the distribution sampled from must be the one whose gradient is taken
Tokens that the calculator wrote are read but not learnt; the token that ends the answer is.
"""

import dataclasses
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data import DEMO, TASKS, adopt_tokenizer, load_tokenizer, parse, question, task_names, visible
from evals import record, run_tasks, task_figures
from gpt import Patience, command, find_resume, latest, load_model, load_optimizer, lock_folder, log_metrics
from gpt import override, parent_hash, save_checkpoint, start_machine, trim_metrics
from optim import build
from sample import Engine, Params

# -----------------------------------------------------------------------------


@dataclass
class Config:
    # where things are
    out: str = "out"  # folder of the run
    from_: str = ""  # take tokenizer and earlier stages from another run's folder
    init: str = "sft"  # the stage to start from
    fresh: bool = False  # start this stage over; to go on later, leave it out
    # data
    task: str = "arithmetic"  # whose problems and grader, from TASKS in data.py
    files: str = ""  # folder of the public tasks' own files, such as gsm8k_train.jsonl
    # optimisation
    steps: int = 120  # updates
    problems: int = 16  # problems a step, over all ranks
    samples: int = 8  # answers a problem
    max_tokens: int = 48  # longest answer while learning; held-out ones may be as long as the task says
    micro_rows: int = 32  # rows of a forward pass; smaller needs less memory and computes the same
    lr_matrix: float = 0.003  # Muon, matrices
    lr_embed: float = 0.002  # AdamW, embeddings
    lr_unembed: float = 0.0002  # AdamW, output layer
    seed: int = 1  # of problems and sampling
    # on the way
    log_every: int = 5  # steps between lines
    tasks: str = DEMO  # what is graded at the end beside the task, with commas between
    eval_every: int = 30  # steps between evaluations
    eval_count: int = 200  # items a task on the way
    final_count: int = 500  # items a task at the end
    sample_every: int = 30  # steps between printed answers
    save_every: int = 30  # steps between checkpoints
    keep: int = 2  # newest checkpoints that are kept
    stop_after: int = 0  # end this call after so many steps; the same command goes on later
    # machine
    device: str = "auto"  # cuda, cpu
    dtype: str = "auto"  # bfloat16, float32
    threads: int = 0  # CPU threads; 0 shares all cores between the ranks
    deterministic: bool = False  # the same bits on CUDA too, slower


def lr_scale(step, cfg):
    """Linear from one to zero; `step` counts updates from 0."""
    return 1 - step / cfg.steps


def rollouts(engine, task, cfg, step, machine):
    """This rank's share of a step's answers: [(request, reward, advantage)], group by group, and their text.

    Problems and seeds depend on the step and the problem's number alone, never on the ranks.
    """
    tokenizer = engine.tokenizer
    items = task.items("train", f"rl {cfg.seed} {step}", cfg.problems, cfg.files)
    mine = range(len(items) * machine.rank // machine.world, len(items) * (machine.rank + 1) // machine.world)
    prompts, params = [], []
    for i in mine:
        prompts += [question(items[i], tokenizer, engine.cache.length, cfg.max_tokens)] * cfg.samples
        seeds = (((cfg.seed * 10**6 + step) * 10**4 + i) * 10**3 + s for s in range(cfg.samples))
        params += [Params(cfg.max_tokens, temperature=1.0, seed=seed) for seed in seeds]
    requests = engine.generate(prompts, params)
    texts = [visible(parse(r.ids, tokenizer)) for r in requests]
    rewards = [task.grade(items[mine[n // cfg.samples]], text) for n, text in enumerate(texts)]
    answers = []
    for n, request in enumerate(requests):
        group = rewards[n - n % cfg.samples :][: cfg.samples]
        answers.append((request, rewards[n], rewards[n] - sum(group) / len(group)))
    shown = [(items[mine[0]]["messages"][-1]["content"], t, r) for t, r in zip(texts[:3], rewards)] if mine else []
    return answers, shown


def rows_of(answers, device):
    """Answers as a padded batch: ids and targets (B, T), -1 where the model did not choose, advantages (B,)."""
    width = max(len(r.prompt) + len(r.ids) for r, _, _ in answers) - 1
    ids = torch.zeros(len(answers), width, dtype=torch.long)
    targets = torch.full((len(answers), width), -1)
    for b, (request, _, _) in enumerate(answers):
        tokens = torch.tensor(request.prompt + request.ids)
        learnt = torch.tensor([False] * (len(request.prompt) - 1) + request.sampled)
        ids[b, : len(tokens) - 1] = tokens[:-1]
        targets[b, : len(tokens) - 1] = torch.where(learnt, tokens[1:], -1)
    advantages = torch.tensor([a for _, _, a in answers])
    return ids.to(device), targets.to(device), advantages.to(device)


def main(argv):
    cfg = override(Config(), argv, __doc__)
    task, graded = TASKS[task_names(cfg.task)[0]], sorted({*task_names(cfg.task), *task_names(cfg.tasks)})
    machine = start_machine(cfg.device, cfg.dtype, cfg.threads, cfg.deterministic)
    lock_folder(cfg.out, machine)
    folder = f"{cfg.out}/rl"
    here = cfg.init != "rl" and latest(f"{cfg.out}/{cfg.init}")  # a stage of this run's own comes first
    home = cfg.out if here or not cfg.from_ else cfg.from_
    adopt_tokenizer(cfg, machine)
    tokenizer, hash = load_tokenizer(cfg.out)

    parent = parent_hash(f"{home}/{cfg.init}")
    found = find_resume(folder, cfg, machine, parent)
    model, state = load_model(found or f"{home}/{cfg.init}", machine, hash)
    optimizer = build(model, cfg.lr_matrix, cfg.lr_embed, cfg.lr_unembed, rank=machine.rank, world=machine.world)
    start = state["step"] if found else 0
    if found and start >= cfg.steps:
        return machine.print(f"{found} is complete")
    if found:
        load_optimizer(found, optimizer)
    trim_metrics(cfg.out, "rl", start, machine)
    engine = Engine(model, tokenizer, slots=min(256, cfg.problems * cfg.samples))
    machine.print(f"reinforcement learning on {cfg.task}: {cfg.problems} problems x {cfg.samples} answers a step, {machine.describe()}")
    machine.print(f"  {cfg.steps} steps, " + (f"going on from step {start}" if found else f"from {home}/{cfg.init}"))

    clock, seconds = time.time() - (state["seconds"] if found else 0), []
    patience = Patience()
    for step in range(start, cfg.steps + 1):
        last = step == cfg.steps
        if last or step % cfg.eval_every == 0:
            names = graded if last else [cfg.task]
            results = run_tasks(model, tokenizer, machine, names, cfg.final_count if last else cfg.eval_count, cfg.files)
            figures = task_figures(results)
            machine.print(f"step {step:5}  held-out: " + "  ".join(f"{name} {r[0]:.1%}" for name, r in results.items()))
            log_metrics(cfg.out, machine, stage="rl", step=step, seconds=time.time() - clock, **figures)
        if last:
            record(cfg.out, machine, "rl", figures, time.time() - clock, {name: r[2] for name, r in results.items()})
        if step > start and (last or step % cfg.save_every == 0 or step == start + cfg.stop_after):
            state = {"stage": "rl", "config": dataclasses.asdict(cfg), "tokenizer": hash, "seconds": time.time() - clock, "parent": parent}
            save_checkpoint(folder, step, model, optimizer, machine, state, cfg.keep)
        if last or (cfg.stop_after and step == start + cfg.stop_after):
            break

        # ---------------- training ----------------
        t0 = time.time()
        answers, shown = rollouts(engine, task, cfg, step, machine)
        t1 = time.time()
        count = machine.sum(sum(sum(r.sampled) for r, _, _ in answers))
        telling = [a for a in answers if a[2]]  # an advantage of zero has no gradient
        telling.sort(key=lambda a: len(a[0].prompt) + len(a[0].ids))  # rows of one length waste no padding
        for i in range(0, len(telling), cfg.micro_rows):
            ids, targets, advantages = rows_of(telling[i : i + cfg.micro_rows], machine.device)
            nats = model(ids, targets)  # (B, T), minus the log-probability of each sampled token
            ((advantages[:, None] * nats).sum() / count).backward()
        norm = optimizer.step(lr_scale(step, cfg))
        # ------------------------------------------

        patience.see(norm, step, machine)
        machine.sync()
        seconds.append(time.time() - t0)
        if machine.first and step % cfg.sample_every == 0:
            for question, text, reward in shown:
                print(f"   {'right' if reward == 1 else 'wrong'} | {question} -> {text}")
        mine = [(r.ids, r.sampled, r.logprobs, reward) for r, reward, _ in answers]
        everyone = [answer for share in machine.gather(mine) for answer in share]
        if machine.first and (step % cfg.log_every == 0 or step == cfg.steps - 1):
            figures = describe(everyone, tokenizer, cfg)
            pace = sorted(seconds[-20:])[len(seconds[-20:]) // 2]
            left = pace * (cfg.steps - step - 1)
            figures["norm"], figures["skipped"] = norm, patience.skipped
            figures["rollout_share"] = (t1 - t0) / seconds[-1]
            figures["tokens_per_second"] = sum(len(a[0]) for a in everyone) / (t1 - t0)
            now = "  ".join(f"{k} {figures[k]:.3f}" for k in ("reward", "pass_at_k", "length", "entropy"))
            spent = f"{seconds[-1]:.1f} s, {figures['rollout_share']:.0%} rollouts"
            machine.print(f"step {step:5}/{cfg.steps}  {now}  {spent}  {left / 60:.1f} min left")
            log_metrics(cfg.out, machine, stage="rl", step=step, seconds=time.time() - clock, **figures)
    if machine.world > 1:
        dist.destroy_process_group()


def describe(answers, tokenizer, cfg):
    """Figures of a step's answers, each (ids, sampled, logprobs, reward), group after group."""
    rewards = [a[3] for a in answers]
    groups = [rewards[i : i + cfg.samples] for i in range(0, len(rewards), cfg.samples)]
    chosen = [p for a in answers for p, sampled in zip(a[2], a[1]) if sampled]
    calls = [p["text"] for a in answers for p in parse(a[0], tokenizer) if p["type"] == "output"]
    return {
        "reward": sum(rewards) / len(rewards),
        "pass_at_k": sum(max(g) == 1 for g in groups) / len(groups),
        "length": sum(len(a[0]) for a in answers) / len(answers),
        "entropy": -sum(chosen) / max(1, len(chosen)),  # the mean surprise of one's own samples estimates it
        # groups whose answers are all equally good teach nothing
        "no_signal": sum(max(g) == min(g) for g in groups) / len(groups),
        # of the calls of the calculator, those that it could compute; 0 where there was none
        "valid_calls": sum(c != "error" for c in calls) / max(1, len(calls)),
    }


if __name__ == "__main__":
    command(main)
