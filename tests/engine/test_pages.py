"""The page pool's books balance after every operation; the prefix index finds exactly what was published."""

from __future__ import annotations

import random
from array import array

import pytest

from engine.config import PAGE_SIZE
from engine.pages import PagePool
from engine.prefix_cache import PrefixCache, page_hash, root_hash
from engine.types import EndConditions, Request, Sequence, Verification


def sequence(tokens: list[int], salt: str = "") -> Sequence:
    request = Request("r", tuple(tokens), EndConditions(1), cache_salt=salt)
    return Sequence(request, 0, Verification.COUPLED, tokens, 0, prompt_length=len(tokens))


def publish(cache: PrefixCache, tokens: list[int], salt: str = "") -> Sequence:
    """A sequence that has just written all of its tokens."""
    made = sequence(tokens, salt)
    pages = cache.pool.allocate(-(-len(tokens) // PAGE_SIZE))
    assert pages is not None
    made.pages, made.kv_length = array("q", pages), len(tokens)
    cache.publish(made)
    return made


@pytest.mark.parametrize("seed", range(6))
def test_random_operations(seed: int) -> None:
    """A model of the pool in plain sets, and the pool's own proof after every step."""
    generator = random.Random(seed)
    pool = PagePool(generator.randrange(1, 24))
    held: list[list[int]] = []
    contents: dict[bytes, int] = {}
    for _ in range(600):
        action = generator.random()
        if action < 0.35:
            count = generator.randrange(0, 6)
            available = pool.available
            pages = pool.allocate(count)
            assert (pages is None) == (count > available)
            if pages is not None:
                assert not {p for mine in held for p in mine} & set(pages), "a held page was handed out again"
                contents = {content: page for content, page in contents.items() if page not in pages}
                held.append(pages)
        elif action < 0.6 and held:
            pool.release(held.pop(generator.randrange(len(held))))
        elif action < 0.8 and held and (pages := generator.choice(held)):
            page, content = generator.choice(pages), generator.randbytes(1)
            pool.publish(page, content)
            if content not in contents and page not in contents.values():
                contents[content] = page
        elif action < 0.99:
            content = generator.randbytes(1)
            found = pool.lookup(content)
            assert found == contents.get(content)
            if found is not None:
                held.append([found])
        else:
            pool.forget()
            contents = {}
        pool.check(held)
    for pages in held:
        pool.release(pages)
    pool.check([])
    assert pool.available == pool.total


def test_misuse_is_refused() -> None:
    pool = PagePool(3)
    pages = pool.allocate(2)
    assert pages is not None
    pool.release(pages)
    with pytest.raises(AssertionError, match="without a holder"):
        pool.release(pages)
    with pytest.raises(AssertionError, match="without a holder"):
        pool.publish(pages[0], b"x")


def test_check_notices_a_lost_page() -> None:
    pool = PagePool(3)
    pages = pool.allocate(2)
    assert pages is not None
    with pytest.raises(AssertionError, match="holders"):
        pool.check([pages[:1]])
    pool._free.pop()
    with pytest.raises(AssertionError, match="0 states"):
        pool.check()


def test_idle_pages_are_taken_back_oldest_and_deepest_first() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool, enabled=True)
    old, new = (publish(cache, list(range(start, start + 2 * PAGE_SIZE))) for start in (0, 100))
    pool.release(old.pages)
    pool.release(new.pages)
    assert (pool.free, pool.idle) == (0, 4)
    assert pool.allocate(1) == [old.pages[1]], "a prefix outlives what follows it"
    again = sequence([*new.request.prompt, 1])
    cache.acquire(again)
    assert again.pages == new.pages


def test_the_longest_published_prefix_is_found() -> None:
    cache = PrefixCache(PagePool(16), enabled=True)
    tokens = list(range(3 * PAGE_SIZE + 5))
    first = publish(cache, tokens)
    assert len(first.page_hashes) == 3, "the page that is not full is not published"
    longer = sequence([*tokens, 9, 9])
    cache.acquire(longer)
    assert (longer.pages, longer.kv_length) == (first.pages[:3], 3 * PAGE_SIZE)
    other = sequence([*tokens[: 2 * PAGE_SIZE - 1], 77, *tokens[2 * PAGE_SIZE :]])
    cache.acquire(other)
    assert other.pages == first.pages[:1], "a page counts only with all that came before it"
    cache.pool.check([first.pages, longer.pages, other.pages])


@pytest.mark.parametrize("length", [PAGE_SIZE, 2 * PAGE_SIZE])
def test_the_last_token_always_runs(length: int) -> None:
    """Its logits are needed, even when its page is cached."""
    cache = PrefixCache(PagePool(8), enabled=True)
    tokens = list(range(length))
    publish(cache, tokens)
    again = sequence(tokens)
    cache.acquire(again)
    assert again.kv_length == length - PAGE_SIZE


def test_salt_separates() -> None:
    cache = PrefixCache(PagePool(8), enabled=True)
    tokens = list(range(PAGE_SIZE + 1))
    publish(cache, tokens, salt="a")
    for salt, found in (("a", 1), ("b", 0), ("", 0)):
        one = sequence(tokens, salt)
        cache.acquire(one)
        assert len(one.pages) == found, salt
    assert root_hash("a") != root_hash("b")


def test_hashes_depend_on_everything_before() -> None:
    page = list(range(PAGE_SIZE))
    hashes = {page_hash(root_hash(""), page), page_hash(page_hash(root_hash(""), page), page)}
    hashes |= {page_hash(root_hash(""), page[::-1]), page_hash(root_hash("x"), page)}
    assert len(hashes) == 4


def test_disabled_cache_finds_nothing() -> None:
    cache = PrefixCache(PagePool(8), enabled=False)
    tokens = list(range(3 * PAGE_SIZE))
    assert not publish(cache, tokens).page_hashes
    one = sequence(tokens)
    cache.acquire(one)
    assert not one.pages
