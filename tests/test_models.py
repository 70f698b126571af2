"""The models: published counts and shapes, the region algebra against written-out layers, weights, learning."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision.models import vgg16
from torchvision.models.inception import Inception3

from mtl_dist.errors import InputError
from mtl_dist.families import FAMILIES, OWN_BACKBONES
from mtl_dist.model_config import ModelConfig
from mtl_dist.models import build_model, num_parameters
from mtl_dist.models.backbones import BACKBONES, VITS, build_backbone
from mtl_dist.models.foreign import load_backbone_weights
from mtl_dist.models.regions import EMBEDDING_DIM, NUM_REGIONS, RegionEmbeddings
from tests.conftest import REPO
from tests.windows import all_valid, frames_alone, make_windows


def make_config(**changes):
    return ModelConfig(**{"backbone": "small", "weights": "none", "hidden": 64, **changes})


# The published systems and those of the laptop.
SYSTEMS = [(name, backbone) for name in ("a", "b") for backbone in ("inception_v3", "small")]
SYSTEMS += [("baseline", "vgg16"), ("baseline", "vgg_small"), ("a", "vgg_small")]


def make_inputs(num_samples, num_frames, size, seed=0):
    return torch.randn(num_samples, num_frames, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def models():
    return {
        (name, backbone): build_model(make_config(name=name, backbone=backbone), input_size=96).eval()
        for name, backbone in SYSTEMS
    }


# --- What was published -----------------------------------------------------------------------------------------------


def test_system_b_has_the_published_parameter_counts(models):
    model = models["b", "inception_v3"]
    assert num_parameters(model.backbone) == 8_965_856
    assert num_parameters(model.attention) == 472_039
    assert num_parameters(model.regions) == 1_890_672
    assert num_parameters(model.transformer) == 34_960
    assert num_parameters(model.projections) == 4_352
    assert num_parameters(model.heads) == 374
    assert num_parameters(model) - num_parameters(model.backbone) == 2_402_397


def test_system_a_differs_from_b_by_its_heads_and_the_unused_prediction_head(models):
    a, b = models["a", "inception_v3"], models["b", "inception_v3"]
    assert num_parameters(b.attention) - num_parameters(a.attention) == 17 * 17 + 17
    for part in ("backbone", "regions", "transformer", "projections"):
        assert num_parameters(getattr(a, part)) == num_parameters(getattr(b, part))
    assert num_parameters(a.heads["expr"]) == 17 * 512 + 513 * 128 + 129 * 8
    assert num_parameters(a.heads["va"]) == 17 * 128 + 129 * 2
    assert num_parameters(a.heads["au"]) == 12 * 17


@pytest.mark.parametrize(("size", "cells"), [(299, 17), (224, 12), (112, 5)])
def test_inception_features_have_the_published_shape(models, size, cells):
    with torch.inference_mode():
        features = models["a", "inception_v3"].backbone(make_inputs(1, 1, size)[0])
    assert features.shape == (1, 768, cells, cells)


@pytest.mark.parametrize("name", ["small", "vgg16", "vgg_small"])
def test_a_backbone_has_the_size_its_docstring_says(name):
    backbone = build_backbone(name)
    assert f"{num_parameters(backbone):,} parameters" in type(backbone).__doc__
    assert f"{backbone.num_channels} channels" in type(backbone).__doc__
    assert backbone(make_inputs(2, 1, 96)[:, 0]).shape == (2, backbone.num_channels, 6, 6)


@pytest.mark.whole
def test_the_baseline_is_vgg16_but_for_its_last_layer():
    """Torchvision's VGG16 with the same weights computes the same, up to the second hidden layer."""
    model = build_model(make_config(name="baseline", backbone="vgg16", hidden=4096), input_size=224).eval()
    with torch.device("meta"):  # 138 M parameters need not be drawn twice
        reference = vgg16(init_weights=False).eval()
    reference.load_state_dict(
        {
            **model.backbone.state_dict(),
            **{f"classifier.{name}": value for name, value in model.hidden.state_dict().items()},
            **{
                f"classifier.6.{name}": torch.zeros(shape) for name, shape in (("weight", (1000, 4096)), ("bias", 1000))
            },
        },
        assign=True,
    )
    inputs = make_inputs(1, 1, 224)
    with torch.inference_mode():
        expected = reference.classifier[:6](reference.avgpool(reference.features(inputs[0])).flatten(1))
        torch.testing.assert_close(model.hidden(model.pool(model.backbone(inputs[0]))), expected)
        outputs, raw = model(inputs, all_valid(inputs)), model.outputs(expected)
    torch.testing.assert_close(outputs.va[0], raw[:, :2].tanh())
    torch.testing.assert_close(torch.cat(outputs[1:], dim=-1)[0], raw[:, 2:])


# --- Contract ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [75, 96, 112])
@pytest.mark.parametrize(("name", "backbone"), SYSTEMS)
def test_every_model_returns_outputs_for_samples_and_frames(models, name, backbone, size):
    model = models[name, backbone]
    inputs = make_inputs(2, 3, size)
    with torch.inference_mode():
        outputs = model(inputs, all_valid(inputs))
        maps = None if name == "baseline" else model.attention_maps(inputs.flatten(0, 1))
        last_frame = model(inputs[1:, 2:], all_valid(inputs[1:, 2:]))
    assert [tuple(output.shape) for output in outputs] == [(2, 3, 2), (2, 3, 8), (2, 3, 12)]
    assert outputs.va.abs().max() <= 1
    if maps is not None:
        assert maps.shape[:2] == (2 * 3, NUM_REGIONS)
        assert maps.min() >= 0
        assert maps.max() <= 1
    for together, alone in zip(outputs, last_frame, strict=True):
        torch.testing.assert_close(together[1:, 2:], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.whole
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "backbone"), SYSTEMS)
def test_an_empty_rank_batch_gives_empty_outputs_and_zero_gradients(name, backbone, training):
    model = build_model(make_config(name=name, backbone=backbone), input_size=96).train(training)
    before = {key: value.clone() for key, value in model.named_buffers() if not key.endswith("num_batches_tracked")}
    inputs = make_inputs(0, 1, 96)
    outputs = model(inputs, all_valid(inputs))
    sum(output.sum() for output in outputs).backward()
    assert [tuple(output.shape) for output in outputs] == [(0, 1, 2), (0, 1, 8), (0, 1, 12)]
    assert all((p.grad == 0).all() for p in model.parameters() if p.requires_grad)
    for key, value in before.items():
        assert torch.equal(dict(model.named_buffers())[key], value), key


@pytest.mark.parametrize(("name", "backbone"), [("a", "small"), ("baseline", "vgg_small")])
def test_padding_is_seen_by_no_model_nor_by_batchnorm(name, backbone):
    """In training: outputs, running statistics and gradients are those of the frames alone, and zeros on padding."""
    model = build_model(make_config(name=name, backbone=backbone, dropout=0.0), input_size=75).train()
    batch, found = make_windows((3, 75, 75)), {}
    for kind, frames in (("windows", batch), ("alone", frames_alone(batch))):
        own = copy.deepcopy(model)
        outputs = own(frames.inputs, frames.valid)
        sum(output.square().sum() for output in outputs).backward()
        assert not any(output[~frames.valid].any() for output in outputs)
        gradients = [p.grad for p in own.parameters() if p.grad is not None]
        found[kind] = [*(output[frames.valid] for output in outputs), *own.buffers(), *gradients]
    for windows, alone in zip(found["windows"], found["alone"], strict=True):
        torch.testing.assert_close(windows, alone)


def test_weights_depend_on_the_seed_alone_and_the_global_random_state_is_untouched():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_model(make_config(), seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = build_model(make_config(), seed=3).state_dict()
    other = build_model(make_config(), seed=4).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["regions.gated_conv.weight"], other["regions.gated_conv.weight"])


def test_the_baseline_has_no_attention_to_show(models):
    assert not hasattr(models["baseline", "vgg16"], "attention_maps")
    assert hasattr(models["a", "vgg_small"], "attention_maps")


def test_a_family_has_a_row_in_the_manual_and_settings_that_exist():
    manual = (REPO / "docs/models.md").read_text()
    for name, family in FAMILIES.items():
        assert re.search(rf"^\| `{name}` \| .*{re.escape(family.what.partition(',')[0])}", manual, re.MULTILINE), name
        assert set(family.reads) <= ModelConfig.model_fields.keys()


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.objective == "affect"])
def test_every_parameter_gets_a_gradient_but_the_unused_prediction_head(name):
    model = build_model(make_config(name=name), input_size=75)
    inputs = make_inputs(4, 1, 75)
    outputs = model(inputs, all_valid(inputs))
    sum(output.square().sum() for output in outputs).backward()
    silent = {key for key, p in model.named_parameters() if p.grad is None}
    unused = {"attention.unused_prediction.weight", "attention.unused_prediction.bias"}
    assert silent == (unused if name == "b" else set())


def test_autocast_to_bfloat16_stays_close_to_float32(models):
    inputs = make_inputs(2, 1, 96)
    with torch.inference_mode():
        exact = models["a", "small"](inputs, all_valid(inputs))
        with torch.autocast("cpu", torch.bfloat16):
            rough = models["a", "small"](inputs, all_valid(inputs))
    for one, other in zip(exact, rough, strict=True):
        torch.testing.assert_close(other.float(), one, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "vgg"}, "unknown backbone 'vgg': did you mean 'vgg16'.*or torchvision:NAME, timm:NAME"),
        ({"backbone": "keras:vgg16"}, "unknown library 'keras' of backbone keras:vgg16; known: timm, torchvision"),
        ({"backbone": "timm:resnet18"}, "timm:resnet18 is built for one size of images; give model.image_size"),
        ({"weights": "s3://bucket/w.pth"}, "fetch s3://bucket/w.pth first"),
        ({"weights": "imagnet"}, "no weights file imagnet; .* imagenet or none"),
        ({"weights": "imagenet"}, "no ImageNet weights for SmallResNet"),
    ],
)
def test_an_impossible_configuration_is_refused_with_what_is_possible(changes, message):
    with pytest.raises(InputError, match=message):
        build_model(make_config().model_copy(update=changes))  # past the configuration's own checks


@pytest.mark.parametrize("name", ["vgg", "timm", "timm:", "keras:vgg16", "timm:hf-hub:someone/net", "timm:a/b"])
def test_the_configuration_refuses_a_backbone_that_cannot_be_a_name(name):
    with pytest.raises(InputError, match=f"backbone is '{name}': .*timm:"):
        make_config(backbone=name)


def test_the_configuration_knows_the_backbones_that_there_are():
    assert set(OWN_BACKBONES) == {*BACKBONES, *VITS}
    for name in ("vgg16", "timm:vit_tiny_patch16_224.augreg_in21k", "torchvision:convnext_tiny"):
        assert make_config(backbone=name).backbone == name


# --- Frozen backbones -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "backbone"), [("baseline", "vgg_small"), ("a", "small"), ("b", "timm:test_vit")])
def test_a_frozen_backbone_stays_as_it_is_in_training(name, backbone):
    """Weights, BatchNorm's running statistics and mode, whatever mode the model is put in; the rest learns."""
    model = build_model(make_config(name=name, backbone=backbone, freeze_backbone=True), input_size=96).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    inputs = make_inputs(4, 1, 96)
    sum(output.square().sum() for output in model(inputs, all_valid(inputs))).backward()
    optimizer.step()
    changed = {
        key.partition(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert "backbone" not in changed
    assert changed >= ({"hidden", "outputs"} if name == "baseline" else {"attention", "regions", "heads"})
    assert all(p.grad is None and p not in optimizer.state for p in model.backbone.parameters())
    assert {id(p) for p in optimizer.state} == {id(p) for p in trained}
    assert not any(module.training for module in model.backbone.modules())
    assert model.training
    copied = copy.deepcopy(model).eval().train()
    assert not any(module.training for module in copied.backbone.modules())


# --- Regions against layers written out -------------------------------------------------------------------------------


def make_written_out_regions(parallel):
    """Build the 17 branches as the paper draws them, with the weights of `parallel`."""
    branches = nn.ModuleList()
    for r in range(NUM_REGIONS):
        branch = nn.Sequential(
            nn.Conv2d(parallel.gated_conv.weight.shape[1], EMBEDDING_DIM, 3, padding=1),
            nn.BatchNorm2d(EMBEDDING_DIM),
            nn.ReLU(),
            nn.Conv2d(EMBEDDING_DIM, EMBEDDING_DIM, 1),
            nn.BatchNorm2d(EMBEDDING_DIM),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(EMBEDDING_DIM, EMBEDDING_DIM),
        ).double()
        for ours, theirs in region_parameters(parallel, branch, r):
            theirs.data.copy_(ours)
        branches.append(branch)
    return branches


def region_parameters(parallel, branch, r, take=lambda parameter: parameter):
    rows = slice(r * EMBEDDING_DIM, (r + 1) * EMBEDDING_DIM)
    grouped = (parallel.gated_conv, parallel.norm1, parallel.conv, parallel.norm2)
    for ours, theirs in zip(grouped, (branch[i] for i in (0, 1, 3, 4)), strict=True):
        yield take(ours.weight)[rows], take(theirs.weight)
        yield take(ours.bias)[rows], take(theirs.bias)
    yield take(parallel.linear.weight)[r], take(branch[8].weight)
    yield take(parallel.linear.bias)[r], take(branch[8].bias)


def test_parallel_regions_equal_written_out_branches_in_values_and_gradients():
    torch.manual_seed(0)
    parallel = RegionEmbeddings(10).double()
    for parameter in parallel.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.3)  # biases and norms too
    branches = make_written_out_regions(parallel)
    features = torch.randn(3, 10, 5, 7, dtype=torch.float64)
    maps = torch.rand(3, NUM_REGIONS, 5, 7, dtype=torch.float64)
    probe = torch.randn(3, NUM_REGIONS, EMBEDDING_DIM, dtype=torch.float64)

    x, m = features.clone().requires_grad_(), maps.clone().requires_grad_()
    x_ref, m_ref = features.clone().requires_grad_(), maps.clone().requires_grad_()
    embeddings = parallel(x, m)
    expected = torch.stack([branches[r](x_ref * m_ref[:, r : r + 1] + x_ref) for r in range(NUM_REGIONS)], dim=1)
    torch.testing.assert_close(embeddings, expected)

    (embeddings * probe).sum().backward()
    (expected * probe).sum().backward()
    torch.testing.assert_close(x.grad, x_ref.grad)
    torch.testing.assert_close(m.grad, m_ref.grad)
    for r, branch in enumerate(branches):
        for ours, theirs in region_parameters(parallel, branch, r, take=lambda parameter: parameter.grad):
            torch.testing.assert_close(ours, theirs)


# --- Weights from files -----------------------------------------------------------------------------------------------


def save_state(state, path):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


@pytest.mark.whole
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_torchvision_classifier_file_fills_the_backbone_and_the_rest_is_reported(tmp_path, suffix):
    classifier = Inception3(aux_logits=True, init_weights=False)
    path = tmp_path / f"inception{suffix}"
    save_state(classifier.state_dict(), path)
    model = build_model(make_config(backbone="inception_v3", weights=str(path)), seed=1)
    loaded = model.backbone.state_dict()
    assert all(torch.equal(loaded[key], classifier.state_dict()[key]) for key in loaded)
    ignored = load_backbone_weights(model.backbone, path).left_out
    assert {name.split(".")[0] for name in ignored} == {"AuxLogits", "Mixed_7a", "Mixed_7b", "Mixed_7c", "fc"}


def test_a_backbone_computes_what_torchvision_computes_up_to_mixed_6e():
    classifier = Inception3(aux_logits=False, init_weights=False).eval()
    backbone = build_backbone("inception_v3").eval()
    backbone.load_state_dict(classifier.state_dict(), strict=False)
    seen = []
    classifier.Mixed_6e.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.inference_mode():
        classifier(make_inputs(1, 1, 96)[0])
        torch.testing.assert_close(backbone(make_inputs(1, 1, 96)[0]), seen[0])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_missing_or_misshapen_entry_is_named(tmp_path, suffix):
    backbone = build_backbone("small")
    state = backbone.state_dict()
    path = tmp_path / f"weights{suffix}"

    save_state({key: value for key, value in state.items() if key != "stage2.shortcut.0.weight"}, path)
    with pytest.raises(InputError, match=r"has no 'stage2\.shortcut\.0\.weight'"):
        load_backbone_weights(backbone, path)

    save_state({**state, "stem.1.bias": torch.zeros(7)}, path)
    with pytest.raises(InputError, match=r"'stem\.1\.bias' has shape \(7,\), SmallResNet needs \(16,\)"):
        load_backbone_weights(backbone, path)


@pytest.mark.parametrize("backbone", ["vgg_small", "timm:test_efficientnet"])
def test_a_model_of_ours_gives_its_backbone(tmp_path, backbone):
    """What a run saved, its heads another's: the backbone comes along whole and the heads stay those of the seed."""
    trained = build_model(make_config(backbone=backbone), seed=1, input_size=96)
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    settings = {"name": "baseline", "backbone": backbone, "freeze_backbone": True}
    found = build_model(
        make_config(**settings, weights=str(tmp_path / "model.safetensors")), seed=2, input_size=96
    ).state_dict()
    own = build_model(make_config(**settings), seed=2, input_size=96).state_dict()
    for key, value in found.items():
        expected = trained.state_dict()[key] if key.startswith("backbone.") else own[key]
        assert torch.equal(value, expected), key


def test_a_model_of_ours_with_another_backbone_is_refused(tmp_path):
    save_file(build_model(make_config(), seed=1).state_dict(), tmp_path / "model.safetensors")
    settings = make_config(backbone="vgg_small", weights=str(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match=r"model\.safetensors \(a model of ours\) .* another --model\.backbone"):
        build_model(settings)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(build_backbone("small"), path)  # a whole module, not its state dict
    with pytest.raises(InputError, match="holds no state dict of plain tensors"):
        load_backbone_weights(build_backbone("small"), path)


def test_a_file_without_batch_counters_loads_as_those_of_old_torch_do(tmp_path):
    state = build_model(make_config(), seed=5).backbone.state_dict()
    path = tmp_path / "old.pth"
    torch.save({key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}, path)
    model = build_model(make_config(weights="s3://bucket/old.pth"), weights_file=path)
    assert all(torch.equal(value, state[key]) for key, value in model.backbone.state_dict().items())


def test_a_failed_download_says_what_to_do_instead(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for variable in ("no_proxy", "NO_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(InputError, match=r"inception_v3_google.*--model\.weights FILE or s3://.*--model\.weights none"):
        build_model(make_config(backbone="inception_v3", weights="imagenet"))


# --- Learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.whole
def test_every_head_learns_sixteen_random_images_by_heart():
    model = build_model(make_config(dropout=0.0))
    inputs = make_inputs(16, 1, 75)
    expr = torch.arange(16)[:, None] % 8
    au = torch.randint(0, 2, (16, 1, 12), generator=torch.Generator().manual_seed(1)).float()
    va = torch.linspace(-0.9, 0.9, 16).repeat(2, 1).T[:, None] * torch.tensor([1.0, -1.0])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(45):
        outputs = model(inputs, all_valid(inputs))
        loss = (
            F.cross_entropy(outputs.expr_logits.flatten(0, 1), expr.flatten())
            + F.binary_cross_entropy_with_logits(outputs.au_logits, au)
            + F.mse_loss(outputs.va, va)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    outputs = model(inputs, all_valid(inputs))
    assert (outputs.expr_logits.argmax(-1) == expr).all()
    assert ((outputs.au_logits > 0) == au.bool()).float().mean() > 0.95
    assert F.mse_loss(outputs.va, va) < 0.1 * va.var()
