"""Make what a soak found simpler, as long as it is found again.

A trial fails with a dozen things drawn at random, most of which have nothing to do with it.  One
after the other is replaced by what is simplest (`lab.verify.soak.draw.SIMPLER`), and stays so if
the trial still fails; what is left is what to look at.

A failure that depends on the moment may not come at each attempt.  Then something is taken to
matter that does not, never the other way round: whatever stays simplified has been seen to fail.
"""

import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path

from lab.verify.soak.draw import SIMPLER, Choice, Offer, draw
from lab.verify.soak.record import GOOD, Result
from lab.verify.soak.soak import soak

Fails = Callable[[Choice], Awaitable[bool]]


async def shrink(choice: Choice, seed: int, shot: int, offer: Offer, fails: Fails) -> Choice | None:
    """Return the simplest choice with which a trial still fails; None when it does not at all.

    :param shot: which of the guest's snapshots failed, from 1.
    :param fails: tries it, as often as that makes sense.
    """
    if not await fails(choice):
        return None
    if shot > 1:
        # The snapshots before it may have to do with it, too.
        alone = dataclasses.replace(choice, only_shot=shot)
        if await fails(alone):
            choice = alone
    for name in SIMPLER:
        simpler = dataclasses.replace(choice, simplify=(*choice.simplify, name))
        if draw(seed, simpler, offer) == draw(seed, choice, offer):
            continue
        if await fails(simpler):
            choice = simpler
    return choice


async def fails_in(
    choice: Choice, *, seed: int, shot: int, offer: Offer, attempts: int, folder: Path
) -> Result | None:
    """Run a trial until it fails; return how, or None when it did not in so many attempts."""
    for _ in range(attempts):
        results: list[Result] = []
        await soak(
            seed=seed,
            iterations=1 if choice.only_shot else shot,
            choice=choice,
            offer=offer,
            folder=folder,
            on_start=lambda number, trial, shot: None,
            on_result=results.append,
            last_seed=seed,
        )
        for result in results:
            if result.outcome not in GOOD:
                return result
    return None
