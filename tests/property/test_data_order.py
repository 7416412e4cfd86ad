"""The order of samples: each window once an epoch, each source by its weight, whatever their number."""

import itertools
import math
from collections import Counter
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from starcoder_trainer.data.order import Order
from starcoder_trainer.data.permutation import Permutation

weights = st.lists(st.one_of(st.floats(1e-3, 1e3), st.integers(1, 100).map(lambda n: n / 10)), min_size=1, max_size=8)


@given(size=st.integers(1, 3000), key=st.binary(min_size=1, max_size=32))
def test_a_permutation_reaches_everything_once(size, key):
    permutation = Permutation(size, key)
    assert sorted(map(permutation, range(size))) == list(range(size))


@given(size=st.integers(1, 2**62), key=st.binary(min_size=1, max_size=32), data=st.data())
@settings(max_examples=50)
def test_a_permutation_of_any_size_stays_within_it_and_keeps_apart(size, key, data):
    permutation = Permutation(size, key)
    points = data.draw(st.lists(st.integers(0, size - 1), max_size=50, unique=True))
    images = [permutation(i) for i in points]
    assert all(0 <= i < size for i in images)
    assert len(set(images)) == len(points)


@given(size=st.integers(200, 2000), seed=st.integers(0, 2**53))
@settings(max_examples=30)
def test_an_order_looks_shuffled(size, seed):
    """Few fixed points, few neighbours kept, half of the steps upward: as in a random permutation, by 5 sigma."""
    permutation = Permutation(size, str(seed).encode())
    image = [permutation(i) for i in range(size)]
    steps = [b - a for a, b in itertools.pairwise(image)]
    assert sum(i == v for i, v in enumerate(image)) < 12
    assert sum(abs(step) == 1 for step in steps) < 16
    assert abs(sum(step > 0 for step in steps) - size / 2) < 5 * math.sqrt(size / 12) + 2


@given(weights=weights, n=st.integers(0, 3000))
def test_after_any_number_of_samples_each_source_had_its_share(weights, n):
    order = Order(weights, [10] * len(weights), 1)
    dealt = Counter(order.deal(i)[0] for i in range(n))
    exact = [Fraction(repr(w)) for w in weights]
    for source, weight in enumerate(exact):
        assert abs(dealt[source] - n * weight / sum(exact)) < len(weights)


def test_weights_are_the_decimals_that_the_user_wrote():
    """The nearest binary fractions of 0.7 and 0.3 would give the first six of ten."""
    order = Order([0.7, 0.3], [10, 10], 1)
    assert Counter(order.deal(i)[0] for i in range(10)) == {0: 7, 1: 3}


@given(weights=weights, n=st.integers(1, 1000))
def test_a_sources_samples_are_counted_without_a_gap(weights, n):
    order = Order(weights, [10] * len(weights), 1)
    seen = Counter()
    for i in range(n):
        source, k = order.deal(i)
        assert k == seen[source]
        seen[source] += 1


@given(i=st.integers(0, 2**60), weights=weights)
def test_a_place_far_out_is_found_as_fast_and_stays_exact(i, weights):
    order = Order(weights, [10] * len(weights), 1)
    source, k = order.deal(i)
    share = Fraction(repr(weights[source])) / sum(Fraction(repr(w)) for w in weights)
    assert abs(k - i * share) < len(weights)


@given(
    windows=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seed=st.integers(0, 2**53),
    epochs=st.integers(1, 3),
)
def test_each_epoch_of_each_source_sees_each_of_its_windows_once(windows, seed, epochs):
    order = Order([1.0] * len(windows), windows, seed)
    places = [order.place(i) for i in range(epochs * len(windows) * (max(windows) + 1))]
    for source, count in enumerate(windows):
        for epoch in range(epochs):
            seen = [p.window for p in places if (p.source, p.epoch) == (source, epoch)]
            assert sorted(seen) == list(range(count))


@given(seed=st.integers(0, 2**53))
def test_epochs_and_seeds_have_orders_of_their_own(seed):
    order = Order([1.0], [50], seed)
    first, second = ([order.place(e * 50 + i).window for i in range(50)] for e in range(2))
    other = Order([1.0], [50], seed + 1)
    assert first != second
    assert first != [other.place(i).window for i in range(50)]
