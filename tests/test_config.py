"""The configuration: one tree for flags, files and search; preset < file < flags; mistakes name the nearest key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mtl_dist.config import Config, build_config, dump_yaml, flatten, read_config_file, unflatten
from mtl_dist.errors import InputError, nearest
from mtl_dist.presets import PRESETS, CommandConfig, config_of, load_preset, parse_command, with_absolute_paths
from tests.conftest import REPO


def parse(*args: str) -> Config:
    return config_of(parse_command(CommandConfig, list(args), prog="test", description=""))


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    preset = parse("--preset", "small")
    path = tmp_path / "config.yaml"
    path.write_text("optim: {lr: 0.5, momentum: 0.25}\ndata.workers: 7\n")
    found = parse("--preset", "small", "--config", str(path), "--optim.lr", "0.125")
    assert found.optim.lr == 0.125  # of the flag
    assert found.optim.momentum == 0.25  # of the file
    assert found.data.workers == 7  # of the file, as a dotted key
    assert found.optim.weight_decay == preset.optim.weight_decay != Config().optim.weight_decay  # of the preset
    changed = {key for key, value in flatten(found).items() if value != flatten(preset)[key]}
    assert changed == {"optim.lr", "optim.momentum", "data.workers"}


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
        section, name = key.split(".")
        flag, negative = (f"--{section}.{prefix}{name}".replace("_", "-") for prefix in ("", "no-"))
        assert flag in help_text or negative in help_text, key


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_from_settings_that_exist(name):
    config = build_config(load_preset(name))
    assert with_absolute_paths(config) == parse("--preset", name)
    defaults = flatten(Config())
    said = {f"{section}.{key}" for section, values in PRESETS[name].items() for key in values}
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
        ({"model": {"name": "c"}}, "model.name is 'c'"),
        ({"engine": {"zero_stage": 3}}, "ZeRO 3 is refused: it shards 30 M parameters"),
        ({"engine": {"zero_stage": 4}}, "engine.zero_stage is 4: expected 0, 1 or 2"),
        ({"data": {"streams": 5}}, "data.streams 5 does not divide train.global_batch 24"),
        ({"ray": {"num_ranks": [1, 30]}}, "ray.num_ranks goes up to 30 but there are 24 streams"),
        ({"ray": {"gpus_per_rank": 2}}, "ray.gpus_per_rank is 2; a rank computes on one GPU: 0 or 1"),
        ({"run": {"name": "../x"}}, "run.name is '../x': a run name is letters"),
    ],
)
def test_a_mistake_names_key_value_and_remedy_in_one_line(layer, words):
    with pytest.raises(InputError) as error:
        build_config(layer)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


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


@pytest.mark.parametrize(
    "module", ["mtl_dist.shards", "mtl_dist.train", "mtl_dist.ensemble", "tune.search", "cluster.local"]
)
def test_help_answers_with_examples_and_without_heavy_imports(module):
    done = subprocess.run([sys.executable, "-c", HELP, module], capture_output=True, text=True, cwd=REPO, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"python -m {module}" in done.stdout
    assert done.stderr.splitlines()[-1] == "HEAVY []"


def test_every_training_of_make_results_has_flags_that_exist():
    from benchmarks.comparators import METHODS, job, pretrain_args
    from mtl_dist.train import TrainCommand

    commands = [job(Path("d"), Path("r"), name, 1, 12)[1] for name in METHODS] + [pretrain_args(Path("d"), Path("r"))]
    for module, *args in commands:
        assert module == "mtl_dist.train"
        command = parse_command(TrainCommand, args, prog="test", description="")
        assert command.model.freeze_backbone == (command.run.name == "baseline-1")
        assert command.local
