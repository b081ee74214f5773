"""
Alignment: from a model that imitates to one that is right more often, or that answers the way people like.

    python rl.py                                    # the fine-tuned model in out/, arithmetic in words
    python rl.py --task=counting --out=other --from=out
    python rl.py --task=gsm8k --files=DIR --max_tokens=200
    python rl.py --method=dpo --out=liked --from=out --init=rl --task=polite --nll=1 --lr_matrix=0.0015 --lr_embed=0.001 --pairs=16
    python rl.py --method=dpo --out=liked --from=out --data=FILE.jsonl    # your pairs, HH-RLHF's or UltraFeedback's
    torchrun --nproc_per_node=8 rl.py

Writes out/rl/step_NNNNNN. Two methods share the loop, the rows, the mask and the scoring; each has a loss of its own.

--method=policy learns from grades. Each step takes fresh problems, has the model answer each of them several times at
temperature 1, all at once, grades the answers, and makes those that beat their group's mean likelier, the others less:

    loss = - sum over sampled tokens of  (reward - mean reward of the problem's group) * log p(token)
           / number of sampled tokens of the step, over all ranks

This is REINFORCE (Williams 1992) with the group mean as its baseline, the part of GRPO (Shao et al. 2024, arXiv
2402.03300) that does the work here. From PPO (Schulman et al. 2017, arXiv 1707.06347) and GRPO there are, when asked for:
    importance ratio and clipping          --updates=2 or more: from the second on, the answers are not the model's own any more.
                                           With one update the ratio is always one, and is not computed
    KL to the model that it started from   --kl=0.02, by GRPO's estimate r - log r - 1, r = p_start / p of each sampled token.
                                           Short runs from a good start, graded by exact answers, do without
Left out, and why:
    a value network                        the group's mean is the baseline; a critic is a second model to train
    dividing by the group's deviation      it weighs too easy and too hard problems most (Liu et al. 2025, arXiv 2503.20783)
    the mean of each answer's own mean     a token of a long answer would count less than one of a short (the same paper)
    top-k, top-p and other temperatures    the distribution sampled from must be the one whose gradient is taken
Tokens that the calculator wrote are read but not learnt; the token that ends the answer is.

--method=dpo learns from pairs of answers, of which one is liked better (Rafailov et al. 2023, arXiv 2305.18290):

    loss = - log sigmoid(beta * (gain of the chosen - gain of the rejected)) / number of pairs of the step, over all ranks
    gain = log p(answer) - log p(answer) under the model that this stage started from, the answer's implicit reward over beta

The starting model's share of it is computed once, before the first step, and kept in out/rl/reference_*.json. A line of pairs is
{"prompt": "...", "chosen": "...", "rejected": "..."}, or has `messages` in place of `prompt`. Nothing is sampled in training.
Only the difference counts, so that pairs are soon ranked right while what the model says has not changed, or has become
nonsense: --nll=1 adds the chosen answers' mean loss a token (Pang et al. 2024, arXiv 2404.19733). Left out: a model of rewards
(the pairs themselves are the supervision), and the length's share in the margin (long answers weigh more, as in the paper).
"""

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import DEMO, TASKS, adopt_tokenizer, load_tokenizer, parse, preferences, question, read_pairs, render, split_pairs
from data import task_names, visible
from evals import record, run_tasks, task_figures
from gpt import Patience, command, find_resume, latest, load_model, load_optimizer, lock_folder, log_metrics
from gpt import override, parent_hash, save_checkpoint, start_machine, trim_metrics, write_whole
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
    method: str = "policy"  # policy: graded answers; dpo: pairs of answers
    task: str = "arithmetic"  # whose problems and grader, from TASKS in data.py; dpo: graded on the way, no more
    files: str = ""  # folder of the public tasks' own files, such as gsm8k_train.jsonl
    data: str = ""  # dpo: pairs of your own, .jsonl files or folders of them, with commas between; empty is the demo's
    val_data: str = ""  # dpo: held-out pairs; empty keeps one prompt in twenty of `data`
    # optimisation
    steps: int = 120  # steps, each with answers or pairs of its own
    updates: int = 1  # updates from the same answers; several need the ratio and its clipping
    problems: int = 16  # policy: problems a step, over all ranks
    samples: int = 8  # policy: answers a problem
    max_tokens: int = 48  # policy: longest answer while learning; held-out ones may be as long as the task says
    clip: float = 0.2  # policy, several updates: how far from one the ratio may pull
    kl: float = 0.0  # policy: weight of the KL to the model that it started from; 0 computes none
    pairs: int = 32  # dpo: pairs a step, over all ranks
    beta: float = 0.1  # dpo: how dear it is to leave the model that it started from
    nll: float = 0.0  # dpo: weight of the chosen answers' own loss, nats a token; 0 computes none
    micro_rows: int = 32  # rows of a forward pass; smaller needs less memory and computes the same
    lr_matrix: float = 0.003  # Muon, matrices
    lr_embed: float = 0.002  # AdamW, embeddings
    lr_unembed: float = 0.0002  # AdamW, output layer
    seed: int = 1  # of problems and sampling, or of the pairs' order
    # on the way
    log_every: int = 5  # steps between lines
    tasks: str = DEMO  # what is graded at the end beside the task, with commas between
    eval_every: int = 30  # steps between evaluations
    eval_count: int = 200  # items a task, or pairs, on the way
    final_count: int = 500  # items a task, or pairs, at the end
    sample_every: int = 30  # steps between printed answers
    save_every: int = 30  # steps between checkpoints
    keep: int = 2  # newest checkpoints that are kept
    stop_after: int = 0  # end this call after so many steps; the same command goes on later
    # machine
    device: str = "auto"  # cuda, cpu
    dtype: str = "auto"  # bfloat16, float32
    threads: int = 0  # CPU threads; 0 shares all cores between the ranks
    deterministic: bool = False  # the same bits on CUDA too, slower


@dataclass
class Answer:
    """What both methods learn from. Lists run over the answer's tokens, its end included."""

    prompt: list
    ids: list
    learnt: list  # False where the calculator wrote the token
    reward: float = 0.0
    advantage: float = 0.0  # the reward less its group's mean
    logprobs: list = None  # of each token when it was sampled
    reference: object = None  # under the model that this stage started from: a list for --kl, the sum in dpo


def lr_scale(step, cfg):
    """Linear from one to zero; `step` counts steps from 0."""
    return 1 - step / cfg.steps


# -----------------------------------------------------------------------------
# What both methods share: rows and their scores


def rows_of(answers, device):
    """Answers as a padded batch: ids and targets (B, T), -1 where the model is not to learn."""
    width = max(len(a.prompt) + len(a.ids) for a in answers) - 1
    ids = torch.zeros(len(answers), width, dtype=torch.long)
    targets = torch.full((len(answers), width), -1)
    for b, answer in enumerate(answers):
        tokens = torch.tensor(answer.prompt + answer.ids)
        learnt = torch.tensor([False] * (len(answer.prompt) - 1) + answer.learnt)
        ids[b, : len(tokens) - 1] = tokens[:-1]
        targets[b, : len(tokens) - 1] = torch.where(learnt, tokens[1:], -1)
    return ids.to(device), targets.to(device)


def at_tokens(answers, name, like):
    """A list of each answer as (B, T): every number where the batch predicts its token, zero elsewhere."""
    values = torch.zeros(like.shape)
    for b, answer in enumerate(answers):
        start = len(answer.prompt) - 1
        values[b, start : start + len(answer.ids)] = torch.tensor(getattr(answer, name))
    return values.to(like.device)


def batches(units, micro_rows):
    """Lists of answers for a forward pass each; the answers of a unit stay together, and rows of one length waste no padding."""
    units = sorted(units, key=lambda unit: max(len(a.prompt) + len(a.ids) for a in unit))
    size = max(1, micro_rows // len(units[0])) if units else 1
    for i in range(0, len(units), size):
        yield [answer for unit in units[i : i + size] for answer in unit]


@torch.no_grad()
def score(model, answers, cfg, device):
    """The log-probability of each answer's tokens, zero where the calculator wrote them: a list for each answer."""
    scores = {}
    for rows in batches([[a] for a in answers], cfg.micro_rows):
        ids, targets = rows_of(rows, device)
        for answer, line in zip(rows, model(ids, targets).neg().tolist()):
            scores[id(answer)] = line[len(answer.prompt) - 1 :][: len(answer.ids)]
    return [scores[id(a)] for a in answers]


# -----------------------------------------------------------------------------
# The two losses, summed over a batch, with sums of what is to be logged


def policy_loss(nats, targets, answers, cfg):
    """nats (B, T), minus the log-probability of each sampled token -> the loss times the number of tokens."""
    advantages = torch.tensor([a.advantage for a in answers], device=nats.device)[:, None]
    loss, figures = advantages * nats, {}
    if cfg.updates > 1:
        ratio = (-nats - at_tokens(answers, "logprobs", nats)).exp()  # p now over p when it was sampled
        near = ratio.clamp(1 - cfg.clip, 1 + cfg.clip)
        loss = -torch.minimum(ratio * advantages, near * advantages)
        figures["clipped"] = ((ratio != near) & (targets >= 0)).sum()
    if cfg.kl:
        gap = at_tokens(answers, "reference", nats) + nats  # log of p_start over p
        kl = gap.exp() - gap - 1
        loss = loss + cfg.kl * kl
        figures["kl"] = (kl * (targets >= 0)).sum()
    return (loss * (targets >= 0)).sum(), figures


def dpo_loss(nats, targets, answers, cfg):
    """nats (B, T) as above, of a chosen answer in each even row and the rejected one below -> the loss times the number of pairs."""
    logprob = -nats.sum(1)  # (B,), of whole answers
    gain = logprob - torch.tensor([a.reference for a in answers], device=nats.device)
    margin = cfg.beta * (gain[0::2] - gain[1::2])  # of the implicit rewards
    loss = -F.logsigmoid(margin).sum()
    if cfg.nll:
        loss = loss - cfg.nll * (logprob / (targets >= 0).sum(1))[0::2].sum()
    figures = {"loss": loss, "margin": margin.sum(), "ranked_right": (margin > 0).sum()}
    return loss, figures | {"chosen_logprob": logprob[0::2].sum(), "rejected_logprob": logprob[1::2].sum()}


# -----------------------------------------------------------------------------
# Where answers come from: sampled and graded, or read


def rollouts(engine, task, cfg, step, machine):
    """This rank's share of a step's problems and the requests that answered them, group by group, all in the engine at once.

    Problems and seeds depend on the step and the problem's number alone, never on the ranks.
    """
    items = task.items("train", f"rl {cfg.seed} {step}", cfg.problems, cfg.files)
    mine = range(len(items) * machine.rank // machine.world, len(items) * (machine.rank + 1) // machine.world)
    prompts, params = [], []
    for i in mine:
        prompts += [question(items[i], engine.tokenizer, engine.cache.length, cfg.max_tokens)] * cfg.samples
        seeds = (((cfg.seed * 10**6 + step) * 10**4 + i) * 10**3 + s for s in range(cfg.samples))
        params += [Params(cfg.max_tokens, temperature=1.0, seed=seed) for seed in seeds]
    return [items[i] for i in mine], engine.generate(prompts, params)


def graded(task, items, requests, cfg, tokenizer):
    """Answers with their advantages, and the first one to each of three problems to look at: [question, text, reward]."""
    texts = [visible(parse(r.ids, tokenizer)) for r in requests]
    rewards = [task.grade(items[n // cfg.samples], text) for n, text in enumerate(texts)]
    answers = []
    for n, r in enumerate(requests):
        group = rewards[n - n % cfg.samples :][: cfg.samples]
        answers.append(Answer(r.prompt, r.ids, r.sampled, rewards[n], rewards[n] - sum(group) / len(group), r.logprobs))
    first = range(0, len(texts), cfg.samples)[:3]
    return answers, [[items[n // cfg.samples]["messages"][-1]["content"], texts[n], rewards[n]] for n in first]


def pair_of_answers(pair, tokenizer, T):
    """The chosen and the rejected answer to one prompt, whose beginning is lost where a row of T has no room for it."""
    whole = [render([*pair["messages"], {"role": "assistant", "content": pair[k]}], tokenizer) for k in ("chosen", "rejected")]
    start = len(render(pair["messages"], tokenizer, reply=True)[0])
    prompt = question(pair, tokenizer, T + 1, max(len(ids) for ids, _ in whole) - start)
    end = start + T + 1 - len(prompt)
    return [Answer(prompt, ids[start:end], mask[start:end]) for ids, mask in whole]


def load_pairs(cfg, tokenizer, T):
    """The pairs of all steps, one after the other, and the held-out ones, as [chosen, rejected]. Each epoch has its own order."""
    count = cfg.steps * cfg.pairs
    if cfg.data:
        train, held = split_pairs(read_pairs(cfg.data))
        if cfg.val_data:
            train, held = train + held, read_pairs(cfg.val_data)
        if not train or not held:
            raise SystemExit(f"{cfg.data} has too few prompts to hold one in twenty out; name held-out pairs with --val_data=FILE.jsonl")
    else:
        train, held = preferences(cfg.seed, count), preferences(cfg.seed, cfg.final_count, "test")
    epochs = range(-(-count // len(train)))
    order = np.concatenate([np.random.default_rng([cfg.seed, e]).permutation(len(train)) for e in epochs])[:count].tolist()
    rows = {i: pair_of_answers(train[i], tokenizer, T) for i in dict.fromkeys(order)}
    return [rows[i] for i in order], [pair_of_answers(p, tokenizer, T) for p in held[: max(cfg.final_count, cfg.eval_count)]]


def add_references(pairs, model_at_start, cfg, key, path, machine):
    """Give both answers of every pair their log-probability under the model that this stage started from.

    Computed once, the ranks sharing the work, and kept at `path` together with a name of what it was computed from.
    """
    answers = list({id(a): a for pair in pairs for a in pair}.values())  # a later epoch has the same ones again
    key = hashlib.sha256(json.dumps([key, str(machine.dtype), [(a.prompt, a.ids) for a in answers]]).encode()).hexdigest()
    cached = machine.gather(json.loads(path.read_text()) if machine.first and path.exists() else {})[0]
    if cached.get("key") != key:
        mine = [sum(s) for s in score(model_at_start(), answers[machine.rank :: machine.world], cfg, machine.device)]
        shares = machine.gather(mine)
        cached = {"key": key, "logprobs": [shares[i % machine.world][i // machine.world] for i in range(len(answers))]}
        if machine.first:
            write_whole(path, json.dumps(cached))
    for answer, logprob in zip(answers, cached["logprobs"]):
        answer.reference = logprob


@torch.no_grad()
def rank_pairs(model, pairs, cfg, machine):
    """How the model ranks held-out pairs, as figures for the report."""
    totals = {}
    for rows in batches(pairs[machine.rank :: machine.world], cfg.micro_rows):
        ids, targets = rows_of(rows, machine.device)
        add(totals, dpo_loss(model(ids, targets), targets, rows, cfg)[1])
    means = mean(totals, len(pairs), machine)
    return {"accuracy/pairs": means["ranked_right"], "n/pairs": len(pairs), "held_out_margin": means["margin"]}


def add(totals, figures):
    for name, value in figures.items():
        totals[name] = totals.get(name, 0) + value.detach()


def mean(totals, count, machine):
    """Totals over all ranks and over `count`; a rank without a share of the work has no names either."""
    shares = machine.gather({name: float(value) for name, value in totals.items()})
    return {name: sum(share.get(name, 0) for share in shares) / count for name in sorted({n for share in shares for n in share})}


# -----------------------------------------------------------------------------


def main(argv):
    cfg = override(Config(), argv, __doc__)
    if cfg.method not in ("policy", "dpo"):
        raise SystemExit(f"--method={cfg.method} is not known: policy learns from graded answers, dpo from pairs")
    dpo = cfg.method == "dpo"
    if cfg.updates < 1 or (dpo and cfg.kl) or (not dpo and (cfg.data or cfg.val_data)):
        raise SystemExit("--updates is 1 or more; --kl belongs to --method=policy, --data and --val_data to --method=dpo")
    task, names = TASKS[task_names(cfg.task)[0]], sorted({*task_names(cfg.task), *task_names(cfg.tasks)})
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

    def model_at_start():
        return load_model(f"{home}/{cfg.init}", machine, hash)[0]

    if dpo:
        train, held = load_pairs(cfg, tokenizer, model.cfg.seq_len)
        for name, pairs in (("train", train), ("held", held)):
            add_references(pairs, model_at_start, cfg, parent, Path(folder) / f"reference_{name}.json", machine)
        distinct = len({id(pair) for pair in train})
        machine.print(f"preferences: {cfg.pairs} pairs a step of {distinct:,}, {len(held)} held out, {machine.describe()}")
    else:
        engine = Engine(model, tokenizer, slots=min(256, cfg.problems * cfg.samples))
        reference = model_at_start() if cfg.kl else None
        sizes = f"{cfg.problems} problems x {cfg.samples} answers a step"
        machine.print(f"reinforcement learning on {cfg.task}: {sizes}, {machine.describe()}")
    machine.print(f"  {cfg.steps} steps, " + (f"going on from step {start}" if found else f"from {home}/{cfg.init}"))

    clock, seconds = time.time() - (state["seconds"] if found else 0), []
    patience = Patience()
    for step in range(start, cfg.steps + 1):
        last = step == cfg.steps
        if last or step % cfg.eval_every == 0:
            count = cfg.final_count if last else cfg.eval_count
            results = run_tasks(model, tokenizer, machine, names if last else [cfg.task], count, cfg.files)
            figures = task_figures(results) | (rank_pairs(model, held[:count], cfg, machine) if dpo else {})
            shares = {name.removeprefix("accuracy/"): v for name, v in figures.items() if name.startswith("accuracy/")}
            machine.print(f"step {step:5}  held-out: " + "  ".join(f"{name} {share:.1%}" for name, share in shares.items()))
            log_metrics(cfg.out, machine, stage="rl", step=step, seconds=time.time() - clock, **figures)
        if last:
            record(cfg.out, machine, "rl", figures, time.time() - clock, {name: r[2] for name, r in results.items()})
        if step > start and (last or step % cfg.save_every == 0 or step == start + cfg.stop_after):
            state = {"stage": "rl", "config": dataclasses.asdict(cfg), "tokenizer": hash, "seconds": time.time() - clock, "parent": parent}
            save_checkpoint(folder, step, model, optimizer, machine, state, cfg.keep)
        if last or (cfg.stop_after and step == start + cfg.stop_after):
            break

        # ---------------- training ----------------
        times = [time.time()]
        if dpo:
            first, end = (step * cfg.pairs + cfg.pairs * r // machine.world for r in (machine.rank, machine.rank + 1))
            units, count, loss_of = train[first:end], cfg.pairs, dpo_loss
        else:
            items, requests = rollouts(engine, task, cfg, step, machine)
            times.append(time.time())
            answers, shown = graded(task, items, requests, cfg, tokenizer)
            if cfg.kl:
                for answer, logprobs in zip(answers, score(reference, answers, cfg, machine.device)):
                    answer.reference = logprobs
            units = [[a] for a in answers if a.advantage or cfg.kl]  # an advantage of zero has no gradient
            count, loss_of = machine.sum(sum(sum(a.learnt) for a in answers)), policy_loss
            times.append(time.time())
        totals = {}
        for _ in range(cfg.updates):
            for rows in optimizer.passes(batches(units, cfg.micro_rows)):
                ids, targets = rows_of(rows, machine.device)
                loss, figures = loss_of(model(ids, targets), targets, rows, cfg)
                (loss / count).backward()
                add(totals, figures)
            norm = optimizer.step(lr_scale(step, cfg))
            patience.see(norm, step, machine)
        # ------------------------------------------

        machine.sync()
        times.append(time.time())
        seconds.append(times[-1] - times[0])
        figures = mean(totals, max(1, count * cfg.updates), machine)
        if dpo:
            now = "loss {loss:.3f}  margin {margin:.2f}  ranked right {ranked_right:.1%}".format(**figures)
        else:
            everyone = [a for share in machine.gather(answers) for a in share]
            figures |= describe(everyone, tokenizer, cfg) | {"samples": shown}
            figures["tokens_per_second"] = sum(len(a.ids) for a in everyone) / (times[1] - times[0])
            for name, t0, t1 in zip(("rollout_share", "scoring_share", "training_share"), times, times[1:]):
                figures[name] = (t1 - t0) / seconds[-1]
            now = "  ".join(f"{k} {figures[k]:.3f}" for k in ("reward", "pass_at_k", "length", "entropy"))
            now += "  rollouts {rollout_share:.0%}, scoring {scoring_share:.0%}, training {training_share:.0%}".format(**figures)
            if machine.first and step % cfg.sample_every == 0:
                for asked, text, reward in shown:
                    print(f"   {'right' if reward == 1 else 'wrong'} | {asked} -> {text}")
        figures |= {"norm": norm, "skipped": patience.skipped}
        log_metrics(cfg.out, machine, stage="rl", step=step, seconds=time.time() - clock, **figures)
        if step % cfg.log_every == 0 or step == cfg.steps - 1:
            left = sorted(seconds[-20:])[len(seconds[-20:]) // 2] * (cfg.steps - step - 1)
            machine.print(f"step {step:5}/{cfg.steps}  {now}  {seconds[-1]:.1f} s  {left / 60:.1f} min left")


def describe(answers, tokenizer, cfg):
    """Figures of a step's answers, group after group."""
    groups = [[a.reward for a in answers[i : i + cfg.samples]] for i in range(0, len(answers), cfg.samples)]
    chosen = [p for a in answers for p, learnt in zip(a.logprobs, a.learnt) if learnt]
    calls = [p["text"] for a in answers for p in parse(a.ids, tokenizer) if p["type"] == "output"]
    return {
        "reward": sum(a.reward for a in answers) / len(answers),
        "pass_at_k": sum(max(g) == 1 for g in groups) / len(groups),
        "length": sum(len(a.ids) for a in answers) / len(answers),
        "entropy": -sum(chosen) / max(1, len(chosen)),  # the mean surprise of one's own samples estimates it
        # groups whose answers are all equally good teach nothing
        "no_signal": sum(max(g) == min(g) for g in groups) / len(groups),
        # of the calls of the calculator, those that it could compute; 0 where there was none
        "valid_calls": sum(c != "error" for c in calls) / max(1, len(calls)),
    }


if __name__ == "__main__":
    command(main)
