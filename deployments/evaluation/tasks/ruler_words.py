"""Ordinary English words for RULER's keys and lists, which the benchmark takes from a package."""

_ADJECTIVES = """
abrupt ample ancient angry anxious arid austere bitter blunt bold brave brief bright brisk broad busy calm candid
careful cheap cheerful civil clean clear clever clumsy coarse cold common cosy crisp crooked cruel curious damp daring
dark deep delicate dense dim distant dizzy dull dusty eager early earnest elderly empty even faint fair faithful
famous fancy fast fertile fierce final firm flat foreign formal fragile frank fresh frosty full gentle giant glad
gloomy golden graceful grand grave greedy guilty handsome happy hard harsh hasty heavy hollow honest huge humble
hungry icy idle innocent jolly keen kind large late lazy lean level light little lively lonely loose loud loyal lucky
mad mature merry mild modest moody muddy narrow neat nervous noble noisy obscure odd open pale patient plain playful
pleasant polite poor proud prudent quaint quick quiet rapid rare raw ready rich rigid ripe rough round royal rude
rural rusty sad safe salty scarce secret severe shallow sharp short shy silent silver simple slim slow small smooth
sober soft solemn solid sour spare square stable steady steep stern stiff still strange strict strong stubborn sturdy
subtle sudden sunny sweet swift tall tame tender thick thin tidy tight tired tough tranquil urgent useful vague vast
vivid warm wary weak wealthy weary wet wide wild wise witty wooden worthy young zealous
"""

_NOUNS = """
acorn airport almond anchor ankle antler apron arrow artist attic avenue badge bakery balcony banana banner barn
barrel basin basket beacon beaver bench berry bicycle blanket blossom boat bottle boulder bowl branch bread brick
bridge brook broom bucket buffalo button cabin cactus camel candle canoe canvas canyon captain carpet castle cavern
cellar chapel chart cherry chimney circus citizen clarinet cliff clock cloud clover coach cobbler coffee collar comet
compass copper corner cottage cotton cradle crane crater crayon cricket crown cupboard curtain cushion dagger daisy
dancer desert dolphin donkey doorway dragon drawer drum eagle easel elbow elephant emerald engine envelope falcon
farmer feather fence ferry fiddle finger flag flame flute forest fountain fox galaxy garden garlic gate glacier glove
goose grape guitar hammer hammock harbor harvest hedge helmet heron hill hockey honey horizon hospital hotel island
ivory jacket jaguar jewel jungle kettle keyboard kitchen kite knight ladder lagoon lake lantern lemon letter library
lion lizard lobster locket magnet mango maple marble market meadow medal melon mirror mitten monkey moon mountain
museum mushroom napkin needle nest notebook oak oasis ocean olive onion orchard otter oven owl oyster paddle palace
panda parade parrot pasture peach peacock pebble pencil pepper piano pigeon pillow pirate planet plate plum pocket
pond poppy prairie prince pumpkin puppet puzzle quilt rabbit radish raft rainbow raven reef ribbon river robin rocket
roof rose saddle sailor salmon sandal scarf school shadow shell shovel signal singer slipper snow soldier spider spoon
squirrel stable station statue stove stream sugar summer sunset swan sword tailor teacher temple tent theater thimble
thunder tiger timber tomato torch tower tractor train trumpet tulip tunnel turtle umbrella valley vase velvet village
violin wagon walnut walrus water whale wheat window winter wizard wolf writer yacht zebra
"""


def pairs() -> list[str]:
    """All words "adjective-noun", sorted."""
    return sorted({f"{adjective}-{noun}" for adjective in _ADJECTIVES.split() for noun in _NOUNS.split()})


def single() -> list[str]:
    """All single words, sorted."""
    return sorted({*_ADJECTIVES.split(), *_NOUNS.split()})
