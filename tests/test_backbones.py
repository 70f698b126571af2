"""Backbones of torchvision and timm: what they give the attention, their images' statistics, their weights."""

import huggingface_hub.constants
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from mtl_dist.config import build_config
from mtl_dist.data import augment
from mtl_dist.errors import InputError
from mtl_dist.model_config import ModelConfig
from mtl_dist.models import build_model, libraries
from mtl_dist.models.backbones import build_backbone, check_backbone
from mtl_dist.models.foreign import load_backbone_weights, load_imagenet_weights
from mtl_dist.models.regions import NUM_REGIONS
from mtl_dist.training.averaging import sync_batchnorm
from tests.windows import all_valid

SIZE = 96
# Family by family: the name, the channels and the cells a side of images of 96 pixels that its paper gives.
NETWORKS = [
    ("torchvision:resnet18", 256, 6),
    ("torchvision:convnext_tiny", 384, 6),
    ("torchvision:efficientnet_b0", 112, 6),
    ("torchvision:swin_t", 384, 6),
    ("torchvision:vit_b_16", 768, 6),
    ("torchvision:mobilenet_v3_small", 48, 6),
    ("torchvision:densenet121", 1024, 6),
    ("torchvision:regnet_y_400mf", 208, 6),
    ("torchvision:googlenet", 832, 6),
    ("timm:convnext_atto", 160, 6),
    ("timm:efficientnet_lite0", 112, 6),
    ("timm:swin_tiny_patch4_window7_224", 384, 6),
    ("timm:vit_tiny_patch16_224", 192, 6),
    ("timm:vit_small_patch14_dinov2", 384, 6),
    ("timm:mobilenetv3_small_050", 24, 6),
    ("timm:regnety_002", 152, 6),
    ("timm:resnet10t", 256, 6),
]


def build(backbone, *, size=SIZE, **changes):
    return build_model(ModelConfig(**{"backbone": backbone, "weights": "none", **changes}), seed=0, input_size=size)


def make_images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.whole
@pytest.mark.parametrize(("name", "channels", "cells"), NETWORKS)
def test_the_attention_adapts_to_a_library_s_network(name, channels, cells):
    """Outputs, a map a region, a gradient for every parameter; an empty batch gives nothing and moves nothing."""
    model = build(name).train()
    inputs = make_images(2, 1, 3, SIZE, SIZE)
    outputs = model(inputs, all_valid(inputs))
    sum(output.square().sum() for output in outputs).backward()
    assert [tuple(output.shape) for output in outputs] == [(2, 1, 2), (2, 1, 8), (2, 1, 12)]
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    assert sum(p.grad.abs().sum() for p in model.backbone.parameters()) > 0
    assert model.backbone.num_channels == channels
    before = {key: value.clone() for key, value in model.named_buffers() if "running" in key}
    model.zero_grad()
    empty = model(inputs[:0], all_valid(inputs[:0]))
    sum(output.sum() for output in empty).backward()
    assert [tuple(output.shape) for output in empty] == [(0, 1, 2), (0, 1, 8), (0, 1, 12)]
    assert all((p.grad == 0).all() for p in model.parameters())
    assert all(torch.equal(dict(model.named_buffers())[key], value) for key, value in before.items())
    with torch.inference_mode():
        assert model.eval().attention_maps(inputs[:, 0]).shape == (2, NUM_REGIONS, cells, cells)


def test_the_baseline_takes_a_library_s_network_too():
    images = make_images(3, 2, 3, SIZE, SIZE)
    outputs = build("timm:test_vit", name="baseline", hidden=16)(images, all_valid(images))
    assert [tuple(output.shape) for output in outputs] == [(3, 2, 2), (3, 2, 8), (3, 2, 12)]


# --- Against the libraries --------------------------------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "end"), [("resnet18", "layer3"), ("swin_t", "features.5"), ("densenet121", "features.denseblock3")]
)
def test_features_are_those_torchvision_computes_on_the_way(tmp_path, name, end):
    """The file holds the classifier, by torchvision's names."""
    reference = torchvision.models.get_model(name, weights=None).eval()
    torch.save(reference.state_dict(), tmp_path / "net.pth")
    backbone = build_backbone(f"torchvision:{name}", SIZE).eval()
    load_backbone_weights(backbone, tmp_path / "net.pth")
    seen = []
    reference.get_submodule(end).register_forward_hook(lambda module, args, output: seen.append(output))
    images = make_images(1, 3, SIZE, SIZE)
    with torch.inference_mode():
        reference(images)
        found = backbone(images)
    torch.testing.assert_close(found, seen[0].permute(0, 3, 1, 2) if name == "swin_t" else seen[0])


@pytest.fixture(scope="module")
def vit():
    return build_backbone("torchvision:vit_b_16", SIZE)


def test_a_vit_s_tokens_are_laid_out_as_the_patches_lie(vit):
    """Row by row, after the class token, which is dropped."""
    seen = {}
    for name in ("conv_proj", "encoder"):
        hook = vit.net.model.get_submodule(name).register_forward_hook
        hook(lambda module, args, output, name=name: seen.update({name: (args[0], output)}))
    with torch.inference_mode():
        features = vit(make_images(2, 3, SIZE, SIZE))
    patches, (given, tokens) = seen["conv_proj"][1], seen["encoder"]
    for i, j in ((0, 0), (0, 5), (2, 3), (5, 5)):
        assert torch.equal(given[:, 1 + 6 * i + j], patches[:, :, i, j])
        assert torch.equal(features[:, :, i, j], tokens[:, 1 + 6 * i + j])


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "vit_tiny_patch16_224"])
def test_features_are_those_timm_computes_from_images_normalised_as_timm_wants_them(tmp_path, name):
    """Its own mean and deviation: 0.5 and 0.5 for three of these. The file has timm's names."""
    size = timm.get_pretrained_cfg(name).input_size[-1]
    reference = timm.create_model(name).eval()
    save_file(reference.state_dict(), tmp_path / "net.safetensors")
    backbone = build_backbone(f"timm:{name}", size).eval()
    load_backbone_weights(backbone, tmp_path / "net.safetensors")
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(reference.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.inference_mode():
        found = backbone(augment.normalise(pixels[:, None], size)[:, 0])
        expected = reference.forward_intermediates((pixels / 255 - mean) / std, intermediates_only=True, norm=True)
    (expected,) = [features for features in expected if features.shape[1:] == found.shape[1:]][-1:]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_images_are_taken_to_be_normalised_as_the_loader_s_are():
    assert (libraries.IMAGENET_MEAN, libraries.IMAGENET_STD) == (augment.IMAGENET_MEAN, augment.IMAGENET_STD)


# --- Weights of the libraries -----------------------------------------------------------------------------------------


def test_torchvision_s_default_weights_are_taken_and_a_vit_s_positions_fitted(vit, tmp_path, monkeypatch):
    """From torch's cache, where a file of the right name stands for the download."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.get_model_weights("vit_b_16").DEFAULT
    positions = "encoder.pos_embedding"
    # Weights of 224 pixels: 14 x 14 cells.
    state = {name: tensor.half() for name, tensor in vit.net.model.state_dict().items()}
    state |= {positions: torch.randn(1, 14 * 14 + 1, 768), "conv_proj.bias": torch.randn(768)}
    path = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    load_imagenet_weights(vit)
    found = vit.net.model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items() if key != positions)
    assert found[positions].shape == (1, 6 * 6 + 1, 768)
    assert torch.equal(found[positions][:, 0], state[positions][:, 0])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of Hugging Face, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_timm_s_default_weights_are_taken_and_fitted_to_the_size_of_the_images(hub):
    reference = timm.create_model("test_vit")
    stored = hub / "models--timm--test_vit.r160_in1k"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text("0" * 40)
    (stored / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(reference.state_dict(), stored / "snapshots" / ("0" * 40) / "model.safetensors")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    model = build("timm:test_vit", weights="imagenet")
    assert torch.equal(torch.get_rng_state(), state)
    found = model.backbone.net.model.state_dict()
    assert torch.equal(found["blocks.0.attn.qkv.weight"], reference.blocks[0].attn.qkv.weight)
    assert reference.pos_embed.shape[1] == 10 * 10 + 1
    assert found["pos_embed"].shape[1] == 6 * 6 + 1


def test_a_failed_download_from_timm_s_hub_says_what_to_do_instead(hub):
    with pytest.raises(InputError, match=r"timm:test_vit .*--model\.weights FILE or s3://.*--model\.weights none"):
        build("timm:test_vit", weights="imagenet")


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("timm:convnext_tinny", 96, "unknown backbone timm:convnext_tinny: did you mean convnext_tiny"),
        ("timm:zzzzzzzz", 96, "unknown backbone timm:zzzzzzzz: see the library's list"),
        ("timm:test_vit.in22k", 96, "timm:test_vit has no weights 'in22k'; known: r160_in1k"),
        ("torchvision:resnext18", 96, "unknown backbone torchvision:resnext18: did you mean"),
        ("torchvision:vit_b_16", 100, "does not take images of 100 pixels .* give another model.image_size"),
        ("torchvision:maxvit_t", 96, "does not take images of 96 pixels .*partition"),
        ("torchvision:resnet18", 16, "does not take images of 16 pixels .*1 x 1 cells"),
    ],
)
def test_a_name_or_size_that_does_not_work_is_refused_with_one_that_might(name, size, message):
    with pytest.raises(InputError, match=message) as error:
        build(name, size=size)
    assert "\n" not in str(error.value)


# --- In a run ---------------------------------------------------------------------------------------------------------


def test_synchronised_batchnorm_keeps_what_timm_s_layers_do_after_it():
    """They are normalisation and activation in one. Out of training no rank asks another, so one on a CPU will do."""
    config = build_config({"model": {"backbone": "timm:test_efficientnet", "weights": "none"}})
    model = build(config.model.backbone).eval()
    images = make_images(1, 1, 3, SIZE, SIZE)
    with torch.inference_mode():
        expected = model(images, all_valid(images))
        synchronised = sync_batchnorm(model, config)
        found = synchronised(images, all_valid(images))
    norms = [m for m in synchronised.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("name", "imagenet", "words"),
    [
        ("timm:convnext_tyni", False, "unknown backbone timm:convnext_tyni: did you mean convnext_tiny"),
        ("torchvision:resnet19", False, "unknown backbone torchvision:resnet19: did you mean"),
        ("timm:convnext_tiny.nothing", False, "has no weights 'nothing'"),
        ("timm:vit_giant_patch14_224", True, "timm has no weights for vit_giant_patch14_224"),
        ("small", True, "torchvision has no ImageNet weights for SmallResNet"),
    ],
)
def test_a_backbone_or_weights_that_do_not_exist_are_found_out_without_building_anything(name, imagenet, words):
    with pytest.raises(InputError, match=words):
        check_backbone(name, imagenet=imagenet)


@pytest.mark.parametrize(
    "name", ["inception_v3", "vgg16", "torchvision:vit_b_16", "timm:convnext_tiny", "timm:vit_tiny_patch16_224"]
)
def test_backbones_with_imagenet_weights_pass_that_check(name):
    check_backbone(name, imagenet=True)
