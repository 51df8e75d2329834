"""Remote shards: ranges over real HTTP and fsspec's file systems, repetitions, and the bounded cache."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

from dsvl_train.data.block_cache import BlockCache
from dsvl_train.data.errors import SampleError
from dsvl_train.data.loader import build_data
from dsvl_train.data.processor import Processor
from dsvl_train.data.shards import ShardReader, merge_spans
from dsvl_train.data.storage import RemoteFiles, Unreachable, is_remote, local_path, open_remote_files
from tests.unit.made_data import VL2_FOLDER, config, shards_source, text_source, write_corpus, write_mixture
from tests.unit.remote_servers import SlowFileSystem, register_slow, serve
from tests.unit.test_loader import assert_same

pytest.importorskip("aiohttp")
CONTENT = random.Random(0).randbytes(3_000_000)


def quick(cache: BlockCache | None = None, **settings: Any) -> RemoteFiles:
    return RemoteFiles(cache, **{"retries": 3, "first_pause_s": 0.01, **settings})


# ---------------------------------------------------------------------------------------------------------------- reading


def test_ranges_over_http(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    with serve(tmp_path) as (url, server):
        files = quick()
        assert files.stat(f"{url}/a.tar").size == len(CONTENT)
        assert files.read(f"{url}/a.tar", 1000, 500) == CONTENT[1000:1500]
        assert files.read(f"{url}/a.tar", len(CONTENT) - 1, 1) == CONTENT[-1:]
        assert files.read(f"{url}/a.tar", 7, 0) == b""
        assert [wanted for method, _, wanted in server.requests if method == "GET"] == ["bytes=1000-1499", "bytes=2999999-2999999"]
        with files.local_copy(f"{url}/a.tar") as copy:
            assert Path(copy).read_bytes() == CONTENT
        assert not Path(copy).exists()


def test_failures_are_repeated_and_then_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    with serve(tmp_path) as (url, server):
        files = quick()
        server.fail_next, server.cut_next = 2, 1
        assert files.read(f"{url}/a.tar", 5, 100_000) == CONTENT[5:100_005]
        assert files.requests == 4
        server.fail_next = 99
        with pytest.raises(Unreachable, match=rf"{url}/a\.tar: reading bytes 5 to 15 failed 4 times in .* s, the last time with .*503"):
            files.read(f"{url}/a.tar", 5, 10)
        server.fail_next = 0
        before = files.requests
        with pytest.raises(Unreachable, match="FileNotFoundError"):
            files.stat(f"{url}/gone.tar")
        assert files.requests == before + 1, "an answer of 404 is not asked for again"
    with pytest.raises(Unreachable, match="failed 4 times"):
        files.read(f"{url}/a.tar", 5, 10)


def test_a_server_without_ranges_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    with serve(tmp_path, ranges=False) as (url, _), pytest.raises(Unreachable, match="does not serve ranges"):
        quick().read(f"{url}/a.tar", 5, 10)


def test_a_request_that_hangs_ends(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    with serve(tmp_path) as (url, server):
        server.answer = lambda handler, with_body: time.sleep(5)  # type: ignore[method-assign]
        started = time.monotonic()
        with pytest.raises(Unreachable, match="Timeout"):
            quick(retries=1, timeout_s=0.2).read(f"{url}/a.tar", 5, 10)
        assert time.monotonic() - started < 3


def test_memory_and_file_systems_are_read_alike(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/bucket/x/a.tar", CONTENT)
    (tmp_path / "a.tar").write_bytes(CONTENT)
    for url in ("memory://bucket/x/a.tar", f"local://{tmp_path}/a.tar"):
        for cache in (None, BlockCache(tmp_path / "cache", 10_000_000)):
            assert quick(cache).read(url, 123, 2_000_000) == CONTENT[123:2_000_123]
    assert quick().expand("memory://bucket/x", "S") == quick().expand("memory://bucket/*/a*.tar", "S") == ["memory:///bucket/x/a.tar"]
    assert quick().expand("memory://b/{0..2}.tar", "S") == [f"memory://b/{number}.tar" for number in range(3)]
    with pytest.raises(FileNotFoundError, match="S=memory://nothing: no shards"):
        quick().expand("memory://nothing", "S")
    with pytest.raises(ValueError, match=r"is not a plain \.tar"):
        quick().expand("memory://bucket/{a,b}.tar.gz", "S")


def test_what_is_a_url() -> None:
    assert [is_remote(path) for path in ("s3://a/b.tar", "https://a/b", "file:///a", "/a/b", "a:b")] == [True, True, False, False, False]
    assert local_path("file:///data/x.tar") == "/data/x.tar"
    assert local_path("/data/x.tar") == "/data/x.tar"


def test_a_protocol_that_is_not_installed_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"s3://bucket/a\.tar: .*pip install 'dsvl_train\[remote\]'"):
        quick().stat("s3://bucket/a.tar")
    with pytest.raises(ValueError, match="nonsense://x cannot be opened"):
        quick().stat("nonsense://x")


# ------------------------------------------------------------------------------------------------------------------ cache


def test_blocks_are_kept_and_neighbours_come_together(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    with serve(tmp_path) as (url, server):
        cache = BlockCache(tmp_path / "cache", 10_000_000)
        files = quick(cache, block_bytes=100_000)
        assert files.read(f"{url}/a.tar", 150_000, 200_000) == CONTENT[150_000:350_000]
        gets = [wanted for method, _, wanted in server.requests if method == "GET"]
        assert gets == ["bytes=100000-399999"]
        assert files.read(f"{url}/a.tar", 100_000, 300_000) == CONTENT[100_000:400_000]
        assert quick(cache, block_bytes=100_000).read(f"{url}/a.tar", 399_990, 10) == CONTENT[399_990:400_000]
        assert len([1 for method, *_ in server.requests if method == "GET"]) == 1
        assert files.read(f"{url}/a.tar", 2_950_000, 50_000) == CONTENT[2_950_000:]

        names = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and len(path.parent.name) == 2]
        assert len(names) == 4
        assert all(len(name) == 64 and int(name, 16) >= 0 for name in names), "names are hashes"

        (tmp_path / "a.tar").write_bytes(CONTENT[::-1])
        os.utime(tmp_path / "a.tar", ns=(0, 1))
        assert quick(cache, block_bytes=100_000).read(f"{url}/a.tar", 150_000, 10) == CONTENT[::-1][150_000:150_010], "another version"


def test_a_spoiled_block_is_read_anew(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 10_000)
    cache.put("key", b"content")
    (path,) = [path for path in tmp_path.rglob("*") if len(path.name) == 64]
    for spoiled in (b"", b"con", path.read_bytes()[:-1], b"X" + path.read_bytes()[1:]):
        path.write_bytes(spoiled)
        assert cache.get("key") is None
        assert not path.exists()
        cache.put("key", b"content")
        assert cache.get("key") == b"content"


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 10 * 1004)
    for number in range(10):
        cache.put(f"{number}", bytes(1000))
        path = cache._path(f"{number}")
        os.utime(path, ns=(number, number))
    assert cache.get("0") is not None
    cache.put("new", bytes(1000))
    kept = [number for number in range(10) if cache._path(f"{number}").exists()]
    assert kept == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert cache.get("new") is not None
    cache.put("too large", bytes(20_000))
    assert cache.get("too large") is None
    assert cache.used_bytes() <= cache.max_bytes


def hammer(folder: str, max_bytes: int, seed: int, rounds: int, wrong: Any) -> None:
    cache = BlockCache(folder, max_bytes)
    rng = random.Random(seed)
    for _ in range(rounds):
        number = rng.randrange(40)
        content = random.Random(number).randbytes(500 + 10 * number)
        found = cache.get(f"{number}")
        if found is None:
            cache.put(f"{number}", content)
        elif found != content:
            wrong.put(number)


def test_many_processes_share_a_cache_within_its_bound(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    wrong = context.Queue()
    bound = 12_000
    workers = [context.Process(target=hammer, args=(str(tmp_path), bound, seed, 150, wrong)) for seed in range(4)]
    for worker in workers:
        worker.start()
    cache = BlockCache(tmp_path, bound)
    most = 0
    while any(worker.is_alive() for worker in workers):
        with cache._locked():
            most = max(most, cache.used_bytes())
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert wrong.empty()
    assert 0 < most <= bound
    assert not list(tmp_path.rglob("*.unfinished"))


def test_what_a_dead_process_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    old, young = tmp_path / "ab" / "old.unfinished", tmp_path / "ab" / "young.unfinished"
    copy = tmp_path / "copy-x.tar"
    for path in (old, young, copy):
        path.write_bytes(bytes(400))
    for path in (old, copy):
        os.utime(path, (0, 0))
    cache = BlockCache(tmp_path, 1000)
    assert not copy.exists()
    cache.put("key", bytes(396))
    assert (old.exists(), young.exists()) == (False, True)
    assert cache.get("key") == bytes(396)


def test_a_cache_that_cannot_be_written_costs_only_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*cannot be used"):
        BlockCache(tmp_path / "file", 1000)
    cache = BlockCache(tmp_path / "cache", 1000)
    name = cache._path("key").parent
    name.write_text("in the way")
    cache.put("key", b"content")
    cache.put("key", b"content")
    assert cache.get("key") is None
    assert len([record for record in caplog.records if "could not be kept" in record.message]) == 1
    with pytest.raises(ValueError, match=r"data\.cache_gb=.*has .* GB"):
        open_remote_files(str(tmp_path / "cache"), 1e9, 1)


# ----------------------------------------------------------------------------------------------------------------- readers


def test_neighbouring_members_come_in_one_read(tmp_path: Path) -> None:
    assert merge_spans([(600, 10), (0, 100), (100_000, 5), (50, 20), (700, 0)]) == [(0, 610), (100_000, 5)]
    (tmp_path / "a.tar").write_bytes(CONTENT)
    reader = ShardReader()
    spans = [(1000, 50), (512, 100), (2_000_000, 7), (900, 0)]
    found = reader.read(str(tmp_path / "a.tar"), spans, len(CONTENT))
    assert found == [CONTENT[offset : offset + size] for offset, size in spans]
    assert (reader.opens, reader.reads) == (1, 2)
    reader.read(str(tmp_path / "a.tar"), spans, len(CONTENT))
    assert (reader.opens, reader.reads) == (1, 4)


def test_an_unreachable_shard_stops_or_is_a_bad_sample_as_configured() -> None:
    with pytest.raises(Unreachable, match=r"memory://nowhere/a\.tar"):
        ShardReader(remote=quick()).read("memory://nowhere/a.tar", [(0, 1)], 10)
    with pytest.raises(SampleError, match=r"memory://nowhere/a\.tar") as caught:
        ShardReader(remote=quick(), skip_unreachable=True).read("memory://nowhere/a.tar", [(0, 1)], 10)
    assert caught.value.kind == "unreadable"


# --------------------------------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("cached", [False, True])
def test_batches_from_http_are_those_from_disk(tmp_path: Path, cached: bool) -> None:
    write_mixture(tmp_path / "shards", 24, shards=4)
    write_corpus(tmp_path / "text", Processor.from_folder(VL2_FOLDER))
    settings: dict[str, Any] = {"text_ratio": 0.3, "seq_len": 512, "batch_size": 4, "window": 8, "workers": 2}
    with serve(tmp_path) as (url, _):
        settings |= {"index_dir": str(tmp_path / "indexes"), "cache_dir": str(tmp_path / "cache") if cached else None, "cache_gb": 0.001}
        batches = {}
        for where in (str(tmp_path / "shards"), f"file://{tmp_path}/shards", f"{url}/shards/shard-{{000000..000003}}.tar", f"{url}/shards"):
            cfg = config({"pictures": shards_source(where), "books": text_source(tmp_path / "text")}, **settings)
            with build_data(cfg, seed=3, max_steps=6, dp_rank=0, dp_size=1) as pipeline:
                batches[where] = list(pipeline)
    wanted, *others = batches.values()
    for found in others:
        for one, other in zip(wanted, found, strict=True):
            assert_same(one, other)


def test_remote_shards_need_a_folder_for_their_index(tmp_path: Path) -> None:
    cfg = config({"m": shards_source("memory://bucket/{0..1}.tar")})
    with pytest.raises(ValueError, match=r"data\.sources\.m\.path=memory://.*data\.index_dir"):
        build_data(cfg, seed=0, max_steps=1, dp_rank=0, dp_size=1)


def test_a_thousand_shards_of_a_slow_file_system_are_read_ahead_in_time(tmp_path: Path) -> None:
    """Latencies of 20 to 50 ms per read, one after the other 280 ms per step of 8 samples, hide behind steps of 100 ms."""
    write_mixture(tmp_path / "shards", 1000, shards=1000)
    slow = register_slow()
    cfg = config(
        {"m": shards_source(f"slow://{tmp_path}/shards")},
        packing=False,
        batch_size=8,
        seq_len=2048,
        window=64,
        workers=8,
        prefetch_steps=4,
        index_dir=str(tmp_path / "indexes"),
    )
    slow.latency_s = (0.0, 0.0)  # indexing is not what is timed
    build_data(cfg, seed=0, max_steps=1, dp_rank=0, dp_size=1).close()
    slow.latency_s = (0.02, 0.05)
    with build_data(cfg, seed=0, max_steps=14, dp_rank=0, dp_size=1) as pipeline:
        waits = []
        for _ in range(14):
            asked = time.perf_counter()
            next(pipeline)
            waits.append(time.perf_counter() - asked)
            time.sleep(0.1)
    assert SlowFileSystem.requests >= 14 * 8
    assert sum(sorted(waits[2:])[:-2]) < 0.05 * 10 * 0.1, waits  # but for two moments in which the machine did something else
