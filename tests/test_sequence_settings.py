"""Settings of sequence models: which go together, which nothing reads, and the presets of system C."""

from __future__ import annotations

import re

import pytest

from mtl_dist.config import build_config
from mtl_dist.errors import InputError
from mtl_dist.families import preparation_of
from mtl_dist.model_config import SequenceConfig
from mtl_dist.models import build_model
from mtl_dist.presets import PRESETS, CommandConfig, config_of, load_preset, parse_command
from mtl_dist.unread import find_unread
from tests.windows import DIMS

PRESETS_OF_C = [name for name, preset in PRESETS.items() if preset["model"].get("name") == "c"]


def parse(*args):
    return config_of(parse_command(CommandConfig, list(args), prog="test", description=""))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden": 100, "heads": 16}, "hidden 100 is no multiple of heads 16"),
        ({"framework": "share_bottom", "layers": 3, "private_layers": 3}, "no layer would be left to share"),
        (
            {"framework": "share_bottom", "feed_source": ["v"], "feed_target": ["a"], "head_widths": [512, 100]},
            "feed_target's layers would be 1124 wide (hidden 1024, and 100 of each of 1 sources): no multiple of a "
            "head's 64",
        ),
        ({"feed_source": ["v", "au"], "feed_target": ["au"]}, "feed_source and feed_target both have au"),
        ({"feed_source": ["va"], "feed_target": ["au"]}, "model.sequence.feed_source.0 is 'va'"),
        ({"feed_source": ["v", "v"], "feed_target": ["a"]}, "expected each of them once"),
        ({"feed_source": ["v"]}, "feed_source is given and feed_target is empty: give both, or neither"),
        ({"feed_target": ["v"]}, "feed_target is given and feed_source is empty: give both, or neither"),
        ({"bidirectional": True}, "bidirectional is for lstm and gru, and encoder is transformer"),
        ({"encoder": "tcn", "bidirectional": True}, "bidirectional is for lstm and gru, and encoder is tcn"),
        ({"encoder": "rnn"}, "model.sequence.encoder is 'rnn'"),
        ({"window": 1}, "model.sequence.window is 1: Input should be greater than or equal to 2"),
        ({"context": -1}, "model.sequence.context is -1: Input should be greater than or equal to 0"),
        ({"head_widths": []}, "model.sequence.head_widths is []"),
        ({"positions": "frame"}, "unknown configuration key 'model.sequence.positions'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_in_one_line(changes, words):
    with pytest.raises(InputError) as error:
        build_config({"model": {"name": "c", "sequence": changes}})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_not_of_the_encoder_is_not_checked():
    for layer in (
        {"encoder": "gru", "hidden": 100},
        {"layers": 1},
        {"encoder": "tcn", "framework": "share_bottom", "feed_source": ["v"], "feed_target": ["a"], "head_widths": [7]},
        {"feed_source": ["v"], "feed_target": ["a"], "head_widths": [7]},  # no layers, whose heads it would not fit
    ):
        assert build_config({"model": {"name": "c", "sequence": layer}})


@pytest.mark.parametrize(("source", "task"), [("v", "va"), ("a", "va"), ("expr", "expr"), ("au", "au")])
def test_a_source_that_is_not_trained_is_refused(source, task):
    target = "expr" if source == "au" else "au"
    sequence = {"feed_source": [source], "feed_target": [target]}
    with pytest.raises(InputError, match=rf"feed_source has {source}, and loss\.{task} is 0: what it feeds would be"):
        build_config({"model": {"name": "c", "sequence": sequence}, "loss": {task: 0.0}})
    assert build_config({"model": {"name": "a", "sequence": sequence}, "loss": {task: 0.0}})


def test_sources_and_targets_have_one_order():
    assert SequenceConfig(feed_source=("au", "v"), feed_target=("expr", "a")) == SequenceConfig(
        feed_source=("v", "au"), feed_target=("a", "expr")
    )


def test_features_are_for_sequence_models_alone():
    with pytest.raises(InputError, match=r"model\.backbone features is for model\.name c, not a; give a backbone of"):
        build_config({"model": {"name": "a", "backbone": "features"}})
    sequence = {"dims": DIMS, "hidden": 16, "ffn": 8}
    config = build_config({"model": {"name": "c", "backbone": "features", "sequence": sequence}})
    with pytest.raises(InputError, match=r"no ImageNet weights for Features; take --model\.weights none"):
        build_model(config.model)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--augment.rotation", "3"], "model.backbone is features, which has no use for it"),
        (["--data.image-size", "96"], "model.backbone is features, which has no use for it"),
        (["--model.freeze-backbone"], "model.backbone is features, which has no use for it"),
        (["--model.sequence.heads", "8"], "model.sequence.encoder is gru; it is for a transformer"),
        (["--model.sequence.private-layers", "2"], "model.sequence.framework is share; it is for share_bottom"),
        (["--model.name", "a", "--model.backbone", "small", "--model.sequence.window", "9"], "it is for c"),
        (["--model.backbone", "small", "--model.sequence.dims", "9"], "model.backbone is small; it is for features"),
    ],
)
def test_what_a_sequence_model_does_not_read_is_refused(args, why):
    with pytest.raises(InputError, match=re.escape(why)):
        parse("--preset", "small-c", *args)


def test_inputs_are_prepared_as_the_backbone_wants_them():
    assert preparation_of("c", "features") == "features:build_feature_preparation"
    for name, backbone in (("c", "small"), ("c", "timm:resnet18"), ("a", "small")):
        assert preparation_of(name, backbone) == "augment:build_image_preparation"
    assert "augment" not in find_unread(build_config({"model": {"name": "c", "backbone": "small"}}))


def test_valence_and_arousal_need_a_loss():
    with pytest.raises(InputError, match="va_ccc and va_mse are both 0: VA would have no loss"):
        build_config({"loss": {"va_ccc": 0.0}})
    assert build_config({"loss": {"va_ccc": 0.0, "va": 0.0}})


def test_the_paper_s_preset_is_the_published_recipe():
    found = parse("--preset", "c-paper").model_dump(mode="json")
    expected = {
        "model": {"name": "c", "backbone": "features", "dropout": 0.3},
        "loss": {"va": 24.0, "expr": 0.35, "au": 1.0, "va_ccc": 0.0, "va_mse": 1.0, "expr_weights": "none"},
        "optim": {"name": "adamw", "lr": 5e-5, "betas": [0.5, 0.999], "weight_decay": 0.0, "clip_norm": 5.0},
        "train": {"global_batch": 8, "epochs": 50},
    }
    for section, values in expected.items():
        assert {key: found[section][key] for key in values} == values
    assert found["model"]["sequence"] == {
        "encoder": "transformer", "bidirectional": False, "framework": "share_bottom", "feed_source": ["v", "au"],
        "feed_target": ["a"], "hidden": 1024, "layers": 4, "private_layers": 3, "heads": 16, "ffn": 2048,
        "head_widths": [512, 256], "window": 64, "context": 0, "dims": [],
    }  # fmt: skip


@pytest.mark.parametrize("name", PRESETS_OF_C)
def test_a_preset_of_c_differs_from_the_default_in_what_is_read(name):
    """But for what the laptop's preset has for its other encoder and its other framework."""
    config = build_config(load_preset(name))
    said = {f"model.sequence.{key}" for key in PRESETS[name]["model"].get("sequence", ())}
    spare = {f"model.sequence.{key}" for key in ("heads", "ffn", "private_layers")} if name == "small-c" else set()
    assert said & find_unread(config).keys() == spare
    assert not config.model.sequence.dims


@pytest.mark.parametrize("encoder", ["transformer", "lstm", "gru", "tcn"])
@pytest.mark.parametrize("framework", ["share", "share_bottom"])
def test_the_laptop_s_preset_takes_every_encoder_and_framework(encoder, framework):
    one_way = [] if encoder in ("lstm", "gru") else ["--model.sequence.no-bidirectional"]
    fed = ["--model.sequence.feed-source", "v", "au", "--model.sequence.feed-target", "a"]
    chosen = ["--model.sequence.encoder", encoder, "--model.sequence.framework", framework]
    config = parse("--preset", "small-c", *chosen, *one_way, *fed, "--model.sequence.dims", *map(str, DIMS))
    assert build_model(config.model).config.encoder == encoder
