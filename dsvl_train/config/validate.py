"""Rules that span several settings, checked before any process group starts.

Each rule is one small function; a broken one raises a `ConfigError` with the values, the rule, and the setting to change.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable

from .errors import ConfigError
from .schema import VOCAB_MULTIPLE, DataConfig, LanguageConfig, MlaConfig, ModelConfig, MoeConfig, RunConfig, SamConfig, SiglipConfig

NOT_AVAILABLE: list[tuple[str, Callable[[RunConfig], object], object]] = [
    ("parallel.cp", lambda c: c.parallel.cp, 1),
]
"""Settings whose other values are not built yet: key, how to read it, the only value that works. Delete a line when its feature arrives."""


BF16_ROUNDING = 2.0**-8
"""The largest relative change that a number in bf16 may ignore: half a unit of its 8-bit significand."""


def validate(config: RunConfig, world_size: int, device: str | None = None) -> None:
    """Check everything that can be known before the run starts.

    Args:
        config: the whole configuration.
        world_size: processes of the run.
        device: `cpu` or `cuda` where it is known already; by default engine.device, whose `auto` leaves rules about the device for later.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    for key, read, only in NOT_AVAILABLE:
        if read(config) != only:
            shown = str(only).lower() if isinstance(only, bool) else only
            raise ConfigError(key, f"not available in this version, which only has {key}={shown}", value=read(config), fix=f"{key}={shown}")
    _check_run(config)
    _check_model(config)
    _check_stage(config)
    _check_data(config)
    _check_optim(config)
    _check_engine(config, device or config.engine.device)
    _check_guard(config)
    _check_eval(config)
    _check_layout(config, world_size)


# ---------------------------------------------------------------------------------------------------------------- small helpers


def _at_least(config: RunConfig, minimum: float, *keys: str) -> None:
    for key in keys:
        value = _read(config, key)
        if value is not None and value < minimum:
            raise ConfigError(key, f"must be at least {minimum:g}", value=value, fix=f"{key}={minimum:g}")


def _read(config: RunConfig, key: str) -> float | None:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value  # type: ignore[return-value]


def _fraction(key: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(key, "must be between 0 and 1", value=value, fix=f"{key}={min(max(value, 0.0), 1.0):g}")


def _divides(key: str, divisor: int, of_key: str, number: int) -> None:
    if number % divisor:
        fits = [d for d in range(1, number + 1) if number % d == 0]
        near = max((d for d in fits if d <= divisor), default=1)
        raise ConfigError(
            f"{key}, {of_key}", "the first must divide the second", value=f"{divisor}, {number}", fix=f"{key}={near}, or {of_key}"
        )


# ------------------------------------------------------------------------------------------------------------------ the sections


def _check_run(config: RunConfig) -> None:
    _at_least(config, 1, "run.max_steps", "run.stop_after", "logging.every", "logging.samples_every")
    _at_least(config, 0, "run.seed", "checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every", "launch.nproc")
    _at_least(config, 0, "checkpoint.retries", "checkpoint.retry_s", "logging.samples")
    run = config.run
    if not run.name:
        raise ConfigError("run.name", "must not be empty", fix="run.name=NAME")
    if not run.dir:
        raise ConfigError("run.dir", "must not be empty", fix="run.dir=runs/NAME")
    if run.stop_after is not None and run.stop_after > run.max_steps:
        value = f"{run.stop_after}, {run.max_steps}"
        fix = f"run.stop_after={run.max_steps} or run.stop_after=null"
        raise ConfigError("run.stop_after, run.max_steps", "run.stop_after must be at most run.max_steps", value=value, fix=fix)


def _check_model(config: RunConfig) -> None:
    model = config.model
    _check_siglip(model.vision.siglip)
    if model.vision.sam is not None:
        _check_sam(model.vision.sam, model.vision.siglip)
    _check_adaptor(config)
    _check_language(model.language)


def _check_siglip(siglip: SiglipConfig) -> None:
    key = "model.vision.siglip"
    _check_encoder(key, siglip)
    if siglip.image_size < siglip.patch_size:
        raise ConfigError(f"{key}.patch_size", f"must be at most {key}.image_size ({siglip.image_size})", value=siglip.patch_size)


def _check_sam(sam: SamConfig, siglip: SiglipConfig) -> None:
    key = "model.vision.sam"
    _check_encoder(key, sam)
    if sam.image_size % sam.patch_size:
        _divides(f"{key}.patch_size", sam.patch_size, f"{key}.image_size", sam.image_size)
    outside = [layer for layer in sam.global_layers if not 0 <= layer < sam.layers]
    if outside or not sam.global_layers:
        value = sam.global_layers
        raise ConfigError(f"{key}.global_layers", f"must name at least one layer, each from 0 to {sam.layers - 1}", value=value)
    if len(sam.downsample_widths) != 2:
        raise ConfigError(f"{key}.downsample_widths", "must be the widths of two convolutions", value=sam.downsample_widths)
    if sam.output_grid**2 != siglip.tokens:
        raise ConfigError(
            f"{key}.interpolate_to, model.vision.siglip",
            f"both encoders must give the same tokens: SAM's grid has {sam.output_grid} * {sam.output_grid} = {sam.output_grid**2} "
            f"(interpolate_to / 4), SigLIP's {siglip.grid} * {siglip.grid} = {siglip.tokens} (image_size / patch_size)",
            value=f"{sam.interpolate_to}, {siglip.image_size} / {siglip.patch_size}",
            fix=f"{key}.interpolate_to={4 * siglip.grid}",
        )


def _check_encoder(key: str, encoder: SiglipConfig | SamConfig) -> None:
    for name in ("image_size", "patch_size", "width", "layers", "heads"):
        value = getattr(encoder, name)
        if value < 1:
            raise ConfigError(f"{key}.{name}", "must be at least 1", value=value)
    _divides(f"{key}.heads", encoder.heads, f"{key}.width", encoder.width)
    for name, least in (("pixel_mean", 0.0), ("pixel_std", 1e-6)):
        values = getattr(encoder, name)
        if len(values) != 3 or min(values) < least:
            raise ConfigError(f"{key}.{name}", "must be three numbers, one per colour, in units of 0 to 1", value=values)


def _check_adaptor(config: RunConfig) -> None:
    model, adaptor = config.model, config.model.adaptor
    two_encoders = model.vision.sam is not None
    key = "model.adaptor.kind"
    if model.family == "vl2" and two_encoders:
        raise ConfigError("model.vision.sam", "the vl2 family has no SAM encoder", value="(given)", fix="model.vision.sam=null")
    fitting = ["pixel_shuffle"] if model.family == "vl2" else ["hybrid", "shared", "separate"] if two_encoders else ["mlp"]
    if adaptor.kind not in fitting:
        what = "SigLIP and SAM" if two_encoders else "SigLIP alone"
        rule = f"for model.family={model.family} with {what} it must be one of {', '.join(fitting)}"
        raise ConfigError(key, rule, value=adaptor.kind, fix=f"{key}={fitting[0]}")
    if adaptor.concat != "embedding" and not two_encoders:
        rule = "there is one encoder only, so nothing to join along the sequence"
        raise ConfigError("model.adaptor.concat", rule, value=adaptor.concat, fix="model.adaptor.concat=embedding")
    if adaptor.concat != "embedding" and model.vision.siglip.grid % 2:
        rule = f"needs an even grid to halve; SigLIP's is {model.vision.siglip.grid} patches wide"
        raise ConfigError("model.adaptor.concat", rule, value=adaptor.concat, fix="model.adaptor.concat=embedding")
    if model.vision.sam is not None:
        _check_joined_widths(model, model.vision.sam)
    _at_least(config, 1, "model.adaptor.depth", "model.adaptor.downsample_ratio")


def _check_joined_widths(model: ModelConfig, sam: SamConfig) -> None:
    """Two encoders' features meet along the embedding, half each, or go through one MLP."""
    hidden, low, high = model.language.hidden_size, model.vision.siglip.width, sam.downsample_widths[-1]
    if model.adaptor.concat == "embedding" and hidden % 2:
        rule = "must be even: with model.adaptor.concat=embedding each encoder gives half"
        raise ConfigError("model.language.hidden_size", rule, value=hidden, fix=f"model.language.hidden_size={hidden + 1}")
    if model.adaptor.kind == "shared" and high != low:
        rule = f"one MLP for both encoders needs features of one width; SigLIP's is {low}, SAM's {high} (downsample_widths)"
        raise ConfigError("model.adaptor.kind", rule, value="shared", fix="model.adaptor.kind=hybrid or separate, or equal widths")


def _check_language(language: LanguageConfig) -> None:
    key = "model.language"
    for name in ("vocab_size", "hidden_size", "ffn_width", "layers", "heads", "max_positions"):
        value = getattr(language, name)
        if value < 1:
            raise ConfigError(f"{key}.{name}", "must be at least 1", value=value)
    if language.mla is not None:
        _check_mla(language.mla, language)
    else:
        _divides(f"{key}.heads", language.heads, f"{key}.hidden_size", language.hidden_size)
        if language.hidden_size // language.heads % 2:
            rule = f"rotary positions need an even head width; hidden_size / heads = {language.hidden_size // language.heads}"
            raise ConfigError(f"{key}.heads", rule, value=language.heads)
    if language.kv_heads is not None:
        _divides(f"{key}.kv_heads", max(language.kv_heads, 1), f"{key}.heads", language.heads)
    if language.moe is not None:
        _check_moe(language.moe, language)


def _check_mla(mla: MlaConfig, language: LanguageConfig) -> None:
    key = "model.language.mla"
    for name in ("kv_rank", "qk_nope_dim", "qk_rope_dim", "v_dim"):
        if getattr(mla, name) < 1:
            raise ConfigError(f"{key}.{name}", "must be at least 1", value=getattr(mla, name))
    if mla.qk_rope_dim % 2:
        raise ConfigError(f"{key}.qk_rope_dim", "rotary positions need an even width", value=mla.qk_rope_dim)
    if language.kv_heads not in (None, language.heads):
        rule = f"latent attention has as many key/value heads as heads ({language.heads})"
        raise ConfigError("model.language.kv_heads", rule, value=language.kv_heads, fix="model.language.kv_heads=null")


def _check_moe(moe: MoeConfig, language: LanguageConfig) -> None:
    key = "model.language.moe"
    for name, least in (("routed_experts", 1), ("shared_experts", 0), ("top_k", 1), ("expert_width", 1), ("dense_layers", 0)):
        value = getattr(moe, name)
        if value < least:
            raise ConfigError(f"{key}.{name}", f"must be at least {least}", value=value)
    if moe.top_k > moe.routed_experts:
        raise ConfigError(f"{key}.top_k", f"must be at most {key}.routed_experts ({moe.routed_experts})", value=moe.top_k)
    if moe.dense_layers >= language.layers:
        rule = f"must leave at least one MoE layer of model.language.layers ({language.layers})"
        raise ConfigError(f"{key}.dense_layers", rule, value=moe.dense_layers, fix="a smaller number, or model.language.moe=null")
    if moe.expert_bias and moe.router != "sigmoid":
        rule = f"an expert bias needs {key}.router=sigmoid, and the router is {moe.router}"
        raise ConfigError(f"{key}.expert_bias", rule, value=moe.expert_bias, fix=f"{key}.expert_bias=false or {key}.router=sigmoid")


def _check_stage(config: RunConfig) -> None:
    stage, moe = config.stage, config.model.language.moe
    if not stage.policy:
        raise ConfigError("stage.policy", "must have at least one rule, pattern and lr_multiplier", value=stage.policy)
    for index, line in enumerate(stage.policy):
        if line.lr_multiplier is not None and line.lr_multiplier <= 0:
            key = f"stage.policy[{index}].lr_multiplier"
            raise ConfigError(key, f"must be above 0, or null to freeze {line.pattern}", value=line.lr_multiplier, fix=f"{key}=null")
    if all(line.lr_multiplier is None for line in stage.policy):
        raise ConfigError("stage.policy", "freezes every parameter, so nothing would train", fix="give one rule an lr_multiplier")
    _at_least(config, 0, "stage.aux_loss_weight", "stage.expert_bias_rate")
    if stage.aux_loss_weight and moe is None:
        rule = "a dense language model has no experts to balance"
        raise ConfigError("stage.aux_loss_weight", rule, value=stage.aux_loss_weight, fix="stage.aux_loss_weight=0")
    if stage.expert_bias_rate and not (moe is not None and moe.expert_bias):
        rule = "corrects an expert bias, which this model does not have (model.language.moe.expert_bias)"
        raise ConfigError("stage.expert_bias_rate", rule, value=stage.expert_bias_rate, fix="stage.expert_bias_rate=0")


def _check_data(config: RunConfig) -> None:
    data = config.data
    _at_least(config, 1, "data.seq_len", "data.batch_size", "data.micro_batch_size", "data.max_tiles", "data.window")
    _at_least(config, 1, "data.prefetch_steps", "data.max_image_pixels", "data.max_tiles_per_sequence")
    _at_least(
        config,
        0,
        "data.text_warmup_steps",
        "data.tiling_image_limit",
        "data.workers",
        "data.cache_gb",
        "data.read_retries",
        "data.prefetch_gb",
    )
    if data.stall_s <= 0:
        raise ConfigError("data.stall_s", "must be above 0", value=data.stall_s, fix="data.stall_s=300")
    _fraction("data.text_ratio", data.text_ratio)
    _fraction("data.text_ratio_start", data.text_ratio_start)
    _fraction("data.max_bad_fraction", data.max_bad_fraction)
    positions = config.model.language.max_positions
    if data.seq_len > positions:
        rule = f"must be at most model.language.max_positions ({positions})"
        raise ConfigError("data.seq_len", rule, value=data.seq_len, fix=f"data.seq_len={positions}")
    _check_sources(data)
    if _uses_images(data):
        least = _least_visual_tokens(config)
        if data.seq_len <= least:
            rule = f"must be more than the {least} tokens of the smallest image, which count towards a sequence"
            raise ConfigError("data.seq_len", rule, value=data.seq_len, fix=f"data.seq_len={2 * least} or more")
        tiles = data.max_tiles_per_sequence
        if config.model.family == "vl2" and tiles is not None and tiles < 2:
            rule = "must be at least 2: an image is a thumbnail and a tile or more"
            raise ConfigError("data.max_tiles_per_sequence", rule, value=tiles, fix="data.max_tiles_per_sequence=2")


def _uses_text(data: DataConfig) -> bool:
    return data.text_ratio > 0 or (data.text_warmup_steps > 0 and data.text_ratio_start > 0)


def _uses_images(data: DataConfig) -> bool:
    return data.text_ratio < 1 or (data.text_warmup_steps > 0 and data.text_ratio_start < 1)


def _check_sources(data: DataConfig) -> None:
    for name, source in data.sources.items():
        key = f"data.sources.{name}"
        if source.weight <= 0:
            raise ConfigError(f"{key}.weight", "must be above 0", value=source.weight, fix=f"~{key} to leave the source out")
        if source.kind == "text" and source.modality != "text":
            raise ConfigError(f"{key}.modality", "a source of kind text has no images", value=source.modality, fix=f"{key}.modality=text")
    for modality, used, other in (("text", _uses_text(data), 0), ("multimodal", _uses_images(data), 1)):
        if used and not any(source.modality == modality for source in data.sources.values()):
            given = ", ".join(f"{name} ({source.modality})" for name, source in data.sources.items()) or "none"
            raise ConfigError(
                "data.sources, data.text_ratio",
                f"the run has {modality} steps, so it needs a source of modality {modality}",
                value=f"{given}; {data.text_ratio:g}",
                fix=f"add data.sources.NAME with modality={modality}, or data.text_ratio={other} and data.text_warmup_steps=0",
            )


def _least_visual_tokens(config: RunConfig) -> int:
    """Positions that the smallest image takes: VL's fixed number, or VL2's thumbnail, separator and one local tile."""
    siglip = config.model.vision.siglip
    if config.model.family == "vl":
        return siglip.tokens
    side = -(-siglip.grid // config.model.adaptor.downsample_ratio)
    return 2 * side * (side + 1) + 1


def _check_optim(config: RunConfig) -> None:
    optim, schedule = config.optim, config.optim.schedule
    if optim.lr <= 0:
        raise ConfigError("optim.lr", "must be above 0", value=optim.lr)
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError("optim.betas", "must be two numbers from 0 to below 1", value=optim.betas, fix="optim.betas=[0.9,0.95]")
    if optim.moments_dtype == "bf16" and max(optim.betas) > 1 - BF16_ROUNDING:
        rule = f"moments in bf16 need betas of at most {1 - BF16_ROUNDING:g}: a smaller decay is rounded away, and a moment never shrinks"
        raise ConfigError("optim.betas, optim.moments_dtype", rule, value=f"{optim.betas}, bf16", fix="optim.moments_dtype=fp32")
    if optim.moments_dtype == "bf16" and config.engine.name == "deepspeed":
        rule = "the deepspeed engine keeps moments in fp32; engine.offload is its way to save memory"
        raise ConfigError("optim.moments_dtype", rule, value="bf16", fix="optim.moments_dtype=fp32 or engine=megatron")
    if optim.eps <= 0:
        raise ConfigError("optim.eps", "must be above 0", value=optim.eps, fix="optim.eps=1e-8")
    _at_least(config, 0, "optim.weight_decay", "optim.clip_grad", "optim.schedule.warmup_steps")
    _fraction("optim.schedule.min_ratio", schedule.min_ratio)
    if schedule.kind != "step":
        return
    key, milestones, factors = "optim.schedule", schedule.milestones, schedule.factors
    if not milestones or len(milestones) != len(factors):
        rule = "kind=step needs milestones and as many factors"
        raise ConfigError(f"{key}.milestones, {key}.factors", rule, value=f"{milestones}, {factors}", fix=_step_examples(key))
    rising = all(a < b for a, b in itertools.pairwise(milestones))
    if not rising or milestones[0] < 0 or milestones[-1] > 1:
        rule = "must be rising fractions of run.max_steps, between 0 and 1"
        raise ConfigError(f"{key}.milestones", rule, value=milestones, fix=_step_examples(key))
    if min(factors) < 0:
        raise ConfigError(f"{key}.factors", "must not be negative", value=factors, fix=_step_examples(key))


def _step_examples(key: str) -> str:
    return f"for example {key}.milestones=[0.5,0.75] {key}.factors=[0.316228,0.1] (VL2)"


def _check_engine(config: RunConfig, device: str) -> None:
    engine = config.engine
    _at_least(config, 1, "engine.timeout_s")
    if device == "cpu" and engine.precision == "bf16":
        rule = "bf16 needs CUDA; on a CPU the run computes in fp32"
        raise ConfigError("engine.precision", rule, value=engine.precision, fix="engine.precision=auto")
    if not 1 <= engine.zero_stage <= 3:
        raise ConfigError("engine.zero_stage", "must be 1, 2 or 3", value=engine.zero_stage, fix="engine.zero_stage=1")
    _at_least(config, 0, "engine.zero_keep_whole")
    if engine.offload != "none" and engine.name != "deepspeed":
        raise ConfigError(
            "engine.offload", "is a setting of engine=deepspeed", value=engine.offload, fix="engine.offload=none or engine=deepspeed"
        )
    if engine.offload == "all" and engine.zero_stage < 3:
        rule = f"weights that lie in main memory need engine.zero_stage=3, and it is {engine.zero_stage}"
        raise ConfigError("engine.offload", rule, value=engine.offload, fix="engine.offload=optimizer or engine.zero_stage=3")
    if engine.name == "deepspeed":
        _check_deepspeed(config)


def _check_deepspeed(config: RunConfig) -> None:
    parallel = config.parallel
    for name in ("tp", "pp", "ep", "cp"):
        if getattr(parallel, name) != 1:
            key, rule = f"parallel.{name}", "the deepspeed engine is data parallel alone"
            raise ConfigError(key, rule, value=getattr(parallel, name), fix=f"{key}=1 or engine=megatron")
    if parallel.distributed_optimizer:
        rule = "is Megatron's; every ZeRO stage of the deepspeed engine shares the optimiser's state out"
        raise ConfigError("parallel.distributed_optimizer", rule, value=True, fix="parallel.distributed_optimizer=false")
    if config.optim.update_idle:
        rule = "the deepspeed engine cannot step parameters that a step does not reach"
        raise ConfigError("optim.update_idle", rule, value=True, fix="optim.update_idle=false or engine=megatron")
    if importlib.util.find_spec("deepspeed") is None:
        fix = "pip install -e .[deepspeed], or engine=megatron"
        raise ConfigError("engine", "needs the package deepspeed, which is not installed", value="deepspeed", fix=fix)


def _check_guard(config: RunConfig) -> None:
    guard = config.guard
    _at_least(config, 1, "guard.max_skipped", "guard.straggler_window", "guard.straggler_ratio")
    _at_least(config, 2, "guard.spike_window")
    _at_least(config, 0, "guard.spike_sigma", "guard.hang_s", "guard.min_free_memory", "launch.grace_s")
    if guard.hang_s >= config.engine.timeout_s:
        rule = "must be below engine.timeout_s, whose error does not say which rank hangs"
        fix = f"guard.hang_s={0.8 * config.engine.timeout_s:g}"
        raise ConfigError("guard.hang_s, engine.timeout_s", rule, value=(guard.hang_s, config.engine.timeout_s), fix=fix)


def _check_eval(config: RunConfig) -> None:
    _at_least(config, 0, "eval.every")
    _at_least(config, 1, "eval.limit", "eval.max_new_tokens", "eval.tokens_at_once")
    evaluation = config.eval
    for name in evaluation.tasks:
        if not name or "/" in name or name == "bits_per_byte":
            rule = "a task needs a name without slashes, other than bits_per_byte, which is eval.text's"
            raise ConfigError("eval.tasks", rule, value=name, fix="rename the task")
    if evaluation.every and not evaluation.tasks and not evaluation.text:
        fix = "eval.tasks.NAME=FILE or eval.text=FILE, or eval.every=0"
        raise ConfigError("eval.every, eval.tasks, eval.text", "there is nothing to evaluate", value=evaluation.every, fix=fix)


def _check_layout(config: RunConfig, world_size: int) -> None:
    """How the processes divide the model and the batch; expert tensor parallelism is 1, so experts spread over world / pp."""
    parallel, language, data = config.parallel, config.model.language, config.data
    _at_least(config, 1, "parallel.tp", "parallel.pp", "parallel.vpp", "parallel.ep", "parallel.cp")
    key = "model.language"
    _divides("parallel.tp", parallel.tp, f"{key}.heads", language.heads)
    if language.kv_heads is not None and language.mla is None:
        _divides("parallel.tp", parallel.tp, f"{key}.kv_heads", language.kv_heads)
    _divides("parallel.tp", parallel.tp, f"{key}.ffn_width", language.ffn_width)
    _divides("parallel.tp", parallel.tp, f"{key}.vocab_size (padded to {VOCAB_MULTIPLE})", language.padded_vocab_size)
    if language.moe is None and parallel.ep > 1:
        rule = "a dense language model has no experts to spread"
        raise ConfigError("parallel.ep", rule, value=parallel.ep, fix="parallel.ep=1")
    if language.moe is not None:
        _divides("parallel.ep", parallel.ep, f"{key}.moe.routed_experts", language.moe.routed_experts)
        shared = language.moe.shared_experts * language.moe.expert_width
        _divides("parallel.tp", parallel.tp, f"{key}.moe.shared_experts * expert_width", shared)
    model_parallel = parallel.tp * parallel.pp * parallel.cp
    if world_size % model_parallel:
        raise ConfigError(
            "parallel.tp * pp * cp, processes",
            "the first must divide the second",
            value=f"{parallel.tp} * {parallel.pp} * {parallel.cp} = {model_parallel}, {world_size}",
            fix=f"start a multiple of {model_parallel} processes (launch.nproc={model_parallel}), or lower parallel.tp",
        )
    if world_size % (parallel.ep * parallel.pp):
        value = f"{parallel.ep}, {world_size} / {parallel.pp}"
        rule = "parallel.ep must divide the number of processes over parallel.pp"
        fix = f"start a multiple of {parallel.ep * parallel.pp} processes, or parallel.ep=1"
        raise ConfigError("parallel.ep, processes / parallel.pp", rule, value=value, fix=fix)
    _check_recompute(config)
    _check_batch(data, world_size // model_parallel)
    _check_pipeline(config, world_size // model_parallel)


def _check_recompute(config: RunConfig) -> None:
    parallel, language, key = config.parallel, config.model.language, "parallel.recompute_modules"
    modules = parallel.recompute_modules
    if modules is None:
        return
    if parallel.recompute != "selective":
        rule = "says what parallel.recompute=selective runs again"
        raise ConfigError(key, rule, value=modules, fix="parallel.recompute=selective, or parallel.recompute_modules=null")
    if not modules:
        raise ConfigError(key, "must name at least one module", value=modules, fix="parallel.recompute=none")
    absent = {"mla_up_proj"} if language.mla is None else set()
    absent |= {"moe", "shared_experts"} if language.moe is None else set()
    wrong = [module for module in modules if module in absent]
    if wrong:
        raise ConfigError(key, f"this model has no {', '.join(wrong)}", value=modules, fix=f"{key} without {', '.join(wrong)}")
    if "moe" in modules and "shared_experts" in modules:
        raise ConfigError(key, "moe runs its shared experts again, too", value=modules, fix=f"{key} without shared_experts")


def _check_pipeline(config: RunConfig, data_parallel: int) -> None:
    parallel, data, layers = config.parallel, config.data, config.model.language.layers
    if parallel.pp == 1:
        if parallel.vpp > 1:
            raise ConfigError(
                "parallel.vpp", "divides a pipeline's ranks, so it needs parallel.pp of 2 or more", value=parallel.vpp, fix="parallel.vpp=1"
            )
        return
    _at_least(config, parallel.pp, "parallel.group")
    if parallel.pp * parallel.vpp > layers:
        raise ConfigError(
            "parallel.pp, parallel.vpp",
            f"their product, the number of language chunks, must be at most model.language.layers ({layers})",
            value=f"{parallel.pp}, {parallel.vpp}",
            fix=f"parallel.vpp={max(layers // parallel.pp, 1)}" if parallel.pp <= layers else f"parallel.pp={layers}",
        )
    micro_batches = data.batch_size // (data_parallel * data.micro_batch_size)
    several_chunks = parallel.vpp > 1 or (parallel.vision_division == "spread" and data.text_ratio < 1)
    if several_chunks and micro_batches < parallel.pp:
        raise ConfigError(
            "data.batch_size, parallel.pp",
            "a pipeline of several chunks per rank needs at least parallel.pp micro-batches per data-parallel rank, "
            f"data.batch_size / (data.micro_batch_size * {data_parallel})",
            value=f"{data.batch_size} / ({data.micro_batch_size} * {data_parallel}) = {micro_batches}, {parallel.pp}",
            fix=f"data.batch_size={data_parallel * data.micro_batch_size * parallel.pp}, or a smaller data.micro_batch_size",
        )


def _check_batch(data: DataConfig, data_parallel: int) -> None:
    per_round = data_parallel * data.micro_batch_size
    if data.batch_size % per_round:
        below, above = data.batch_size // per_round * per_round, (data.batch_size // per_round + 1) * per_round
        raise ConfigError(
            "data.batch_size, data.micro_batch_size",
            f"data.batch_size must be a multiple of data.micro_batch_size times the data parallel size ({data_parallel})",
            value=f"{data.batch_size}, {data.micro_batch_size}",
            fix=f"data.batch_size={above}" + (f" or {below}" if below else "") + ", or another data.micro_batch_size",
        )
