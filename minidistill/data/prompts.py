"""Prompts to distil with: four thousand of our own from a small grammar, or yours from a text file.

A rule is a name and its alternatives, separated by "|"; a {slot} is filled by a random alternative of the rule it
names. An alternative written twice is drawn twice as often. Every prompt starts from the rule `prompt`. The rules keep
what does not fit together apart: outdoor scenes get outdoor light, and a photo never shows its brushwork.
"""

import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from minidistill.formats.files import reading

T = TypeVar("T")

RULES = {
    # The form of a prompt, from two words to about thirty.
    "prompt": """{short} | {any} | {outdoors} {when} | {indoors} {lit} | {any}, {style} | {any}, {style}, {finish}
        | {outdoors}, {weather} | {outdoors}, {weather}, {style}, {finish} | {indoors}, {light}, {style}
        | {indoors}, {light}, {finish} | {medium} of {any} | {medium} of {any}, {finish}
        | {photo} of {outdoors} {when}, {lens} | {photo} of {indoors} {lit}, {lens} | {photo} of {outdoors}, {weather}
        | {photo} of {indoors}, {light}, {lens}, {finish} | {photo} of {outdoors} {when}, {view}, {lens}, {finish}
        | {painting} of {outdoors} {when}, {brush} | {painting} of {indoors} {lit}, {brush}
        | {painting} of {outdoors}, {weather}, {brush}, {finish} | {special}""",
    "any": "{outdoors} | {outdoors} | {indoors} | {indoors} | {undersea}",
    "short": """{colour} {object} | {material} {object} | {mood} {pet} | {mood} {animal} | {grand} {land}
        | {state} {building} | {colour} {car} | {age} {person} | {mood} {creature} | {number} {fruit}
        | {building} at night | {style}, {land} | {person}, {style}""",
    "special": """an aerial view of a {grand} {land}, {weather} | a macro photo of a {bug} on a {flower}, {lens}
        | a macro photo of {tiny} | a {poster} poster of a {state} {building} {site}
        | a flat vector icon of a {object} on a {colour} background | a seamless pattern of {fruit} and {things}
        | a portrait of a {age} {person} {look}, {light}, {lens} | a {animal} dressed as a {person}, {style}
        | a portrait of a {animal} wearing {costume} | an isometric {room}, {style}, {finish} | {world} inside {vessel}
        | {world} inside {vessel}, {light}, {finish} | a cutaway drawing of a {building}, {finish}
        | a neon sign that says "{word}" {inside} | a {colour} mug with the word "{word}" on {surface}
        | a map of an imaginary island with {number} villages and a {land}""",
    # Outdoors: all of these can take {when} or {weather}.
    "outdoors": """{folk} {deed} {place} | {folk} {deed} {place} | {folk} {place}
        | {number} {persons} {together} {place} | a {animal} {pose} {habitat} | a {mood} {animal} {pose} {habitat}
        | {number} {herd} {meadow} | a {songbird} {perch} | a {waterbird} {shore}
        | a {animal} and a {songbird} side by side {habitat} | a {pet} {outing} | a {building} {site}
        | a {state} {building} {site} | a {land} {detail} | a {grand} {land} {detail} | a {colour} {car} {road}
        | a {worn} {colour} {car} {road} | a {train} {track} | a {colour} {boat} {water} | a {aircraft} {sky}
        | {number} {aircraft}s {sky} | a {mood} {creature} {lair} | a {mood} {robot} {deed} {place} | {crowd}
        | {crowd}""",
    "folk": "a {person} | a {age} {person} | a {person} {look} | a {age} woman {look} | a {age} man {look}",
    "person": """fisherman | farmer | violinist | astronaut | librarian | ballet dancer | gardener | chef | clockmaker
        | hiker | wizard | knight | shepherd | scientist | potter | pilot | carpenter | sailor | nurse | beekeeper
        | detective | firefighter | tailor | florist | monk | queen | baker | lighthouse keeper | explorer""",
    "age": "young | old | elderly | middle-aged | smiling | tired | cheerful | thoughtful | tall | freckled | proud",
    "look": """with curly red hair | with silver hair | with long dark braids | with round glasses
        | in a yellow raincoat | in a green wool coat | wearing a straw hat | in a striped jumper""",
    "deed": """holding an umbrella | flying a kite | reading a newspaper | playing the violin | feeding pigeons
        | eating an apple | sketching in a notebook | looking through a telescope | carrying a basket of flowers
        | blowing soap bubbles | pushing a wheelbarrow | dancing | waiting | waving | juggling oranges""",
    "persons": "friends | hikers | musicians | old men | women | students | monks | sailors | tourists | astronauts",
    "together": "dancing | laughing | having a picnic | playing cards | singing | sharing a meal | posing for a photo",
    "place": """in a cobbled street | on a sandy beach | in a wheat field | on a stone bridge | in a city park
        | on a rooftop | beside a quiet lake | at a tram stop | in an orchard | on a wooden pier""",
    "animal": """fox | cow | horse | donkey | wolf | brown bear | stag | lion | tiger | elephant | giraffe | zebra
        | hedgehog | squirrel | hare | otter | panda | koala | moose | bison | snow leopard | lynx | red panda
        | kangaroo | sloth | badger | raccoon | llama | camel | chameleon | gorilla | iguana | armadillo | capybara""",
    "mood": "tiny | sleepy | curious | shy | playful | grumpy | happy | gentle | majestic | clumsy | lonely | watchful",
    "pose": "standing | resting | lying down | looking at the camera | yawning | looking up | half hidden | walking",
    "habitat": """in tall grass | in a pine forest | on a mossy rock | beside a stream | on a dusty path
        | among wild flowers | in a bamboo grove | on a fallen log | near a waterfall | on the open plain""",
    "herd": "cows | sheep | goats | horses | donkeys | geese | hens | ponies | lambs | alpacas | ducks | pigs",
    "meadow": "in a green pasture | by a wooden fence | in front of a red barn | on a muddy track",
    "songbird": "owl | robin | kingfisher | parrot | sparrow | hummingbird | raven | toucan | blue tit | magpie",
    "perch": """on a branch | on a fence post | in a cherry tree | on a rooftop | with ruffled feathers on a thin twig
        | spreading its wings | eating red berries | on an old street lamp""",
    "waterbird": "heron | flamingo | swan | pelican | crane | goose | puffin | penguin | egret | stork | mallard",
    "shore": "standing in shallow water | among the reeds | on a pebble beach | reflected in a still pond",
    "building": """cottage | castle | lighthouse | temple | cathedral | windmill | barn | skyscraper | treehouse
        | log cabin | train station | bookshop | bakery | petrol station | watermill | monastery | palace | observatory
        | library | motel | cinema | pagoda | clock tower | chapel | mosque | theatre | greenhouse""",
    "state": """abandoned | old | tiny | crumbling | grand | brightly painted | ivy-covered | modern | futuristic
        | whitewashed | moss-covered | red brick | gothic | crooked | half-timbered""",
    "site": """on a rocky cliff | by a still lake | at the edge of a wood | on a small hill | on a street corner
        | beside a canal | overlooking the sea | surrounded by cherry trees | deep in the jungle | on a small island""",
    "land": """valley | mountain lake | canyon | desert | beach | waterfall | meadow | pine forest | fjord | glacier
        | volcano | lavender field | vineyard | salt flat | sea cliff | island | swamp | jungle | rice terrace""",
    "grand": "quiet | vast | remote | wild | hidden | peaceful | lonely | beautiful | rugged | dreamlike | enchanted",
    "detail": """with a winding path | with a small wooden cabin | with snowy peaks behind it | with a lone tree
        | with a red tent | with a flock of birds overhead | with flowers in the foreground | with two tiny hikers""",
    "car": """car | pickup truck | delivery van | double-decker bus | motorbike | scooter | tractor | camper van
        | sports car | fire engine | taxi | ice cream van | bicycle""",
    "worn": "rusty | shiny | dusty | battered | vintage | toy | flying | hand-painted",
    "road": """parked on a quiet street | on a mountain road | crossing a long bridge | in front of a diner
        | on a coastal road | in a narrow alley | in the middle of nowhere | outside a flower shop | at a crossroads""",
    "train": "steam train | tram | freight train | high-speed train | funicular",
    "track": """crossing a stone viaduct | climbing a steep hill | coming out of a tunnel | passing a field of poppies
        | at a tiny country station | winding through the mountains""",
    "boat": "sailing boat | fishing boat | rowing boat | ferry | cargo ship | canoe | tall ship | tugboat",
    "water": """on a calm lake | in a small harbour | in rough seas | moored at a jetty | among icebergs
        | on a jungle river | near a tropical island | passing a lighthouse | stranded on a sandbank""",
    "aircraft": "hot air balloon | seaplane | biplane | helicopter | airship | glider | spaceship | paper plane | kite",
    "sky": "above a mountain range | over a patchwork of fields | above the clouds | over a sleeping city",
    "crowd": """a street market with baskets of {fruit} | a harbour full of fishing boats
        | an outdoor café with {colour} parasols | a carnival parade with giant puppets
        | rows of {colour} houses along a canal | a Ferris wheel beside the sea | a city skyline with a river in front
        | a crowded pedestrian crossing | a garden full of {flower}s and butterflies
        | a village square with {number} {persons} | a campfire with {number} tents around it
        | a bus stop with {number} people and a {pet} | a hillside town with {colour} rooftops
        | a {colour} door in a wall covered with {flower}s | a {colour} bench under a tree full of {songbird}s""",
    "creature": "dragon | unicorn | griffin | mermaid | phoenix | forest spirit | stone giant | winged horse | goblin",
    "lair": """on a mountain top | guarding an old gate | asleep on a pile of gold | beside a waterfall
        | meeting a traveller | drinking tea | above a medieval town | in a ruined temple""",
    "robot": "robot | tin robot | wooden puppet | scarecrow | snowman | garden gnome | android",
    # Indoors and on the table: all of these can take {lit} or {light}.
    "indoors": """{folk} {work} {inside} | {folk} {work} {inside} | {folk} {work} | a {mood} {robot} {work}
        | a {animal} wearing {costume} and {work} | a {pet} {nook} | a {mood} {pet} {nook}
        | a {pet} and a {friend} {nook} | a {room} with {fitting} | a {air} {room} with {fitting} and {extra}
        | {food} on {surface} | {food} and {drink} on {surface} | {drink} on {surface}
        | a {material} {object} on {surface} | a {colour} {object} and a {colour} {vase} on {surface}
        | a {colour} {object} {beside} a {material} {vase} | {number} {fruit} on {surface}
        | {number} {fruit} and {drink} on {surface} | {number} {colour} {things} on {surface}
        | {number} {things} {beside} a {object} | a {vase} of {flower}s on {surface}
        | a {material} sculpture of a {animal}""",
    "work": """reading a thick book | playing the cello | painting at an easel | kneading dough | pouring tea
        | repairing a clock | playing the piano | writing a letter | carving wood | knitting a scarf""",
    "inside": """in a small workshop | in a tidy kitchen | in an attic | in a quiet library | in a crowded café
        | in a train carriage | in a mountain hut | in a laboratory | in an empty theatre | in a hotel lobby""",
    "pet": """tabby cat | ginger kitten | black cat | golden retriever | corgi | greyhound | poodle | beagle | dachshund
        | puppy | white rabbit | hamster | sheepdog | guinea pig | tortoise | terrier | calico cat | husky""",
    "friend": "canary | mouse | rubber duck | ferret | teddy bear | toy robot",
    "nook": """asleep on a windowsill | curled up in an armchair | peeking out of a cardboard box | on a stack of books
        | in a laundry basket | under the kitchen table | in front of a fireplace | on a piano stool | in a bathtub""",
    "outing": """chasing leaves | wearing a tiny backpack | in a bicycle basket | leaping over a puddle
        | on a garden wall | digging in the sand | on a skateboard | in a field of daisies""",
    "room": """kitchen | living room | bedroom | library | attic | workshop | hotel lobby | classroom | laboratory
        | dining room | café | music room | spaceship cabin | bathroom | barber shop | reading nook""",
    "air": "cosy | cluttered | minimalist | rustic | elegant | old-fashioned | dusty | untidy | retro | airy",
    "fitting": """a velvet sofa | large windows | a spiral staircase | wooden beams | a round table | a tiled stove
        | tall bookshelves | a checkered floor | green walls | an ornate mirror""",
    "extra": """many houseplants | a sleeping dog | a brass chandelier | a woven rug | a rocking chair
        | a bowl of lemons | an upright piano | framed pictures | an aquarium | a vase of tulips""",
    "food": """a bowl of ramen | a plate of spaghetti | a slice of chocolate cake | a stack of pancakes
        | a loaf of sourdough bread | a fruit salad | a cheeseburger | a pizza | a plate of sushi
        | a bowl of tomato soup | an apple pie | a tray of croissants | a curry with rice | a cheese board""",
    "drink": "a cup of coffee | a glass of orange juice | a pot of green tea | a mug of cocoa | a jug of lemonade",
    "surface": """a wooden table | a marble counter | a white plate | a linen tablecloth | a windowsill | a slate board
        | a silver tray | a picnic blanket | a workbench | a lace doily | a stone step""",
    "fruit": """apples | lemons | pears | figs | cherries | peaches | strawberries | oranges | plums | pomegranates
        | bananas | pineapples | tomatoes | pumpkins | walnuts | limes | mushrooms | artichokes""",
    "number": "two | three | four | five | six | seven | eight | nine | a dozen",
    "object": """teapot | pocket watch | typewriter | hourglass | camera | key | lantern | alarm clock | toy car
        | candle | compass | chess piece | radio | violin | desk lamp | music box | umbrella | shoe | telephone | hat
        | acorn | egg | spinning top | rocking horse | birdcage | backpack | kettle | anchor""",
    "things": "balloons | candles | books | pencils | marbles | buttons | teacups | paper boats | dice | keys",
    "vase": "vase | bowl | jar | bucket | basket | box | teacup | watering can | bottle | crate",
    "beside": "beside | next to | to the left of | to the right of | in front of | behind",
    "colour": "red | blue | yellow | green | orange | purple | pink | turquoise | white | black | grey | brown | teal",
    "material": """brass | wooden | glass | porcelain | silver | copper | paper | marble | crystal | knitted | clay
        | ice | velvet | stone | chocolate | felt | wicker | bronze | jade | transparent""",
    "flower": "rose | tulip | sunflower | dandelion | orchid | cornflower | marigold | bluebell | daffodil",
    # Under water, and parts of the special forms.
    "undersea": "a {fish} {reef} | a {mood} {fish} {reef} | {number} {fish}s {reef} | a diver and a {fish} {reef}",
    "fish": "sea turtle | seahorse | manta ray | humpback whale | dolphin | seal | lobster | angel shark | hermit crab",
    "reef": "above a coral reef | in a kelp forest | in deep blue water | near the seabed | in a sea cave",
    "bug": "honeybee | ladybird | dragonfly | butterfly | green beetle | snail | ant | caterpillar | moth | tree frog",
    "tiny": """dew drops on a spider web | frost on a window | a peacock feather | the gears of a watch | a cat's eye
        | a snowflake on wool | a drop of ink in water | moss on a stone | salt crystals | a fern uncurling""",
    "poster": "vintage travel | minimalist | screen-printed | retro science fiction | art deco",
    "costume": "a tiny wizard hat | a knitted jumper | a bow tie | a space suit | a lace collar | round glasses",
    "world": "a tiny forest | a miniature city | a stormy sea | a galaxy | an island village | a snowy mountain",
    "vessel": """a glass bottle | a teacup | a light bulb | a snow globe | a soap bubble | a pocket watch | an open book
        | a seashell | a walnut shell | an hourglass | an old suitcase""",
    "word": "open | hello | welcome | bakery | coffee | books | thank you | good morning | fresh fish | dream",
    # Light and weather.
    "when": """at sunrise | at sunset | at dusk | at golden hour | at night | under a full moon | under a starry sky
        | in heavy rain | in falling snow | in autumn | in spring | on a foggy morning | on a rainy afternoon
        | on a bright summer day | after the rain | under a stormy sky | under a clear blue sky | in the midday sun""",
    "weather": """golden hour | soft morning light | dramatic clouds | blue hour | thick fog | overcast sky
        | long shadows | light rain | fresh snow | backlit | moonlight | warm evening light | clear night sky""",
    "lit": """by candlelight | lit by a single lamp | in soft window light | in warm lamplight | late at night
        | on a grey morning | early in the morning | in bright daylight | in dim light | under neon light""",
    "light": "soft window light | warm lamplight | candlelight | studio lighting | neon glow | dramatic shadows",
    # Media and styles; all words about colour are in {finish}, so that no two contradict each other.
    "medium": "{photo} | {painting} | {drawing} | {drawing} | {craft}",
    "photo": "a photo | a photo | a photograph | a candid photo | an old photo | a film photo | a cinematic shot",
    "view": "wide shot | low angle | high angle | seen from behind | seen through leaves | from a distance",
    "lens": "shallow depth of field | sharp focus | soft focus | bokeh | film grain | 35mm | 50mm lens",
    "painting": """an oil painting | a watercolour | an acrylic painting | an impressionist painting
        | a gouache painting | a fresco | a digital painting | a matte painting | an ink wash painting""",
    "brush": "loose brushwork | thick paint | soft edges | visible canvas | bold strokes | fine detail",
    "drawing": """a 3D render | a pencil sketch | pixel art | concept art | a charcoal drawing | an ink drawing
        | a low poly render | a children's book illustration | a flat vector illustration | a woodblock print
        | a linocut | a comic panel | a pastel drawing | line art | an isometric illustration | a vintage postcard""",
    "craft": """a mosaic | a stained glass window | an embroidery | a tapestry | an origami model | a paper collage
        | a clay model | a bronze statue | a felt diorama | a chalk drawing | a mural | a wood carving | a sticker""",
    "style": """oil on canvas | watercolour | pencil sketch | 3D render | pixel art | low poly | flat illustration
        | isometric | anime style | comic book style | art nouveau | art deco | impressionism | cubism | surrealism
        | baroque | woodblock print | linocut | ink drawing | charcoal | pastel | paper cut-out | origami
        | stained glass | mosaic | embroidery | stop motion | gouache | storybook illustration | concept art
        | digital painting | cinematic still | vaporwave | pop art | synthwave | steampunk | solarpunk | pointillism""",
    "finish": """highly detailed | muted colours | vivid colours | pastel colours | warm tones | cool tones
        | high contrast | limited palette | symmetrical composition | dreamy | black and white | simple shapes""",
}
GRAMMAR = {name: " ".join(alternatives.split()).split(" | ") for name, alternatives in RULES.items()}

SLOT = re.compile(r"\{(\w+)\}")
AN = re.compile(r"\ba (?=(?!unicorn|ukulele)[aeiou]|hour)")  # the rules write "a" everywhere; here it becomes "an"
LONG_WORD = re.compile(r"\w{5,}")
PATIENCE = 2000  # draws in a row without a new prompt before the grammar counts as used up


def ways(name: str) -> int:
    """How many ways there are to fill the rule: an upper bound on its distinct prompts."""
    return sum(math.prod(ways(slot) for slot in SLOT.findall(text)) for text in GRAMMAR[name])


def expand(text: str, rng: random.Random) -> str:
    """Fill every {slot} of ``text``, recursively."""
    return SLOT.sub(lambda slot: expand(rng.choice(GRAMMAR[slot[1]]), rng), text)


def prompts(count: int = 4000, seed: int = 0) -> list[str]:
    """``count`` distinct English prompts, the same for the same seed; a smaller count gives the first of them.

    All fit in CLIP's 77 tokens. Raises ValueError if the grammar cannot give ``count`` different ones.
    """
    limit = ways("prompt")
    if not 0 <= count <= limit:
        raise ValueError(f"prompts() was asked for {count} distinct prompts; the grammar gives 0 to {limit}")
    rng, distinct, misses = random.Random(seed), {}, 0  # distinct: a dict, as a set that keeps the order
    while len(distinct) < count:
        text = AN.sub("an ", expand("{prompt}", rng))
        words = LONG_WORD.findall(text)
        if text not in distinct and len(set(words)) == len(words):  # the same long word twice reads badly: draw again
            distinct[text], misses = None, 0
        elif (misses := misses + 1) == PATIENCE:
            raise ValueError(
                f"prompts() was asked for {count} distinct prompts; the grammar ran out at {len(distinct)}"
            )
    return list(distinct)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a UTF-8 text file, one per line, blank lines skipped.

    Raises FileNotFoundError if there is no such file, ValueError if it is not UTF-8 text or has no prompt.
    """
    path, advice = Path(path), "give a UTF-8 text file with one prompt per line"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: {advice}")
    data = path.read_bytes()
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {advice}") from error
    if b"\0" in data:  # valid UTF-8, but not text
        raise ValueError(f"{path} is not UTF-8 text: {advice}")
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{path} has no prompts: {advice}")
    return lines


def prompt_split(model_folder: Path, file: Path | None = None) -> tuple[list[str], list[str]]:
    """Prompts to learn from, and prompts held out for evaluation.

    They come from a text ``file`` (one per line); else from the captions in the model folder's ``compositions.json``,
    which says which are held out; else from our own list. Raises ValueError if ``compositions.json`` lacks either kind.
    """
    compositions = model_folder / "compositions.json"
    if file is None and compositions.is_file():
        with reading(compositions):
            rows = json.loads(compositions.read_text(encoding="utf-8"))
            learned = [r["caption"] for r in rows if not r["held_out"]]
            held_out = [r["caption"] for r in rows if r["held_out"]]
        if not (learned and held_out):
            raise ValueError(f"{compositions} must have captions to learn from and captions that are held out.")
        return learned, held_out
    return every_tenth_held_out(read_prompts(file) if file else prompts())


def every_tenth_held_out(listed: Iterable[str]) -> tuple[list[str], list[str]]:
    """Distinct prompts to learn from, and every tenth for evaluation. A single prompt serves as both."""
    distinct = list(dict.fromkeys(listed))
    held_out = distinct[::10]
    return [p for i, p in enumerate(distinct) if i % 10] or held_out, held_out


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of the items, evenly spread, because neighbours in a list of prompts are alike."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
