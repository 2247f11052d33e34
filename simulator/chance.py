"""Chance, all of it from the seed: ids and draws in Python, hashes of whole columns in Polars.

Nothing here depends on a library's random generator or on the version of its hash, so a seed means the same world
everywhere (splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import hashlib
from random import Random

import polars as pl

BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_HEX4 = pl.Series("hex4", [f"{i:04x}" for i in range(1 << 16)])
_UUID_VERSION = pl.Series("version", [f"4{i:03x}" for i in range(1 << 12)])
_UUID_VARIANT = pl.Series("variant", [f"{i:04x}" for i in range(0x8000, 0xC000)])


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


def generator(seed: int, label: str) -> Random:
    """A generator of its own for each part of the world, so that parts do not move one another."""
    return Random(f"{seed}/{label}")  # noqa: S311  (a simulation, not cryptography)


def salt(seed: int, label: str) -> int:
    """A 64-bit salt for `mixed`, from the seed and a name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{label}".encode(), digest_size=8).digest(), "little")


def base62(rng: Random, length: int) -> str:
    """`length` random characters as Stripe's ids have them."""
    return "".join(rng.choices(BASE62, k=length))


def uuid4(rng: Random) -> str:
    """A random UUID, as text."""
    h = f"{rng.getrandbits(128):032x}"
    return f"{h[:8]}-{h[8:12]}-4{h[13:16]}-{'89ab'[rng.randrange(4)]}{h[17:20]}-{h[20:]}"


def u64(value: int) -> pl.Expr:
    """An unsigned 64-bit literal."""
    return pl.lit(value, dtype=pl.UInt64)


def mixed(numbers: pl.Expr, salt_: int) -> pl.Expr:
    """splitmix64 of each number (UInt64 out; multiplication wraps)."""
    z = numbers.cast(pl.UInt64) * u64(_GOLDEN) + u64(salt_)
    z = (z ^ (z // u64(1 << 30))) * u64(_MIX1)
    z = (z ^ (z // u64(1 << 27))) * u64(_MIX2)
    return z ^ (z // u64(1 << 31))


def unit(hashes: pl.Expr) -> pl.Expr:
    """Hashes to floats in [0, 1), from their upper 53 bits."""
    return (hashes // u64(1 << 11)).cast(pl.Float64) * (2.0**-53)


def below(hashes: pl.Expr, bound: int, shift: int = 0) -> pl.Expr:
    """Hashes to integers in [0, bound), from the bits above `shift` (UInt32; bound well below 2**32)."""
    return ((hashes // u64(1 << shift)) % u64(bound)).cast(pl.UInt32)


def lookup(table: pl.Series, index: pl.Expr) -> pl.Expr:
    """`table[index]`, for each row."""
    return pl.lit(table).gather(index)


def _hex4(hashes: pl.Expr, shift: int) -> pl.Expr:
    return lookup(_HEX4, below(hashes, 1 << 16, shift))


def uuid_text(high: pl.Expr, low: pl.Expr) -> pl.Expr:
    """Version 4 UUIDs as text, from two hashes a row (looked up in tables: Polars has no integer to hexadecimal)."""
    dash = pl.lit("-")
    return pl.concat_str(
        _hex4(high, 48), _hex4(high, 32), dash, _hex4(high, 16), dash,
        lookup(_UUID_VERSION, below(high, 1 << 12)), dash,
        lookup(_UUID_VARIANT, below(low, 1 << 14, 48)), dash,
        _hex4(low, 32), _hex4(low, 16), _hex4(low, 0),
    )  # fmt: skip


def hex_text(hashes: pl.Expr) -> pl.Expr:
    """16 hexadecimal digits a row."""
    return pl.concat_str(_hex4(hashes, 48), _hex4(hashes, 32), _hex4(hashes, 16), _hex4(hashes, 0))
