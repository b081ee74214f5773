"""
Muon for matrices, AdamW for everything else, in one optimizer that shares its work between ranks.

    optimizer = build(model, lr_matrix=0.02, lr_embed=0.3, lr_unembed=0.004, weight_decay=0.0)
    loss.backward()              # gradients are SUMS over a rank's tokens, already divided by the global count
    norm = optimizer.step(lr_scale)   # sums them over ranks, updates, and leaves every rank with the same weights

What each does to a gradient g, side by side (functions `adamw` and `muon` below):

    AdamW   divides each number by its own running size:  m / sqrt(v). Every weight moves by about lr,
            whatever the scale of its gradient. Right for tables of vectors (a row sees few gradients).
            Memory: 4 bytes a parameter for the weight, 4 for the gradient, 8 for m and v.
            Kingma & Ba 2014, arXiv 1412.6980; Loshchilov & Hutter 2017, arXiv 1711.05101
    Muon    replaces the running mean of a matrix by the nearest orthogonal matrix: all its singular values
            become one. Every *direction* moves by about lr, the rare ones too.
            Memory: 4 for the weight, 4 for the gradient, 4 for the running mean.
            Jordan et al. 2024, kellerjordan.github.io/posts/muon

Both turn a gradient into a direction of the same shape, and both work on independent rows: a number for
AdamW, a matrix for Muon. So one scheme shares out both (ZeRO-1; Rajbhandari et al. 2019, arXiv 1910.02054):
the rows of a parameter (or of a stack of matrices of one shape) are padded to a multiple of the world size;
a reduce-scatter gives each rank the summed gradient of its own rows, it keeps the state of those rows alone
(the 8 and 4 bytes above are divided by the world size) and computes their directions, and an all-gather
hands everyone all directions. Parameters need not divide evenly, and the result is that of one process.
While a step runs, the stacked gradients, which then turn into directions, take another 4 bytes a parameter.

Left out: learning-rate schedules (they stay with the stage, which passes `lr_scale`), gradient clipping
(neither update grows with the gradient).
"""

import math

import torch
import torch.distributed as dist


def adamw(g, state, step, beta1, beta2, eps):
    """Direction for rows g (n,): the bias-corrected mean over the root of the bias-corrected square."""
    m, v = state["m"], state["v"]
    m.lerp_(g, 1 - beta1)
    v.lerp_(g.square(), 1 - beta2)
    return (m / (1 - beta1**step)).div_((v / (1 - beta2**step)).sqrt_().add_(eps))


def muon(g, state, step, momentum, dtype):
    """Direction for matrices g (n, rows, columns): their Nesterov mean, orthogonalised.

    The factor makes an update's effect on a unit input the same for tall matrices as for square ones.
    """
    m = state["m"]
    m.lerp_(g, 1 - momentum)
    direction = orthogonalise(g.lerp(m, momentum), dtype)
    return direction * max(1, g.size(1) / g.size(2)) ** 0.5


# One row an iteration of p(X) = a X + b (X X') X + c (X X')^2 X, each the best for the interval that the one
# before leaves its singular values in (Polar Express, Amsel et al. 2025, arXiv 2505.16932).
POLAR = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def orthogonalise(g, dtype=torch.float32):
    """Nearly U V' for g = U S V', batched: g (n, rows, columns), any shape. Zero stays zero.

    >>> orthogonalise(torch.tensor([[[3.0, 0.0], [0.0, 0.1]]])).round()
    tensor([[[1., 0.],
             [0., 1.]]])

    Five products of odd polynomials instead of an SVD: only matrix products, which hardware does best. `dtype` is
    that of the products, and bf16 is exact enough: singular values end within a few percent of one.
    """
    x = g.to(dtype)
    wide = x.size(1) <= x.size(2)
    x = x if wide else x.mT  # the Gram matrix is taken on the shorter side
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-7)  # no singular value above one; 2% are for rounding in bf16
    for a, b, c in POLAR:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(g.dtype)


class Bundle:
    """Parameters that are updated together: one for AdamW (its rows are numbers), all of one shape for Muon
    (its rows are matrices). Owns rows [rank * per, (rank + 1) * per) of the padded stack."""

    def __init__(self, params, group, rank, world):
        self.params, self.group, self.rank, self.world = params, group, rank, world
        self.count = len(params) if group["kind"] == "muon" else params[0].numel()
        self.per = -(-self.count // world)
        row = params[0].shape if group["kind"] == "muon" else ()
        moments = ("m",) if group["kind"] == "muon" else ("m", "v")
        self.state = {name: torch.zeros((self.per, *row), device=params[0].device) for name in moments}

    def start(self):
        """Stack the gradients and begin the reduce-scatter; a parameter without a gradient counts as zero."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        g = torch.stack(grads) if self.group["kind"] == "muon" else grads[0].flatten()
        for p in self.params:
            p.grad = None  # the stack holds it now
        self.mine, self.work = g, None
        if self.world > 1:
            self.mine = g.new_empty((self.per, *g.shape[1:]))
            self.full = torch.cat([g, g.new_zeros((self.per * self.world - self.count, *g.shape[1:]))])
            self.work = dist.reduce_scatter_tensor(self.mine, self.full, async_op=True)

    def square(self):
        """Sum of squares of the own rows' summed gradient: not finite where a number of it is not."""
        if self.work:
            self.work.wait()
        return self.mine.square().sum()

    def update(self, step):
        """Turn the summed gradient of the own rows into directions and begin the all-gather."""
        knobs = {k: v for k, v in self.group.items() if k in ("beta1", "beta2", "eps", "momentum", "dtype")}
        rule = muon if self.group["kind"] == "muon" else adamw
        self.direction = rule(self.mine, self.state, step, **knobs)
        if self.world > 1:
            mine, self.direction = self.direction, self.full  # the gradient's memory is free for reuse
            self.work = dist.all_gather_into_tensor(self.direction, mine.contiguous(), async_op=True)

    def finish(self, lr_scale):
        """Move every parameter; weight decay is decoupled and scales with the learning rate."""
        if self.world > 1:
            self.work.wait()
        lr = self.group["lr"] * lr_scale
        directions = self.direction if self.group["kind"] == "muon" else [self.direction[: self.count]]
        for p, d in zip(self.params, directions):
            p.mul_(1 - lr * self.group["weight_decay"]).sub_(d.view_as(p), alpha=lr)
        self.drop()

    def drop(self):
        self.direction = self.full = self.mine = self.work = None


class MuonAdamW:
    """groups: dicts with kind ("muon" or "adamw"), params, lr, weight_decay, and the rule's own knobs."""

    def __init__(self, groups, rank=0, world=1):
        self.groups, self.steps = groups, 0
        self.bundles = []
        for group in groups:
            if group["kind"] == "muon":
                for shape in sorted({tuple(p.shape) for p in group["params"]}):
                    same = [p for p in group["params"] if tuple(p.shape) == shape]
                    self.bundles.append(Bundle(same, group, rank, world))
            else:
                self.bundles += [Bundle([p], group, rank, world) for p in group["params"]]

    @torch.no_grad()
    def step(self, lr_scale=1.0):
        """One update of all parameters from their .grad, which are None afterwards; returns the gradient's norm.

        Where that is not finite, nothing moves, neither weights nor state, and the step does not count. All ranks
        call it; a bundle's communication overlaps the work on others.
        """
        for bundle in self.bundles:
            bundle.start()
        total = sum(bundle.square() for bundle in self.bundles)
        if self.bundles[0].world > 1:
            dist.all_reduce(total)
        norm = total.sqrt().item()
        if not math.isfinite(norm):
            for bundle in self.bundles:
                bundle.drop()
            return norm
        self.steps += 1
        for bundle in self.bundles:
            bundle.update(self.steps)
        for bundle in self.bundles:
            bundle.finish(lr_scale)
        return norm

    def shard(self):
        """This rank's part of the state. Learning rates are no part of it: a rate set after load() holds."""
        return {"steps": self.steps, "bundles": [{k: v.cpu() for k, v in b.state.items()} for b in self.bundles]}

    def load(self, shards):
        """Restore from the shards of all ranks, in rank order, of any world size."""
        self.steps = shards[0]["steps"]
        for i, bundle in enumerate(self.bundles):
            for name, mine in bundle.state.items():
                rows = torch.cat([s["bundles"][i][name] for s in shards])[: bundle.count]
                rows = rows[bundle.rank * bundle.per : (bundle.rank + 1) * bundle.per]
                mine.zero_()
                mine[: len(rows)] = rows.to(mine.device)


def build(model, lr_matrix, lr_embed, lr_unembed, weight_decay=0.0, momentum=0.95, rank=0, world=1):
    """The optimizer of a GPT: Muon for the matrices inside its blocks, AdamW for tables and gates.

    AdamW's rates were found at width 768 and scale with 1/sqrt(width); Muon's needs no such scaling.
    """
    scale = (model.cfg.width / 768) ** -0.5
    inner = dict(model.blocks.named_parameters())
    gates = [p for name, p in inner.items() if "gate" in name]
    matrices = [p for name, p in inner.items() if "gate" not in name]
    # short memories (5 and 20 steps), since rates change within hundreds of steps; an eps far below any gradient's size
    adam = {"kind": "adamw", "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.0}
    muon = {"kind": "muon", "momentum": momentum, "dtype": model.dtype}  # products in the activations' precision
    tables = [model.embed.weight, *model.values.parameters()]
    groups = [
        {**adam, "params": tables, "lr": lr_embed * scale},
        {**adam, "params": [model.unembed.weight], "lr": lr_unembed * scale},
        {**adam, "params": gates, "lr": lr_matrix},
        {**muon, "params": matrices, "lr": lr_matrix, "weight_decay": weight_decay},
    ]
    return MuonAdamW(groups, rank, world)
