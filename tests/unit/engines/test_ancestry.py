"""What two machines were when they were last one, against a model that copies whole histories."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from podflare.engines.ancestry import MAX_HISTORY, Fork, History, common_base, is_base, lengthened


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 3)), max_size=12),
    st.integers(1, 3),
    st.sets(st.integers(0, 30).map(lambda number: f"m{number}"), max_size=20),
)
def test_the_base_is_the_last_common_moment(forks, strangers, closed):
    """After any forks, the base of two machines is the latest capture from which both come; only those are kept."""
    histories: dict[str, History] = {f"m{n}": () for n in range(strangers)}
    lives: dict[str, list[str]] = {name: [name] for name in histories}  # every moment that a state came through
    for number, (chosen, children) in enumerate(forks):
        parent = list(histories)[chosen % len(histories)]
        moment = f"l{number}"
        lives[parent].append(moment)
        layers = (moment, *(histories[parent][0].layers if histories[parent] else ()))
        for _ in range(children):
            child = f"m{len(histories)}"
            histories[child] = lengthened(histories[parent], Fork(number, parent, layers))
            lives[child] = list(lives[parent])
    for one in histories:
        for other in histories:
            if one == other:
                continue
            common = [moment for moment in lives[one] if moment in lives[other] and moment.startswith("l")]
            found = common_base(one, histories[one], other, histories[other])
            assert found is not None and found[:1] == tuple(common[-1:]), (one, other, lives[one], lives[other])
    living = {name: history for name, history in histories.items() if name not in closed}
    bases = {
        found
        for one in living
        for other in living
        if one != other and (found := common_base(one, living[one], other, living[other]))
    }
    for fork in {fork for history in histories.values() for fork in history}:
        assert is_base(fork, living) == (fork.layers in bases)


def test_a_forgotten_moment_is_none():
    """Machines that parted longer ago than is remembered have no known base; nearer ones have."""

    def line(name: str, start: History) -> History:
        for number in range(MAX_HISTORY):
            start = lengthened(start, Fork(hash((name, number)), f"{name}{number}", (f"{name}{number}",)))
        return start

    first = (Fork(1, "root", ("l1",)),)
    one, two = line("a", first), line("b", first)
    assert common_base("x", one, "y", two) is None
    near = lengthened(one, Fork(7, "x", ("l7",)))
    assert common_base("x", one, "z", near) == ("l7",) and len(near) == MAX_HISTORY
