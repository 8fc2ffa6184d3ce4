"""The routing policies, without sockets and without a clock."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvik.cache.digest import chain
from kvik.cluster import POLICIES, Contents, Cost, Hash, LeastLoaded, RoundRobin, RoutedRequest, Router
from kvik.cluster.policy import MAX_BEHIND_S

pytestmark = pytest.mark.tiny

SIZE = 32
SPEED = 1000.0


def names_of(text: str, root: bytes = b"root") -> list[bytes]:
    """A block for each letter, chained."""
    return chain(root, text.encode(), 1)


def request_of(text: str, root: bytes = b"root", key: bytes | None = None) -> RoutedRequest:
    return RoutedRequest(names_of(text, root), len(text) * SIZE + 1, SIZE, key)


def router_of(num_replicas: int, policy: object = None, max_guessed: int | None = 1000) -> Router:
    router = Router(policy or Cost())  # type: ignore[arg-type]
    for index in range(num_replicas):
        router.add(f"replica-{index}", prefill_tokens_s=SPEED, max_guessed=max_guessed)
    return router


def chosen(router: Router, request: RoutedRequest) -> int:
    replica = router.choose(request)
    assert replica is not None
    return replica.slot


def serve(router: Router, request: RoutedRequest) -> int:
    """Send it where the policy says, and let it end at once."""
    replica = router.choose(request)
    assert replica is not None
    ticket = router.send(request, replica, 0.0)
    ticket.first_token(request.num_tokens / SPEED)
    ticket.end()
    return replica.slot


def test_a_prompt_goes_where_its_beginning_is_cached() -> None:
    router = router_of(4)
    first = {letter: serve(router, request_of(letter * 20)) for letter in "abcd"}
    assert sorted(first.values()) == [0, 1, 2, 3]  # equal ones take turns
    for letter, slot in first.items():
        assert serve(router, request_of(letter * 25)) == slot


def test_it_goes_elsewhere_where_the_queue_costs_more_than_the_cache_saves() -> None:
    router = router_of(2)
    request = request_of("a" * 20)
    slot = serve(router, request)
    router.replicas[slot].prefill_tokens_s = SPEED
    long = request_of("b" * 19)  # 609 tokens in the queue, 640 to compute elsewhere
    router.send(long, router.replicas[slot], 0.0)
    assert chosen(router, request) == slot
    router.send(request_of("c" * 2), router.replicas[slot], 0.0)  # and 65 more
    assert chosen(router, request) == 1 - slot


def test_nothing_goes_to_a_replica_that_is_far_behind_whatever_it_holds() -> None:
    router = router_of(2)
    request = request_of("a" * 40_000)
    slot = serve(router, request)
    router.replicas[slot].prefill_tokens_s = router.replicas[1 - slot].prefill_tokens_s = SPEED
    num_behind = int(MAX_BEHIND_S * SPEED)
    router.replicas[slot].waiting_tokens = num_behind
    assert chosen(router, request) == slot
    router.replicas[slot].waiting_tokens = num_behind + 1
    assert chosen(router, request) == 1 - slot


def test_what_a_key_was_sent_with_last_draws_the_next_one_there() -> None:
    router = router_of(3)
    serve(router, request_of("x" * 9))
    slot = serve(router, request_of("a" * 20, key=b"session"))
    assert slot == 1
    unlike = "b" * 20  # nothing of it is known to be anywhere
    assert chosen(router, request_of(unlike)) == 2
    assert chosen(router, request_of(unlike, key=b"session")) == slot
    assert chosen(router, request_of(unlike, key=b"another")) != slot
    router.replicas[slot].waiting_tokens = 1000
    assert chosen(router, request_of(unlike, key=b"session")) != slot


def test_salts_are_apart() -> None:
    router = router_of(2)
    slot = serve(router, request_of("a" * 20, root=b"one salt"))
    other = request_of("a" * 20, root=b"another")
    assert not router.contents.num_held(other.names, 0b11)
    assert chosen(router, other) == 1 - slot


def test_what_was_sent_there_counts_before_it_is_computed() -> None:
    for max_guessed in (1000, None):
        router = router_of(2, max_guessed=max_guessed)
        request = request_of("a" * 100)
        replica = router.choose(request)
        assert replica is not None
        router.send(request, replica, 0.0)
        assert router.contents.num_held(request.names, 0b11) == {replica.slot: 100}


def test_of_a_replica_that_tells_only_what_it_told_is_left_when_a_request_is_computed() -> None:
    router = router_of(1, max_guessed=None)
    request = request_of("abcd")
    (replica,) = router.replicas
    ticket = router.send(request, replica, 0.0)
    router.contents.told_stored(0, request.names[:2])
    ticket.first_token(1.0)
    assert router.contents.num_held(request.names, 1) == {0: 2}
    router.contents.told_removed(0, request.names[1:2])
    assert router.contents.num_held(request.names, 1) == {0: 1}
    ticket.end()
    assert replica.num_in_flight == replica.waiting_tokens == 0


def test_guesses_forget_what_was_sent_longest_ago_and_its_end_first() -> None:
    contents = Contents()
    contents.open(0, 5)
    contents.sent(0, names_of("abc"))
    contents.sent(0, names_of("xyz"))
    assert contents.num_held(names_of("abc"), 1) == {0: 2}
    assert contents.num_held(names_of("xyz"), 1) == {0: 3}
    contents.sent(0, names_of("abc"))
    assert contents.num_held(names_of("abc"), 1) == {0: 3}
    assert contents.num_held(names_of("xyz"), 1) == {0: 2}
    assert len(contents) == 5


def test_a_replica_that_is_gone_holds_nothing_and_gets_nothing() -> None:
    router = router_of(2)
    request = request_of("a" * 20, key=b"session")
    gone = router.replicas[serve(router, request)]
    router.remove(gone)
    assert chosen(router, request) == 1 - gone.slot
    late = router.send(request, gone, 0.0)  # one that was on its way
    late.end()
    again = router.add("new", prefill_tokens_s=SPEED, max_guessed=1000)
    assert again.slot == gone.slot
    assert router.contents.num_held(request.names, 1 << again.slot) == {}


def test_closed_replicas_and_those_tried_before_get_nothing() -> None:
    router = router_of(3)
    request = request_of("abc")
    first, second, third = router.replicas
    second.is_open = False
    assert router.choose(request, without=[first]) is third
    assert router.choose(request, without=[first, third]) is None


def test_what_a_store_holds_makes_other_replicas_cheap() -> None:
    alone = router_of(2)
    shared = Router(Cost(), store_blocks=1000, load_share=0.1)
    for index in range(2):
        shared.add(f"replica-{index}", prefill_tokens_s=SPEED, max_guessed=1000)
    request = request_of("a" * 20)
    for router, expected in ((alone, 0), (shared, 1)):
        assert serve(router, request) == 0
        router.send(request_of("b" * 5), router.replicas[0], 0.0)
        assert chosen(router, request) == expected  # 161 tokens in the queue, 64 to load


def test_round_robin_takes_turns_and_skips_what_is_closed() -> None:
    router = router_of(3, RoundRobin())
    assert [serve(router, request_of("a")) for _ in range(4)] == [0, 1, 2, 0]
    router.replicas[1].is_open = False
    assert [serve(router, request_of("a")) for _ in range(3)] == [2, 0, 2]


def test_least_loaded_takes_the_shortest_queue() -> None:
    router = router_of(2, LeastLoaded())
    router.send(request_of("a" * 9), router.replicas[0], 0.0)
    assert chosen(router, request_of("a" * 9)) == 1
    router.send(request_of("a" * 99), router.replicas[1], 0.0)
    assert chosen(router, request_of("a" * 9)) == 0


def test_hash_keeps_its_choice_for_as_long_as_the_replica_is_there() -> None:
    router = router_of(5, Hash())
    before = {text: chosen(router, request_of(text)) for text in map(str, range(100, 200))}
    assert set(before.values()) == {0, 1, 2, 3, 4}
    assert chosen(router, request_of("1234")) == chosen(router, request_of("1299"))  # two blocks are looked at
    router.replicas[2].is_open = False
    for text, slot in before.items():
        assert chosen(router, request_of(text)) == slot or slot == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_any_policy_counts_what_is_in_flight_down_to_nothing(policy: str) -> None:
    chance = random.Random(1)
    router = router_of(4, POLICIES[policy]())
    tickets = []
    for _ in range(300):
        request = request_of("".join(chance.choices("ab", k=chance.randint(0, 12))))
        replica = router.choose(request)
        assert replica is not None
        tickets.append(router.send(request, replica, 0.0))
        if chance.random() < 0.5:
            ticket = chance.choice(tickets)
            ticket.first_token(1.0)
            if chance.random() < 0.5:
                ticket.end()
    for ticket in tickets:
        ticket.end()
        ticket.end()
        ticket.first_token(2.0)
    for replica in router.replicas:
        assert (replica.num_waiting, replica.num_running, replica.waiting_tokens) == (0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 7), st.text("ab", max_size=12)), max_size=30), st.text("ab", max_size=12))
def test_lengths_held_are_those_that_counting_gives(sent: list[tuple[int, str]], wanted: str) -> None:
    contents = Contents()
    for slot in range(8):
        contents.open(slot, 1000)
    held: dict[int, set[str]] = {slot: set() for slot in range(8)}
    for slot, text in sent:
        contents.sent(slot, names_of(text))
        held[slot] |= {text[: at + 1] for at in range(len(text))}
    counted = {slot: sum(1 for at in range(len(wanted)) if wanted[: at + 1] in texts) for slot, texts in held.items()}
    for slots in (0b11111111, 0b10100101, 0):
        expected = {slot: count for slot, count in counted.items() if count and slots >> slot & 1}
        assert contents.num_held(names_of(wanted), slots) == expected
