"""Make a mean of checkpoints: find them, average, estimate BatchNorm's statistics, score, write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mtl_dist import storage
from mtl_dist.device import named_device
from mtl_dist.objective.crossfit import make_folds
from mtl_dist.objective.scores import FIRST, constant_scores, scores
from mtl_dist.predicting.members import Member, open_val
from mtl_dist.shards.splits import group_rows
from mtl_dist.soup.greedy import Chosen, OutOfHalf, choose, choose_across, sums_of
from mtl_dist.soup.ingredients import find_ingredients, find_notes, newest_of
from mtl_dist.soup.options import SoupCommand
from mtl_dist.soup.outputs import NAMES, Soup, make_recipe, read_finished, write_soup
from mtl_dist.soup.trials import Trials
from mtl_dist.training.tracking import print_scores

CONSTANT, MEAN = "constant predictor", "mean of the weights"
GREEDY, ELSEWHERE = "greedy soup, chosen on these rows", "greedy soup, chosen on other videos"
BEST_ELSEWHERE = "best checkpoint, chosen on other videos"


def make_soup(command: SoupCommand) -> None:
    """Average checkpoints, score the mean beside them, and write it. Raises `InputError`."""
    ingredients = find_ingredients(command.runs, command.last)
    recipe = make_recipe(ingredients, command)
    if finished := read_finished(command, recipe):
        _say(finished)
        print(f"{command.out} holds this already; nothing is left to do")
        return
    for note in find_notes(ingredients, command.last):
        print(f"note: {note}")
    newest = newest_of(ingredients)
    member = Member(newest.given, newest.weights, open_val(newest.weights, newest.given, command.val))
    device = named_device(command.device)
    with storage.scratch_directory("soup") as scratch:
        trials = Trials(ingredients, member, command, device=device, directory=scratch)
        taken, soup = _choose(trials, command) if command.greedy else _average(trials, command)
        write_soup(command.out, soup, trials.make(taken), ingredients, recipe, scratch)
    _say(soup._asdict())
    print("wrote " + ", ".join(storage.join(command.out, name) for name in NAMES))


def _average(trials: Trials, command: SoupCommand) -> tuple[Chosen, Soup]:
    """Average all checkpoints."""
    places = tuple(range(len(trials.ingredients)))
    rows = _score_each(trials)
    rows[MEAN] = scores(sums_of(trials.predict(places)))
    method = "tail average" if len(command.runs) == 1 else "uniform soup"
    return places, _describe(trials, places, method, rows, MEAN)


def _choose(trials: Trials, command: SoupCommand) -> tuple[Chosen, Soup]:
    """Add checkpoints greedily, on all rows; and, to be scored, on either half of the videos."""
    rows, count, names = _score_each(trials), len(trials.ingredients), trials.names
    halves = make_folds(group_rows(pa.array(names.videos), None), 2, seed=command.seed)
    choice = choose(count, trials.predict, np.ones(len(halves), bool))
    elsewhere = None
    if halves.any():
        elsewhere = choose_across(count, trials.predict, halves)
        rows |= {BEST_ELSEWHERE: elsewhere.best, GREEDY: None, ELSEWHERE: elsewhere.soup}
    else:
        print("note: all rows are of one video: nothing can be chosen on other videos, so the score is that in sample")
    rows[GREEDY] = scores(sums_of(trials.predict(choice.soup)))
    return choice.soup, _describe(trials, choice.soup, "greedy soup", rows, GREEDY, elsewhere)


def _score_each(trials: Trials) -> dict[str, dict[str, Any]]:
    """Score the constant predictor, and every checkpoint."""
    predicted = {one.name: trials.predict((place,)) for place, one in enumerate(trials.ingredients)}
    constant = constant_scores(sums_of(next(iter(predicted.values()))))
    return {CONSTANT: constant} | {name: scores(sums_of(own)) for name, own in predicted.items()}


def _describe(
    trials: Trials,
    taken: Chosen,
    method: str,
    rows: dict[str, dict[str, Any]],
    soup_row: str,
    elsewhere: OutOfHalf | None = None,
) -> Soup:
    def named(places: Sequence[int]) -> list[str]:
        return [trials.ingredients[place].name for place in places]

    estimated = trials.training.num_samples if trials.training and len(taken) > 1 else 0
    halves = [
        {"soup": named(choice.soup), "best": named((choice.best,))[0]}
        for choice in (elsewhere.choices if elsewhere else ())
    ]
    return Soup(method, named(taken), rows, soup_row, estimated, halves)


def _say(soup: dict[str, Any]) -> None:
    """Print what soup.json says."""
    rows, name = soup["scores"], soup["soup_row"]
    print_scores(rows, title="validation set")
    print(f"{soup['method']} of {len(soup['taken'])} checkpoint(s): {'; '.join(soup['taken'])}")
    for number, half in enumerate(soup["halves"], start=1):
        print(f"half {number} of the videos is scored with what was chosen on the other: {'; '.join(half['soup'])}")
    if soup["bn_samples"]:
        print(f"BatchNorm's statistics were estimated anew on {soup['bn_samples']} training samples")
    if ELSEWHERE in rows:
        mine, other, best = (rows[row][FIRST.key] for row in (name, ELSEWHERE, BEST_ELSEWHERE))
        print(
            f"P {mine:.4f} in sample, for it was chosen on these rows; chosen on other videos {other:.4f}, where the "
            f"best checkpoint has {best:.4f}"
        )
    else:
        print(f"P {rows[name][FIRST.key]:.4f}")
