"""The demo's data: true by execution, the same for everybody, and scored without trusting the answers."""

import json
import sqlite3
import sys
from contextlib import closing

import pytest
import text_to_sql

SINGERS = {"prompt": "", "completion": " SELECT name FROM singers", "database": "music"}


@pytest.fixture(scope="module")
def training() -> list[dict[str, str]]:
    return text_to_sql.make_rows(480, seed=3, held_out=False)


@pytest.fixture(scope="module")
def validation() -> list[dict[str, str]]:
    return text_to_sql.make_rows(120, seed=3, held_out=True)


def result(row: dict[str, str], sql: str) -> list[tuple]:
    with closing(text_to_sql.database(row["database"])) as connection:
        return connection.execute(sql).fetchall()


def test_every_reference_has_a_result(training, validation):
    for row in training + validation:
        found = result(row, row["completion"])
        assert found
        assert found != [(0,)]
        assert not any(value is None for line in found for value in line)


def test_cuts_have_no_ties(training, validation):
    """Whoever is third among the top three must not depend on the order in which SQLite reads the rows."""
    cut = [row for row in training + validation if " LIMIT " in row["completion"]]
    assert cut
    for row in cut:
        ranked = row["completion"].split(" LIMIT ")[0]
        column = ranked.split("ORDER BY ")[1].split()[0]
        table = ranked.split(" FROM ")[1].split()[0]
        values = result(row, f"SELECT {column} FROM {table}")
        assert len(set(values)) == len(values)


def test_values_in_questions_are_values_in_rows(training, validation):
    """A quoted value that no row holds would teach a model to invent values."""
    for row in training + validation:
        quoted = row["completion"].split("'")[1::2]
        with closing(text_to_sql.database(row["database"])) as connection:
            dump = "\n".join(connection.iterdump())
        for value in quoted:
            assert f"'{value.rstrip('%')}" in dump
            assert value.rstrip("%") in row["prompt"]


def test_prompts_are_unique_and_short(training, validation):
    prompts = [row["prompt"] for row in training + validation]
    assert len(set(prompts)) == len(prompts)
    assert max(map(len, prompts)) < 260  # characters; about 60 tokens


def test_held_out_databases_are_new_words():
    """Tables and columns of the validation databases never occur in training, apart from `name`."""

    def words(held_out: bool) -> set[str]:
        found = [table for group in text_to_sql.tables(held_out).values() for table in group]
        return {table.name for table in found} | {column.name for table in found for column in table.columns}

    assert words(held_out=False) & words(held_out=True) == {"name"}
    assert not text_to_sql.tables(held_out=False).keys() & text_to_sql.tables(held_out=True).keys()


def test_every_kind_and_database_occurs(training):
    completions = "\n".join(row["completion"] for row in training)
    for part in ("JOIN", "GROUP BY", "DISTINCT", "BETWEEN", "LIKE", "IN (", "!=", "AVG(", "SUM(", "DESC LIMIT"):
        assert part in completions
    assert {row["database"] for row in training} == set(text_to_sql.tables(held_out=False))


def test_same_seed_same_bytes(tmp_path, monkeypatch):
    for folder, seed in (("first", "5"), ("again", "5"), ("other", "6")):
        arguments = ["--output", str(tmp_path / folder), "--train", "96", "--validation", "24", "--seed", seed]
        monkeypatch.setattr(sys, "argv", ["text_to_sql.py", *arguments])
        assert text_to_sql.main() == 0
    for name, count in (("train.jsonl", 96), ("validation.jsonl", 24)):
        first = (tmp_path / "first" / name).read_bytes()
        assert first == (tmp_path / "again" / name).read_bytes()
        assert first != (tmp_path / "other" / name).read_bytes()
        rows = [json.loads(line) for line in first.splitlines()]
        assert len(rows) == count
        assert all(row.keys() == {"prompt", "completion", "database"} for row in rows)


def test_database_is_the_same_at_every_call():
    with closing(text_to_sql.database("sailing")) as first, closing(text_to_sql.database("sailing")) as second:
        assert list(first.iterdump()) == list(second.iterdump())
    with pytest.raises(ValueError, match="no database 'atlantis'; there are airport"):
        text_to_sql.database("atlantis")


def test_asking_for_too_much_is_said(monkeypatch):
    monkeypatch.setattr(text_to_sql, "TRIES", 2)
    with pytest.raises(ValueError, match="ask for fewer rows"):
        text_to_sql.make_rows(2_000, seed=0, held_out=True)


def test_references_score_one(training, validation):
    rows = training + validation
    assert text_to_sql.execution_accuracy(rows, [row["completion"] for row in rows]) == 1.0
    chatty = [f"\n{row['completion'].lower()};\nSELECT 'more text'" for row in rows if "'" not in row["completion"]]
    plain = [row for row in rows if "'" not in row["completion"]]
    assert text_to_sql.execution_accuracy(plain, chatty) == 1.0


def test_other_results_score_zero():
    ordered = {**SINGERS, "completion": " SELECT name FROM singers ORDER BY debut"}
    assert text_to_sql.execution_accuracy([SINGERS], ["SELECT name FROM singers ORDER BY name"]) == 1.0
    assert text_to_sql.execution_accuracy([ordered], ["SELECT name FROM singers ORDER BY debut DESC"]) == 0.0
    for wrong in ("SELECT id FROM singers", "SELECT name FROM singers LIMIT 11", "SELECT name, id FROM singers"):
        assert text_to_sql.execution_accuracy([SINGERS], [wrong]) == 0.0
    assert text_to_sql.execution_accuracy([SINGERS, SINGERS], ["SELECT name FROM singers", ""]) == 0.5


@pytest.mark.parametrize(
    "answer",
    [
        "",
        ";",
        "no idea",
        "SELECT nothing FROM singers",
        "SELECT name FROM singers WHERE name = ?",
        "SELECT '\0'",
        "SELECT '\ud800'",
        "SELECT CAST(x'80' AS TEXT)",
        "SELECT " + "(" * 5000,
        "DROP TABLE singers",
        "DELETE FROM singers",
        "UPDATE singers SET name = 'x'",
        "PRAGMA query_only = OFF",
        "ATTACH 'stolen.db' AS stolen",
        "SELECT load_extension('evil')",
        "SELECT randomblob(1000000000)",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT MAX(i) FROM n",
        "SELECT COUNT(*) FROM " + ", ".join(f"singers AS s{number}" for number in range(12)),
    ],
)
def test_broken_and_destructive_answers_score_zero(answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert text_to_sql.execution_accuracy([SINGERS, SINGERS], [answer, SINGERS["completion"]]) == 0.5
    assert not list(tmp_path.iterdir())


def test_guarded_connection_stays_as_it_was():
    with closing(text_to_sql.database("music")) as connection:
        before = list(connection.iterdump())
        text_to_sql.guarded(connection)
        for sql in ("DROP TABLE singers", "DELETE FROM songs", "INSERT INTO songs DEFAULT VALUES", "VACUUM"):
            assert text_to_sql.run(connection, sql, most_rows=5) == []
            with pytest.raises(sqlite3.DatabaseError):
                connection.execute(sql)
        connection.set_authorizer(None)
        assert list(connection.iterdump()) == before


def test_one_answer_a_row_is_needed():
    with pytest.raises(ValueError, match="1 rows, 0 answers"):
        text_to_sql.execution_accuracy([SINGERS], [])
