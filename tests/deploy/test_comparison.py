import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.deploy.comparison import Comparison


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from([0.0, 0.02, 0.3]))
def test_counts_are_those_of_counting_one_by_one(images, n, seed, rate):
    generator = torch.Generator().manual_seed(seed)
    comparison = Comparison()
    clean = torch.rand(images, generator=generator) < 0.7
    expected = Comparison()
    still = clean.tolist()
    for _ in range(3):
        a = torch.randint(-128, 256, (images, n), generator=generator, dtype=torch.int16)
        off = torch.randint(-3, 4, (images, n), generator=generator, dtype=torch.int16)
        b = a + off * (torch.rand(images, n, generator=generator) < rate)
        clean = comparison.add(a, b, clean)
        for image in range(images):
            steps = [abs(int(p) - int(q)) for p, q in zip(a[image], b[image], strict=True)]
            flips = sum(s > 0 for s in steps)
            expected.codes += n
            expected.flips += flips
            expected.steps = max(expected.steps, *steps)
            if still[image]:
                expected.clean_codes += n
                expected.clean_flips += flips
                expected.clean_steps = max(expected.clean_steps, *steps)
                still[image] = flips == 0
        assert clean.tolist() == still
    assert comparison == expected
