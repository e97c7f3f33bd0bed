"""Build the demo's text-to-SQL data, and score a model's answers by running them.

Every row asks one question about a small database and answers it with one SQL query. Training and validation
use different databases, which share no table and no column apart from `id` and `name`: the score tells
whether a model learned to write SQL, not whether it remembers tables.

    python scripts/text_to_sql.py --output build/text-to-sql --train 1200 --validation 100 --seed 0

The same seed gives the same bytes. Wordings name the columns they mean, so that only one result is right.
Every query is run while it is made, and one with an empty result is thrown away.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROWS_PER_TABLE = 12
JOIN_SHARE = 0.4  # of the draws about a database of two tables; one database in six has two
TRIES = 1_000  # draws before a database counts as asked out
PROGRESS_INTERVAL, PROGRESS_CALLS = 1_000, 1_000  # a query may take a million steps of SQLite's machine
SAFE_FUNCTIONS = {"abs", "avg", "count", "length", "like", "lower", "max", "min", "round", "sum", "total", "upper"}

# Values that columns draw from: a table's first column takes twelve different ones, any other column four.
ADJECTIVES = ("Blue", "Broken", "Golden", "Hidden", "Last", "Lost", "Red", "Silent")
NOUNS = ("Bridge", "Forest", "Garden", "Letter", "River", "Road", "Summer", "Tower")
POOLS = {
    "people": "Alice Amir Bella Boris Carla Chen Diego Dora Elena Emil Farah Felix Greta Hugo Ines Jonas",
    "titles": ",".join(f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS),
    "cities": "Berlin Boston Cairo Chicago Delhi Dublin Geneva Lima London Madrid Milan Munich Oslo Paris",
    "countries": "Brazil Canada Chile China Egypt France Germany Greece India Italy Japan Kenya Norway Peru",
    "goods": "ball basket bench blanket bottle bowl brush candle chair clock cup desk kite knife lamp ladder",
    "dishes": "chili curry dumplings goulash gumbo lasagna moussaka paella pancakes pizza ramen ravioli stew",
    "rivers": "Arno Danube Ebro Elbe Ganges Indus Loire Mekong Murray Niger Oder Rhine Rhone Seine Thames",
    "peaks": "Ararat Belukha Castor Dent Eiger Huascaran Jannu Kamet Lenin Makalu Monviso Nuptse Pollux",
    "planets": "Arion Belisama Brahe Dimidium Draugr Galileo Harriot Janssen Lich Majriti Quijote Saffar Spe",
    "models": "Astra Bora Corsa Delta Escort Fiesta Golf Jazz Kuga Leon Megane Panda Polo Punto Tempra",
    "pets": "Balu Bibi Coco Daisy Duke Fifi Jojo Kiki Leo Luna Max Milo Nala Oreo Rocky Rusty Simba Tiger",
    "inns": "Alpina Astoria Bellevue Bristol Carlton Colonial Grand Imperial Majestic Palace Plaza Regent",
    "codes": "AF12 AF30 BA41 BA77 DL15 DL92 KL20 KL64 LH33 LH58 QF10 QF81 SK27 SK49 TK36 TK95",
    "farms": "Barnfield Brook Cedar Clover Eastgate Hillcrest Hollow Longacre Meadow Millbank Orchard Oxbow",
    "units": "Archive Audit Design Finance Legal Logistics Marketing Planning Press Quality Research Sales",
    "clubs": "Arsenal Aurora Barons Comets Dynamo Falcons Giants Hornets Hurricane Knights Rovers Titans",
    "scopes": "Cassini Chandra Euler Fermi Gaia Galex Halley Herschel Hubble Kepler Mercator Newton Spitzer",
    "wines": "Amarone Barolo Bonarda Cava Chianti Dolcetto Fleurie Gavi Lambrusco Margaux Medoc Orvieto",
    "volcanoes": "Agung Asama Bromo Cotopaxi Erebus Etna Fogo Hekla Katla Kelud Lanin Merapi Popa Taal",
    "bridges": "Angel Bosphorus Britannia Chapel Forth Galata Humber Kapell Mackinac Rialto Severn Tower",
    "ports": "Aden Antwerp Bergen Bilbao Cadiz Calais Dover Gdansk Genoa Hamburg Izmir Malmo Odessa Piraeus",
    "ships": "Albatross Argo Beagle Bounty Calypso Dawn Endeavour Fram Hermes Mayflower Nautilus Pelican",
    "pastries": "babka bagel baguette brioche brownie ciabatta cobbler crumble eclair muffin pretzel scone",
}

# One table a line: database, table/singular, then the columns after the `id` that every table has. A column
# is name=values, where values are a pool, a,list, a range, a range of years (@) or a range that may be added
# up (+). `~ phrase {}` is how a question may say that the column has a value; `->table` is an id over there.
TRAINING = """
music | singers/singer | name=people | country=countries ~ from {} | debut=1975-2020@
music | songs/song | title=titles | singer_id=->singers | seconds=120-420+
library | authors/author | name=people | nationality=French,German,Irish | birth_year=1850-1980@
library | books/book | title=titles | author_id=->authors | pages=90-800+
company | departments/department | name=units | building=North,South,West,East | budget=100-900+
company | employees/employee | name=people | department_id=->departments | salary=2000-9000+
kennel | owners/owner | name=people | town=cities ~ from {} | visits=1-40+
kennel | dogs/dog | name=pets | owner_id=->owners | weight=4-60
school | students/student | name=people | major=math,physics,art ~ studying {} | age=17-40 | credits=10-180+
cinema | movies/movie | title=titles | director=people ~ directed by {} | genre=comedy,drama | year=1960-2020@
shop | products/product | name=goods | category=toys,garden,sports,kitchen | price=2.5-90.5 | stock=5-300+
airport | flights/flight | code=codes | destination=cities ~ to {} | distance=200-9000+ | passengers=40-380+
hospital | patients/patient | name=people | condition=flu,asthma,fracture,migraine | ward=A,B,C | pulse=50-120
nature | rivers/river | name=rivers | state=countries ~ in {} | length=100-6000+ | depth=2-90
league | players/player | name=people | team=Lions,Bears ~ of the {} | role=keeper,striker | goals=1-60+
menu | dishes/dish | name=dishes | cuisine=Italian,Thai,Indian,Greek | cost=5-45 | calories=200-1200+
zoo | animals/animal | name=pets | species=lion,zebra,camel,otter | diet=plants,meat | birth_year=1998-2022@
travel | hotels/hotel | name=inns | city=cities ~ in {} | rating=2.0-5.0 | rooms=20-400+
garage | cars/car | model=models | brand=Ford,Fiat ~ made by {} | color=red,blue,white | mileage=100-9900
farming | farms/farm | name=farms | crop=wheat,corn,barley,rice ~ growing {} | area=5-95+ | workers=2-60+
bank | accounts/account | holder=people | branch=cities ~ at {} | type=savings,checking | balance=100-9900+
gym | members/member | name=people | plan=basic,silver,gold | visits=1-200+ | start_year=1990-2023@
arcade | games/game | title=titles | platform=PC,Switch,Xbox,Android ~ for {} | score=1.0-9.9 | levels=5-90+
space | planets/planet | name=planets | star=Sirius,Vega,Altair ~ around {} | moons=1-80+ | temperature=20-900
gallery | paintings/painting | title=titles | artist=people ~ by {} | style=cubist,baroque | width=20-300
press | articles/article | headline=titles | section=politics,science ~ in {} | comments=2-300+ | views=5-900+
hiking | mountains/mountain | name=peaks | range=Alps,Andes ~ in the {} | height=900-8000 | climbers=5-400+
football | clubs/club | name=clubs | manager=people ~ managed by {} | founding_year=1880-1990@ | fans=10-9900+
"""
HELD_OUT = """
astronomy | telescopes/telescope | name=scopes | site=Chile,Hawaii ~ in {} | diameter=1.0-9.9 | lenses=2-40+
cellar | wines/wine | name=wines | region=Tuscany,Rioja ~ from {} | vintage=1975-2020@ | bottles=10-900+
geology | volcanoes/volcano | name=volcanoes | status=active,dormant | elevation=500-6000 | eruptions=1-70+
roads | bridges/bridge | name=bridges | material=steel,stone ~ made of {} | span=50-1900+ | opening=1850-2020@
sailing | ports/port | name=ports | sea=Baltic,Aegean,Adriatic | docks=3-60+
sailing | ships/ship | name=ships | port_id=->ports | tonnage=100-9000+
bakery | pastries/pastry | name=pastries | baker=people ~ baked by {} | flavor=vanilla,lemon | grams=40-600+
"""


@dataclass(frozen=True)
class Column:
    """A column and how a question speaks of it. `kind` is text, number, year or key."""

    name: str
    kind: str
    values: tuple[Any, ...]
    phrase: str = ""
    summable: bool = False

    @property
    def words(self) -> str:
        """The name as one says it: `birth_year` is "birth year"."""
        return self.name.replace("_", " ")

    @property
    def counted(self) -> bool:
        """True for numbers of things, as in "more than 5 goals"."""
        return self.kind == "number" and self.name.endswith("s")


@dataclass(frozen=True)
class Table:
    """A table with its rows; `columns[0]`, the label, tells rows apart. `id` is not among the columns."""

    name: str
    noun: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]

    @property
    def label(self) -> Column:
        """The column that names a row: its name, title or code."""
        return self.columns[0]

    @property
    def header(self) -> str:
        """The line that shows the table in a prompt."""
        return f"Table {self.name}(id, {', '.join(column.name for column in self.columns)})"

    @property
    def texts(self) -> list[Column]:
        """The text columns, without the label."""
        return [column for column in self.columns[1:] if column.kind == "text"]

    @property
    def numbers(self) -> list[Column]:
        """The number and year columns, of which every table has one."""
        return [column for column in self.columns[1:] if column.kind in ("number", "year")]

    def values(self, column: Column) -> list[Any]:
        """The distinct values of a column, in order."""
        index = self.columns.index(column)
        return sorted({row[index] for row in self.rows})


# ── databases ─────────────────────────────────────────────────────────────────────────────────────────────


def parse_column(text: str) -> Column:
    """One column from its `name=values ~ phrase` notation, described above the tables."""
    notation, _, phrase = (part.strip() for part in text.partition("~"))
    name, _, values = notation.partition("=")
    if values.startswith("->"):
        return Column(name, "key", tuple(range(1, ROWS_PER_TABLE + 1)))
    if limits := re.fullmatch(r"([\d.]+)-([\d.]+)([@+]?)", values):
        low, high, mark = limits.groups()
        if "." in low:
            numbers = tuple(tenths / 10 for tenths in range(round(float(low) * 10), round(float(high) * 10) + 1))
        else:
            numbers = tuple(range(int(low), int(high) + 1))
        return Column(name, "year" if mark == "@" else "number", numbers, summable=mark == "+")
    pool = POOLS.get(values, values)
    return Column(name, "text", tuple(pool.split("," if "," in pool else None)), phrase)


def fill(column: Column, label: bool, rng: random.Random) -> list[Any]:
    """A column's values for all rows. Labels and numbers never repeat, so no ranking has ties."""
    if label or column.kind in ("number", "year"):
        return rng.sample(column.values, ROWS_PER_TABLE)
    if column.kind == "key":
        return rng.choices(column.values, k=ROWS_PER_TABLE)
    few = rng.sample(column.values, min(4, len(column.values)))
    values = few + rng.choices(few, k=ROWS_PER_TABLE - len(few))
    rng.shuffle(values)
    return values


@cache
def tables(held_out: bool) -> dict[str, tuple[Table, ...]]:
    """The tables of every training or held-out database. Their rows depend on the names alone, on no seed."""
    found: dict[str, tuple[Table, ...]] = {}
    for line in (HELD_OUT if held_out else TRAINING).strip().splitlines():
        owner, names, *notations = (part.strip() for part in line.split("|"))
        name, _, noun = names.partition("/")
        columns = tuple(parse_column(notation) for notation in notations)
        rng = random.Random(name)
        filled = [fill(column, column is columns[0], rng) for column in columns]
        table = Table(name, noun, columns, tuple(zip(*filled, strict=True)))
        found[owner] = (*found.get(owner, ()), table)
    return found


def database(name: str) -> sqlite3.Connection:
    """A fresh in-memory copy of a database, the same at every call. Raises ValueError for an unknown name."""
    known = tables(held_out=False) | tables(held_out=True)
    if name not in known:
        raise ValueError(f"no database {name!r}; there are {', '.join(sorted(known))}")
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for table in known[name]:
        types = {"text": "TEXT", "number": "NUMERIC", "year": "INTEGER", "key": "INTEGER"}
        columns = ", ".join(f"{column.name} {types[column.kind]}" for column in table.columns)
        connection.execute(f"CREATE TABLE {table.name} (id INTEGER PRIMARY KEY, {columns})")
        holes = ", ".join("?" * (len(table.columns) + 1))
        rows = ((number, *row) for number, row in enumerate(table.rows, start=1))
        connection.executemany(f"INSERT INTO {table.name} VALUES ({holes})", rows)
    return connection


# ── questions ─────────────────────────────────────────────────────────────────────────────────────────────

Question = tuple[str, str]  # the question in English, the query in SQL; or a part of either
COUNTING = ("How many {} are there?", "How many {} do we have?", "Count the {}.", "What is the number of {}?")
LISTING = ("List the {} of the {}.", "Show the {} of the {}.", "What are the {} of the {}?")
COMPARISONS = {
    "number": {">": ("above", "over", "greater than"), "<": ("below", "under", "less than")},
    "counted": {">": ("more than", "over"), "<": ("fewer than", "less than")},
    "year": {">": ("after",), "<": ("before",)},
}
INCLUSIVE = {">=": ("at least",), "<=": ("at most",)}
EXTREMES = {"DESC": ("highest", "most", "latest"), "ASC": ("lowest", "fewest", "earliest")}
AGGREGATES = {"MAX": ("highest", "maximum"), "MIN": ("lowest", "minimum"), "AVG": ("average",), "SUM": ("total",)}


def quote(value: Any) -> str:
    """A value as SQL writes it."""
    return f"'{value}'" if isinstance(value, str) else str(value)


def plural(words: str) -> str:
    """English plural of a noun; words that end in s mostly are one already ("goals")."""
    if words.endswith("y"):
        return f"{words[:-1]}ies"
    if words.endswith(("ch", "us")):
        return f"{words}es"
    return words if words.endswith("s") else f"{words}s"


def article(words: str) -> str:
    """The words with their article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def extreme(column: Column, direction: str) -> str:
    """The far end of a column: "the highest age", "the most goals", "the earliest year"."""
    highest, most, latest = EXTREMES[direction]
    return f"the {most if column.counted else latest if column.kind == 'year' else highest} {column.words}"


def text_condition(rng: random.Random, table: Table, column: Column) -> Question:
    """A condition on a text column: a phrase to put after the noun, and SQL."""
    value, other = rng.sample(table.values(column), 2)
    wordings = [f"with {column.words} {{}}", f"whose {column.words} is {{}}"]
    wording = rng.choice([*wordings, column.phrase, column.phrase] if column.phrase else wordings)
    kind = rng.random()
    if kind < 0.1:
        return wording.format(f"{value} or {other}"), f"{column.name} IN ({quote(value)}, {quote(other)})"
    if kind < 0.2:
        return f"whose {column.words} is not {value}", f"{column.name} != {quote(value)}"
    return wording.format(value), f"{column.name} = {quote(value)}"


def number_condition(rng: random.Random, table: Table, column: Column) -> Question:
    """A condition on a number or year that some but not all rows meet: a phrase and SQL."""
    low, high = sorted(rng.sample(table.values(column)[2:-2], 2))
    signs = COMPARISONS["counted" if column.counted else column.kind]
    signs = signs | (INCLUSIVE if column.kind == "number" else {})
    if rng.random() < 0.15:
        sign, words, sql = "", f"between {low} and {high}", f"{column.name} BETWEEN {low} AND {high}"
    else:
        sign = rng.choice(list(signs))
        words, sql = f"{rng.choice(signs[sign])} {low}", f"{column.name} {sign} {low}"
    if column.counted:
        return f"with {words} {column.words}", sql
    if rng.random() < 0.5:
        return f"whose {column.words} is {words}", sql
    return f"with {article(column.words)} {'of ' if sign in INCLUSIVE else ''}{words}", sql


def condition(rng: random.Random, table: Table, chance: float, second: float = 0.3) -> Question:
    """With this chance a condition, sometimes a second one on another column: a phrase and a WHERE clause."""
    if rng.random() >= chance:
        return "", ""
    columns = table.texts + table.numbers
    chosen = rng.sample(columns, 2 if len(columns) > 1 and rng.random() < second else 1)
    parts = [(text_condition if column in table.texts else number_condition)(rng, table, column) for column in chosen]
    phrases, clauses = zip(*parts, strict=True)
    return f" {' and '.join(phrases)}", f" WHERE {' AND '.join(clauses)}"


def ask_count(rng: random.Random, table: Table) -> Question:
    """How many rows there are, or meet a condition."""
    phrase, where = condition(rng, table, chance=0.85)
    return rng.choice(COUNTING).format(table.name + phrase), f"SELECT COUNT(*) FROM {table.name}{where}"


def ask_columns(rng: random.Random, table: Table) -> Question:
    """One or two columns of some or of all rows."""
    phrase, where = condition(rng, table, chance=0.85)
    unknown = [column for column in table.texts + table.numbers if f"{column.name} = " not in where]
    other = rng.choice(unknown)
    chosen = rng.choice([[table.label], [other], [table.label, other]])
    wanted = " and ".join(plural(column.words) for column in chosen)
    question = rng.choice(LISTING).format(wanted, table.name + phrase)
    if chosen == [table.label] and table.label.name == "name" and rng.random() < 0.3:
        question = f"Name the {table.name}{phrase}."
    return question, f"SELECT {', '.join(column.name for column in chosen)} FROM {table.name}{where}"


def ask_lookup(rng: random.Random, table: Table) -> Question:
    """One column of one named row."""
    column, value = rng.choice(table.texts + table.numbers), rng.choice(table.values(table.label))
    owner = rng.choice([value, f"the {table.noun} {value}"])
    wordings = ["What is the {} of {}?", "Show the {} of {}."]
    question = ("How many {} does {} have?" if column.counted else rng.choice(wordings)).format(column.words, owner)
    return question, f"SELECT {column.name} FROM {table.name} WHERE {table.label.name} = {quote(value)}"


def aggregate(rng: random.Random, table: Table) -> Question:
    """An aggregate of a number column: words and SQL."""
    column = rng.choice(table.numbers)
    if column.kind == "year":
        word, function = rng.choice([("latest", "MAX"), ("earliest", "MIN")])
    else:
        function = rng.choice(["MAX", "MIN", "AVG", "SUM"] if column.summable else ["MAX", "MIN", "AVG"])
        word = rng.choice(AGGREGATES[function])
    return f"{word} {'number of ' if column.counted else ''}{column.words}", f"{function}({column.name})"


def ask_aggregate(rng: random.Random, table: Table) -> Question:
    """The highest, lowest, average or total of a column."""
    words, function = aggregate(rng, table)
    phrase, where = condition(rng, table, chance=0.45, second=0)
    wordings = ["What is the {} of the {}?", "Find the {} of the {}.", "What is the {} among the {}?"]
    question = rng.choice(wordings).format(words, table.name + phrase)
    return question, f"SELECT {function} FROM {table.name}{where}"


def ask_extreme(rng: random.Random, table: Table) -> Question:
    """Which row, or which few rows, come first by a number."""
    column, direction = rng.choice(table.numbers), rng.choice(list(EXTREMES))
    wanted, limit = rng.choice([table.label, table.label, *table.texts]), rng.choice([1, 1, 1, 2, 3, 5])
    end = extreme(column, direction)
    if limit == 1:
        long, short = (f"What is the {wanted.words} of the {table.noun} with {end}?", f"Which {table.noun} has {end}?")
    else:
        long = f"List the {plural(wanted.words)} of the {limit} {table.name} with {end}."
        short = f"Which {limit} {table.name} have {end}?"
    question = rng.choice([long, short]) if wanted is table.label else long
    order = f"{column.name} DESC" if direction == "DESC" else column.name
    return question, f"SELECT {wanted.name} FROM {table.name} ORDER BY {order} LIMIT {limit}"


def ask_sorted(rng: random.Random, table: Table) -> Question:
    """All labels in the order of a number."""
    column, verb = rng.choice(table.numbers), rng.choice(["List", "Show"])
    ways = [("in ascending order", ""), ("from low to high", "")]
    ways += [("in descending order", " DESC"), ("from high to low", " DESC")]
    words, direction = rng.choice(ways)
    question = f"{verb} the {plural(table.label.words)} of the {table.name} sorted by {column.words} {words}."
    return question, f"SELECT {table.label.name} FROM {table.name} ORDER BY {column.name}{direction}"


def ask_groups(rng: random.Random, table: Table) -> Question:
    """A count or an aggregate for each value of a text column."""
    group = rng.choice(table.texts)
    if rng.random() < 0.55:
        function = "COUNT(*)"
        wordings = ["How many {} are there for each {}?", "Count the {} per {}.", "Show the number of {} for each {}."]
        question = rng.choice(wordings).format(table.name, group.words)
    else:
        words, function = aggregate(rng, table)
        wordings = ["What is the {} of the {} for each {}?", "Show the {} of the {} per {}."]
        question = rng.choice(wordings).format(words, table.name, group.words)
    return question, f"SELECT {group.name}, {function} FROM {table.name} GROUP BY {group.name}"


def ask_distinct(rng: random.Random, table: Table) -> Question:
    """The different values of a text column, or their number."""
    column = rng.choice(table.texts)
    values = f"{rng.choice(['different', 'distinct'])} {plural(column.words)}"
    if rng.random() < 0.4:
        question, selected = f"How many {values} do the {table.name} have?", f"COUNT(DISTINCT {column.name})"
    else:
        question, selected = rng.choice(LISTING).format(values, table.name), f"DISTINCT {column.name}"
    return question, f"SELECT {selected} FROM {table.name}"


def ask_prefix(rng: random.Random, table: Table) -> Question:
    """Labels that start with a letter, or their number."""
    label, letter = table.label, rng.choice(table.values(table.label))[0]
    if rng.random() < 0.35:
        selected = "COUNT(*)"
        question = f"How many {table.name} have {article(label.words)} that starts with {letter}?"
    else:
        selected, verb = label.name, rng.choice(["List", "Show"])
        question = f"{verb} the {plural(label.words)} of the {table.name} that start with {letter}."
    return question, f"SELECT {selected} FROM {table.name} WHERE {label.name} LIKE '{letter}%'"


def ask_join(rng: random.Random, parent: Table, child: Table) -> Question:
    """Rows of one table chosen by the row of the other table they belong to."""
    column = parent.label if rng.random() < 0.6 else rng.choice(parent.texts)
    value = rng.choice(parent.values(column))
    is_value = f"is {value}" if column is parent.label else f"has {column.words} {value}"
    rows = f"{child.name} whose {parent.noun} {is_value}"
    if rng.random() < 0.4:
        question, selected = rng.choice(COUNTING).format(rows), "COUNT(*)"
    else:
        wanted = rng.choice([child.label, child.label, *child.numbers])
        question, selected = (rng.choice(LISTING).format(plural(wanted.words), rows), f"{child.name}.{wanted.name}")
    joined = f"{child.name} JOIN {parent.name} ON {child.name}.{parent.noun}_id = {parent.name}.id"
    return question, f"SELECT {selected} FROM {joined} WHERE {parent.name}.{column.name} = {quote(value)}"


KINDS: dict[Callable[[random.Random, Table], Question], int] = {  # with the weight of each
    ask_count: 20,
    ask_columns: 24,
    ask_lookup: 9,
    ask_aggregate: 13,
    ask_extreme: 15,
    ask_sorted: 5,
    ask_groups: 10,
    ask_distinct: 5,
    ask_prefix: 4,
}


def ask(rng: random.Random, choice: Sequence[Table]) -> Question:
    """One question of a random kind about a database."""
    if len(choice) == 2 and rng.random() < JOIN_SHARE:
        return ask_join(rng, *choice)
    kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
    fitting = [table for table in choice if table.texts or kind not in (ask_groups, ask_distinct)]
    return kind(rng, rng.choice(fitting))


def new_row(rng: random.Random, name: str, choice: Sequence[Table], known: Collection[str]) -> dict[str, str]:
    """A row whose prompt is not `known` and whose result is worth asking for."""
    header = "\n".join(table.header for table in choice)
    with closing(database(name)) as connection:
        for _ in range(TRIES):
            question, sql = ask(rng, choice)
            prompt = f"{header}\nQuestion: {question}\nSQL:"
            if prompt in known:
                continue
            result = connection.execute(sql).fetchall()
            if result and result != [(0,)] and all(None not in row for row in result):
                return {"prompt": prompt, "completion": f" {sql}", "database": name}
    raise ValueError(f"no new question about {name!r} found after {len(known)} rows; ask for fewer rows")


def make_rows(count: int, seed: int, held_out: bool) -> list[dict[str, str]]:
    """`count` rows with different prompts, spread evenly over the databases.

    Raises ValueError if the databases do not have that many questions.
    """
    rng = random.Random(f"{'validation' if held_out else 'train'} {seed}")
    databases = tables(held_out)
    rows: dict[str, dict[str, str]] = {}
    for name in itertools.islice(itertools.cycle(databases), count):
        row = new_row(rng, name, databases[name], rows.keys())
        rows[row["prompt"]] = row
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled


# ── scoring ───────────────────────────────────────────────────────────────────────────────────────────────


def execution_accuracy(rows: list[dict[str, str]], answers: list[str]) -> float:
    """Share of answers whose query gives the same result as the row's own query, between 0 and 1.

    Only an answer's first line up to a semicolon counts. The order of result rows matters where the reference
    sorts; numbers are compared to six decimals. A query that fails, writes or never ends is a wrong answer.
    """
    if not rows or len(rows) != len(answers):
        raise ValueError(f"one answer a row is needed: {len(rows)} rows, {len(answers)} answers")
    right = sum(is_right(row, answer) for row, answer in zip(rows, answers, strict=True))
    return right / len(rows)


def is_right(row: dict[str, str], answer: str) -> bool:
    """True if the answer's query has the result of the row's own query, on a fresh copy of the database."""
    with closing(guarded(database(row["database"]))) as connection:
        expected = run(connection, row["completion"], most_rows=10_000)
        if not expected:
            raise ValueError(f"the reference query has no result: {row['completion']}")
        found = run(connection, answer, most_rows=len(expected) + 1)
    ordered = "ORDER BY" in row["completion"].upper()
    return found == expected if ordered else Counter(found) == Counter(expected)


def guarded(connection: sqlite3.Connection) -> sqlite3.Connection:
    """The connection, from now on for reading only, and with harmless functions only."""

    def authorize(action: int, _first: str | None, second: str | None, *_: str | None) -> int:
        reading = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)
        harmless = action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in SAFE_FUNCTIONS
        return sqlite3.SQLITE_OK if reading or harmless else sqlite3.SQLITE_DENY

    connection.execute("PRAGMA query_only = ON")
    connection.set_authorizer(authorize)
    return connection


def run(connection: sqlite3.Connection, answer: str, most_rows: int) -> list[tuple[Any, ...]]:
    """The first `most_rows` result rows of an answer's query; no rows if there is anything wrong with it."""
    sql = re.split(r"[\n;]", answer.strip(), maxsplit=1)[0]
    calls = itertools.count(1)
    connection.set_progress_handler(lambda: next(calls) > PROGRESS_CALLS, PROGRESS_INTERVAL)
    try:
        rows = connection.execute(sql).fetchmany(most_rows)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError):
        return []
    return [tuple(round(value, 6) if isinstance(value, float) else value for value in row) for row in rows]


def main() -> int:
    """Parse the command line and write both files."""
    parser = argparse.ArgumentParser(description="Build the demo's text-to-SQL data.")
    parser.add_argument("--output", type=Path, default=Path("build/text-to-sql"), help="folder for both files")
    parser.add_argument("--train", type=int, default=1200, help="rows about the training databases")
    parser.add_argument("--validation", type=int, default=100, help="rows about the held-out databases")
    parser.add_argument("--seed", type=int, default=0, help="draws other questions from the same databases")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, count, held_out in (("train", arguments.train, False), ("validation", arguments.validation, True)):
        try:
            rows = make_rows(count, arguments.seed, held_out)
        except ValueError as problem:
            parser.error(str(problem))
        path = arguments.output / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows about {len(tables(held_out))} databases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
