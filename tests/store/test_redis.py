"""The shared store: what is put comes back bit for bit; a server that fails, hangs or lies costs time and no bit."""

from __future__ import annotations

import logging
import random
import socket
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvik.config import EngineConfig
from kvik.errors import InvalidInput
from kvik.store import Fault, StoredBlock
from kvik.store.entry import encode
from kvik.store.redis import MAX_FAILURES, RedisStore
from kvik.store.resp import PASSWORD_VARIABLE, Address, parse_address
from store.redis_servers import hostile_server, needs_redis, redis_server
from store.stored import PAYLOAD, SCOPE, a_path, same
from store.test_files import harmed

KEY = b"k" * 32


def open_store(port: int, **options: Any) -> RedisStore:
    address = Address("127.0.0.1", port, **options.pop("address", {}))
    return RedisStore(address, SCOPE, num_tokens=32, payload_bytes=PAYLOAD, **({"key": KEY} | options))


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with redis_server(tmp_path_factory.mktemp("redis")) as port:
        yield port


@pytest.fixture
def opened() -> Iterator[list[RedisStore]]:
    stores: list[RedisStore] = []
    yield stores
    for store in stores:
        store.close()


@needs_redis
def test_what_is_put_comes_back(port: int, opened: list[RedisStore]) -> None:
    store, other = open_store(port), open_store(port)
    opened += [store, other]
    path = a_path(600, seed=1)
    digests = [block.digest for block in path]
    assert store.get(path[0].digest) is Fault.MISSING
    assert all(store.put(block) for block in path[:-1])
    assert store.put(path[0]), "it is there already"
    assert other.exists_many(digests) == 599
    assert other.exists_many(digests[::-1]) == 0
    found = list(other.read(digests, 60))
    assert found.pop() is Fault.MISSING
    assert all(same(each, block) for each, block in zip(found, path, strict=False))
    assert len(found) == 599
    other.used(digests)
    assert other.delete(digests[1])
    assert not other.delete(digests[1])
    found = list(other.read(digests, 60))
    assert len(found) == 2
    assert same(found[0], path[0])
    assert (other.stats.num_hits, store.stats.num_errors, other.stats.num_errors) == (600, 0, 0)


@needs_redis
def test_who_stops_reading_leaves_nothing_behind(port: int, opened: list[RedisStore]) -> None:
    store, path = open_store(port), a_path(20, seed=2)
    opened.append(store)
    digests = [block.digest for block in path]
    for block in path:
        store.put(block)
    for count in (1, 2, 5):
        reading = store.read(digests, 60)
        assert all(same(next(reading), block) for block in path[:count])
        reading.close()
        assert all(same(found, block) for found, block in zip(store.read(digests, 60), path, strict=True))


@needs_redis
def test_threads_share_a_store(port: int, opened: list[RedisStore]) -> None:
    store = open_store(port)
    opened.append(store)
    wrong: list[object] = []

    def use(seed: int) -> None:
        path = a_path(10, seed=seed)
        for block in path:
            store.put(block)
        for found, block in zip(store.read([block.digest for block in path], 60), path, strict=True):
            if not same(found, block):
                wrong.append(found)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(100, 108)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert store.stats.num_hits == 80


@needs_redis
def test_a_server_that_closed_an_idle_connection_is_asked_again(port: int, opened: list[RedisStore]) -> None:
    store, (block,) = open_store(port), a_path(1, seed=3)
    opened.append(store)
    store.put(block)
    subprocess.run(["redis-cli", "-p", str(port), "client", "kill", "type", "normal"], check=True, capture_output=True)
    assert same(store.get(block.digest), block)
    assert store.stats.num_errors == 0


@needs_redis
def test_other_secrets_and_salts_meet_nothing(port: int, opened: list[RedisStore]) -> None:
    store, (block,) = open_store(port), a_path(1, seed=4)
    other = open_store(port, key=b"o" * 32)
    opened += [store, other]
    store.put(block)
    assert other.get(block.digest) is Fault.TAG


@needs_redis
def test_no_bit_that_was_changed_is_used(port: int, opened: list[RedisStore]) -> None:
    chance = random.Random(5)
    (block,) = a_path(1, seed=5)
    data = b"".join(encode(block, SCOPE, KEY))
    (swapped,) = a_path(1, seed=6)
    name = f"kvik:1:{SCOPE.hex()}:{block.digest.hex()}"
    client = socket.create_connection(("127.0.0.1", port))
    cases = [harmed(data, chance) for _ in range(150)]
    cases += [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(0, 260)]
    cases += [b"".join(encode(swapped, SCOPE, KEY)), b"".join(encode(block, bytes(16), KEY)), b""]
    with client:
        for bad in cases:
            store = open_store(port)
            opened.append(store)
            client.sendall(b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(name), name.encode(), len(bad), bad))
            assert client.recv(100) == b"+OK\r\n"
            found = store.get(block.digest)
            assert isinstance(found, Fault) == (bad != data), bad[:128]
            store.close()


@needs_redis
def test_a_bad_block_makes_room_for_a_good_one(port: int, opened: list[RedisStore]) -> None:
    other, store, (block,) = open_store(port, key=b"o" * 32), open_store(port), a_path(1, seed=7)
    opened += [other, store]
    other.put(block)
    assert store.get(block.digest) is Fault.TAG
    assert store.put(block)
    assert same(store.get(block.digest), block)


@needs_redis
def test_users_and_passwords(tmp_path: Path, opened: list[RedisStore], monkeypatch: pytest.MonkeyPatch) -> None:
    rules = "user kvik on >s3cret/: ~kvik:1:* +get +set +exists +del +touch +ping +select"
    with redis_server(tmp_path, "--user", *rules.split()[1:], "--user", "default", "off") as port:
        (block,) = a_path(1)
        url = f"redis://kvik:s3cret%2F%3A@127.0.0.1:{port}"
        store = RedisStore(parse_address(url), SCOPE, num_tokens=32, payload_bytes=PAYLOAD, key=KEY)
        opened.append(store)
        assert store.put(block)
        assert same(store.get(block.digest), block)
        for address in ({}, {"user": "kvik", "password": "wrong"}):
            stranger = open_store(port, address=address)
            opened.append(stranger)
            assert not stranger.put(block)
            assert stranger.get(block.digest) is Fault.UNREADABLE
        monkeypatch.setenv(PASSWORD_VARIABLE, "s3cret/:")
        assert parse_address(f"redis://kvik@127.0.0.1:{port}") == store.address


@needs_redis
def test_tls(tmp_path: Path, opened: list[RedisStore]) -> None:
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", cert]
    subprocess.run([*make, *subject], check=True, capture_output=True)
    files = ["--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", cert]
    with redis_server(tmp_path, *files, tls=True) as port:
        (block,) = a_path(1)
        url = f"rediss://127.0.0.1:{port}/0?ca_file={cert}&cert_file={cert}&key_file={key}"
        store = RedisStore(parse_address(url), SCOPE, num_tokens=32, payload_bytes=PAYLOAD, key=KEY)
        stranger = open_store(port, address={"is_tls": True})  # which knows no such authority
        opened += [store, stranger]
        assert store.put(block)
        assert same(store.get(block.digest), block)
        assert not stranger.put(block)


@needs_redis
def test_an_outage_pauses_the_store_and_it_comes_back(
    tmp_path: Path, opened: list[RedisStore], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvik.store.redis.PAUSE_S", 0.3)
    (block,) = a_path(1)
    with redis_server(tmp_path) as port:
        store = open_store(port)
        opened.append(store)
        assert store.put(block)
    for _ in range(MAX_FAILURES + 3):
        assert store.get(block.digest) is Fault.UNREADABLE
        assert not store.put(block)
    assert not store.exists(block.digest)
    assert sum("left alone" in record.message for record in caplog.records) == 2  # for reading and for writing
    time.sleep(0.4)
    assert store.exists(block.digest)
    with redis_server(tmp_path, port=port):
        assert store.put(block)
        assert same(store.get(block.digest), block)


@needs_redis
def test_a_full_server_stops_writing_and_not_reading(tmp_path: Path, opened: list[RedisStore]) -> None:
    with redis_server(tmp_path, "--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as port:
        store, path = open_store(port), a_path(4000)
        opened.append(store)
        written = [store.put(block) for block in path]
        assert written[0]
        assert not written[-1]
        assert same(store.get(path[0].digest), path[0])
        assert store.exists(path[-1].digest)


def test_a_server_that_hangs_is_waited_for_no_longer_than_allowed(opened: list[RedisStore]) -> None:
    with hostile_server(lambda client, words: None) as port:
        store = open_store(port)
        opened.append(store)
        digests = [block.digest for block in a_path(300)]
        started_s = time.monotonic()
        assert list(store.read(digests, 0.2)) == [Fault.UNREADABLE]
        assert time.monotonic() - started_s < 2
        for _ in range(MAX_FAILURES - 1):
            store.get(digests[0])
        started_s = time.monotonic()
        for _ in range(1000):
            assert store.get(digests[0]) is Fault.UNREADABLE
        assert time.monotonic() - started_s < 2, "it is asked no more"


def test_a_server_that_sends_a_byte_now_and_then_wins_no_time(opened: list[RedisStore]) -> None:
    def drip(client: socket.socket, words: list[bytes]) -> None:
        if words[0] == b"EXISTS":
            client.sendall(b":1\r\n")
            return
        client.sendall(b"$%d\r\n" % 1256)
        for _ in range(1256):
            client.sendall(b"x")
            time.sleep(0.05)

    with hostile_server(drip) as port:
        store = open_store(port)
        opened.append(store)
        started_s = time.monotonic()
        assert list(store.read([block.digest for block in a_path(3)], 0.5)) == [Fault.UNREADABLE]
        assert time.monotonic() - started_s < 3


def told(reply: bytes) -> Any:
    """A server that says of everything that it exists, and of each block this."""

    def answer(client: socket.socket, words: list[bytes]) -> None:
        client.sendall(b":1\r\n" if words[0] == b"EXISTS" else reply)

    return answer


REPLIES = {
    "nothing": b"$-1\r\n",
    "another length": b"$3\r\nabc\r\n",
    "more than there is memory": b"$99999999999999\r\n" + b"x" * 100_000,
    "a length of a thousand digits": b"$" + b"9" * 1000 + b"\r\n",
    "a negative length": b"$-2\r\n",
    "no number": b"$1x\r\n",
    "a number": b":7\r\n",
    "a line without an end": b"+" + b"x" * 1_000_000,
    "an array": b"*1000000000\r\n",
    "arrays in arrays": b"*1\r\n" * 10_000,
    "another protocol": b"HTTP/1.1 200 OK\r\n\r\n",
    "an error": b"-ERR no\r\n",
    "an error of odd bytes": b"-\xff\xfe\x1b[31m\r\n",
    "no end": b"$1256\r\n" + b"x" * 1258,
    "zeros": b"$1256\r\n" + bytes(1256) + b"\r\n",
    "more replies than asked for": b"$-1\r\n" * 50,
}


@pytest.mark.parametrize("name", REPLIES)
def test_no_reply_does_harm(name: str, opened: list[RedisStore]) -> None:
    with hostile_server(told(REPLIES[name])) as port:
        store = open_store(port)
        opened.append(store)
        digests = [block.digest for block in a_path(5)]
        tracemalloc.start()
        for _ in range(5):
            (found,) = list(store.read(digests, 1.0))
            assert isinstance(found, Fault)
            assert store.get(digests[0]) is not None
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 8 << 20


def test_a_server_that_answers_with_other_blocks_gives_none(opened: list[RedisStore]) -> None:
    path = a_path(5)
    entries = [b"".join(encode(block, SCOPE, KEY)) for block in path]
    chance = random.Random(1)
    asked: list[bytes] = []

    def answer(client: socket.socket, words: list[bytes]) -> None:
        if words[0] == b"GET":
            asked.append(words[1])
            entry = chance.choice(entries)
            client.sendall(b"$%d\r\n%b\r\n" % (len(entry), entry))
        else:
            client.sendall(b":1\r\n")

    with hostile_server(answer) as port:
        for _ in range(30):
            store = open_store(port)
            opened.append(store)
            for found, block in zip(store.read([block.digest for block in path], 5), path, strict=False):
                assert isinstance(found, Fault) or same(found, block)
    assert asked


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("store", "options", "told"),
    [
        ("redis://host", {"store_key": None}, "others could change"),
        ("redis://host", {"store_quota": "3GB"}, "for folders"),
        ("memcached://host", {}, "memcached://"),
        ("https://host", {}, "https://"),
    ],
)
def test_what_a_config_refuses(store: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        EngineConfig(store=store, **({"store_key": "key"} | options))


@pytest.mark.tiny
@pytest.mark.parametrize(
    "url",
    [
        "redis://", "redis://host:port", "redis://host:99999", "redis://host/name", "redis://host?ca_file=x",
        "rediss://host?unknown=1", "redis://host#part", "http://host", "rediss://host?ca_file=/nowhere", "redis://[::1",
    ],
)  # fmt: skip
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_address(url)
    assert refused.value.hint


@pytest.mark.tiny
def test_an_address_is_shown_without_its_password() -> None:
    address = parse_address("redis://user:secret@[::1]:7000/3")
    assert (address.host, address.port, address.database, address.user) == ("::1", 7000, 3, "user")
    assert str(address) == "redis://[::1]:7000/3"
    assert "secret" not in repr(address)


def test_logs_say_nothing_of_secrets(caplog: pytest.LogCaptureFixture, opened: list[RedisStore]) -> None:
    caplog.set_level(logging.DEBUG)
    with hostile_server(told(b"-ERR no\r\n")) as port:
        store = open_store(port, address={"user": "somebody", "password": "hunter2!"})
        opened.append(store)
        store.greet()
        for _ in range(5):
            store.get(bytes(16))
    assert "does not answer" in caplog.text
    assert "hunter2" not in caplog.text


def test_a_block_is_of_the_size_that_was_agreed(opened: list[RedisStore]) -> None:
    block = a_path(1)[0]
    longer = StoredBlock(block.digest, block.parent, 0, block.tokens, bytes(PAYLOAD + 1))
    with hostile_server(told(b"$%d\r\n%b\r\n" % (1257, b"".join(encode(longer, SCOPE, KEY))))) as port:
        store = open_store(port)
        opened.append(store)
        assert store.get(block.digest) is Fault.UNREADABLE
