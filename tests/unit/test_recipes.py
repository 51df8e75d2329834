"""The papers' recipes against the papers' tables, copied here by hand and read row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from dsvl_train.commands.plan import DEVICE_GIB, USABLE
from dsvl_train.config.compose import compose_run
from dsvl_train.config.schema import ParallelConfig, RunConfig
from dsvl_train.config.validate import validate
from dsvl_train.interop.shapes import language_shapes
from dsvl_train.parallel import startup
from dsvl_train.planning.memory import plan_layout
from dsvl_train.planning.parameters import part_sizes
from dsvl_train.training.stages import resolve_policy
from tests.tiny import tiny_run

STAGES = ["align", "pretrain", "sft"]
VL_TABLE_4 = """
                      | deepseek_vl_1b              | deepseek_vl_7b
                      | align  | pretrain | sft     | align  | pretrain | sft
learning rate         | 1.0e-3 | 3e-5     | 2.0e-5  | 1.0e-3 | 4.2e-5   | 2.0e-5
lr scheduler          | cosine | step     | cosine  | cosine | step     | cosine
weight decay          | 0.0    | 0.0      | 0.0     | 0.0    | 0.0      | 0.0
gradient clip         | 1.0    | 1.0      | 1.0     | 1.0    | 1.0      | 1.0
beta 1                | 0.9    | 0.9      | 0.9     | 0.9    | 0.9      | 0.9
beta 2                | 0.95   | 0.95     | 0.95    | 0.95   | 0.95     | 0.95
warm-up steps         | 128    | 2000     | 256     | 128    | 2000     | 256
training steps        | 15000  | 96000    | 10000   | 15000  | 42000    | 10000
batch size            | 256    | 1024     | 256     | 256    | 2304     | 256
sequence length       | 512    | 4096     | 4096    | 512    | 4096     | 4096
sequence packing      | no     | yes      | no      | no     | yes      | no
pipeline parallelism  | no     | no       | no      | no     | yes      | yes
"""
VL2_TABLE_2 = """
                      | deepseek_vl2_tiny           | deepseek_vl2_small          | deepseek_vl2
                      | align  | pretrain | sft     | align  | pretrain | sft     | align  | pretrain | sft
total parameters      | 3      | 3        | 3       | 16     | 16       | 16      | 27     | 27       | 27
activated parameters  | 0.57   | 0.57     | 0.57    | 2.4    | 2.4      | 2.4     | 4.1    | 4.1      | 4.1
learning rate         | 5.4e-4 | 5.4e-4   | 3.0e-5  | 4.2e-4 | 4.2e-4   | 1.4e-5  | 4.5e-4 | 4.5e-4   | 2e-5
vision lr multiplier  | 0.1    | 0.1      | 0.1     | 0.1    | 0.1      | 0.1     | 0.1    | 0.1      | 0.1
fix language model    | yes    | no       | no      | yes    | no       | no      | yes    | no       | no
lr scheduler          | cosine | step     | constant| cosine | step     | constant| cosine | step     | constant
weight decay          | 0.1    | 0.1      | 0.1     | 0.1    | 0.1      | 0.1     | 0.1    | 0.1      | 0.1
gradient clip         | 1.0    | 1.0      | 1.0     | 1.0    | 1.0      | 1.0     | 1.0    | 1.0      | 1.0
beta 1                | 0.9    | 0.9      | 0.9     | 0.9    | 0.9      | 0.9     | 0.9    | 0.9      | 0.9
beta 2                | 0.95   | 0.95     | 0.95    | 0.95   | 0.95     | 0.95    | 0.95   | 0.95     | 0.95
bf16 optimizer        | no     | no       | no      | no     | no       | no      | yes    | yes      | yes
aux loss weight       | 0.001  | 0.001    | 0.001   | 0.001  | 0.001    | 0.001   | 0.0001 | 0.0001   | 0.0001
expert bias step      | -      | -        | -       | -      | -        | -       | 0      | 0.001    | 0
training tokens       | 2.0    | 798.5    | 19.5    | 2.0    | 808.9    | 20.0    | 2.0    | 796.5    | 19.5
batch size            | 256    | 2304     | 64      | 256    | 2304     | 64      | 256    | 3360     | 64
sequence length       | 4096   | 4096     | 4096    | 4096   | 4096     | 4096    | 4096   | 4096     | 4096
sequence packing      | no     | yes      | yes     | no     | yes      | yes     | no     | yes      | yes
pipeline parallelism  | no     | yes      | yes     | yes    | yes      | yes     | yes    | yes      | yes
"""
"""Parameters and tokens in billions."""
PAPER_NODES = {"deepseek_vl_1b": 16, "deepseek_vl_7b": 64, "deepseek_vl2_tiny": 16, "deepseek_vl2_small": 33, "deepseek_vl2": 42}
"""VL §3.3, VL2 §4.2; eight A100 each."""
RELEASED_PARAMETERS = {
    "deepseek_vl_1b": 1_975_235_584,
    "deepseek_vl_7b": 7_343_990_017,
    "deepseek_vl2_tiny": 3_370_501_440,
    "deepseek_vl2_small": 16_148_349_504,
    "deepseek_vl2": 27_480_134_248,
}
"""From the sizes of the published files."""
TRAINS = {
    "vl": {"align": {"adaptor"}, "pretrain": {"adaptor", "language"}, "sft": {"vision.siglip", "adaptor", "language"}},
    "vl2": {
        "align": {"vision.siglip", "adaptor"},
        "pretrain": {"vision.siglip", "adaptor", "language"},
        "sft": {"vision.siglip", "adaptor", "language"},
    },
}
"""VL §3.2, VL2 §4.1."""
SAM_ADDITIONS = {"vision.sam.downsamples", "vision.sam.neck_hd", "vision.sam.hd_alpha_downsamples"}
"""What DeepSeek-VL put behind SAM, which no SAM brings."""
MIXTURES: dict[str, dict[str, float]] = {
    "vl/pretrain": {
        "interleaved": 13.1,
        "caption": 11.1,
        "table_chart": 2.1,
        "web_code": 0.4,
        "scene_text_ocr": 1.2,
        "document_ocr": 2.1,
        "text": 70.0,
    },
    "vl/sft": {"in_house": 10.5, "general": 35.5, "table_chart": 4.1, "web_code": 2.0, "text": 47.9},
}
"""VL Tables 1 and 2, percent."""


def columns(table: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(model, stage, row -> value) of each column."""
    lines = [[cell.strip() for cell in line.split("|")] for line in table.strip("\n").splitlines()]
    models, stages, *rows = lines
    for at, stage in enumerate(stages[1:]):
        yield models[1 + at // len(STAGES)], stage, {row[0]: row[1 + at] for row in rows}


COLUMNS = {f"{model}/{stage}": values for table in (VL_TABLE_4, VL2_TABLE_2) for model, stage, values in columns(table)}


@cache
def recipe(name: str) -> RunConfig:
    return compose_run([f"recipe={name}"])


@cache
def multipliers(name: str) -> dict[str, float | None]:
    """Learning-rate multiplier of every parameter of the recipe's model, as its stage has it."""
    from dsvl_train.interop.shapes import logical_shapes

    config = recipe(name)
    return resolve_policy([key for key in logical_shapes(config.model) if "expert_bias" not in key], config.stage.policy)


# -------------------------------------------------------------------------------------------------------------- reading a recipe


def text_tokens_of_a_sequence(config: RunConfig) -> int:
    """VL's 512 in stage 1 is less than one image's 576 positions, so it is text beside the image."""
    beside_an_image = config.model.family == "vl" and config.stage.name == "align"
    return config.data.seq_len - (config.model.vision.siglip.tokens if beside_an_image else 0)


def total_parameters(config: RunConfig) -> float:
    return sum(map(math.prod, language_shapes(config.model.language).values())) / 1e9


def activated_parameters(config: RunConfig) -> float:
    """Without the experts that a token does not meet, and without the embedding, of which it reads a row."""
    language = config.model.language
    assert language.moe is not None
    idle = language.moe.routed_experts - language.moe.top_k
    expert = 3 * language.hidden_size * language.moe.expert_width
    embedding = language.padded_vocab_size * language.hidden_size
    return total_parameters(config) - (idle * expert * (language.layers - language.moe.dense_layers) + embedding) / 1e9


READ: dict[str, Callable[[RunConfig], Any]] = {
    "learning rate": lambda c: c.optim.lr,
    "lr scheduler": lambda c: c.optim.schedule.kind,
    "weight decay": lambda c: c.optim.weight_decay,
    "gradient clip": lambda c: c.optim.clip_grad,
    "beta 1": lambda c: c.optim.betas[0],
    "beta 2": lambda c: c.optim.betas[1],
    "warm-up steps": lambda c: c.optim.schedule.warmup_steps,
    "training steps": lambda c: c.run.max_steps,
    "batch size": lambda c: c.data.batch_size,
    "sequence length": text_tokens_of_a_sequence,
    "sequence packing": lambda c: c.data.packing,
    "pipeline parallelism": lambda c: c.parallel.pp > 1,
    "bf16 optimizer": lambda c: c.optim.moments_dtype == "bf16",
    "aux loss weight": lambda c: c.stage.aux_loss_weight,
    "expert bias step": lambda c: c.stage.expert_bias_rate if c.model.language.moe.expert_bias else "-",  # type: ignore[union-attr]
}
"""Row -> what the recipe has; the rest of the rows have a test of their own."""
OTHER_ROWS = {"total parameters", "activated parameters", "vision lr multiplier", "fix language model", "training tokens"}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_recipe_has_every_value_of_its_column(name: str) -> None:
    config = recipe(name)
    for row, printed in COLUMNS[name].items():
        if row not in OTHER_ROWS:
            value = READ[row](config)
            told = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
            assert told == (float(printed) if isinstance(told, int | float) else printed), row


@pytest.mark.parametrize("name", [name for name in COLUMNS if "vl2" in name])
def test_vl2_trains_what_its_table_says_and_as_many_tokens(name: str) -> None:
    config, values = recipe(name), COLUMNS[name]
    assert total_parameters(config) == pytest.approx(float(values["total parameters"]), rel=0.025)
    assert activated_parameters(config) == pytest.approx(float(values["activated parameters"]), rel=0.025)
    rates = multipliers(name)
    assert {rate for key, rate in rates.items() if key.startswith("vision.")} == {float(values["vision lr multiplier"])}
    assert {rate for key, rate in rates.items() if key.startswith("language.")} == {None if values["fix language model"] == "yes" else 1.0}
    tokens = 1e9 * float(values["training tokens"])
    most = config.run.max_steps * config.data.batch_size * config.data.seq_len
    if config.data.packing:
        assert 0 <= most - tokens < config.data.batch_size * config.data.seq_len
    else:  # sequences are samples: an epoch of ShareGPT4V, shorter than the longest sequence on average
        assert config.run.max_steps == math.ceil(1.2e6 / config.data.batch_size)
        assert tokens < most


@pytest.mark.parametrize("name", COLUMNS)
def test_a_stage_trains_the_parts_that_its_paper_names(name: str) -> None:
    config = recipe(name)
    trained = {".".join(key.split(".")[: 3 if ".sam." in key else 2]) for key, rate in multipliers(name).items() if rate is not None}
    parts = {part if part.startswith("vision.") else part.split(".")[0] for part in trained}
    wanted = TRAINS[config.model.family][config.stage.name]
    if name == "deepseek_vl_7b/align":
        wanted = wanted | SAM_ADDITIONS
    assert parts == wanted


def test_step_schedules() -> None:
    """VL2 Table 2's caption; VL is taken as DeepSeek-LLM's."""
    for name in COLUMNS:
        schedule = recipe(name).optim.schedule
        if "vl2" in name:
            assert (schedule.milestones, schedule.factors) == ([0.5, 0.75], pytest.approx([10**-0.5, 0.1], rel=1e-5))
        else:
            assert (schedule.milestones, schedule.factors) == ([0.8, 0.9], [0.316, 0.1])


@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixtures_have_the_ratios_of_the_tables(mixture: str) -> None:
    stage = mixture.split("/")[1]
    for model in ("deepseek_vl_1b", "deepseek_vl_7b"):
        data = recipe(f"{model}/{stage}").data
        weights = {name: source.weight for name, source in data.sources.items()}
        assert {name: weights.pop(name) for name in MIXTURES[mixture]} == MIXTURES[mixture]
        assert sum(MIXTURES[mixture].values()) == pytest.approx(100)
        assert data.text_ratio == pytest.approx(MIXTURES[mixture]["text"] / 100)
        assert {name for name, source in data.sources.items() if source.modality == "text"} == {"text"}
        assert weights == ({"sft": 0.3} if stage == "pretrain" else {}), "a little SFT data in stage 2 (VL §3.2.2)"


def test_modalities_and_warm_up() -> None:
    for name in COLUMNS:
        data, model = recipe(name).data, name.split("/")[0]
        vl2 = "vl2" in model
        if name.endswith("pretrain"):
            assert (data.text_ratio_start, data.text_ratio, data.text_warmup_steps) == (1.0, 0.3 if vl2 else 0.7, 2000)
        if name.endswith("align"):
            assert {source.modality for source in data.sources.values()} == {"multimodal"}
    weights = {name: source.weight for name, source in recipe("deepseek_vl_7b/align").data.sources.items()}
    assert weights == {"sharegpt4v": 1.25, "document_ocr": 2.5}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_recipe_fits_the_cluster_of_its_paper(name: str) -> None:
    """All nodes of the paper, or fewer where its batch does not divide over them."""
    config, model = recipe(name), name.split("/")[0]
    validate(config, config.launch.processes)
    assert config.launch.nodes is not None and config.launch.nproc == 0
    assert config.launch.gpus_per_node == 8
    replicas = 8 * PAPER_NODES[model] // (config.parallel.tp * config.parallel.pp)
    if config.launch.nodes != PAPER_NODES[model]:
        assert config.launch.nodes < PAPER_NODES[model]
        assert config.data.batch_size % replicas, "it would divide over the whole cluster"
    assert config.parallel.vision_division == ("spread" if "vl2" in name else "first_stage")
    assert config.parallel.tile_balance == ("vl2" in name)
    previous = {"align": None, "pretrain": "align", "sft": "pretrain"}[config.stage.name]
    assert config.init.source == (f"runs/{model}/{previous}" if previous else None)
    assert config.run.dir == f"runs/{name}"


@pytest.mark.parametrize("name", COLUMNS)
def test_a_recipe_fits_into_the_memory_of_its_gpus(name: str) -> None:
    """As `dsvl plan` finds it, which keeps a tenth of an A100's 80 GB for what it does not count."""
    config = recipe(name)
    plan = plan_layout(config, config.launch.processes, sizes=part_sizes(config.model, config.stage))
    assert plan.peak <= USABLE * DEVICE_GIB * 1024**3


@pytest.mark.parametrize("name", COLUMNS)
def test_a_shrunk_recipe_keeps_what_is_not_size(name: str) -> None:
    config, tiny = recipe(name), compose_run([f"recipe={name}", "shrink=tiny"])
    for ranks in (1, 2, 4):
        validate(tiny, ranks)
    validate(replace(tiny, parallel=replace(tiny.parallel, tp=2, pp=2)), 4)
    assert tiny.stage == config.stage
    assert (tiny.optim.lr, tiny.optim.schedule.kind, tiny.data.packing) == (
        config.optim.lr,
        config.optim.schedule.kind,
        config.data.packing,
    )
    assert {key: source.weight for key, source in tiny.data.sources.items()} == {k: s.weight for k, s in config.data.sources.items()}
    for kept in ("vision_division", "vision_tp", "tile_balance", "distributed_optimizer"):
        assert getattr(tiny.parallel, kept) == getattr(config.parallel, kept)
    small, large = tiny.model, config.model
    assert (small.adaptor, small.family) == (large.adaptor, large.family)
    assert (small.vision.sam is None, small.language.moe is None, small.language.mla is None) == (
        large.vision.sam is None,
        large.language.moe is None,
        large.language.mla is None,
    )
    if small.language.moe is not None and large.language.moe is not None:
        for kept in ("router", "normalise_top_k", "routed_scaling", "expert_bias", "dense_layers"):
            assert getattr(small.language.moe, kept) == getattr(large.language.moe, kept)


def test_overrides_come_after_shrinking() -> None:
    config = compose_run(["recipe=deepseek_vl2/pretrain", "shrink=tiny", "run.max_steps=9", "model.language.layers=6", "parallel.pp=2"])
    assert (config.run.max_steps, config.model.language.layers, config.parallel.pp) == (9, 6, 2)


@pytest.fixture(scope="module")
def world() -> Iterator[startup.World]:
    run = tiny_run("vl")
    world = startup.start(run.engine, run.parallel, seed=0)
    yield world
    startup.stop()


@pytest.mark.parametrize("model", RELEASED_PARAMETERS)
def test_recipes_instantiate_with_the_published_number_of_parameters(world: startup.World, model: str) -> None:
    """On the meta device; with the selection bias, and without the padding of the vocabulary."""
    from dsvl_train.models.language import transformer_config
    from dsvl_train.models.logical import logical_tensors
    from dsvl_train.models.vlm import VisionLanguageModel

    config = recipe(f"{model}/pretrain")
    assert all(recipe(f"{model}/{stage}").model == config.model for stage in STAGES), "the stages share a model"
    language = config.model.language
    with torch.device("meta"):
        built = VisionLanguageModel(config.model, transformer_config(language, config.stage, ParallelConfig(), torch.bfloat16, on_cpu=True))
    shapes = {tensor.name: tensor.shape for tensor, _ in logical_tensors(built)}
    padding = 2 * (language.padded_vocab_size - language.vocab_size) * language.hidden_size
    assert sum(map(math.prod, shapes.values())) - padding == RELEASED_PARAMETERS[model]
