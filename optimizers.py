"""Optimizers that also work on sharded weights: AdamW, Adafactor, Muon.

PyTorch's own Adafactor and Muon refuse weights that FSDP2 has cut into rows. These two give the
same numbers, written in operations on whole tensors: on DTensors a sum becomes one over processes.

Not covered: learning rates and clipping (parallel.py).
"""
import math

import torch
from torch.distributed.tensor import DTensor, Replicate


def make_optimizer(model, cfg):
    """AdamW, Adafactor or Muon by cfg.optimizer, with weight decay on the matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    if cfg.optimizer == "adafactor":
        return Adafactor(groups, lr=cfg.lr, relative=False)
    if cfg.optimizer == "muon":
        inside = {p for p in model.layers.parameters() if p.dim() >= 2}
        outside = [p for p in matrices if p not in inside]  # embeddings: their rows are apart
        groups[0]["params"] = outside
        groups.append({"params": list(inside), "weight_decay": cfg.weight_decay, "hidden": True})
        return Muon(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)


# --- Adafactor -----------------------------------------------------------------------------------

def summed(x):
    """x with the processes' parts of a sum added up, the same on all of them."""
    if not isinstance(x, DTensor):
        return x
    return x.redistribute(placements=[Replicate()] * x.device_mesh.ndim)


def rms(x):
    """Root mean square."""
    return (summed(x.square().sum()) / x.numel()).sqrt()


class Adafactor(torch.optim.Optimizer):
    """Adam's second moment as a row times a column (Shazeer & Stern 2018, Algorithms 4 and 5),
    sharded like the weights.

    The same numbers as torch.optim.Adafactor, which refuses sharded weights. It is written in
    whole-tensor operations: on DTensors, sums over rows and columns become sums over processes.

    relative: lr is multiplied by the weight's root mean square and capped at 1/√step, as in the
    paper; False: lr is absolute, as in CoDA's training. beta2_decay: the second moment's decay is
    1 - step^beta2_decay. clip: largest root mean square of an update.
    """

    def __init__(self, params, lr=1e-2, weight_decay=0.0, relative=True, beta2_decay=-0.8,
                 eps=(2**-23, 1e-3), clip=1.0):
        defaults = {"lr": lr, "weight_decay": weight_decay, "relative": relative,
                    "beta2_decay": beta2_decay, "eps": eps, "clip": clip}
        self.settings = tuple(defaults)  # PyTorch adds to its `defaults` when a state is loaded
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):  # torch.distributed.checkpoint names it, nobody here passes one
        for group in self.param_groups:
            settings = {name: group[name] for name in self.settings}
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], **settings)

    def update(self, p, g, state, lr, weight_decay, relative, beta2_decay, eps, clip):
        if not state:
            state["step"] = torch.zeros(())
            if p.dim() == 2:
                state["row"] = torch.zeros_like(g[:, :1])  # mean of g² along each row, (rows, 1)
                state["col"] = torch.zeros_like(summed(g.sum(0, keepdim=True)))  # (1, columns)
            else:
                state["variance"] = torch.zeros_like(g)
        state["step"] += 1
        step = state["step"].item()
        rate = lr
        if relative:
            rate = min(lr, step**-0.5) * rms(p).clamp(min=eps[1])
        p.mul_(1 - lr * weight_decay)
        fresh = step**beta2_decay
        squared = g.square()
        if p.dim() == 2:
            state["row"].lerp_(squared.sum(1, keepdim=True) / p.shape[1], fresh)
            state["col"].lerp_(summed(squared.sum(0, keepdim=True)) / p.shape[0], fresh)
            mean = summed(state["row"].sum(0, keepdim=True)) / p.shape[0]  # (1, 1)
            variance = state["row"] * state["col"] / mean.clamp(min=eps[0])
        else:
            variance = state["variance"].lerp_(squared, fresh)
        update = g * variance.clamp(min=eps[0] ** 2).rsqrt()
        p.sub_(update * (rate / (rms(update) / clip).clamp(min=1)))


# --- Muon ----------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for groups of matrices with hidden=True, AdamW for the others.

    A matrix moves by its momentum, orthogonalized: all directions alike. As in Moonlight (Liu et
    al. 2025, arXiv 2502.16982, Eq. 4) that is scaled to the size of AdamW's updates, so both share
    a learning rate. The same numbers as torch.optim.Muon with adjust_lr_fn="match_rms_adamw" and
    torch.optim.AdamW. On sharded weights every process orthogonalizes the whole matrix and keeps
    its rows.
    """
    MOMENTUM, EPS = 0.95, 1e-8

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, hidden=False):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay,
                                  "hidden": hidden})

    @torch.no_grad()
    def step(self, closure=None):  # torch.distributed.checkpoint names it, nobody here passes one
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if group["hidden"]:
                    update = self.orthogonal(p.grad, self.state[p])
                else:
                    update = self.adam(p.grad, self.state[p], *group["betas"])
                p.sub_(update, alpha=group["lr"])

    def orthogonal(self, g, state):
        """Nesterov momentum of gradient g, (rows, columns), orthogonalized and scaled."""
        if not state:
            state["momentum"] = torch.zeros_like(g)
        state["momentum"].lerp_(g, 1 - self.MOMENTUM)
        update = g.lerp(state["momentum"], self.MOMENTUM)
        scale = 0.2 * math.sqrt(max(g.shape))
        if not isinstance(update, DTensor):
            return scale * orthogonalized(update)
        whole = orthogonalized(update.full_tensor())
        everywhere = [Replicate()] * g.device_mesh.ndim
        whole = DTensor.from_local(whole, g.device_mesh, everywhere, run_check=False)
        return scale * whole.redistribute(placements=g.placements)

    def adam(self, g, state, beta1, beta2):
        """AdamW's update of gradient g, without the learning rate."""
        if not state:
            state["step"] = torch.zeros(())
            state["mean"] = torch.zeros_like(g)
            state["square"] = torch.zeros_like(g)
        state["step"] += 1
        step = state["step"].item()
        mean = state["mean"].lerp_(g, 1 - beta1) / (1 - beta1**step)
        square = state["square"].lerp_(g.square(), 1 - beta2) / (1 - beta2**step)
        return mean / (square.sqrt() + self.EPS)


def orthogonalized(g):
    """The matrix U Vᵀ of g = U S Vᵀ, roughly: five steps of a Newton-Schulz iteration.

    Its singular values end up between 0.7 and 1.2. The coefficients are Jordan's. In bfloat16, as
    in the original. g: (rows, columns).
    """
    x = g.bfloat16() / (g.bfloat16().norm() + 1e-7)
    if len(g) > g.shape[1]:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, factor, x, beta=3.4445)
    if len(g) > g.shape[1]:
        x = x.T
    return x.to(g.dtype)
