"""Prompts that go on from a cache: how much of what was given the cache holds already."""


def known_length(num_cached: int, num_given: int, num_masked: int | None) -> int:
    """Says where the part of a prompt begins that is not in the cache.

    Args:
        num_cached: positions in the cache, 0 without one.
        num_given: positions of the ids or embeddings that were given.
        num_masked: positions of the mask that was given, None without one. As upstream, a mask wider than the ids says
            that only the new ones were passed.

    Returns:
        How many of the given positions the cache holds.

    Raises:
        ValueError: the cache holds all that was given.
    """
    num_known = num_cached if num_masked is None or num_masked == num_given else 0
    if num_known and num_known >= num_given:
        raise ValueError(
            f"The cache holds {num_cached} positions, but the prompt has {num_given}. Pass the ids of the whole "
            "conversation: what generate returned, then the new turn."
        )
    return num_known
