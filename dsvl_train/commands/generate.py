"""`dsvl generate`: answers to prompts, with images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from dsvl_train.commands.encode import add_max_tiles

if TYPE_CHECKING:
    from dsvl_train.data.processor import Encoded
    from dsvl_train.evaluation.generation import Sampling
    from dsvl_train.evaluation.loading import LoadedModel


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("generate", help="answer a prompt, with images, or a file of conversations")
    parser.add_argument("--model", required=True, help="folder in a released format, checkpoint, or run folder (its latest checkpoint)")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", help="the question; images go before it unless it says where, with image tags")
    asked.add_argument("--samples", help="JSON list or JSON lines of messages and images; answers are written as JSON lines")
    parser.add_argument("--image", action="append", default=[], help="an image file for --prompt; repeat for several")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (the default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the smallest set of tokens with this much probability")
    parser.add_argument("--top-k", type=int, default=0, help="sample from this many most probable tokens; 0 = all (the default)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--batch", type=int, default=16, help="conversations of --samples at once")
    add_max_tiles(parser)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the answer while it is made, or a line per sample."""
    from dsvl_train.parallel.startup import start_alone

    for file in arguments.image:
        if not Path(file).is_file():
            raise FileNotFoundError(f"--image {file} is not a file")
    if arguments.image and arguments.prompt is None:
        raise ValueError("--image goes with --prompt; a sample of --samples names its own images")
    if arguments.batch < 1:
        raise ValueError(f"--batch {arguments.batch} must be at least 1")
    world = start_alone(arguments.device)  # before anything that imports megatron-core
    from dsvl_train.evaluation.generation import Sampling
    from dsvl_train.evaluation.loading import load_model

    sampling = Sampling(arguments.temperature, arguments.top_p, arguments.top_k, arguments.seed)
    loaded = load_model(arguments.model, world, max_tiles=arguments.max_tiles)
    if arguments.prompt is None:
        _answer_samples(loaded, arguments, sampling)
        return 0
    messages = loaded.processor.prompt_messages(arguments.prompt, len(arguments.image))
    _stream_answer(loaded, loaded.processor.encode(messages, arguments.image, inference=True), arguments.max_new_tokens, sampling)
    return 0


def _stream_answer(loaded: LoadedModel, prompt: Encoded, max_new_tokens: int, sampling: Sampling) -> None:
    from dsvl_train.evaluation.generation import generate
    from dsvl_train.evaluation.streaming import TextStream

    stream = TextStream(loaded.processor.tokenizer)
    generate(loaded, [prompt], max_new_tokens, sampling, on_token=lambda _, token: print(stream.push(token), end="", flush=True))
    print(stream.finish(), flush=True)


def _answer_samples(loaded: LoadedModel, arguments: argparse.Namespace, sampling: Sampling) -> None:
    from dsvl_train.evaluation.generation import generate
    from dsvl_train.evaluation.samples import as_prompt, encode_sample, read_samples

    samples = [as_prompt(sample) for sample in read_samples(arguments.samples)]
    for start in range(0, len(samples), arguments.batch):
        prompts = [encode_sample(loaded.processor, sample, inference=True) for sample in samples[start : start + arguments.batch]]
        for ids in generate(loaded, prompts, arguments.max_new_tokens, sampling, first=start):
            answer = loaded.processor.tokenizer.decode(ids).strip()
            print(json.dumps({"answer": answer, "tokens": len(ids)}, ensure_ascii=False), flush=True)
