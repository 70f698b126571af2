"""System C: encoders of whole videos, exact whatever a video is padded with, and frameworks of tasks."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtl_dist.config import build_config
from mtl_dist.errors import InputError
from mtl_dist.models import build_model, num_parameters, sequence
from mtl_dist.models.backbones import build_backbone
from mtl_dist.models.encoders import Convolutional, Recurrent, Transformer, sinusoid
from mtl_dist.models.sequence import window_begins
from mtl_dist.objective.affect import Affect
from mtl_dist.objective.losses import add_sums
from mtl_dist.objective.module import ObjectiveModule
from mtl_dist.presets import load_preset
from mtl_dist.sections import LossConfig
from tests.test_objective import COUNTS
from tests.test_recipes import assert_close_losses, config_of, run_ranks
from tests.test_training import losses
from tests.windows import DIMS, all_valid, make_windows

D, WINDOW = sum(DIMS), 8
ENCODERS = {
    "transformer": {"encoder": "transformer"},
    "lstm": {"encoder": "lstm"},
    "gru": {"encoder": "gru"},
    "two-way lstm": {"encoder": "lstm", "bidirectional": True},
    "two-way gru": {"encoder": "gru", "bidirectional": True},
    "tcn": {"encoder": "tcn"},
    "frame": {"encoder": "frame"},
}
FRAMEWORKS = {
    "share": {},
    "share bottom": {"framework": "share_bottom"},
    "share with feedback": {"feed_source": ["v", "au"], "feed_target": ["a"]},
    "share bottom with feedback": {
        "framework": "share_bottom",
        "feed_source": ["au", "expr"],
        "feed_target": ["v", "a"],
    },
}
SMALL = {
    "hidden": 16,
    "layers": 3,
    "private_layers": 1,
    "heads": 4,
    "ffn": 24,
    "head_widths": [12, 8],
    "window": WINDOW,
}
LENGTHS = (23, 9, 1, 8, 17, 2)
IN_WINDOWS = ("transformer", "tcn", "frame")


def settings_of(dropout=0.0, backbone="features", **changes):
    own = SMALL | {"dims": DIMS} | changes
    settings = {"name": "c", "backbone": backbone, "weights": "none", "dropout": dropout, "sequence": own}
    return build_config({"model": settings}).model


def make(encoder="transformer", framework="share", **changes):
    return build_model(settings_of(**ENCODERS[encoder], **FRAMEWORKS[framework], **changes), seed=3)


def each(function):
    """All encoders in all frameworks."""
    for name, values in (("framework", FRAMEWORKS), ("encoder", ENCODERS)):
        function = pytest.mark.parametrize(name, values)(function)
    return function


def run(model, batch):
    with torch.no_grad():
        return model(batch.inputs, batch.valid)


# --- What was published -----------------------------------------------------------------------------------------------


def count(**changes):
    settings = {"name": "c", "backbone": "features", "weights": "none", "sequence": {"dims": [1024]} | changes}
    with torch.device("meta"):  # 135 M parameters need not be drawn
        return num_parameters(build_model(build_config({"model": settings}).model))


def test_the_frameworks_have_the_published_numbers_of_parameters():
    fed = {"feed_source": ["v", "au"], "feed_target": ["a"]}
    assert count() == 37_279_254
    assert count(framework="share_bottom") == 112_878_102
    assert count(framework="share_bottom", **fed) == 135_174_166
    assert count(dims=[1024, 512]) - count() == 512 * 1024


def test_recurrent_encoders_have_the_published_numbers_of_parameters():
    """Of 512, one layer of LSTM before heads of 256 and 256, or two of GRU before 512 and 256."""
    assert count(encoder="lstm", hidden=512, layers=1, head_widths=[256, 256]) == 3_943_958
    assert count(encoder="gru", hidden=512, layers=2) == 5_519_894


@pytest.mark.parametrize(("preset", "expected"), [("c", 37_279_254), ("c-paper", 135_174_166)])
def test_a_preset_of_the_paper_has_its_number_of_parameters(preset, expected):
    config = build_config(load_preset(preset), {"model": {"sequence": {"dims": [1024]}}})
    with torch.device("meta"):
        assert num_parameters(build_model(config.model)) == expected


def test_linear_layers_begin_as_published_and_the_layers_of_an_encoder_differ():
    model = make("transformer", "share bottom", hidden=64, heads=4, layers=4, private_layers=2)
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    drawn = torch.cat([linear.weight.detach().flatten() for _, linear in linears])
    assert float(drawn.std()) == pytest.approx(0.02 * (1024 / 64) ** 0.5, rel=0.03)
    assert not any(linear.bias.any() for _, linear in linears)
    first, second = model.trunk.encoder.layers
    assert not torch.equal(first.self_attn.in_proj_weight, second.self_attn.in_proj_weight)
    bound = math.sqrt(6 / (64 + 3 * 64))  # Xavier's, torch's for the attention's own
    assert float(first.self_attn.in_proj_weight.detach().abs().max()) == pytest.approx(bound, rel=0.02)


def test_positions_are_the_standard_ones():
    found = sinusoid(50, 6).double()
    for row, i in itertools.product((0, 1, 7, 49), range(6)):
        angle = row / 10000 ** (2 * (i // 2) / 6)
        assert float(found[row, i]) == pytest.approx(math.cos(angle) if i % 2 else math.sin(angle), abs=1e-5)
    assert sinusoid(3, 5).shape == (3, 5)


def test_positions_are_added_once_before_the_first_layer():
    """Without attention to be had between two equal rows, only positions tell them apart."""
    model, rows = make("transformer", "share bottom").double().eval(), torch.ones(1, 2, D, dtype=torch.float64)
    valid = all_valid(rows)
    embedded = model.trunk.embed(rows) + sinusoid(2, 16).double()
    with torch.no_grad():
        trunk = model.trunk.encoder(embedded, valid)
        torch.testing.assert_close(model.trunk(rows, valid), trunk)
        for part in ("v", "a", "expr", "au"):
            states = model.own[part](trunk, valid)
            logits = model.heads[part].last(model.heads[part].hidden(states))
            outputs = model(rows, valid)
            found = {"v": outputs.va[..., :1].atanh(), "a": outputs.va[..., 1:].atanh()}
            found |= {"expr": outputs.expr_logits, "au": outputs.au_logits}
            torch.testing.assert_close(found[part], logits)


# --- Encoders against torch's and against formulas --------------------------------------------------------------------


def sequences(width, dtype=torch.float64, lengths=LENGTHS):
    """(N, T, width) with garbage on padding, and who is valid."""
    batch = make_windows((width,), lengths=lengths, dtype=dtype)
    return torch.where(batch.valid[..., None], batch.inputs, 7.0), batch.valid


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_recurrent_encoder_is_torchs_over_each_sequence_without_padding(kind, both_ways):
    torch.manual_seed(0)
    encoder = Recurrent(kind, 5, 6, layers=2, bidirectional=both_ways, dropout=0.3).double().eval()
    reference = (nn.LSTM if kind == "lstm" else nn.GRU)(5, 6, 2, batch_first=True, bidirectional=both_ways).double()
    reference.load_state_dict(encoder.rnn.state_dict())
    x, valid = sequences(5)
    found = encoder(x, valid)
    assert found.shape[-1] == encoder.width == (12 if both_ways else 6)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(found[row, :length], reference(x[row : row + 1, :length])[0][0], rtol=0, atol=1e-12)


def test_dropout_is_between_layers_and_after_a_gru_as_published():
    torch.manual_seed(0)
    x, valid = torch.randn(3, 40, 5), torch.ones(3, 40, dtype=torch.bool)
    for kind, layers, zeros in (("gru", 1, True), ("gru", 2, True), ("lstm", 1, False), ("lstm", 2, False)):
        encoder = Recurrent(kind, 5, 6, layers=layers, bidirectional=False, dropout=0.3).train()
        assert encoder.rnn.dropout == (0.3 if layers > 1 else 0.0)
        assert bool((encoder(x, valid) == 0).any()) == zeros


def test_a_transformer_is_torchs_over_each_sequence_without_padding():
    torch.manual_seed(0)
    encoder = Transformer(16, layers=2, heads=4, ffn=24, dropout=0.3).double().eval()
    layer = nn.TransformerEncoderLayer(16, 4, 24, 0.3, batch_first=True)
    reference = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    reference.load_state_dict(encoder.state_dict())
    x, valid = sequences(16)
    found = encoder(x, valid)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(found[row, :length], reference(x[row : row + 1, :length])[0], rtol=0, atol=1e-12)


def test_one_layer_of_a_transformer_is_the_written_out_formula():
    torch.manual_seed(0)
    width, heads, length = 6, 2, 5
    encoder = Transformer(width, layers=1, heads=heads, ffn=7, dropout=0.0).double()
    (layer,), x = encoder.layers, torch.randn(length, width, dtype=torch.float64)
    for parameter in encoder.parameters():  # biases and norms that do something
        nn.init.normal_(parameter)
    q, k, v = (x @ layer.self_attn.in_proj_weight.T + layer.self_attn.in_proj_bias).split(width, -1)
    mixed = []
    for at in range(heads):
        part = slice(at * width // heads, (at + 1) * width // heads)
        weights = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(width // heads), -1)
        mixed.append(weights @ v[:, part])
    attended = torch.cat(mixed, -1) @ layer.self_attn.out_proj.weight.T + layer.self_attn.out_proj.bias

    def normed(values, norm):
        spread = values.var(-1, correction=0, keepdim=True) + norm.eps
        return (values - values.mean(-1, keepdim=True)) / spread.sqrt() * norm.weight + norm.bias

    y = normed(x + attended, layer.norm1)
    inner = torch.relu(y @ layer.linear1.weight.T + layer.linear1.bias)
    expected = normed(y + inner @ layer.linear2.weight.T + layer.linear2.bias, layer.norm2)
    torch.testing.assert_close(encoder(x[None], torch.ones(1, length, dtype=torch.bool))[0], expected)


def test_convolutions_are_centred_and_reach_as_far_as_their_blocks_say():
    torch.manual_seed(0)
    encoder = Convolutional(16, layers=3, dropout=0.0).double()
    x = torch.randn(1, 61, 16, dtype=torch.float64, requires_grad=True)
    encoder(x, torch.ones(1, 61, dtype=torch.bool))[0, 30, 0].backward()
    seen = x.grad.abs().sum(-1)[0].nonzero().flatten().tolist()
    reach = 2 * (1 + 2 + 4)  # two convolutions a block
    assert (seen[0], seen[-1]) == (30 - reach, 30 + reach)


# --- Padding and batch-mates ------------------------------------------------------------------------------------------


@each
def test_a_video_alone_is_the_same_in_any_batch_and_in_training(encoder, framework):
    """float32, videos shorter and longer than a window, not-a-number on padding."""
    model, batch = make(encoder, framework), make_windows((D,), lengths=LENGTHS)
    for is_training in (False, True):
        model.train(is_training)
        together = run(model, batch)
        assert not any(output[~batch.valid].any() for output in together)
        for row, length in enumerate(LENGTHS):
            inputs = batch.inputs[row : row + 1, :length]
            alone = run(model, batch._replace(inputs=inputs, valid=all_valid(inputs)))
            for mine, theirs in zip(together, alone, strict=True):
                torch.testing.assert_close(mine[row, :length], theirs[0], rtol=0, atol=1e-6)


@each
def test_what_is_predicted_with_gradients_and_without_is_the_same(encoder, framework):
    """torch has a faster way for transformers without gradients."""
    model, batch = make(encoder, framework).eval(), make_windows((D,), lengths=LENGTHS)
    for mine, theirs in zip(model(batch.inputs, batch.valid), run(model, batch), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@each
def test_gradients_of_padded_videos_are_those_of_the_videos_and_finite(encoder, framework):
    model, batch = make(encoder, framework).double(), make_windows((D,), lengths=LENGTHS, dtype=torch.float64)
    whole, found = copy.deepcopy(model), {}
    sum(output.square().sum() for output in whole(batch.inputs, batch.valid)).backward()
    for row, length in enumerate(LENGTHS):
        inputs = batch.inputs[row : row + 1, :length]
        sum(output.square().sum() for output in model(inputs, all_valid(inputs))).backward()
    found = dict(model.named_parameters())
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parameter.grad, found[name].grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("training", [False, True])
@each
def test_samples_without_rows_and_of_one_row_are_no_trouble(encoder, framework, training):
    model = make(encoder, framework).train(training)
    for lengths in ((1,), (0, 1), (0, 0), (0, 3, 20)):
        length = max(*lengths, 1)
        valid = torch.arange(length) < torch.tensor(lengths)[:, None]
        inputs = torch.where(valid[..., None], 1.0, float("nan")).expand(-1, -1, D)
        model.zero_grad()
        outputs = model(inputs, valid)
        assert [output.shape[-1] for output in outputs] == [2, 8, 12]
        assert not any(output[~valid].any() for output in outputs)
        with torch.no_grad():
            assert all(torch.isfinite(output).all() for output in (*outputs, *model(inputs, valid)))
        sum(output.sum() for output in outputs).backward()
        for name, parameter in model.named_parameters():
            assert torch.isfinite(parameter.grad).all(), name
            assert any(lengths) or not parameter.grad.any(), name


@each
def test_a_rank_without_samples_has_empty_outputs_and_zero_gradients(encoder, framework):
    model = make(encoder, framework)
    outputs = model(torch.zeros(0, 5, D), torch.zeros(0, 5, dtype=torch.bool))
    assert [tuple(output.shape) for output in outputs] == [(0, 5, 2), (0, 5, 8), (0, 5, 12)]
    sum(output.sum() for output in outputs).backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


@pytest.mark.parametrize("encoder", ENCODERS)
def test_autocast_to_bfloat16_stays_close_to_float32(encoder):
    model, batch = make(encoder).eval(), make_windows((D,), lengths=LENGTHS)
    exact = run(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = run(model, batch)
    for one, other in zip(exact, rough, strict=True):
        torch.testing.assert_close(other.float(), one, rtol=0.05, atol=0.02)


# --- Evaluation of whole videos ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 8, 9])
def test_windows_of_a_video_cover_every_row_and_overlap_by_half(size):
    assert window_begins(0, size) == []
    for length in range(1, 60):
        begins = window_begins(length, size)
        assert begins[0] == 0
        assert begins[-1] == max(length - size, 0)
        assert begins == sorted(set(begins))
        assert all(after - before <= size // 2 for before, after in itertools.pairwise(begins))
        assert {row for begin in begins for row in range(begin, min(begin + size, length))} == set(range(length))


@pytest.mark.parametrize("encoder", IN_WINDOWS)
def test_a_long_video_is_the_weighted_mean_of_its_windows_and_not_more_than_some_at_once(encoder, monkeypatch):
    model, length = make(encoder, "share bottom with feedback").double().eval(), 27
    rows = torch.randn(1, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sums, weights = torch.zeros(length, 22, dtype=torch.float64), torch.zeros(length, 1, dtype=torch.float64)
    for begin in (0, 4, 8, 12, 16, 19):
        part = rows[:, begin : begin + WINDOW]
        told = torch.cat(model(part, all_valid(part)), -1)[0]
        weight = torch.tensor([1, 2, 3, 4, 4, 3, 2, 1], dtype=torch.float64)[:, None]
        sums[begin : begin + WINDOW] += weight * told
        weights[begin : begin + WINDOW] += weight
    for at_once in (1, 4, 64):
        monkeypatch.setattr(sequence, "WINDOWS_AT_ONCE", at_once)
        found = torch.cat(model(rows, all_valid(rows)), -1)[0]
        torch.testing.assert_close(found, sums / weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("encoder", IN_WINDOWS)
def test_the_mean_of_a_constant_over_windows_is_the_constant(encoder):
    model, batch = make(encoder).eval(), make_windows((D,), lengths=(40, 9, 31))
    for part, head in model.heads.items():
        nn.init.zeros_(head.last.weight)
        nn.init.constant_(head.last.bias, {"v": 0.3, "a": -0.2, "expr": 1.7, "au": -2.3}[part])
    outputs = run(model, batch)
    valence = math.tanh(0.3)
    assert torch.allclose(outputs.va[..., 0][batch.valid], torch.tensor(valence), rtol=0, atol=1e-6)
    assert torch.allclose(outputs.expr_logits[batch.valid], torch.tensor(1.7), rtol=0, atol=1e-6)
    assert torch.allclose(outputs.au_logits[batch.valid], torch.tensor(-2.3), rtol=0, atol=1e-6)


def test_a_training_sample_is_one_sequence_whatever_context_it_has():
    model, last = make("transformer", context=4), WINDOW + 4 - 1
    for is_training in (True, False):
        rows = torch.randn(1, WINDOW + 4, D, requires_grad=True, generator=torch.Generator().manual_seed(0))
        model.train(is_training)(rows, all_valid(rows)).va[0, 0].sum().backward()
        assert bool(rows.grad[0, last].any()) == is_training


@pytest.mark.parametrize("encoder", [name for name in ENCODERS if name not in IN_WINDOWS])
def test_a_recurrent_network_reads_a_whole_video_at_once(encoder):
    model, batch = make(encoder), make_windows((D,), lengths=LENGTHS)
    in_training = run(model.train(), batch)
    for mine, theirs in zip(run(model.eval(), batch), in_training, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_one_way_network_with_full_context_has_a_window_of_the_whole_video():
    model, batch = make("gru").eval(), make_windows((D,), lengths=(40,))
    whole, upto = run(model, batch), batch.inputs[:, :25]
    part = run(model, batch._replace(inputs=upto, valid=all_valid(upto)))
    for mine, theirs in zip(part, whole, strict=True):
        torch.testing.assert_close(mine, theirs[:, :25], rtol=0, atol=1e-6)


# --- Feedback, and gradients of many ranks ----------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["share with feedback", "share bottom with feedback"])
def test_feedback_has_no_gradients_to_what_feeds_and_the_trunk_has_some(framework):
    model, batch = make("transformer", framework), make_windows((D,), lengths=LENGTHS)
    fed, sources = model.config.feed_target, model.config.feed_source
    va = model(batch.inputs, batch.valid).va
    va[..., "va".index(fed[-1])].square().sum().backward()
    moved = {
        name.partition(".")[0] + "." + name.split(".")[1]
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    assert {"trunk.embed", "trunk.encoder", f"heads.{fed[-1]}"} <= moved
    assert not {f"{kind}.{source}" for kind in ("own", "heads") for source in sources} & moved


def test_a_task_that_is_fed_hears_of_what_feeds_it():
    model, batch = make("gru", "share with feedback").eval(), make_windows((D,), lengths=LENGTHS)
    before = run(model, batch)
    nn.init.normal_(model.heads["au"].hidden[-3].weight)
    after = run(model, batch)
    assert torch.equal(before.va[..., 0], after.va[..., 0])
    assert torch.equal(before.expr_logits, after.expr_logits)
    assert not torch.allclose(before.va[..., 1], after.va[..., 1])


def gradients_of(module, batches, parts):
    """The mean of the gradients of so many ranks (or micro-batches), each of which has the sums of all."""
    total = None
    for batch in batches:
        total = add_sums(total, module.sums(batch))
    for batch in batches:
        (module(batch, total, parts=parts).total / parts).backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.whole
@each
def test_gradients_of_one_two_three_and_eight_ranks_are_the_same(encoder, framework):
    """Eight ranks for six windows: two have none."""
    config = LossConfig(va=0.7, va_mse=0.5, au=2.0, expr_weights="balanced", au_weights="balanced")
    model = make(encoder, framework).double()
    batch, expected = make_windows((D,), lengths=LENGTHS, dtype=torch.float64), None
    for ranks in (1, 2, 3, 8):
        module = ObjectiveModule(copy.deepcopy(model), Affect(config, COUNTS))
        places = torch.arange(len(LENGTHS)).tensor_split(ranks)
        found = gradients_of(module, [batch.take(part) for part in places], ranks)
        expected = expected or found
        assert all(gradient is not None for gradient in found.values())
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-14, msg=f"{ranks}: {name}")


def test_dropout_is_drawn_in_training_alone():
    model, batch = make("tcn", "share bottom", dropout=0.4), make_windows((D,), lengths=LENGTHS)
    assert not torch.equal(run(model.train(), batch).va, run(model, batch).va)
    assert torch.equal(run(model.eval(), batch).va, run(model, batch).va)


# --- What it reads ----------------------------------------------------------------------------------------------------


def test_features_are_standardised_by_what_training_found_and_its_state_has_it():
    model = make("gru")
    mean, std = torch.linspace(-1, 1, D), torch.linspace(0, 2, D)  # the first is constant
    model.backbone.learn_inputs(mean, std)
    rows = torch.randn(4, 3, D)
    expected = (rows - mean) / torch.where(std > 0, std, torch.ones(()))
    torch.testing.assert_close(model.backbone(rows), expected)
    again = make("gru")
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.backbone(rows), expected)
    assert num_parameters(model.backbone) == 0
    with pytest.raises(InputError, match=f"features of 5 numbers a row, and the model is built for {D}"):
        model.backbone.learn_inputs(torch.zeros(5), torch.ones(5))


def test_a_backbone_of_images_has_nothing_to_learn_of_its_inputs():
    backbone = build_backbone("vgg_small")
    before = copy.deepcopy(backbone.state_dict())
    backbone.learn_inputs(torch.ones(3), torch.ones(3))
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_sets_whose_widths_nobody_said_are_no_inputs():
    with pytest.raises(InputError, match=r"model\.sequence\.dims is empty.*training fills it in from data\.train"):
        build_model(settings_of(dims=[]))


@pytest.mark.parametrize("encoder", ["transformer", "two-way gru"])
def test_windows_of_images_are_read_by_any_backbone_and_padding_is_seen_by_none(encoder, monkeypatch):
    """In training too: BatchNorm's statistics are those of the frames that are there."""
    settings = settings_of(**ENCODERS[encoder], backbone="vgg_small", dims=[])
    model = build_model(settings, input_size=32).double()
    lengths = (3, 1, 12)
    batch = make_windows((3, 32, 32), lengths=lengths, dtype=torch.float64)
    frames = batch.inputs[batch.valid]
    own = copy.deepcopy(model)
    outputs = own(batch.inputs, batch.valid)
    sum(output.square().sum() for output in outputs).backward()
    assert all(torch.isfinite(p.grad).all() for p in own.parameters())
    plain = copy.deepcopy(model.backbone)
    plain(frames)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(own.backbone.get_buffer(name), value, msg=name)

    model.eval()
    monkeypatch.setattr(sequence, "IMAGES_AT_ONCE", 5)
    together = run(model, batch)
    features = torch.zeros(3, 12, 96, dtype=torch.float64)
    features[batch.valid] = model.backbone(frames).mean((2, 3)).detach()
    assert model._features(batch.inputs, batch.valid).shape == features.shape
    torch.testing.assert_close(model._features(batch.inputs, batch.valid), features)
    for row, length in enumerate(lengths):
        inputs = batch.inputs[row : row + 1, :length]
        alone = run(model, batch._replace(inputs=inputs, valid=all_valid(inputs)))
        for mine, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(mine[row, :length], theirs[0])
    empty = model(batch.inputs[:0], batch.valid[:0])
    assert [tuple(output.shape) for output in empty] == [(0, 12, 2), (0, 12, 8), (0, 12, 12)]


# --- Its loss ---------------------------------------------------------------------------------------------------------


def test_the_square_error_of_valence_and_arousal_can_be_all_of_their_loss():
    objective = Affect(LossConfig(va=24.0, expr=0.35, va_ccc=0.0, va_mse=1.0), COUNTS)
    model, batch = make("gru").double(), make_windows((D,), lengths=LENGTHS, dtype=torch.float64)
    outputs, mask = model(batch.inputs, batch.valid), batch.labels.va_mask
    found = objective.loss("va", objective.sums(outputs, batch)["va"])
    direct = F.mse_loss(outputs.va[mask], batch.labels.va.double()[mask])
    torch.testing.assert_close(found, direct)
    weight = model.heads["v"].last.weight
    for mine, theirs in zip(*(torch.autograd.grad(loss, weight, retain_graph=True) for loss in (found, direct))):
        torch.testing.assert_close(mine, theirs)
    assert objective.fixed == {"va": 24.0, "expr": 0.35, "au": 1.0}


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.whole
def test_training_over_a_backbone_of_images_has_the_same_losses_on_any_ranks_and_at_zero_stages(shards, tmp_path):
    own = SMALL | ENCODERS["two-way gru"] | FRAMEWORKS["share bottom with feedback"]
    layer = {
        "model": {"name": "c", "backbone": "small", "weights": "none", "dropout": 0.0, "sequence": own},
        "loss": {"va_ccc": 0.0, "va_mse": 2.0},
        "optim": {"name": "adamw", "lr": 1e-3},
        "engine": {"batchnorm": "frozen"},
    }

    def job(name: str, *layers):
        return config_of(shards, tmp_path, name, layer, *layers), None

    run_ranks(1, [job("one"), job("parts", {"train": {"accumulation": 3}})], tmp_path)
    run_ranks(2, [job("two"), job("zero-2", {"engine": {"zero_stage": 2}})], tmp_path)
    for name in ("parts", "two", "zero-2"):
        assert_close_losses(losses(tmp_path, name), losses(tmp_path, "one"))
