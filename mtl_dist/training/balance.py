"""Balanced sampling of a run (data.balance): its order, whether it can be had, and what an epoch then sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mtl_dist.config import Config
from mtl_dist.data.balanced import BalancedOrder, build_balanced_order
from mtl_dist.data.classes import NAMES, Classes
from mtl_dist.data.order import Order
from mtl_dist.data.samples import Samples
from mtl_dist.errors import InputError
from mtl_dist.sections import DataConfig

WHAT = {"expr": "expression(s)", "au": "unit(s) on, or none", "video": "video(s)"}


class Balance(NamedTuple):
    """An order, and the classes that it is of."""

    order: BalancedOrder
    classes: Classes


def build_balance(
    data: DataConfig, of_set: Order, train: Samples, name: str, progress: Callable[[int], None] = lambda count: None
) -> Balance:
    """Read the classes of all samples of the set `name`, and make their order. `progress` is told of shards.

    Raises `InputError` where there is nothing to balance, or a row would come twice in a step.
    """
    classes = train.classes(data.balance, progress)
    if (num := np.count_nonzero(classes.counts)) < 2:
        raise InputError(
            f"data.balance is {data.balance}, and the labelled rows of {name} have {num} {WHAT[data.balance]}: nothing "
            "is to be balanced; leave it out, or balance something else"
        )
    order = build_balanced_order(classes, of_set, power=data.balance_power)
    if (most := math.ceil(order.expected.max())) > order.num_steps:
        raise InputError(
            f"data.balance is {data.balance}, and a row of the rarest class of {name} would come {most} times in the "
            f"{order.num_steps} steps of an epoch: more than once in a step; give a smaller data.balance_power than "
            f"{data.balance_power:g}"
        )
    return Balance(order, classes)


def describe_balance(config: Config, balance: Balance) -> list[str]:
    """Say what an epoch has of every class, without balanced sampling and with it."""
    by, classes, expected = config.data.balance, balance.classes, balance.order.expected
    before = classes.counts * expected.mean()
    after = np.bincount(classes.classes, weights=expected[classes.samples], minlength=classes.num)
    least, most = expected.min(), expected.max()
    lines = [
        f"balance {_describe_classes(by, before, after)} rows an epoch (power {config.data.balance_power:g})",
        f"balance a row comes {least:.2g} to {most:.2g} times an epoch, augmented otherwise each time",
    ]
    num_without = len(expected) - len(np.unique(classes.samples))
    if num_without:
        lines[0] += f"; {num_without} rows without labels of {by} come as often as before"
    loss = config.loss
    twice = {
        "expr": {"loss.expr_weights": loss.expr_weights != "none", "loss.expr_prior": loss.expr_prior > 0},
        "au": {"loss.au_weights": loss.au_weights != "none"},
    }
    settings = " and ".join(name for name, is_given in twice.get(by, {}).items() if is_given)
    if settings:
        lines.append(
            f"note    {settings} with data.balance {by}: weights are of the labels of the set, not of what is drawn"
        )
    return lines


def _describe_classes(by: str, before: np.ndarray, after: np.ndarray) -> str:
    if by == "video":
        there = before > 0  # the videos of another fold are not
        ranges = (f"{of_one[there].min():.0f} to {of_one[there].max():.0f}" for of_one in (before, after))
        return f"{there.sum()} videos of {' -> '.join(ranges)}"
    pairs = zip(NAMES[by], before, after)
    return ", ".join(f"{name} {was:.0f} -> {now:.0f}" for name, was, now in pairs if was)
