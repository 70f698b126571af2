"""The precision of a run: decided once, kept by its checkpoints; and the model compiled."""

from __future__ import annotations

import pytest
import torch

from mtl_dist.config import Config, build_config
from mtl_dist.errors import InputError
from mtl_dist.runs.same_run import differences
from mtl_dist.settings import Varies, flatten
from mtl_dist.tasks import Batch
from mtl_dist.training import precision
from mtl_dist.training.compiling import compile_model
from mtl_dist.training.precision import describe_arithmetic, note_arithmetic, set_precision, settle_autocast
from mtl_dist.unread import check_read
from tests.fake_gpus import fake_gpus
from tests.test_devices import make_batch, make_config, make_module

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
AUTO = Config()


def autocast(config: Config, device: torch.device, theirs) -> str:
    return settle_autocast(config, device, theirs).engine.autocast


def test_what_is_chosen_is_chosen_when_a_run_begins():
    assert autocast(AUTO, CPU, None) == "none"
    with fake_gpus():
        assert autocast(AUTO, GPU, None) == "bf16"


def test_one_rank_without_bf16_decides_for_all(monkeypatch):
    monkeypatch.setattr(precision, "gather_lists", lambda mine: [True, *mine])
    assert autocast(AUTO, CPU, None) == "none"


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("kept", ["none", "bf16"])
def test_a_run_that_is_continued_keeps_its_own_wherever_that_is(device, kept):
    with fake_gpus():
        assert autocast(AUTO, device, {"engine.autocast": kept}) == kept
        assert autocast(AUTO, device, {}) == "none"  # of a version that knew no other


@pytest.mark.parametrize("given", ["none", "bf16"])
def test_what_is_asked_for_is_done(given):
    config = build_config({"engine": {"autocast": given}})
    assert settle_autocast(config, CPU, {"engine.autocast": given}) is config


@pytest.mark.parametrize(("mine", "same"), [("auto", True), ("none", False), ("bf16", True)])
def test_a_run_in_bf16_is_continued_by_auto_and_by_name_and_not_in_fp32(mine, same):
    state = {"config": flatten(AUTO) | {"engine.autocast": "bf16"}}
    found = differences(state, build_config({"engine": {"autocast": mine}}), Varies.BY_PART)
    assert (found == {}) == same


def test_tf32_may_not_change_within_a_run_and_compiling_may():
    state = {"config": flatten(AUTO)}
    assert differences(state, build_config({"engine": {"tf32": False}}), Varies.BY_PART) == {
        "engine.tf32": (True, False)
    }
    free = build_config({"engine": {"compile": True, "cudnn_benchmark": False}})
    assert differences(state, free, Varies.BY_PART) == {}


def test_another_arithmetic_than_before_is_said():
    here = describe_arithmetic(AUTO, CPU)
    assert (here, describe_arithmetic(AUTO, GPU)) == ("fp32 on cpu", "fp32 on cuda with TF32")
    assert note_arithmetic(AUTO, CPU, None) == note_arithmetic(AUTO, CPU, here) == ""
    assert "trained in fp32 on cuda with TF32, and goes on in fp32 on cpu" in note_arithmetic(
        AUTO, CPU, describe_arithmetic(AUTO, GPU)
    )


def test_switches_of_gpus_are_left_alone_on_a_cpu_and_set_on_a_gpu(monkeypatch):
    told = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", told.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    set_precision(AUTO, CPU)
    assert (told, torch.backends.cudnn.benchmark) == ([], False)
    set_precision(AUTO, GPU)
    assert (told, torch.backends.cudnn.benchmark) == (["high"], True)
    set_precision(build_config({"engine": {"tf32": False, "cudnn_benchmark": False}}), GPU)
    assert (told, torch.backends.cudnn.benchmark) == (["high", "highest"], False)
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("name", ["tf32", "cudnn_benchmark"])
def test_switches_of_gpus_are_refused_for_a_run_on_a_cpu(name):
    check_read(build_config({"engine": {name: False}}))
    with pytest.raises(InputError, match=rf"engine\.{name} is False, and nothing reads it: engine\.device is cpu"):
        check_read(build_config({"engine": {name: False, "device": "cpu"}}))


# ------------------------------------------------------------------------------------------------------------- compiled


def test_gradient_balancers_and_compiling_clash():
    with pytest.raises(InputError, match=r"engine\.compile .* loss\.balancing upgrad .* leave engine\.compile out"):
        build_config({"engine": {"compile": True}, "loss": {"balancing": "upgrad"}})


def test_where_nothing_can_be_compiled_one_message_says_so(monkeypatch):
    def compile(function):
        raise RuntimeError("no C++ compiler\nand a page of text")

    monkeypatch.setattr(torch, "compile", compile)
    module = make_module(make_config("small"))
    with pytest.raises(InputError, match=r"engine\.compile cannot work here \(RuntimeError: no C\+\+ compiler\); .*"):
        compile_model(module, CPU)
    assert module.compiled is None


@pytest.mark.whole
def test_a_compiled_model_learns_the_same_and_keeps_its_names(monkeypatch):
    """By dynamo without a compiler behind it. Steps that look inside take the model as it is."""
    original, calls = torch.compile, []

    def compile(function):
        made = original(function, backend="eager")

        def called(*args):
            calls.append(function)
            return made(*args)

        return called

    monkeypatch.setattr(torch, "compile", compile)
    config = make_config("small", **{"model.dropout": 0.0})
    plain, compiled = make_module(config), make_module(config)
    compile_model(compiled, CPU)
    calls.clear()
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    batch: Batch = make_batch()
    batch = batch._replace(inputs=batch.inputs.float() / 255)
    for looks, num_calls in ((False, 1), (True, 1)):
        found, expected = (module(batch, looks_at_gradients=looks) for module in (compiled, plain))
        torch.testing.assert_close(found.terms, expected.terms, rtol=0, atol=0)
        assert (found.gram is not None) == looks
        assert len(calls) == num_calls
