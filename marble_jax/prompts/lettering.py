"""Prompts that ask for a quoted text in the image: what the OCR reward is trained on.

A prompt is a scene, a surface that carries letters, the text in straight double quotes, and how the image looks. The
texts themselves are held out too: no text of the test set is ever trained on.
"""

from __future__ import annotations

import random

from marble_jax.prompts.files import Prompt

_FIRST = """Open|Fresh|Grand|Golden|Silver|Hidden|Midnight|Sunny|Lucky|Quiet|Royal|Northern|Little|Wild|Happy|Electric|
Velvet|Crystal|Lost|Ancient|Blue|Red|Green|Winter|Summer|Lunar|Ocean|Mountain|City|Desert|River|Garden|Iron|Paper|
Cosmic|Secret|Bright|Rapid|Gentle|Final""".replace("\n", "").split("|")
_SECOND = """Bakery|Market|Harbor|Station|Library|Museum|Theater|Kitchen|Coffee|Records|Books|Bikes|Flowers|Express|
Club|Festival|Concert|Journey|Dreams|Stories|Secrets|Hotel|Diner|Gallery|Workshop|Academy|Lounge|Studio|Bridge|Island|
Express Line|Tea House|Book Fair|Night Run|Art Show|Film Week|Food Hall|Radio Hour|Boat Trip|Dance Hall""".replace(
    "\n", ""
).split("|")
_PHRASES = """Please Knock|Wet Paint|Keep Left|No Entry|Mind the Gap|Watch Your Step|Do Not Disturb|Back in Five|
Sold Out|Now Hiring|Caution Hot|Handle with Care|This Way Up|Free Refills|Cash Only|Push to Open|Pull to Close|
Staff Only|Ring the Bell|Beware of Dog|Thank You|Happy Birthday|Good Morning|Welcome Home|Congratulations|Stay Curious|
Never Give Up|Dream Big|Just Start|Think Again|Be Kind|Home Sweet Home|Once Upon a Time|The End|To Be Continued|
Game Over|Press Start|Loading|Low Battery|Mission Complete|Best in Show|First Prize|Made by Hand|Since 1952|Est 1987|
Room 408|Gate 17|Platform 9|Exit 24|Route 66|Lane 3|Floor 12|Table 21|Track 5|Dock 8|Level 2|Class of 2031|
50 Percent Off|Two for One|Buy Local|Save Water|Plant a Tree|Vote Today|Recycle|Slow Down|School Zone|One Way|
Road Closed|Detour Ahead|Speed Limit 30|Bus Stop|Taxi|Pharmacy|Post Office|Bank|Bakery|Barber|Cinema|Tickets|
Information|Lost and Found|Quiet Please|Emergency Exit|Fire Escape|First Aid|Danger|High Voltage|Deep Water|
Hard Hat Area|Under Construction|Private Property|For Sale|For Rent|Moving Soon|Grand Opening|Last Chance|
Limited Edition|Chapter One|Volume 7|Part Two|Episode 12|Act Three""".replace("\n", "").split("|")
_SURFACES = """a wooden sign above the door of a small shop, carved with|a neon sign in a rainy street that reads|
a chalkboard outside a café with the words|a vintage travel poster titled|a birthday cake with icing that spells|
a white coffee mug printed with|a t-shirt on a clothes line that says|a movie theater marquee showing|
a hardcover book whose cover reads|a brick wall with colorful graffiti of the words|a road sign on a highway that reads|
a smartphone screen with the message|a brass plaque on an old building engraved with|a newspaper with the headline|
a hot air balloon with large letters spelling|a delivery van with|a storefront window lettered with|
a handwritten note on a fridge that says|a paper bag stamped with|a wine bottle with a label that reads|
a train station display board showing|a sandy beach where someone has written|a robot holding a banner that says|
a protest sign made of cardboard that reads|a metal lunch box with a sticker saying|a boat with its name on the bow,|
a wool blanket embroidered with|a billboard above a busy square with|a park bench with a small plate reading|
an astronaut's patch embroidered with|a snow-covered mailbox painted with|an old typewriter with a sheet that reads|
a greeting card with golden letters saying|a stadium scoreboard that shows|a wedding invitation printed with|
a market stall with a hand-painted sign for|a museum ticket that reads|a candy box with the words|
an arcade machine whose screen says|a lighthouse with a banner reading""".replace("\n", "").split(
    "|"
)
_STYLES = (
    "A photograph of",
    "A close-up photograph of",
    "A detailed illustration of",
    "A watercolor painting of",
    "A cinematic shot of",
    "A 3D rendering of",
    "An oil painting of",
    "A studio photograph of",
    "A pencil drawing of",
    "A wide-angle photo of",
)
_ENDS = (
    "in soft morning light",
    "at dusk",
    "under a clear blue sky",
    "with a blurred background",
    "in warm colors",
    "on a foggy day",
    "with strong shadows",
    "in clear, bold letters",
    "at night, lit by street lamps",
    "surrounded by autumn leaves",
    "with people walking by",
    "in a minimalist style",
)


def texts() -> list[str]:
    """Every text there is to render: set phrases first, then pairs of words, none longer than 29 characters."""
    pairs = []
    for first in _FIRST:
        for second in _SECOND:
            pairs.append(f"{first} {second}")
    return [*_PHRASES, *pairs]


def split(
    source: str, num_train: int, num_test: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and test prompts, all different, with no text to render in both.

    Args:
      source: name of the set.
      num_train: training prompts.
      num_test: test prompts.
      seed: of the draw.
    """
    rng = random.Random(seed)
    words = texts()
    rng.shuffle(words)
    share = num_test / max(1, num_train + num_test)
    # Within bounds, so that either split has texts enough to vary when the other is far larger.
    share = min(0.4, max(0.1, share))
    num_held_out = round(len(words) * share)
    # Training first: the order in which the generator is used decides what a seed gives.
    train = _draw(rng, words[num_held_out:], num_train, source)
    test = _draw(rng, words[:num_held_out], num_test, source)
    return train, test


def _draw(rng: random.Random, words: list[str], count: int, source: str) -> list[Prompt]:
    """`count` different prompts with texts out of `words`."""
    # A dict as a set that keeps the order.
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        style = rng.choice(_STYLES)
        surface = rng.choice(_SURFACES)
        word = rng.choice(words)
        end = rng.choice(_ENDS)
        drawn[f'{style} {surface} "{word}", {end}'] = None
    return [Prompt(text, source) for text in drawn]
