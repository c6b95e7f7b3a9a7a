"""Commands to a voice assistant: the data set ``builtin:commands``, made on the spot from hand-written templates.

A row is a template with its slots filled, fillers around it and now and then a typo, in lower case as a speech
recogniser would write it. The wordings themselves are held out: validation and test are made from templates that
training never sees, so a model has to understand a wording and cannot get by on remembering it.

What this file does not do: stand in for real recordings. Slot values, fillers and typos are the same in all splits;
only the templates differ.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from pipeline.tasks.base import SPLITS, Row

ROWS_PER_INTENT = {"train": 90, "validation": 17, "test": 28}
TRAIN_TEMPLATES = 7
VALIDATION_TEMPLATES = 2

OPENING_RATE = 0.45
CLOSING_RATE = 0.35
TYPO_RATE = 0.15
TYPO_MIN_LETTERS = 4
"""Shorter words keep their spelling: "on", "off" and "up" often decide the intent."""

# The split is by position: seven templates of an intent are for training, the next two for validation, the other three
# for test. Each split starts on a line of its own.
INTENTS: dict[str, tuple[str, ...]] = {
    "set_alarm": (
        "set an alarm for {time}", "wake me up at {time}", "set my alarm for {time} {day}", "i need an alarm at {time}",
        "alarm for {day} at {time}", "create a new alarm", "i have to be up by {time} {day}",
        "put an alarm on for {time}", "i have to get up at {time} {day}",
        "get me out of bed at {time}", "add an alarm {day} at {time}", "my alarm should ring at {time}",
    ),
    "cancel_alarm": (
        "cancel my alarm", "delete the alarm for {time}", "turn off the {time} alarm", "i don't need the alarm {day}",
        "remove all my alarms", "stop the alarm", "forget the alarm at {time}",
        "disable the alarm for {day}", "cancel all alarms for {day}",
        "i don't want an alarm {day}", "switch off my {time} alarm", "don't wake me up at {time}",
    ),
    "set_timer": (
        "set a timer for {duration}", "start a timer of {duration}", "count down {duration}", "timer for {duration}",
        "let me know in {duration}", "set the oven timer to {duration}", "time {duration}",
        "put {duration} on the clock", "remind me in {duration} that the eggs are done",
        "begin a countdown of {duration}", "i need a timer that runs {duration}", "beep after {duration}",
    ),
    "play_music": (
        "play {song}", "play some {genre}", "put on {song} by {artist}", "i want to hear {artist}", "start my {genre} playlist",
        "play music by {artist}", "let me listen to {genre}",
        "queue up {song}", "shuffle songs by {artist}",
        "start a playlist with {artist}", "throw on some {genre}", "i'm in the mood for {genre} music",
    ),
    "pause_music": (
        "pause the music", "stop playing", "pause this song", "stop the music", "hold the playback", "pause {artist}",
        "stop this playlist",
        "halt the music", "put the music on pause",
        "quit playing {artist}", "make the music stop", "no more music for now",
    ),
    "next_song": (
        "next song", "skip this song", "skip to the next track", "play the next one", "i don't like this song",
        "go to the next song", "skip {artist}",
        "jump to the next track", "play something different from this",
        "move on to the next tune", "next track", "not {artist} again give me another song",
    ),
    "volume_up": (
        "turn it up", "turn up the volume", "make it louder", "volume up", "raise the volume by {percent}", "it's too quiet",
        "i can't hear it",
        "turn up the sound", "louder",
        "make the music louder", "bump the volume up a notch", "i can barely hear {artist}",
    ),
    "volume_down": (
        "turn it down", "turn down the volume", "make it quieter", "volume down", "lower the volume to {percent}",
        "it's too loud", "less noise",
        "bring the sound down", "quieter",
        "the music is too loud", "turn the sound down a notch", "not so loud",
    ),
    "lights_on": (
        "turn on the lights", "turn the {room} lights on", "switch on the {room} lamp", "lights on in the {room}",
        "light up the {room}", "i need light in the {room}", "make the {room} brighter",
        "put the {room} lights on", "it's too dark in the {room}",
        "i can't see a thing in the {room}", "get the {room} lamp on", "we need more light in the {room}",
    ),
    "lights_off": (
        "turn off the lights", "turn the {room} lights off", "switch off the {room} lamp", "lights out in the {room}",
        "kill the {room} lights", "i don't need light in the {room}", "make it dark",
        "shut the {room} lights off", "it's too bright in the {room}",
        "no more light in the {room}", "lamp off in the {room}", "shut off every light in the {room}",
    ),
    "set_temperature": (
        "set the temperature to {degrees}", "make the {room} warmer", "turn the heat up to {degrees}", "turn down the heating",
        "set the thermostat to {degrees}", "cool the {room} to {degrees}", "i'm cold",
        "heat the {room} to {degrees}", "it's freezing in the {room}",
        "change the thermostat to {degrees}", "bring the {room} to {degrees}", "it's way too hot in the {room}",
    ),
    "weather": (
        "what's the weather in {city}", "how is the weather {day}", "will it rain {day}", "weather forecast for {city}",
        "do i need an umbrella {day}", "is it cold in {city}", "what's the temperature in {city}",
        "is it going to snow in {city}", "how hot will it get {day}",
        "will i need a jacket {day}", "is the sun out in {city}", "what's the forecast for {day}",
    ),
    "calendar_query": (
        "what's on my calendar {day}", "do i have any meetings {day}", "when is my {event}", "what time is the {event}",
        "show me my schedule for {day}", "am i free {day} at {time}", "what are my plans {day}",
        "read me my appointments for {day}", "is there anything on my calendar {day}",
        "what does my schedule look like {day}", "am i busy {day} at {time}", "do i have a {event} {day}",
    ),
    "add_event": (
        "add a {event} to my calendar", "schedule a {event}", "put a {event} on my calendar", "new event {day} at {time}",
        "book a {event} at {time}", "make an appointment at {time}", "plan a {event} {day}",
        "note down the {event} for {day}", "block {time} for the {event}",
        "enter a {event} {day} at {time}", "mark {day} for my {event}", "create an appointment at {time} {day}",
    ),
    "send_message": (
        "send a message to {contact}", "text {contact} that {message}", "tell {contact} that {message}",
        "write to {contact} that {message}", "message {contact}", "let {contact} know that {message}", "send {contact} a text",
        "shoot {contact} a message", "drop {contact} a line that {message}",
        "inform {contact} that {message}", "reply to {contact} with {message}", "type out a text for {contact}",
    ),
    "make_call": (
        "call {contact}", "phone {contact}", "make a call to {contact}", "dial {contact}", "give {contact} a call",
        "start a video call", "i want to talk to {contact}",
        "ring {contact}", "get {contact} on the phone",
        "i need to talk with {contact}", "put me through to {contact}", "try to call {contact}",
    ),
    "navigate": (
        "navigate to {place}", "take me to {place}", "how do i get to {place}", "directions to {place}",
        "show me the way to {place}", "start a route to {city}", "find the fastest way to {city}",
        "guide me to {place}", "which is the way to {place}",
        "i want to go to {place}", "lead me to {city}", "how can i get to {city}",
    ),
    "traffic": (
        "how is the traffic", "is there traffic on the way to {place}", "any jams near {city}",
        "how long is the drive to {place}", "traffic report", "how bad is the traffic", "are the roads clear to {city}",
        "is there a traffic jam near {place}", "any accidents on the road to {city}",
        "is the highway to {city} blocked", "how busy are the roads near {place}", "any delays on the drive to {place}",
    ),
    "shopping_add": (
        "add {item} to my shopping list", "put {item} on the list", "we need {item}", "i have to buy {item}",
        "we are out of {item}", "add {item} and {item} to the groceries", "write down {item}",
        "don't let me forget to buy {item}", "include {item} in my groceries",
        "get {item} on the shopping list", "we're running low on {item}", "{item} should go on my list",
    ),
    "shopping_query": (
        "what's on my shopping list", "read me the shopping list", "do i need to buy {item}", "is {item} on my list",
        "show me the grocery list", "what do i have to buy", "have i put {item} on the list",
        "what groceries do we need", "how many things are on my shopping list",
        "did i put {item} on the shopping list", "what should i buy {day}", "what is still on the grocery list",
    ),
    "translate": (
        "translate {phrase} to {language}", "how do you say {phrase} in {language}", "what is {phrase} in {language}",
        "the {language} word for {phrase}", "say {phrase} in {language}", "what's {language} for {phrase}", "translate {phrase}",
        "translate {phrase} into {language}", "how would they put {phrase} in {language}",
        "how does {phrase} sound in {language}", "turn {phrase} into {language}", "give me {phrase} in {language}",
    ),
    "define_word": (
        "what does {word} mean", "define {word}", "what is the meaning of {word}", "look up the word {word}",
        "the definition of {word}", "what is {word}", "explain the word {word}",
        "what's {word} supposed to mean", "tell me the meaning of {word}",
        "how would you explain {word}", "i don't understand the word {word}", "give me the meaning of {word}",
    ),
    "math": (
        "what is {number} plus {number}", "calculate {number} times {number}", "{number} minus {number}",
        "add {number} and {number}", "divide {number} by {number}", "multiply {number} by {number}", "{percent} of {number}",
        "solve {number} minus {number}", "subtract {number} from {number}",
        "how much is {number} plus {number}", "what's {number} divided by {number}", "take {number} away from {number}",
    ),
    "tell_joke": (
        "tell me a joke", "make me laugh", "say something funny", "do you know a joke", "i want to hear a joke",
        "tell me a joke about {topic}", "give me a joke",
        "do you have a joke", "crack a joke about {topic}",
        "cheer me up with something funny", "do you know anything funny about {topic}", "amuse me",
    ),
    "news": (
        "what's the news", "tell me the news", "read me the headlines", "what's happening in {city}", "any news about {topic}",
        "give me the latest on {topic}", "play the news",
        "what's the latest on {topic}", "is there news from {city}",
        "give me the headlines", "what happened in {city} today", "show me the news about {topic}",
    ),
    "lock_door": (
        "lock the door", "lock the {door}", "lock up the house", "make sure the {door} is locked", "lock all the doors",
        "close and lock the {door}", "secure the {door}",
        "bolt the {door}", "put the lock on the {door}",
        "don't leave the {door} open", "make the {door} safe for the night", "see that the {door} is locked up",
    ),
    "open_garage": (
        "open the garage", "open the garage door", "lift the garage door", "open up the garage", "let me into the garage",
        "raise the garage door", "get the garage open",
        "roll up the garage door", "garage open",
        "i need to get the car out", "open the garage for my car", "the garage door should be up",
    ),
    "find_phone": (
        "find my phone", "where is my phone", "i lost my phone", "ring my phone", "make my phone ring", "help me find my phone",
        "i can't find my phone",
        "locate my phone", "where did i leave my phone",
        "my phone is gone", "where did my phone go", "let my mobile ring",
    ),
    "battery_status": (
        "how much battery is left", "what's my battery level", "battery status", "is my phone charged",
        "how long will the battery last", "do i need to charge my phone", "battery check",
        "how full is the battery", "what percentage is my battery at",
        "how much power is left", "do i have to plug in my phone", "is the battery low",
    ),
    "take_photo": (
        "take a photo", "take a picture of {subject}", "snap a picture", "open the camera", "take a selfie",
        "i want a photo of {subject}", "photograph {subject}",
        "shoot a photo of {subject}", "get a picture of {subject}",
        "capture {subject}", "use the camera on {subject}", "get a good shot of {subject}",
    ),
}  # fmt: skip


def _values(text: str) -> tuple[str, ...]:
    return tuple(value.strip() for value in text.split(","))


# Values that sound like other intents ("lights out", "garage door", "the door is locked") are there on purpose.
SLOTS: dict[str, tuple[str, ...]] = {
    "artist": _values("mozart, the beatles, miles davis, madonna, abba, queen, nina simone, bob marley, adele, bach, prince"),
    "city": _values("london, paris, berlin, new york, madrid, tokyo, rome, boston, vienna, chicago, oslo, lisbon, sydney"),
    "contact": _values("anna, tom, my mom, dad, my boss, sarah, doctor miller, grandma, the office, peter, my brother, julia"),
    "day": _values("today, tomorrow, monday, tuesday, wednesday, thursday, friday, saturday, sunday, next week, this weekend"),
    "degrees": _values("eighteen degrees, nineteen degrees, twenty degrees, twenty two degrees, sixty eight degrees, seventy"),
    "door": _values("front door, back door, garage door, side door, cellar door, patio door, balcony door, main entrance"),
    "duration": _values("five minutes, ten minutes, an hour, half an hour, ninety seconds, two hours, a minute, forty minutes"),
    "event": _values("dentist appointment, team meeting, birthday party, doctor visit, yoga class, job interview, haircut"),
    "genre": _values("jazz, rock, classical, hip hop, blues, country, reggae, techno, folk, soul, eighties, disco"),
    "item": _values("milk, eggs, bread, butter, apples, light bulbs, batteries, coffee, rice, tomatoes, cheese, dish soap"),
    "language": _values("spanish, french, german, italian, japanese, dutch, polish, swedish, chinese, portuguese, turkish"),
    "message": _values(
        "i am running late, dinner is at seven, we need milk, the door is locked, my phone is dead, it is raining, "
        "i will call back, the meeting is off, there is a lot of traffic, i am on my way, the lights are still on"
    ),
    "number": _values("three, seven, nine, twelve, fifteen, eighteen, twenty four, thirty, forty two, sixty, ninety, a hundred"),
    "percent": _values("ten percent, twenty percent, thirty percent, fifty percent, sixty percent, eighty percent"),
    "phrase": _values("good morning, thank you, where is the station, i am hungry, good night, turn left, the light is red"),
    "place": _values("the airport, the office, the train station, the pharmacy, the stadium, the hospital, my house, the beach"),
    "room": _values("kitchen, bedroom, living room, bathroom, garage, hallway, office, cellar, dining room, nursery"),
    "song": _values("yesterday, light my fire, call me maybe, turn the page, lights out, volare, dancing queen, hey jude"),
    "subject": _values("us, the kids, this, the dog, the whole group, the sunset, my dinner, grandma, the cake, this page"),
    "time": _values("six, seven, half past six, eight thirty, a quarter to nine, noon, five a m, ten fifteen, six forty five"),
    "topic": _values("football, politics, cats, the election, doctors, robots, the economy, space, teachers, the weather"),
    "word": _values("serendipity, entropy, ubiquitous, irony, nostalgia, pragmatic, quorum, paradox, stoic, candid, alarm"),
}

FILLERS: dict[str, tuple[str, ...]] = {
    "opening": _values("hey, um, uh, okay, so, hi there, alright, well, hey assistant, sorry, listen, oh"),
    "opening of a request": _values("could you, can you, would you, please, hey can you, i need you to, um could you, just"),
    "closing": _values("please, thanks, thank you, for me, right now, now, okay, if you can, when you can, um"),
}
# "could you" only goes before a verb; templates that begin with one of these words do not begin with a verb.
NOT_A_REQUEST = frozenset(_values(
    "alarm, am, any, are, battery, did, directions, do, don't, garage, have, how, i, i'm, is, it's, lamp, less, "
    "lights, louder, my, new, next, no, not, quieter, the, timer, traffic, volume, we, we're, weather, what, "
    "what's, when, where, which, will"
))  # fmt: skip


def command_rows(seed: int = 0) -> dict[str, list[Row]]:
    """The rows of each split; the same seed gives the same rows on every machine, as many of each intent in each split."""
    rng = random.Random(seed)
    seen: set[str] = set()
    rows: dict[str, list[Row]] = {}
    for split in SPLITS:
        rows[split] = []
        for intent, templates in INTENTS.items():
            texts = distinct_texts(split_templates(templates)[split], ROWS_PER_INTENT[split], seen, rng)
            rows[split].extend({"text": text, "label": intent} for text in texts)
        rng.shuffle(rows[split])
    return rows


def split_templates(templates: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Which templates of an intent belong to which split, by position."""
    test = TRAIN_TEMPLATES + VALIDATION_TEMPLATES
    return {
        "train": tuple(templates[:TRAIN_TEMPLATES]),
        "validation": tuple(templates[TRAIN_TEMPLATES:test]),
        "test": tuple(templates[test:]),
    }


def distinct_texts(templates: Sequence[str], count: int, seen: set[str], rng: random.Random) -> Iterator[str]:
    """Take templates in turn; yield ``count`` texts that are not in ``seen``, and add them to it. Typos make them endless."""
    for index in range(count):
        text = utterance(templates[index % len(templates)], rng)
        while text in seen:
            text = utterance(templates[index % len(templates)], rng)
        seen.add(text)
        yield text


def utterance(template: str, rng: random.Random) -> str:
    """One way of saying a template: slots filled, fillers before and after, typos."""
    text = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(SLOTS[slot[1]]), template)
    if rng.random() < OPENING_RATE:
        text = f"{rng.choice(openings(template))} {text}"
    if rng.random() < CLOSING_RATE:
        text = f"{text} {rng.choice(FILLERS['closing'])}"
    while rng.random() < TYPO_RATE:
        text = with_typo(text, rng)
    return text


def openings(template: str) -> tuple[str, ...]:
    """Fillers that can stand before a template."""
    first = template.split()[0]
    if first in NOT_A_REQUEST or first.startswith("{"):
        return FILLERS["opening"]
    return FILLERS["opening"] + FILLERS["opening of a request"]


def with_typo(text: str, rng: random.Random) -> str:
    """Swap two neighbouring letters, drop one or double one, in one word; texts of short words only stay as they are."""
    words = text.split(" ")
    long_words = [i for i, word in enumerate(words) if word.isalpha() and len(word) >= TYPO_MIN_LETTERS and len(set(word)) > 1]
    if not long_words:
        return text
    index = rng.choice(long_words)
    word = words[index]
    at = rng.choice([i for i in range(len(word) - 1) if word[i] != word[i + 1]])
    swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    dropped = word[:at] + word[at + 1 :]
    doubled = word[: at + 1] + word[at:]
    words[index] = rng.choice((swapped, dropped, doubled))
    return " ".join(words)
