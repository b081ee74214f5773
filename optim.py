"""
Muon for matrices, AdamW for everything else, in one optimizer that shares its work between ranks.

    optimizer = build(model, lr_matrix=0.02, lr_embed=0.3, lr_unembed=0.004, weight_decay=0.0)
    for batch in optimizer.passes(micro_batches):
        loss_of(batch).backward()     # gradients are SUMS over a rank's tokens, already divided by the global count
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
Gradients leave while the last backward pass still runs (`passes`).
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
    (its rows are matrices).

    Gradients travel in pieces. A piece of a Muon bundle is one matrix for each rank, so rank r owns matrices r,
    r + world, ...: the last layers' pieces leave while the backward pass works on the first. A table is one piece, of
    which each rank owns a stretch. One process has one piece.
    """

    def __init__(self, params, group, rank, world):
        self.params, self.group, self.rank, self.world = params, group, rank, world
        self.matrices = group["kind"] == "muon"
        self.count = len(params) if self.matrices else params[0].numel()
        self.per = -(-self.count // world)  # rows that each rank owns
        size = world if self.matrices and world > 1 else world * self.per
        self.pieces = [range(i, min(i + size, self.count)) for i in range(0, self.count, size)]  # of rows
        self.size = size
        row = params[0].shape if self.matrices else ()
        moments = ("m",) if self.matrices else ("m", "v")
        self.state = {name: torch.zeros((self.per, *row), device=params[0].device) for name in moments}
        self.drop()

    def members(self, piece):
        """The parameters in piece number `piece`."""
        return [self.params[i] for i in self.pieces[piece]] if self.matrices else self.params

    def send(self, piece):
        """Stack a piece's gradients and begin the reduce-scatter; a parameter without a gradient counts as zero."""
        members = self.members(piece)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
        g = torch.stack(grads) if self.matrices else grads[0].flatten()
        for p in members:
            p.grad = None  # the stack holds it now
        if self.world > 1:
            if len(g) < self.size:
                g = torch.cat([g, g.new_zeros((self.size - len(g), *g.shape[1:]))])
            self.mine[piece] = g.new_empty((self.size // self.world, *g.shape[1:]))
            self.work[piece] = dist.reduce_scatter_tensor(self.mine[piece], g, async_op=True)
        else:
            self.mine[piece] = g
        self.full[piece] = g

    def square(self):
        """Sum of squares of the own rows' summed gradient: not finite where a number of it is not."""
        for work in self.work.values():
            work.wait()
        self.gradient = torch.cat([self.mine[i] for i in range(len(self.pieces))]) if len(self.pieces) > 1 else self.mine[0]
        self.mine.clear()
        return self.gradient.square().sum()

    def update(self, step):
        """Turn the summed gradient of the own rows into directions and begin the all-gathers."""
        knobs = {k: v for k, v in self.group.items() if k in ("beta1", "beta2", "eps", "momentum", "dtype")}
        direction = (muon if self.matrices else adamw)(self.gradient, self.state, step, **knobs)
        if self.world == 1:
            self.full[0] = direction
            return
        for i, own in enumerate(direction.contiguous().split(self.size // self.world)):
            # the gradient's memory is free for reuse
            self.work[i] = dist.all_gather_into_tensor(self.full[i], own, async_op=True)

    def finish(self, lr_scale):
        """Move every parameter; weight decay is decoupled and scales with the learning rate."""
        lr = self.group["lr"] * lr_scale
        for i, direction in self.full.items():
            if self.world > 1:
                self.work[i].wait()
            for p, d in zip(self.members(i), direction if self.matrices else [direction[: self.count]]):
                p.mul_(1 - lr * self.group["weight_decay"]).sub_(d.view_as(p), alpha=lr)
        self.drop()

    def drop(self):
        """Forget what is on its way, by piece: the rows of all ranks, the own ones, the communication."""
        self.full, self.mine, self.work, self.gradient = {}, {}, {}, None


class MuonAdamW:
    """groups: dicts with kind ("muon" or "adamw"), params, lr, weight_decay, and the rule's own knobs.

    order: all parameters in the order in which a forward pass uses them (that of the groups by default). Gradients
    become complete in the reverse of it; all ranks send them in that order whatever comes first, or they would wait
    for each other for ever.
    """

    def __init__(self, groups, rank=0, world=1, order=None):
        self.groups, self.steps, self.world = groups, 0, world
        self.bundles = []
        for group in groups:
            if group["kind"] == "muon":
                for shape in sorted({tuple(p.shape) for p in group["params"]}):
                    same = [p for p in group["params"] if tuple(p.shape) == shape]
                    self.bundles.append(Bundle(same, group, rank, world))
            else:
                self.bundles += [Bundle([p], group, rank, world) for p in group["params"]]
        place = {p: i for i, p in enumerate(order or [p for group in groups for p in group["params"]])}
        pieces = [(bundle, i) for bundle in self.bundles for i in range(len(bundle.pieces))]
        self.pieces = sorted(pieces, key=lambda piece: -min(place[p] for p in piece[0].members(piece[1])))
        self.sent, self.complete, self.overlapping = 0, set(), False
        if world > 1:
            for p in place:
                p.register_post_accumulate_grad_hook(self.arrive)

    def passes(self, batches):
        """Yield a step's micro-batches. Gradients leave as they become complete, while the last backward pass runs."""
        batches = list(batches)
        for i, batch in enumerate(batches, 1):
            self.overlapping = self.world > 1 and i == len(batches)
            yield batch

    @torch.no_grad()
    def arrive(self, param):
        """A backward pass has added to a parameter's gradient."""
        if self.overlapping:
            self.complete.add(param)
            self.send(lambda bundle, piece: self.complete.issuperset(bundle.members(piece)))

    def send(self, ready):
        """Send pieces in their order while they are ready."""
        while self.sent < len(self.pieces) and ready(*self.pieces[self.sent]):
            bundle, piece = self.pieces[self.sent]
            bundle.send(piece)
            self.sent += 1

    @torch.no_grad()
    def step(self, lr_scale=1.0):
        """One update of all parameters from their .grad, which are None afterwards; returns the gradient's norm.

        Where that is not finite, nothing moves, neither weights nor state, and the step does not count. All ranks
        call it; a bundle's communication overlaps the work on others.
        """
        self.send(lambda bundle, piece: True)
        self.sent, self.overlapping = 0, False
        self.complete.clear()
        total = sum(bundle.square() for bundle in self.bundles)
        if self.world > 1:
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
                parts, start = [s["bundles"][i][name] for s in shards], bundle.rank * bundle.per
                if bundle.matrices:
                    rows = torch.stack(parts, dim=1).flatten(0, 1)[: bundle.count][bundle.rank :: bundle.world]
                else:
                    rows = torch.cat(parts)[: bundle.count][start : start + bundle.per]
                mine.zero_()
                mine[: len(rows)] = rows.to(mine.device)


def build(model, lr_matrix, lr_embed, lr_unembed, weight_decay=0.0, momentum=0.95, rank=0, world=1):
    """The optimizer of a GPT: Muon for the matrices inside its blocks, AdamW for tables and gates.

    AdamW's rates were found at width 768 and scale with 1/sqrt(width); Muon's needs no such scaling.
    """
    scale = (model.cfg.width / 768) ** -0.5
    order = [model.embed.weight]
    for i, block in enumerate(model.blocks):
        order += [*(model.values[str(i)].parameters() if str(i) in model.values else ()), *block.parameters()]
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
    return MuonAdamW(groups, rank, world, [*order, model.unembed.weight])
