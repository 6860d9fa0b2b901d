"""Which rows run when. The Machine checks every batch; the tests look at the order."""

import random

import pytest

from codellama.generation.batch import Batch
from tests.support.schedule import Machine, rows_of


def test_nothing_to_do() -> None:
    machine = Machine()
    assert machine.step() is None
    assert not machine.scheduler.busy


def test_one_request() -> None:
    machine = Machine()
    request = machine.add(3, n=3)
    assert machine.scheduler.busy
    assert machine.step() == Batch(0, [request.prompt], [0], [1])
    assert machine.step() == Batch(0, [[request.output[0]]], [3], [1])
    assert machine.step() == Batch(0, [[request.output[1]]], [4], [1])
    assert machine.step() is None
    assert (len(request.output), request.finish_reason, request.n_cached) == (3, "length", 5)


def test_prompts_come_before_decoding_and_rows_decode_together() -> None:
    machine = Machine(rows=3)
    requests = [machine.add(length) for length in (5, 4, 2)]
    for row, longest in ((1, 4), (0, 5)):  # the shortest one first, with the one beside it: 8 with padding
        batch = machine.step()
        assert batch is not None
        assert (batch.start, batch.width, set(batch.positions), set(batch.wanted)) == (row, longest, {0}, {1})
        assert batch.tokens == [request.prompt for request in requests[row : row + len(batch.tokens)]]
    batch = machine.step()
    assert batch is not None
    assert (rows_of(batch), batch.positions, batch.width) == ([0, 1, 2], [5, 4, 2], 1)


def test_more_requests_than_rows_wait_and_rows_are_used_again_at_once() -> None:
    machine = Machine(rows=2)
    first, second, third, fourth = (machine.add(2, n) for n in (3, 9, 1, 1))
    steps = [rows_of(machine.step()) for _ in range(3)]
    assert steps == [[0, 1]] * 3
    assert (first.finish_reason, third.row, fourth.row) == ("length", None, None)
    assert rows_of(machine.step()) == [0]
    assert (third.row, third.finish_reason) == (0, "length")
    assert rows_of(machine.step()) == [0]
    assert (fourth.row, fourth.finish_reason) == (0, "length")
    machine.finish()
    assert (second.row, len(second.output)) == (1, 9)
    assert machine.admitted == [first, second, third, fourth]


def test_empty_rows_are_given_first_then_the_one_given_back_longest_ago() -> None:
    machine = Machine(rows=3)
    first, second = machine.add(2, n=9), machine.add(2, n=9)
    machine.step()
    machine.step()
    machine.cancel(second)
    machine.cancel(first)
    late = [machine.add(2, n=9) for _ in range(3)]
    machine.step()
    assert [request.row for request in (first, second, *late)] == [0, 1, 2, 1, 0]


def test_a_row_that_begins_alike_is_taken_and_its_beginning_kept() -> None:
    """The next turn of a chat: what was said before is in the cache, the answer too, all but its last token."""
    machine = Machine(rows=3, max_seq_len=64)
    other, turn = machine.add(20), machine.add(20, n=6)
    machine.finish()
    said = [*turn.prompt, *turn.output]
    following = machine.add(40, begin=said)
    batch = machine.step()
    assert batch is not None
    assert (following.row, following.n_reused) == (turn.row, 25) == (1, 25)
    assert (batch.start, batch.positions, batch.tokens[0]) == (1, [25], following.prompt[25:33])
    machine.finish()
    again = machine.add(20, begin=other.prompt)  # the same prompt: its last id is read again
    machine.step()
    assert (again.row, again.n_reused) == (other.row, 19)


def test_what_is_not_reused() -> None:
    machine = Machine(rows=1, max_seq_len=64)
    first = machine.add(20)
    machine.finish()
    scored = machine.add(20, begin=first.prompt, echo=True, logprobs=True)
    machine.finish()
    assert scored.n_reused == 0, "its logits are wanted"
    short = machine.add(30, begin=scored.prompt[:7])
    machine.finish()
    assert short.n_reused == 0, "too little to be worth it"
    machine.scheduler.fail(LookupError())
    machine.kept = [[]]
    spoilt = machine.add(30, begin=short.prompt)
    machine.finish()
    assert spoilt.n_reused == 0, "after a failure nothing can be relied on"


def test_a_long_prompt_waits_for_decoding_rows_in_shorter_chunks() -> None:
    machine = Machine(rows=2, max_seq_len=3000, chunk_size=2048)
    machine.add(3, n=900)
    machine.step()
    machine.add(1100, n=2)
    widths = []
    for _ in range(6):
        batch = machine.step()
        assert batch is not None
        widths.append(batch.width)
    assert widths == [512, 1, 512, 1, 76, 1]


def test_chunks_of_a_long_prompt_take_turns_with_decoding() -> None:
    machine = Machine(rows=3, max_seq_len=64)
    machine.add(3, n=20)
    machine.add(3, n=20)
    machine.step()
    machine.step()
    long = machine.add(30)
    steps = [rows_of(machine.step()) for _ in range(8)]
    assert steps == [[2], [0, 1], [2], [0, 1], [2], [0, 1], [2], [0, 1, 2]]
    assert machine.prefilled[long] == long.prompt


def test_chunks_follow_each_other_when_nothing_decodes() -> None:
    machine = Machine(rows=2, max_seq_len=64)
    machine.add(30)
    widths = [batch.width for batch in (machine.step() for _ in range(4)) if batch is not None]
    assert widths == [8, 8, 8, 6]


def test_rows_that_run_along_write_nothing_and_are_not_read_beyond_the_others() -> None:
    """Rows 0 and 3 decode; row 1 is in the middle of a prompt, row 2 is free and keeps 5 tokens."""
    machine = Machine(rows=4, max_seq_len=64)
    requests = [machine.add(3, n) for n in (30, 2, 3, 30)]
    while requests[2].finish_reason is None:
        machine.step()
    long = machine.add(30)
    assert rows_of(machine.step()) == [1]
    batch = machine.step()
    assert batch is not None
    assert (rows_of(batch), len(batch.tokens)) == ([0, 3], 4)
    assert (list(batch.positions), batch.length, batch.wanted) == ([5, -1, -1, 5], 6, [1, 0, 0, 1])
    assert [batch.tokens[1], batch.tokens[2]] == [[], []]
    machine.finish()
    assert machine.prefilled[long] == long.prompt


def test_a_full_row_that_runs_along_keeps_all_that_it_holds() -> None:
    """Row 1 scored a prompt of max_seq_len tokens and holds them all when rows 0 and 2 decode."""
    machine = Machine(rows=3)
    machine.add(3, n=9)
    full = machine.add(32, n=0, echo=True, logprobs=True)
    machine.add(3, n=9)
    machine.finish()
    assert full.finish_reason == "length"
    assert machine.kept[1] == full.prompt


def test_the_beginning_that_a_busy_row_holds_is_copied() -> None:
    machine = Machine(rows=3, max_seq_len=64)
    first = machine.add(20, n=30)
    for _ in range(10):
        machine.step()
    same = machine.add(20, begin=first.prompt)
    longer = machine.add(40, begin=[*first.prompt, *first.output[:4]])
    batch = machine.step()
    assert batch is not None
    assert batch.copies == ((0, 1, 0, 19), (0, 2, 0, 24))
    assert (same.n_reused, longer.n_reused) == (19, 24)
    assert (batch.start, batch.positions, batch.tokens) == (1, [19], [first.prompt[19:]])
    machine.finish()


def test_one_prompt_for_many_is_read_once() -> None:
    machine = Machine(rows=4, max_seq_len=64)
    first = machine.add(30)
    others = [machine.add(30, begin=first.prompt) for _ in range(3)]
    machine.finish()
    assert sum(len(machine.prefilled[request]) for request in (first, *others)) - machine.copied == 30 + 3
    assert machine.steps == 4 + 1 + 3, "four chunks, the last ids of the three others together, and three more tokens"
    assert [request.n_reused for request in (first, *others)] == [0, 29, 29, 29]


def test_a_beginning_that_several_share_is_read_once_whoever_is_first() -> None:
    """The second one is shorter and passes; the first goes on from what it has read."""
    machine = Machine(rows=2, max_seq_len=64)
    first = machine.add(40)
    second = machine.add(26, begin=first.prompt[:20])
    steps = []
    while second.prefilling:
        batch = machine.step()
        assert batch is not None
        steps.append((batch.start, batch.positions[0], batch.width, batch.copies))
    assert steps == [
        (1, 0, 8, ()), (0, 8, 8, ((1, 0, 0, 8),)), (1, 16, 8, ((0, 1, 8, 16),)), (0, 16, 8, ()), (1, 24, 2, ()),
    ]  # fmt: skip
    machine.finish()
    assert (machine.prefilled[first], machine.copied) == (first.prompt, 16)


def test_a_long_row_is_not_given_up_for_the_few_ids_that_it_begins_with() -> None:
    machine = Machine(rows=2, max_seq_len=128)
    chat = machine.add(100)
    machine.finish()
    other = machine.add(30, begin=chat.prompt[:20])
    batch = machine.step()
    assert batch is not None
    assert (other.row, batch.copies) == (1, ((0, 1, 0, 20),))
    machine.finish()
    again = machine.add(110, begin=[*chat.prompt, *chat.output])
    machine.step()
    assert (again.row, again.n_reused) == (0, 103)


def test_the_row_of_a_cancelled_source_may_be_given_away_at_once() -> None:
    """Row 0 holds what two requests begin with, and one of them is given it."""
    machine = Machine(rows=2, max_seq_len=64)
    source = machine.add(30, n=20)
    for _ in range(6):
        machine.step()
    machine.cancel(source)
    first, second = machine.add(40, begin=source.prompt), machine.add(35, begin=source.prompt)
    machine.finish()
    assert [(request.row, request.n_reused) for request in (first, second)] == [(0, 31 - 1), (1, 30)]


@pytest.mark.parametrize(("prompt", "n"), [(31, 1), (30, 2), (1, 31)])
def test_a_row_is_used_to_its_end(prompt: int, n: int) -> None:
    machine = Machine()
    request = machine.add(prompt, n)
    machine.finish()
    assert (request.n_tokens, request.n_cached, request.finish_reason) == (32, 31, "length")


def test_requests_that_ask_for_nothing() -> None:
    machine = Machine()
    empty = machine.add(3, n=0)
    assert (empty.finish_reason, empty.row) == ("length", None)
    assert machine.step() is None
    scored = machine.add(32, n=0, echo=True, logprobs=True)
    batches = [machine.step() for _ in range(4)]
    assert [(batch.width, batch.wanted) for batch in batches if batch is not None] == [(8, [8])] * 4
    assert (scored.finish_reason, scored.output) == ("length", [])
    assert machine.step() is None


def test_scored_prompts_ask_for_all_logits() -> None:
    machine = Machine()
    machine.add(10, echo=True, logprobs=True)
    machine.add(10, logprobs=True)
    batches = [machine.step() for _ in range(5)]
    found = [(batch.width, batch.wanted) for batch in batches if batch is not None]
    assert found == [(8, [8]), (2, [2]), (8, [0]), (1, [1]), (2, [1])]


def test_cancel_while_waiting() -> None:
    machine = Machine(rows=1)
    first, second, third = (machine.add(2, n=2) for _ in range(3))
    machine.step()
    machine.cancel(second)
    machine.finish()
    assert (second.finish_reason, second.row, third.finish_reason) == ("cancelled", None, "length")
    assert machine.admitted == [first, third]


def test_cancel_in_the_middle_of_a_prompt() -> None:
    machine = Machine(rows=1)
    first, second = machine.add(20), machine.add(3)
    machine.step()
    machine.cancel(first)
    assert (first.finish_reason, first.n_cached) == ("cancelled", 8)
    machine.finish()
    assert (second.row, second.finish_reason) == (0, "length")


def test_cancel_while_decoding() -> None:
    machine = Machine(rows=2)
    first, second = machine.add(2, n=9), machine.add(2, n=3)
    for _ in range(2):
        machine.step()
    machine.cancel(first)
    assert (first.finish_reason, len(first.output)) == ("cancelled", 2)
    assert rows_of(machine.step()) == [1]
    assert second.finish_reason == "length"
    assert machine.step() is None


def test_cancel_twice_and_after_the_end() -> None:
    machine = Machine()
    request, other = machine.add(2, n=1), machine.add(2)
    machine.step()
    machine.scheduler.cancel(request)
    assert request.finish_reason == "length"
    machine.cancel(other)
    machine.scheduler.cancel(other)
    assert other.finish_reason == "cancelled"
    assert not machine.scheduler.busy


def test_a_failure_ends_and_forgets_everything() -> None:
    machine = Machine(rows=1)
    requests = [machine.add(20), machine.add(3)]
    machine.step()
    error = LookupError("of the model")
    machine.scheduler.fail(error)
    assert not machine.scheduler.busy
    assert machine.scheduler.schedule() is None
    assert [(request.finish_reason, request.error) for request in requests] == [("error", error)] * 2


@pytest.mark.parametrize("place", [0, 1])
def test_cancel_what_has_failed(place: int) -> None:
    """After a failure, a client that leaves does no further harm, whether its request had a row or waited for one."""
    machine = Machine(rows=1)
    requests = [machine.add(20), machine.add(3)]
    machine.step()
    machine.scheduler.fail(LookupError("of the model"))
    machine.scheduler.cancel(requests[place])
    assert not machine.scheduler.busy


def test_short_prompts_do_not_hold_up_a_stream() -> None:
    """Requests that end with their first token follow each other in row 1; the one in row 0 must go on in between."""
    machine = Machine(rows=2)
    stream = machine.add(2, n=9)
    machine.step()
    for _ in range(40):
        machine.add(2, n=1)
    for _ in range(20):
        machine.step()
    assert len(stream.output) > 1


def test_short_prompts_do_not_hold_up_a_long_one() -> None:
    """The same in row 0, above a long prompt in row 1."""
    machine = Machine(rows=2)
    machine.add(2, n=1)
    long = machine.add(20)
    for _ in range(40):
        machine.add(2, n=1)
    for _ in range(20):
        machine.step()
    assert not long.prefilling


def test_short_prompts_pass_a_long_one_between_its_chunks() -> None:
    """The first token of a short one takes no more than the chunk that runs and its own."""
    machine = Machine(rows=3, max_seq_len=128)
    long = machine.add(100)
    for _ in range(3):
        machine.step()
    short = machine.add(5)
    machine.step()
    assert (len(short.output), long.n_cached) == (1, 24)


def test_a_long_prompt_waits_for_no_more_than_a_chunk_between_two_of_its_own() -> None:
    machine = Machine(rows=4, max_seq_len=128, chunk_size=16)
    long = machine.add(100)
    passed, between = 0, []
    while long.prefilling:
        machine.add(6, n=1)
        batch = machine.step()
        assert batch is not None
        if long.row in rows_of(batch):
            between.append(passed)
            passed = 0
        else:
            passed += sum(map(len, batch.tokens))
    assert between == [12] * 6 + [0], "two prompts of 6, in chunks of 16; the last 4 are the shortest"


def test_rows_that_decode_wait_for_no_more_than_a_chunk() -> None:
    machine = Machine(rows=4, max_seq_len=64, chunk_size=12)
    stream = machine.add(2, n=30)
    machine.step()
    delay, delays = 0, []
    while stream.finish_reason is None:
        machine.add(5, n=1)
        batch = machine.step()
        assert batch is not None
        if 0 in rows_of(batch):
            delays.append(delay)
            delay = 0
        else:
            delay += sum(map(len, batch.tokens))
    assert delays[1:-1] == [10] * (len(delays) - 2), "two prompts of 5, in chunks of 12"


def test_batches_travel_as_integers() -> None:
    batch = Batch(3, [[5, 6, 7], [8]], [0, 4], [3, 1], copies=((0, 3, 0, 9), (3, 1, 4, 8)))
    copies = [0, 3, 0, 9, 3, 1, 4, 8]
    assert batch.to_integers() == [3, 2, 2, 0, *copies, 0, 4, 3, 1, 3, 1, 5, 6, 7, 8]
    assert Batch.from_integers(batch.to_integers()) == batch
    plain = Batch(3, [[5], [], [-1]], [4, -1, 2], [1, 0, 1], shared=True)
    assert Batch.from_integers(plain.to_integers()) == plain
    assert (batch.width, batch.length, plain.length) == (3, 5, 5)


def test_where_logits_stand() -> None:
    one, two, three = (Machine().add(9) for _ in range(3))
    batch = Batch(0, [[5, 6, 7], [], [8], [9, 9]], [4, -1, 2, 0], [2, 0, 1, 0], [one, None, two, three])
    assert list(batch.spans()) == [(one, 0, 2, 5), (two, 2, 3, 2)]


def test_short_prompts_are_read_together() -> None:
    """As many as fit into a step; those that decode by then wait no longer than for one chunk, as ever."""
    for chunk_size, expected in (
        (224, [[*range(16)]] * 2),
        (64, [[0, 1, 2, 3], [4, 5, 6, 7], [*range(8)], [8, 9, 10, 11], [*range(12)], [12, 13, 14, 15]]),
    ):
        machine = Machine(rows=16, max_seq_len=64, chunk_size=chunk_size)
        for _ in range(16):
            machine.add(14, n=9)
        assert [rows_of(machine.step()) for _ in expected] == expected


def test_a_prompt_that_costs_more_together_is_read_alone() -> None:
    """A long one beside a short one would be padding for most of it; one far away brings the rows between."""
    machine = Machine(rows=8, max_seq_len=400, chunk_size=512)
    machine.add(3)
    machine.add(100)
    assert [rows_of(machine.step()) for _ in range(3)] == [[0], [1], [0, 1]]
    machine.finish()
    machine.add(300, n=30)
    machine.step()
    machine.add(30)
    machine.add(20)
    assert [rows_of(machine.step()) for _ in range(2)] == [[3, 4], [2, 3, 4]]


def test_one_that_begins_like_another_waits_for_it_and_copies() -> None:
    machine = Machine(rows=4, max_seq_len=128, chunk_size=128)
    first, other = machine.add(30), machine.add(31)
    same, longer = machine.add(30, begin=first.prompt[:20]), machine.add(32, begin=first.prompt[:12])
    assert rows_of(machine.step()) == [0, 1]
    assert rows_of(machine.step()) == [2, 3]
    assert [request.n_reused for request in (first, other, same, longer)] == [0, 0, 20, 12]
    machine.finish()


def test_a_far_row_is_moved_when_what_runs_along_has_cost_as_much() -> None:
    """Rows 0 and 7 are left of eight: six run along in each step, until 8 of them have; then two rows are a step."""
    machine = Machine(rows=8, max_seq_len=128, chunk_size=128)
    requests = [machine.add(3, n=60 if row in (0, 7) else 1) for row in range(8)]
    machine.step()
    sizes = []
    for _ in range(6):
        batch = machine.step()
        assert batch is not None
        sizes.append((len(batch.tokens), len(batch.copies)))
    assert sizes == [(8, 0), (2, 1), *[(2, 0)] * 4]
    assert (requests[7].row, machine.moved) == (1, 1)
    machine.finish()
    assert machine.moved == 1


def test_a_row_is_not_moved_onto_a_long_chat_for_a_few_steps() -> None:
    """What the row between holds would have to be read again: 100 ids, 25 steps of a row, and 8 for the move."""
    machine = Machine(rows=3, max_seq_len=256, chunk_size=128)
    first, chat, last = machine.add(3, n=100), machine.add(98, n=3), machine.add(3, n=100)
    while chat.finish_reason is None:
        machine.step()
    assert len(machine.kept[1]) == 100
    alone = 0
    while machine.moved == 0:
        batch = machine.step()
        assert batch is not None
        alone += len(batch.tokens) == 3
    assert alone == 32
    machine.finish()
    assert [request.finish_reason for request in (first, last)] == ["length"] * 2


def test_random_schedules() -> None:
    """300 loads that come, are cancelled and end at random."""
    rng = random.Random(8)
    reasons, reused, copied, guessed, right, moved = {"length": 0, "cancelled": 0}, 0, 0, 0, 0, 0
    for _ in range(300):
        rows = rng.randrange(1, 8)
        machine = Machine(rows=rows, max_seq_len=rng.randrange(4, 70), chunk_size=rng.randrange(1, 12))
        for _ in range(rng.randrange(1, 12)):
            n = rng.choice((0, 1, 2, 5, 40))
            length = rng.randrange(1, machine.runtime.max_seq_len + (n == 0))
            earlier = rng.choice([*machine.requests, None])
            begin = [*earlier.prompt, *earlier.output][: rng.randrange(length)] if earlier else []
            guesses = rng.choice((0, 0, 3))
            machine.add(length, n, begin, echo=rng.random() < 0.3, logprobs=rng.random() < 0.5, speculate=guesses)
            for _ in range(rng.randrange(6)):
                machine.step()
            if rng.random() < 0.2:
                machine.cancel(rng.choice(machine.requests))
        machine.finish()
        assert not machine.scheduler.busy
        # Rows were given in the order in which requests came; some were cancelled while they waited.
        assert machine.admitted == [request for request in machine.requests if request.row is not None]
        for request in machine.requests:
            assert request.finish_reason is not None
            reasons[request.finish_reason] += 1
            if request.finish_reason == "length":
                assert len(request.output) == request.n_max
                assert machine.prefilled.get(request, request.prompt) == request.prompt
            reused += request.n_reused > 0
        copied += machine.copied > 0
        guessed += machine.guessed
        moved += machine.moved
        right += machine.right
    assert reused > 50
    assert copied > 50
    assert moved > 10
    assert 100 < right < guessed - 100
    assert min(reasons.values()) > 50
