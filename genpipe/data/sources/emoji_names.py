"""Emoji names as English phrases: `:couple_with_heart_man_man:` to 'two men with a heart'."""

from __future__ import annotations

import re
from collections import Counter

# Whole names whose phrase no rule gives.
PHRASES = {
    "1st place medal": "a first place medal",
    "2nd place medal": "a second place medal",
    "3rd place medal": "a third place medal",
    "airplane arrival": "an airplane landing",
    "airplane departure": "an airplane taking off",
    "american football": "an American football",
    "bald": "a bald head",
    "breast-feeding": "a woman breast-feeding",
    "bust in silhouette": "a bust in silhouette",
    "busts in silhouette": "busts in silhouette",
    "camping": "a camping tent",
    "candy": "a piece of candy",
    "chart decreasing": "a falling chart",
    "chart increasing": "a rising chart",
    "chart increasing with yen": "a rising chart with a yen sign",
    "construction": "a construction barrier",
    "copyright": "the copyright sign",
    "dashing away": "a dash of wind",
    "divide": "a division sign",
    "dizzy": "a dizzy star",
    "dna": "a strand of DNA",
    "dvd": "a DVD",
    "face screaming in fear": "a face screaming in fear",
    "face with bags under eyes": "a face with bags under its eyes",
    "face with hand over mouth": "a face with a hand over its mouth",
    "face with open eyes and hand over mouth": "a face with open eyes and a hand over its mouth",
    "face with steam from nose": "a face with steam from its nose",
    "face with symbols on mouth": "a face with symbols on its mouth",
    "female sign": "the female sign",
    "fleur-de-lis": "a fleur-de-lis",
    "foggy": "a foggy bridge",
    "globe showing Americas": "a globe showing the Americas",
    "globe showing Asia-Australia": "a globe showing Asia and Australia",
    "globe showing Europe-Africa": "a globe showing Europe and Africa",
    "hand with fingers splayed": "a hand with fingers splayed",
    "hand with index finger and thumb crossed": "a hand with index finger and thumb crossed",
    "headphone": "headphones",
    "high voltage": "a high voltage sign",
    "hindu temple": "a Hindu temple",
    "horse racing": "a horse race",
    "hourglass done": "an hourglass that has run out",
    "hourglass not done": "an hourglass with flowing sand",
    "hundred points": "a hundred points",
    "infinity": "an infinity sign",
    "information": "an information sign",
    "Japanese symbol for beginner": "the Japanese symbol for a beginner",
    "kaaba": "the Kaaba",
    "kiss": "a couple kissing",
    "latin cross": "a Latin cross",
    "leaf fluttering in wind": "a leaf fluttering in the wind",
    "light rail": "a light rail train",
    "locked": "a closed lock",
    "locked with key": "a closed lock with a key",
    "locked with pen": "a closed lock with a pen",
    "male sign": "the male sign",
    "man in lotus position": "a man in the lotus position",
    "mate": "a mate drink",
    "meat on bone": "meat on a bone",
    "metro": "a metro train",
    "milky way": "the Milky Way",
    "minus": "a minus sign",
    "mobile phone off": "a mobile phone that is off",
    "mount fuji": "Mount Fuji",
    "Mrs. Claus": "Mrs. Claus",
    "multiply": "a multiplication sign",
    "Mx Claus": "Mx Claus",
    "om": "the om symbol",
    "orthodox cross": "an Orthodox cross",
    "palms up together": "palms up together",
    "performing arts": "performing arts masks",
    "person in bed": "a person in bed",
    "person in lotus position": "a person in the lotus position",
    "plus": "a plus sign",
    "pool 8 ball": "a pool eight ball",
    "raised back of hand": "a raised back of the hand",
    "registered": "the registered sign",
    "rolling on the floor laughing": "a face rolling on the floor laughing",
    "Santa Claus": "Santa Claus",
    "shinto shrine": "a Shinto shrine",
    "skull and crossbones": "a skull and crossbones",
    "speaker high volume": "a speaker at high volume",
    "speaker low volume": "a speaker at low volume",
    "speaker medium volume": "a speaker at medium volume",
    "star-struck": "a star-struck face",
    "Statue of Liberty": "the Statue of Liberty",
    "sun": "the sun",
    "sun behind cloud": "the sun behind a cloud",
    "sun behind large cloud": "the sun behind a large cloud",
    "sun behind rain cloud": "the sun behind a rain cloud",
    "sun behind small cloud": "the sun behind a small cloud",
    "sun with face": "the sun with a face",
    "sunrise over mountains": "a sunrise over mountains",
    "thread": "a spool of thread",
    "Tokyo tower": "the Tokyo Tower",
    "trade mark": "the trade mark sign",
    "umbrella on ground": "an umbrella on the ground",
    "unlocked": "an open lock",
    "vulcan salute": "a Vulcan salute",
    "wedding": "a wedding chapel",
    "wireless": "a wireless signal symbol",
    "woman and man holding hands": "a woman and a man holding hands",
    "woman in lotus position": "a woman in the lotus position",
    "yarn": "a ball of yarn",
    "yin yang": "a yin and yang symbol",
    "ZZZ": "the letters ZZZ",
}
COUNTRIES = {
    "Cocos (Keeling) Islands": "the Cocos Islands",
    "Hong Kong SAR China": "Hong Kong",
    "Macao SAR China": "Macao",
    "Myanmar (Burma)": "Myanmar",
    "Heard Island and McDonald Islands": "Heard Island and McDonald Islands",
    "South Georgia and South Sandwich Islands": "South Georgia and the South Sandwich Islands",
    "Isle of Man": "the Isle of Man",
    "Saint Helena Ascension and Tristan da Cunha": "Saint Helena, Ascension and Tristan da Cunha",
    "Saint Vincent and Grenadines": "Saint Vincent and the Grenadines",
}
_THE_COUNTRY = re.compile(
    r"(Islands|Republic|Emirates|Kingdom|States|Nations|Union|Territory|Territories|Lands|Netherlands|Bahamas|Gambia"
    r"|Maldives|Philippines|Comoros|Seychelles)$"
)
# Last words of things without number, so without an article.
_MASS = re.compile(
    r"\b(sake|milk|bread|bacon|salt|butter|garlic|rice|popcorn|falafel|fondue|dango|oden|sushi|tennis|badminton"
    r"|bowling|lacrosse|polo|hockey|pong|money|lightning|rain|snow|fog|ice|wood|lipstick|soap|coral|luggage"
    r"|sweat|hair|cooking|spaghetti|food|shrimp|polish|broccoli|cinema|yen|construction|mode|liquid)$"
)
_SINGULAR_IN_S = re.compile(r"(ss|us|tennis|rhinoceros)$")
_PLURAL = frozenset({"people", "men", "women", "children"})
_SIGNS = re.compile(
    r"radioactive|biohazard|warning|prohibited|no (entry|smoking|littering|bicycles|pedestrians)"
    r"|no mobile phones|no one under eighteen|(non-)?potable water|children crossing|passport control|customs"
    r"|baggage claim|left luggage|restroom|water closet|litter in bin sign"
)
_ZODIAC = re.compile(
    r"Aries|Taurus|Gemini|Cancer|Leo|Virgo|Libra|Scorpio|Sagittarius|Capricorn|Aquarius|Pisces|Ophiuchus"
)
_KEYCAPS = {"#": "a hash sign", "*": "an asterisk"}
_WHO = "(?:man|woman|person)"
_PLURAL_OF = {"man": "men", "woman": "women", "person": "people", "child": "children"}
_NUMBERS = {2: "two", 3: "three"}
_HAIR = {"bald": "a bald {}", "beard": "a {} with a beard"}
_TONE = re.compile(r"[ ,]+(medium-light|medium-dark|light|medium|dark) skin tone")
_AN = re.compile(r"([aeio]|u(?!ni|se|ti)|hour|(ID|NG|SOS|ATM|OK|ON|UP|x-ray)\b)", re.IGNORECASE)
_A_ALL_THE_SAME = re.compile(r"(one[- ]|euro|ewe)")


def phrase(name: str, *, is_country: bool) -> str:
    """The name as the object of 'an emoji of': 'a red apple', 'two hearts', 'the flag of France'.

    name: as the `emoji` package gives it, `:red_apple:`; countries and regions come there without 'flag'.
    """
    words = name.strip(":").replace("_", " ").replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    if is_country:
        return f"the flag of {_country(words)}"
    tones = _TONE.findall(words)
    subject = _subject(_TONE.sub("", words))
    if not tones:
        return subject
    joint = "and" if " with " in subject else "with"
    return f"{subject} {joint} {' and '.join(tones)} skin tone{'s' if len(tones) > 1 else ''}"


def _country(words: str) -> str:
    name = words.replace("&", "and").replace("St. ", "Saint ")
    if name in COUNTRIES:
        return COUNTRIES[name]
    return f"the {name}" if _THE_COUNTRY.search(name) else name


def _subject(words: str) -> str:
    if words in PHRASES:
        return PHRASES[words]
    if _ZODIAC.fullmatch(words):
        return f"the zodiac sign {words}"
    if _SIGNS.fullmatch(words):
        return f"{_indefinite(words)} {words.removesuffix(' sign')} sign"
    if words.startswith("keycap "):
        digit = words.removeprefix("keycap ")
        return f"a keycap with {_KEYCAPS.get(digit, f'the number {digit}')}"
    if words.endswith(("o'clock", "-thirty")):
        return f"a clock showing {words}"
    if match := re.fullmatch(r"(\w+) button \((.+)\)", words):
        return f"a {match[2]} {match[1]} button"
    if match := re.fullmatch(r"Japanese (.+) button", words):
        return f'a Japanese "{match[1]}" button'
    if match := re.fullmatch(r"input (.+)", words):
        return f"an input button for {match[1].replace('latin', 'Latin')}"
    return _people(words) or _with_article(words.replace("index pointing", "index finger pointing"))


def _indefinite(words: str) -> str:
    return "an" if _AN.match(words) and not _A_ALL_THE_SAME.match(words) else "a"


def _people(words: str) -> str | None:
    """Families, couples and hair, whose names are lists: 'family man woman girl', 'man red hair'."""
    first, *rest = words.split(" ")
    if first == "family" and rest:
        return f"a family of {_and([word.replace('adult', 'person') for word in rest])}"
    if match := re.fullmatch(rf"(kiss|couple with heart) ({_WHO} {_WHO})", words):
        return f"{_and(match[2].split())} {'kissing' if match[1] == 'kiss' else 'with a heart'}"
    if match := re.fullmatch(rf"({_WHO} \w+ing) (baby|ball|bath|boat|hand|haircut|massage|turban)", words):
        return f"a {match[1]} a {match[2]}"
    if match := re.fullmatch(rf"({_WHO}) (bald|beard|\w+ hair)", words):
        return _HAIR.get(match[2], "a {} with " + match[2]).format(match[1])
    return None


def _and(people: list[str]) -> str:
    """['man', 'woman', 'boy', 'boy'] to 'a man, a woman and two boys'."""
    counts = Counter(people)
    items = [
        f"{_indefinite(who)} {who}" if n == 1 else f"{_NUMBERS[n]} {_PLURAL_OF.get(who, who + 's')}"
        for who, n in counts.items()
    ]
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _with_article(words: str) -> str:
    head, preposition, tail = re.fullmatch(r"(.+?)(?: (with|without|in) (.+))?", words).groups()  # type: ignore[union-attr]
    phrase = _article(head) + head
    return f"{phrase} {preposition} {_with_article(tail)}" if preposition else phrase


def _article(words: str) -> str:
    if words.startswith("a "):
        return ""
    noun = re.split(r" (?:of|on|behind|at|tilted|(?<!wards )\w+ing)\b", words)[0]
    first, last = noun.split(" ")[0], noun.split(" ")[-1]
    plural = (last.endswith("s") and not _SINGULAR_IN_S.search(last)) or first in _PLURAL
    if words != "shrimp" and (plural or _MASS.search(noun)):
        return ""
    return f"{_indefinite(words)} "
