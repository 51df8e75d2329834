"""Generation with a cache against computing everything anew, sampling, stopping, streaming."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsvl_train.data.batch import IGNORE_INDEX
from dsvl_train.data.processor import Encoded
from dsvl_train.data.tokenizer import VL2_IMAGE_TOKEN, train_byte_level_bpe
from dsvl_train.parallel import startup
from tests.tiny import VOCAB, tiny_model, tiny_run

KINDS = ["dense", "dense_gqa", "mha_moe", "mla_softmax", "mla_sigmoid"]


@pytest.fixture(scope="module")
def world() -> Iterator[startup.World]:
    world = startup.start(tiny_run("vl").engine, tiny_run("vl").parallel, seed=0)
    yield world
    startup.stop()


def build(kind: str, world: startup.World, stop_ids: tuple[int, ...] = ()) -> Any:
    """A tiny model of random weights, wide enough apart that greedy choices are clear."""
    from dsvl_train.evaluation.loading import LoadedModel
    from dsvl_train.models.build import build_model

    cfg = tiny_run("vl" if kind.startswith("dense") else "vl2")
    if not kind.startswith("dense"):
        cfg.model = tiny_model("vl2", sigmoid=kind.endswith("sigmoid"), mla=kind.startswith("mla"))
    language = replace(cfg.model.language, init_std=0.3, kv_heads=2 if kind.endswith("gqa") else None)
    cfg.model = replace(cfg.model, language=language)
    model = build_model(cfg.model, cfg.stage, cfg.parallel, world, seed=1)
    for chunk in model.chunks.values():
        chunk.eval()
    return LoadedModel(cfg, world, model, SimpleNamespace(stop_ids=list(stop_ids)))  # type: ignore[arg-type]


def make_prompts(model: Any, text_lengths: list[int], images: list[int]) -> list[Encoded]:
    """Prompts of random ids; images (none, one or two tiles wide) come after the second token."""
    generator = torch.Generator().manual_seed(3)
    side = model.vision.sam.image_size if model.vision.sam else model.vision.siglip.image_size
    prompts = []
    for length, count in zip(text_lengths, images, strict=True):
        if model.family == "vl2":
            half = model.vision.siglip.grid // 2
            tiles, grid, visual = 3, [2, 1], half * (half + 1) + 1 + half * (2 * half + 1)
        else:
            tiles, grid, visual = 1, [0, 0], model.vision.siglip.tokens
        mask = torch.zeros(length + count * visual, dtype=torch.bool)
        mask[2 : 2 + count * visual] = True
        prompts.append(
            Encoded(
                input_ids=torch.randint(0, VOCAB, mask.shape, generator=generator),
                labels=torch.full(mask.shape, IGNORE_INDEX),
                image_mask=mask,
                tiles_wh=torch.tensor([grid] * count).reshape(-1, 2),
                pixels=torch.randint(0, 256, (count * tiles, 3, side, side), generator=generator, dtype=torch.uint8),
                image_count=count,
            )
        )
    return prompts


RAGGED: tuple[list[int], list[int]] = ([7, 3, 12, 5], [1, 0, 2, 0])


def logits_along_the_way(continuation: Any, prompts: list[Encoded], visual: list[Tensor | None], steps: int) -> list[Tensor]:
    """Greedy logits of each step; the third step leaves the second sample out."""
    logits = [continuation.prefill([p.input_ids for p in prompts], [p.image_mask for p in prompts], visual)]
    for step in range(steps):
        chosen = logits[-1].argmax(-1).tolist()
        if step == 3:
            staying = [row for row in range(len(chosen)) if row != 1]
            continuation.keep(staying)
            chosen = [chosen[row] for row in staying]
        logits.append(continuation.append(chosen))
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_changes_nothing(kind: str, world: startup.World) -> None:
    """Measured: logits differ by 4e-5 at most, of magnitude 8."""
    from dsvl_train.evaluation.cache import CachedLanguageModel
    from dsvl_train.evaluation.forward import embed_images
    from dsvl_train.evaluation.generation import generate
    from dsvl_train.evaluation.recompute import RecomputedLanguageModel

    loaded = build(kind, world)
    prompts = make_prompts(loaded.cfg.model, *RAGGED)
    visual = embed_images(loaded, prompts)
    cached = logits_along_the_way(CachedLanguageModel(loaded.model.language), prompts, visual, 8)
    anew = logits_along_the_way(RecomputedLanguageModel(loaded), prompts, visual, 8)
    for got, want in zip(cached, anew, strict=True):
        torch.testing.assert_close(got[:, :VOCAB], want[:, :VOCAB], rtol=0, atol=1e-4)
    tokens = generate(loaded, prompts, 24)
    assert tokens == generate(loaded, prompts, 24, use_cache=False)
    assert all(len(answer) == 24 and max(answer) < VOCAB for answer in tokens)
    assert len({tuple(answer) for answer in tokens}) == len(prompts)


@pytest.mark.parametrize("kind", ["dense_gqa", "mla_sigmoid"])
def test_a_prompt_is_answered_alike_alone_and_among_others(kind: str, world: startup.World) -> None:
    from dsvl_train.evaluation.generation import generate

    loaded = build(kind, world)
    prompts = make_prompts(loaded.cfg.model, *RAGGED)
    assert generate(loaded, prompts, 10) == [generate(loaded, [prompt], 10)[0] for prompt in prompts]


@pytest.mark.parametrize("kind", ["dense_gqa", "mha_moe", "mla_sigmoid"])
def test_what_the_cache_holds(kind: str, world: startup.World) -> None:
    """Per token and layer: a key and a value per key/value head, or MLA's latent and one rotary key for all heads."""
    from dsvl_train.evaluation.cache import CachedLanguageModel

    loaded = build(kind, world)
    language = loaded.cfg.model.language
    cache = CachedLanguageModel(loaded.model.language)
    prompts = make_prompts(loaded.cfg.model, [9, 5], [0, 0])
    cache.prefill([p.input_ids for p in prompts], [p.image_mask for p in prompts], [None, None])
    if language.mla is not None:
        per_token = language.mla.kv_rank + language.mla.qk_rope_dim
    else:
        per_token = 2 * (language.kv_heads or language.heads) * (language.hidden_size // language.heads)
    assert cache.stored_values == 2 * 9 * language.layers * per_token
    cache.append([1, 2])
    assert cache.stored_values == 2 * (9 * 3 // 2) * language.layers * per_token
    assert cache.lengths_s == [10, 6]
    cache.keep([1])
    assert cache.stored_values == (9 * 3 // 2) * language.layers * per_token
    assert cache.lengths_s == [6]


def test_sampling_follows_the_seed(world: startup.World) -> None:
    from dsvl_train.evaluation.generation import Sampling, generate

    loaded = build("mla_softmax", world)
    prompts = make_prompts(loaded.cfg.model, [7, 4, 6], [0, 1, 0])
    sampling = Sampling(temperature=3.0, seed=5)
    drawn = generate(loaded, prompts, 12, sampling)
    assert drawn == generate(loaded, prompts, 12, sampling) == generate(loaded, prompts, 12, sampling, use_cache=False)
    assert drawn != generate(loaded, prompts, 12, replace(sampling, seed=6))
    greedy = generate(loaded, prompts, 12)
    assert drawn != greedy
    assert generate(loaded, prompts, 12, replace(sampling, top_k=1)) == greedy
    assert generate(loaded, prompts, 12, replace(sampling, top_p=1e-6)) == greedy
    assert generate(loaded, prompts, 12, replace(sampling, temperature=1e-300)) == greedy
    assert generate(loaded, prompts[1:], 12, sampling, first=1) == drawn[1:]  # asked in turns, answered as together


def test_top_k_and_top_p_bound_what_is_drawn() -> None:
    from dsvl_train.evaluation.generation import Sampling, _choose

    logits_v = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(**options: Any) -> set[int]:
        return {_choose(logits_v, Sampling(temperature=1.0, **options), generator) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3, 4}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_p=0.6) == {1, 3}
    assert drawn(top_p=0.7) == {1, 2, 3}
    assert drawn(top_k=3, top_p=0.5) == {1, 3}  # of the three, 0.4 / 0.85 is not yet half


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}],
)
def test_impossible_sampling_is_refused(wrong: dict[str, Any]) -> None:
    from dsvl_train.evaluation.generation import Sampling

    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_an_answer_ends_at_the_end_token_and_the_others_go_on(world: startup.World) -> None:
    from dsvl_train.evaluation.generation import generate

    loaded = build("mha_moe", world)
    prompts = make_prompts(loaded.cfg.model, *RAGGED)
    free = generate(loaded, prompts, 12)
    stop = free[0][4]
    loaded.processor.stop_ids = [stop]
    heard: list[list[int]] = [[] for _ in prompts]
    stopped = generate(loaded, prompts, 12, on_token=lambda number, token: heard[number].append(token))
    assert stopped == [answer[: answer.index(stop)] if stop in answer else answer for answer in free]
    assert len(stopped[0]) <= 4 and any(len(answer) == 12 for answer in stopped)
    assert heard == stopped
    assert generate(loaded, prompts, 3) == [answer[:3] for answer in stopped]
    assert generate(loaded, [], 3) == []
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate(loaded, prompts, 0)


def test_streamed_pieces_are_whole_characters_and_make_the_answer() -> None:
    from dsvl_train.data.tokenizer import Tokenizer
    from dsvl_train.evaluation.streaming import TextStream

    tokenizer = Tokenizer(
        train_byte_level_bpe(["a few plain words"], 280),
        image_token=VL2_IMAGE_TOKEN,
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        pad_token=None,
    )
    text = " 图像 naïve 🙂\n\n done  \n"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # characters of several tokens
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == text.strip()
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 8

    cut = TextStream(tokenizer)  # the answer ends inside a character
    pieces = [cut.push(token) for token in tokenizer.encode("ok 🙂")[:-1]] + [cut.finish()]
    assert "".join(pieces) == "ok \ufffd"
