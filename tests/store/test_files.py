"""The store in a folder: what is put comes back bit for bit, and nothing else ever does."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.errors import InvalidInput
from kvik.store import Fault, StoredBlock
from kvik.store.entry import HEADER_BYTES, encode
from kvik.store.files import MAX_QUARANTINED, FileStore
from kvik.store.sweep import STALE_S, sweep
from store.faults import ERRORS, inject
from store.stored import IDENTITY, PAYLOAD, SCOPE, a_path, open_store, same
from subprocesses import python
from tiers import examples

KEY = b"k" * 32


@pytest.fixture(params=[b"", KEY], ids=["checksum", "mac"])
def key(request: pytest.FixtureRequest) -> bytes:
    secret: bytes = request.param
    return secret


@pytest.mark.tiny
def test_what_is_put_comes_back(tmp_path: Path, key: bytes) -> None:
    store, path = open_store(tmp_path, key=key), a_path(3)
    assert store.get(path[0].digest) is Fault.MISSING
    assert store.exists_many([block.digest for block in path]) == 0
    assert [store.put(block) for block in path[:2]] == [True, True]
    other = open_store(tmp_path, key=key)  # as another process would
    assert all(same(other.get(block.digest), block) for block in path[:2])
    assert other.exists_many([block.digest for block in path]) == 2
    assert other.exists_many([block.digest for block in path[1::-1]]) == 2
    assert other.exists_many([block.digest for block in path[::-1]]) == 0
    assert other.delete(path[0].digest)
    assert not other.delete(path[0].digest)
    assert other.exists_many([block.digest for block in path]) == 0
    assert (other.stats.num_hits, store.stats.faults) == (2, {Fault.MISSING: 1})
    assert store.stats.written_bytes == other.stats.read_bytes == 2 * store.entry_bytes


@pytest.mark.tiny
def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    store = open_store(tmp_path / "in" / "a" / "new" / "folder")
    (block,) = a_path(1)
    store.put(block)
    assert store.version_folder.stat().st_mode & 0o777 == 0o700
    assert Path(store.path_of(block.digest)).stat().st_mode & 0o777 == 0o600
    store.version_folder.chmod(0o750)
    with pytest.raises(InvalidInput, match="may read stored keys") as refused:
        open_store(tmp_path / "in" / "a" / "new" / "folder")
    assert "chmod 700" in refused.value.hint


@pytest.mark.tiny
def test_a_folder_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "v1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidInput):
        open_store(tmp_path / "root")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput):
        open_store(tmp_path / "file")


@pytest.mark.tiny
def test_the_file_is_as_docs_store_md_has_it(tmp_path: Path) -> None:
    """Byte for byte: what is written here must be found by every later version that says 1."""
    store, (block,) = open_store(tmp_path), a_path(1)
    store.put(block)
    path = tmp_path / "v1" / SCOPE.hex() / "blocks" / block.digest.hex()[:2] / block.digest.hex()
    data = path.read_bytes()
    assert data[:8] == b"KVIKBLK\n"
    assert data[8:16] == bytes([1, 0, 1, 0, 32, 0, 0, 0])
    assert data[16:64] == SCOPE + block.digest + block.parent
    assert data[64:80] == bytes(8) + PAYLOAD.to_bytes(8, "little")
    assert data[80:96] == bytes(16)
    assert data[128:256] == block.tokens
    assert data[256:] == block.payload
    assert HEADER_BYTES == 128


def harmed(data: bytes, chance: random.Random) -> bytes:
    """The file after one of the accidents that happen to files, or an attack that knows no key."""
    at = chance.randrange(len(data)) if chance.random() < 0.3 else chance.randrange(HEADER_BYTES + 128)
    count = chance.choice((1, 1, 2, 8, 100))
    match chance.randrange(7):
        case 0:
            return data[:at]
        case 1:
            return data + chance.randbytes(count)
        case 2:
            return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        case 3:
            return data[:at] + chance.randbytes(count) + data[at + count :]
        case 4:
            return data[:at] + data[at + count :]
        case 5:  # hostile lengths
            number = chance.choice((0, 1, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
            place, size = chance.choice(((12, 4), (64, 8), (72, 8)))
            return data[:place] + (number % (1 << 8 * size)).to_bytes(size, "little") + data[place + size :]
        case _:
            return bytes(len(data)) if chance.random() < 0.5 else chance.randbytes(len(data))


def check_mutants(tmp_path: Path, key: bytes, seeds: range) -> None:
    store, (block, other) = open_store(tmp_path, key=key), a_path(2)
    assert store.put(block)
    path = Path(store.path_of(block.digest))
    data = path.read_bytes()
    for seed in seeds:
        chance = random.Random(seed)
        mutant = harmed(data, chance)
        path.write_bytes(mutant)
        found = store.get(block.digest)
        if mutant == data:
            assert same(found, block)
            continue
        assert isinstance(found, Fault), f"seed {seed}: a file that was harmed is used"
        assert found not in (Fault.MISSING, Fault.UNREADABLE)
        assert not path.exists(), "it is out of the way"
    assert store.stats.num_errors == 0
    assert store.put(block)
    assert same(store.get(block.digest), block)
    assert store.get(other.digest) is Fault.MISSING
    assert len(list((store.folder / "quarantine").iterdir())) <= MAX_QUARANTINED


@pytest.mark.parametrize("first", range(0, 400, 200))
def test_harmed_files_are_misses(tmp_path: Path, key: bytes, first: int) -> None:
    check_mutants(tmp_path, key, range(first, first + 200))


@pytest.mark.full
def test_thousands_of_harmed_files_are_misses(tmp_path: Path, key: bytes) -> None:
    check_mutants(tmp_path, key, range(1000, 6000))


@pytest.mark.nightly
def test_a_hundred_thousand_harmed_files_are_misses(tmp_path: Path) -> None:
    check_mutants(tmp_path, b"", range(10_000, 110_000))


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda data: data[:100], Fault.SIZE),
        (lambda data: data[:-1], Fault.SIZE),
        (lambda data: b"X" + data[1:], Fault.MAGIC),
        (lambda data: data[:8] + b"\2" + data[9:], Fault.VERSION),
        (lambda data: data[:10] + b"\2" + data[11:], Fault.ALGORITHM),
        (lambda data: data[:12] + b"\x21" + data[13:], Fault.SIZE),
        (lambda data: data[:16] + b"another model..." + data[32:], Fault.SCOPE),
        (lambda data: data[:32] + b"another digest.." + data[48:], Fault.FIELDS),
        (lambda data: data[:48] + b"another parent.." + data[64:], Fault.FIELDS),
        (lambda data: data[:64] + b"\x20" + data[65:], Fault.TAG),
        (lambda data: data[:80] + b"\1" + data[81:], Fault.TAG),
        (lambda data: data[:100] + bytes(8) + data[108:], Fault.TAG),
        (lambda data: data[:130] + b"tok" + data[133:], Fault.FIELDS),
        (lambda data: data[:-4] + b"load", Fault.TAG),
    ],
)
def test_each_part_is_checked_and_the_reason_is_said(
    tmp_path: Path, key: bytes, harm: Callable[[bytes], bytes], fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    store, (block,) = open_store(tmp_path, key=key), a_path(1)
    store.put(block)
    path = Path(store.path_of(block.digest))
    data = path.read_bytes()
    if fault is Fault.ALGORITHM and key:
        path.write_bytes(b"".join(encode(block, SCOPE, b"")))
    else:
        path.write_bytes(harm(data))
    with caplog.at_level(logging.WARNING):
        assert store.get(block.digest) is fault
    assert store.stats.faults == {fault: 1}
    assert str(fault) in caplog.text
    (kept,) = (store.folder / "quarantine").iterdir()
    assert kept.name == f"{block.digest.hex()}.{fault.name.lower()}"
    assert store.get(block.digest) is Fault.MISSING


@pytest.mark.tiny
def test_a_valid_file_in_the_place_of_another_is_not_used(tmp_path: Path, key: bytes) -> None:
    store, (first, second) = open_store(tmp_path, key=key), a_path(2)
    for block in (first, second):
        store.put(block)
    Path(store.path_of(second.digest)).replace(store.path_of(first.digest))
    assert store.get(first.digest) is Fault.FIELDS


@pytest.mark.tiny
def test_a_store_with_a_secret_uses_nothing_that_was_made_without_it(tmp_path: Path) -> None:
    (block,) = a_path(1)
    for written, read in ((b"", KEY), (KEY, b""), (KEY, b"j" * 32)):
        store = open_store(tmp_path, key=written)
        store.put(block)
        found = open_store(tmp_path, key=read).get(block.digest)
        assert found in (Fault.ALGORITHM, Fault.TAG)


@pytest.mark.tiny
def test_another_models_files_are_not_even_looked_at(tmp_path: Path) -> None:
    store, (block,) = open_store(tmp_path), a_path(1)
    store.put(block)
    other = open_store(tmp_path, scope=IDENTITY.scope("int8"))
    assert other.get(block.digest) is Fault.MISSING
    Path(other.path_of(block.digest)).parent.mkdir()
    Path(other.path_of(block.digest)).write_bytes(Path(store.path_of(block.digest)).read_bytes())
    assert other.get(block.digest) is Fault.SCOPE
    larger = open_store(tmp_path, payload_bytes=PAYLOAD + 1)
    assert larger.get(block.digest) is Fault.SIZE


@pytest.mark.tiny
@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_no_file_is_a_miss(tmp_path: Path, kind: str) -> None:
    store, (block, other) = open_store(tmp_path), a_path(2)
    store.put(other)
    path = Path(store.path_of(block.digest))
    path.parent.mkdir(exist_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(store.path_of(other.digest))
    else:
        os.mkfifo(path)
    assert store.get(block.digest) is Fault.NO_FILE
    assert store.put(block)
    assert same(store.get(block.digest), block)


def failure(first: int, always: bool, error: int, at: int, name: str) -> int | None:
    return error if at == first or (always and at > first) else None


@pytest.mark.parametrize("always", [False, True], ids=["once", "always"])
@pytest.mark.parametrize("error", ERRORS)
def test_each_call_of_the_system_may_fail(
    tmp_path: Path, error: int, always: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is put is there, whole, or is not; nothing is raised; a second try, once the disk works, is as ever."""
    path = a_path(3)
    num_calls = 1
    number = 0
    while number < num_calls:
        caplog.clear()
        root = tmp_path / f"{number}"
        store = open_store(root, quota_bytes=2 * (HEADER_BYTES + 128 + PAYLOAD))
        store.put(path[0])
        with monkeypatch.context() as patch:
            faulty = inject(patch, partial(failure, number, always, error))
            for block in path:
                store.put(block)
                store.tidy()
                found = store.get(block.digest)
                assert found in (Fault.MISSING, Fault.UNREADABLE) or same(found, block)
            store.used([block.digest for block in path])
            store.delete(path[2].digest)
            num_calls = max(num_calls, faulty.num_calls)
        warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warnings) <= 2, "one for what cannot be written, one for what cannot be read"
        unfinished = [each for each in root.rglob(".*") if each.is_file()]
        assert len(unfinished) <= (1 if always else 0) + 1, "a file that is not whole is removed where that is possible"
        store._resumes_s = 0.0
        assert all(store.put(block) for block in path)
        assert all(same(store.get(block.digest), block) for block in path)
        number += 1
    assert num_calls > 20


@pytest.mark.tiny
def test_after_a_full_disk_nothing_is_tried_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, path = open_store(tmp_path), a_path(2)
    now_s = 1000.0
    monkeypatch.setattr("kvik.store.files.time.monotonic", lambda: now_s)
    with monkeypatch.context() as patch:
        faulty = inject(patch, lambda at, name: 28 if name == "write" else None)
        assert not store.put(path[0])
        num_calls = faulty.num_calls
        assert not store.put(path[1])
        assert faulty.num_calls == num_calls
    assert store.is_paused
    now_s += 29.0
    assert not store.put(path[0])
    now_s += 2.0
    assert store.put(path[0])
    assert not store.is_paused


KILLED = """
import os, signal, sys
from pathlib import Path
import pytest
from kvik.store import Fault
from store.faults import inject
from store.stored import a_path, open_store, same

path = a_path(6)
number = 0
while True:
    root = Path(sys.argv[1]) / str(number)
    store = open_store(root, quota_bytes=4000)
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            inject(patch, lambda at, name: signal.SIGKILL if at == number else None)
            for block in path:
                store.put(block)
                store.used([block.digest])
                store.tidy()
                store.get(block.digest)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    store = open_store(root)
    for block in path:
        found = store.get(block.digest)
        assert found is Fault.MISSING or same(found, block), found
    assert not store.stats.faults.keys() - {Fault.MISSING}, "nothing torn, so nothing put aside"
    assert all(store.put(block) for block in path)
    assert all(same(store.get(block.digest), block) for block in path)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    number += 1
print(number)
"""


def test_killed_at_any_call_of_the_system_nothing_is_torn(tmp_path: Path) -> None:
    told = python("-c", KILLED, str(tmp_path))
    assert told.returncode == 0, told.stderr
    assert int(told.stdout) > 100


def test_the_quota_keeps_what_was_wanted_last(tmp_path: Path) -> None:
    store, path = open_store(tmp_path), a_path(10)
    for block in path:
        store.put(block)
    store.used([block.digest for block in path])
    other = open_store(tmp_path, scope=IDENTITY.scope("int8"))
    (foreign,) = a_path(1, seed=1)
    other.put(foreign)
    os.utime(other.path_of(foreign.digest), (1, 1))
    each = store.entry_bytes
    untouched, swept = (sweep(store.version_folder, count * each) for count in (11, 6))
    assert untouched is not None
    assert swept is not None
    assert untouched.num_removed == 0
    assert (swept.num_files, swept.num_bytes, swept.num_removed) == (11, 11 * each, 6)
    assert swept.removed_bytes == 6 * each
    assert other.get(foreign.digest) is Fault.MISSING, "the folder has one quota, whosever the blocks"
    assert store.exists_many([block.digest for block in path]) == 5, "the end of a path goes first"


def test_the_writer_keeps_within_the_quota(tmp_path: Path) -> None:
    each = HEADER_BYTES + 128 + PAYLOAD
    store = open_store(tmp_path, quota_bytes=40 * each)
    for block in a_path(200):
        store.put(block)
        store.tidy()
        assert sum(1 for entry in tmp_path.rglob("*") if entry.is_file()) <= 42
    assert store.stats.num_evicted >= 150
    files = [path for path in tmp_path.rglob("blocks/*/*") if path.is_file()]
    assert (store.stats.num_kept, store.stats.kept_bytes) == (len(files), sum(path.stat().st_size for path in files))


@pytest.mark.tiny
def test_what_a_killed_process_left_is_swept_when_it_is_old(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    folder = store.folder / "blocks" / "00"
    folder.mkdir()
    old, new = folder / ".old.1.0", folder / ".new.1.0"
    for each in (old, new):
        each.write_bytes(b"half")
    past = time.time() - STALE_S - 10
    os.utime(old, (past, past))
    swept = sweep(store.version_folder, None)
    assert swept is not None
    assert swept.num_removed == 1
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.tiny
def test_one_sweeps_at_a_time(tmp_path: Path) -> None:
    from kvik.store.disk import only_one

    store = open_store(tmp_path)
    with only_one(str(store.version_folder / "sweep.lock")) as mine:
        assert mine
        assert sweep(store.version_folder, 0) is None


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Each writes, reads, deletes and sweeps what the others do: all that is read is right."""
    path = a_path(40)
    code = """
import random, sys
from pathlib import Path
from kvik.store import Fault
from kvik.store.sweep import sweep
from store.stored import a_path, open_store, same
chance = random.Random(int(sys.argv[2]))
store = open_store(Path(sys.argv[1]))
path = a_path(40)
for _ in range(3000):
    block = chance.choice(path)
    match chance.randrange(8):
        case 0 | 1 | 2: assert store.put(block)
        case 3: store.delete(block.digest)
        case 4 if chance.random() < 0.1: sweep(store.version_folder, 20 * store.entry_bytes)
        case _:
            found = store.get(block.digest)
            assert found is Fault.MISSING or same(found, block), found
assert not store.stats.num_errors
print(store.stats.num_hits)
"""
    with ThreadPoolExecutor(3) as pool:
        told = list(pool.map(lambda seed: python("-c", code, str(tmp_path), str(seed)), range(3)))
    assert all(each.returncode == 0 for each in told), told
    assert min(int(each.stdout) for each in told) > 100
    assert all(open_store(tmp_path).put(block) for block in path)


def test_threads_share_a_store(tmp_path: Path) -> None:
    store, path = open_store(tmp_path), a_path(20)
    wrong: list[object] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(500):
            block = chance.choice(path)
            store.put(block)
            found = store.get(block.digest)
            if not (isinstance(found, StoredBlock) and same(found, block)):
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@settings(max_examples=examples(500), deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_miss(data: bytes) -> None:
    from kvik.store.entry import BadEntry, decode

    (block,) = a_path(1)
    with pytest.raises(BadEntry):
        decode(data, SCOPE, block.digest, b"")
    whole = b"".join(encode(block, SCOPE, b""))
    if data:
        with pytest.raises(BadEntry):
            decode(data + whole[len(data) :] if not whole.startswith(data) else whole + data, SCOPE, block.digest, b"")


@pytest.mark.tiny
def test_reading_fails_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, path = open_store(tmp_path), a_path(3)
    for block in path:
        store.put(block)
    with monkeypatch.context() as patch:
        inject(patch, lambda at, name: 5 if name == "read" else None)
        assert [store.get(block.digest) for block in path] == [Fault.UNREADABLE] * 3
    assert len(caplog.records) == 1
    assert all(same(store.get(block.digest), block) for block in path), "what could not be read is not put aside"
    assert isinstance(store, FileStore)
