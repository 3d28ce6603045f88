"""Law known to the tests, and pilots made from laws."""

from __future__ import annotations

import random

from hypothesis import strategies as st

from raycloud.retrain.law import Law
from raycloud.retrain.pilots import Pilot
from raycloud.retrain.rival_laws import PowerLaw

BLOCKS = 6
# Early blocks have the higher ceilings, late blocks come near theirs with fewer steps and samples.
TRUE = Law(
    0.75,
    0.1,
    head_omega=0.4,
    head_tau=20.0,
    omega=(1.8, 1.2, 1.0, 0.9, 0.9, 0.7),
    tau=(150.0, 90.0, 60.0, 40.0, 25.0, 12.0),
    nu=(150.0, 100.0, 80.0, 50.0, 40.0, 25.0),
    gamma=0.5,
)
SETS: list[tuple[int, ...]] = [
    *[(block,) for block in range(BLOCKS)],
    *[(0, 5), (4, 5), (0, 1), (2, 3), (1, 4), (0, 1, 2), (3, 4, 5), (1, 3, 5), (0, 2, 4)],
    *[tuple(range(BLOCKS)), (0, 3), (2, 5), ()],
]

positive = st.floats(0.01, 100)


def trained(source: random.Random, law: Law) -> dict[int, float]:
    blocks = source.sample(range(len(law.omega)), source.randint(0, len(law.omega)))
    return {block: source.choice([0.25, 0.5, 0.75, 1.0]) for block in blocks}


def pilots(
    law: Law, sets: list[tuple[int, ...]], noise: float, seed: int, samples: tuple[int, ...] = (100,)
) -> list[Pilot]:
    source = random.Random(seed)
    return [
        Pilot(
            blocks, steps, size, max(0.0, law.error(dict.fromkeys(blocks, 1.0), steps, size) + source.gauss(0, noise))
        )
        for blocks in sets
        for steps in (10, 20, 40)
        for size in samples
    ]


def crossing(law: Law | PowerLaw) -> tuple[bool, bool]:
    """Whether block 0 is worth more than 5 at equal FLOPs, with few and with many: 5 gets 4 times the steps."""
    return tuple(  # type: ignore[return-value]
        float(law.value(0, 1.0, steps, 300)) > float(law.value(5, 1.0, 4 * steps, 300)) for steps in (10, 300)
    )
