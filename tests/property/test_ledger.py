"""Whatever the order of claims, saves, commits and lost messages: one committer an attempt, nothing verified goes."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from starcoder_trainer.agent.ledger import Claimed, Committed, Fenced
from starcoder_trainer.agent.verify import Incomplete
from starcoder_trainer.contract.ledger import HEAD_KEY, Entry, Head
from starcoder_trainer.storage.store import Unreachable
from tests.support.checkpoints import MemoryStore, ledger, save_shard

HOLDERS = ["a", "b", "c"]
KEEP_LAST = 2


class LedgerMachine(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.store = MemoryStore()
        self.holders = {name: ledger(self.store, name, keep_last=KEEP_LAST) for name in HOLDERS}
        self.claimed: dict[str, int] = {}
        """Holder -> attempt it was told it has."""
        self.owner: dict[int, str] = {}
        """Attempt -> the one holder that was ever told it has it."""
        self.verified: list[Entry] = []
        """All that any committer was told is committed, in order."""

    def head(self) -> Head | None:
        return Head.from_json(self.store.get(HEAD_KEY).data) if HEAD_KEY in self.store.objects else None

    @rule(fates=st.lists(st.sampled_from(["ok", "request lost", "answer lost"]), max_size=8))
    def network_misbehaves(self, fates):
        self.store.fates = fates

    @rule(name=st.sampled_from(HOLDERS), beyond=st.integers(-1, 2))
    def claim(self, name, beyond):
        head = self.head()
        attempt = max(1, (head.attempt if head else 0) + beyond)
        mine = self.holders[name]
        try:
            outcome = mine.claim(attempt, "Own")
        except Unreachable:
            return
        match outcome:
            case Claimed(taken):
                assert self.owner.setdefault(attempt, name) == name, "two holders of one attempt"
                adopted = mine.adopt(outcome) if self.claimed.get(name) != attempt else taken
                assert isinstance(adopted, Head)
                mine.choose(adopted)
                self.claimed[name] = attempt
            case Fenced(by):
                assert by >= attempt
        head = self.head()
        if head:
            self.verified += [e for e in head.entries if e not in self.verified]

    @precondition(lambda self: self.claimed)
    @rule(data=st.data(), whole=st.booleans())
    def save(self, data, whole):
        name = data.draw(st.sampled_from(sorted(self.claimed)))
        save_shard(self.store, self.claimed[name], self.next_step(), world_size=1 if whole else 2)

    def next_step(self) -> int:
        head = self.head()
        return (head.newest.step if head and head.newest else 0) + 10

    @precondition(lambda self: self.claimed)
    @rule(data=st.data())
    def commit(self, data):
        name = data.draw(st.sampled_from(sorted(self.claimed)))
        attempt, before = self.claimed[name], self.head()
        try:
            outcome = self.holders[name].commit(attempt, self.next_step())
        except (Incomplete, Unreachable):
            outcome = None
        after = self.head()
        if isinstance(outcome, Committed):
            assert (before.attempt, before.holder) == (attempt, name), "committed without owning HEAD"
            assert outcome.entry in after.entries
        if (before.attempt, before.holder) != (attempt, name):
            assert after == before, "a fenced committer changed HEAD"
        self.verified += [e for e in after.entries if e not in self.verified]

    @precondition(lambda self: self.claimed)
    @rule(data=st.data())
    def sweep(self, data):
        name = data.draw(st.sampled_from(sorted(self.claimed)))
        head = self.head()
        if (head.attempt, head.holder) == (self.claimed[name], name):
            self.holders[name].sweep(head.attempt)

    @invariant()
    def a_verified_entry_vanishes_only_by_retention(self):
        head = self.head()
        if head is not None:
            assert list(head.entries) == self.verified[-KEEP_LAST:]

    @invariant()
    def what_head_lists_is_intact(self):
        head = self.head()
        if head is not None:
            for entry in head.entries:
                assert ledger(self.store, "reader").choose(Head("u", "n", 1, "", "", (entry,))).entry == entry


LedgerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestLedger = LedgerMachine.TestCase
