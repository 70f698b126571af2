"""Settings that nothing reads: the chosen model, optimizer, augmentation or loader has no use for them.

A setting that was changed and is not read is a mistake that would go unnoticed, so commands refuse it. Changed is what
flags, a file or a search space give, unless the preset or the default has that value. A file that holds every section
was written by a run or a search: it names all settings there are, and is taken as it is. Configurations that are stored
with weights are not asked.
"""

from __future__ import annotations

from typing import Any

from mtl_dist.config import Config
from mtl_dist.errors import InputError
from mtl_dist.families import FAMILIES, FEATURES, OBJECTIVES, OWN_BACKBONES, takes_drop_path
from mtl_dist.model_config import SequenceConfig
from mtl_dist.settings import flatten

NOT_WRITTEN = {"run", "ray"}  # sections that best.yaml leaves out


def find_unread(config: Config) -> dict[str, str]:
    """Return the settings, or whole sections, that nothing reads, each with the reason and what would read it."""
    chosen, unread = config.model.name, {}
    for name in dict.fromkeys(name for family in FAMILIES.values() for name in family.reads):
        if name not in FAMILIES[chosen].reads:
            readers = " or ".join(other for other, family in FAMILIES.items() if name in family.reads)
            unread[f"model.{name}"] = f"model.name is {chosen}; it is for {readers}"
    for name in OBJECTIVES[FAMILIES[chosen].objective].ignores:
        unread[name] = f"model.name is {chosen}, which is trained without it"
    backbone = config.model.backbone
    for name in OWN_BACKBONES[backbone].ignores if backbone in OWN_BACKBONES else ():
        unread[name] = f"model.backbone is {backbone}, which has no use for it"
    if "sequence" in FAMILIES[chosen].reads:
        unread |= _find_unread_of_sequences(config.model.sequence, backbone)
    optim, augment = config.optim, config.augment
    if optim.name != "sgd":
        unread |= {f"optim.{name}": f"optim.name is {optim.name}; it is for sgd" for name in ("momentum", "nesterov")}
    elif not optim.momentum:
        unread["optim.nesterov"] = "optim.momentum is 0; it is for more"
    if optim.name != "adamw":
        unread["optim.betas"] = f"optim.name is {optim.name}; it is for adamw"
    if config.model.freeze_backbone:
        why = "model.freeze_backbone is set, which trains none of it"
        unread |= {f"optim.{name}": why for name in ("backbone_lr", "layer_decay", "freeze_backbone_for")}
    if not takes_drop_path(config.model.backbone):
        unread["model.drop_path"] = f"model.backbone is {config.model.backbone}; it is for vit_* and timm:NAME"
        unread["optim.layer_decay"] = f"model.backbone is {config.model.backbone}; it is for a ViT"
    if augment.resize is not None:
        unread["augment.crop_scale"] = f"augment.resize is {augment.resize}, which is there instead"
    if not (augment.brightness or augment.contrast or augment.saturation or augment.hue):
        unread["augment.jitter_p"] = "augment.brightness, contrast, saturation and hue are all 0"
    if config.data.train and not (config.data.val or config.data.fold):
        why = "there is no validation set, and so no score; it is for data.val, or data.fold"
        unread |= {
            name: why for name in ("train.eval_batch", "train.patience", "checkpoint.keep_best", "checkpoint.best_of")
        }
    if not config.data.workers:
        unread["data.prefetch"] = "data.workers is 0; it is for 1 or more"
    if config.data.balance == "none":
        unread["data.balance_power"] = "data.balance is none; it is for expr, au or video"
    if config.engine.device == "cpu":
        names = ("tf32", "cudnn_benchmark", "overlap")
        unread |= {f"engine.{name}": "engine.device is cpu; it is for GPUs" for name in names}
    elif config.engine.zero_stage:
        unread["engine.overlap"] = f"engine.zero_stage is {config.engine.zero_stage}; it is for 0"
    if config.run.start:
        unread["model.weights"] = f"run.start is {config.run.start}, which is there instead"
    else:
        unread["run.start_with"] = "it is for run.start"
    if not config.loss.teacher:
        names = ("teacher_weight", "teacher_confidence", "teacher_after")
        unread |= {f"loss.{name}": "it is for loss.teacher" for name in names}
    return unread


def _find_unread_of_sequences(sequence: SequenceConfig, backbone: str) -> dict[str, str]:
    unread, of = {}, "model.sequence"
    if sequence.encoder != "transformer":
        unread |= {
            f"{of}.{name}": f"{of}.encoder is {sequence.encoder}; it is for a transformer" for name in ("heads", "ffn")
        }
    if sequence.framework != "share_bottom":
        unread[f"{of}.private_layers"] = f"{of}.framework is {sequence.framework}; it is for share_bottom"
    if backbone != FEATURES:
        unread[f"{of}.dims"] = f"model.backbone is {backbone}; it is for {FEATURES}"
    return unread


def why_unread(setting: str, unread: dict[str, str]) -> str | None:
    """Return what `find_unread` found of a setting, or of the section that it is in; None where it is read."""
    return next((why for entry, why in unread.items() if setting == entry or setting.startswith(f"{entry}.")), None)


def check_read(config: Config, *others: Config) -> None:
    """Raise `InputError` for a setting that nothing reads, unless the default or one of `others` has its value."""
    unread, known = find_unread(config), [flatten(other) for other in (Config(), *others)]
    wrong = [
        f"{setting} is {value!r}, and nothing reads it: {why}"
        for setting, value in flatten(config).items()
        if (why := why_unread(setting, unread)) and all(value != other.get(setting) for other in known)
    ]
    if wrong:
        raise InputError(f"{'; '.join(wrong)}. Leave it out, or choose what reads it")


def is_written(layer: dict[str, Any]) -> bool:
    """Whether a configuration file was written by a run or a search."""
    return Config.model_fields.keys() - NOT_WRITTEN <= layer.keys()
