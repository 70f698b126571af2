"""Masked pre-training: which patches are hidden, the loss of all ranks, and the network of others beside ours."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from mtl_dist.config import Config, build_config
from mtl_dist.data.augment import build_preparation
from mtl_dist.data.masks import draw_places
from mtl_dist.errors import InputError
from mtl_dist.models import build_model, num_parameters
from mtl_dist.models.mae import cut_patches
from mtl_dist.models.vit import sine_positions
from mtl_dist.objective.masked import Masked, join_patches, wanted_pixels
from mtl_dist.objective.module import ObjectiveModule, build_objective
from mtl_dist.presets import load_preset
from mtl_dist.tasks import Batch, Labels, Reconstruction

SIZE = 32
TINY = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def make_config(**model) -> Config:
    return build_config(
        {
            "model": {"name": "mae", "backbone": "vit_small", "weights": "none", "masked": TINY, **model},
            "data": {"image_size": SIZE},
        }
    )


def make_batch(rows: list[int], *, frames: int = 1) -> Batch:
    """Pictures that go by their row; no labels."""
    pictures = [torch.from_numpy(np.random.default_rng(row).integers(0, 256, (frames, 3, SIZE, SIZE))) for row in rows]
    count = len(rows)
    labels = Labels(
        va=torch.zeros(count, frames, 2),
        expr=torch.zeros(count, frames, dtype=torch.int64),
        au=torch.zeros(count, frames, 12),
        va_mask=torch.zeros(count, frames, dtype=torch.bool),
        expr_mask=torch.zeros(count, frames, dtype=torch.bool),
        au_mask=torch.zeros(count, frames, 12, dtype=torch.bool),
    )
    return Batch(
        torch.stack(pictures).to(torch.uint8) if rows else torch.zeros(0, frames, 3, SIZE, SIZE, dtype=torch.uint8),
        torch.ones(count, frames, dtype=torch.bool),
        labels,
        torch.tensor(rows, dtype=torch.int64)[:, None].expand(-1, frames),
        torch.tensor(rows, dtype=torch.int64),
    )


def prepared(config: Config, batch: Batch, *, epoch: int | None = 1) -> Batch:
    prepare = build_preparation(config)
    draws = None if epoch is None else prepare.draw(batch.rows, seed=config.run.seed, epoch=epoch)
    return batch._replace(inputs=prepare(batch, draws))


# ---------------------------------------------------------------------------------------------------------------- masks


def test_what_is_hidden_is_a_function_of_seed_epoch_and_row():
    rows = torch.arange(40)
    places = draw_places(rows, 16, seed=3, epoch=5)
    assert (np.sort(places, -1) == np.arange(16)).all()
    assert (draw_places(rows[[7, 3]], 16, seed=3, epoch=5) == places[[7, 3]]).all()
    assert (draw_places(rows.reshape(8, 5), 16, seed=3, epoch=5).reshape(40, 16) == places).all()
    for other in ({"seed": 4, "epoch": 5}, {"seed": 3, "epoch": 6}):
        assert (draw_places(rows, 16, **other) != places).any(-1).sum() > 38
    assert len(np.unique(places, axis=0)) == 40


def test_every_patch_is_hidden_as_often():
    places = draw_places(torch.arange(20_000), 16, seed=0, epoch=0)
    hidden = (places >= 4).mean(0)
    assert np.abs(hidden - 0.75).max() < 5 * (0.75 * 0.25 / 20_000) ** 0.5
    # And no pair of patches oftener than by chance.
    both = np.corrcoef((places >= 4).T.astype(float))[np.triu_indices(16, 1)]
    assert np.abs(both + 1 / 15).max() < 5 / 20_000**0.5


def test_the_masks_of_an_epoch_are_pinned():
    """They are part of what a run is: continuing one with others would be another run."""
    assert draw_places(torch.tensor([0, 17]), 8, seed=1, epoch=2).tolist() == PINNED


def test_evaluation_hides_the_same_every_time_and_training_other_patches_each_epoch():
    config, batch = make_config(), make_batch([4, 9])
    first, again = (prepared(config, batch, epoch=None).inputs for _ in range(2))
    assert torch.equal(first, again)
    epochs = [prepared(config, batch, epoch=epoch).inputs[:, :, 3] for epoch in (0, 1)]
    assert not torch.equal(*epochs)
    assert torch.equal(first[:, :, 3], epochs[0])


# ---------------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(
    ("preset", "parameters", "encoder"),
    [
        ("mae", 111_907_840, 85_798_656),
        ("mae-tiny", 6_023_296, 5_496_192),
        ("small-mae", 1_363_456, 1_233_280),
    ],
)
def test_presets_have_the_parameters_of_the_reference(preset, parameters, encoder):
    config = build_config(load_preset(preset))
    with torch.device("meta"):
        model = build_model(config.model, input_size=config.input_size)
    assert num_parameters(model) == parameters
    assert num_parameters(model.backbone) == encoder


def test_patches_are_cut_and_joined_again():
    images = torch.rand(3, 3, 24, 24)
    patches = cut_patches(images, 8)
    assert patches.shape == (3, 9, 192)
    assert torch.equal(patches[1, 5], images[1, :, 8:16, 16:24].permute(1, 2, 0).flatten())
    assert np.array_equal(join_patches(patches.numpy(), 8), images.permute(0, 2, 3, 1).numpy())


def test_positions_are_those_of_the_paper():
    """Against its formula, written out: half of the numbers for the column, half for the row; sines, then cosines."""
    found = sine_positions(16, 3)[0]
    assert torch.equal(found[0], torch.zeros(16))
    for row in range(3):
        for column in range(3):
            expected = []
            for place in (column, row):
                rates = [1 / 10000 ** (i / 4) for i in range(4)]
                expected += [np.sin(place * rate) for rate in rates] + [np.cos(place * rate) for rate in rates]
            assert torch.allclose(found[1 + 3 * row + column], torch.tensor(expected, dtype=torch.float32), atol=1e-6)


def test_what_is_hidden_is_not_seen():
    """Pixels of hidden patches change nothing that is told; those of a patch that is seen do."""
    config, batch = make_config(), make_batch([1])
    model = build_model(config.model, input_size=SIZE).eval()
    inputs = prepared(config, batch).inputs
    out = model(inputs, batch.valid)
    hidden = out.hidden[0].unflatten(0, (4, 4)).repeat_interleave(8, 0).repeat_interleave(8, 1)
    for where, changes in ((hidden, False), (~hidden, True)):
        changed = inputs.clone()
        changed[0, 0, :3] += 10 * where
        assert torch.equal(model(changed, batch.valid).predicted, out.predicted) is not changes


def test_another_backbone_is_refused_by_name():
    for other in ("small", "inception_v3", "timm:vit_tiny_patch16_224"):
        with pytest.raises(InputError, match=f"model.name mae takes no model.backbone {other}; expected vit_small or"):
            build_config({"model": {"name": "mae", "backbone": other}, "data": {"image_size": 96}})
    with pytest.raises(InputError, match="patches of 8 pixels a side, and images have 100"):
        build_config({"model": {"name": "a", "backbone": "vit_small"}, "data": {"image_size": 100}})


# ------------------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_the_mean_over_hidden_patches_of_their_mean_square():
    patches, predicted = torch.randn(2, 4, 12), torch.randn(2, 4, 12)
    hidden = torch.tensor([[True, False, True, True], [False, False, True, False]])
    outputs = Reconstruction(predicted, patches, hidden)
    for normalises in (False, True):
        objective = Masked(size=4, patch=2, normalises=normalises)
        target = patches
        if normalises:
            target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        expected = np.mean([(predicted[i, j] - target[i, j]).square().mean() for i, j in hidden.nonzero().tolist()])
        total = objective.sums(outputs, None)["masked"]
        assert float(objective.loss("masked", total)) == pytest.approx(expected, rel=1e-6)


def test_five_rows_on_two_unequal_ranks_have_the_losses_and_gradients_of_one(monkeypatch):
    config = make_config()
    model = build_model(config.model, input_size=SIZE).double()
    whole = prepared(config, make_batch([3, 1, 4, 15, 9]))
    whole = whole._replace(inputs=whole.inputs.double())
    module = ObjectiveModule(model, build_objective(config, None))
    loss = module(whole)
    loss.total.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    assert len(expected) > 20
    parts = [whole.take(slice(0, 1)), whole.take(slice(1, 5)), whole.take(slice(0, 0))]  # one rank has no row
    sums = [module.sums(part) for part in parts]
    total = {"masked": sum(each["masked"] for each in sums)}
    model.zero_grad()
    for part in parts:
        part_loss = module(part, total, parts=1)
        assert float(part_loss.terms["masked"]) == pytest.approx(float(loss.terms["masked"]), rel=1e-12)
        part_loss.total.backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    for mine, theirs in zip(found, expected):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_the_constant_picture_is_the_best_there_is():
    config = make_config()
    objective = build_objective(config, None)
    model = build_model(config.model, input_size=SIZE)
    batch = prepared(config, make_batch(list(range(30))), epoch=None)
    with torch.no_grad():
        out = model(batch.inputs, batch.valid)
        target, hidden = wanted_pixels(out.patches, normalises=True), out.hidden[..., None]
        mean = (target * hidden).sum(0) / hidden.sum(0).clamp_min(1)
        meter, constant = objective.meter(), objective.meter()
        for part in (slice(0, 11), slice(11, 30)):
            some = Reconstruction(*(tensor[part] for tensor in out))
            meter.add(some, batch.take(part))
            constant.add(some._replace(predicted=mean.expand_as(some.predicted)), batch.take(part))
    floor = meter.floor(meter.sums())["masked_loss"]
    assert floor == pytest.approx(constant.scores(constant.sums())["masked_loss"], rel=1e-5)
    assert floor < meter.scores(meter.sums())["masked_loss"]
    nothing = objective.meter().sums()  # of a rank without frames
    assert nothing.shape == meter.sums().shape
    assert not nothing.any()
    assert meter.pictures()["masked"].shape == (8 * SIZE, 3 * SIZE, 3)


def test_predictions_that_are_not_finite_name_their_rows():
    objective, batch = Masked(size=SIZE, patch=8, normalises=True), make_batch([5, 8])
    predicted = torch.zeros(2, 16, 192)
    predicted[1, 3, 7] = float("nan")
    meter = objective.meter()
    meter.add(Reconstruction(predicted, torch.rand(2, 16, 192), torch.ones(2, 16, dtype=torch.bool)), batch)
    assert meter.bad_rows() == [8]


# -------------------------------------------------------------------------------------------------------------- oracles


def test_the_loss_of_one_batch_is_pinned():
    """Made beside transformers' ViTMAEForPreTraining of the same weights, which the next test compares with."""
    config = make_config()
    model = build_model(config.model, seed=7, input_size=SIZE).double().eval()
    _fill(model)
    batch = prepared(config, make_batch([2, 6, 11]), epoch=None)
    with torch.no_grad():
        total = build_objective(config, None).sums(model(batch.inputs.double(), batch.valid), batch)["masked"]
    assert float(total[0] / total[1]) == pytest.approx(GOLDEN_LOSS, rel=1e-6)


def _fill(model: nn.Module) -> None:
    """Give all weights values that are the same on every machine and version."""
    for number, parameter in enumerate(model.parameters()):
        values = np.sin(np.arange(parameter.numel()) * 0.37 + number)
        with torch.no_grad():
            if parameter.requires_grad:
                parameter.copy_(torch.from_numpy(values * 0.4).reshape(parameter.shape))


@pytest.mark.parametrize("normalise", [True, False])
def test_transformers_has_the_same_loss_and_predictions(normalise):
    transformers = pytest.importorskip("transformers", reason="of the extra `oracles`")
    config = make_config(masked=TINY | {"normalise": normalise})
    model = build_model(config.model, seed=7, input_size=SIZE).double().eval()
    _fill(model)
    batch = prepared(config, make_batch([2, 6, 11]), epoch=None)
    inputs = batch.inputs.double()
    out = model(inputs, batch.valid)
    loss = build_objective(config, None).sums(out, batch)["masked"]

    settings = transformers.ViTMAEConfig(
        hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512, image_size=SIZE,
        patch_size=8, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=64, mask_ratio=0.75, norm_pix_loss=normalise, layer_norm_eps=1e-6,
    )  # fmt: skip
    settings._attn_implementation = "eager"
    theirs = transformers.ViTMAEForPreTraining(settings).double().eval()
    theirs.load_state_dict(_their_names(model.state_dict()))
    places = inputs[:, 0, 3, ::8, ::8].flatten(1)
    with torch.no_grad():
        found = theirs(inputs[:, 0, :3], noise=places)
    assert float(loss[0] / loss[1]) == pytest.approx(float(found.loss), rel=1e-6)
    assert torch.allclose(out.predicted, found.logits, atol=1e-9)
    assert torch.equal(out.hidden, found.mask.bool())


def _their_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names as those of transformers 5."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("backbone.net.model.", "vit.")
        for ours, their in (
            ("vit.cls_token", "vit.embeddings.cls_token"),
            ("vit.pos_embed", "vit.embeddings.position_embeddings"),
            ("vit.patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
            ("vit.norm", "vit.layernorm"),
            ("vit.blocks", "vit.layers"),
            ("decoder_blocks", "decoder.decoder_layers"),
            ("decoder_embed", "decoder.decoder_embed"),
            ("decoder_pos_embed", "decoder.decoder_pos_embed"),
            ("decoder_norm", "decoder.decoder_norm"),
            ("decoder_pred", "decoder.decoder_pred"),
            ("mask_token", "decoder.mask_token"),
        ):
            if name.startswith(ours):
                name = their + name.removeprefix(ours)
                break
        for ours, their in (
            (".norm1.", ".layernorm_before."),
            (".norm2.", ".layernorm_after."),
            (".attn.proj.", ".attention.o_proj."),
        ):
            name = name.replace(ours, their)
        if ".attn.qkv." in name:
            for part, values in zip("qkv", tensor.chunk(3)):
                renamed[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = values
        else:
            renamed[name] = tensor
    return renamed


def test_timm_has_the_same_features():
    timm = pytest.importorskip("timm")
    config = make_config(backbone="vit_tiny")
    backbone = build_model(config.model, input_size=SIZE).backbone.eval()
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, num_classes=0, norm_layer=partial(nn.LayerNorm, eps=1e-6)
    ).eval()
    prefix = "net.model."
    theirs.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in backbone.state_dict().items()})
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        tokens = theirs.forward_features(images)[:, 1:]
        assert torch.equal(backbone(images), tokens.transpose(1, 2).unflatten(2, (2, 2)))


PINNED = [[0, 1, 5, 3, 6, 4, 2, 7], [4, 6, 0, 5, 7, 3, 2, 1]]
GOLDEN_LOSS = 1.5502263009548187
