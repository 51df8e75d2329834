"""Templates and their labels token by token, sizes from geometry alone, and every way in which a sample or a folder can be wrong."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsvl_train.data.conversation import VL_SYSTEM_PROMPT
from dsvl_train.data.errors import SampleError
from dsvl_train.data.processor import Processor, Vl2Processor, VlProcessor, write_processor_folder
from dsvl_train.data.tiling import fill_vl2_tiles, open_image
from dsvl_train.data.tokenizer import ASSISTANT_TOKEN, BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, USER_TOKEN, train_byte_level_bpe

TEXTS = ["A red circle left of a blue square.", "Which shape is larger? The circle is larger. Assistant: User:"] * 4
SIDE = 28
TAGS = {"vl": "<image_placeholder>", "vl2": "<image>"}
FAMILIES = ["vl", "vl2"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("processors")
    tokenizer = train_byte_level_bpe(TEXTS, 340)
    write_processor_folder("vl", root / "vl", tokenizer, image_size=SIDE, tokens_per_image=4)
    write_processor_folder("vl2", root / "vl2", tokenizer, image_size=SIDE, patch_size=14, max_tiles=6)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="session")
def processors(folders: dict[str, Path]) -> dict[str, Processor]:
    return {family: Processor.from_folder(folders[family], max_tiles=6) for family in FAMILIES}


def picture(width: int = 30, height: int = 20, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def as_bytes(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[turn % 2], "content": content} for turn, content in enumerate(contents)]


def kind_of(processor: Processor, messages: Any, images: list[Any]) -> str:
    with pytest.raises(SampleError) as caught:
        processor.encode(messages, images)
    assert isinstance(caught.value, ValueError)
    return caught.value.kind


def marked(processor: Processor, messages: list[dict[str, str]], images: list[Any] | None = None, **options: Any) -> str:
    """The sequence as text, supervised runs in [square brackets], each image as one #."""
    encoded = processor.encode(messages, images or [], **options)
    runs: list[tuple[str, list[int]]] = []
    for token, label, visual in zip(encoded.input_ids, encoded.labels, encoded.image_mask, strict=True):
        state = "image" if visual else "masked" if label == -100 else "supervised"
        assert label == -100 or (label == token and not visual)
        if not runs or runs[-1][0] != state:
            runs.append((state, []))
        runs[-1][1].append(int(token))
    text = ""
    for state, ids in runs:
        decoded = processor.tokenizer.decode(ids)
        text += "#" if state == "image" else f"[{decoded}]" if state == "supervised" else decoded
    return text.replace(BOS_TOKEN, "<bos>").replace(EOS_TOKEN, "<eos>")


# ------------------------------------------------------------------------------------------------------- what is supervised: VL2


def test_vl2_supervises_every_answer_and_its_end(processors: dict[str, Processor]) -> None:
    messages = turns("<image>\nWhich? ", " Red. ", "Why?", "It is.")
    expected = "[<bos>]<|User|>: #\nWhich?\n\n<|Assistant|>:[Red.<eos>]<|User|>: Why?\n\n<|Assistant|>:[It is.<eos>]"
    assert marked(processors["vl2"], messages, [picture()]) == expected


def test_vl2_system_message_is_masked_text(processors: dict[str, Processor]) -> None:
    messages = [{"role": "system", "content": " Be brief.\n"}, *turns("Hi", "Ho")]
    assert marked(processors["vl2"], messages) == "[<bos>]Be brief.<|User|>: Hi\n\n<|Assistant|>:[Ho<eos>]"


def test_vl2_prompts_are_supervised_without_mask_prompt(folders: dict[str, Path]) -> None:
    processor = Processor.from_folder(folders["vl2"], mask_prompt=False)
    messages = [{"role": "system", "content": "Be brief."}, *turns("<image>Hi", "Ho")]
    expected = "[<bos>Be brief.<|User|>: ]#[Hi\n\n<|Assistant|>:Ho<eos>]"
    assert marked(processor, messages, [picture()]) == expected


def test_vl2_inference_leaves_out_the_final_end(processors: dict[str, Processor]) -> None:
    processor = processors["vl2"]
    asked = "[<bos>]<|User|>: Hi\n\n<|Assistant|>:"
    assert marked(processor, turns("Hi", ""), inference=True) == asked
    assert marked(processor, turns("Hi"), inference=True) == asked
    assert marked(processor, turns("Hi", "Ho"), inference=True) == asked + "[Ho]"
    assert marked(processor, turns("Hi", "")) == asked + "[<eos>]"


def test_vl2_empty_question_loses_its_separator(processors: dict[str, Processor]) -> None:
    assert marked(processors["vl2"], turns(" ", "Ho")) == "[<bos>]<|User|>:<|Assistant|>:[Ho<eos>]"


# -------------------------------------------------------------------------------------------------------- what is supervised: VL


def test_vl_supervises_every_answer_and_its_end(processors: dict[str, Processor]) -> None:
    messages = turns("<image_placeholder>Which? ", " Red. ", "Why?", "It is.", "So?", "")
    expected = f"{VL_SYSTEM_PROMPT}\n\nUser: #Which?\n\nAssistant:[ Red.<eos>]User: Why?\n\nAssistant:[ It is.<eos>]User: So?\n\nAssistant:"
    assert marked(processors["vl"], messages, [picture()]) == expected
    assert marked(processors["vl"], messages, [picture()], inference=True) == expected


def test_vl_image_in_an_answer_is_masked(processors: dict[str, Processor]) -> None:
    messages = [{"role": "system", "content": ""}, *turns("Draw", "This <image_placeholder> one")]
    assert marked(processors["vl"], messages, [picture()]) == "User: Draw\n\nAssistant:[ This ]#[ one<eos>]"


def test_vl_system_message_replaces_the_default(processors: dict[str, Processor]) -> None:
    messages = [{"role": "system", "content": "\n Be brief."}, *turns("Hi", "Ho")]
    assert marked(processors["vl"], messages) == "Be brief.\n\nUser: Hi\n\nAssistant:[ Ho<eos>]"


def test_vl_prompts_are_supervised_without_mask_prompt(folders: dict[str, Path]) -> None:
    processor = Processor.from_folder(folders["vl"], mask_prompt=False)
    messages = [{"role": "system", "content": ""}, *turns("<image_placeholder>Hi", "Ho")]
    assert marked(processor, messages, [picture()]) == "[User: ]#[Hi\n\nAssistant: Ho<eos>]"


def test_vl_bos_of_a_llama_tokenizer_is_a_masked_prompt(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["vl"], tmp_path / "vl"))
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    processor = Processor.from_folder(folder)
    messages = [{"role": "system", "content": ""}, *turns("<image_placeholder>Hi", "Ho")]
    assert marked(processor, messages, [picture()]) == "<bos>User: #Hi\n\nAssistant:[ Ho<eos>]"
    assert processor.measure(messages, [(30, 20)]) == processor.encode(messages, [picture()]).measured()


def test_vl_token_across_the_border_is_supervised(tmp_path: Path) -> None:
    """A tokenizer that merges across words has a token of the colon and the first letters of an answer."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=262,
        special_tokens=[BOS_TOKEN, EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(["x: R", "y: R", "z: R"], trainer)
    write_processor_folder("vl", tmp_path, backend, image_size=SIDE, tokens_per_image=4)
    processor = Processor.from_folder(tmp_path)
    ids = processor.tokenizer.encode("t: Red")
    assert [processor.tokenizer.decode([i]) for i in ids] == ["t", ": R", "e", "d"]
    messages = [{"role": "system", "content": ""}, *turns("Q", "Red")]
    assert marked(processor, messages) == "User: Q\n\nAssistant[: Red<eos>]"


# ------------------------------------------------------------------------------------------------------- documents, both families


@pytest.mark.parametrize("family", FAMILIES)
def test_document_supervises_all_but_images(processors: dict[str, Processor], family: str) -> None:
    tag = TAGS[family]
    caption = [{"role": "document", "content": f"{tag}A red circle. "}]
    assert marked(processors[family], caption, [picture()]) == "[<bos>]#[A red circle. <eos>]"
    interleaved = [{"role": "document", "content": f"One {tag} two {tag}{tag}"}]
    assert marked(processors[family], interleaved, [picture()] * 3) == "[<bos>One ]#[ two ]#[<eos>]"
    assert marked(processors[family], caption, [picture()], inference=True) == "[<bos>]#[A red circle. ]"


@pytest.mark.parametrize("family", FAMILIES)
def test_bos_and_image_positions_never_count(processors: dict[str, Processor], family: str) -> None:
    encoded = processors[family].encode([{"role": "document", "content": f"{TAGS[family]}ab"}], [picture()])
    text = len(processors[family].tokenizer.encode("ab"))
    assert encoded.measured().supervised_tokens == text + 1
    assert encoded.measured().tokens == encoded.measured().visual_tokens + text + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_tag_of_the_other_family_stands_for_an_image(processors: dict[str, Processor], family: str) -> None:
    processor, (own, other) = processors[family], (TAGS[family], TAGS["vl2" if family == "vl" else "vl"])
    expected = processor.encode(turns(f"{own} Hi", "Ho"), [picture()])
    assert torch.equal(processor.encode(turns(f"{other} Hi", "Ho"), [picture()]).input_ids, expected.input_ids)
    mixed = processor.encode(turns(f"{own} {other}", "Ho"), [picture()])
    assert mixed.input_ids.tolist().count(processor.tokenizer.token_id(other)) == 1


@pytest.mark.parametrize("names", [("User", "Assistant"), (USER_TOKEN, ASSISTANT_TOKEN), ("user", "assistant")])
@pytest.mark.parametrize("family", FAMILIES)
def test_roles_of_both_released_families(processors: dict[str, Processor], family: str, names: tuple[str, str]) -> None:
    messages = [{"role": names[0], "content": "Hi"}, {"role": names[1], "content": "Ho"}]
    assert marked(processors[family], messages) == marked(processors[family], turns("Hi", "Ho"))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_messages_ask_about_images(processors: dict[str, Processor], family: str) -> None:
    processor, tag = processors[family], TAGS[family]
    assert processor.prompt_messages("Hi") == turns("Hi", "")
    assert processor.prompt_messages("Hi", 2) == turns(f"{tag}\n{tag}\nHi", "")
    assert processor.prompt_messages(f"Hi {tag}", 1) == turns(f"Hi {tag}", "")
    with pytest.raises(SampleError, match=r"1 .* tags for 2 images"):
        processor.prompt_messages(tag, 2)
    asked = marked(processor, processor.prompt_messages("Hi", 1), [picture()], inference=True)
    assert asked.endswith({"vl": "User: #\nHi\n\nAssistant:", "vl2": "<|User|>: #\nHi\n\n<|Assistant|>:"}[family])
    assert processor.stop_ids == [processor.tokenizer.eos_id]


# ---------------------------------------------------------------------------------------------------- sizes from geometry alone

WORDS = st.sampled_from(["red", " ", "\n", "Größe", "世界", "🙂", ":", "User:", "<|User|>", "<|ref|>", "a" * 20, "", EOS_TOKEN])
TEXT = st.lists(WORDS, max_size=6).map("".join)
SIZES = st.tuples(st.integers(1, 200), st.integers(1, 200))


@st.composite
def samples(draw: st.DrawFn, tag: str) -> tuple[list[dict[str, str]], list[tuple[int, int]]]:
    """Any sample that both families allow."""

    def text(with_images: bool) -> str:
        pieces = draw(st.lists(TEXT, min_size=1, max_size=4 if with_images else 1))
        return tag.join(pieces)

    if draw(st.booleans()):
        messages = [{"role": "document", "content": text(True)}]
    else:
        messages = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
        for _ in range(draw(st.integers(1, 3))):
            messages += [{"role": "user", "content": text(True)}, {"role": "assistant", "content": draw(TEXT)}]
    count = sum(message["content"].count(tag) for message in messages)
    return messages, draw(st.lists(SIZES, min_size=count, max_size=count))


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data(), inference=st.booleans(), mask_prompt=st.booleans(), rule=st.sampled_from(["released", "paper"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_measure_equals_encode(
    folders: dict[str, Path], family: str, data: st.DataObject, inference: bool, mask_prompt: bool, rule: Any
) -> None:
    processor = _cached(folders[family], mask_prompt, rule)
    messages, sizes = data.draw(samples(TAGS[family]))
    encoded = processor.encode(messages, [Image.new("RGB", size) for size in sizes], inference=inference)
    assert processor.measure(messages, sizes, inference=inference) == encoded.measured()
    assert len(encoded.input_ids) == len(encoded.labels) == len(encoded.image_mask)
    assert torch.equal(encoded.image_mask, encoded.input_ids == processor.tokenizer.image_id)
    assert encoded.pixels.dtype == torch.uint8
    assert encoded.image_count == len(sizes)


_processors: dict[tuple[Any, ...], Processor] = {}


def _cached(folder: Path, mask_prompt: bool, rule: Any) -> Processor:
    key = (folder, mask_prompt, rule)
    if key not in _processors:
        _processors[key] = Processor.from_folder(folder, mask_prompt=mask_prompt, tile_selection=rule, max_tiles=6)
    return _processors[key]


# ----------------------------------------------------------------------------------------------------------------------- tiles


def test_vl2_tiles_only_up_to_the_image_limit(folders: dict[str, Path]) -> None:
    for limit, count, tiled in [(2, 2, True), (2, 3, False), (0, 1, False), (5, 4, True)]:
        processor = Processor.from_folder(folders["vl2"], tiling_image_limit=limit, max_tiles=6)
        encoded = processor.encode(turns("<image>" * count, "Ho"), [picture(84, 56)] * count)
        assert encoded.tiles_wh.tolist() == [[3, 2] if tiled else [1, 1]] * count


def test_vl2_untiled_image_is_encoded_twice(processors: dict[str, Processor]) -> None:
    pixels = processors["vl2"].encode(turns("<image>", "Ho"), [picture(20, 20)]).pixels
    assert pixels.shape == (2, 3, SIDE, SIDE)
    assert torch.equal(pixels[0], pixels[1])


def test_vl2_tiles_are_rows_of_the_padded_image(processors: dict[str, Processor]) -> None:
    image = picture(3 * SIDE, 2 * SIDE)
    encoded = processors["vl2"].encode(turns("<image>", "Ho"), [image])
    assert encoded.tiles_wh.tolist() == [[3, 2]]
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    rows = [torch.cat(list(encoded.pixels[start : start + 3]), dim=2) for start in (1, 4)]
    assert torch.equal(torch.cat(rows, dim=1), whole)


@given(SIZES, st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_vl2_views_equal_pillow_s_padding(size: tuple[int, int], wide: int, high: int) -> None:
    image, colour = picture(*size), (127, 120, 110)
    pixels = np.empty((1 + wide * high, 3, 8, 8), dtype=np.uint8)
    fill_vl2_tiles(open_image(image, 10**9), (wide, high), 8, colour, pixels)
    views = [ImageOps.pad(image, (8, 8), color=colour)]
    local = ImageOps.pad(image, (wide * 8, high * 8), color=colour)
    views += [local.crop((left, top, left + 8, top + 8)) for top in range(0, high * 8, 8) for left in range(0, wide * 8, 8)]
    np.testing.assert_array_equal(pixels, np.stack([np.asarray(view) for view in views]).transpose(0, 3, 1, 2))


def test_vl2_max_tiles_decides_the_candidates(folders: dict[str, Path]) -> None:
    wide = turns("<image>", "Ho"), [(18 * SIDE, SIDE)]
    for max_tiles, tiles in [(1, 2), (6, 7), (None, 7), (18, 19)]:
        processor = Processor.from_folder(folders["vl2"], max_tiles=max_tiles)
        assert processor.measure(*wide).tiles == tiles


def test_vl2_text_only_sample_has_a_place_holder_that_does_not_count(processors: dict[str, Processor]) -> None:
    encoded = processors["vl2"].encode(turns("Hi", "Ho"), [])
    assert (encoded.image_count, encoded.measured().tiles) == (0, 0)
    assert encoded.tiles_wh.tolist() == [[0, 0]]
    assert encoded.pixels.shape == (1, 3, SIDE, SIDE)
    assert np.unique(encoded.pixels.numpy()).tolist() == [128]


def test_vl_text_only_sample_has_no_pixels(processors: dict[str, Processor]) -> None:
    encoded = processors["vl"].encode(turns("Hi", "Ho"), [])
    assert encoded.pixels.shape == (0, 3, SIDE, SIDE)
    assert encoded.tiles_wh.shape == (0, 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_modes_are_converted_as_pillow_does(processors: dict[str, Processor], family: str, mode: str) -> None:
    messages = turns(TAGS[family], "Ho")
    image = Image.new("I;16", (30, 20), 200) if mode == "I;16" else picture(mode=mode)
    expected = processors[family].encode(messages, [image.convert("RGB")]).pixels
    assert torch.equal(processors[family].encode(messages, [image]).pixels, expected)
    if mode != "CMYK":
        assert torch.equal(processors[family].encode(messages, [as_bytes(image)]).pixels, expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_formats_are_read_from_bytes_and_paths(processors: dict[str, Processor], tmp_path: Path, kind: str) -> None:
    content = as_bytes(picture(), kind)
    (tmp_path / "image").write_bytes(content)
    messages = turns("<image>", "Ho")
    expected = processors["vl2"].encode(messages, [Image.open(io.BytesIO(content))]).pixels
    for source in (content, tmp_path / "image", str(tmp_path / "image")):
        assert torch.equal(processors["vl2"].encode(messages, [source]).pixels, expected)


# ------------------------------------------------------------------------------------------------------------------ bad samples


@pytest.mark.parametrize("family", FAMILIES)
def test_broken_images(processors: dict[str, Processor], tmp_path: Path, family: str) -> None:
    processor, messages = processors[family], turns(TAGS[family], "Ho")
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        content = as_bytes(picture(300, 200), kind)
        assert kind_of(processor, messages, [content[: len(content) // 2]]) == "image_broken"
    assert kind_of(processor, messages, [b""]) == "image_broken"
    assert kind_of(processor, messages, [b"not an image"]) == "image_broken"
    assert kind_of(processor, messages, [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]) == "image_broken"
    assert kind_of(processor, messages, [tmp_path / "none.png"]) == "image_missing"
    assert kind_of(processor, messages, [tmp_path]) == "unreadable"
    assert kind_of(processor, messages, [Image.new("RGB", (0, 5))]) == "image_broken"


@given(st.binary(max_size=40), st.integers(0, 400))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_raise_nothing_else(processors: dict[str, Processor], noise: bytes, at: int) -> None:
    content = bytearray(as_bytes(picture(), "PNG"))
    content[at : at + len(noise)] = noise
    try:
        processors["vl2"].encode(turns("<image>", "Ho"), [bytes(content)])
    except SampleError as error:
        assert error.kind in ("image_broken", "image_bomb")


@pytest.mark.parametrize("family", FAMILIES)
def test_bomb_is_refused_before_decoding(folders: dict[str, Path], family: str) -> None:
    processor = Processor.from_folder(folders[family], max_image_pixels=1000)
    messages = turns(TAGS[family], "Ho")
    truncated = as_bytes(picture(100, 11))[:60]  # decoding it would fail: the header must be enough
    assert kind_of(processor, messages, [truncated]) == "image_bomb"
    with pytest.raises(SampleError, match=r"100x11 = 1100 pixels.*data\.max_image_pixels allows 1000"):
        processor.measure(messages, [(100, 11)])
    assert processor.measure(messages, [(100, 10)]).tiles > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_image_count_must_match(processors: dict[str, Processor], family: str) -> None:
    processor, tag = processors[family], TAGS[family]
    for content, count in [(tag, 0), ("no tag", 1), (tag * 3, 2)]:
        for messages in (turns(content, "Ho"), [{"role": "document", "content": content}]):
            assert kind_of(processor, messages, [picture()] * count) == "image_count"
            with pytest.raises(SampleError, match=rf"{content.count(tag)} .*tags in the text, but {count} images"):
                processor.measure(messages, [(5, 5)] * count)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty"),
        ([{"role": "human", "content": "Hi"}], "unknown role 'human'"),
        ([{"content": "Hi"}], "unknown role None"),
        ([{"role": "user"}], "content of type NoneType"),
        (["Hi"], "is a str"),
        ([{"role": "user", "content": "Hi \ud83d"}], "surrogate"),
        ([*turns("Hi", "Ho"), {"role": "system", "content": "Be brief."}], "must come first"),
        ([{"role": "system", "content": "Be brief."}], "no turn"),
        ([{"role": "document", "content": "Hi"}, *turns("Hi")], "one message"),
    ],
)
def test_bad_conversations(processors: dict[str, Processor], family: str, messages: Any, words: str) -> None:
    assert kind_of(processors[family], messages, []) == "bad_conversation"
    with pytest.raises(SampleError, match=words):
        processors[family].measure(messages, [])


def test_vl2_images_stand_in_user_turns_only(processors: dict[str, Processor]) -> None:
    assert kind_of(processors["vl2"], turns("Hi", "<image>"), [picture()]) == "bad_conversation"
    assert kind_of(processors["vl2"], [{"role": "system", "content": "<image>"}, *turns("Hi")], [picture()]) == "bad_conversation"


def test_vl_turns_must_alternate(processors: dict[str, Processor]) -> None:
    said = [{"role": "user", "content": "Hi"}] * 2
    assert kind_of(processors["vl"], said, []) == "bad_conversation"
    assert marked(processors["vl2"], said).count("<|User|>") == 2


def test_sample_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(SampleError("too_long", "9 tokens")))
    assert (error.kind, str(error)) == ("too_long", "9 tokens")
    with pytest.raises(ValueError, match="unknown kind"):
        SampleError("odd", "?")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------- folders


def edit(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; `...` removes one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def test_family_is_the_folder_s(processors: dict[str, Processor]) -> None:
    assert isinstance(processors["vl"], VlProcessor)
    assert isinstance(processors["vl2"], Vl2Processor)
    assert (processors["vl"].family, processors["vl"].image_size, processors["vl"].tokens_per_image) == ("vl", SIDE, 4)
    assert (processors["vl2"].family, processors["vl2"].image_size, processors["vl2"].tokens_side) == ("vl2", SIDE, 1)


@pytest.mark.parametrize(
    ("family", "name", "key", "value"),
    [
        ("vl", "processor_config.json", "sft_format", "llama-2"),
        ("vl2", "processor_config.json", "sft_format", "deepseekv2"),
        ("vl2", "processor_config.json", "processor_class", "Other"),
        ("vl2", "processor_config.json", "processor_class", ...),
        ("vl2", "processor_config.json", "sft_format", ...),
        ("vl2", "processor_config.json", "candidate_resolutions", [[28, 28], [28, 50]]),
        ("vl2", "processor_config.json", "candidate_resolutions", []),
        ("vl2", "processor_config.json", "patch_size", 0),
        ("vl2", "processor_config.json", "image_mean", [0.5]),
        ("vl2", "processor_config.json", "ignore_id", 0),
        ("vl", "processor_config.json", "num_image_tokens", "576"),
        ("vl", "processor_config.json", "add_special_token", True),
        ("vl", "preprocessor_config.json", "image_size", ...),
        ("vl", "preprocessor_config.json", "do_normalize", True),
    ],
)
def test_wrong_folder_names_file_and_key(folders: dict[str, Path], tmp_path: Path, family: str, name: str, key: str, value: Any) -> None:
    folder = Path(shutil.copytree(folders[family], tmp_path / "copy"))
    edit(folder / name, **{key: value})
    with pytest.raises(ValueError, match=rf"{name}: .*{key}"):
        Processor.from_folder(folder)


def test_missing_files_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["vl"], tmp_path / "copy"))
    for name in ("tokenizer.json", "preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            Processor.from_folder(folder)


def test_other_end_token_than_the_template_s_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["vl"], tmp_path / "copy"))
    edit(folder / "tokenizer_config.json", eos_token=PAD_TOKEN)
    with pytest.raises(ValueError, match="eos_token"):
        Processor.from_folder(folder)


def test_mask_prompt_none_is_the_folder_s(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["vl2"], tmp_path / "copy"))
    edit(folder / "processor_config.json", mask_prompt=False)
    assert not Processor.from_folder(folder, mask_prompt=None).mask_prompt
    assert Processor.from_folder(folder).mask_prompt


def test_fingerprint_covers_what_decides_the_output(folders: dict[str, Path]) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"mask_prompt": False},
        {"tile_selection": "paper"},
        {"max_tiles": 6},
        {"tiling_image_limit": 3},
        {"max_image_pixels": 10**6},
    ]
    prints = [Processor.from_folder(folders["vl2"], **chosen).fingerprint() for chosen in options]
    prints.append(Processor.from_folder(folders["vl"]).fingerprint())
    assert len(set(prints)) == len(prints)
    assert Processor.from_folder(folders["vl2"]).fingerprint() == prints[0]


def test_wrong_settings_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.tile_selection"):
        Processor.from_folder(folders["vl2"], tile_selection="best")  # type: ignore[arg-type]
    tokenizer = train_byte_level_bpe(TEXTS, 300)
    with pytest.raises(ValueError, match="patch_size"):
        write_processor_folder("vl2", tmp_path, tokenizer, image_size=SIDE)
    with pytest.raises(ValueError, match="tokens_per_image"):
        write_processor_folder("vl", tmp_path, tokenizer, image_size=SIDE)
