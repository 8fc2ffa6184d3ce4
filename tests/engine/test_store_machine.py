"""Engine, files and restarts against the model's definition: whatever happens to the folder, no token changes."""

from __future__ import annotations

import random
import shutil
import tempfile
from functools import partial
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvik.cache import Digest
from kvik.config import SamplingParams
from kvik.engine.sequence import Sequence
from kvik.store import Store
from kvik.store.files import FileStore
from simulation import ALL, VOCAB, SimulatedEngine, Windows, expected_sequence
from store.test_files import harmed
from tiers import examples

PARAMS = SamplingParams(max_tokens=40)
SALTS = (None, None, "ada")
WINDOWS: tuple[Windows, ...] = (ALL, (None, 40), (24,))


def open_files(root: Path, key: bytes, scope: Digest, payload_bytes: int) -> Store:
    quota_bytes = 30 * (payload_bytes + 256)
    return FileStore(root, scope, num_tokens=32, payload_bytes=payload_bytes, key=key, quota_bytes=quota_bytes)


class StoreMachine(RuleBasedStateMachine):
    """Requests that begin alike, engines that come and go, files that are lost, harmed and exchanged."""

    @initialize(seed=st.integers(0, 2**32), windows=st.sampled_from(WINDOWS), num_blocks=st.sampled_from((16, 24, 64)))
    def begin(self, seed: int, windows: Windows, num_blocks: int) -> None:
        self.chance = random.Random(seed)
        self.windows, self.num_blocks = windows, num_blocks
        self.root = Path(tempfile.mkdtemp())
        self.beginnings = [[self.chance.randrange(VOCAB) for _ in range(130)] for _ in range(2)]
        self.policy = self.chance.choice(("end", "reuse"))
        self.key = self.chance.choice((b"", b"k" * 32))
        self.live: list[Sequence] = []
        self.open()

    def open(self) -> None:
        self.engine = SimulatedEngine(
            num_blocks=self.num_blocks,
            windows=self.windows,
            token_budget=64,
            max_running=4,
            store_policy=self.policy,
            open_store=partial(open_files, self.root, self.key),
        )

    @rule(
        which=st.integers(0, 1),
        num_common=st.integers(1, 130),
        num_more=st.integers(0, 60),
        salt=st.sampled_from(SALTS),
    )
    def ask(self, which: int, num_common: int, num_more: int, salt: str | None) -> None:
        prompt = self.beginnings[which][:num_common] + [self.chance.randrange(VOCAB) for _ in range(num_more)]
        sequence = self.engine.new_sequence(self.engine.new_request(prompt, PARAMS, salt=salt))
        self.engine.add(sequence)
        self.live.append(sequence)

    @rule(count=st.integers(1, 30))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    @rule()
    def finish(self) -> None:
        while self.engine.scheduler.has_work:
            self.engine.step()

    @precondition(lambda self: self.live)
    @rule(at=st.integers(0, 100))
    def leave(self, at: int) -> None:
        self.engine.abort(self.live[at % len(self.live)])

    @rule()
    def forget(self) -> None:
        self.engine.clear_cache()

    @rule(flushed=st.booleans())
    def restart(self, flushed: bool) -> None:
        """As a process ends that is asked to, or one that is killed: then what was not written is lost."""
        self.engine.abort(*self.live)
        self.live.clear()
        self.engine.close_store(10.0 if flushed else 0.0)
        self.open()

    @rule(how=st.sampled_from(("harm", "lose", "exchange")), at=st.integers(0, 1000))
    def harm(self, how: str, at: int) -> None:
        files = sorted(path for path in self.root.glob("v1/*/blocks/*/*") if not path.name.startswith("."))
        if not files:
            return
        path, other = files[at % len(files)], files[at * 7 % len(files)]
        try:
            if how == "lose":
                path.unlink()
            elif how == "exchange":
                path.write_bytes(other.read_bytes())
            else:
                path.write_bytes(harmed(path.read_bytes(), self.chance))
        except FileNotFoundError:
            """It was swept meanwhile."""

    @invariant()
    def all_is_well(self) -> None:
        if not hasattr(self, "engine"):
            return
        with self.engine.lock:
            self.engine.scheduler.check()
        for sequence in [each for each in self.live if each.finish_reason is not None]:
            self.live.remove(sequence)
            assert sequence.error is None
            if sequence.finish_reason == "abort":
                continue
            request = sequence.request
            expected = expected_sequence(self.engine, list(request.prompt_ids), PARAMS, request.seed, request.salt)
            assert sequence.token_ids == expected.token_ids

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.finish()
            self.all_is_well()
            self.engine.close_store()
            shutil.rmtree(self.root)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=examples(150), stateful_step_count=30, deadline=None)
