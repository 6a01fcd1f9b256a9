"""What does not matter to a failure is taken away, and what matters is not."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.verify.soak.draw import SIMPLER, Choice, Offer, draw
from lab.verify.soak.shrink import shrink

OFFER = Offer()


async def shrunk(seed: int, shot: int, needed: Sequence[str]) -> Choice | None:
    """Shrink a failure that comes as long as none of `needed` is simplified."""

    async def fails(choice: Choice) -> bool:
        return not set(needed) & set(choice.simplify)

    return await shrink(Choice(), seed, shot, OFFER, fails)


@given(st.integers(0, 1000), st.lists(st.sampled_from(sorted(SIMPLER)), unique=True))
async def test_only_what_matters_is_left(seed: int, needed: list[str]) -> None:
    found = await shrunk(seed, 1, needed)
    assert found is not None
    assert not set(found.simplify) & set(needed)
    # Whatever is left over would change nothing, or is needed.
    for name in set(SIMPLER) - set(found.simplify) - set(needed):
        more = Choice(only_shot=found.only_shot, simplify=(*found.simplify, name))
        assert name in found.simplify or draw(seed, more, OFFER) == draw(seed, found, OFFER)


@pytest.mark.parametrize("before_matters", [False, True])
async def test_the_snapshots_before_it_go_unless_they_matter(before_matters: bool) -> None:
    seed = next(seed for seed in range(100) if len(draw(seed).shots) == 3)

    async def fails(choice: Choice) -> bool:
        return not (before_matters and choice.only_shot)

    found = await shrink(Choice(), seed, 3, OFFER, fails)
    assert found is not None
    assert found.only_shot == (0 if before_matters else 3)


async def test_what_does_not_fail_again_is_not_shrunk() -> None:
    async def fails(choice: Choice) -> bool:
        return False

    assert await shrink(Choice(), 1, 1, OFFER, fails) is None
