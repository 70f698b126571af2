"""What means of checkpoints predict of the validation set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mtl_dist.batchnorm import find_trained_norms
from mtl_dist.errors import InputError
from mtl_dist.models import non_finite
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.scores import FIRST, scores
from mtl_dist.predicting.members import Member, RowNames, predict_member, row_names
from mtl_dist.predicting.predictions import check_finite
from mtl_dist.progress import progress_bar
from mtl_dist.runs.weights import load_weights
from mtl_dist.soup.greedy import Chosen, sums_of
from mtl_dist.soup.ingredients import Ingredient, newest_of
from mtl_dist.soup.means import fetch, load_mean
from mtl_dist.soup.options import SoupCommand
from mtl_dist.soup.statistics import TrainingPass, estimate_statistics, needs_statistics, open_training_pass


class Trials:
    """Makes means of checkpoints, by their places, and predicts with each once. Raises `InputError`.

    `member` has the newest checkpoint, whose configuration counts. Weights are copied to `directory`.
    """

    def __init__(
        self,
        ingredients: Sequence[Ingredient],
        member: Member,
        command: SoupCommand,
        *,
        device: torch.device,
        directory: Path,
    ):
        self.ingredients, self.member, self.command, self.device = ingredients, member, command, device
        self.names: RowNames = row_names(member, command.cache_dir)
        self.training: TrainingPass | None = None  # where BatchNorm's statistics are estimated anew
        self._model = load_weights(member.weights)
        self._predicted: dict[Chosen, PredictedRows] = {}
        self._statistics: dict[Chosen, list[Tensor]] = {}
        if needs_statistics(self._model, [one.weights.config for one in ingredients]):
            self.training = open_training_pass(member, command)
        elif command.train or command.bn_batches:
            raise InputError(
                f"{'--train' if command.train else '--bn-batches'} is given, and {member.run_uri} has no BatchNorm "
                "that learns: no statistics are estimated; leave it out"
            )
        self._paths = fetch(ingredients, directory)

    def predict(self, chosen: Chosen) -> PredictedRows:
        """Return what the mean of these predicts of the validation set, rows in ascending order."""
        if chosen in self._predicted:
            return self._predicted[chosen]
        model, how = self.make(chosen), self.command
        with progress_bar(f"predicting {self.name(chosen)}", self.member.val.rows) as advance:
            predicted = predict_member(
                self.member, device=self.device, batch=how.batch, workers=how.workers, cache_dir=how.cache_dir,
                progress=advance, model=model)  # fmt: skip
        check_finite(predicted.predictions, self.names.images, source=self.name(chosen))
        print(f"{self.name(chosen)}: {FIRST.title} {scores(sums_of(predicted))[FIRST.key]:.4f}", flush=True)
        self._predicted[chosen] = predicted
        return predicted

    def make(self, chosen: Chosen) -> nn.Module:
        """Return the model with the mean of these weights, on the device. The next call changes it.

        Of one checkpoint it is that, with the statistics that it was evaluated with.
        """
        taken = [self.ingredients[place] for place in chosen]
        newest = self._paths[chosen[taken.index(newest_of(taken))]]
        self._model.load_state_dict(load_mean([self._paths[place] for place in chosen], newest))
        model = self._model.to(self.device).eval()
        if self.training and len(chosen) > 1:
            self._give_statistics(model, self.training, chosen)
        if wrong := non_finite(model):
            raise InputError(
                f"the weights of {self.name(chosen)} are not finite ({', '.join(wrong[:3])}); leave the checkpoint out "
                "that has what is not finite"
            )
        return model

    def _give_statistics(self, model: nn.Module, training: TrainingPass, chosen: Chosen) -> None:
        """Estimate BatchNorm's statistics with these weights, or write those that were."""
        norms = find_trained_norms(model)
        buffers = [buffer for norm in norms.values() for buffer in norm.buffers()]
        if chosen in self._statistics:
            for buffer, known in zip(buffers, self._statistics[chosen]):
                buffer.copy_(known)
            return
        with progress_bar(f"BatchNorm of {self.name(chosen)}", training.num_samples) as advance:
            estimate_statistics(model, training, device=self.device, progress=advance)
        self._statistics[chosen] = [buffer.clone() for buffer in buffers]

    def name(self, chosen: Chosen) -> str:
        """Say of what this is the mean."""
        if len(chosen) == len(self.ingredients) > 1:
            return f"mean of all {len(chosen)}"
        return " + ".join(self.ingredients[place].name for place in chosen)
