"""Where kept tokens lie, against loops over one run after the other."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.keeping import followed, kept_of
from pipeline.packing import Run, Runs
from pipeline.pages import PageRun
from pipeline.request import Request, SamplingParams
from pipeline.slots import Slot
from pipeline.stopping import StopCheck
from pipeline.tree import TokenTree
from tests.pipeline.toys import trees

PAGE = 4


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 6), trees(max_nodes=8), st.booleans()), min_size=1, max_size=4
    ),
    st.integers(0, 1000),
)
def test_kept_tokens_lie_behind_one_another(some: list[tuple[int, int, TokenTree, bool]], seed: int) -> None:
    random = np.random.default_rng(seed)
    free = random.permutation(100).tolist()
    runs, accepted, slots = [], [], []
    for number, (cached, num_known, tree, is_followed) in enumerate(some):
        num_tokens = cached + num_known + len(tree)
        pages = PageRun.of([free.pop() for _ in range(-(-num_tokens // PAGE))])
        tokens = random.integers(0, 99, num_tokens + 1).astype(np.int32)
        request = Request(number, tuple(tokens.tolist()), SamplingParams())
        slot = Slot.of(request, StopCheck(request.params, 9, (), None))  # type: ignore[arg-type]
        slot.number, slot.is_followed = number, is_followed
        slots.append(slot)
        runs.append(Run(tokens[cached : cached + num_known], tree, cached, pages, True))
        accepted.append(np.flatnonzero(random.random(len(tree)) < 0.4).astype(np.int32))
    begins = np.cumsum([0, *map(len, accepted)])
    kept = kept_of(Runs.of(runs, PAGE), np.concatenate(accepted), begins, PAGE)
    state_begin = random.permutation(len(runs)) * 50
    committed, rows = followed(slots, kept, state_begin)

    moves, told = [], []
    for i, (run, nodes) in enumerate(zip(runs, accepted, strict=True)):
        pool = [page * PAGE + offset for page in run.pages.pages for offset in range(PAGE)]
        in_run = [*range(len(run.known)), *(len(run.known) + nodes).tolist()]
        own = slice(kept.begins[i], kept.begins[i + 1])
        positions = [run.cached + place for place in range(len(in_run))]
        assert kept.rows[own].tolist() == in_run
        assert kept.tokens[own].tolist() == [*run.known.tolist(), *run.tree.tokens[nodes].tolist()]
        assert kept.positions[own].tolist() == positions
        assert kept.places[own].tolist() == [pool[position] for position in positions]
        moves += [
            (pool[run.cached + row], pool[position])
            for row, position in zip(in_run, positions, strict=True)
            if run.cached + row != position
        ]
        if slots[i].is_followed:
            told += [
                (i, int(kept.tokens[own][place]), position, pool[position], int(state_begin[i]) + row)
                for place, (row, position) in enumerate(zip(in_run, positions, strict=True))
            ]
    assert list(zip(kept.sources.tolist(), kept.targets.tolist(), strict=True)) == moves
    owners = np.repeat(np.array(committed.slots, np.int64), np.diff(committed.begins))
    columns = (owners, committed.tokens, committed.positions, committed.places, rows)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == told
