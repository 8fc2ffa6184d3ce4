"""The benchmark of streams: its stand-in model is served, and every token counted."""

from __future__ import annotations

from serve_streams import run_round


def test_a_round_counts_what_clients_got() -> None:
    cost_us, loop_us, tokens_per_s = run_round(3, 5, 1000)
    assert loop_us >= 0
    assert cost_us >= 0
    assert tokens_per_s > 0
