"""
Evaluations: bits per byte, tasks answered by generating, and the report of a run.

    python evals.py                                    # every task on the last stage in out/
    python evals.py --stage=sft --tasks=facts,counting --count=500 --seed=7
    python evals.py --tasks=gsm8k --files=DIR          # a public task, from its own files
    python evals.py --stage=base --text=FILE           # bits per byte of any text
    python evals.py --report                           # only rebuild out/report.json and out/report.html

The stages call `bits_per_byte` and `run_tasks` on their way and write what they find with `record`, which
rebuilds the report: out/report.json for programs, out/report.html for people, one page without outside
requests whose curves are drawn from out/metrics.jsonl.
"""

import html
import json
import math
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import DEMO, SPECIALS, TASKS, TokenSet, batch, encode_documents, load_tokenizer, parse, question, read_documents
from data import task_names, visible
from gpt import command, latest, load_model, override, start_machine, write_whole
from sample import Engine, Params


# -----------------------------------------------------------------------------
# Bits per byte


@torch.inference_mode()
def bits_per_byte(model, tokenizer, val, machine, micro_rows=16, rows=0):
    """Total nats over ln 2 and over the UTF-8 bytes of the predicted tokens; special tokens are left out.

    `val` is a TokenSet kept whole, so with rows=0 every byte of its documents is predicted exactly once;
    rows above 0 takes only so many rows of it. Comparable between tokenizers, unlike the loss. All ranks
    call it and get the same figure.
    """
    T = model.cfg.seq_len
    total = min(rows or 2**62, val.rows(T, 0))
    size = [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size - len(SPECIALS))] + [0] * len(SPECIALS)
    size = torch.tensor(size, device=machine.device)
    ids, targets = batch(val, total, T, 0, 0, machine.rank, machine.world)
    nats, count = 0.0, 0
    for x, y in zip(ids.split(micro_rows), targets.split(micro_rows)):
        x, y = x.to(machine.device), y.to(machine.device)
        length = size[y.clamp(min=0)] * (y >= 0)  # (B, T)
        nats += (model(x, y) * (length > 0)).sum().item()
        count += length.sum().item()
    return machine.sum(nats) / math.log(2) / max(1, machine.sum(count))


# -----------------------------------------------------------------------------
# Generative tasks


def run_tasks(model, tokenizer, machine, names, count, files="", seed=0, split="test", slots=64):
    """Answer `count` items of each task greedily and grade them: {name: (accuracy, items, some answers)}.

    Ranks take every world-th item. All ranks call it and get the same figures.
    """
    engine, results = Engine(model, tokenizer, slots), {}
    for name in names:
        task = TASKS[name]
        items = task.items(split, seed, count, files)
        mine = items[machine.rank :: machine.world]
        prompts = [question(item, tokenizer, engine.cache.length, task.max_tokens) for item in mine]
        done = engine.generate(prompts, Params(max_tokens=task.max_tokens))
        texts = [visible(parse(r.ids, tokenizer)) for r in done]
        grades = [task.grade(item, text) for item, text in zip(mine, texts)]
        shown = [(item["messages"][-1]["content"], text, item["answer"], grade) for item, text, grade in zip(mine, texts, grades)]
        results[name] = machine.sum(sum(grades)) / max(1, len(items)), len(items), shown[:8]
    return results


# -----------------------------------------------------------------------------
# Report


def record(out, machine, stage, figures, seconds, examples=None):
    """Put a stage's figures into out/report.json and rebuild out/report.html. `figures` are numbers by name."""
    if not machine.first:
        return
    path = Path(out) / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {"stages": {}, "seconds": {}, "machine": {}, "examples": {}}
    report["stages"].setdefault(stage, {}).update(figures)
    report["seconds"][stage] = round(seconds, 1)
    report["machine"] = {
        "device": torch.cuda.get_device_name() if machine.device.type == "cuda" else f"{platform.machine()} CPU",
        "ranks": machine.world,
        "threads": machine.threads,
        "cores": os.cpu_count(),
        "dtype": str(machine.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    report["examples"].setdefault(stage, {}).update(examples or {})
    write_whole(path, json.dumps(report, indent=1))
    write_whole(Path(out) / "report.html", page(out, report))


def task_figures(results):
    """{"accuracy/<task>", "n/<task>"} of run_tasks' results."""
    return {f"accuracy/{k}": v[0] for k, v in results.items()} | {f"n/{k}": v[1] for k, v in results.items()}


def read_entries(out):
    """The lines of metrics.jsonl."""
    path, entries = Path(out) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # half a line, of a run that was killed while writing it
    return entries


def read_metrics(out):
    """{(stage, quantity): [(step, value)]} of metrics.jsonl."""
    series = {}
    for entry in read_entries(out):
        for key, value in entry.items():
            if key not in ("stage", "step", "seconds") and isinstance(value, (int, float)):
                series.setdefault((entry["stage"], key), []).append((entry["step"], value))
    return series


def answers_on_the_way(out, stage, steps=40):
    """[(step, question, answer, reward)] that a stage sampled, of about so many of its steps."""
    entries = [entry for entry in read_entries(out) if entry["stage"] == stage and "samples" in entry]
    return [(entry["step"], *sample) for entry in entries[:: max(1, len(entries) // steps)] for sample in entry["samples"]]


def curve(points, width=420, height=170):
    """One line of (step, value) as SVG with its axes' ends labelled."""
    left, right, top, bottom = 52, 12, 10, 22
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))
    sx = (width - left - right) / ((x1 - x0) or 1)
    sy = (height - top - bottom) / ((y1 - y0) or 1)
    path = " ".join(f"{left + (x - x0) * sx:.1f},{height - bottom - (y - y0) * sy:.1f}" for x, y in points)
    number = lambda v: f"{v:,.0f}" if abs(v) >= 100 else f"{v:.3g}"
    return f"""<svg viewBox="0 0 {width} {height}" role="img">
<path class="axis" d="M{left} {top}V{height - bottom}H{width - right}"/>
<text x="{left - 6}" y="{top + 8}" text-anchor="end">{number(y1)}</text>
<text x="{left - 6}" y="{height - bottom}" text-anchor="end">{number(y0)}</text>
<text x="{left}" y="{height - 6}">{x0}</text>
<text x="{width - right}" y="{height - 6}" text-anchor="end">step {x1}</text>
<polyline points="{path}"/></svg>"""


CURVES = {  # what is drawn, of each stage, and in which words
    "loss": "loss (nats a token)",
    "bpb": "validation (bits a byte)",
    "reward": "reward (share of answers right)",
    "pass_at_k": "problems with at least one right answer",
    "length": "answer length (tokens)",
    "entropy": "entropy (nats a token)",
    "no_signal": "groups whose answers are all equally good",
    "valid_calls": "calls of the calculator that it could compute",
    "kl": "distance from the model it started from (nats a token)",
    "margin": "margin between the implicit rewards of a pair",
    "ranked_right": "pairs ranked right",
    "chosen_logprob": "log-probability of the chosen answers",
    "rejected_logprob": "log-probability of the rejected answers",
    "tokens_per_second": "tokens a second",
}
STAGES = {"base": "Pretraining", "sft": "Fine-tuning", "rl": "Reinforcement learning"}


def page(out, report):
    """The report as one self-contained page."""
    e, series, body = html.escape, read_metrics(out), []
    names = sorted({n for f in report["stages"].values() for n in f if not n.startswith("n/")})
    stages = [s for s in STAGES if s in report["stages"]]
    head = "".join(f"<th>{STAGES[s]}</th>" for s in stages)
    rows = [f"<tr><th></th>{head}</tr>"]
    for name in names:
        cells = ""
        for s in stages:
            v, n = report["stages"][s].get(name), report["stages"][s].get(name.replace("accuracy/", "n/"))
            share = name.startswith("accuracy/")
            cells += "<td></td>" if v is None else f"<td>{v:.1%} <small>of {n}</small></td>" if share else f"<td>{v:,.4g}</td>"
        rows.append(f"<tr><th>{e(name)}</th>{cells}</tr>")
    rows.append("<tr><th>minutes</th>" + "".join(f"<td>{report['seconds'].get(s, 0) / 60:.1f}</td>" for s in stages) + "</tr>")
    for s in stages:
        body.append(f"<h2>{STAGES[s]}</h2><div class=curves>")
        tasks = {key: f"{key.split('/')[1]}: share of held-out items right" for t, key in series if t == s and key.startswith("accuracy/")}
        for key, words in (CURVES | tasks).items():
            points = series.get((s, key), [])
            if len(points) > 1:
                body.append(f"<figure>{curve(points)}<figcaption>{e(words)}</figcaption></figure>")
        body.append("</div>")
        seen = answers_on_the_way(out, s)
        if seen:
            lines = "".join("<tr>" + "".join(f"<td>{e(str(c))}</td>" for c in row) + "</tr>" for row in seen)
            header = "<tr><th>step</th><th>question</th><th>answer</th><th>reward</th></tr>"
            body.append(f"<details><summary>sampled answers on the way</summary><table>{header}{lines}</table></details>")
        for task, shown in report["examples"].get(s, {}).items():
            cells = ((e(q), e(a), e(str(wanted)), "right" if grade == 1 else "wrong") for q, a, wanted, grade in shown)
            lines = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in cells)
            header = "<tr><th>question</th><th>answer</th><th>expected</th><th></th></tr>"
            body.append(f"<details><summary>{e(task)}: some answers</summary><table>{header}{lines}</table></details>")
    machine = ", ".join(f"{k} {v}" for k, v in report["machine"].items())
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>onesitting: {e(str(Path(out).resolve().name))}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }}
th, td {{ text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #8884; vertical-align: top; }}
td {{ font-variant-numeric: tabular-nums; }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }}
figure {{ margin: 0; }} figcaption, small, footer {{ color: #888; font-size: .85rem; }}
svg {{ width: 100%; font-size: 11px; }} svg text {{ fill: #888; }}
polyline {{ fill: none; stroke: #2b7de9; stroke-width: 1.6; }} .axis {{ fill: none; stroke: #8886; }}
summary {{ cursor: pointer; margin: .4rem 0; }}
</style>
<h1>onesitting</h1>
<table>{"".join(rows)}</table>
{"".join(body)}
<footer>{e(machine)}; written {time.strftime("%Y-%m-%d %H:%M")}</footer>
</html>"""


# -----------------------------------------------------------------------------
# Command line


@dataclass
class Config:
    out: str = "out"  # folder of the run
    stage: str = ""  # base, sft or rl; empty is the last there is
    tasks: str = DEMO  # names with commas between
    files: str = ""  # folder of the public tasks' own files, such as gsm8k_test.jsonl
    count: int = 500  # items a task
    seed: int = 0  # another seed, other items
    split: str = "test"  # test or train
    slots: int = 64  # answers generated at once
    show: int = 3  # answers printed a task
    text: str = ""  # file or folder: instead of tasks, the bits per byte of this text
    report: bool = False  # only rebuild the report
    device: str = "auto"  # cuda, cpu
    dtype: str = "auto"  # bfloat16, float32
    threads: int = 0  # CPU threads; 0 is all cores


def main(argv):
    cfg = override(Config(), argv, __doc__)
    machine = start_machine(cfg.device, cfg.dtype, cfg.threads)
    if cfg.report:
        path = Path(cfg.out) / "report.json"
        if not path.exists():
            raise SystemExit(f"no {path} yet; `bash run.sh` makes one")
        write_whole(Path(cfg.out) / "report.html", page(cfg.out, json.loads(path.read_text())))
        return
    names = task_names(cfg.tasks)
    stage = cfg.stage or next((s for s in ("rl", "sft", "base") if latest(f"{cfg.out}/{s}")), "base")
    tokenizer, hash = load_tokenizer(cfg.out)
    model, state = load_model(f"{cfg.out}/{stage}", machine, hash)
    if cfg.text:
        bos = tokenizer.special("<|bos|>")
        tokens = np.concatenate(list(encode_documents(tokenizer, read_documents(cfg.text), bos)))
        bpb = bits_per_byte(model, tokenizer, TokenSet([tokens], bos, whole=True), machine)
        return machine.print(f"{cfg.out}/{stage} step {state['step']}: {bpb:.4f} bits per byte on {cfg.text}")
    machine.print(f"{cfg.out}/{stage} step {state['step']}, {cfg.split} items of seed {cfg.seed}")
    results = run_tasks(model.to(machine.dtype), tokenizer, machine, names, cfg.count, cfg.files, cfg.seed, cfg.split, cfg.slots)
    for name, (accuracy, n, shown) in results.items():
        machine.print(f"{name:12} {accuracy:6.1%} of {n}")
        for question, text, answer, grade in shown[: cfg.show]:
            machine.print(f"   {'right' if grade == 1 else 'wrong'} | {question} -> {text!r} (expected {answer})")


if __name__ == "__main__":
    command(main)
