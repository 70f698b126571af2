"""The settings of a run, section by section; the model's are in `model_config.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from mtl_dist.errors import MAX_SEED
from mtl_dist.model_config import MAX_SIDE
from mtl_dist.settings import Fold, Name, Section, Varies
from mtl_dist.tasks import TASKS

# The most of what is counted (steps, epochs, files), of a time and of a batch.
MAX_COUNT, MAX_SECONDS, MAX_BATCH = 10**9, 10**7, 2**20
Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1e6)]
EMA = "ema"  # of loss.teacher: the run's own average of weights
GradientBalancing = Literal["pcgrad", "cagrad", "upgrad", "mgda", "imtl_g", "aligned"]


class RunConfig(Section):
    name: Annotated[Name, Varies.BY_RUN] = "run"
    """The run's name. A run is its name: the same command continues it."""
    storage: Annotated[str, Varies.BY_PART] = Field("runs", min_length=1)
    """Where runs live: a directory or s3://bucket/prefix. This run's files go to <storage>/<name>/."""
    start: Annotated[str, Varies.BY_RUN] = ""
    """What the run begins from: a run, one of its checkpoints, or an exported directory; empty: model.weights."""
    start_with: Annotated[Literal["backbone", "model", "everything"], Varies.BY_RUN] = "model"
    """backbone: that of its best checkpoint, as model.weights RUN does. model: all its weights. everything: the newest
    checkpoint with the optimizer's state, learned loss weights, averages and its place in the order and the schedule:
    a run that is trained longer, to train.epochs in all."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seeds the order, augmentation, initialisation and dropout."""
    audit_dir: Annotated[Path | None, Varies.BY_RANK] = None
    """Also write the samples of every step here, a file a process: what a failure lost or repeated can be counted."""
    track: Annotated[tuple[Literal["tensorboard", "mlflow", "wandb"], ...], Varies.BY_PART] = ("tensorboard",)
    """Where the run is drawn while it trains; mlflow and wandb as their own environment variables say."""
    profile: Annotated[int | None, Varies.BY_PART] = Field(None, ge=1, le=MAX_COUNT)
    """Record a profile of three steps from this one on, of rank 0; written to the run's profile/."""

    @property
    def uri(self) -> str:
        """The run's own prefix."""
        return f"{self.storage.rstrip('/')}/{self.name}"


class DataConfig(Section):
    train: Annotated[tuple[str, ...], Varies.BY_RANK] = ()
    """Index of the training split: the directory or s3:// prefix that holds its index.json; or several, of one view,
    whose rows are read as those of one set."""
    val: Annotated[tuple[str, ...], Varies.BY_RANK] = ()
    """Index of the validation split, of the same view; or several. Empty: nothing is scored, unless data.fold is."""
    fold: Fold = ""
    """K/N, such as 2/5: the videos of data.train are dealt into N folds. The run trains on the others, and is validated
    on fold K, from 1, in the place of data.val."""
    image_size: int = Field(112, ge=32, le=1024)
    """Side in pixels that the loader resizes every image to (images of this size are not touched). The challenge's
    cropped_aligned has 112; its cropped has larger images too, which lose detail."""
    streams: int | None = Field(None, ge=1, le=MAX_BATCH)
    """Canonical streams of the order; must divide train.global_batch and be at least the number of ranks.
    None: the largest divisor of the global batch up to 64."""
    block_shards: int = Field(4, ge=1, le=MAX_COUNT)
    """Shuffle within blocks of about this many shards."""
    sampling: Literal["masked", "per_task"] = "masked"
    """masked: a step is one batch of rows of whatever labels. per_task: a step is a batch for every task, each of
    train.global_batch rows that carry its labels, which count for this task alone; a forward pass each. An epoch has
    as many steps as the task with the fewest labels gives; the others read a part, another one each epoch."""
    balance: Literal["none", "expr", "au", "video"] = "none"
    """Draw rows of rare classes more often, and of common ones less. expr: of expressions. au: of units that are on, a
    row by its rarest. video: of short videos. Rows without a label of it come as often as they do without this."""
    balance_power: float = Field(0.5, gt=0, le=1)
    """How much: a row of a class of n rows comes in proportion to n^-this. 1: as many of every class. 0.5: as the
    square roots of what there are."""
    mix: tuple[Share, ...] = ()
    """Shares of a step's rows that each set of data.train gives, such as 0.7 0.3; rounded to whole rows. Empty: the
    sets are read as one. A set that is read to its end begins again, in another order."""
    mix_to: tuple[Share, ...] = ()
    """The shares of the last epoch, where they change: from epoch to epoch in equal steps."""
    epoch_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the training rows that an epoch reads: a random part, another one each epoch."""
    workers: Annotated[int, Varies.BY_RANK] = Field(1, ge=0, le=1024)
    """Loader threads of a rank; 0 loads in the training thread."""
    prefetch: Annotated[int, Varies.BY_RANK] = Field(3, ge=1, le=1024)
    """Batches kept ready by the loader."""
    cache_dir: Annotated[Path | None, Varies.BY_RANK] = None
    """Per-node cache of shards; None: $MTL_CACHE_DIR or ~/.cache/mtl_dist/shards. Local shards are read in place.
    In a directory of another user it is <cache_dir>/user-<your id>."""
    cache_gib: Annotated[float, Varies.BY_RANK] = Field(50.0, gt=0, le=10**9)
    """Bound of the cache; shards not in use are evicted, oldest first."""

    @property
    def repeats_rows(self) -> bool:
        """Whether an epoch may read a row several times."""
        return bool(self.mix) or self.balance != "none"

    @field_validator("train", "val", mode="before")
    @classmethod
    def _one_or_several(cls, uris: Any) -> Any:
        return tuple(uri for uri in [uris] if uri) if isinstance(uris, str) else uris

    @field_serializer("train", "val")
    def _one_as_itself(self, uris: tuple[str, ...]) -> Any:
        return list(uris) if len(uris) > 1 else "".join(uris)

    @model_validator(mode="after")
    def _mixes(self):
        if self.mix_to and len(self.mix_to) != len(self.mix):
            raise ValueError(
                f"mix_to has {len(self.mix_to)} share(s) and mix {len(self.mix)}; give both one for every set"
            )
        if any(shares and not sum(shares) for shares in (self.mix, self.mix_to)):
            raise ValueError("mix or mix_to is 0 for every set: nothing would be trained; give one of them a share")
        return self


class AugmentConfig(Section):
    crop_scale: Annotated[tuple[float, float], Varies.BY_RUN] = (0.8, 1.0)
    """Random crop: share of the side kept, drawn uniformly. (1, 1) keeps the image."""
    resize: Annotated[int | None, Varies.BY_RUN] = Field(None, ge=32, le=MAX_SIDE)
    """Instead of crop_scale: resize the image to this side and cut out the model's input at a random place, in whole
    pixels. At least the model's input."""
    flip: Annotated[bool, Varies.BY_RUN] = True
    """Mirror half of the training images."""
    rotation: Annotated[float, Varies.BY_RUN] = Field(8.0, ge=0, le=180)
    """Random rotation up to this many degrees either way."""
    brightness: Annotated[float, Varies.BY_RUN] = Field(0.3, ge=0, le=1)
    contrast: Annotated[float, Varies.BY_RUN] = Field(0.3, ge=0, le=1)
    saturation: Annotated[float, Varies.BY_RUN] = Field(0.3, ge=0, le=1)
    hue: Annotated[float, Varies.BY_RUN] = Field(0.0, ge=0, le=0.5)
    """Random turn of the hue by up to this share of the colour circle either way."""
    jitter_p: Annotated[float, Varies.BY_RUN] = Field(1.0, ge=0, le=1)
    """Probability that brightness, contrast, saturation and hue of an image are changed at all."""
    erase: Annotated[float, Varies.BY_RUN] = Field(0.0, ge=0, le=1)
    """Probability of erasing one random rectangle."""

    @field_validator("crop_scale")
    @classmethod
    def _is_a_share(cls, scale: tuple[float, float]) -> tuple[float, float]:
        low, high = scale
        if not 0 < low <= high <= 1:
            raise ValueError("expected LOW HIGH with 0 < LOW <= HIGH <= 1, shares of the side")
        return scale


class LossConfig(Section):
    va: Annotated[float, Varies.BY_RUN] = Field(1.0, ge=0, le=1e6)
    expr: Annotated[float, Varies.BY_RUN] = Field(1.0, ge=0, le=1e6)
    au: Annotated[float, Varies.BY_RUN] = Field(1.0, ge=0, le=1e6)
    va_mse: Annotated[float, Varies.BY_RUN] = Field(0.0, ge=0, le=1e6)
    """What VA's loss has of the mean square error beside 1 - CCC."""
    va_ccc: Annotated[float, Varies.BY_RUN] = Field(1.0, ge=0, le=1e6)
    """What it has of 1 - CCC. 0: it is the mean square error alone, of loss.va_mse."""
    va_after: Annotated[int, Varies.BY_RUN] = Field(0, ge=0, le=10**6)
    """Epochs of a first stage, without VA's loss. The learning rate begins anew after it."""
    balancing: Literal["fixed", "uncertainty", "dwa", "famo", GradientBalancing] = "fixed"
    """What is multiplied with the weights above. fixed: nothing. uncertainty: learned precisions (Kendall et al. 2018).
    dwa: from how the mean losses of the last two epochs compare (Liu et al. 2019). famo: so that all losses fall at
    one relative rate (Liu et al. 2023); one more forward pass a step, and weights that sum to 1, not to 3. The others
    weigh the tasks' gradients where the tasks' heads begin, by their lengths and angles: pcgrad (Yu et al. 2020),
    cagrad (Liu et al. 2021), upgrad (Quinton and Rey 2024), mgda (Sener and Koltun 2018), imtl_g (Liu et al. 2021),
    aligned (Senushkin et al. 2023)."""
    gradients_every: Annotated[int | None, Varies.BY_PART] = Field(10, ge=1, le=10**9)
    """Steps from one whose tasks' gradients are looked at to the next: their norms and the cosines between them, where
    the tasks' heads begin, are recorded. None: never."""
    expr_weights: Annotated[Literal["none", "balanced"], Varies.BY_RUN] = "none"
    """balanced: class weights from the label counts of the training index, 1/20 to 20."""
    au_weights: Annotated[Literal["none", "balanced"], Varies.BY_RUN] = "none"
    """balanced: pos_weight of each AU from the label counts of the training index, 1/20 to 20."""
    label_smoothing: Annotated[float, Varies.BY_RUN] = Field(0.0, ge=0, lt=1)
    expr_focal: Annotated[float, Varies.BY_RUN] = Field(0.0, ge=0, le=10)
    """Exponent of focal loss (Lin et al. 2017): the cross entropy is times (1 - p)^this, p the labelled class's."""
    expr_prior: Annotated[float, Varies.BY_RUN] = Field(0.0, ge=0, le=10)
    """Logit adjustment (Menon et al. 2021): in the loss, logits are plus this times the logarithm of the class's share
    of the training labels, so that what is learned favours no common class. 1: as published. 0: off."""
    au_gamma_pos: Annotated[float, Varies.BY_RUN] = Field(0.0, ge=0, le=10)
    au_gamma_neg: Annotated[float, Varies.BY_RUN] = Field(0.0, ge=0, le=10)
    """Exponents of asymmetric loss (Ben-Baruch et al. 2021), of units that are on and off: as focal loss where both
    are the same. As published: 0 (or 1) and 4."""
    au_margin: Annotated[float, Varies.BY_RUN] = Field(0.0, ge=0, lt=1)
    """Its margin: a unit that is off costs nothing below this probability. As published: 0.05."""
    teacher: Annotated[str, Varies.BY_RUN] = ""
    """Whose predictions stand where labels are missing: ema, the run's own average of weights (train.ema), or those of
    a run, one of its checkpoints or an exported directory. Empty: nobody's."""
    teacher_weight: Annotated[float, Varies.BY_RUN] = Field(0.5, gt=0, le=1e6)
    """What that part of a task's loss counts beside the part of labels, each a mean over entries."""
    teacher_confidence: Annotated[float, Varies.BY_RUN] = Field(0.7, ge=0, le=1)
    """Least probability that the teacher must give to what it holds likelier of an expression or a unit; it is also the
    entry's weight. Valence and arousal have none: each counts 1."""
    teacher_after: Annotated[int, Varies.BY_RUN] = Field(0, ge=0, le=10**6)
    """Epochs that are trained without the teacher first."""

    @model_validator(mode="after")
    def _trains_something(self):
        if not any(self.weight(task) for task in TASKS):
            raise ValueError(f"{', '.join(TASKS)} are all 0: nothing would be trained; give one of them a weight")
        if self.va and not (self.va_ccc or self.va_mse):
            raise ValueError("va_ccc and va_mse are both 0: VA would have no loss; give one of them a weight, or va 0")
        return self

    def weight(self, task: str) -> float:
        """Return the configured weight of a task's loss; 0: it is not trained."""
        assert task in TASKS
        return getattr(self, task)


class OptimConfig(Section):
    name: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Varies.BY_RUN] = Field(1e-3, gt=0, le=1e3)
    """Peak learning rate, for the global batch as it is: no scaling by ranks."""
    backbone_lr: Annotated[float, Varies.BY_RUN] = Field(1.0, ge=0, le=1e3)
    """What the backbone has of the learning rate."""
    layer_decay: Annotated[float, Varies.BY_RUN] = Field(1.0, gt=0, le=1)
    """Of a ViT: what a layer has of the rate of the layer above it (0.65 to 0.75 where it was pre-trained)."""
    freeze_backbone_for: Annotated[float, Varies.BY_RUN] = Field(0.0, ge=0, le=1)
    """Share of training in which the backbone's rate is 0; its BatchNorm statistics go on."""
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    """Nesterov's form of SGD's momentum."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decays of the gradient's first and second moment."""
    weight_decay: Annotated[float, Varies.BY_RUN] = Field(5e-4, ge=0, le=100)
    """Of matrices and kernels; biases, norms, tokens and positions are not decayed."""
    warmup_steps: Annotated[int, Varies.BY_RUN] = Field(100, ge=0, le=MAX_COUNT)
    final_lr: Annotated[float, Varies.BY_RUN] = Field(0.01, ge=0, le=1)
    """Share of the peak the cosine ends at."""
    cosine_steps: Annotated[int | None, Varies.BY_RUN] = Field(None, ge=1, le=MAX_COUNT)
    """Steps from the peak to the cosine's end; None: the rest of training. A longer run goes up again, and down,
    as torch's CosineAnnealingLR does."""
    clip_norm: Annotated[float | None, Varies.BY_RUN] = Field(1.0, gt=0, le=1e30)
    """Gradient norm above which gradients are scaled down; None: never."""


class EngineConfig(Section):
    zero_stage: Annotated[Literal[0, 1, 2], Varies.BY_PART] = 0
    """DeepSpeed ZeRO stage. A run continues at any, on any number of ranks. Stage 3 would allow one forward a step."""
    overlap: Annotated[bool, Varies.BY_PART] = True
    """On several GPUs at ZeRO 0: add gradients up over ranks while the backward pass goes on. Off: after it."""
    autocast: Annotated[Literal["auto", "none", "bf16"], Varies.BY_RUN] = "auto"
    """bf16: forward and backward under torch autocast; weights and optimizer stay fp32. auto: when a run begins, bf16
    on GPUs that have it, none elsewhere; the run keeps it wherever it is continued."""
    tf32: Annotated[bool, Varies.BY_RUN] = True
    """On GPUs: matrix products and convolutions of fp32 by TF32, of 10 bits instead of 23."""
    cudnn_benchmark: Annotated[bool, Varies.BY_PART] = True
    """On GPUs: cuDNN tries its convolutions and takes the quickest. Off where a rerun is to have the same last bits."""
    compile: Annotated[bool, Varies.BY_PART] = False
    """Train with the model compiled by torch.compile; steps whose gradients are looked at take it as it is."""
    batchnorm: Literal["local", "sync", "frozen"] = "local"
    """local: statistics of the rank's batch, the running ones averaged over ranks before evaluation; sync: over all
    ranks (GPU only); frozen: running statistics."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Varies.BY_PART] = "auto"
    hang_s: Annotated[float, Varies.BY_PART] = Field(900.0, gt=0, le=MAX_SECONDS)
    """Seconds without a step after which a rank is taken to hang, named and ended, to be started again. More than the
    store may take to answer (5 minutes) and than the slowest step."""
    threads: Annotated[int | None, Varies.BY_RANK] = Field(None, ge=1, le=4096)
    """CPU threads of a rank for torch; None: ray.cpus_per_rank under Ray, else the machine's cores over its ranks."""


class TrainConfig(Section):
    global_batch: int = Field(24, ge=1, le=MAX_BATCH)
    """Samples of an optimizer step over all ranks, whatever their number. Losses are those of this batch; only
    BatchNorm's statistics (engine.batchnorm) and dropout depend on how it is split."""
    epochs: Annotated[int, Varies.BY_RUN] = Field(50, ge=1, le=10**6)
    stop_epoch: Annotated[int | None, Varies.BY_PART] = Field(None, ge=1, le=10**6)
    """Stop after so many epochs, evaluated and saved, in the schedule of train.epochs. None: after the last one."""
    patience: Annotated[int, Varies.BY_PART] = Field(0, ge=0, le=10**6)
    """Stop after so many evaluations without a better score of checkpoint.best_of, its first. 0: never."""
    accumulation: Annotated[Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_BATCH)], Varies.BY_RUN] = 1
    """Micro-batches a rank splits its part of the global batch into; twice as many from where memory runs out. auto: as
    few as fit, when the run begins. Losses stay those of the whole batch, at the price of one more forward pass."""
    eval_batch: Annotated[int, Varies.BY_PART] = Field(64, ge=1, le=2**16)
    """Images per rank and forward pass in evaluation."""
    eval_every: Annotated[int, Varies.BY_RUN] = Field(1, ge=1, le=MAX_COUNT)
    """Evaluate every so many epochs, and after the last."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Evaluate and save an exponential moving average of the weights with this decay (0.999); 0: the last weights."""

    @property
    def least_parts(self) -> int:
        """Micro-batches that a rank's part of a step has at least."""
        return 1 if self.accumulation == "auto" else self.accumulation


class CheckpointConfig(Section):
    every_steps: Annotated[int | None, Varies.BY_PART] = Field(None, ge=1, le=MAX_COUNT)
    """Also save every so many steps; None: after every evaluation only."""
    every_minutes: Annotated[float | None, Varies.BY_PART] = Field(None, gt=0, le=MAX_SECONDS)
    """Also save when the last save is so long ago."""
    keep_last: Annotated[int, Varies.BY_PART] = Field(2, ge=1, le=MAX_COUNT)
    keep_best: Annotated[int, Varies.BY_PART] = Field(1, ge=1, le=MAX_COUNT)
    """So many of the best of each score are kept."""
    best_of: Annotated[tuple[str, ...], Varies.BY_PART] = ("p", "va", "expr", "au")
    """Scores whose best checkpoints are kept, as metrics.jsonl names them, such as rmse_v; those of P always are."""
    keep_every_hours: Annotated[float | None, Varies.BY_PART] = Field(None, gt=0, le=MAX_SECONDS)
    """Also keep one of every so many hours, for good."""


class RayConfig(Section):
    num_ranks: Annotated[tuple[int, int], "MIN MAX", Varies.BY_PART] = (1, 1)
    """Elastic number of training processes: training runs with as many as the cluster has, from MIN to MAX."""
    cpus_per_rank: Annotated[float, Varies.BY_PART] = Field(1.0, gt=0, le=4096)
    gpus_per_rank: Annotated[float, Varies.BY_PART] = Field(0.0, ge=0, le=64)
    """0, or 1: a rank computes on one GPU."""
    placement: Annotated[Literal["PACK", "SPREAD"], Varies.BY_PART] = "PACK"
    """PACK ranks on few nodes (less network), or SPREAD them over many."""
    autoscaling: Annotated[bool, Varies.BY_PART] = False
    """The cluster adds nodes when ranks wait for them: do not refuse what it has no room for yet."""
    resize_every_s: Annotated[float, Varies.BY_PART] = Field(60.0, gt=0, le=MAX_SECONDS)
    """How often ranks are added where the cluster has room for more, up to MAX."""
    max_failures: Annotated[int, Varies.BY_PART] = Field(3, ge=-1, le=MAX_COUNT)
    """How often ranks are restarted after failures before the run ends: counted anew where it has come further
    meanwhile, by a newer checkpoint. 0: never, -1: without limit."""

    @field_validator("num_ranks", mode="before")
    @classmethod
    def _one_number_is_both(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _is_a_range(self):
        low, high = self.num_ranks
        if not 1 <= low <= high:
            raise ValueError(f"num_ranks is MIN MAX with 1 <= MIN <= MAX, not {low} {high}")
        return self
