"""Whether the labels of both sets and the weights of losses go together: what is trained, and what is scored."""

from __future__ import annotations

from mtl_dist.errors import InputError
from mtl_dist.label_counts import LabelCounts
from mtl_dist.sections import LossConfig
from mtl_dist.tasks import AUS, TASKS


def check_labels(config: LossConfig, train: LabelCounts, val: LabelCounts | None, *, names: tuple[str, str]) -> None:
    """Raise `InputError` where nothing would be learnt, or nothing of it scored; `names` are of the two sets.

    `val` None: there is no validation set.
    """
    weighted = ", ".join(f"loss.{task} {config.weight(task):g}" for task in TASKS)
    trained = _trained(config, train)
    if not trained:
        raise InputError(
            f"{names[0]} has labels of {_labelled(train)}, and the weights of losses are {weighted}: nothing would be "
            "trained; give a set with labels, or a weight to a task that has some"
        )
    if config.va_after and trained == ["va"]:
        raise InputError(
            f"loss.va_after is {config.va_after}, and {names[0]} has labels of va alone that are trained: its first "
            "epochs would train nothing; set it to 0"
        )
    if val and not set(trained) - set(val.missing_tasks()):
        raise InputError(
            f"{names[1]} has labels of {_labelled(val)}, and trained are {', '.join(trained)}: nothing of it would be "
            "scored, and no checkpoint could be chosen; give a validation set with labels of these"
        )


def note_labels(config: LossConfig, train: LabelCounts, val: LabelCounts | None) -> list[str]:
    """Say what is trained and not scored, scored and not trained, or neither though it has a loss.

    `val` None: there is no validation set, and what is not trained is all that there is to say.
    """
    trained = _trained(config, train)
    if not val:
        return [f"{task} is not trained: {_why_not(config, task)}" for task in TASKS if task not in trained]
    unscored = val.missing_tasks()
    notes = [
        f"{task} is trained and not scored: the validation set has no labels of it"
        for task in trained
        if task in unscored
    ]
    for task in TASKS:
        if task in trained:
            continue
        notes.append(f"{task} is {'not' if task in unscored else 'scored and not'} trained: {_why_not(config, task)}")
    if "au" in trained and "au" not in unscored:
        units = list(zip(AUS, train.au, val.au))
        for what, numbers in (
            ("trained and not scored", [number for number, in_train, in_val in units if in_train and not in_val]),
            ("scored and not trained", [number for number, in_train, in_val in units if in_val and not in_train]),
        ):
            if numbers:
                notes.append(f"{', '.join(f'AU{number}' for number in numbers)}: {what}, for want of labels")
    return notes


def _why_not(config: LossConfig, task: str) -> str:
    """Say why a task is not trained."""
    return "its loss has weight 0" if not config.weight(task) else "the training set has no labels of it"


def _labelled(counts: LabelCounts) -> str:
    return ", ".join(task for task, count in counts.of_tasks().items() if count) or "no task"


def _trained(config: LossConfig, train: LabelCounts) -> list[str]:
    """Tasks with a loss and labels."""
    return [task for task in TASKS if config.weight(task) and task not in train.missing_tasks()]
