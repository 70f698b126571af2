"""Balancers that see gradients: how a trunk weighs the tasks, from the angles and lengths of what they ask of it.

A network is a trunk, which makes a tensor h, and heads, which read it. g_k is the gradient of term k's loss, with its
configured weight, by h, of all rows of all ranks. All methods here need of it the Gram matrix G = (g_i . g_j) alone,
and find weights a (K,): the trunk is trained by sum a_k g_k, each head by its own term's gradient. So it is the
feature-level method of MGDA-UB (Sener and Koltun 2018, section 3.3), not that by all shared parameters.

Rows of h lie on one rank each, so G adds up over ranks and micro-batches: K^2 numbers. The heads see a copy of h at
which their gradients end, and sum a_k g_k reaches the trunk as the gradient of <h, sum a_k g_k>: one backward pass, of
one number, whatever the engine does with it.

A term that has nothing to learn from in a step is not in G. Weights are times the number K of terms where a method's
are those of a mean: without conflict they are about 1, as with fixed weights.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl_dist.errors import InputError
from mtl_dist.objective.balancing import BALANCERS, Balancer

CAGRAD_RADIUS = 0.4  # c of the paper's figures 1 and 3
REGULARISED = 1e-4  # UPGrad: what is added to the diagonal of G / trace, as TorchJD does
SINGULAR = 1e-10  # the same where inverses of parts of G / trace are taken
STATIONARY = 1e-4  # of |g_w| where gradients are of length 1 together: no direction is left that all agree to


class Held(NamedTuple):
    """What all terms share, in one forward pass."""

    made: Tensor  # h, as the trunk made it
    read: Tensor  # as the heads read it: the same, or a copy at which gradients end


@contextlib.contextmanager
def hold_shared(model: nn.Module, name: str, *, cut: bool) -> Iterator[list[Held]]:
    """Note what submodule `name` makes in each forward pass of the block; `cut`: its readers read a copy."""
    held: list[Held] = []

    def hold(module: nn.Module, inputs: tuple, made: Tensor) -> Tensor:
        held.append(Held(made, made.detach().requires_grad_() if cut else made))
        return held[-1].read

    handle = model.get_submodule(name).register_forward_hook(hold)
    try:
        yield held
    finally:
        handle.remove()


def term_gradients(losses: Mapping[str, Tensor], held: Sequence[Held]) -> list[tuple[Tensor, ...]]:
    """Return the gradients of every term's loss by what the heads read; none where a rank has no rows."""
    read = [each.read for each in held]
    if not read or not read[0].requires_grad:
        return [() for _ in losses]
    how = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return [torch.autograd.grad(loss, read, **how) for loss in losses.values()]


def gram_matrix(gradients: Sequence[Sequence[Tensor]], like: Tensor, *, scale: float) -> Tensor:
    """Return the inner products (K, K) float64 of gradients `scale` times too large; zeros where there are none."""
    if not any(gradients):
        return torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=like.device)
    flat = torch.stack([torch.cat([part.double().flatten() for part in parts]) for parts in gradients]) / scale
    return flat @ flat.T


def total_gram(gram: Tensor) -> Tensor:
    """Add up over all ranks. A collective where there are several ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(gram)
    return gram


def trunk_loss(held: Sequence[Held], gradients: Sequence[Sequence[Tensor]], weights: Tensor) -> Tensor | float:
    """Return 0, with the gradient by h that the weighted sum of the terms' gradients is."""
    if held and not held[0].made.requires_grad:
        raise InputError(
            "loss.balancing weighs what the tasks ask of what they share, and nothing of that is trained; train more "
            "of the model, or choose fixed, uncertainty, dwa or famo"
        )
    total: Tensor | float = 0.0
    for place, each in enumerate(held):
        wanted = sum(weight.to(g[place]) * g[place] for weight, g in zip(weights, gradients))
        product = (each.made * wanted.detach()).sum()
        total = total + product - product.detach()
    return total


def describe_gram(gram: Tensor, terms: Sequence[str], present: Container[str]) -> dict[str, dict[str, float]]:
    """Return what people look at: the norm of the gradient of every term that is there, and the cosine of each two.

    Nothing where they are not finite: of the loss, whose run may go on, that says nothing.
    """
    products = gram.cpu().numpy()
    if not np.isfinite(products).all():
        return {}
    norms = {term: float(np.sqrt(products[i, i])) for i, term in enumerate(terms) if term in present}
    cosines = {}
    for (i, one), (j, other) in itertools.combinations(enumerate(terms), 2):
        if norms.get(one) and norms.get(other):
            cosines[f"{one} {other}"] = float(products[i, j]) / (norms[one] * norms[other])
    return {"norm": norms, "cosine": cosines}


# ---------------------------------------------------------------------------------------------------------- the weights


class GradientBalancer(Balancer):
    """Weights of the terms' gradients by what they share, found by `solve` from their Gram matrix, step by step.

    `solve(gram, orders)` is given the matrix of the terms that are there, divided by its trace, and for each of them an
    order of all, drawn by the number of the step.
    """

    reads_gradients = True

    def __init__(self, fixed: Mapping[str, float], solve: Solver, *, of_mean: bool):
        super().__init__(fixed)
        self._solve, self._of_mean = solve, of_mean
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def shares(self, gram: Tensor, present: dict[str, Tensor]) -> Tensor:
        """Return a (K,), by which the configured weights are multiplied for the trunk. `gram` (K, K) is of the losses
        before these. The host waits for the device."""
        fixed = self.fixed.cpu().numpy()
        there = np.flatnonzero(self.stack(present).cpu().numpy() & (fixed > 0))
        weighted = (gram.cpu().numpy() * np.outer(fixed, fixed))[np.ix_(there, there)]
        found = np.ones(len(fixed))
        if not np.isfinite(weighted).all():
            found[:] = np.nan  # the loop ends the run, and says so
        elif len(there) > 1 and weighted.trace() > 0:
            rows = np.tile(np.arange(len(there)), (len(there), 1))
            orders = np.random.default_rng(int(self.steps)).permuted(rows, axis=1)
            found[there] = self._solve(weighted / weighted.trace(), orders) * (len(there) if self._of_mean else 1)
        return torch.from_numpy(found).to(self.fixed)

    def stepped(self, losses: dict[str, Tensor], present: dict[str, Tensor], after: dict[str, Tensor] | None) -> None:
        self.steps += 1


Solver = Callable[[np.ndarray, np.ndarray], np.ndarray]


def upgrad(gram: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Mean over terms of each gradient's projection on what no term is against (UPGrad, Quinton and Rey 2024, arXiv
    2406.16232, equation 3 and proposition 1): argmin v'Gv over v >= e_i / K."""
    num, gram = len(gram), gram + REGULARISED * np.eye(len(gram))
    return sum(_least_above(gram, np.eye(num)[i] / num) for i in range(num))


def mgda(gram: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """The shortest vector between all gradients (Sener and Koltun 2018, arXiv 1810.04650, equation 3)."""
    best, least = np.full(len(gram), 1 / len(gram)), np.inf
    for chosen in _subsets(len(gram)):
        part = gram[np.ix_(chosen, chosen)] + SINGULAR * np.eye(len(chosen))
        a = np.zeros(len(gram))
        a[chosen] = np.linalg.solve(part, np.ones(len(chosen)))
        a /= a.sum()
        if a.min() >= 0 and a @ gram @ a < least:
            best, least = a, a @ gram @ a
    return best


def imtl_g(gram: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """The sum that has one projection on all gradients' directions (Liu et al. 2021, IMTL-G, equation 5), by
    pseudo-inverse where they are not independent."""
    a = np.linalg.pinv(gram, hermitian=True) @ np.sqrt(gram.diagonal())
    return a / a.sum() if abs(a.sum()) >= 1e-12 else np.zeros(len(a))


def aligned(gram: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """The mean of gradients made orthogonal and of one length, that of the shortest axis (Senushkin et al. 2023,
    arXiv 2305.19000, algorithm 1)."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > values.max() * len(gram) * np.finfo(np.float64).eps
    values, vectors = values[kept], vectors[:, kept]
    return np.sqrt(values.min()) * (vectors / np.sqrt(values)) @ vectors.T @ np.full(len(gram), 1 / len(gram))


def pcgrad(gram: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """The sum of gradients, each without its part against another, in random order (Yu et al. 2020, arXiv 2001.06782,
    algorithm 1)."""
    total = np.zeros(len(gram))
    for i, order in enumerate(orders):
        a = np.eye(len(gram))[i]
        for j in order[order != i]:
            if (product := gram[j] @ a) < 0:
                a[j] -= product / gram[j, j]
        total += a
    return total


def cagrad(gram: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """The step near the mean gradient that is best for the term it is worst for (Liu et al. 2021, arXiv 2110.14048,
    algorithm 1): 1 / K + c |g0| / |g_w| w, w = argmin g_w . g0 + c |g0| |g_w| over the simplex.

    On every face of it the minimum is where all slopes are one: m, the root of a quadratic.
    """
    num = len(gram)
    mean = np.full(num, 1 / num)
    slopes, radius = gram @ mean, CAGRAD_RADIUS * np.sqrt(mean @ gram @ mean)
    best, least = mgda(gram, orders), np.inf
    for chosen in _subsets(num):
        inverse = np.linalg.inv(gram[np.ix_(chosen, chosen)] + SINGULAR * np.eye(len(chosen)))
        b, ones = slopes[chosen], np.ones(len(chosen))
        square, linear = ones @ inverse @ ones, ones @ inverse @ b
        root = np.sqrt(max(linear**2 - square * (b @ inverse @ b - radius**2), 0.0))
        w = np.zeros(num)
        w[chosen] = inverse @ ((linear + root) / square - b)
        if w.min() >= 0 and w.sum() > 0:
            w /= w.sum()
            value = slopes @ w + radius * np.sqrt(w @ gram @ w)
            if value < least:
                best, least = w, value
    length = np.sqrt(best @ gram @ best)
    return mean + radius / length * best if length >= STATIONARY else np.zeros(num)


def _least_above(gram: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """Return argmin v'Gv over v >= floor: of all ways to let some v be free, the best that keeps to the floor."""
    best, least = floor, floor @ gram @ floor
    for free in _subsets(len(gram)):
        v = floor.copy()
        bound = np.setdiff1d(range(len(gram)), free)
        v[free] = -np.linalg.solve(gram[np.ix_(free, free)], gram[np.ix_(free, bound)] @ floor[bound])
        if (v[free] >= floor[free]).all() and v @ gram @ v < least:
            best, least = v, v @ gram @ v
    return best


def _subsets(num: int) -> Iterator[np.ndarray]:
    """Yield every choice of at least one of so many."""
    for size in range(1, num + 1):
        yield from map(np.array, itertools.combinations(range(num), size))


SOLVERS: dict[str, tuple[Solver, bool]] = {  # and whether the weights are those of a mean
    "pcgrad": (pcgrad, False),
    "cagrad": (cagrad, True),
    "upgrad": (upgrad, True),
    "mgda": (mgda, True),
    "imtl_g": (imtl_g, True),
    "aligned": (aligned, True),
}


def build_balancer(kind: str, fixed: Mapping[str, float]) -> Balancer:
    """Build a balancer (`loss.balancing`) of terms with the weights that they have besides."""
    if kind in BALANCERS:
        return BALANCERS[kind](fixed)
    solve, of_mean = SOLVERS[kind]
    return GradientBalancer(fixed, solve, of_mean=of_mean)
