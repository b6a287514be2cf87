"""The keyed order of training samples, against Philox in Python's integers and the contract's formula."""

from __future__ import annotations

from functools import cache

import numpy as np
import philox_oracle
import pytest
import torch

from dmd2_fast.data.order import KeyedOrder, epoch_permutation


@cache
def oracle_permutation(num_samples: int, seed: int, epoch: int) -> list[int]:
    first_words = [int(philox_oracle.words(index, 1, seed, epoch, 0)[0]) for index in range(num_samples)]
    uniforms = [np.float32(np.float64(np.float32(word)) * 2.0**-32 + 2.0**-33) for word in first_words]
    return sorted(range(num_samples), key=lambda index: uniforms[index])


def oracle_indices(positions: range, num_samples: int, seed: int) -> list[int]:
    return [oracle_permutation(num_samples, seed, p // num_samples)[p % num_samples] for p in positions]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (10, 3), (2**63 + 5, 2)])
def test_permutation_is_the_argsort_of_philox(seed: int, epoch: int) -> None:
    assert epoch_permutation(101, seed, epoch).tolist() == oracle_permutation(101, seed, epoch)


def test_ties_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    tied = torch.tensor([0.5, 0.25] * 500)[:, None]
    monkeypatch.setattr("dmd2_fast.data.order.philox_uniform", lambda *_: tied)
    expected = list(range(1, 1000, 2)) + list(range(0, 1000, 2))
    assert epoch_permutation(1000, 0, 0).tolist() == expected


def test_an_epoch_visits_every_sample_once() -> None:
    order = KeyedOrder(60, seed=3, micro_batch_size=12)
    for epoch in range(2):
        seen = [index for iteration in range(5) for index in order(5 * epoch + iteration)[1].tolist()]
        assert sorted(seen) == list(range(60))
    assert order(0)[1].tolist() != order(5)[1].tolist()


@pytest.mark.parametrize(("num_samples", "batch"), [(37, 16), (5, 16), (16, 16), (1, 4)])
def test_batches_follow_the_global_position(num_samples: int, batch: int) -> None:
    order = KeyedOrder(num_samples, seed=7, micro_batch_size=batch)
    for iteration in (0, 1, 2, 9, 3):  # not only forwards
        sample_ids, indices = order(iteration)
        assert sample_ids.tolist() == list(range(batch))
        positions = range(iteration * batch, (iteration + 1) * batch)
        assert indices.tolist() == oracle_indices(positions, num_samples, 7)


@pytest.mark.parametrize(("world_size", "micro", "accumulation"), [(2, 32, 1), (2, 16, 2), (1, 16, 4), (4, 16, 1)])
def test_the_global_batch_does_not_depend_on_how_it_is_split(world_size: int, micro: int, accumulation: int) -> None:
    whole = KeyedOrder(150, seed=1, micro_batch_size=64)
    parts = [
        KeyedOrder(
            150, seed=1, rank=rank, world_size=world_size, micro_batch_size=micro,
            gradient_accumulation_steps=accumulation,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    for iteration in range(6):  # crosses two ends of an epoch
        sample_ids, indices = whole(iteration)
        shares = [part(iteration) for part in parts]
        assert torch.cat([share[0] for share in shares]).tolist() == sample_ids.tolist()
        assert torch.cat([share[1] for share in shares]).tolist() == indices.tolist()


def test_sample_ids_of_a_micro_batch() -> None:
    # (rank * A + a) * M + i with rank 1, A 2, M 3: 6 .. 8 for a = 0, 9 .. 11 for a = 1.
    order = KeyedOrder(50, seed=0, rank=1, world_size=2, micro_batch_size=3, gradient_accumulation_steps=2)
    assert order(4)[0].tolist() == [6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("wrong", [{"rank": 2}, {"rank": -1}, {"micro_batch_size": 0}, {"num_samples": 0}])
def test_impossible_orders_are_refused(wrong: dict[str, int]) -> None:
    arguments = {"num_samples": 5, "seed": 0, "rank": 0, "world_size": 2, "micro_batch_size": 2} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        KeyedOrder(arguments.pop("num_samples"), **arguments)
