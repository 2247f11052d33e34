"""Made-up customers: names, addresses, cards. Realistic in shape, all of them fake (domains end in `.example`)."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from simulator.chance import base62, words

_FIRST = words(
    "Ada Amir Anika Beatriz Bruno Camille Chen Chidi Clara Dmitri Elena Emeka Erik Fatima Femi Freya Giulia Hanna "
    "Hugo Ines Ivan Jamal Jonas Julia Kaito Karin Lars Leila Lena Liam Lucia Magnus Maja Marco Mei Mina Nadia Niko "
    "Noor Olga Omar Paula Pedro Priya Quentin Rafael Rosa Ruth Samir Sara Sofia Tariq Tomas Uma Vera Viktor Wei Yara "
    "Yusuf Zoe"
)
_LAST = words(
    "Abadi Almeida Andersson Bauer Bianchi Brandt Castro Chowdhury Costa Dubois Eriksen Fischer Garcia Hansen Ivanova "
    "Jansen Kaya Keller Kim Kovacs Lindqvist Lopez Marino Mbeki Meyer Moreau Nakamura Novak Okafor Olsen Patel Petrov "
    "Quist Rahman Ricci Rossi Sato Schmid Silva Singh Suzuki Tanaka Toth Urban Vargas Virtanen Weber Wong Yilmaz "
    "Zhang"
)
_COMPANY = words(
    "Aurora Beacon Birch Blue Bright Cedar Cobalt Copper Coral Delta Echo Ember Fable Falcon Fjord Granite Harbor "
    "Helio Indigo Juniper Kestrel Lantern Lumen Maple Meridian Nimbus North Onyx Orchard Pine Polar Quarry Raven "
    "River Sable Signal Sierra Summit Tidal Umbra Vertex Willow Zephyr"
)
_KIND = ("Academy", "Broadcast", "Clinic", "Fitness", "Learning", "Media", "Pictures", "Retail", "Software", "Studios")
_STREET = ("Bridge Street", "Canal Road", "Hill Lane", "Hauptstrasse", "Market Square", "Rue du Port", "Via Roma")
_PLACE = (
    ("US", "Portland", "OR", "97205", "+1503555"), ("US", "Austin", "TX", "73301", "+1512555"),
    ("GB", "Leeds", None, "LS1 4DY", "+44113496"), ("DE", "Hamburg", None, "20095", "+4940555"),
    ("FR", "Lyon", None, "69002", "+33465"), ("ES", "Valencia", None, "46001", "+34960"),
    ("SE", "Malmo", None, "211 20", "+4640555"), ("BR", "Recife", "PE", "50030-230", "+558155"),
    ("IN", "Pune", "MH", "411001", "+912055"), ("JP", "Osaka", None, "530-0001", "+81655"),
)  # fmt: skip
_BRANDS = ("visa", "visa", "mastercard", "amex")


@dataclass(frozen=True, slots=True)
class Person:
    """Who a customer is: PII, fake."""

    company: str
    email: str
    phone: str
    country: str
    address: dict[str, str | None]


@dataclass(frozen=True, slots=True)
class Card:
    """A payment method: `id` is its `pm_...`."""

    id: str
    brand: str
    last4: str
    exp_month: int
    exp_year: int
    fingerprint: str
    country: str


def make_person(rng: Random) -> Person:
    """A fake company with a fake contact."""
    first, last = rng.choice(_FIRST), rng.choice(_LAST)
    word, kind = rng.choice(_COMPANY), rng.choice(_KIND)
    country, city, state, postal_code, prefix = rng.choice(_PLACE)
    address = {
        "city": city,
        "country": country,
        "line1": f"{rng.randint(1, 240)} {rng.choice(_STREET)}",
        "line2": None,
        "postal_code": postal_code,
        "state": state,
    }
    email = f"{first.lower()}.{last.lower()}@{word.lower()}-{kind.lower()}.example"
    return Person(f"{word} {kind}", email, f"{prefix}{rng.randint(1000, 9999)}", country, address)


def other_email(rng: Random, person: Person) -> str:
    """Another contact of the same company."""
    domain = person.email.partition("@")[2]
    return f"{rng.choice(_FIRST).lower()}.{rng.choice(_LAST).lower()}@{domain}"


def make_card(rng: Random, country: str, year: int) -> Card:
    """A fake card that expires one to four years after `year`."""
    last4 = f"{rng.randint(0, 9999):04d}"
    brand = rng.choice(_BRANDS)
    month, expires = rng.randint(1, 12), year + rng.randint(1, 4)
    return Card(f"pm_{base62(rng, 24)}", brand, last4, month, expires, base62(rng, 16), country)
