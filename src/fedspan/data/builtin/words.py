"""Word lists behind the generated instruction tasks: common English words, written for this package."""


def _pairs(text: str) -> dict[str, str]:
    """Read ``"a/b c/d"`` as ``{"a": "b", "c": "d"}``."""
    return dict(pair.split("/") for pair in text.split())


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ANTONYM_PAIRS = _pairs(
    "big/small hot/cold happy/sad good/bad up/down in/out day/night fast/slow old/young hard/soft "
    "light/dark wet/dry full/empty open/closed loud/quiet high/low long/short near/far rich/poor "
    "strong/weak clean/dirty first/last left/right yes/no new/used early/late boy/girl man/woman "
    "mother/father brother/sister king/queen love/hate win/lose push/pull give/take come/go "
    "stop/start laugh/cry awake/asleep brave/scared top/bottom front/back inside/outside"
)

OPPOSITES: dict[str, str] = _ANTONYM_PAIRS | {b: a for a, b in _ANTONYM_PAIRS.items()}

PLURALS: dict[str, str] = _pairs(
    "cat/cats dog/dogs bird/birds tree/trees car/cars ball/balls book/books toy/toys bed/beds hat/hats "
    "cup/cups door/doors flower/flowers star/stars rock/rocks friend/friends girl/girls boy/boys "
    "apple/apples cake/cakes hand/hands eye/eyes game/games bear/bears duck/ducks frog/frogs "
    "box/boxes fox/foxes bus/buses dress/dresses dish/dishes bush/bushes wish/wishes "
    "baby/babies bunny/bunnies puppy/puppies city/cities lady/ladies story/stories party/parties "
    "leaf/leaves wolf/wolves knife/knives mouse/mice foot/feet tooth/teeth goose/geese "
    "man/men woman/women child/children fish/fish sheep/sheep"
)

PAST: dict[str, str] = _pairs(
    "play/played look/looked walk/walked jump/jumped help/helped want/wanted smile/smiled like/liked "
    "love/loved open/opened call/called ask/asked laugh/laughed talk/talked climb/climbed stop/stopped "
    "hug/hugged try/tried cry/cried live/lived move/moved wait/waited cook/cooked clean/cleaned "
    "go/went see/saw say/said run/ran eat/ate find/found make/made take/took come/came give/gave "
    "get/got know/knew think/thought feel/felt tell/told hear/heard sing/sang swim/swam fly/flew "
    "sit/sat sleep/slept fall/fell bring/brought buy/bought catch/caught write/wrote ride/rode "
    "draw/drew hide/hid win/won lose/lost hold/held"
)

ANIMALS: tuple[str, ...] = _words(
    "cat dog bird fish bear rabbit mouse frog duck lion fox cow pig horse sheep monkey bee ant "
    "butterfly elephant tiger wolf owl turtle goat hen snake bunny puppy kitten spider whale"
)
FOODS: tuple[str, ...] = _words(
    "apple cake bread milk soup cookie banana pie candy cheese egg rice carrot orange pizza honey "
    "butter jam meat berry corn salad sandwich potato tomato lemon"
)
COLORS: tuple[str, ...] = _words("red blue green yellow black white pink brown purple gray")
OBJECTS: tuple[str, ...] = _words(
    "ball box car bed hat book toy chair table door tree house boat train truck cup flower rock star "
    "doll lamp shoe coat window clock key pencil stick rope bag kite swing bell drum plane bike"
)
