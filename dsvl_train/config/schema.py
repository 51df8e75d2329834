"""The typed configuration of a run.

Hydra composes YAML from `conf/`; `config.compose` turns the result into a `RunConfig` once, at the entry. No `DictConfig` travels
further. Every field says its meaning and unit in the line beneath it; rules that span several fields live in `config.validate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

# --------------------------------------------------------------------------------------------------------------------- model


@dataclass
class SiglipConfig:
    """A SigLIP vision transformer (VL §3.1: SigLIP-L/16-384; VL2 §2: SigLIP-SO400M/14-384)."""

    image_size: int
    """Side of the square input, pixels."""
    patch_size: int
    """Side of a patch, pixels. Pixels beyond the last whole patch are dropped (384 // 14 = 27)."""
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    """MLP width is int(width * mlp_ratio): 4304 for SO400M's 3.7362."""
    gelu: Literal["erf", "tanh"] = "tanh"
    """VL's SigLIP-L uses the exact (erf) GELU, VL2's SO400M the tanh one."""
    layer_norm_eps: float = 1e-6
    pixel_mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    pixel_std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    attention_pool: bool = False
    """Keep the attention-pooling head that released checkpoints store and never use."""

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Patch tokens of one tile."""
        return self.grid * self.grid

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)


@dataclass
class SamConfig:
    """The SAM-B ViTDet encoder with neck and down-sampling of the hybrid tower (VL §3.1)."""

    image_size: int = 1024
    """Side of the square input, pixels."""
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    window: int = 14
    """Side of an attention window, patches; layers in `global_layers` attend to the whole image."""
    global_layers: list[int] = field(default_factory=lambda: [2, 5, 8, 11])
    neck_width: int = 256
    interpolate_to: int = 96
    """Side of the feature map after bilinear interpolation (64 -> 96), before two stride-2 convolutions."""
    downsample_widths: list[int] = field(default_factory=lambda: [512, 1024])
    """Output channels of the two stride-2 convolutions; the last is the feature width of a visual token."""
    pixel_mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    pixel_std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    layer_norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Patches along one side of the encoder."""
        return self.image_size // self.patch_size

    @property
    def output_grid(self) -> int:
        """Side of the final feature map: interpolate_to / 4, each 3x3 stride-2 convolution (padding 1) halving it."""
        return ((self.interpolate_to + 1) // 2 + 1) // 2


@dataclass
class VisionConfig:
    """The vision tower: SigLIP alone (VL 1.3B, VL2) or SigLIP and SAM together (VL 7B)."""

    siglip: SiglipConfig
    sam: SamConfig | None = None
    stored_layer_norms: bool = False
    """Keep `high_layer_norm` and `low_layer_norm`, which the released VL 7B stores and never applies."""


@dataclass
class AdaptorConfig:
    """The vision-language adaptor: VL's MLP variants (VL §3.1, Table 10) or VL2's pixel shuffle (VL2 §2)."""

    kind: Literal["mlp", "hybrid", "shared", "separate", "pixel_shuffle"]
    """mlp: one encoder, two layers. hybrid: a layer per encoder, concatenate, GELU, one layer (released 7B). shared: one MLP over both
    encoders' features. separate: a whole MLP per encoder. pixel_shuffle: VL2."""
    concat: Literal["embedding", "sequence_width", "sequence_height"] = "embedding"
    """How two encoders' features meet (Table 10): along the embedding, or along the sequence after pooling each to half its W or H."""
    depth: int = 2
    """Linear layers, GELU between them."""
    downsample_ratio: int = 2
    """Side of the pixel-shuffle square (pixel_shuffle only)."""


@dataclass
class MoeConfig:
    """DeepSeekMoE feed-forward layers."""

    routed_experts: int
    shared_experts: int
    top_k: int
    expert_width: int
    """FFN width of one expert; the shared experts are one FFN of shared_experts * expert_width."""
    dense_layers: int = 1
    """The first this-many layers keep a dense FFN."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: greedy top-k of softmax over all experts. sigmoid: scores for weights, score + bias for selection (VL2 base)."""
    normalise_top_k: bool = False
    """Divide the chosen weights by their sum (released: true for sigmoid, false for softmax)."""
    routed_scaling: float = 1.0
    """Factor on the routed experts' weights (2.0 in VL2 base)."""
    expert_bias: bool = False
    """Keep a selection bias per expert, corrected after each step (auxiliary-loss-free balancing)."""


@dataclass
class MlaConfig:
    """Multi-head latent attention without query compression (the released VL2 small and base)."""

    kv_rank: int
    qk_nope_dim: int
    qk_rope_dim: int
    v_dim: int


VOCAB_MULTIPLE = 128
"""Stored embedding rows are padded to this, whatever the tensor parallel size, so that the padding never depends on the layout."""


@dataclass
class LanguageConfig:
    """A LLaMA-style dense or a DeepSeekMoE decoder."""

    vocab_size: int
    """Rows of the embedding that mean something; stored rows are padded to a multiple of 128, the padding never predicted."""
    hidden_size: int
    ffn_width: int
    """Width of the dense SwiGLU FFN."""
    layers: int
    heads: int
    kv_heads: int | None = None
    """Key/value groups; null = heads (MHA)."""
    max_positions: int = 4096
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    init_std: float = 0.02
    moe: MoeConfig | None = None
    mla: MlaConfig | None = None

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the output layer."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass
class ModelConfig:
    name: str
    family: Literal["vl", "vl2"]
    vision: VisionConfig
    adaptor: AdaptorConfig
    language: LanguageConfig


# --------------------------------------------------------------------------------------------------------------------- stage


@dataclass
class ParamRule:
    """One line of a stage's freeze and learning-rate policy."""

    pattern: str
    """Glob over parameter names, e.g. `vision.siglip.*`, `adaptor.*`, `language.*`; the first rule that matches a name wins."""
    lr_multiplier: float | None
    """Factor on optim.lr; null freezes the parameters."""


@dataclass
class StageConfig:
    name: Literal["lm", "align", "pretrain", "sft"]
    policy: list[ParamRule]
    """Ordered; every parameter must match a rule, and every rule a parameter (VL §3.2, VL2 §4.1; big_vision's idea)."""
    aux_loss_weight: float = 0.0
    """Weight of the sequence-wise load-balancing loss of MoE layers (VL2 Table 2)."""
    expert_bias_rate: float = 0.0
    """Correction step of the expert bias (VL2 Table 2); 0 keeps the bias as it is."""


# ---------------------------------------------------------------------------------------------------------------------- data


@dataclass
class SourceConfig:
    """One source of samples."""

    kind: Literal["shards", "text"]
    """shards: webdataset tars of samples. text: Megatron .bin/.idx of tokenised documents."""
    path: str
    """shards: a brace pattern, glob or folder of tars, on this machine or behind a URL (s3://, https://, …). text: the .bin/.idx prefix."""
    modality: Literal["multimodal", "text"]
    """Which steps draw from it; a sample with images must be in a multimodal source."""
    weight: float = 1.0
    """Share among the sources of its modality (normalised)."""


@dataclass
class DataConfig:
    processor: str
    """Folder of tokenizer.json, processor_config.json (and preprocessor_config.json for VL), in the released layout."""
    sources: dict[str, SourceConfig]
    """Name -> source; at least one per modality that the run uses."""
    seq_len: int
    """Tokens of a packed sequence; a longer sample is a counted skip (text documents are cut)."""
    packing: bool
    """True: a sequence is a pack of samples up to seq_len tokens. False: a sequence is one sample."""
    batch_size: int
    """Sequences of a global batch."""
    root: str = "data"
    """Folder or URL with a folder per source, for mixtures that say so (`${data.root}/…` in conf/data/vl and conf/data/vl2)."""
    micro_batch_size: int = 1
    """Sequences computed at once on one rank; they are laid end to end, so none is padded for another's length."""
    text_ratio: float = 0.0
    """Target share of text steps (VL §3.2.2: 0.7; VL2 §3.2: 0.3)."""
    modality_grouping: bool = True
    """True: a step has one modality (VL §4.4). False, for ablation: every global batch mixes text and image sequences by the share."""
    text_ratio_start: float = 1.0
    """Share of text steps at step 1, before the modality warm-up."""
    text_warmup_steps: int = 0
    """Steps over which the share goes from start to target; 0 = at the target from the first step."""
    text_warmup_shape: Literal["linear", "cosine", "step"] = "linear"
    mask_prompt: bool = True
    """Supervise answers only. False also supervises prompts, as the released VL2 processor_config says."""
    tile_selection: Literal["released", "paper"] = "released"
    """released: maximise effective resolution, then least waste. paper: least padding (VL2 §2)."""
    max_tiles: int = 9
    """Local tiles of one image at most (VL2: m * n <= 9)."""
    tiling_image_limit: int = 2
    """Samples with more images than this are not tiled (VL2 §2)."""
    max_tiles_per_sequence: int | None = None
    """Tiles of a sequence at most, thumbnails included; a sample with more is a counted skip. null = as many as its tokens allow."""
    decode: Literal["exact", "fast"] = "exact"
    """exact: pixels bit for bit as the released processor's. fast: no value more than 2 of 255 off."""
    window: int = 1024
    """Samples that packing looks over at once."""
    workers: int = 1
    """Threads that read and decode ahead; 0 reads in the training thread. Never changes the batches. Behind a latency, samples of a step
    times latency over the time of a step is the least that keeps up."""
    prefetch_steps: int = 2
    """Global batches prepared ahead at most."""
    prefetch_gb: float = 4.0
    """No further batch is begun while those prepared ahead hold this many gigabytes of tiles on a rank; one is begun in any case."""
    stall_s: float = 300.0
    """Seconds after which a batch that is not ready stops the run, with the names of the samples that are being read."""
    index_dir: str | None = None
    """Folder for indexes, seen by all ranks; null = beside the shards. Remote shards need one."""
    cache_dir: str | None = None
    """Folder on a local disk for blocks of remote shards, shared by all processes of a machine; null = nothing is kept."""
    cache_gb: float = 20.0
    """Gigabytes that cache_dir grows to; the blocks used least recently go first."""
    read_retries: int = 4
    """Repetitions, with growing pauses, of a failed request to remote shards, or of a read from a folder that is gone."""
    unreachable: Literal["stop", "skip"] = "stop"
    """What cannot be reached then: stop the run, or skip: a bad sample, counted as such."""
    max_bad_fraction: float = 0.01
    """Stop the run when more than this share of the samples seen so far, on all ranks, was bad (and more than 10 were)."""
    max_image_pixels: int = 178_956_970
    """Images with more pixels than this are refused as decompression bombs."""


# --------------------------------------------------------------------------------------------------- parallel, engine, optim


RecomputeModule = Literal["core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"]


@dataclass
class ParallelConfig:
    tp: int = 1
    """Tensor parallel size; with more than 1, sequence parallelism is on."""
    pp: int = 1
    """Pipeline parallel size."""
    vpp: int = 1
    """Virtual pipeline chunks of the language model per pipeline rank."""
    ep: int = 1
    """Expert parallel size; divides the processes over pp, expert tensor parallelism being 1."""
    cp: int = 1
    """Context parallel size."""
    group: int | None = None
    """Micro-batches that a pipeline rank runs through one chunk before it turns to the next; null = 4 * parallel.pp. Larger groups leave
    less of the ranks' time idle where the encoder's chunk and the language model's differ in cost; smaller ones keep fewer activations."""
    vision_division: Literal["spread", "first_stage"] = "spread"
    """Where the vision encoder runs when pp > 1 (VL2 §4.2; VL §3.3)."""
    vision_tp: Literal["recompute", "shard"] = "recompute"
    """recompute: every TP rank encodes all tiles (VL §3.3). shard: each encodes a share, then gather."""
    distributed_optimizer: bool = False
    """Data parallel ranks keep a share of the optimiser's state each (ZeRO-1), and gather the updated weights."""
    tile_balance: bool = False
    """Exchange tiles between data parallel ranks before encoding (VL2 §4.2)."""
    overlap_tile_exchange: bool = True
    """Send a micro-batch's tiles while the one before it is encoded; false = before its own encoding."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What of the language model's activations the backward pass computes again instead of keeping them. selective: those of
    recompute_modules, attention itself being kept. full: of every layer all but its input, for one more forward pass."""
    recompute_modules: list[RecomputeModule] | None = None
    """selective only; null = norms, feed-forward layers (mlp, moe), and with latent attention its up-projections. `moe` repeats the
    exchange of tokens between expert parallel ranks."""
    vision_recompute: bool = False
    """Keep only the input of each block of the vision encoders, and run the blocks again in the backward pass."""
    layer_costs: str | None = None
    """JSON file of measured seconds of each layer (`dsvl plan --measure FILE`), by which the pipeline is divided; null = by FLOPs."""


@dataclass
class EngineConfig:
    name: Literal["megatron", "deepspeed"] = "megatron"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cuda where there is one. The CPU runs over gloo, CUDA over NCCL."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto = bf16 with fp32 main weights on CUDA, fp32 on CPU."""
    timeout_s: int = 600
    """Seconds after which a collective that hangs ends the job."""
    zero_stage: int = 1
    """deepspeed: what data-parallel ranks keep a share of instead of all: 1 = the optimiser's state, 2 = gradients too, 3 = weights too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """deepspeed: what lies in main memory, the optimiser's state (and its update) or the weights too, for which zero_stage must be 3."""
    zero_keep_whole: int = 100_000
    """zero_stage 3: weights of at most this many elements stay whole on every rank."""


@dataclass
class ScheduleConfig:
    """Learning-rate schedule over run.max_steps."""

    kind: Literal["cosine", "step", "constant"]
    warmup_steps: int = 0
    """Linear from 0."""
    min_ratio: float = 0.0
    """cosine: final learning rate over the peak."""
    milestones: list[float] = field(default_factory=list)
    """step: fractions of max_steps. VL2: [0.5, 0.75]. VL (DeepSeek-LLM's multi-step): [0.8, 0.9]."""
    factors: list[float] = field(default_factory=list)
    """step: learning rate over the peak from each milestone on. VL2: [0.316228, 0.1] (divide by sqrt(10)). VL: [0.316, 0.1]."""


@dataclass
class OptimConfig:
    lr: float
    """Peak learning rate; ParamRule.lr_multiplier scales it per parameter."""
    schedule: ScheduleConfig
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled; not on biases and other one-dimensional parameters."""
    clip_grad: float = 1.0
    """Maximum global gradient norm; 0 = no clipping."""
    moments_dtype: Literal["fp32", "bf16"] = "fp32"
    """What AdamW's moments are kept in; it computes in fp32, and main weights stay fp32. VL2 trains its largest model with bf16 (Table 2),
    which halves the moments' memory."""
    update_idle: bool = False
    """False: a text step leaves vision and adaptor parameters and their moments untouched, as PyTorch does for parameters without
    gradient. True: they take a step with zero gradient, as Megatron does."""


# ----------------------------------------------------------------------------------------------------------------------- run


@dataclass
class CheckpointConfig:
    every: int = 0
    """Save every this many steps; 0 = at the end only. The last step is always saved."""
    keep_last: int = 2
    """Keep this many newest checkpoints; 0 = all."""
    keep_every: int = 0
    """Also keep the checkpoint of every step that this divides, for good; 0 = none."""
    asynchronous: bool = True
    """Copy the state to host memory and write it while training goes on; False: training waits until the checkpoint is published."""
    verify: Literal["size", "full"] = "full"
    """What is compared with a checkpoint's manifest before a run goes on from it. full: size and SHA-256 of every file. size: sizes."""
    fallback: bool = False
    """Go on from the newest good checkpoint where the latest is damaged. False: a damaged one is an error."""
    on_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written, retries included: end the run, or train on and try again with the next one."""
    retries: int = 2
    """Repetitions of a save that failed, from the same copy in memory while training goes on."""
    retry_s: float = 5.0
    """Seconds before each repetition."""


@dataclass
class GuardConfig:
    """What is done when training goes wrong."""

    nonfinite: Literal["skip", "stop"] = "skip"
    """A loss or gradient norm that is not finite: make no update, or stop the run."""
    spike: Literal["off", "warn", "skip"] = "warn"
    """A loss or gradient norm far above its recent values: nothing, say so, or make no update."""
    spike_sigma: float = 6.0
    """Far above: this many standard deviations above the mean."""
    spike_window: int = 100
    """Recent: this many steps of the same modality."""
    max_skipped: int = 5
    """Stop the run when so many updates in a row were not made."""
    hang_s: float = 480.0
    """Seconds without any progress after which a rank is taken to hang: the job ends, and names it; 0 = never. Keep it below
    engine.timeout_s, whose error names nobody."""
    straggler_ratio: float = 1.5
    """Warn of a rank that computes so many times as long as the middle one of all."""
    straggler_window: int = 20
    """Steps that a rank must be slow for."""
    min_free_memory: float = 0.05
    """Warn when less than this share of a machine's memory is free."""


@dataclass
class EvalConfig:
    """Evaluation in the loop, on all ranks; `dsvl eval` does the same to checkpoints."""

    every: int = 0
    """Evaluate after every this many steps and after the last; 0 = never."""
    tasks: dict[str, str] = field(default_factory=dict)
    """Name -> task file (JSON lines), or a benchmark's own file as LAYOUT:PATH (mmlu, hellaswag, mmbench, mmmu, gsm8k, shards)."""
    text: str | None = None
    """Held-out documents (JSON lines of `text`), for bits per byte."""
    limit: int | None = None
    """Items of each task and texts at most, spread evenly over the file; null = all."""
    max_new_tokens: int = 64
    """Tokens of a generated answer at most."""
    tokens_at_once: int = 8192
    """Tokens of a forward pass that scores, on one rank; a single longer sample is a pass by itself."""
    plain: bool = False
    """Put a benchmark's questions as plain text, without the conversation template: for base models."""
    options: Literal["text", "letter"] = "text"
    """text: each option's text is scored as the answer (VL §3.2.2). letter: options are listed, and their letters scored."""


@dataclass
class LoggingConfig:
    every: int = 1
    """Print a progress line every this many steps where there is no terminal for a bar."""
    wandb: Literal["offline", "online", "disabled"] = "disabled"
    wandb_project: str = "dsvl_train"
    progress: bool = True
    """A progress bar on rank 0."""
    samples: int = 4
    """Training samples that are kept to look at from a step of `samples_every`, with their tiles and loss mask; 0 = none."""
    samples_every: int = 500
    """They are taken from the first step of each modality in every this many steps."""


@dataclass
class LaunchConfig:
    nproc: int = 0
    """Ranks that train.py starts on this machine; 0 = be one process, or one rank under torchrun."""
    grace_s: float = 60.0
    """Seconds that these ranks have to finish their step and save after a signal."""
    nodes: int | None = None
    """Machines that the recipe's layout is made for; null = any. It starts none of them."""
    gpus_per_node: int = 8
    """GPUs of each of them, a rank on each."""

    @property
    def processes(self) -> int:
        """Ranks that the configuration is meant for: nproc, else those of the recipe's cluster, else one."""
        return self.nproc or (self.nodes or 0) * self.gpus_per_node or 1


@dataclass
class RunSettings:
    name: str
    dir: str
    """Run folder: config.yaml, metrics.jsonl, checkpoints/, log/."""
    max_steps: int
    """Steps of the run; the horizon of every schedule."""
    seed: int = 0
    stop_after: int | None = None
    """Save and stop after this step, schedules unchanged; null = run to max_steps."""


@dataclass
class InitConfig:
    source: str | None = None
    """`init.from`: a checkpoint of ours, or a model folder in a released format, whose weights (only) start this run; null = random
    weights."""
    language: str | None = None
    """Folder of a language model (`llama`, `deepseek_v2`, `deepseek_v3`) that starts `language.*`; not together with init.from."""
    vision: str | None = None
    """Folder of a SigLIP (transformers or timm) that starts `vision.siglip.*`."""
    sam: str | None = None
    """Folder of a SAM-B (transformers or original names) that starts `vision.sam.*` but what DeepSeek-VL added to it."""
    expect_random: list[str] = field(default_factory=lambda: ["adaptor.*"])
    """Globs over the names of tensors that no given part fills and that may stay random; any other is an error. Only used with
    init.language, init.vision or init.sam. A run that starts with SAM adds `vision.sam.neck_hd.*`, `vision.sam.downsamples.*` and
    `vision.sam.hd_alpha_downsamples`, which no SAM has."""


@dataclass
class RunConfig:
    run: RunSettings
    model: ModelConfig
    stage: StageConfig
    data: DataConfig
    parallel: ParallelConfig
    engine: EngineConfig
    optim: OptimConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    launch: LaunchConfig
    init: InitConfig
    guard: GuardConfig = field(default_factory=GuardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    resume: str = "auto"
    """auto: go on from the run folder's latest checkpoint if there is one. none: start anew. Else: a checkpoint folder."""
