"""How many groups a normalization over groups of channels uses on a layer of any width."""


def group_count(channels: int, *, largest: int = 32, min_channels_per_group: int = 2) -> int:
    """The largest divisor of `channels` not above `largest` that leaves `min_channels_per_group` channels or more.

    Args:
        channels: C.
        largest: the group count of wide layers; 32 in the papers.
        min_channels_per_group: 1 and a 1x1 map would leave one value per group, which normalizes to zero.

    Returns:
        G, a divisor of C; 1 where no other divisor qualifies (C prime).

    Raises:
        ValueError: an argument below 1.

    >>> [group_count(channels) for channels in (256, 64, 48, 16, 7, 1)]
    [32, 32, 24, 8, 1, 1]
    """
    if min(channels, largest, min_channels_per_group) < 1:
        raise ValueError(
            "channels, largest and min_channels_per_group must be 1 or more, got "
            f"{channels}, {largest} and {min_channels_per_group}"
        )
    most = max(1, min(largest, channels // min_channels_per_group))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


def values_per_group(channels: int, groups: int, spatial: int) -> int:
    """Number of values that one statistic of a group normalization sees: `channels / groups * spatial`."""
    return channels // groups * spatial
