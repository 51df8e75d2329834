"""The step, the optimiser per modality, and checkpoints, in one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsvl_train.config.schema import ParamRule, VisionConfig
from dsvl_train.data.batch import IGNORE_INDEX
from dsvl_train.parallel import startup
from tests.bench import Bench, changed, save
from tests.tiny import tiny_batch, tiny_model, tiny_run


@pytest.fixture(autouse=True)
def world() -> Iterator[startup.World]:
    world = startup.start(tiny_run("vl").engine, tiny_run("vl").parallel, seed=0)
    yield world
    startup.stop()


@pytest.mark.parametrize("family", ["vl", "vl2"])
def test_a_text_step_leaves_vision_its_moments_and_the_adaptor_untouched(world: startup.World, family: str) -> None:
    bench = Bench(world, family)
    bench.run("multimodal")
    before = bench.state()
    bench.run("text")
    touched = changed(before, bench.state())
    assert {name.split()[-1].split(".")[0] for name in touched} <= {"language", *map(str, range(6))}
    assert any(name.startswith("language.") for name in touched)
    assert bench.optimiser.steps_taken() == {"vision": 1, "language": 2}


def test_update_idle_steps_them_with_zero_gradient(world: startup.World) -> None:
    bench = Bench(world, "vl2", optim__update_idle=True)
    bench.run("multimodal")
    before = bench.state()
    bench.run("text")
    touched = changed(before, bench.state())
    assert "adaptor.layers.0.weight" in touched
    assert "exp_avg vision.siglip.blocks.0.mlp.fc1.weight" in touched


@pytest.mark.parametrize("family", ["vl", "vl2"])
def test_frozen_parameters_stay_bit_identical_and_trainable_ones_move(world: startup.World, family: str) -> None:
    policy = [ParamRule("vision.*", None), ParamRule("adaptor.*", 1.0), ParamRule("language.*", None)]
    bench = Bench(world, family, stage__policy=policy, stage__expert_bias_rate=0.0)
    before = bench.state()
    bench.run("multimodal", "multimodal")
    touched = {name for name in changed(before, bench.state()) if " " not in name}
    assert touched == {name for name, _ in bench.model.named_parameters() if name.startswith("adaptor.")}


def test_learning_rate_multipliers_scale_the_first_update(world: startup.World) -> None:
    """AdamW's first update is lr * sign(gradient) (no decay), so the largest change of each part is its learning rate."""
    bench = Bench(world, "vl2", optim__weight_decay=0.0, optim__clip_grad=0.0)
    before = bench.state()
    bench.run("multimodal")
    after = bench.state()

    def largest(part: str) -> float:
        return max(float((after[name] - before[name]).abs().max()) for name, _ in bench.model.named_parameters() if name.startswith(part))

    lr = bench.cfg.optim.lr
    assert largest("language.") == pytest.approx(lr, rel=1e-3)
    assert largest("adaptor.") == pytest.approx(lr, rel=1e-3)
    assert largest("vision.") == pytest.approx(0.1 * lr, rel=1e-3)


def test_the_loss_is_the_mean_over_supervised_tokens_whatever_the_micro_batching(world: startup.World) -> None:
    bench = Bench(world, "vl2")
    batch = tiny_batch(bench.cfg.model, 1, "multimodal")
    losses, count = 0.0, 0
    with torch.no_grad():
        for micro in batch.micro_batches:
            visual = None if micro.pixels_nchw is None else bench.model.vision(micro.pixels_nchw, micro.tiles_wh)
            loss_t = bench.model.language(
                micro.tokens_t,
                micro.cu_seqlens,
                micro.padding_t,
                image_mask_t=micro.image_mask_t,
                visual_vh=visual,
                labels_t=micro.labels_t,
            )
            supervised_t = micro.labels_t != IGNORE_INDEX
            losses += float(loss_t[supervised_t].double().sum())
            count += int(supervised_t.sum())
    (record,) = bench.run("multimodal")
    assert record["loss"] == pytest.approx(losses / count, rel=1e-6)
    total = sum(len(batch.micro_batches[i].labels_t) for i in range(4))
    assert count < total


def test_masked_padding_changes_nothing_for_other_samples(world: startup.World) -> None:
    """A bad sample's place holds tokens without labels that no other sample and no expert count sees."""
    plain, padded = Bench(world, "vl2"), Bench(world, "vl2")
    batch = tiny_batch(plain.cfg.model, 1, "text")
    (first,) = [plain.step(copy.deepcopy(batch), 1e-3, False)[0]]
    micro = batch.micro_batches[0]
    micro.tokens_t = torch.cat([micro.tokens_t, torch.full((7,), 3)])
    micro.labels_t = torch.cat([micro.labels_t, torch.full((7,), IGNORE_INDEX)])
    micro.image_mask_t = torch.cat([micro.image_mask_t, torch.zeros(7, dtype=torch.bool)])
    micro.padding_t = torch.cat([micro.padding_t, torch.ones(7, dtype=torch.bool)])
    micro.cu_seqlens = torch.cat([micro.cu_seqlens, micro.cu_seqlens[-1:] + 7])
    micro.source_s = torch.cat([micro.source_s, torch.tensor([0])])
    second, counts = padded.step(batch, 1e-3, False)
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)
    assert second["expert_load"] == first["expert_load"]
    assert second["aux_loss"] == pytest.approx(first["aux_loss"], rel=1e-6)
    assert counts.tokens == sum(len(m.tokens_t) for m in batch.micro_batches) - 7


def test_samples_in_a_pack_do_not_see_each_other(world: startup.World) -> None:
    bench = Bench(world, "vl2")
    tokens_t = torch.randint(0, 200, (20,), generator=torch.Generator().manual_seed(0))
    none_t = torch.zeros(20, dtype=torch.bool)
    with torch.no_grad():
        packed = bench.model.language(tokens_t, torch.tensor([0, 8, 20], dtype=torch.int32), none_t)
        alone = bench.model.language(tokens_t[8:], torch.tensor([0, 12], dtype=torch.int32), none_t[8:])
    torch.testing.assert_close(packed[8:], alone, rtol=0, atol=2e-6)


def test_the_vocabulary_padding_is_never_predicted(world: startup.World) -> None:
    bench = Bench(world, "vl")
    with torch.no_grad():
        logits = bench.model.language(torch.arange(6), torch.tensor([0, 6], dtype=torch.int32), torch.zeros(6, dtype=torch.bool))
    assert logits.shape == (6, 256)
    assert torch.isinf(logits[:, 200:]).all()
    assert torch.isfinite(logits[:, :200]).all()


def test_a_wrong_number_of_visual_embeddings_is_refused(world: startup.World) -> None:
    bench = Bench(world, "vl2")
    micro = tiny_batch(bench.cfg.model, 1, "multimodal").micro_batches[0]
    visual = bench.model.vision(micro.pixels_nchw, micro.tiles_wh)
    with pytest.raises(ValueError, match=rf"{len(visual)} image positions .* {len(visual) - 1} visual embeddings"):
        bench.model.language(micro.tokens_t, micro.cu_seqlens, micro.padding_t, image_mask_t=micro.image_mask_t, visual_vh=visual[1:])


def test_a_loss_that_is_not_finite_updates_nothing(world: startup.World) -> None:
    bench = Bench(world, "vl")
    bench.run("text")
    with torch.no_grad():
        bench.model.language.language.output_layer.weight[0, 0] = float("nan")
    before = bench.state()
    assert bench.run("text")[0]["updated"] is False
    assert not [name for name in changed(before, bench.state()) if not torch.isnan(before[name]).any()]


def test_text_steps_with_a_frozen_language_model_are_refused(world: startup.World) -> None:
    policy = [ParamRule("vision.*", None), ParamRule("adaptor.*", 1.0), ParamRule("language.*", None)]
    with pytest.raises(ValueError, match=r"data\.text_ratio=0\.5 .* freezes the language model"):
        Bench(world, "vl", stage__policy=policy, data__text_ratio=0.5)


@pytest.mark.parametrize(("family", "moments"), [("vl", "fp32"), ("vl2", "fp32"), ("vl2", "bf16")])
def test_a_restored_run_goes_on_bit_for_bit(world: startup.World, family: str, moments: str, tmp_path: Path) -> None:
    from dsvl_train.training import checkpoint

    straight = Bench(world, family, optim__moments_dtype=moments)
    straight.run("multimodal", "text", "text")
    state = checkpoint.TrainState(3, {"cursor": 7}, straight.optimiser.steps_taken(), bad_samples=2, totals={"tokens": 5})
    folder = save(world, straight, tmp_path, state)
    expected = straight.run("multimodal", "text")

    restored = Bench(world, family, run__seed=99, optim__moments_dtype=moments)
    assert checkpoint.load(folder, restored.model, restored.optimiser) == state
    restored.done = 3
    got = restored.run("multimodal", "text")
    assert [record["loss"] for record in got] == [record["loss"] for record in expected]
    assert [record["grad_norm"] for record in got] == [record["grad_norm"] for record in expected]
    assert not changed(straight.state(), restored.state())


def test_a_checkpoint_holds_no_pickle_and_is_published_whole(world: startup.World, tmp_path: Path) -> None:
    from dsvl_train.interop import native

    bench = Bench(world, "vl")
    for _ in range(3):
        bench.run("text")
        folder = save(world, bench, tmp_path)
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["latest", "step_00000002", "step_00000003"]
    assert native.find_latest(tmp_path) == folder == tmp_path / "checkpoints" / "step_00000003"
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".yaml"}


def test_a_missing_tensor_is_named(world: startup.World, tmp_path: Path) -> None:
    from dsvl_train.interop import native

    folder = save(world, Bench(world, "vl"), tmp_path)
    other = Bench(world, "vl2")
    with pytest.raises(ValueError, match=r"cannot read .*step_00000000.*(adaptor|language|vision)\."):
        native.load_weights(folder, other.model)


def test_steps_draw_no_random_numbers(world: startup.World) -> None:
    """So a checkpoint needs no state of a generator."""
    bench = Bench(world, "vl2")
    before = torch.get_rng_state()
    bench.run("multimodal", "text")
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_weights_depend_on_the_seed_and_the_name(world: startup.World) -> None:
    first, again, other = (Bench(world, "vl2", run__seed=seed).state() for seed in (0, 0, 1))
    assert not changed(first, again)
    assert "language.embedding.word_embeddings.weight" in changed(first, other)
    layers = [first[f"language.decoder.layers.{layer}.self_attention.linear_proj.weight"] for layer in (0, 1)]
    assert not torch.equal(*layers)


def test_optimiser_leaves_vectors_without_weight_decay(world: startup.World) -> None:
    bench = Bench(world, "vl2")
    decay = {id(p): group["weight_decay"] for group in bench.optimiser.param_groups() for p in group["params"]}
    for name, parameter in bench.model.named_parameters():
        assert decay[id(parameter)] == (0.0 if parameter.dim() == 1 else 0.1), name


@pytest.mark.parametrize("family", ["vl", "vl2"])
def test_bf16_keeps_fp32_main_weights_and_resumes(world: startup.World, family: str, tmp_path: Path) -> None:
    """The CUDA default, run here on the CPU: losses near fp32's, main weights finer than bf16, and a restored run bit-equal."""
    from dsvl_train.training import checkpoint

    half = replace(world, params_dtype=torch.bfloat16)
    bench, reference = Bench(half, family), Bench(world, family)
    got, want = (b.run("multimodal", "text", "multimodal") for b in (bench, reference))
    assert [r["loss"] for r in got] == pytest.approx([r["loss"] for r in want], rel=0.02)
    weight = bench.model.language.language.output_layer.weight
    main = bench.optimiser.state_of(weight).tensors["main"]
    assert weight.dtype == torch.bfloat16
    assert main.dtype == torch.float32
    assert not torch.equal(main, weight.float())
    torch.testing.assert_close(main.to(torch.bfloat16), weight.detach(), rtol=0, atol=0)

    folder = save(half, bench, tmp_path)
    restored = Bench(half, family, run__seed=5)
    checkpoint.load(folder, restored.model, restored.optimiser)
    restored.done = bench.done
    assert [r["loss"] for r in restored.run("multimodal", "text")] == [r["loss"] for r in bench.run("multimodal", "text")]
    assert torch.equal(restored.optimiser.state_of(restored.model.language.language.output_layer.weight).tensors["main"], main)


TRAINED = {
    "vl": {
        "lm": ["language"],
        "align": ["adaptor"],
        "pretrain": ["adaptor", "language"],
        "sft": ["vision.siglip", "adaptor", "language"],
    },
    "vl2": {
        "lm": ["language"],
        "align": ["vision", "adaptor"],
        "pretrain": ["vision", "adaptor", "language"],
        "sft": ["vision", "adaptor", "language"],
    },
}
"""What each stage trains (VL §3.2, VL2 §4.1), a transcription to test conf/stage against."""


@pytest.mark.parametrize(("family", "stage"), [(family, stage) for family, stages in TRAINED.items() for stage in stages])
def test_every_stage_trains_what_the_papers_say_and_nothing_else(world: startup.World, family: str, stage: str) -> None:
    import yaml

    conf = Path(__file__).parents[2] / "conf" / "stage" / family / f"{stage}.yaml"
    policy = [ParamRule(**rule) for rule in yaml.safe_load(conf.read_text())["policy"]]
    bench = Bench(world, family, stage__policy=policy, stage__expert_bias_rate=0.0)
    before = bench.state()
    bench.run(*(["text", "text"] if stage == "lm" else ["multimodal", "multimodal"]))
    after = bench.state()
    for name, parameter in bench.model.named_parameters():
        trained = any(name.startswith(part + ".") for part in TRAINED[family][stage])
        assert parameter.requires_grad == trained, name
        assert torch.equal(before[name], after[name]) != trained, name


def test_stored_only_parameters_never_change_even_where_the_tower_trains(world: startup.World) -> None:
    siglip = replace(tiny_model("vl2").vision.siglip, attention_pool=True)
    bench = Bench(world, "vl2", model__vision=VisionConfig(siglip))
    before = bench.state()
    bench.run("multimodal", "multimodal")
    touched = changed(before, bench.state())
    assert "vision.siglip.norm.weight" in touched
    assert not [name for name in touched if ".attn_pool." in name]
