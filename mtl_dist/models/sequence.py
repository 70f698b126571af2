"""System C (Zhang et al. 2022, arXiv 2207.09373, and its code): encoders of whole videos, and frameworks of tasks.

frames -> features -> trunk h (B, T, width)
share          task = head(h)
share_bottom   task = head(layers of its own(h))
feedback       a task that is fed has [h; f of every source] in the place of h, f detached: what the source's head makes
               of it before its last layer. It goes with either framework.

There are four heads: valence, arousal, expressions, action units. Positions are the rows' numbers in a window; frame
numbers are not in a batch. What differs from the code as released: padding is masked, positions are added once and
begin with sin 0, cos 0, layers that nothing reads are not built, and valence and arousal end in a tanh.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from mtl_dist.model_config import PARTS, RECURRENT, SequenceConfig
from mtl_dist.models.backbone import Backbone
from mtl_dist.models.encoders import build_layers, build_trunk
from mtl_dist.models.per_frame import channels_last, laid_out, of_no_samples
from mtl_dist.tasks import NUM_AUS, NUM_EXPRESSIONS, Outputs

OUT_WIDTHS = {"v": 1, "a": 1, "expr": NUM_EXPRESSIONS, "au": NUM_AUS}
INIT_STD, INIT_WIDTH = 0.02, 1024  # of the weights of linear layers, of encoders of the width that was published
# What evaluation passes through at once: beside inputs and outputs its memory does not grow with a video's length.
WINDOWS_AT_ONCE, IMAGES_AT_ONCE = 64, 64


class Head(nn.Module):
    """Fully connected layers of one task, after an encoder: (..., D) -> its hidden state (..., widths[-1])."""

    def __init__(self, in_width: int, widths: tuple[int, ...], out_width: int, dropout: float):
        super().__init__()
        layers: list[nn.Module] = [nn.Dropout(dropout)]
        for i, o in itertools.pairwise((in_width, *widths)):
            layers += [nn.Linear(i, o), nn.ReLU(), nn.Dropout(dropout)]
        self.hidden = nn.Sequential(*layers)
        self.last = nn.Linear(widths[-1], out_width)


class SequenceNet(nn.Module):
    """System C over rows of features (B, T, D), or over images (B, T, 3, H, W) of which a backbone makes them."""

    def __init__(self, backbone: Backbone, *, dropout: float, sequence: SequenceConfig, input_size: int | None = None):
        super().__init__()
        self.backbone, self.config = backbone, sequence
        # A recurrent network reads the whole video at once; the others were trained on windows, and read such.
        self.reads_windows = sequence.encoder not in RECURRENT
        is_shared = sequence.framework == "share"
        private = 0 if is_shared else sequence.private_layers
        self.trunk = build_trunk(sequence, backbone.num_channels, layers=sequence.layers - private, dropout=dropout)
        told = len(sequence.feed_source) * sequence.head_widths[-1]
        self.own, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for part in PARTS:
            width = self.trunk.width + told * (part in sequence.feed_target)
            if not is_shared:
                self.own[part] = build_layers(sequence, width, layers=private, dropout=dropout)
                width = self.own[part].width
            self.heads[part] = Head(width, sequence.head_widths, OUT_WIDTHS[part], dropout)
        # Narrower ones in proportion: with weights that small they would learn nothing for many epochs.
        _draw(self.trunk, self.own, self.heads, std=INIT_STD * (INIT_WIDTH / sequence.hidden) ** 0.5)

    def forward(self, inputs: Tensor, valid: Tensor) -> Outputs:
        """Predict the valid rows of (B, T, D) features or (B, T, 3, H, W) images; `valid` (B, T) bool, padding last.

        No video knows of another. What is padding has zeros. In training a sample is one window; in evaluation it is a
        whole video, of any length. A rank without samples has empty outputs, whose gradients are zero.
        """
        if not len(inputs):
            return of_no_samples(self, inputs)
        features = self._features(inputs, valid)
        in_windows = self.reads_windows and not self.training and features.shape[1] > self.config.window
        outputs = self._predict_windows(features, valid) if in_windows else self._predict(features, valid)
        return Outputs(*(torch.where(valid[..., None], output, 0.0) for output in outputs))

    def _features(self, inputs: Tensor, valid: Tensor) -> Tensor:
        """Return (B, T, C), with zeros on padding. Images become the means over the cells of a backbone's features."""
        if inputs.ndim == 3:
            return torch.where(valid[..., None], self.backbone(inputs), 0.0)
        frames = inputs[valid]
        # BatchNorm takes its statistics of all frames of a batch.
        parts = (frames,) if self.training else frames.split(IMAGES_AT_ONCE)
        return laid_out(torch.cat([self.backbone(channels_last(part)).mean((2, 3)) for part in parts]), valid)

    def _predict(self, features: Tensor, valid: Tensor) -> Outputs:
        """Predict rows that are read as one sequence each; on padding is anything."""
        shared, hidden, told = self.trunk(features, valid), {}, {}
        for part in sorted(PARTS, key=self.config.feed_target.__contains__):  # those that are fed come last
            states = shared
            if part in self.config.feed_target:
                states = torch.cat([shared, *(hidden[source].detach() for source in self.config.feed_source)], -1)
            if part in self.own:
                states = self.own[part](states, valid)
            hidden[part] = self.heads[part].hidden(states)
            told[part] = self.heads[part].last(hidden[part])
        return Outputs(torch.tanh(torch.cat([told["v"], told["a"]], -1)), told["expr"], told["au"])

    def _predict_windows(self, features: Tensor, valid: Tensor) -> Outputs:
        """Predict videos longer than a window: of every row the mean over the windows that it is in.

        What is averaged are VA and logits, by weights that fall from a window's middle to its ends.
        """
        size, device = self.config.window, features.device
        windows = [
            (video, begin, min(size, length - begin))
            for video, length in enumerate(valid.sum(1).tolist())
            for begin in window_begins(length, size)
        ]
        if not windows:
            return self._predict(features, valid)
        steps, last = torch.arange(size, device=device), features.shape[1] - 1
        sums = weights = None
        for part in torch.tensor(windows, device=device).split(WINDOWS_AT_ONCE):
            video, begin, length = part[..., None].unbind(1)  # (n, 1) each
            there, places = steps < length, (video, (begin + steps).clamp_max(last))
            told = torch.cat(self._predict(features[places], there), -1)
            told = told.to(torch.promote_types(told.dtype, torch.float32))
            weight = torch.minimum(steps + 1, length - steps).clamp_min(0).to(told)[..., None]
            sums = told.new_zeros(*valid.shape, told.shape[-1]) if sums is None else sums
            weights = told.new_zeros(*valid.shape, 1) if weights is None else weights
            sums = sums.index_put(places, told * weight, accumulate=True)
            weights = weights.index_put(places, weight, accumulate=True)
        return Outputs(*(sums / weights.clamp_min(1)).split((2, NUM_EXPRESSIONS, NUM_AUS), -1))


def window_begins(length: int, size: int) -> list[int]:
    """Return where the windows of a video of `length` rows begin: half a window apart, the last one up to its end.

    Each has `size` rows, or the video's where it is shorter. Nothing else than the video's own length counts.
    """
    if length <= size:
        return [0] if length else []
    return [*range(0, length - size, size // 2), length - size]


def _draw(*modules: nn.Module, std: float) -> None:
    """Draw the weights of linear layers from a normal; those of attention and of RNNs are torch's."""
    for module in itertools.chain.from_iterable(module.modules() for module in modules):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)
