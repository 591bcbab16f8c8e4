"""Attention with bidirectional images equals a dense mask, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from solo_vlm.models.packed.images import attend_with_images, flash_is_exact, later_patches


@st.composite
def rows(draw):
    """Return (images, bounds) of a packed row; separators interrupt images."""
    images: list[int] = []
    bounds = [0]
    number = 0
    for _ in range(draw(st.integers(1, 4))):
        for _ in range(draw(st.integers(1, 4))):
            images += [-1] * draw(st.integers(0, 5))
            if draw(st.booleans()):
                for row in range(draw(st.integers(1, 3))):
                    images += [-1] * (row > 0) + [number] * draw(st.integers(1, 4))
                number += 1
        images.append(-1)
        bounds.append(len(images))
    return torch.tensor(images), torch.tensor(bounds)


def dense(query, key, value, bounds, images, scaling):
    position = torch.arange(len(images))
    document = torch.bucketize(position, bounds[1:], right=True)
    seen = (position[:, None] >= position) & (document[:, None] == document)
    seen |= (images[:, None] == images) & (images[:, None] >= 0)
    repeats = query.shape[1] // key.shape[1]
    k, v = (states.repeat_interleave(repeats, 1) for states in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, k) * scaling
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


@given(rows(), st.sampled_from([(2, 2), (4, 2), (4, 1)]), st.integers(0, 99))
def test_values_and_gradients_equal_a_dense_mask(row, heads, seed):
    images, bounds = row
    generator = torch.Generator().manual_seed(seed)

    def random(count):
        return torch.randn(len(images), count, 8, dtype=torch.float64, generator=generator)

    states = [random(heads[0]).requires_grad_(), *(random(heads[1]).requires_grad_() for _ in range(2))]
    weight = random(heads[0])
    found = attend_with_images(*states, bounds, images, 0.3)
    expected = dense(*states, bounds, images, 0.3)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad((found * weight).sum(), states),
        torch.autograd.grad((expected * weight).sum(), states),
        atol=1e-12,
        rtol=1e-10,
    )


def test_gradients_with_large_scores_equal_a_dense_mask():
    """Documents of different lengths are padded, and exponentials of padding must not overflow."""
    images = torch.full((46,), -1)
    images[3:9], images[18:30] = 0, 1
    bounds = torch.tensor([0, 17, 46])
    generator = torch.Generator().manual_seed(0)
    states = [60 * torch.randn(46, 2, 8, dtype=torch.float64, generator=generator) for _ in range(3)]
    states = [part.requires_grad_() for part in states]
    found, expected = attend_with_images(*states, bounds, images, 1.0), dense(*states, bounds, images, 1.0)
    gradients, reference = (torch.autograd.grad(each.sum(), states) for each in (found, expected))
    torch.testing.assert_close(gradients, reference)


@given(rows())
def test_parts_reach_each_pair_once(row):
    images, _ = row
    part = later_patches(images)
    pairs = [
        (int(part.queries[start + i]), int(part.keys[start + j]))
        for start, end in zip(part.bounds[:-1].tolist(), part.bounds[1:].tolist(), strict=True)
        for i in range(end - start)
        for j in range(i + 1)
    ]
    expected = {
        (i, j) for i in range(len(images)) for j in range(i + 1, len(images)) if images[i] == images[j] >= 0
    }
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_near_float64(dtype):
    torch.manual_seed(0)
    images = torch.full((600,), -1)
    images[50:350], images[400:580] = 0, 1
    bounds = torch.tensor([0, 380, 600])
    states = [torch.randn(600, heads, 16, dtype=torch.float64) for heads in (4, 2, 2)]
    expected = dense(*states, bounds, images, 0.25)
    found = attend_with_images(*(s.to(dtype) for s in states), bounds, images, 0.25)
    torch.testing.assert_close(
        found.double(), expected, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_flash_attention_on_cuda_equals_a_dense_mask():
    assert flash_is_exact(torch.device("cuda", 0), torch.bfloat16, 128)
