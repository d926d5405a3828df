"""Drawing and testing tokens."""

import torch
from accel.compiler.models.zipar.sampling import accept, draw, residual
from hypothesis import given
from hypothesis import strategies as st

MANY = 200_000


def frequencies(tokens: torch.Tensor, count: int) -> torch.Tensor:
    return torch.bincount(tokens, minlength=count) / len(tokens)


def test_drawn_as_often_as_probable() -> None:
    torch.manual_seed(0)
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    drawn = draw(probabilities.expand(MANY, -1), torch.rand(MANY))
    assert torch.allclose(frequencies(drawn, 4), probabilities, atol=0.005)
    assert not bool((drawn == 1).any())


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=9).filter(lambda p: sum(p) > 1e-30),
    st.floats(0, 1, exclude_max=True, width=32),
)
def test_only_what_is_possible(probabilities: list[float], uniform: float) -> None:
    drawn = draw(torch.tensor(probabilities), torch.tensor(uniform))
    assert probabilities[int(drawn)] > 0


def test_what_stands_or_is_drawn_again_is_from_the_later_distribution() -> None:
    torch.manual_seed(0)
    before, after = torch.rand(2, 7).softmax(-1) ** 3
    before, after = before / before.sum(), after / after.sum()
    old, new = before.expand(MANY, -1), after.expand(MANY, -1)
    tried = draw(old, torch.rand(MANY))
    stands = accept(tried, old, new, torch.rand(MANY))
    token = torch.where(stands, tried, draw(residual(old, new), torch.rand(MANY)))
    assert torch.allclose(frequencies(token, 7), after, atol=0.005)
    # As often as the two overlap: that is what the test is for.
    expected = torch.minimum(before, after).sum()
    assert abs(float(stands.float().mean() - expected)) < 0.005


def test_nothing_is_drawn_again_where_nothing_changed() -> None:
    same = torch.tensor([[0.25, 0.75]])
    assert bool(accept(torch.tensor([1]), same, same, torch.tensor([1 - 2**-24])))
    assert torch.equal(residual(same, same), same)
