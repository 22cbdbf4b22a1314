"""Ranks by hand, in the sorted order, and with several texts an image; in blocks as at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score
from torch import Tensor
from torch.nn import functional as F

from genpipe.evaluation import retrieval
from genpipe.evaluation.retrieval import chunked_ranks, recall_at, retrieval_ranks, retrieval_recalls


def unit(rows: int, dims: int, *, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_ranks_by_hand() -> None:
    pool = torch.eye(3)
    queries = F.normalize(torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), dim=-1)
    assert retrieval_ranks(queries, pool, torch.tensor([0, 1, 2])).tolist() == [0, 1, 2]


def test_ties_count_against_the_query() -> None:
    """A pool of one repeated embedding says nothing, so its own entry comes last, not first."""
    pool = torch.tensor([[1.0, 0.0]]).repeat(5, 1)
    ranks = retrieval_ranks(torch.tensor([[1.0, 0.0]]), pool, torch.tensor([2]))
    assert ranks.tolist() == [4]
    assert recall_at(ranks, 1) == 0.0
    assert recall_at(ranks, 5) == 1.0


def lattice(rows: int, dims: int, *, generator: torch.Generator) -> Tensor:
    """Vectors of small integers: their products are exact, many are equal, and those that differ differ by 1."""
    return torch.randint(-2, 3, (rows, dims), generator=generator).float()


def brute_force(asked: Tensor, pool: Tensor, own: list[set[int]]) -> list[int]:
    """How many that are not a query's own are as similar as the most similar of its own, or more."""
    ranks = []
    for query, mine in zip(asked.tolist(), own, strict=True):
        products = [sum(a * b for a, b in zip(query, entry, strict=True)) for entry in pool.tolist()]
        best = max(products[i] for i in mine)
        ranks.append(sum(product >= best for i, product in enumerate(products) if i not in mine))
    return ranks


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**31))
def test_ranks_are_the_places_in_the_sorted_order(queries: int, dims: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pool, asked = lattice(20, dims, generator=generator), lattice(queries, dims, generator=generator)
    target = torch.randint(20, (queries,), generator=generator)
    ranks = retrieval_ranks(asked, pool, target)
    assert ranks.tolist() == brute_force(asked, pool, [{own} for own in target.tolist()])


@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 8), st.integers(0, 2**31))
def test_chunks_of_any_size_give_the_ranks_of_the_whole(queries: int, entries: int, size: int, seed: int) -> None:
    """With ties, and with several entries of a query's own in different chunks."""
    generator = torch.Generator().manual_seed(seed)
    pool, asked = lattice(entries, 3, generator=generator), lattice(queries, 3, generator=generator)
    own_BN = torch.rand(queries, entries, generator=generator) < 0.2
    own_BN[torch.arange(queries), torch.randint(entries, (queries,), generator=generator)] = True
    chunks = list(zip(pool.split(size), own_BN.split(size, dim=1), strict=True))
    expected = brute_force(asked, pool, [set(row.nonzero().flatten().tolist()) for row in own_BN])
    assert chunked_ranks(asked, lambda: iter(chunks)).tolist() == expected


def test_equal_embeddings_tie_wherever_their_chunks_end() -> None:
    """One embedding for all captions says nothing, whatever the kernel that a chunk's width chooses."""
    pool, queries = unit(1, 512, seed=0).expand(1001, -1), unit(5, 512, seed=1)
    own_BN = torch.eye(1001, dtype=torch.bool)[[0, 500, 998, 999, 1000]]
    for size in (1, 7, 1000, 1001):
        chunks = list(zip(pool.split(size), own_BN.split(size, dim=1), strict=True))
        assert chunked_ranks(queries, lambda chunks=chunks: chunks).tolist() == [1000] * 5


def test_recall() -> None:
    ranks = torch.tensor([0, 1, 4, 5, 9])
    assert [recall_at(ranks, k) for k in (1, 5, 10)] == pytest.approx([0.2, 0.6, 1.0])


def problem(images: int, texts: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of images and of one or more texts for each, in any order."""
    generator = torch.Generator().manual_seed(seed)
    spare = torch.randint(images, (texts,), generator=generator)
    image_of_text = torch.cat([torch.arange(images), spare])[torch.randperm(images + texts, generator=generator)]
    return unit(images, 4, seed=seed), unit(images + texts, 4, seed=seed + 1), image_of_text


@given(st.integers(2, 12), st.integers(0, 20), st.integers(0, 2**31))
def test_recalls_with_several_texts_an_image_by_brute_force(images: int, texts: int, seed: int) -> None:
    """An image's query succeeds at k if any of its texts is among the k that are most similar."""
    image_embeds, text_embeds, image_of_text = problem(images, texts, seed)
    found = retrieval_recalls(
        image_embeds, text_embeds, image_groups=torch.arange(len(image_embeds)), text_groups=image_of_text
    )
    similarity = (image_embeds @ text_embeds.T).tolist()
    for k in (1, 5, 10):
        hits = 0
        for i, row in enumerate(similarity):
            best = sorted(range(len(row)), key=lambda t: -row[t])[:k]
            hits += any(int(image_of_text[t]) == i for t in best)
        assert found[f"image_to_text_r{k}"] == pytest.approx(hits / images)
        hits = 0
        for t, own in enumerate(image_of_text.tolist()):
            best = sorted(range(images), key=lambda i: -similarity[i][t])[:k]
            hits += own in best
        assert found[f"text_to_image_r{k}"] == pytest.approx(hits / len(text_embeds))


def test_the_same_text_twice_for_an_image_does_not_stand_in_its_own_way() -> None:
    images, texts = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert retrieval_ranks(images, texts, torch.arange(2), groups=torch.tensor([0, 0, 1, 1])).tolist() == [0, 0]
    assert retrieval_ranks(images, texts, torch.arange(2), groups=torch.tensor([0, 1, 1, 1])).tolist() == [1, 0]


def test_texts_that_images_share_belong_to_all_of_them() -> None:
    """Class names: a perfect model, whose embeddings are its captions', finds one of the class first."""
    groups = torch.arange(60) % 4
    embeds = unit(4, 16, seed=0)[groups]
    found = retrieval_recalls(embeds, embeds, image_groups=groups, text_groups=groups)
    assert set(found.values()) == {1.0}
    apart = retrieval_recalls(embeds, embeds, image_groups=torch.arange(60), text_groups=torch.arange(60))
    assert set(apart.values()) == {0.0}, "as 60 captions of their own they all tie"


def test_recalls_of_pairs_are_sklearns_top_k_accuracy() -> None:
    images, texts = unit(40, 6, seed=0), unit(40, 6, seed=1)
    texts = F.normalize(images + 0.8 * texts, dim=-1)
    found = retrieval_recalls(images, texts, image_groups=torch.arange(40), text_groups=torch.arange(40))
    for way, scores in (("image_to_text", images @ texts.T), ("text_to_image", texts @ images.T)):
        for k in (1, 5, 10):
            expected = top_k_accuracy_score(range(40), scores.numpy(), k=k)
            assert found[f"{way}_r{k}"] == pytest.approx(expected), (way, k)
    assert found["image_to_text_r1"] < found["image_to_text_r10"]


def test_blocks_change_nothing_and_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    image_embeds, text_embeds, image_of_text = problem(30, 41, 3)
    whole = retrieval_recalls(
        image_embeds, text_embeds, image_groups=torch.arange(len(image_embeds)), text_groups=image_of_text
    )
    monkeypatch.setattr(retrieval, "BLOCK", 256)
    sizes: list[int] = []
    cosines = retrieval._cosines

    def counted(queries: Tensor, pool: Tensor) -> Tensor:
        sizes.append(len(queries) * len(pool))
        return cosines(queries, pool)

    monkeypatch.setattr(retrieval, "_cosines", counted)
    assert (
        retrieval_recalls(
            image_embeds, text_embeds, image_groups=torch.arange(len(image_embeds)), text_groups=image_of_text
        )
        == whole
    )
    assert len(sizes) > 10 and max(sizes) <= 256


def test_ranks_are_told_apart_in_fp32_under_autocast() -> None:
    """0.9999 and 0.9998 are one number in bf16, and a tie counts against the query."""
    pool = F.normalize(torch.tensor([[1.0, 0.01], [1.0, 0.02]]), dim=-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ranks = retrieval_ranks(torch.tensor([[1.0, 0.0]]), pool, torch.tensor([0]))
    assert ranks.tolist() == [0]
