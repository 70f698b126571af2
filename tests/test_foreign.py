"""Weights as others publish them: synthetic state dicts of their names and shapes; nothing else is unpickled."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mtl_dist.errors import InputError
from mtl_dist.families import OWN_BACKBONES
from mtl_dist.models import num_parameters
from mtl_dist.models.backbone import Backbone
from mtl_dist.models.backbones import build_backbone
from mtl_dist.models.foreign import load_backbone_weights

SIZE = 32
VIT = "net.model."


def drawn(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other values for every tensor, by its name."""
    made = {}
    for number, (name, tensor) in enumerate(state.items()):
        generator = torch.Generator().manual_seed(number)
        if tensor.is_floating_point():
            made[name] = torch.rand(tensor.shape, generator=generator) + 0.5
        else:
            made[name] = torch.full_like(tensor, number)
    return made


def vit_state() -> dict[str, Tensor]:
    """Weights of `vit_small` under timm's names."""
    state = build_backbone("vit_small", SIZE).state_dict()
    return drawn({name.removeprefix(VIT): tensor for name, tensor in state.items()})


def hf_names(state: dict[str, Tensor], *, version: int) -> dict[str, Tensor]:
    """The names that transformers has, written out: the other way round than what is tested."""
    layer = "layers" if version == 5 else "encoder.layer"
    made = {}
    for name, tensor in state.items():
        if not name.startswith("blocks."):
            made[
                {
                    "cls_token": "embeddings.cls_token",
                    "pos_embed": "embeddings.position_embeddings",
                    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
                    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
                    "norm.weight": "layernorm.weight",
                    "norm.bias": "layernorm.bias",
                }[name]
            ] = tensor
            continue
        _, number, part, *rest = name.split(".")
        *inner, kind = rest
        place = f"{layer}.{number}"
        if inner == ["qkv"]:
            for letter, word, values in zip("qkv", ("query", "key", "value"), tensor.chunk(3)):
                own = f"attention.{letter}_proj" if version == 5 else f"attention.attention.{word}"
                made[f"{place}.{own}.{kind}"] = values
            continue
        own = {
            ("norm1",): "layernorm_before",
            ("norm2",): "layernorm_after",
            ("attn", "proj"): "attention.o_proj" if version == 5 else "attention.output.dense",
            ("mlp", "fc1"): "mlp.fc1" if version == 5 else "intermediate.dense",
            ("mlp", "fc2"): "mlp.fc2" if version == 5 else "output.dense",
        }[part, *inner]
        made[f"{place}.{own}.{kind}"] = tensor
    return made


DECODER = {
    "mask_token": torch.zeros(1, 1, 8),
    "decoder_embed.weight": torch.zeros(8, 128),
    "decoder_pos_embed": torch.zeros(1, 17, 8),
    "decoder_blocks.0.attn.qkv.weight": torch.zeros(24, 8),
    "decoder_pred.bias": torch.zeros(12),
}


def published(layout: str) -> dict:
    """A file's content, of the weights of `vit_state`."""
    state = vit_state()
    return {
        "MAE": {"model": state | DECODER, "optimizer": {"step": 3}, "epoch": 7, "args": argparse.Namespace(lr=0.1)},
        "MAE, the model alone": {"model": state | DECODER},
        "MAE, flat": state | DECODER,
        "MAE, of several processes": {"model": {f"module.{name}": t for name, t in (state | DECODER).items()}},
        "FSFM": {
            "model": state
            | DECODER
            | {"rep_decoder_embed.weight": torch.zeros(2), "projector.0.weight": torch.zeros(2)}
            | {"predictor.0.weight": torch.zeros(2)}
        },
        "fine-tuned": {
            "model": {n: t for n, t in state.items() if not n.startswith("norm.")}
            | {n.replace("norm.", "fc_norm."): t for n, t in state.items() if n.startswith("norm.")}
            | {"head.weight": torch.zeros(8, 128), "head.bias": torch.zeros(8)}
        },
        "timm": state | {"head.weight": torch.zeros(1000, 128), "head.bias": torch.zeros(1000)},
        "below backbone.": {"state_dict": {f"backbone.{name}": t for name, t in state.items()}},
        "transformers 5": hf_names(state, version=5),
        "transformers 5, with a decoder": {f"vit.{n}": t for n, t in hf_names(state, version=5).items()}
        | {"decoder.mask_token": torch.zeros(1), "decoder.decoder_pred.weight": torch.zeros(2)},
        "transformers 4": hf_names(state, version=4),
        "transformers 4, with a decoder": {f"vit.{n}": t for n, t in hf_names(state, version=4).items()}
        | {"decoder.mask_token": torch.zeros(1)},
    }[layout]


LAYOUTS = (
    "MAE", "MAE, the model alone", "MAE, flat", "MAE, of several processes", "FSFM", "fine-tuned", "timm",
    "below backbone.", "transformers 5", "transformers 5, with a decoder", "transformers 4",
    "transformers 4, with a decoder",
)  # fmt: skip


def is_flat(content: dict) -> bool:
    return all(isinstance(value, Tensor) for value in content.values())


def save(content: dict, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.whole
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_vit_is_read_under_the_names_of_everyone(layout, suffix, tmp_path):
    content = published(layout)
    if suffix == ".safetensors" and not is_flat(content):
        pytest.skip("the format holds tensors alone")
    backbone = build_backbone("vit_small", SIZE)
    loaded = load_backbone_weights(backbone, save(content, tmp_path / f"weights{suffix}"))
    found, expected = backbone.state_dict(), vit_state()
    assert len(expected) > 70
    for name, tensor in expected.items():
        assert torch.equal(found[VIT + name], tensor), name
    assert loaded.num_loaded == len(expected)
    assert loaded.interpolated == []
    assert ("mean of tokens" in str(loaded)) == (layout == "fine-tuned")
    other = {"MAE": "decoder_embed", "timm": "head", "FSFM": "rep_decoder_embed"}
    if layout in other:
        assert other[layout] in str(loaded)


@pytest.mark.parametrize("name", ["iresnet18", "denseface", "densenet121"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_networks_of_faces_are_read_under_their_own_names(name, prefix, tmp_path):
    backbone = build_backbone(name)
    state = drawn(backbone.state_dict())
    rest = {"fc.weight": torch.zeros(512, 25088), "features.weight": torch.zeros(512)} if "iresnet" in name else {}
    rest = rest or {"classifier.weight": torch.zeros(8, 342)}
    content = {prefix + key: tensor for key, tensor in (state | rest).items()}
    loaded = load_backbone_weights(backbone, save(content, tmp_path / "backbone.pth"))
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    assert set(loaded.left_out) == set(rest)


def test_densenets_of_old_torchvision_have_dots_in_their_names(tmp_path):
    backbone = build_backbone("densenet121")
    state = drawn(backbone.state_dict())
    old = {}
    for key, tensor in state.items():
        for part in ("norm1", "norm2", "conv1", "conv2"):
            key = key.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.") if "denselayer" in key else key
        old[key] = tensor
    assert old.keys() != state.keys()
    load_backbone_weights(backbone, save(old, tmp_path / "old.pth"))
    assert all(torch.equal(tensor, state[key]) for key, tensor in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("name", "parameters", "with_head"),
    [
        ("iresnet18", 11_179_008, 24_025_600),
        ("iresnet34", 21_292_736, 34_139_328),
        ("iresnet50", 30_744_256, 43_590_848),
        ("iresnet100", 52_309_568, 65_156_160),
        ("densenet121", 6_953_856, None),
        ("denseface", 765_300, None),
    ],
)
def test_networks_have_the_parameters_that_were_published(name, parameters, with_head):
    with torch.device("meta"):
        backbone = build_backbone(name)
    assert num_parameters(backbone) == parameters
    if with_head:  # its embedding: a linear layer of 512 over 7 x 7 cells, and a BatchNorm
        assert parameters + 512 * (512 * 49 + 1) + 2 * 512 == with_head


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("iresnet18", 112, (512, 7, 7)),
        ("densenet121", 112, (1024, 3, 3)),
        ("denseface", 64, (342, 8, 8)),
        ("vit_small", 96, (128, 12, 12)),
        ("vit_tiny", 112, (192, 7, 7)),
    ],
)
def test_features_have_the_shape_that_is_documented(name, size, shape):
    backbone = build_backbone(name, size).eval()
    with torch.inference_mode():
        assert backbone(torch.zeros(1, 3, size, size)).shape == (1, *shape)
    assert backbone.num_channels == shape[0]
    assert OWN_BACKBONES[name].min_size <= size


def test_an_iresnet_computes_what_its_authors_code_does():
    """A block written out by functions, over images in [-1, 1]."""
    backbone = build_backbone("iresnet18").double().eval()
    backbone.load_state_dict(drawn(backbone.state_dict()))
    state = backbone.state_dict()
    images = torch.rand(1, 3, 112, 112, dtype=torch.float64)
    mean, std = (
        torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )

    def norm(x, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{name}.{key}"] for key in keys), eps=1e-5)

    with torch.inference_mode():
        given = backbone.renormalise((images - mean) / std)
        torch.testing.assert_close(given, images * 2 - 1, rtol=0, atol=1e-6)
        x = F.conv2d(given, state["conv1.weight"], padding=1)
        x = F.prelu(norm(x, "bn1"), state["prelu.weight"])
        y = F.conv2d(norm(x, "layer1.0.bn1"), state["layer1.0.conv1.weight"], padding=1)
        y = F.prelu(norm(y, "layer1.0.bn2"), state["layer1.0.prelu.weight"])
        y = norm(F.conv2d(y, state["layer1.0.conv2.weight"], stride=2, padding=1), "layer1.0.bn3")
        y = y + norm(F.conv2d(x, state["layer1.0.downsample.0.weight"], stride=2), "layer1.0.downsample.1")
        inside: list[Tensor] = []
        backbone.layer1[0].register_forward_hook(lambda module, args, output: inside.append(output))
        backbone((images - mean) / std)
    torch.testing.assert_close(inside[0], y, rtol=1e-9, atol=1e-9)


def test_positions_of_another_grid_are_interpolated_as_the_reference_does(tmp_path):
    state = vit_state()
    positions = torch.randn(1, 1 + 7 * 7, 128)
    path = save(state | {"pos_embed": positions}, tmp_path / "grid.pth")
    backbone = build_backbone("vit_small", SIZE)
    loaded = load_backbone_weights(backbone, path)
    grid = positions[:, 1:].reshape(1, 7, 7, 128).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False)
    found = backbone.state_dict()[VIT + "pos_embed"]
    assert torch.equal(found[:, :1], positions[:, :1])
    torch.testing.assert_close(found[:, 1:], expected.permute(0, 2, 3, 1).flatten(1, 2))
    assert "7^2 -> 4^2 places" in str(loaded)


def test_dinov2_in_chunks_and_with_registers(tmp_path):
    from mtl_dist.models.libraries import build_library_backbone

    backbone = build_library_backbone("timm", "vit_small_patch14_reg4_dinov2", input_size=56)
    state = drawn({name.removeprefix(VIT): tensor for name, tensor in backbone.state_dict().items()})
    chunked = {}
    for name, tensor in state.items():
        name = "register_tokens" if name == "reg_token" else name
        parts = name.split(".")
        chunked[".".join(["blocks", "0", *parts[1:]]) if parts[0] == "blocks" else name] = tensor
    chunked["mask_token"] = torch.zeros(1, 384)
    of_class = torch.full((1, 1, 384), 0.25)  # theirs have a place for the class token
    chunked["pos_embed"] = torch.cat([of_class, state["pos_embed"]], 1)
    state["cls_token"] = state["cls_token"] + of_class
    loaded = load_backbone_weights(backbone, save(chunked, tmp_path / "dino.pth"))
    assert loaded.layout == "DINOv2"
    for name, tensor in state.items():
        assert torch.equal(backbone.state_dict()[VIT + name], tensor), name


class Runs:
    """What runs a command where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refused(content, words: str, tmp_path: Path, backbone: Backbone | None = None) -> None:
    path = tmp_path / "weights.pth"
    content if isinstance(content, Path) else torch.save(content, path)
    with pytest.raises(InputError, match=words) as error:
        load_backbone_weights(backbone or build_backbone("vit_small", SIZE), path)
    assert "\n" not in str(error.value)


def test_what_is_no_weights_is_one_message(tmp_path):
    state = vit_state()
    refused({"model": state, "extra": Runs(tmp_path / "ran")}, "no state dict of plain tensors", tmp_path)
    assert not (tmp_path / "ran").exists()
    refused({"epoch": 3}, "holds no state dict", tmp_path)
    refused([1, 2], "holds no state dict", tmp_path)
    refused({f"stage.{n}.conv": torch.zeros(2) for n in range(9)}, r"begins with stage.0.conv, stage.1.conv", tmp_path)
    refused({n: t for n, t in state.items() if n != "norm.bias"}, "has no 'net.model.norm.bias'", tmp_path)
    refused(state | {"cls_token": torch.zeros(1, 1, 64)}, "'net.model.cls_token' has shape", tmp_path)
    refused(state | {"pos_embed": torch.zeros(1, 50, 64)}, "'net.model.pos_embed' has shape", tmp_path)
    refused(build_backbone("small").state_dict(), "no tensor that ViT has", tmp_path)
    whole = pickle.dumps(state)
    (tmp_path / "weights.pth").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "weights.pth", "no state dict of plain tensors", tmp_path)
