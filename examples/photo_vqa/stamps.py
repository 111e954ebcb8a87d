# Copyright 2026 The LearnPruner developers. Licensed under the Apache License, Version 2.0.
"""Which of Tux Paint's stamps are photographs, and of what.

Living things and food are asked about; things only stand around. Names are single tokens of SmolLM2's tokenizer, and
loose where few stamps are alike: a zebra is a horse, a lion a cat, a marmot a rodent. A question names a kind either
by its fine name or by its merged word; where the two are the same, no other kind has that merged word, so that every
word has one meaning.
"""

import hashlib
from dataclasses import dataclass

FOLDS = 3


@dataclass(frozen=True)
class Kind:
    """A kind of thing.

    Attributes:
        name (`str`): The fine name.
        merged (`str`): The word of a shorter list, which kinds that look alike share.
        files (`tuple[str, ...]`): Its stamps, under the package's folder.
        asked (`bool`): Whether questions are about it.
        training (`int`): Most stamps that scenes of seen stamps are made of.
    """

    name: str
    merged: str
    files: tuple[str, ...]
    asked: bool = True
    training: int = 5


def _files(*folders: str) -> tuple[str, ...]:
    """`"folder/: a b"` -> `("folder/a.png", "folder/b.png")`."""
    pairs = [folder.split(": ") for folder in folders]
    return tuple(f"{folder}{name}.png" for folder, names in pairs for name in names.split())


_BEASTS = "animals/mammals/"
_ASKED = [
    Kind(
        "bird",
        "bird",
        _files(
            "animals/birds/: adelaide-rosella albino_peahen blackbird chicken_profile crow crowned_crane cuckoo drake "
            "duck gander guineafowl helmeted_guineafowl hen heron_greatblue heron_greatblue_flying lark little-penguin "
            "magellanic_penguin magpie nandou ostrich owl peacock pelican penguin pigeon pink_flamingo quetzal "
            "rainbow-lorikeet rooster seagull silver-gull tucan turkey vulture"
        ),
        training=10,
    ),
    Kind(
        "fish",
        "fish",
        _files(
            "animals/fish/: bluegroper butterflyfish clownfish coraltrout dolphinfish lionfish moonwrasse stripedfish"
        ),
    ),
    Kind("insect", "insect", _files("animals/insects/: bee fly grasshopper hornet hoverfly mantis xanthia")),
    Kind("cow", "beast", _files(f"{_BEASTS}bovines/: bison bull cow cow_white yak zebu")),
    Kind("sheep", "beast", _files(f"{_BEASTS}bovines/: ram sheep sheep_lamb")),
    Kind("cat", "beast", _files(f"{_BEASTS}cats/: lion-2 lion tiger tiger_sumatran")),
    Kind("deer", "beast", _files(f"{_BEASTS}deer/: caribou deer doe wapiti")),
    Kind("horse", "beast", _files(f"{_BEASTS}equines/: donkey donkey_eating horse zebra")),
    Kind("pig", "beast", _files(f"{_BEASTS}: pig pig_golden pig_golden2 wildboar")),
    Kind("rodent", "beast", _files(f"{_BEASTS}rodents/: beaver capybara marmot mouse rat squirrel")),
    Kind(
        "apple",
        "fruit",
        _files("food/fruit/: apple_fuji apple_granny_smith apple_green apple_red apple_sierra_beauty"),
    ),
    Kind("citrus", "fruit", _files("food/fruit/: lemon mandarine orange orange_seville sliced_lime sliced_orange")),
    Kind("berry", "fruit", _files("food/fruit/: Strawberry2 strawberry raspberry grapes")),
    Kind(
        "vegetable",
        "vegetable",
        _files(
            "food/vegetables/: broccoli carrot chilepepper corn eggplant garlic lettuce onion pattypan_squash pepper "
            "potato pumpkin_small redlettuce tomato yam yellowpepper"
        ),
        training=8,
    ),
    Kind("mushroom", "mushroom", _files("plants/mushrooms/: cep cep-1 cep-2", "food/vegetables/: mushroom")),
    Kind(
        "flower",
        "flower",
        _files(
            "plants/flowers/: adeenia anemone_red anthoorium bolsom chemparathi daffodil flower1 flower10 flower2 "
            "flower3 flower4 flower5 flower6 flower7 flower8 flower9 iris marigold pigface red-gazania rose "
            "whitestar-petunia yellow-flower"
        ),
        training=8,
    ),
]
_UNASKED = {
    "ball": _files("sports/: australian_rules_football basketball cricketball football soccer tennis_ball"),
    "bin": _files("household/: garbagecan home_compost_bin wheelie_bin"),
    "car": _files("vehicles/auto/: beetle sedan sportscar2 truck", "vehicles/race/: indycar"),
    "coin": _files(
        "symbols/money/canadian/coins/: 001penny 005nickel 010dime 025quarter 100loonie 200toonie",
        "symbols/money/euro/coins/: 001 002 005 010 020 050 100 200",
        "symbols/money/japanese/: yen001 yen005 yen010 yen050 yen100 yen500",
        "symbols/money/us/coins/: 001penny 005nickel 010dime 025quarter 050kennedy-halfdollar 100sacagawea",
    ),
    "drum": _files("hobbies/music/percussion/: cymbal_crash drum_tomtom_floor drumkit"),
    "grave": _files("seasonal/halloween/: " + " ".join(f"grave-{letter}" for letter in "abcdefghij")),
    "guitar": _files(
        "hobbies/music/string/: cello guitar2 guitar_classical guitar_electric guitar_electric_bass violin"
    ),
    "planet": _files(
        "space/planets/: 2_venus 3_earth 4_mars 5_jupiter 6_saturn 7_uranus 8_neptune 9_pluto",
        "space/moon/: moon_3qt moon_full",
    ),
    "pot": _files("household/dishes/: mug pitcher_small teapot", "household/: kettle"),
    "sign": _files(
        "town/roadsigns/: crossroads dead_end_sign give_way_sign no_entry_sign no_uturn roundabout school_sign stop "
        "t-junction xing_ped xing_school yield"
    ),
    "tank": _files("military/vehicles/: bradley infantry-stryker ww2_german_gun"),
    "tool": _files(
        "household/tools/: hammer mallet_metal plyers saw spade wrench wrench_adjustable wrench_plumbers",
        "household/arttools/: scissors_small_closed scissors_small_open",
    ),
    "tree": _files("plants/trees/: birch holm_oak liberia-palm tree336", "seasonal/christmas/: Christmas_Tree_photo"),
    "truck": _files(
        "vehicles/: garbagetruck", "vehicles/emergency/: firetruck", "vehicles/masstransit/: green_korean_bus"
    ),
}
KINDS = {kind.name: kind for kind in _ASKED} | {
    name: Kind(name, name, files, asked=False, training=8) for name, files in _UNASKED.items()
}
FINE = tuple(kind.name for kind in _ASKED)
MERGED = tuple(dict.fromkeys(kind.merged for kind in _ASKED))
_PLURALS = {"fish": "fish", "sheep": "sheep", "deer": "deer", "berry": "berries", "citrus": "citrus fruits"}


def plural(word: str) -> str:
    return _PLURALS.get(word, f"{word}s")


def with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _order(file: str) -> str:
    # Of names alone, so that no random generator's version matters and no folder's alphabet decides.
    return hashlib.sha256(file.encode()).hexdigest()


def held_out(kind: Kind, fold: int) -> tuple[str, ...]:
    """A third of the kind's stamps, of which no training scene is made. Every stamp is held out in one fold."""
    if fold not in range(FOLDS):
        raise ValueError(f"The fold is a number below {FOLDS}, got {fold}.")
    return tuple(sorted(kind.files, key=_order)[FOLDS - 1 - fold :: FOLDS])


def training(kind: Kind, fold: int) -> tuple[str, ...]:
    """The other stamps, at most `kind.training` of them."""
    out = held_out(kind, fold)
    return tuple(file for file in sorted(kind.files, key=_order) if file not in out)[: kind.training]
