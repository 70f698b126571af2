"""What reads sequences: a transformer, an LSTM, a GRU, convolutions in time; and layers of every row by itself.

Every encoder is `forward(x, valid) -> (N, T, width)` of vectors x (N, T, D), finite everywhere, and of `valid` (N, T)
bool, whose padding is at the end. What comes out for a row depends on the valid rows of its own sequence alone: not on
padding, and not on the other sequences of the batch. On padding anything finite comes out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mtl_dist.model_config import RECURRENT, SequenceConfig

KERNEL = 3  # rows that a convolution reads


class Transformer(nn.Module):
    """Layers as first published (arXiv 1706.03762): ReLU, each norm after its residual, and no norm after the last."""

    def __init__(self, width: int, *, layers: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.width = width
        # Each is built by itself: `nn.TransformerEncoder` copies one, with its weights.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, ffn, dropout, activation="relu", batch_first=True)
            for _ in range(layers)
        )

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        # What has no valid row attends to its padding: a softmax over nothing would be NaN.
        hidden = ~valid & valid.any(1, keepdim=True)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=hidden)
        return x


class Recurrent(nn.Module):
    """torch's LSTM or GRU, one-way or both ways, over the whole of every sequence and from zero states.

    Dropout is between layers, and after the last one of a GRU, as it was published (arXiv 2207.09373's code).
    """

    def __init__(self, kind: str, in_width: int, hidden: int, *, layers: int, bidirectional: bool, dropout: float):
        super().__init__()
        self.width = hidden * (2 if bidirectional else 1)
        between = dropout if layers > 1 else 0.0
        family = nn.LSTM if kind == "lstm" else nn.GRU
        self.rnn = family(in_width, hidden, layers, batch_first=True, dropout=between, bidirectional=bidirectional)
        self.dropout = nn.Dropout(dropout if kind == "gru" else 0.0)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        lengths = valid.sum(1).clamp_min(1).cpu()  # what has no valid row is read for one, which nobody looks at
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.dropout(states)


class Convolutional(nn.Module):
    """Residual blocks of two convolutions whose reach doubles from block to block (arXiv 1803.01271).

    They are centred, not causal: a row knows as much of what follows as of what went before. Before every convolution
    padding is made zero, which is what lies beyond a sequence's ends.
    """

    def __init__(self, width: int, *, layers: int, dropout: float):
        super().__init__()
        self.width = width
        self.blocks = nn.ModuleList(ConvolutionBlock(width, dilation=2**i, dropout=dropout) for i in range(layers))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, valid[..., None])
        return x


class PerRow(nn.Sequential):
    """Fully connected layers of every row by itself."""

    def __init__(self, width: int, *, layers: int, dropout: float):
        super().__init__()
        self.width = width
        for _ in range(layers):
            self.extend([nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout)])

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return super().forward(x)


class ConvolutionBlock(nn.Module):
    """(N, T, width) -> the same; `there` (N, T, 1) bool. A norm of every row by itself follows the residual."""

    def __init__(self, width: int, *, dilation: int, dropout: float):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(width, width, KERNEL, padding="same", dilation=dilation) for _ in range(2))
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(width)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        found = x
        for conv in self.convs:
            rows = torch.where(there, found, 0.0).transpose(1, 2)
            found = self.dropout(torch.relu(conv(rows).transpose(1, 2)))
        return self.norm(x + found)


class Embedded(nn.Module):
    """An encoder over a linear layer, which makes vectors as wide as it wants them; with their positions, or with none
    where `num_positions`, the rows of the longest sequence in training, is 0."""

    def __init__(self, in_width: int, encoder: nn.Module, *, num_positions: int):
        super().__init__()
        self.width = encoder.width
        self.register_buffer("positions", sinusoid(num_positions, encoder.width), persistent=False)
        self.embed = nn.Linear(in_width, encoder.width)
        self.encoder = encoder

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = self.embed(x)
        if len(self.positions):
            x = x + self._positions(x.shape[1]).to(x)
        return self.encoder(x, valid)

    def _positions(self, length: int) -> Tensor:
        """Return those of a sequence; of one that is longer than training's they come from the host."""
        return self.positions[:length] if length <= len(self.positions) else sinusoid(length, self.width)


def sinusoid(length: int, width: int) -> Tensor:
    """Return positions (length, width), sin and cos by turns of row / 10000^(2 (i // 2) / width) (arXiv 1706.03762)."""
    places = torch.arange(width)
    rates = 10000 ** (-2 * (places // 2) / width)
    angles = torch.arange(length)[:, None] * rates
    return torch.where(places % 2 == 0, angles.sin(), angles.cos())


def build_layers(config: SequenceConfig, in_width: int, *, layers: int, dropout: float) -> nn.Module:
    """Build so many layers of the configured encoder. The width of a recurrent one is its own; others keep theirs."""
    if config.encoder in RECURRENT:
        how = {"layers": layers, "bidirectional": config.bidirectional, "dropout": dropout}
        return Recurrent(config.encoder, in_width, config.hidden, **how)
    if config.encoder == "tcn":
        return Convolutional(in_width, layers=layers, dropout=dropout)
    if config.encoder == "frame":
        return PerRow(in_width, layers=layers, dropout=dropout)
    heads = in_width // (config.hidden // config.heads)
    return Transformer(in_width, layers=layers, heads=heads, ffn=config.ffn, dropout=dropout)


def build_trunk(config: SequenceConfig, in_width: int, *, layers: int, dropout: float) -> nn.Module:
    """Build the encoder of all tasks: it makes (N, T, in_width) as wide as is configured."""
    if config.encoder in RECURRENT:
        return build_layers(config, in_width, layers=layers, dropout=dropout)
    encoder = build_layers(config, config.hidden, layers=layers, dropout=dropout)
    num_positions = config.window + config.context if config.encoder == "transformer" else 0
    return Embedded(in_width, encoder, num_positions=num_positions)
