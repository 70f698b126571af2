"""The configuration: one tree for flags, files and search; preset < file < flags; mistakes name the nearest key."""

from __future__ import annotations

import contextlib
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
import yaml

from mtl_dist import storage
from mtl_dist.config import Config, build_config
from mtl_dist.data.augment import augment, make_draws, normalise
from mtl_dist.ensemble.options import EnsembleCommand
from mtl_dist.errors import InputError, nearest
from mtl_dist.families import FAMILIES, FEATURES
from mtl_dist.predict.options import PredictCommand
from mtl_dist.presets import (
    PRESETS,
    CommandConfig,
    config_of,
    load_preset,
    parse_command,
    read_config_file,
    with_absolute_paths,
)
from mtl_dist.report.options import ReportCommand
from mtl_dist.runs.same_run import check_same_run
from mtl_dist.settings import Section, Varies, dump_yaml, flatten, unflatten, varying
from mtl_dist.shards.__main__ import create, inspect, synth, verify
from mtl_dist.unread import check_read
from tests.conftest import REPO, assert_one_message, run_here
from tune.search import SearchConfig, best_yaml
from tune.space import read_space


def parse(*args: str) -> Config:
    return config_of(parse_command(CommandConfig, list(args), prog="test", description=""))


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    preset = parse("--preset", "small")
    path = tmp_path / "config.yaml"
    path.write_text("optim: {lr: 0.5, momentum: 0.25}\ndata.workers: 7\n")
    found = parse("--preset", "small", "--config", str(path), "--optim.lr", "0.125", "--optim.name", "sgd")
    assert found.optim.lr == 0.125  # of the flag
    assert found.optim.momentum == 0.25  # of the file
    assert found.data.workers == 7  # of the file, as a dotted key
    assert found.optim.weight_decay == preset.optim.weight_decay != Config().optim.weight_decay  # of the preset
    changed = {key for key, value in flatten(found).items() if value != flatten(preset)[key]}
    assert changed == {"optim.name", "optim.lr", "optim.momentum", "data.workers"}


def test_the_order_of_flags_does_not_matter(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("optim.lr: 0.5\n")
    args = [["--optim.lr", "0.125"], ["--config", str(path)], ["--preset=small"]]
    assert parse(*args[0], *args[1], *args[2]) == parse(*args[2], *args[1], *args[0])


def test_every_setting_can_be_given_as_a_flag_and_in_a_file(tmp_path):
    help_text = subprocess.run(
        [sys.executable, "-m", "mtl_dist.train", "--help"], capture_output=True, text=True, cwd=REPO, check=True
    ).stdout
    for key in flatten(Config()):
        section, _, name = key.rpartition(".")
        flag, negative = (f"--{section}.{prefix}{name}".replace("_", "-") for prefix in ("", "no-"))
        assert flag in help_text or negative in help_text, key


def dotted(tree: dict, path: str = "") -> list[str]:
    return [
        key
        for name, value in tree.items()
        for key in (dotted(value, f"{path}{name}.") if isinstance(value, dict) else [f"{path}{name}"])
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_from_settings_that_exist(name):
    config = build_config(load_preset(name))
    assert with_absolute_paths(config) == parse("--preset", name)
    defaults = flatten(Config())
    said = set(dotted(PRESETS[name]))
    assert {key for key, value in flatten(config).items() if value != defaults[key]} <= said <= set(defaults)


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_yaml_and_dotted_keys(name, tmp_path):
    changes = {"optim": {"lr": 1e-4}, "data": {"cache_dir": "/tmp/x"}, "ray": {"num_ranks": [1, 2]}}
    config = build_config(load_preset(name), changes)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    assert build_config(read_config_file(str(path))) == config
    assert build_config(unflatten(flatten(config))) == config
    path.write_text(yaml.safe_dump(flatten(config)))
    assert build_config(read_config_file(str(path))) == config
    assert parse("--config", str(path)) == with_absolute_paths(config)


# What the papers tell of their training, and their code (2203.12845), setting by setting; with what none tells: weight
# decay, and what is of no effect here: crop_scale beside resize, hidden (the baseline's).
PUBLISHED = {
    "data": {"image_size": 304, "sampling": "per_task", "epoch_fraction": 1 / 8},
    "augment": {
        "resize": 304, "flip": True, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "jitter_p": 0.8,
        "rotation": 0.0, "erase": 0.0, "crop_scale": [0.8, 1.0],
    },
    "model": {
        "backbone": "inception_v3", "weights": "imagenet", "freeze_backbone": False, "image_size": 299, "dropout": 0.3,
        "hidden": 4096, "drop_path": 0.0,
    },
    "loss": {
        "va": 1.0, "expr": 1.0, "au": 1.0, "balancing": "fixed", "expr_weights": "none", "au_weights": "none",
        "label_smoothing": 0.0, "va_mse": 0.0, "va_ccc": 1.0, "va_after": 0, "expr_focal": 0.0, "expr_prior": 0.0,
        "au_gamma_pos": 0.0, "au_gamma_neg": 0.0, "au_margin": 0.0, "gradients_every": 10,
        "teacher": "", "teacher_weight": 0.5, "teacher_confidence": 0.7, "teacher_after": 0,
    },
    "optim": {
        "name": "sgd", "lr": 0.001, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0005, "warmup_steps": 0,
        "final_lr": 0.0, "cosine_steps": 10_000, "clip_norm": None, "backbone_lr": 1.0, "layer_decay": 1.0,
        "freeze_backbone_for": 0.0,
    },
    "train": {"global_batch": 24, "epochs": 50, "accumulation": 1, "ema": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_recipe_of_the_paper_presets_is_the_published_one(name):
    found = parse("--preset", f"{name}-paper").model_dump(mode="json")
    assert found["model"].pop("name") == name
    for section in ("masked", "two_level", "sequence"):  # of other models
        del found["model"][section]
    del found["optim"]["betas"]  # of AdamW
    for section, expected in PUBLISHED.items():
        part = section in ("data", "train")  # they hold more than the recipe
        assert {key: value for key, value in found[section].items() if not part or key in expected} == expected


def test_the_paper_presets_cut_299_whole_pixels_out_of_the_304_that_the_loader_makes():
    config = parse("--preset", "a-paper")
    side, size = config.data.image_size, config.input_size
    inputs = torch.randint(256, (1, 1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = make_draws(torch.arange(12)[:, None], seed=0, epoch=0)
    plain = config.augment.model_copy(update={"jitter_p": 0.0})
    whole = normalise(inputs, side)[0, 0]
    places = set()
    for image, u in zip(augment(inputs.expand(12, -1, -1, -1, -1), draws, plain, size)[:, 0], draws[:, 0]):
        left, top = (int(u[i] * 6) for i in (2, 3))
        crop = whole[:, top : top + 299, left : left + 299]
        torch.testing.assert_close(image, crop.flip(-1) if u[4] < 0.5 else crop, rtol=0, atol=2e-3)
        places.add((left, top))
    assert len(places) > 6


def test_unflattening_nests_and_the_later_of_two_wins():
    assert unflatten({"optim.lr": 1, "optim": {"momentum": 2}, "run.name": "x"}) == {
        "optim": {"lr": 1, "momentum": 2},
        "run": {"name": "x"},
    }
    assert unflatten({"optim": {"lr": 1}, "optim.lr": 2}) == {"optim": {"lr": 2}}


def test_building_leaves_its_layers_and_the_presets_as_they_were():
    before = repr(PRESETS)
    layer = {"optim": {"lr": 0.5}}
    assert build_config(load_preset("small"), layer, {"optim": {"lr": 0.25}}).optim.lr == 0.25
    assert layer == {"optim": {"lr": 0.5}}
    assert repr(PRESETS) == before


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"optim": {"lrr": 1}}, "unknown configuration key 'optim.lrr': did you mean 'optim.lr'?"),
        ({"optimiser": {"lr": 1}}, "unknown configuration key 'optimiser': did you mean 'optim'?"),
        ({"lr": 1}, "unknown configuration key 'lr': known: augment, checkpoint, data"),
        ({"train": {"batch_size": 3}}, "unknown configuration key 'train.batch_size': "),
        ({"optim": 3}, "configuration section 'optim' is 3"),
        ({"optim": {"lr": "fast"}}, "optim.lr is 'fast'"),
        ({"optim": {"lr": 0}}, "optim.lr is 0: Input should be greater than 0"),
        ({"model": {"name": "e"}}, "model.name is 'e'"),
        ({"engine": {"zero_stage": 3}}, "engine.zero_stage is 3: Input should be 0, 1 or 2"),
        ({"optim": {"betas": [0.9, 1]}}, "optim.betas.1 is 1: Input should be less than 1"),
        (
            {"train": {"accumulation": 0, "ema": 7}},  # a value of two kinds; two faults of one section
            "train.accumulation is 0: Input should be 'auto', or Input should be greater than or equal to 1; "
            "train.ema is 7: Input should be less than 1",
        ),
        ({"data": {"streams": 5}}, "data.streams 5 does not divide train.global_batch 24"),
        ({"ray": {"num_ranks": [1, 30]}}, "ray.num_ranks goes up to 30 but there are 24 streams"),
        ({"ray": {"gpus_per_rank": 2}}, "ray.gpus_per_rank is 2; a rank computes on one GPU: 0 or 1"),
        ({"run": {"name": "../x"}}, "run.name is '../x': a name is letters"),
    ],
)
def test_a_mistake_names_key_value_and_remedy_in_one_line(layer, words):
    with pytest.raises(InputError) as error:
        build_config(layer)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # from a rank to who started it


def numbers_of(section: type[Section]) -> list[tuple[str, type]]:
    """(name, int or float) of every setting that is a number or a pair of them."""
    found = []
    for name, field in section.model_fields.items():
        one_of = [getattr(kind, "__origin__", kind) for kind in get_args(field.annotation)]  # Annotated[int, ...]: int
        kinds = {field.annotation, *one_of} & {int, float}
        found += [(name, kind) for kind in kinds if get_origin(field.annotation) is not Literal]
    return found


SECTIONS = {key: field.annotation for key, field in Config.model_fields.items()} | {"search": SearchConfig}
NUMBERS = [(section, name, kind) for section, of in SECTIONS.items() for name, kind in numbers_of(of)]


def test_the_settings_that_are_numbers_are_found():
    assert len(NUMBERS) > 50
    assert {
        ("run", "seed", int),
        ("optim", "lr", float),
        ("train", "accumulation", int),
        ("ray", "num_ranks", int),
        ("augment", "crop_scale", float),
    } <= {*NUMBERS}


@pytest.mark.parametrize(("section", "name", "kind"), NUMBERS)
def test_every_number_has_a_least_and_a_most_and_is_no_infinity_nan_or_boolean(section, name, kind):
    """Far beyond what anyone could mean, in a pair of numbers in either place."""
    wrong = [True] + ([1e300, -1e300, math.inf, -math.inf, math.nan] if kind is float else [10**30, -(10**30)])
    is_pair = get_origin(SECTIONS[section].model_fields[name].annotation) is tuple
    for value in [v for w in wrong for v in ([[w, 1], [1, w]] if is_pair and w is not True else [w])]:
        with pytest.raises(InputError, match=f"{name}.*"):
            SearchConfig(**{name: value}) if section == "search" else build_config({section: {name: value}})


@pytest.mark.parametrize("scale", [[80, 100], [-1, 0], [0, 1], [1, 0.8], [0.8, 1.01], [math.nan, 1]])
def test_a_crop_is_a_share_of_the_side(scale):
    with pytest.raises(InputError, match=r"augment\.crop_scale"):
        build_config({"augment": {"crop_scale": scale}})
    for fine in ([0.8, 1], [1, 1], [0.5, 0.5]):
        build_config({"augment": {"crop_scale": fine}})


OPTIONS = {  # command -> what it must be given, and what it is told of numbers
    "mtl_dist.ensemble": (["--runs", "r", "--out", "o"], EnsembleCommand),
    "mtl_dist.predict": (["--runs", "r", "--input", "i", "--out", "o.csv"], PredictCommand),
    "mtl_dist.report": (["r", "--out", "o"], ReportCommand),
    "mtl_dist.shards create": (["s", "d"], create),
    "mtl_dist.shards verify": (["u"], verify),
    "mtl_dist.shards inspect": (["u"], inspect),
    "mtl_dist.shards synth": (["d"], synth),
}
OPTION_NUMBERS = [
    (command, name, kind)
    for command, (_, of) in OPTIONS.items()
    for name, hint in get_type_hints(of).items()
    for kind in {hint, *get_args(hint)} & {int, float}
]


@pytest.mark.parametrize(("command", "name", "kind"), OPTION_NUMBERS)
def test_every_number_a_command_takes_has_a_least_and_a_most(command, name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, *verb = command.split()
    flag = f"--{name.replace('_', '-')}"
    for value in [10**30, -(10**30)] + ([math.inf, math.nan] if kind is float else []):
        assert_one_message(run_here(module, *verb, *OPTIONS[command][0], f"{flag}={value}"), flag)
    assert not list(tmp_path.iterdir())


def test_several_mistakes_are_told_at_once():
    with pytest.raises(InputError) as error:
        build_config({"optim": {"lr": -1, "momentum": 2}})
    assert "lr is -1" in str(error.value)
    assert "momentum is 2" in str(error.value)


def test_a_section_built_alone_refuses_unknown_keys_and_changes():
    config = Config()
    with pytest.raises(InputError, match="lrr"):
        type(config.optim)(lrr=1)
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 3


@pytest.mark.parametrize(
    ("batch", "streams", "expected"), [(24, None, 24), (96, None, 48), (128, None, 64), (97, None, 1), (24, 6, 6)]
)
def test_the_number_of_streams_is_given_or_the_largest_divisor_up_to_64(batch, streams, expected):
    assert build_config({"train": {"global_batch": batch}, "data": {"streams": streams}}).num_streams == expected


@pytest.mark.parametrize("value", [3, [3, 3]])
def test_one_number_of_ranks_is_both_ends_of_the_range(value):
    assert build_config({"ray": {"num_ranks": value}}).ray.num_ranks == (3, 3)


def test_nearest_lists_what_is_known_where_nothing_is_near():
    assert nearest("expresion", ["expression", "au"]) == "did you mean 'expression'?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"


HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as ended:
    code = ended.code or 0
heavy = sorted({"torch", "ray", "deepspeed", "torchvision", "boto3", "webdataset"} & set(sys.modules))
print("HEAVY", heavy, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.whole
@pytest.mark.parametrize(
    "module",
    [
        *(f"mtl_dist.{name}" for name in ("shards", "train", "predict", "ensemble", "export", "report")),
        "tune.search",
        "cluster.local",
        "cluster.demo",
    ],
)
def test_help_answers_with_examples_and_without_heavy_imports(module):
    done = subprocess.run([sys.executable, "-c", HELP, module], capture_output=True, text=True, cwd=REPO, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"python -m {module}" in done.stdout
    assert done.stderr.splitlines()[-1] == "HEAVY []"


@pytest.mark.whole
def test_make_results_tells_the_time_of_all_its_calls_and_of_their_processes(tmp_path):
    from benchmarks.comparators import read_spent, timed

    burn = [sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"]
    path, found = tmp_path / "results" / "spent.json", []
    for interrupted in (True, False, False):
        with contextlib.suppress(KeyboardInterrupt), timed(path, of=[3, 12]):
            subprocess.run(burn, check=True)
            if interrupted:
                raise KeyboardInterrupt
        found.append(read_spent(path))
    assert [spent["calls"] for spent in found] == [1, 2, 2]
    assert [spent["finished"] for spent in found] == [None, [3, 12], [3, 12]]
    assert 0.5 <= found[0]["cpu_seconds"] <= found[1]["cpu_seconds"] - 0.5 < 10
    assert 0.5 <= found[0]["seconds"] <= found[1]["seconds"] - 0.5
    assert found[2] == found[1]
    with timed(path, of=[5, 12]):  # more seeds
        pass
    assert read_spent(path)["calls"] == 3


def test_every_training_of_make_results_has_flags_that_exist():
    from benchmarks.comparators import METHODS, job, pretrain_args
    from mtl_dist.train import TrainCommand

    commands = [job(Path("d"), Path("r"), name, 1, 12)[1] for name in METHODS] + [pretrain_args(Path("d"), Path("r"))]
    for module, *args in commands:
        assert module == "mtl_dist.train"
        command = parse_command(TrainCommand, args, prog="test", description="")
        assert command.model.freeze_backbone == (command.run.name == "baseline-1")
        assert command.local


def test_faces_of_prepare_and_supplied_crops_are_trained_by_the_same_flags_on_other_data():
    from benchmarks.faces_end_to_end import PREPARED, SUPPLIED, training
    from mtl_dist.train import TrainCommand

    configs = {}
    for way in (SUPPLIED, PREPARED):
        _, (module, *args) = training(Path("d"), way, "cropped", 1, 30)
        assert module == "mtl_dist.train"
        configs[way] = parse_command(TrainCommand, args, prog="test", description="").model_dump()
        assert configs[way]["data"].pop("train") == f"d/sets/{way}/cropped/train"
        assert configs[way]["data"].pop("val") == f"d/sets/{way}/cropped/val"
        assert configs[way]["run"].pop("name") == f"{way}-cropped-1"
    assert configs[SUPPLIED] == configs[PREPARED]


def test_predictions_of_two_sets_are_compared_picture_by_picture_in_whatever_order_their_rows_are():
    from benchmarks.faces_end_to_end import num_right, of_images
    from mtl_dist.objective.affect import PredictedRows
    from mtl_dist.objective.metrics import Predictions, Targets
    from mtl_dist.predicting.predictions import PredictionTable

    targets = Targets(
        *(np.zeros((3, 2)), np.array([2, 0, 4]), np.zeros((3, 12))),
        np.zeros(3, bool),
        np.ones(3, bool),
        np.zeros((3, 12), bool),
    )
    predicted = Predictions(np.zeros((3, 2)), np.eye(8)[[2, 1, 4]], np.zeros((3, 12)))
    table = PredictionTable(
        PredictedRows(np.array([7, 8, 9]), predicted, targets), ["c/1", "a/1", "b/1"], ["c", "a", "b"]
    )
    taken = of_images(table, ["b/1", "c/1"])
    assert taken.rows.rows.tolist() == [9, 7]
    assert taken.rows.targets.expr.tolist() == [4, 2]
    assert num_right(taken) == 2
    assert num_right(of_images(table, ["a/1", "b/1", "c/1"])) == 2
    assert len(set(taken.videos.tolist())) == 2


GREEDY = {
    "aliases of aliases": "a0: &a0 [x]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 25)),
    "a mapping of itself": "optim: &o {lr: *o}",
    "brackets": "[" * 2_000,
    "dots": f"{'a.' * 20_000}b: 1",
    "a date that is none": "optim: 2026-99-99",
    "a long number": f"optim: {{lr: {'9' * 5000}}}",
}


@pytest.mark.whole
@pytest.mark.parametrize("text", GREEDY.values(), ids=GREEDY)
def test_yaml_that_asks_for_much_is_refused_in_one_short_message(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError) as refused:
        build_config(read_config_file(str(tmp_path / "x.yaml")))
    assert len(str(refused.value)) < 1000
    with pytest.raises(InputError):
        read_space(tmp_path / "x.yaml", Config())


@pytest.mark.parametrize("text", ["optim: {lr: 0.1}\ntrain: {epochs: 3}\noptim: {momentum: 0.5}", "a: {b: 1, b: 2}"])
def test_a_key_that_yaml_has_twice_is_refused(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=r"x\.yaml is not YAML: line \d has the key '(optim|b)' again"):
        read_config_file(str(tmp_path / "x.yaml"))


def test_an_empty_place_to_write_to_is_refused():
    with pytest.raises(InputError, match=r"run\.storage is ''"):
        build_config({"run": {"storage": ""}})
    with pytest.raises(InputError, match="--out is empty; expected a directory or s3://bucket/prefix"):
        storage.check_writable("", flag="--out")


def test_yaml_with_a_few_aliases_is_read(tmp_path):
    (tmp_path / "x.yaml").write_text("loss: {va: &one 2.0, expr: *one}")
    assert read_config_file(str(tmp_path / "x.yaml")) == {"loss": {"va": 2.0, "expr": 2.0}}


# The settings that say at their field where they may have another value: a name added or lost is seen here.
VARYING = {
    Varies.BY_RANK: {
        "run.audit_dir", "data.train", "data.val", "data.workers", "data.prefetch", "data.cache_dir", "data.cache_gib",
        "engine.threads",
    },
    Varies.BY_PART: {
        "run.storage", "run.track", "run.profile", "loss.gradients_every",
        "engine.device", "engine.zero_stage", "engine.overlap", "engine.hang_s", "engine.cudnn_benchmark",
        "engine.compile",
        "train.eval_batch", "train.stop_epoch", "train.patience",
        "checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.keep_last", "checkpoint.keep_best",
        "checkpoint.keep_every_hours", "checkpoint.best_of",
        "ray.num_ranks", "ray.cpus_per_rank", "ray.gpus_per_rank", "ray.placement", "ray.autoscaling",
        "ray.resize_every_s", "ray.max_failures",
    },
}  # fmt: skip
# What everything of a run can be gone on with only where it is the same: tensors, and the order of samples.
NEVER_VARYING = {
    "run.seed", "data.image_size", "data.streams", "data.block_shards", "data.sampling", "data.epoch_fraction",
    "data.mix", "data.mix_to", "data.balance", "data.balance_power", "data.fold",
    "model.name", "model.backbone", "model.freeze_backbone", "model.image_size", "model.hidden", "loss.balancing",
    "model.masked.normalise", "model.masked.decoder_depth", "model.masked.decoder_heads",
    "model.masked.decoder_width", "model.two_level.position_attention", "model.two_level.layer_attention",
    "model.two_level.categorical_feedback", "model.two_level.detach_categorical", "optim.name",
    "model.sequence.encoder", "model.sequence.bidirectional", "model.sequence.framework", "model.sequence.feed_source",
    "model.sequence.feed_target", "model.sequence.hidden", "model.sequence.layers", "model.sequence.private_layers",
    "model.sequence.heads", "model.sequence.ffn", "model.sequence.head_widths", "model.sequence.window",
    "model.sequence.context", "model.sequence.dims",
    "optim.momentum", "optim.nesterov", "optim.betas",
    "engine.batchnorm", "train.global_batch", "train.ema",
}  # fmt: skip


def test_the_settings_that_may_vary_between_ranks_parts_and_runs_are_these():
    assert varying(Config, Varies.BY_RANK) == VARYING[Varies.BY_RANK]
    assert varying(Config, Varies.BY_PART) == VARYING[Varies.BY_RANK] | VARYING[Varies.BY_PART]
    assert varying(Config, Varies.BY_RUN) == flatten(Config()).keys() - NEVER_VARYING


NESTED = r"""
import pydantic
import mtl_dist.config as config
from typing import Annotated
from mtl_dist import settings

class Branch(settings.Section):
    hidden: int = pydantic.Field(64, ge=1, le=1000)
    causal: Annotated[bool, settings.Varies.BY_PART] = False

class Model(config.ModelConfig):
    branch: Branch = Branch()

class Nested(config.Config):
    model: Model = Model()

config.Config = Nested  # before anything else has it

import sys
from pathlib import Path
import yaml
from mtl_dist.errors import InputError
from mtl_dist.presets import CommandConfig, config_of, parse_command
from mtl_dist.runs.checkpoint import check_same_run
from tune.search import best_yaml
from tune.space import read_space

def parse(*args):
    return config_of(parse_command(CommandConfig, ["--preset", "small", *args], prog="test", description=""))

def refused(words, call, *args):
    try:
        call(*args)
    except InputError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)

file = Path(sys.argv[1]) / "file.yaml"
found = parse("--model.branch.hidden", "32", "--model.branch.causal")
assert (found.model.branch.hidden, found.model.branch.causal) == (32, True)
assert settings.flatten(found)["model.branch.hidden"] == 32
assert config.build_config(settings.unflatten(settings.flatten(found))) == found
for text in ("model: {branch: {hidden: 32, causal: true}}",
             "model.branch.hidden: 32\nmodel.branch: {causal: true}",
             settings.dump_yaml(found), yaml.safe_dump(settings.flatten(found))):
    file.write_text(text)
    assert parse("--config", str(file)) == found, text
assert parse("--config", str(file), "--model.branch.hidden", "8").model.branch.hidden == 8
refused("model.branch.hidden is 0", parse, "--model.branch.hidden", "0")
refused("unknown configuration key 'model.branch.hiden': did you mean 'model.branch.hidden'?",
        config.build_config, {"model": {"branch": {"hiden": 1}}})
refused("model.branch.hidden is 0", config.build_config, {"model": {"branch": {"hidden": 0}}})
refused("section 'model.branch' is 3", config.build_config, {"model": {"branch": 3}})

file.write_text("model.branch.hidden: {integer: [8, 16]}")
assert read_space(file, found) == {"model.branch.hidden": {"integer": [8, 16]}}
file.write_text(best_yaml(found, {"model.branch.hidden": 9}))
best = yaml.safe_load(file.read_text())
assert best["model"]["branch"] == {"hidden": 9, "causal": True}, best
assert parse("--config", str(file)).model.branch.hidden == 9

assert "model.branch.causal" in settings.varying(Nested, settings.Varies.BY_PART)
state = {"config": settings.flatten(found), "identity": {}, "step": 1, "scores": {}}
check_same_run(state, parse("--model.branch.hidden", "32", "--run.storage", "elsewhere"), {}, "here")
refused("model.branch.hidden 32", check_same_run, state, parse(), {}, "here")
print("all of it")
"""


@pytest.mark.whole
def test_a_section_may_nest_in_flags_files_search_space_and_what_is_written(tmp_path):
    done = subprocess.run([sys.executable, "-c", NESTED, tmp_path], capture_output=True, text=True, cwd=REPO)
    assert (done.returncode, done.stdout) == (0, "all of it\n"), done.stdout + done.stderr


UNREAD = [  # flags that nothing reads, what reads them, and what is said
    (["--model.hidden", "8"], ["--model.name", "baseline"], "model.name is a; it is for baseline"),
    (["--optim.momentum", "0.5"], ["--optim.name", "sgd"], "optim.name is adamw; it is for sgd"),
    (["--optim.no-nesterov"], ["--optim.name", "sgd"], "optim.name is adamw; it is for sgd"),
    (["--augment.crop-scale", "0.5", "1"], [], "augment.resize is 200, which is there instead"),
    (["--data.prefetch", "9"], ["--data.workers", "1"], "data.workers is 0; it is for 1 or more"),
    (["--loss.teacher-weight", "2"], ["--loss.teacher", "/runs/one"], "it is for loss.teacher"),
]


@pytest.mark.parametrize(("flags", "remedy", "words"), UNREAD)
def test_a_setting_that_is_changed_and_not_read_is_refused_by_flag_and_in_a_file(flags, remedy, words, tmp_path):
    base = ["--preset", "small", "--data.workers", "0", "--augment.resize", "200"]
    with pytest.raises(InputError, match=re.escape(words)):
        parse(*base, *flags)
    keep = base if remedy else base[:-2]
    found, before = parse(*keep, *remedy, *flags), flatten(parse(*keep, *remedy))
    changed = {key: value for key, value in flatten(found).items() if value != before[key]}
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(changed))
    assert parse(*keep, *remedy, "--config", str(tmp_path / "part.yaml")) == found
    with pytest.raises(InputError, match=re.escape(words)):
        parse(*base, "--config", str(tmp_path / "part.yaml"))
    assert parse(
        *base, "--config", str(tmp_path / "part.yaml"), *remedy, *([] if remedy else ["--augment.resize", "None"])
    )


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("model", FAMILIES)
def test_what_a_preset_or_the_default_has_is_not_refused_beside_another_choice(name, model):
    only, of_features = FAMILIES[model].backbones, PRESETS[name]["model"].get("backbone") == FEATURES
    other = only[:1] if only else ("small",) if of_features and model != "c" else ()
    fits = {"backbone": other[0], "image_size": 96} if other else {}
    resized = {} if of_features and model == "c" else {"augment": {"resize": 400}}  # there is nothing to resize
    for more in ({}, {"optim": {"name": "adamw"}}, resized, {"data": {"workers": 0}}):
        chosen = build_config(load_preset(name), {"model": {"name": model, **fits}}, more)
        check_read(chosen, build_config(load_preset(name)))


def test_what_the_default_or_the_preset_has_may_be_said_where_nothing_reads_it():
    assert parse("--preset", "small", "--model.hidden", "4096") == parse("--preset", "small")  # the default
    ours = ["--preset", "small-baseline", "--model.name", "a"]
    assert parse(*ours, "--model.hidden", "256") == parse(*ours)  # the preset's


def test_a_configuration_that_a_run_wrote_is_taken_as_it_is_and_flags_over_it_are_not(tmp_path):
    path = tmp_path / "config.yaml"
    config = build_config(load_preset("small"), {"model": {"hidden": 8}, "optim": {"momentum": 0.5}})
    path.write_text(dump_yaml(config))
    assert parse("--config", str(path)) == with_absolute_paths(config)
    with pytest.raises(InputError, match=r"model\.hidden is 9, and nothing reads it: model\.name is a"):
        parse("--config", str(path), "--model.hidden", "9")
    config = with_absolute_paths(build_config(load_preset("small")))
    path.write_text(best_yaml(config, {"optim.lr": 0.5}))
    assert parse("--config", str(path)).optim.lr == 0.5


def test_what_is_not_read_does_not_make_a_run_another(tmp_path):
    state = {"config": flatten(build_config(load_preset("small"), {"model": {"hidden": 8}})), "identity": {}}
    state |= {"step": 1, "scores": {}}
    check_same_run(state, build_config(load_preset("small")), {}, "here")
    with pytest.raises(InputError, match=r"model\.hidden"):
        check_same_run(state, build_config(load_preset("small"), {"model": {"name": "baseline"}}), {}, "here")


def test_a_search_space_of_what_no_draw_reads_is_refused(tmp_path):
    path, config = tmp_path / "space.yaml", build_config(load_preset("small"))
    path.write_text("optim.momentum: {uniform: [0.5, 0.9]}\n")
    with pytest.raises(InputError, match=r"nothing reads optim\.momentum: optim\.name is adamw"):
        read_space(path, config)
    path.write_text("optim.momentum: {uniform: [0.5, 0.9]}\noptim.name: {choice: [sgd, adamw]}\n")
    assert read_space(path, config).keys() == {"optim.momentum", "optim.name"}
